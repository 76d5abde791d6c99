"""The published image processing: smart_resize, PIL bicubic, CLIP normalisation, rows in 2x2 merge order."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

PATCH = 14
MERGE = 2
FACTOR = PATCH * MERGE
MIN_PIXELS = 56 * 56
MAX_PIXELS = 392 * 392
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def smart_resize(height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels, multiples of 28 within the pixel limits, that the processor resizes to."""
    new_height, new_width = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    if new_height * new_width > MAX_PIXELS:
        scale = math.sqrt(height * width / MAX_PIXELS)
        new_height = max(FACTOR, math.floor(height / scale / FACTOR) * FACTOR)
        new_width = max(FACTOR, math.floor(width / scale / FACTOR) * FACTOR)
    elif new_height * new_width < MIN_PIXELS:
        scale = math.sqrt(MIN_PIXELS / (height * width))
        new_height = math.ceil(height * scale / FACTOR) * FACTOR
        new_width = math.ceil(width * scale / FACTOR) * FACTOR
    return new_height, new_width


def resize(pixels: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] at native size -> uint8 at the size smart_resize gives."""
    height, width = smart_resize(*pixels.shape[:2])
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def patch_rows(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., height, width, 3] -> uint8 [..., patches, 588] in merge order, each row (3, 14, 14)."""
    *lead, height, width, _ = pixels.shape
    blocks = pixels.reshape(*lead, height // FACTOR, MERGE, PATCH, width // FACTOR, MERGE, PATCH, 3)
    n = len(lead)
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 6, n + 2, n + 5]
    return blocks.transpose(order).reshape(*lead, height * width // PATCH**2, 3 * PATCH**2)


def normalise(rows: np.ndarray) -> np.ndarray:
    """uint8 [..., 588] -> float32, the PIL processor's formula (float64 product, then float32)."""
    scaled = (rows * (1 / 255)).astype(np.float32)
    return (scaled - np.repeat(MEAN, PATCH**2)) / np.repeat(STD, PATCH**2)


def patch_positions(height: int, width: int) -> np.ndarray:
    """(row, column) of each patch in merge order, int64 [patches, 2], for an image of height x width pixels."""
    y, x = np.mgrid[: height // PATCH, : width // PATCH]
    both = np.stack([y, x], -1).reshape(height // FACTOR, MERGE, width // FACTOR, MERGE, 2)
    return both.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
