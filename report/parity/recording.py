"""What a reference said, on disk: streams between stages of a few rows, logits and answers of all.

A recording is made by every comparison, and can be kept: then a machine without the reference is checked against it.

    reference.json          what it is of: subject, model, data, rows, how far rounding to BF16 moves every stage
    NNNN.ids.npy            of row NNNN: int64 [tokens]
    NNNN.logits.npy         float32 [positions, vocab]
    NNNN.likeliest.npy      of what it answered: int64 [tokens + 1, 32], its likeliest ids at each place
    NNNN.logits_of.npy      float32 [tokens + 1, 32], their logits
    NNNN.STAGE.f32          of the rows that were walked: float32 [n, width], without a header
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np

from ...bundle import writing
from ...calibration.rows import Row
from ...calibration.scored import Scored
from ...config import ModelConfig, read_json
from ...errors import OneVisionError
from .probe import stage_rank

RECORD, FORMAT, FORMAT_VERSION = "reference.json", "onevision-edge reference", 1
LIKELIEST = 32  # tokens that are kept of an answer's distributions


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """One row: scored positions, ids expected after them (None without an answer), what the reference answered."""

    name: str
    answer_start: int
    positions: list[int]
    targets: list[int] | None
    generated: list[int]
    walked: bool
    image_grid_thw: list[list[int]] | None
    video_grid_thw: list[list[int]] | None


@dataclass
class Recording:
    """A recording, open. widths: of every stage's stream, in the model's order; noise: {stage: {error, own}}."""

    directory: Path
    subject: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    max_tokens: int
    rows: list[RecordedRow] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    noise: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return ModelConfig.from_dict(self.model)

    @property
    def walked(self) -> list[int]:
        """Indices of the rows that were walked."""
        return [index for index, row in enumerate(self.rows) if row.walked]

    def stream(self, index: int, stage: str) -> np.ndarray | None:
        """What a stage gave for a row: float32 [n, width], mapped; None where it was not recorded."""
        path = self.directory / f"{index:04d}.{stage}.f32"
        if stage not in self.widths or not path.is_file():
            return None
        width = self.widths[stage]
        count = path.stat().st_size // (4 * width)
        return np.memmap(path, np.float32, "r", shape=(count, width)) if count else np.empty((0, width), np.float32)

    def logits(self, index: int) -> np.ndarray:
        """Of a row's positions: float32 [n, vocab], mapped."""
        return self._array(f"{index:04d}.logits.npy")

    def row(self, index: int) -> Row:
        """A walked row, as the reference prepared it."""
        recorded, pixels = self.rows[index], self.stream(index, "preprocess")
        grids = [_grid(recorded.image_grid_thw), _grid(recorded.video_grid_thw)]
        images = 0 if grids[0] is None else int(np.prod(grids[0], axis=1).sum())
        parts: list[np.ndarray | None] = [None, None]
        if pixels is not None:
            parts = [
                pixels[:images] if grids[0] is not None else None,
                pixels[images:] if grids[1] is not None else None,
            ]
        ids = np.array(self._array(f"{index:04d}.ids.npy"))
        return Row(recorded.name, ids, recorded.answer_start, parts[0], grids[0], parts[1], grids[1])

    def ids(self, index: int) -> np.ndarray:
        """Of a row: int64 [tokens]."""
        return self._array(f"{index:04d}.ids.npy")

    def likeliest(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and logits of the likeliest tokens at each place of the reference's answer, [tokens + 1, n] each."""
        return self._array(f"{index:04d}.likeliest.npy"), self._array(f"{index:04d}.logits_of.npy")

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.load(self.directory / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise OneVisionError(
                f"{self.directory / name}: cannot be read ({error}); record the reference again"
            ) from error

    def sort_stages(self) -> None:
        """Put the stages into the model's order; rows without images come without some."""
        self.widths = {stage: self.widths[stage] for stage in sorted(self.widths, key=stage_rank)}

    @classmethod
    def open(cls, path: str | Path) -> "Recording":
        """A recording that was kept. Raises OneVisionError where it is none, or not complete."""
        directory = Path(path)
        if not (directory / RECORD).is_file():
            raise OneVisionError(
                f"{directory} holds no {RECORD}, so it is not a stored reference: see --save-reference"
            )
        raw = read_json(directory / RECORD)
        if raw.get("format") != FORMAT or raw.get("format_version") != FORMAT_VERSION:
            raise OneVisionError(f"{directory / RECORD} is not what this version writes; record the reference again")
        try:
            rows = [RecordedRow(**row) for row in raw["rows"]]
            told = {key: raw[key] for key in ("subject", "model", "data", "max_tokens", "widths", "noise")}
            found = cls(directory=directory, rows=rows, **told)
            _check_files(directory, raw["files"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OneVisionError(f"{directory / RECORD} is not what this version writes: {error!r}") from error
        return found

    def write(self) -> None:
        """Write what the files belong to; with it the directory is a recording."""
        self.sort_stages()
        sizes = {path.name: path.stat().st_size for path in sorted(self.directory.iterdir()) if path.name != RECORD}
        told = {name: getattr(self, name) for name in ("subject", "model", "data", "max_tokens", "widths", "noise")}
        rows = [asdict(row) for row in self.rows]
        record = {"format": FORMAT, "format_version": FORMAT_VERSION, **told, "rows": rows, "files": sizes}
        (self.directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


class StreamWriter:
    """A probe that writes a row's streams."""

    def __init__(self, recording: Recording, index: int) -> None:
        self.recording, self.index = recording, index
        self._files: dict[str, BinaryIO] = {}

    def before(self, stage: str, rows: np.ndarray) -> np.ndarray:
        """What the stage reads, as it is."""
        return rows

    def after(self, stage: str, rows: np.ndarray) -> None:
        """Append what a stage gave."""
        if stage not in self._files:
            path = self.recording.directory / f"{self.index:04d}.{stage}.f32"
            self._files[stage] = open(path, "wb")  # noqa: SIM115 - closed by close
            self.recording.widths.setdefault(stage, rows.shape[1])
        self._files[stage].write(np.ascontiguousarray(rows, np.float32).data)

    def close(self) -> None:
        """The row is done."""
        for file in self._files.values():
            file.close()


def save_row(recording: Recording, index: int, ids: np.ndarray, logits: np.ndarray, answered: np.ndarray) -> None:
    """Ids and logits of a row, and the likeliest tokens where its answer was given: logits [tokens + 1, vocab]."""
    count = min(LIKELIEST, answered.shape[1])
    best = np.argpartition(-answered, count - 1, axis=1)[:, :count]
    arrays: dict[str, np.ndarray] = {"ids": ids.astype(np.int64), "logits": logits.astype(np.float32)}
    arrays |= {"likeliest": best, "logits_of": np.take_along_axis(answered, best, axis=1).astype(np.float32)}
    for name, values in arrays.items():
        np.save(recording.directory / f"{index:04d}.{name}.npy", values)


def recorded_row(row: Row, scored: Scored, generated: list[int], walked: bool) -> RecordedRow:
    """What is kept of a row beside its arrays."""
    targets = None if scored.targets is None else scored.targets.tolist()
    grids = [None if grid is None else grid.tolist() for grid in (row.image_grid_thw, row.video_grid_thw)]
    return RecordedRow(row.name, row.answer_start, scored.positions.tolist(), targets, generated, walked, *grids)


@contextmanager
def recording_directory(kept: Path | None, overwrite: bool = False) -> Iterator[Path]:
    """Where to record: a directory that appears when it is complete, or one that goes with the block."""
    if kept is not None:
        with writing(kept, overwrite, marker=RECORD, what="stored reference") as writer:
            yield writer.directory
        return
    with TemporaryDirectory(prefix="onevision-edge-reference-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _check_files(directory: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        path = directory / Path(name).name
        if not path.is_file() or path.stat().st_size != size:
            raise OneVisionError(f"{path} is missing or has another size than recorded; copy the reference again")


def _grid(rows: list[list[int]] | None) -> np.ndarray | None:
    return None if rows is None else np.array(rows, np.int64)
