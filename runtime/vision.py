"""Running the vision graph on images of any mix of sizes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..config import VisionConfig
from ..errors import OneVisionError
from ..precision import from_float32
from .cache import AnyGraph, Rows
from .image_cache import ImageCache, image_digest
from .images import patch_positions
from .prefix import Keys, media_keys


@dataclass(frozen=True, slots=True)
class Features:
    """Embeddings of images and video frames, [tokens, D], the keys of each, and how many were in the image cache."""

    rows: Rows
    keys: Keys
    cached: int


class VisionEncoder:
    """pixel rows and grids in, embeddings out. What `cache` holds is not computed again."""

    def __init__(self, graph: AnyGraph, config: VisionConfig, cache: ImageCache) -> None:
        self.graph, self.config, self.cache = graph, config, cache

    def tokens(self, grid_thw: np.ndarray) -> np.ndarray:
        """Embeddings each entry of a grid [n, 3] becomes: int64 [n]."""
        return media_tokens(grid_thw, self.config)

    def check(self, pixel_values: np.ndarray, grid_thw: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Both inputs as arrays of the right dtype, after checking that they belong together."""
        grid = check_grid(grid_thw, name, self.config)
        pixels = check_pixels(pixel_values, grid, name, self.config)
        return from_float32(pixels, self.graph.fmt), grid

    def __call__(self, pixel_values: np.ndarray, grid_thw: np.ndarray) -> Features:
        """Embeddings of all images (and video frames), in order, in the graph's format.

        pixel_values: [patches, patch_dim]; grid_thw: [n, 3]. Segments of one size share calls, equal ones a result.
        """
        sizes = [(int(h), int(w)) for t, h, w in grid_thw for _ in range(t)]
        places = [slice(*edges) for edges in pairwise(np.cumsum([0, *(h * w for h, w in sizes)]).tolist())]
        digests = [image_digest(pixel_values[place], size) for place, size in zip(places, sizes, strict=True)]
        tokens = [h * w // self.config.merge_unit for h, w in sizes]
        known = {digest: rows for digest in digests if (rows := self.cache.get(digest)) is not None}
        cached = sum(n for n, digest in zip(tokens, digests, strict=True) if digest in known)
        unknown = {d: (place, size) for d, place, size in zip(digests, places, sizes, strict=True) if d not in known}
        for digest, rows in self._encoded(pixel_values, unknown):
            known[digest] = rows
            self.cache.put(digest, rows)
        embeds: Any = self.graph.empty((sum(tokens), self.config.text_hidden_size))
        for digest, edges in zip(digests, pairwise(np.cumsum([0, *tokens]).tolist()), strict=True):
            embeds[slice(*edges)] = known[digest]
        return Features(embeds, media_keys(digests, tokens), cached)

    def _encoded(
        self, pixel_values: np.ndarray, segments: Mapping[bytes, tuple[slice, tuple[int, int]]]
    ) -> Iterator[tuple[bytes, Rows]]:
        """Embeddings of segments, given by digest as their pixel rows' place and their size, one size after another."""
        most = {size: self.graph.images_per_call(self.config, size) for _, size in segments.values()}
        for size, count in most.items():
            members = [digest for digest, (_, other) in segments.items() if other == size]
            for batch in (members[i : i + count] for i in range(0, len(members), count)):
                encoded = self._encode(np.stack([pixel_values[segments[digest][0]] for digest in batch]), size)
                yield from zip(batch, self._separate(encoded), strict=True)

    def _separate(self, encoded: Rows) -> Sequence[Rows]:
        """Each image's embeddings [tokens, D] in memory of their own, of [images, tokens, D]."""
        separate: list[Any] = [self.graph.empty(tuple(encoded.shape[1:])) for _ in range(len(encoded))]
        for rows, own in zip(encoded, separate, strict=True):
            own[:] = rows
        return separate

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
