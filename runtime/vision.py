"""Running the vision graph on images of any mix of sizes."""

import math
from typing import Any

import numpy as np

from ..config import VisionConfig
from ..errors import OneVisionError
from ..precision import from_float32
from .cache import AnyGraph, Rows
from .images import patch_positions


class VisionEncoder:
    """pixel rows and grids in, embeddings out."""

    def __init__(self, graph: AnyGraph, config: VisionConfig) -> None:
        self.graph, self.config = graph, config

    def tokens(self, grid_thw: np.ndarray) -> np.ndarray:
        """Embeddings each entry of a grid [n, 3] becomes: int64 [n]."""
        return media_tokens(grid_thw, self.config)

    def check(self, pixel_values: np.ndarray, grid_thw: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Both inputs as arrays of the right dtype, after checking that they belong together."""
        grid = check_grid(grid_thw, name, self.config)
        pixels = check_pixels(pixel_values, grid, name, self.config)
        return from_float32(pixels, self.graph.fmt), grid

    def __call__(self, pixel_values: np.ndarray, grid_thw: np.ndarray) -> Rows:
        """Embeddings of all images (and video frames), in order: [tokens, D] in the graph's format.

        pixel_values: [patches, patch_dim]; grid_thw: [n, 3]. Segments of one size share calls.
        """
        segments = [(int(h), int(w)) for t, h, w in grid_thw for _ in range(t)]
        sizes = np.array([h * w for h, w in segments], np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        merge_unit = self.config.merge_unit
        most = {size: self.graph.images_per_call(self.config, size) for size in dict.fromkeys(segments)}
        embeds: Any = self.graph.empty((int(starts[-1]) // merge_unit, self.config.text_hidden_size))
        for size, count in most.items():
            members = [i for i, segment in enumerate(segments) if segment == size]
            for batch in (members[i : i + count] for i in range(0, len(members), count)):
                pixels = np.stack([pixel_values[starts[i] : starts[i + 1]] for i in batch])
                for i, rows in zip(batch, self._encode(pixels, size), strict=True):
                    embeds[starts[i] // merge_unit : starts[i + 1] // merge_unit] = rows
        return embeds

    def _encode(self, pixels: np.ndarray, size: tuple[int, int]) -> Rows:
        positions = patch_positions(*size, self.config.spatial_merge_size)
        return self.graph.run({"pixel_values": pixels, "patch_positions": positions})[0]


def media_tokens(grid_thw: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Embeddings each entry of a grid [n, 3] becomes: int64 [n]."""
    return np.prod(grid_thw, axis=1) // config.merge_unit


def check_grid(grid_thw: np.ndarray, name: str, config: VisionConfig) -> np.ndarray:
    """The grid as int64 [n, 3], after checking that the merger can take it."""
    merge = config.spatial_merge_size
    grid = np.asarray(grid_thw)
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype.kind not in "iu" or (grid < 1).any():
        raise OneVisionError(f"{name}_grid_thw must be positive integers [n, 3], not {grid.dtype} {list(grid.shape)}")
    if (grid[:, 1:] % merge).any():
        raise OneVisionError(f"{name}_grid_thw heights and widths must be multiples of {merge}: {grid.tolist()}")
    return grid.astype(np.int64)


def check_pixels(pixel_values: np.ndarray, grid_thw: np.ndarray, name: str, config: VisionConfig) -> np.ndarray:
    """The pixel rows as an array, in their own dtype, after checking that they are those of the grid."""
    pixels = np.asarray(pixel_values)
    if pixels.dtype.kind != "f":
        raise OneVisionError(
            f"{name} pixel values are {pixels.dtype}: give floating-point rows, as preprocess_images makes them"
        )
    patches = sum(math.prod(row) for row in grid_thw.tolist())  # in Python's integers, which do not wrap
    if pixels.shape != (patches, config.patch_dim):
        raise OneVisionError(
            f"{name} pixel values have shape {list(pixels.shape)}; the grid {grid_thw.tolist()} asks for "
            f"[{patches}, {config.patch_dim}]"
        )
    if not np.isfinite(pixels).all():
        raise OneVisionError(f"{name} pixel values hold NaN or infinity")
    return pixels
