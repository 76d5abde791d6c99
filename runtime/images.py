"""Images to the pixel rows the vision graph takes: resize, normalise, cut into patches.

The numbers are those of Hugging Face's Qwen2VLImageProcessor in its PIL ("slow") variant with
temporal_patch_size 1, bit for bit on the same Pillow (13 changed the order of the two passes of some resizes:
one level of 255 at most). Whatever cannot be used ends in a OneVisionError that names the image.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from PIL import Image

from ..errors import OneVisionError
from .image_cache import ImageCache
from .image_reading import MAX_DECODED_PIXELS, ImageSource, load_image, named, source_digest

__all__ = ["ImageProcessor", "ImageSource", "load_image", "patch_positions", "preprocess_images"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """The image half of a checkpoint's preprocessor_config.json.

    `min_pixels` and `max_pixels` bound height * width after resizing, where the aspect ratio lets them.
    """

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 1600 * 1600
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not _is_number(value, integer=True) or value < 1:
                raise OneVisionError(f"{name} must be a positive whole number, not {value!r}")
        if self.min_pixels > self.max_pixels:
            raise OneVisionError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if max(self.min_pixels, self.factor**2) > MAX_DECODED_PIXELS:
            raise OneVisionError(
                f"min_pixels {self.min_pixels} or the token side {self.factor} asks for more than "
                f"{MAX_DECODED_PIXELS:,} pixels per image"
            )
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if 0 in self.image_std:
            raise OneVisionError(f"image_std must not contain 0: {self.image_std}")
        if not _is_number(self.rescale_factor):
            raise OneVisionError(f"rescale_factor must be a number, not {self.rescale_factor!r}")
        if not _is_number(self.resample, integer=True) or self.resample not in list(Image.Resampling):
            raise OneVisionError(f"resample must be a Pillow filter id from 0 to 5, not {self.resample!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImageProcessor":
        """Read a preprocessor_config.json; a key that is absent or null keeps its default.

        Explicit min_pixels / max_pixels win over size.shortest_edge / size.longest_edge (pixel counts too, in
        this family). temporal_patch_size is taken as 1 whatever it says: the model has no temporal kernel.
        Raises OneVisionError naming the field that is wrong or asks for a step the model does not have.
        """
        if not isinstance(config, Mapping):
            raise OneVisionError(f"the preprocessor config must be a JSON object, not {type(config).__name__}")
        _refuse_foreign_steps(config)
        settings: dict[str, Any] = dict(_pixel_limits(config.get("size")))
        names = [field.name for field in fields(cls)]
        settings |= {name: config[name] for name in names if config.get(name) is not None}
        if not _switch(config, "do_rescale"):
            settings["rescale_factor"] = 1.0
        if not _switch(config, "do_normalize"):
            settings |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
        return cls(**settings)

    def with_pixels(self, min_pixels: int | None = None, max_pixels: int | None = None) -> "ImageProcessor":
        """The same processor with other limits; None keeps the present one, or gives way to the other's new value."""
        least = self.min_pixels if min_pixels is None else min_pixels
        most = self.max_pixels if max_pixels is None else max_pixels
        if min_pixels is None and _is_number(most, integer=True):
            least = min(least, max(most, 1))
        if max_pixels is None and _is_number(least, integer=True):
            most = max(most, least)
        return replace(self, min_pixels=least, max_pixels=most)

    @property
    def factor(self) -> int:
        """Height and width after resizing are multiples of this: the side of one image token in pixels."""
        return self.patch_size * self.merge_size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width an image is resized to (the family's `smart_resize`).

        Each side goes to the nearest multiple of `factor` (halves to even); where the area then misses the
        limits, both sides are scaled by one ratio and rounded down, or up, to a multiple.
        """
        if height < 1 or width < 1:
            raise OneVisionError(f"it is empty: {height} pixels high, {width} wide")
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise OneVisionError(
                f"{height} pixels high and {width} wide is over the longest aspect ratio, {MAX_ASPECT}; "
                "crop it or cut it into several images"
            )
        side, area = self.factor, height * width
        new_height, new_width = round(height / side) * side, round(width / side) * side
        if new_height * new_width > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            new_height = max(side, math.floor(height / shrink / side) * side)
            new_width = max(side, math.floor(width / shrink / side) * side)
        elif new_height * new_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / area)
            new_height = math.ceil(height * grow / side) * side
            new_width = math.ceil(width * grow / side) * side
        return new_height, new_width

    def __call__(
        self, images: ImageSource | Sequence[ImageSource], cache: ImageCache | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turn one image or several into what the vision graph takes. Files that `cache` knows are not decoded again.

        Returns pixel_values, float32 [patches of all images, 3 * patch_size**2] in merge order with each row
        laid out (channel, row, column), and image_grid_thw, int64 [images, 3]: 1, patches high, patches wide.
        """
        sources = _as_list(images)
        codes = []
        grid = np.ones((len(sources), 3), np.int64)
        for index, source in enumerate(sources):
            patches = self._known_patches(source, _position("image", index, len(sources)), cache)
            grid[index, 1:] = patches.shape[:2]
            codes.append(patches.reshape(-1, *patches.shape[2:]))
        return self._normalised(codes), grid

    def video(self, frames: Sequence[ImageSource]) -> tuple[np.ndarray, np.ndarray]:
        """Turn the frames of one video into pixel_values_videos and video_grid_thw, int64 [1, 3].

        Every frame is a segment of its own (no temporal patch), so the first grid number counts frames.
        """
        sources = _as_list(frames)
        pictures = [
            load_image(source, where=_position("frame", index, len(sources))) for index, source in enumerate(sources)
        ]
        check_same_size(pictures)
        pixel_values, grid = self(pictures)
        return pixel_values, np.array([[len(grid), *grid[0, 1:]]])

    def _known_patches(self, source: ImageSource, where: str, cache: ImageCache | None) -> np.ndarray:
        """As `_patches`, from the cache where it has what these settings make of a file of the same bytes."""
        digest = source_digest(source) if cache is not None and cache.budget else None
        if cache is None or digest is None:
            return self._patches(source, where)
        key = digest + repr(self).encode()
        patches = cache.get(key)
        if patches is None:
            patches = self._patches(source, where)
            if source_digest(source) == digest:  # no other file took its place meanwhile
                cache.put(key, patches)
        return patches

    def _patches(self, source: ImageSource, where: str) -> np.ndarray:
        """uint8 [patches high, patches wide, 3, patch_size**2], whose patches lie in merge order."""
        image = load_image(source, where=where)
        try:
            height, width = self.resized(image.height, image.width)
        except OneVisionError as error:
            raise OneVisionError(f"{named(where, source)}: {error}") from None
        pixels = np.asarray(image.resize((width, height), Image.Resampling(self.resample)))
        patch, merge = self.patch_size, self.merge_size
        rows, columns = height // patch, width // patch
        blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows, columns, 3, patch * patch)

    def _normalised(self, codes: list[np.ndarray]) -> np.ndarray:
        """float32 pixel rows of uint8 patches, through a table of the 256 values each channel can take.

        1596 x 1596 pixels on 2 CPU cores: 8 ms to cut into patches and 13 ms here, against 43 ms for the
        float64 arithmetic of the reference, whose bits the table reproduces.
        """
        levels = (np.arange(256) * self.rescale_factor).astype(np.float32)
        table = [
            (levels - np.float32(mean)) / np.float32(std)
            for mean, std in zip(self.image_mean, self.image_std, strict=True)
        ]
        total = sum(len(patches) for patches in codes)
        values = np.empty((total, 3, self.patch_size**2), np.float32)
        start = 0
        for patches in codes:
            for channel in range(3):
                # clip: a uint8 is always in range, and numpy then skips checking that it is.
                values[start : start + len(patches), channel] = table[channel].take(patches[:, channel], mode="clip")
            start += len(patches)
        return values.reshape(total, -1)


