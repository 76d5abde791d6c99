"""The clip search against brute force: every candidate of every block, errors in float64."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevision_edge.calibration.clipping import clip_scales
from onevision_edge.errors import OneVisionError
from onevision_edge.precision import BF16, FP16, FP32, FloatFormat
from onevision_edge.precision.codes import Codes, array_dtype
from onevision_edge.precision.formats import (
    FP8_CHANNEL,
    INT4_BLOCK32,
    INT4_BLOCK128,
    INT8_CHANNEL,
    INT8_TENSOR,
    NVFP4,
    Format,
    Scale,
    choose_scale,
    quantize_with,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
by_name = {"ids": lambda value: value.name}
BLOCKED = [INT4_BLOCK32, INT4_BLOCK128, NVFP4]
GAIN = 1e-4  # what a candidate must be better by than the scale that clips nothing


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grams(groups: int, block: int, rows: int, seed: int = 0) -> np.ndarray:
    """Gram matrices of inputs that share two causes and have unequal sizes."""
    x = normal(rows, 2, seed=seed) @ normal(2, groups * block, seed=seed + 1)
    x = (x + normal(*x.shape, seed=seed + 2)) * np.exp(normal(groups * block, seed=seed + 3))
    grouped = x.reshape(rows, groups, block)
    return np.einsum("rga,rgb->gab", grouped, grouped).astype(np.float32)


GRAMS: dict[str, Callable[[int, int], np.ndarray]] = {
    "correlated": lambda groups, block: grams(groups, block, 500),
    "few inputs": lambda groups, block: grams(groups, block, 3),
    "one input": lambda groups, block: grams(groups, block, 1),
    "dead inputs": lambda groups, block: (
        grams(groups, block, 500) * np.outer(np.arange(block) % 2, np.arange(block) % 2).astype(np.float32)
    ),
    "never seen": lambda groups, block: np.zeros((groups, block, block), np.float32),
    "huge": lambda groups, block: grams(groups, block, 500) * np.float32(1e30),
    "tiny": lambda groups, block: grams(groups, block, 500) * np.float32(1e-36),
}


def candidates(weights: np.ndarray, form: Format, fmt: FloatFormat) -> np.ndarray:
    """What codes may be multiplied by, [candidates, groups, columns], by the formulas of the formats."""
    blocks = weights.reshape(-1, form.block, weights.shape[1])
    high, low = np.maximum(blocks.max(axis=1), 0), np.maximum(-blocks.min(axis=1), 0)
    ratios = np.array(form.ratios, np.float32)[:, None, None]
    if form is not NVFP4:
        return (np.maximum(high / np.float32(7), low / np.float32(8)) * ratios).astype(array_dtype(fmt)).astype(float)
    steps = np.maximum(high, low) / np.float32(6)
    tensor = steps.max() / np.float32(448)
    stored = np.minimum(steps * ratios / tensor, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (stored * tensor).astype(array_dtype(fmt)).astype(float)


def nearest(quotient: np.ndarray, codes: Codes) -> np.ndarray:
    """The numbers of a set of codes nearest to values, between the two that enclose each."""
    table = np.unique(np.arange(256, dtype=np.uint8).view(codes.numpy).astype(float))
    above = np.clip(np.searchsorted(table, quotient), 1, len(table) - 1)
    return np.where(quotient - table[above - 1] < table[above] - quotient, table[above - 1], table[above])


def errors(weights: np.ndarray, form: Format, scales: np.ndarray, gram_blocks: np.ndarray) -> np.ndarray:
    """d^T G d of each block, in float64, [groups, columns], for scales of that shape."""
    blocks = weights.reshape(-1, form.block, weights.shape[1]).astype(float)
    d = nearest(blocks / scales[:, None], form.codes) * scales[:, None] - blocks
    return np.einsum("gac,gab,gbc->gc", d, gram_blocks.astype(float), d, optimize=True)


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("fmt", [FP32, FP16, BF16], **by_name)
@pytest.mark.parametrize("form", BLOCKED, **by_name)
def test_the_best_of_all_candidates(form: Format, fmt: FloatFormat, kind: str) -> None:
    weights, gram_blocks = normal(256, 12), GRAMS[kind](256 // form.block, form.block)
    chosen = clip_scales(weights, form, fmt, gram_blocks).value().astype(float)
    metric = gram_blocks if gram_blocks.any() else np.broadcast_to(np.eye(form.block), gram_blocks.shape)
    scales = candidates(weights, form, fmt)
    each = np.stack([errors(weights, form, scale, metric) for scale in scales])
    best, got = each.min(axis=0), errors(weights, form, chosen, metric)
    assert (scales == chosen).any(axis=0).all()
    assert (got <= best * (1 + GAIN + 1e-6)).all()
    second = np.sort(np.where(scales == chosen, np.inf, each), axis=0)[0]
    sure = second > best * (1 + 2 * GAIN)
    np.testing.assert_array_equal(chosen[sure], np.take_along_axis(scales, each.argmin(axis=0)[None], 0)[0][sure])
    assert sure.mean() > 0.95


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from(BLOCKED),
    fmt=st.sampled_from([FP32, FP16, BF16]),
    kind=st.sampled_from(list(GRAMS)),
    blocks=st.integers(1, 3),
    columns=st.integers(1, 5),
    seed=st.integers(0, 1000),
    power=st.integers(-8, 8),
)
def test_never_worse_than_clipping_nothing(
    form: Format, fmt: FloatFormat, kind: str, blocks: int, columns: int, seed: int, power: int
) -> None:
    weights = normal(blocks * form.block, columns, seed=seed) * np.float32(2.0**power)
    gram_blocks = GRAMS[kind](blocks, form.block)
    searched = clip_scales(weights, form, fmt, gram_blocks).value().astype(float)
    before = errors(weights, form, choose_scale(weights, form, fmt).value().astype(float), gram_blocks)
    assert (errors(weights, form, searched, gram_blocks) <= before * (1 + 1e-5)).all()


def product_error(weights: np.ndarray, form: Format, scale: Scale, gram_blocks: np.ndarray) -> float:
    blocks = (quantize_with(weights, form, scale).dequantize().astype(float) - weights).reshape(
        -1, form.block, weights.shape[1]
    )
    return float(np.einsum("gac,gab,gbc->", blocks, gram_blocks.astype(float), blocks, optimize=True))


@pytest.mark.parametrize(
    ("form", "over_absmax", "over_importance"),
    [(INT4_BLOCK32, 2.7, 2.3), (INT4_BLOCK128, 3.8, 3.0), (NVFP4, 2.5, 1.75)],
    ids=lambda value: getattr(value, "name", value),
)
def test_gain_with_correlated_inputs(form: Format, over_absmax: float, over_importance: float) -> None:
    """Times less error of the blocks' products than other choices, on other inputs of the same kind."""
    weights = normal(512, 96)
    inputs = normal(4, 512, seed=1)
    x = [(normal(2000, 4, seed=s) @ inputs + 0.5 * normal(2000, 512, seed=s + 9)) for s in (2, 3)]
    seen, other = (np.einsum("rga,rgb->gab", *[each.reshape(2000, -1, form.block)] * 2, optimize=True) for each in x)
    clip = clip_scales(weights, form, FP32, seen)
    importance = choose_scale(weights, form, search_scales=True, importance=np.square(x[0]).sum(axis=0))
    error = product_error(weights, form, clip, other)
    assert product_error(weights, form, choose_scale(weights, form), other) > over_absmax * error
    assert product_error(weights, form, importance, other) > over_importance * error


