"""Scenes of handwritten digits: scikit-learn's 1,797 real 8x8 samples, coloured and composed at any resolution.

Every function takes a numpy Generator, so a seed fixes every pixel. Positions and sizes are in native pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 215, 40),
    "green": (40, 160, 60),
    "cyan": (50, 205, 215),
    "blue": (40, 75, 215),
    "purple": (140, 50, 180),
}
MIN_CONTRAST = 105.0  # Euclidean RGB distance between a digit's colour and the background's base colour
BORDER = 2  # empty source pixels round a sample, so that a rotated stroke is not cut
SMALLEST, LARGEST = 30.0, 68.0  # heights of a digit in pixels after the resize


@dataclass(frozen=True)
class Samples:
    """One side of the split: grey values 0..1 [N, 8, 8], and the indices of each digit's samples."""

    grey: np.ndarray
    by_digit: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Digit:
    """A digit in a scene: its centre (x, y) and the height `size` of its 8-pixel box."""

    value: int
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """An RGB image uint8 [height, width, 3] and its digits, ordered from left to right."""

    pixels: np.ndarray
    digits: tuple[Digit, ...]
    layout: str


@dataclass(frozen=True)
class Style:
    """How samples are drawn: `augment` bends the strokes (training only); `noise` is the largest sigma."""

    augment: bool
    noise: float = 9.0


def load_samples() -> tuple[Samples, Samples]:
    """The training and the held-out samples, split once by index (see HELD_OUT)."""
    data = load_digits()
    held_out = np.zeros(len(data.target), dtype=bool)
    held_out[HELD_OUT] = True
    return tuple(_samples(data.images[side], data.target[side]) for side in (~held_out, held_out))


HELD_OUT = slice(1348, None)


def _samples(images: np.ndarray, target: np.ndarray) -> Samples:
    grey = (images / 16.0).astype(np.float32)
    return Samples(grey, tuple(np.flatnonzero(target == value) for value in range(10)))


def stencil(grey: np.ndarray, size: float, style: Style, rng: np.random.Generator) -> np.ndarray:
    """A sample enlarged smoothly to an opacity map 0..1 whose 8-pixel box is `size` pixels high."""
    padded = Image.fromarray(np.pad(grey, BORDER))
    side = round(size * padded.width / grey.shape[0])
    middle, source_middle = side / 2, padded.width / 2
    matrix = np.eye(2) * (padded.width / side)
    low, high = 0.12, 0.7
    if style.augment:
        matrix = matrix @ _bend(rng)
        low = rng.uniform(0.05, 0.25)
        high = low + rng.uniform(0.35, 0.65)
    shift = source_middle - matrix @ np.array([middle, middle])
    affine = (*matrix[0], shift[0], *matrix[1], shift[1])
    drawn = padded.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.clip((np.asarray(drawn) - low) / (high - low), 0, 1)


def _bend(rng: np.random.Generator) -> np.ndarray:
    """A small rotation, shear and stretch, as a 2x2 matrix."""
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    stretch = np.diag(rng.uniform(0.87, 1.15, 2))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ stretch