def preprocess_images(
    images: ImageSource | Sequence[ImageSource], min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """pixel_values and image_grid_thw of one image or several with the family's default processor."""
    return ImageProcessor().with_pixels(min_pixels, max_pixels)(images)


def patch_positions(grid_height: int, grid_width: int, merge_size: int) -> np.ndarray:
    """int64 [patches, 2]: (row, column) of each patch in merge order, the order of the pixel rows.

    The merge_size x merge_size patches that become one image token stand together, row by row.
    """
    if grid_height % merge_size or grid_width % merge_size:
        raise OneVisionError(f"a {grid_height} x {grid_width} grid does not divide into blocks of {merge_size}")
    grid = np.indices((grid_height, grid_width), np.int64).transpose(1, 2, 0)
    blocks = grid.reshape(grid_height // merge_size, merge_size, grid_width // merge_size, merge_size, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def check_same_size(frames: Sequence[Image.Image]) -> None:
    """Raise OneVisionError unless all frames of a video have the size of the first."""
    for number, frame in enumerate(frames, 1):
        if frame.size != frames[0].size:
            first, other = "{} x {}".format(*frames[0].size), "{} x {}".format(*frame.size)
            raise OneVisionError(
                f"frame {number} is {other} pixels but frame 1 is {first}; the frames of a video must share a size"
            )


def _as_list(images: Any) -> list[ImageSource]:
    one = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray)
    if not one and not isinstance(images, Iterable):
        raise OneVisionError(f"an image or a list of images is wanted, not {type(images).__name__}")
    sources = [images] if one else list(images)
    if not sources:
        raise OneVisionError("no image was given")
    return sources


def _position(noun: str, index: int, count: int) -> str:
    return noun if count == 1 else f"{noun} {index + 1} of {count}"


def _is_number(value: object, *, integer: bool = False) -> bool:
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(-1e30 < value < 1e30)


def _three_numbers(name: str, value: Any) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        raise OneVisionError(f"{name} must be three numbers, not {value!r}")
    red, green, blue = value
    return float(red), float(green), float(blue)


def _switch(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise OneVisionError(f"{name} must be true or false, not {value!r}")
    return value is not False


def _refuse_foreign_steps(config: Mapping[str, Any]) -> None:
    if not _switch(config, "do_resize"):
        raise OneVisionError("do_resize false is not supported: patches need sides that are multiples of a token")
    for name in ("do_center_crop", "do_pad", "image_grid_pinpoints"):
        if config.get(name):
            raise OneVisionError(f"{name} is set: this is the preprocessor of another model family")


def _pixel_limits(size: Any) -> dict[str, int]:
    """min_pixels and max_pixels as the `size` entry spells them."""
    if size is None:
        return {}
    if not isinstance(size, Mapping):
        raise OneVisionError(f"size must hold shortest_edge and longest_edge, not {size!r}")
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    limits = {}
    for edge, name in names.items():
        if size.get(edge) is None:
            continue
        if not _is_number(size[edge], integer=True) or size[edge] < 1:
            raise OneVisionError(f"size.{edge} must be a positive whole number, not {size[edge]!r}")
        limits[name] = size[edge]
    if not limits and size:
        raise OneVisionError(f"size must hold shortest_edge and longest_edge (pixel counts), not {list(size)}")
    return limits
