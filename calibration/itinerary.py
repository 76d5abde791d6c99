"""All images and prompts of the data, and where each has its rows in the streams between stages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config import ModelConfig
from ..runtime.images import patch_positions
from .dataset import Dataset
from .rows import Row
from .scored import Scored, scored
from .stages import BLOCK, MERGER, STEM, Kind


@dataclass(frozen=True, slots=True)
class Segment:
    """An image or a frame: its rows in the stream of the tower and its tokens in that of the merger."""

    size: tuple[int, int]  # patches
    rows: slice
    tokens: slice
    calibrating: bool

    @property
    def patches(self) -> int:
        """How many there are."""
        return self.size[0] * self.size[1]

    def positions(self, merge: int) -> np.ndarray:
        """Row and column of each patch, int64 [patches, 2], in merge order."""
        return patch_positions(*self.size, merge)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A row of the data: its rows in the stream of the decoder, and the tokens of its media in the merger's."""

    ids: np.ndarray
    rows: slice
    media: slice
    media_places: np.ndarray  # of the media's tokens among its own, images first
    scored: Scored
    calibrating: bool


@dataclass
class Itinerary:
    """All segments and prompts, in the order of the data."""

    segments: list[Segment] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    patches: int = 0  # rows in the stream of the tower, class tokens among them
    image_tokens: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, datasets: Sequence[tuple[Dataset, bool]], config: ModelConfig) -> "Itinerary":
        """Of datasets, each with whether it calibrates. Every row is prepared once."""
        itinerary = cls()
        for dataset, calibrating in datasets:
            for row in dataset:
                itinerary._add(row, calibrating, config)
        return itinerary

    def _add(self, row: Row, calibrating: bool, config: ModelConfig) -> None:
        first = self.image_tokens
        for size in sizes(row):
            count = size[0] * size[1]
            rows = slice(self.patches, self.patches + count + 1)
            tokens = slice(self.image_tokens, self.image_tokens + count // config.vision.merge_unit)
            self.segments.append(Segment(size, rows, tokens, calibrating))
            self.patches, self.image_tokens = rows.stop, tokens.stop
        ids, media = row.input_ids, slice(first, self.image_tokens)
        places = np.concatenate([np.flatnonzero(ids == i) for i in (config.image_token_id, config.video_token_id)])
        rows = slice(self.tokens, self.tokens + len(ids))
        self.prompts.append(Prompt(ids, rows, media, places, scored(row, config), calibrating))
        self.tokens = rows.stop

    def calibrating_rows(self, kind: Kind) -> int:
        """How many rows a stage of this kind will be seen to read in calibration."""
        segments = [segment for segment in self.segments if segment.calibrating]
        if kind is STEM:
            return sum(segment.patches for segment in segments)
        if kind is BLOCK:
            return sum(segment.patches + 1 for segment in segments)
        if kind is MERGER:
            return sum(segment.tokens.stop - segment.tokens.start for segment in segments)
        return sum(len(prompt.ids) for prompt in self.prompts if prompt.calibrating)


def sizes(row: Row) -> Iterator[tuple[int, int]]:
    """Patches (height, width) of every image and frame of a row, images first."""
    for grid in (row.image_grid_thw, row.video_grid_thw):
        for frames, height, width in [] if grid is None else grid.tolist():
            yield from [(height, width)] * frames


def pixels(row: Row) -> Iterator[np.ndarray]:
    """Pixel rows of every image and frame of a row, in the same order: float32 [patches, patch_dim]."""
    for values in (row.pixel_values, row.pixel_values_videos):
        if values is not None:
            grid = row.image_grid_thw if values is row.pixel_values else row.video_grid_thw
            assert grid is not None
            counts = [height * width for frames, height, width in grid.tolist() for _ in range(frames)]
            yield from np.split(values, np.cumsum(counts)[:-1])
