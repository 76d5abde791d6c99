"""Optimisation profiles as data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from onevision_edge.bundle import Bundle, Manifest
from onevision_edge.engines.profiles import (
    InputRange,
    Profile,
    Range,
    inputs_of,
    part_profiles,
    patch_limit,
    profiles,
    resized,
)
from onevision_edge.errors import OneVisionError

PIXELS = 448 * 448


@pytest.fixture(scope="module")
def manifest(golden_bundle: Callable[[str], Path]) -> Manifest:
    return Bundle.open(golden_bundle("fp16")).manifest


def test_one_wide_profile_by_default(manifest: Manifest) -> None:
    (wide,) = profiles(manifest, max_pixels=PIXELS)
    assert wide == Profile(
        "wide",
        patches=Range(4, 1024, 1024),
        images=Range(1, 1, 1),
        tokens=Range(1, 1, 256),  # the cache has no more rows
        batch=Range(1, 1, 1),
        rows=Range(1, 1, 32),
        length=Range(1, 256, 256),
    )


def test_a_decode_profile_has_one_token_a_sequence(manifest: Manifest) -> None:
    prefill, decode = profiles(manifest, max_pixels=PIXELS, max_tokens=64, max_batch=3, decode_profile=True)
    assert (prefill.tokens, prefill.rows, prefill.batch) == (Range(1, 64, 64), Range(1, 1, 32), Range(1, 1, 3))
    assert (decode.tokens, decode.rows, decode.batch) == (Range(1, 1, 1), Range(1, 1, 1), Range(1, 1, 3))
    assert decode.length == prefill.length == Range(1, 256, 256)
    assert part_profiles("vision", (prefill, decode)) == (prefill,)
    assert part_profiles("decoder", (prefill, decode)) == (prefill, decode)


@pytest.mark.parametrize(
    ("pixels", "patches"), [(28 * 28, 4), (2 * 28 * 28 - 1, 4), (448 * 448, 1024), (1600 * 1600, 13060)]
)
def test_pixels_are_whole_tokens(manifest: Manifest, pixels: int, patches: int) -> None:
    """28 x 28 pixels a token, four patches of 14 x 14."""
    assert patch_limit(manifest, pixels) == patches
    (wide,) = profiles(manifest, max_pixels=pixels)
    assert wide.patches.max == patches


def test_every_free_input_has_a_range(manifest: Manifest) -> None:
    (wide,) = profiles(manifest, max_pixels=PIXELS, max_tokens=128, max_batch=2, max_images=3)
    assert inputs_of(manifest.graphs["vision"], wide) == [
        InputRange("pixel_values", (1, 4, 588), (1, 1024, 588), (3, 1024, 588)),
        InputRange("patch_positions", (4, 2), (1024, 2), (1024, 2)),
    ]
    decoder = manifest.graphs["decoder"]
    ranges = {r.name: r for r in inputs_of(decoder, wide)}
    assert list(ranges) == [t.name for t in decoder.inputs]
    assert ranges["valid_length"] == InputRange("valid_length", (1,), (256,), (256,), values=True)
    assert ranges["logits_indices"] == InputRange("logits_indices", (1, 1), (1, 1), (2, 32))
    assert ranges["past_key.0"].max[0] == 2
    assert ranges["past_key.0"].max[2] == 256
    assert [r.name for r in ranges.values() if r.values] == ["valid_length"]


def test_limits_survive_their_record(manifest: Manifest) -> None:
    (wide,) = profiles(manifest, max_pixels=PIXELS, max_batch=2)
    assert wide.limits()["batch"] == {"min": 1, "opt": 1, "max": 2}
    assert Profile.from_limits("wide", wide.limits()) == wide


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_tokens": 257}, "--max-tokens 257 is more than the KV cache's 256 rows"),
        ({"max_tokens": 8, "max_rows": 9}, "--max-rows 9 is more than --max-tokens 8"),
        ({"max_batch": 0}, "--max-batch is 0; it must be at least 1"),
        ({"max_images": -1}, "--max-images is -1; it must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens is 0; it must be at least 1"),
    ],
)
def test_limits_that_cannot_be(manifest: Manifest, limits: dict[str, int], message: str) -> None:
    with pytest.raises(OneVisionError) as refusal:
        profiles(manifest, max_pixels=PIXELS, **limits)
    assert message in str(refusal.value)


def test_an_image_of_less_than_a_token(manifest: Manifest) -> None:
    with pytest.raises(OneVisionError, match="--max-pixels 783 is less than one image token of 28 x 28 pixels"):
        profiles(manifest, max_pixels=783)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 3), (1, 3, 2)])
def test_ranges_are_in_order(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(OneVisionError, match="a range is min <= opt <= max"):
        Range(*sizes)


@pytest.mark.parametrize(("height", "width"), [(1120, 1680), (476, 448), (28, 28 * 300), (5600, 5600)])
def test_the_resize_that_is_offered_fits(height: int, width: int) -> None:
    rows, columns = resized(256, height, width)
    assert rows * columns <= 256
    assert (rows + 1) * (columns + 1) > 256  # no smaller than it must be


def test_resizing_keeps_the_ratio() -> None:
    rows, columns = resized(256, 1120, 1680)
    assert (rows, columns) == (13, 19)
    assert columns / rows == pytest.approx(1.5, rel=0.05)
    assert resized(2, 10, 100000) == (1, 2)


def test_a_longer_cache_allows_a_longer_chunk(manifest: Manifest) -> None:
    (wide,) = profiles(replace(manifest, max_length=4096), max_pixels=PIXELS)
    assert (wide.tokens.max, wide.length) == (512, Range(1, 1024, 4096))
