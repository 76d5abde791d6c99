"""The data that quantisation is calibrated on and evaluated on: rows in a fixed order, prepared when asked for."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..bundle import Progress, no_progress
from ..errors import OneVisionError
from .rows import Preparer, Row
from .sources import Conversation, Entry, read_folder, read_jsonl
from .token_rows import read_npz

__all__ = [
    "SHIPPED_CALIBRATION",
    "SHIPPED_EVALUATION",
    "Dataset",
    "Preparer",
    "Row",
    "hold_out",
    "load_dataset",
    "require_images",
]

_DEMO = Path(__file__).resolve().parent.parent / "demo"
SHIPPED_CALIBRATION = _DEMO / "calibration" / "questions.jsonl"
SHIPPED_EVALUATION = _DEMO / "evaluation" / "questions.jsonl"
_SHIPPED = {SHIPPED_CALIBRATION: "shipped calibration set", SHIPPED_EVALUATION: "shipped evaluation set"}


class Dataset:
    """A sequence of rows. `source` names where they come from, for messages and the manifest; it is no path."""

    def __init__(self, source: str, entries: Sequence[Entry], preparer: Preparer) -> None:
        self.source, self.preparer = source, preparer
        self._entries = tuple(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Row:
        """Prepare one row; its images are read now. Raises OneVisionError naming the row."""
        entry = self._entries[index]
        try:
            return entry.prepare(self.preparer)
        except OneVisionError as problem:
            raise OneVisionError(f"{entry.name}: {problem}") from problem.__cause__

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its rows, not prepared."""
        return self._entries

    @property
    def media(self) -> list[tuple[str, ...]]:
        """What each row shows, without reading it: two rows with an item in common show the same image or video."""
        return [entry.media for entry in self._entries]

    def subset(self, indices: Sequence[int]) -> "Dataset":
        """The rows of these indices, in file order."""
        return Dataset(self.source, [self._entries[i] for i in sorted(indices)], self.preparer)

    def sample(self, samples: int, seed: int = 0) -> "Dataset":
        """At most `samples` rows, chosen without replacement, in file order; fewer are a part of more."""
        if samples < 1:
            raise OneVisionError(f"samples is {samples}; at least one row is needed")
        return self.subset(_generator(seed).permutation(len(self))[:samples].tolist())

    def digest(self, progress: Progress = no_progress) -> str:
        """sha256 of every row as prepared: its ids, where the answer starts, pixel values and grids.

        So it tells data, tokenizer and preprocessing apart, and nothing else: names and folders do not count.
        It prepares every row once, which makes it the full check of a dataset, too. progress is told rows.
        """
        digest = hashlib.sha256()
        for done, row in enumerate(self, 1):
            for part in _parts(row):
                digest.update(part)
            progress(done, len(self), row.name)
        return digest.hexdigest()


def load_dataset(
    source: str | os.PathLike[str] | None, preparer: Preparer, *, samples: int | None = None, seed: int = 0
) -> Dataset:
    """Open a dataset: a .jsonl file, a folder of images or of .npz files, an .npz file, or None for the shipped set.

    samples: at most as many rows, chosen by `seed`; None for all. What each source holds: `read_jsonl`,
    `read_folder`, `read_npz`. That files exist and lines are sound is checked here, images when a row is
    prepared. Raises OneVisionError.
    """
    path = SHIPPED_CALIBRATION if source is None else Path(source)
    entries = _entries(path, preparer)
    if not entries:
        raise OneVisionError(f"{path}: has no rows")
    if any(isinstance(entry, Conversation) for entry in entries):
        preparer.require_tokenizer(path)
    whole = Path(os.path.abspath(path))
    dataset = Dataset(_SHIPPED.get(whole, whole.name), entries, preparer)
    return dataset if samples is None else dataset.sample(samples, seed)


def hold_out(dataset: Dataset, share: float = 0.25, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into rows for calibration and about `share` of them for evaluation, each in file order.

    Rows that show the same image go to the same side. Raises OneVisionError where that leaves a side empty.
    """
    if not 0 < share < 1:
        raise OneVisionError(f"the share held out is {share}; it must be between 0 and 1")
    groups = _groups(dataset.media)
    if len(groups) < 2:
        raise OneVisionError(
            f"{dataset.source}: its rows cannot be split into calibration and evaluation, they are one, or all about "
            "the same images; add rows, or give evaluation data of its own"
        )
    wanted, held = share * len(dataset), list[int]()
    for i in _generator(seed).permutation(len(groups))[1:]:  # the first stays for calibration
        if len(held) + len(groups[i]) / 2 <= wanted:
            held += groups[i]
    held = held or min(groups, key=len)
    return dataset.subset(list(set(range(len(dataset))).difference(held))), dataset.subset(held)


def require_images(dataset: Dataset) -> None:
    """Refuse to calibrate on text alone; no image is read. Raises OneVisionError."""
    if not any(dataset.media):
        count = f"none of its {len(dataset)} rows has" if len(dataset) > 1 else "its one row does not have"
        raise OneVisionError(
            f"{dataset.source}: {count} an image or a video; calibrated on text alone, the ranges of image tokens "
            "are never seen and answers about images degrade: add rows with images"
        )


def _entries(path: Path, preparer: Preparer) -> Sequence[Entry]:
    if not path.exists():
        raise OneVisionError(f"{path}: no such file or folder; give a .jsonl file, an .npz file or a folder of images")
    if path.is_dir():
        return read_folder(path, preparer.config)
    if path.suffix.lower() == ".npz":
        return read_npz(path, preparer.config)
    if path.suffix.lower() == ".jsonl":
        return read_jsonl(path)
    raise OneVisionError(f"{path}: is no .jsonl file, no .npz file and no folder of images or .npz files")


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise OneVisionError(f"seed is {seed}; it must be a whole number from 0")
    return np.random.default_rng(seed)


def _groups(media: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Indices of the rows, those together that have an item in common, directly or through others."""
    owner: dict[str, list[int]] = {}
    groups: dict[int, list[int]] = {}
    for index, items in enumerate(media):
        found = {id(owner[item]): owner[item] for item in items if item in owner}
        group = max(found.values(), key=len, default=[])
        for other in found.values():
            if other is not group:
                group += other
                del groups[id(other)]
                owner |= {item: group for i in other for item in media[i]}
        group.append(index)
        groups[id(group)] = group
        owner |= dict.fromkeys(items, group)
    return list(groups.values())


def _parts(row: Row) -> Iterator[bytes | memoryview]:
    """A row as bytes, every array after its type and shape."""
    answer_start = np.array(row.answer_start, np.int64)
    for array in (
        row.input_ids,
        answer_start,
        row.pixel_values,
        row.image_grid_thw,
        row.pixel_values_videos,
        row.video_grid_thw,
    ):
        if array is None:
            yield b"none;"
        else:
            yield f"{array.dtype.str}{list(array.shape)};".encode()
            yield np.ascontiguousarray(array).data
