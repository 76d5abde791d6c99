"""Token-level rows in .npz files, for checkpoints without a tokenizer and for data that is already prepared.

input_ids          [tokens] or [batch, tokens], with attention_mask (1 = token) where rows are padded left or right
pixel_values       [patches, patch_dim], and image_grid_thw [n, 3]; for videos pixel_values_videos, video_grid_thw
answer_start       an integer or [batch]: the column of input_ids where the answer begins; without it, no answer

Pixel inputs belong to the placeholders in row-major order, as for `Model.logits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..errors import OneVisionError
from ..runtime.stitching import check_counts
from ..runtime.token_model import unpadded
from ..runtime.vision import check_grid, check_pixels, media_tokens
from .rows import Preparer, Row

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The images, or the videos, of one row: those numbered `first` to `last` - 1 of a file's `grid_thw` [n, 3]."""

    kind: str
    grid_thw: np.ndarray
    first: int
    last: int

    def read(self, file: Path, config: ModelConfig) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Pixel rows and grid, or None twice for a row without any."""
        if self.first == self.last:
            return None, None
        state = file.stat()
        pixels = _pixels(file, self.kind, (state.st_mtime_ns, state.st_size))
        check_pixels(pixels, self.grid_thw, self.kind, config.vision)
        ends = np.concatenate([[0], np.cumsum(np.prod(self.grid_thw, axis=1))])
        return pixels[ends[self.first] : ends[self.last]].copy(), self.grid_thw[self.first : self.last].copy()


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One row of an .npz file, its pixel rows not yet read."""

    name: str
    file: Path
    input_ids: np.ndarray
    answer_start: int
    shares: tuple[Share, ...]

    @property
    def media(self) -> tuple[str, ...]:
        """Its own name where it shows anything: no other row shows the same."""
        return (self.name,) if any(share.first < share.last for share in self.shares) else ()

    def prepare(self, preparer: Preparer) -> Row:
        """Read its pixel rows. Raises OneVisionError where they are not those of the grid, or not finite."""
        try:
            images, videos = (share.read(self.file, preparer.config) for share in self.shares)
        except OSError as error:
            raise OneVisionError(f"the file can no longer be read: {error.strerror}") from error
        return Row(self.name, self.input_ids.copy(), self.answer_start, *images, *videos)


def read_npz(path: Path, config: ModelConfig) -> list[TokenRow]:
    """The rows of an .npz file, their ids, grids and counts checked. Raises OneVisionError naming the file."""
    try:
        arrays, stored = _read(path, "input_ids", "attention_mask", "answer_start", *map(_grid_name, _PIXELS))
        if "input_ids" not in arrays:
            raise OneVisionError(f"has no input_ids; it holds {', '.join(stored) or 'nothing'}")
        ids, spans = unpadded(arrays["input_ids"], arrays.get("attention_mask"), config.text.vocab_size)
        starts = _answer_starts(arrays.get("answer_start"), spans)
        tokens = {"image": config.image_token_id, "video": config.video_token_id}
        for row, start in zip(ids, starts, strict=True):
            if np.isin(row[start:], list(tokens.values())).any():
                raise OneVisionError("an answer holds placeholders of an image or a video; check answer_start")
        shares = [
            _shares(kind, check_grid(_grid(kind, arrays, stored), kind, config.vision), token, ids, config)
            for kind, token in tokens.items()
        ]
    except OneVisionError as problem:
        raise OneVisionError(f"{path}: {problem}") from problem.__cause__
    names = [path.name if len(ids) == 1 else f"{path.name}[{i}]" for i in range(len(ids))]
    rows = zip(names, ids, starts, zip(*shares, strict=True), strict=True)
    return [TokenRow(name, path.absolute(), row, start, share) for name, row, start, share in rows]


def _read(path: Path, *wanted: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the wanted arrays that a file has, and the names of all it has. Nothing else is read."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise OneVisionError("holds one array without a name, not an .npz archive; write it with numpy.savez")
        with archive:
            return {name: archive[name] for name in wanted if name in archive.files}, archive.files
    except OneVisionError:
        raise
    except MemoryError:
        raise OneVisionError("holds more than fits into memory; write fewer rows to a file") from None
    except Exception as error:  # a damaged archive fails in any way zipfile, zlib and numpy can
        raise OneVisionError(
            f"is not a sound .npz archive of numbers: it is truncated, damaged or holds objects ({error})"
        ) from error


@lru_cache(maxsize=2)  # the images and the videos of the file that is being read: its rows come one by one
def _pixels(path: Path, kind: str, state: tuple[int, int]) -> np.ndarray:
    """All pixel rows of a file, floating-point ones as float32. `state` tells a changed file apart."""
    arrays, _ = _read(path, _PIXELS[kind])
    if _PIXELS[kind] not in arrays:
        raise OneVisionError(f"no longer has {_PIXELS[kind]}")
    pixels = arrays[_PIXELS[kind]]
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return pixels.astype(np.float32) if pixels.dtype.kind == "f" else pixels


def _grid_name(kind: str) -> str:
    return f"{kind}_grid_thw"


def _grid(kind: str, arrays: dict[str, np.ndarray], stored: Sequence[str]) -> np.ndarray:
    pair = _PIXELS[kind], _grid_name(kind)
    present = [name for name in pair if name in stored]
    if len(present) == 1:
        raise OneVisionError(f"has {present[0]} alone; {pair[0]} and {pair[1]} go together")
    return arrays[pair[1]] if present else np.empty((0, 3), np.int64)


def _answer_starts(value: np.ndarray | None, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where each row's answer begins, counted from the row's first token."""
    if value is None:
        return [right - left for left, right in spans]
    if value.dtype.kind not in "iu" or value.shape not in ((), (len(spans),)):
        raise OneVisionError(
            f"answer_start must be an integer or one for each of {len(spans)} rows, not {value.dtype} "
            f"{list(value.shape)}"
        )
    starts = np.broadcast_to(value, len(spans)).tolist()
    for i, (start, (left, right)) in enumerate(zip(starts, spans, strict=True)):
        if not left < start <= right:
            raise OneVisionError(f"answer_start is {start} in row {i}; it must be a column from {left + 1} to {right}")
    return [start - left for start, (left, _) in zip(starts, spans, strict=True)]


def _shares(
    kind: str, grid_thw: np.ndarray, token_id: int, ids: Sequence[np.ndarray], config: ModelConfig
) -> list[Share]:
    """Which images, or videos, belong to each row, by the number of its placeholders."""
    bounds = np.concatenate([[0], np.cumsum(media_tokens(grid_thw, config.vision))])
    check_counts(np.concatenate(ids), token_id, int(bounds[-1]), kind)
    wanted = np.cumsum([np.count_nonzero(row == token_id) for row in ids])
    cuts = np.minimum(np.searchsorted(bounds, wanted), len(grid_thw))
    for row in np.flatnonzero(bounds[cuts] != wanted):
        raise OneVisionError(
            f"row {row} ends after {wanted[row]} {kind} placeholders, in the middle of one {kind}; they end after "
            f"{bounds[1:].tolist()}"
        )
    firsts = [0, *cuts[:-1].tolist()]
    return [Share(kind, grid_thw, *span) for span in zip(firsts, cuts.tolist(), strict=True)]