@pytest.mark.parametrize("form", BLOCKED, **by_name)
def test_a_diagonal_is_an_importance(form: Format) -> None:
    weights, importance = normal(256, 40), np.exp(normal(256, seed=4))
    diagonal = importance.reshape(-1, form.block, 1) * np.eye(form.block, dtype=np.float32)
    clip = clip_scales(weights, form, FP16, diagonal).stored
    searched = choose_scale(weights, form, FP16, search_scales=True, importance=importance).stored
    np.testing.assert_array_equal(clip, searched)


@pytest.mark.parametrize("form", BLOCKED, **by_name)
def test_the_same_again_and_nothing_else_touched(form: Format) -> None:
    weights, gram_blocks = normal(512, 300), grams(512 // form.block, form.block, 100)
    before = weights.copy(), gram_blocks.copy()
    first, second = (clip_scales(weights, form, FP16, gram_blocks) for _ in range(2))
    np.testing.assert_array_equal(first.value(), second.value())
    np.testing.assert_array_equal(weights, before[0])
    np.testing.assert_array_equal(gram_blocks, before[1])


def test_sources_in_half_precision_and_transposed() -> None:
    stored, gram_blocks = normal(40, 256).astype(ml_dtypes.bfloat16), grams(8, 32, 100)
    want = clip_scales(np.ascontiguousarray(stored.astype(np.float32).T), INT4_BLOCK32, FP16, gram_blocks)
    np.testing.assert_array_equal(clip_scales(stored.T, INT4_BLOCK32, FP16, gram_blocks).stored, want.stored)


@pytest.mark.parametrize("form", [INT8_CHANNEL, INT8_TENSOR, FP8_CHANNEL], **by_name)
def test_formats_without_blocks_are_refused(form: Format) -> None:
    with pytest.raises(OneVisionError, match=rf"layer: {form.name} has no blocks"):
        clip_scales(normal(32, 4), form, FP32, grams(1, 32, 10), "layer")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OneVisionError, match="layer has 100 inputs, which blocks of 32 do not divide"):
        clip_scales(normal(100, 4), INT4_BLOCK32, FP32, grams(3, 32, 10), "layer")
    with pytest.raises(AssertionError, match="Gram matrices"):
        clip_scales(normal(64, 4), INT4_BLOCK32, FP32, grams(4, 16, 10))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused(bad: float) -> None:
    weights, gram_blocks = normal(64, 4), grams(2, 32, 10)
    gram_blocks[1, 3, 4] = bad
    with pytest.raises(OneVisionError, match="Gram matrix of the inputs of layer holds NaN or infinity"):
        clip_scales(weights, INT4_BLOCK32, FP32, gram_blocks, "layer")
    weights[3, 2] = bad
    with pytest.raises(OneVisionError, match="tensor layer holds NaN or infinity"):
        clip_scales(weights, INT4_BLOCK32, FP32, grams(2, 32, 10), "layer")