def background(height: int, width: int, style: Style, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [height, width, 3], its base colour): light or dark, with a smooth texture and fine noise."""
    light = rng.random() < 0.55
    base = rng.uniform(185, 250, 3) if light else rng.uniform(5, 70, 3)
    base = 0.7 * base + 0.3 * base.mean()
    cells = int(rng.integers(2, 6))
    coarse = base + rng.normal(0, rng.uniform(0, 14), (cells, cells, 3))
    texture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    canvas = np.asarray(texture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32).copy()
    sigma = np.float32(rng.uniform(0, style.noise))
    if style.noise and rng.random() < 0.6:
        canvas += rng.standard_normal((height, width, 1), dtype=np.float32) * sigma
    return canvas, base


def choose_colours(count: int, base: np.ndarray, rng: np.random.Generator) -> list[str]:
    """`count` colour names which stand out from the background; mostly different from each other."""
    visible = [name for name, rgb in COLOURS.items() if np.linalg.norm(np.array(rgb) - base) > MIN_CONTRAST]
    if rng.random() < 0.2:
        return [str(name) for name in rng.choice(visible, count)]
    names = [str(name) for name in rng.permutation(visible)]
    return (names * 2)[:count]


def choose_values(count: int, rng: np.random.Generator) -> list[int]:
    """`count` digits, mostly different from each other."""
    repeated = rng.random() < 0.2
    return [int(value) for value in rng.choice(10, count, replace=repeated)]


def scatter_places(count: int, height: float, width: float, rng: np.random.Generator) -> list[tuple]:
    """Up to `count` (x, y, size) without overlap whose left-to-right order is beyond doubt."""
    largest = min(LARGEST, 0.85 * min(height, width), 0.7 * math.sqrt(height * width / count) + 14)
    places: list[tuple] = []
    for _ in range(25 * count):
        size = rng.uniform(SMALLEST, max(largest, SMALLEST + 4))
        half = 0.5 * size
        if 2 * half > min(height, width):
            continue
        place = (rng.uniform(half, width - half), rng.uniform(half, height - half), size)
        if all(_apart(place, other) for other in places):
            places.append(place)
        if len(places) == count:
            break
    return places


def _apart(a: tuple, b: tuple) -> bool:
    across, down, sizes = abs(a[0] - b[0]), abs(a[1] - b[1]), a[2] + b[2]
    ordered = across >= max(15.0, 0.3 * min(a[2], b[2]))
    return ordered and (across >= 0.42 * sizes or down >= 0.5 * sizes)


def row_places(count: int, height: float, width: float, rng: np.random.Generator) -> list[tuple]:
    """(x, y, size) of `count` digits written side by side, as a number."""
    spacing = rng.uniform(0.78, 0.95)
    span = spacing * (count - 1) + 1
    largest = min(LARGEST, height * 0.95, (width - 2) / span)
    size = rng.uniform(min(SMALLEST, largest), largest)
    left = rng.uniform(0, width - span * size) + size / 2
    middle = rng.uniform(size / 2, height - size / 2)
    wobble = min(0.06 * size, middle - size / 2, height - size / 2 - middle)
    return [(left + i * spacing * size, middle + rng.uniform(-wobble, wobble), size) for i in range(count)]


def choose_places(plan: Plan, rng: np.random.Generator) -> list[tuple]:
    """(x, y, size) of each digit from left to right, in pixels after the resize."""
    height, width = plan.height / plan.scale, plan.width / plan.scale
    if plan.layout == "row":
        return row_places(min(plan.count, row_capacity(width)), height, width, rng)
    return sorted(scatter_places(plan.count, height, width, rng))


def row_capacity(width: float) -> int:
    """How many digits fit side by side in `width` pixels, at least 30 pixels high."""
    return max(1, min(4, int((width / 31 - 1) / 0.95) + 1))


@dataclass(frozen=True)
class Plan:
    """What to compose: about `count` digits ("scatter" drops what finds no room) on height x width native pixels.

    `scale` is native pixels per pixel after the processor's resize, so that digits keep a readable size.
    """

    layout: str
    count: int
    height: int
    width: int
    scale: float = 1.0


def compose(samples: Samples, plan: Plan, style: Style, rng: np.random.Generator) -> Scene:
    """Draw one scene."""
    canvas, base = background(plan.height, plan.width, style, rng)
    places = np.array(choose_places(plan, rng)) * plan.scale
    colours = choose_colours(len(places), base, rng)
    if plan.layout == "row" and rng.random() < 0.6:
        colours = colours[:1] * len(places)
    values = choose_values(len(places), rng)
    digits = tuple(Digit(v, c, *place) for v, c, place in zip(values, colours, places, strict=True))
    for digit in digits:
        _paint(canvas, digit, samples, style, rng)
    return Scene(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), digits, plan.layout)


def _paint(canvas: np.ndarray, digit: Digit, samples: Samples, style: Style, rng: np.random.Generator) -> None:
    grey = samples.grey[rng.choice(samples.by_digit[digit.value])]
    opacity = stencil(grey, digit.size, style, rng)
    ink = np.array(COLOURS[digit.colour]) + rng.uniform(-18, 18, 3)
    side = opacity.shape[0]
    top, left = round(digit.y - side / 2), round(digit.x - side / 2)
    rows = slice(max(top, 0), min(top + side, canvas.shape[0]))
    columns = slice(max(left, 0), min(left + side, canvas.shape[1]))
    part = opacity[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    canvas[rows, columns] += part * (ink.astype(np.float32) - canvas[rows, columns])
