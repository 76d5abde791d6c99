"""What sizes an engine takes: optimisation profiles as data.

An engine is compiled for ranges of its free dimensions and reserves memory for the largest. One wide profile serves
prefill and decode. A second one, for decode alone, lets the compiler choose kernels for a single token; weights of
16 and 8 bits are then stored twice, INT4 and NVFP4 ones are not (0.6-billion decoder: 1.19 GB of FP16 weights make
an engine of 2.41 GB with both).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..bundle import GraphSpec, Manifest
from ..errors import OneVisionError

LENGTH = "valid_length"  # the decoder's shape tensor: its value, not its shape, has a range
MAX_TOKENS = 512  # of one decoder call: a chunk of prefill, as the runtime cuts prompts
MAX_ROWS = 32  # of logits in one call: 1 in decode, as many as there are drafted tokens in verification


@dataclass(frozen=True, slots=True)
class Range:
    """Sizes that a dimension can have, and the one that kernels are chosen for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise OneVisionError(f"a range is min <= opt <= max, all from 1, not {self.min}, {self.opt}, {self.max}")


@dataclass(frozen=True, slots=True)
class Profile:
    """Ranges of the free dimensions patches, images, tokens, batch and rows, and of the cache rows in use."""

    name: str
    patches: Range
    images: Range
    tokens: Range
    batch: Range
    rows: Range
    length: Range

    def limits(self) -> dict[str, dict[str, int]]:
        """Plain data for the engine's record: min, opt and max of each dimension."""
        return {name: asdict(getattr(self, name)) for name in _DIMENSIONS}

    @classmethod
    def from_limits(cls, name: str, raw: Mapping[str, Any]) -> "Profile":
        """The inverse of `limits`. Raises OneVisionError, KeyError or TypeError for anything else."""
        return cls(name, **{d: Range(**{k: int(v) for k, v in raw[d].items()}) for d in _DIMENSIONS})


_DIMENSIONS = ("patches", "images", "tokens", "batch", "rows", "length")


@dataclass(frozen=True, slots=True)
class InputRange:
    """What a profile says of one input: its shapes, or its values where it is a shape tensor."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
    values: bool = False


def profiles(
    manifest: Manifest,
    *,
    max_pixels: int,
    max_tokens: int | None = None,
    max_batch: int = 1,
    max_images: int = 1,
    max_rows: int | None = None,
    decode_profile: bool = False,
) -> tuple[Profile, ...]:
    """The profiles of a bundle's engines: one wide one, and with `decode_profile` one for decode steps besides.

    max_pixels: height * width of one image after resizing. max_tokens: of one decoder call; None: 512, or the cache's
    rows if fewer. max_images: of one size in one call of the vision graph. max_rows: of logits in one call; None: 32,
    or max_tokens if fewer. Raises OneVisionError for limits that the bundle cannot have.
    """
    length = manifest.max_length
    tokens = min(MAX_TOKENS, length) if max_tokens is None else max_tokens
    rows = min(MAX_ROWS, tokens) if max_rows is None else max_rows
    _at_least_one(max_tokens=tokens, max_batch=max_batch, max_images=max_images, max_rows=rows)
    if tokens > length:
        raise OneVisionError(
            f"--max-tokens {tokens} is more than the KV cache's {length} rows: lower it, or export with a larger "
            "--max-length"
        )
    if rows > tokens:
        raise OneVisionError(f"--max-rows {rows} is more than --max-tokens {tokens}: a token has one row of logits")
    unit = manifest.model.vision.merge_unit
    patches = patch_limit(manifest, max_pixels)
    typical = min(patches, 1024 // unit * unit)  # 448 x 448 pixels
    wide = Profile(
        "wide",
        patches=Range(unit, max(unit, typical), patches),
        images=Range(1, 1, max_images),
        tokens=Range(1, 1, tokens),
        batch=Range(1, 1, max_batch),
        rows=Range(1, 1, rows),
        length=Range(1, min(1024, length), length),
    )
    if not decode_profile:
        return (wide,)
    one = Range(1, 1, 1)
    prefill = replace(wide, name="prefill", tokens=Range(1, tokens, tokens))
    return prefill, replace(wide, name="decode", tokens=one, rows=one)


def _at_least_one(**limits: int) -> None:
    for name, limit in limits.items():
        if limit < 1:
            raise OneVisionError(f"--{name.replace('_', '-')} is {limit}; it must be at least 1")


def patch_limit(manifest: Manifest, max_pixels: int) -> int:
    """The most patches of an image of so many pixels: a patch is 14 x 14, a token 28 x 28 of them in the released
    model. Raises OneVisionError where not even one token fits."""
    vision = manifest.model.vision
    side = vision.patch_size * vision.spatial_merge_size
    tokens = max_pixels // side**2
    if tokens < 1:
        raise OneVisionError(f"--max-pixels {max_pixels} is less than one image token of {side} x {side} pixels")
    return tokens * vision.merge_unit


def inputs_of(spec: GraphSpec, profile: Profile) -> list[InputRange]:
    """The ranges of every input that has any, in the graph's order."""
    found = []
    for tensor in spec.inputs:
        if tensor.name == LENGTH:
            r = profile.length
            found.append(InputRange(tensor.name, (r.min,), (r.opt,), (r.max,), values=True))
        elif any(isinstance(size, str) for size in tensor.shape):
            low, best, high = (_shape(tensor.shape, profile, end) for end in ("min", "opt", "max"))
            found.append(InputRange(tensor.name, low, best, high))
    return found


def part_profiles(part: str, chosen: Sequence[Profile]) -> tuple[Profile, ...]:
    """The profiles that a graph is built with: the vision graph has no decode step."""
    return tuple(chosen[:1]) if part == "vision" else tuple(chosen)


def _shape(shape: tuple[int | str, ...], profile: Profile, end: str) -> tuple[int, ...]:
    return tuple(getattr(getattr(profile, size), end) if isinstance(size, str) else size for size in shape)


def resized(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most so many tokens that keeps the ratio of height and width."""
    shrink = math.sqrt(tokens / (height * width))
    rows = min(tokens, max(1, math.floor(height * shrink)))
    columns = max(1, math.floor(width * shrink))
    return rows, min(columns, tokens // rows)
