"""What is asked of every subject: cells of image size, prompt, answer and batch, and seeded inputs for them."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from ...errors import OneVisionError

Size = tuple[int, int]  # width and height in pixels
DEFAULT_SIDE = 448  # 256 image tokens


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape of request: `batch` sequences together, each with one image of a size, or none, before its prompt.

    prompt_tokens: of text, those of the image come besides.
    """

    size: Size | None
    prompt_tokens: int
    output_tokens: int
    batch: int = 1

    @property
    def image(self) -> str | None:
        """The size as WIDTHxHEIGHT."""
        return None if self.size is None else "{}x{}".format(*self.size)

    @property
    def images(self) -> int:
        """Of each sequence."""
        return int(self.size is not None)

    @property
    def name(self) -> str:
        """For a reader, and to find the same cell in another record."""
        tokens = f"{self.prompt_tokens} tokens, {self.output_tokens} out"
        return f"{self.image or 'no image'}, {tokens}, batch {self.batch}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Cell":
        """The cell of plain data."""
        return cls(**{**raw, "size": raw["size"] and (int(raw["size"][0]), int(raw["size"][1]))})


def grid(
    sizes: Sequence[Size | None], prompts: Sequence[int], outputs: Sequence[int], batches: Sequence[int]
) -> list[Cell]:
    """Every combination once, the batch changing fastest."""
    return [Cell(*each) for each in dict.fromkeys(product(sizes, prompts, outputs, batches))]


def read_size(text: str) -> Size | None:
    """WIDTHxHEIGHT, or None for "none". Raises OneVisionError."""
    width, _, height = text.partition("x")
    if text == "none":
        return None
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise OneVisionError(f"{text!r} is no image size: give WIDTHxHEIGHT, such as 1036x728, or none")
    return int(width), int(height)


def default_size(max_pixels: int, factor: int) -> Size:
    """A square that a model takes as it is: sides of whole tokens (`factor` pixels), at most 448."""
    side = min(DEFAULT_SIDE, int(max_pixels**0.5)) // factor * factor
    return (side, side)


def seeded_images(cell: Cell, seed: int) -> list[np.ndarray]:
    """One image of noise for each sequence: uint8 [height, width, 3]."""
    if cell.size is None:
        return []
    width, height = cell.size
    return list(np.random.default_rng(seed).integers(0, 256, (cell.batch, height, width, 3), np.uint8))


def seeded_ids(cell: Cell, tokens: int, vocab_size: int, seed: int, special: Collection[int] = ()) -> np.ndarray:
    """Random text, int64 [batch, tokens], without the ids in `special`."""
    ids = np.setdiff1d(np.arange(vocab_size), np.array(list(special), np.int64))
    return np.random.default_rng(seed).choice(ids, (cell.batch, tokens)).astype(np.int64)
