"""GPTQ against the paper's own loop in float64, and what must hold of any result: never worse than rounding."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevision_edge.calibration import gptq as module
from onevision_edge.calibration.gptq import Factor, factor, gptq
from onevision_edge.errors import OneVisionError
from onevision_edge.precision import BF16, FP16, FP32, FloatFormat
from onevision_edge.precision.codes import Codes, array_dtype
from onevision_edge.precision.formats import (
    ALL,
    FP8_CHANNEL,
    INT4_BLOCK32,
    INT4_BLOCK128,
    INT8_CHANNEL,
    NVFP4,
    Format,
    Quantized,
    Scale,
    choose_scale,
    grid,
    quantize_with,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
by_name = {"ids": lambda value: value.name}
USED = [INT4_BLOCK32, INT4_BLOCK128, NVFP4, INT8_CHANNEL, FP8_CHANNEL]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def activations(rows: int, inputs: int, seed: int = 1, spread: float = 0.5) -> np.ndarray:
    """Inputs [rows, in] that share an eighth as many causes, with noise of 0.3, and channels of unequal size."""
    mix = normal(inputs // 8, inputs, seed=100) / np.float32(np.sqrt(inputs // 8))
    sizes = np.exp(spread * normal(inputs, seed=101))
    return (normal(rows, inputs // 8, seed=seed) @ mix + 0.3 * normal(rows, inputs, seed=seed + 50)) * sizes


def gram_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x


def output_error(q: Quantized, weights: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The diagonal of E^T G E, in float64."""
    difference = q.dequantize().astype(np.float64) - weights
    return np.einsum("io,io->o", difference, gram.astype(np.float64) @ difference)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def nearest(quotient: np.ndarray, codes: Codes) -> np.ndarray:
    """The number of a set of codes nearest to each float32 value, by comparison with all of them; ties to even."""
    table = np.unique(np.arange(256, dtype=np.uint8).view(codes.numpy).astype(np.float64))
    table = table[np.isfinite(table)]
    odd = (np.arange(len(table)) - np.searchsorted(table, 0)) % 2 == 1
    distance = np.abs(quotient[:, None].astype(np.float64) - table)
    return table[np.where(odd, np.nextafter(distance, np.inf), distance).argmin(axis=1)]


def paper(
    weights: np.ndarray, gram: np.ndarray, scale: Scale, form: Format, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values [in, out] and what the graph reads back, as in Frantar et al. 2022, section 3 (equation 3 and before).

    One row after another: its error, over the diagonal of the inverse, times the inverse's row, goes to the
    rows that are left; then the row is eliminated from the inverse. Quotients are float32, as in `quantize_with`:
    one in 300,000 INT8 codes differs if they are not.
    """
    inputs = len(weights)
    inverse = np.linalg.inv(gram.astype(np.float64) + damping * np.diagonal(gram).mean() * np.eye(inputs))
    steps = grid(scale.value(), form)
    left, values, read = weights.astype(np.float64), np.zeros(weights.shape), np.zeros(weights.shape)
    for i in np.argsort(-np.diagonal(gram)):
        step = steps[i // form.block if form.block else 0]
        values[i] = nearest(left[i].astype(np.float32) / np.where(step > 0, step, np.float32(np.inf)), form.codes)
        read[i] = (values[i].astype(np.float32) * step).astype(array_dtype(scale.fmt)).astype(np.float64)
        left -= inverse[:, i : i + 1] * (left[i] - read[i]) / inverse[i, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1  # its row and column are zero from here on
    return values, read


def paper_or_plain(
    weights: np.ndarray, gram: np.ndarray, scale: Scale, form: Format, damping: float
) -> tuple[np.ndarray, int]:
    """Of each output the better one, and how many are the paper's."""
    values, read = paper(weights, gram, scale, form, damping)
    plain = quantize_with(weights, form, scale)
    error = np.einsum("io,io->o", read - weights, gram.astype(np.float64) @ (read - weights))
    better = error < output_error(plain, weights, gram)
    return np.where(better, values, plain.codes.astype(np.float64)), int(better.sum())


@pytest.mark.parametrize(("fmt", "rows"), [(FP32, 40), (FP32, 2000), (FP16, 300), (BF16, 300)])
@pytest.mark.parametrize("form", ALL, **by_name)
def test_codes_of_the_paper(form: Format, fmt: FloatFormat, rows: int) -> None:
    weights, gram = normal(256, 16), gram_of(activations(rows, 256))
    scale = choose_scale(weights, form, fmt, search_scales=True, importance=np.diagonal(gram))
    q = gptq(weights, factor(gram, 0.01), scale, form)
    want, changed = paper_or_plain(weights, gram, scale, form, 0.01)
    assert q.codes.dtype == form.codes.numpy
    assert q.scale is scale
    np.testing.assert_array_equal(q.codes.astype(np.float64), want)
    assert changed == 16


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(16, 1), (48, 5), (160, 3), (400, 7)])
def test_codes_of_the_paper_in_other_shapes(shape: tuple[int, int], damping: float) -> None:
    weights, gram = normal(*shape), gram_of(activations(300, shape[0]))
    scale = choose_scale(weights, NVFP4)
    q = gptq(weights, factor(gram, damping), scale, NVFP4)
    np.testing.assert_array_equal(q.codes.astype(float), paper_or_plain(weights, gram, scale, NVFP4, damping)[0])


@pytest.mark.parametrize(
    ("form", "on_seen", "on_others"),
    [
        (INT4_BLOCK32, 8.0, 7.2),
        (INT4_BLOCK128, 9.0, 8.0),
        (NVFP4, 7.3, 6.6),
        (INT8_CHANNEL, 9.0, 7.9),
        (FP8_CHANNEL, 9.5, 8.3),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_gain_with_correlated_inputs(form: Format, on_seen: float, on_others: float) -> None:
    """Times less error than plain rounding under the same searched scales; on the inputs seen, and others like them."""
    seen, other = (gram_of(activations(4096, 512, seed)) for seed in (1, 2))
    weights = normal(512, 96)
    scale = choose_scale(weights, form, search_scales=True, importance=np.diagonal(seen))
    plain, q = quantize_with(weights, form, scale), gptq(weights, factor(seen), scale, form)
    measured = [output_error(plain, weights, g).sum() / output_error(q, weights, g).sum() for g in (seen, other)]
    assert measured[0] > on_seen
    assert measured[1] > on_others


def test_float32_is_as_good_as_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1025 inputs on everything is float32: another code here and there, not another error."""
    weights, gram = normal(1152, 32), gram_of(activations(1500, 1152))
    scale = choose_scale(weights, INT4_BLOCK128)
    q = gptq(weights, factor(gram), scale, INT4_BLOCK128)
    monkeypatch.setattr(module, "_EXACT", 2000)
    wide = gptq(weights, factor(gram), scale, INT4_BLOCK128)
    errors = [
        output_error(each, weights, gram).sum() for each in (q, wide, quantize_with(weights, INT4_BLOCK128, scale))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert errors[2] > 5 * errors[0]
    assert (bits(q.codes) == bits(wide.codes)).mean() > 0.9


@pytest.mark.parametrize(("inputs", "dtype", "tolerance"), [(300, np.float64, 1e-13), (1100, np.float32, 1e-5)])
def test_factor_is_one_of_the_damped_matrix(inputs: int, dtype: type, tolerance: float) -> None:
    gram = gram_of(activations(2000, inputs))
    f = factor(gram, 0.02)
    assert f.lower is not None
    assert f.lower.dtype == dtype
    assert f.damping == 0.02
    assert not np.triu(f.lower, 1).any()
    assert (np.diagonal(f.lower) == 1).all()
    assert (np.diff(np.diagonal(gram)[f.order]) >= 0).all()
    wide = f.lower.astype(np.float64)
    product = f.unit * (wide * f.pivots) @ wide.T
    want = gram[f.order][:, f.order] + 0.02 * np.diagonal(gram).astype(np.float64).mean() * np.eye(inputs)
    assert np.abs(product - want).max() < tolerance * np.abs(want).max()


# What must hold of any result


GRAMS: dict[str, Callable[[int, int], np.ndarray]] = {
    "correlated": lambda n, seed: gram_of(activations(3 * n, n, seed)),
    "one input": lambda n, seed: gram_of(activations(1, n, seed)),
    "few inputs": lambda n, seed: gram_of(activations(n // 4, n, seed)),
    "uneven": lambda n, seed: gram_of(activations(2 * n, n, seed, spread=4)),
    "an outlier": lambda n, seed: gram_of(activations(n, n, seed) * np.where(np.arange(n) == 3, 1000, 1)),
    "dead inputs": lambda n, seed: gram_of(activations(n, n, seed) * (np.arange(n) % 3 > 0)),
    "equal inputs": lambda n, seed: gram_of(np.repeat(activations(n, n // 2, seed), 2, axis=1)),
    "huge": lambda n, seed: gram_of(activations(n, n, seed)) * np.float32(1e30),
    "tiny": lambda n, seed: gram_of(activations(n, n, seed)) * np.float32(1e-30),
    "almost zero": lambda n, seed: gram_of(activations(n, n, seed)) * np.float32(1e-42),
    "zero": lambda n, seed: np.zeros((n, n), np.float32),
    "not of any inputs": lambda n, seed: normal(n, n, seed=seed) + normal(n, n, seed=seed).T,
}


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(ALL),
    fmt=st.sampled_from([FP32, FP16, BF16]),
    kind=st.sampled_from([kind for kind in GRAMS if kind != "not of any inputs"]),
    blocks=st.integers(1, 2),
    columns=st.integers(1, 9),
    damping=st.sampled_from([0.0, 1e-6, 0.01, 0.3]),
    seed=st.integers(0, 1000),
    search=st.booleans(),
)
def test_no_output_is_worse_than_rounded(
    form: Format, fmt: FloatFormat, kind: str, blocks: int, columns: int, damping: float, seed: int, search: bool
) -> None:
    inputs = blocks * (form.block or 24)
    weights, gram = normal(inputs, columns, seed=seed), GRAMS[kind](inputs, seed)
    importance = np.diagonal(gram) if search else None
    scale = choose_scale(weights, form, fmt, search_scales=search, importance=importance)
    before = output_error(quantize_with(weights, form, scale), weights, gram)
    after = output_error(gptq(weights, factor(gram, damping), scale, form), weights, gram)
    noise = 1e-12 * float(np.trace(gram.astype(np.float64))) * np.abs(weights).max() ** 2
    assert (after <= before * (1 + 1e-9) + noise).all()


@pytest.mark.parametrize("kind", GRAMS)
def test_no_output_is_worse_in_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what float32 can tell: the errors are differences from the damped ones."""
    monkeypatch.setattr(module, "_EXACT", 0)
    weights, gram = normal(256, 64), GRAMS[kind](256, 5)
    scale = choose_scale(weights, INT4_BLOCK32)
    plain, q = quantize_with(weights, INT4_BLOCK32, scale), gptq(weights, factor(gram), scale, INT4_BLOCK32)
    before, after = (output_error(each, weights, gram) for each in (plain, q))
    damped = np.diagonal(gram).astype(np.float64).mean() * np.square(plain.dequantize() - weights).sum(axis=0)
    assert (after <= before + 1e-7 * damped).all()


@pytest.mark.parametrize("form", ALL, **by_name)
@pytest.mark.parametrize("gram", [np.eye(256), np.diag(np.exp(normal(256))), np.zeros((256, 256))])
def test_without_correlation_it_is_rounding(gram: np.ndarray, form: Format) -> None:
    weights = normal(256, 16)
    weights[:, 3] = -0.0
    scale = choose_scale(weights, form, FP16)
    q = gptq(weights, factor(gram.astype(np.float32)), scale, form)
    np.testing.assert_array_equal(bits(q.codes), bits(quantize_with(weights, form, scale).codes))


@pytest.mark.parametrize("form", USED, **by_name)
def test_dead_inputs_are_rounded_and_the_rest_as_without_them(form: Format) -> None:
    """Their weights cannot matter: neither to the other rows, nor theirs to them."""
    weights, dead = normal(384, 16), np.arange(384) % 3 == 0
    gram = gram_of(activations(500, 384) * ~dead)
    scale = choose_scale(weights, form)
    q, plain = gptq(weights, factor(gram), scale, form), quantize_with(weights, form, scale)
    np.testing.assert_array_equal(bits(q.codes)[dead], bits(plain.codes)[dead])
    other = np.where(dead[:, None], np.float32(0.1) * normal(384, 16, seed=9), weights)
    np.testing.assert_array_equal(bits(gptq(other, factor(gram), scale, form).codes)[~dead], bits(q.codes)[~dead])
    assert output_error(q, weights, gram).sum() < output_error(plain, weights, gram).sum() / 3


def test_few_inputs_are_met_almost_exactly() -> None:
    """40 inputs leave 216 directions free to take up the errors."""
    weights, gram = normal(256, 32), gram_of(activations(40, 256))
    scale = choose_scale(weights, INT4_BLOCK32)
    q, plain = gptq(weights, factor(gram), scale, INT4_BLOCK32), quantize_with(weights, INT4_BLOCK32, scale)
    assert output_error(q, weights, gram).sum() < output_error(plain, weights, gram).sum() / 30


def test_damping_grows_until_the_matrix_is_positive_definite() -> None:
    few = factor(gram_of(activations(1, 64)), 0.0)
    assert few.lower is not None
    assert few.damping == 1e-4
    shifted = np.full((64, 64), 3, np.float32) + np.diag(np.full(64, -2, np.float32))  # eigenvalues -2, diagonal 1
    above = factor(shifted, 0.01)
    assert above.lower is not None
    assert above.damping == 10


def test_without_a_factor_all_is_rounded() -> None:
    gram = np.full((64, 64), 1000, np.float32)
    np.fill_diagonal(gram, 1)
    f = factor(gram)
    assert f.lower is None
    weights = normal(64, 8)
    scale = choose_scale(weights, INT4_BLOCK32)
    q = gptq(weights, f, scale, INT4_BLOCK32)
    np.testing.assert_array_equal(bits(q.codes), bits(quantize_with(weights, INT4_BLOCK32, scale).codes))


@pytest.mark.parametrize("inputs", [256, 1152])
def test_the_same_bytes_again_and_nothing_else_touched(inputs: int) -> None:
    weights, gram = normal(inputs, 40), gram_of(activations(inputs, inputs))
    before, f = (weights.copy(), gram.copy()), factor(gram)
    scale = choose_scale(weights, INT4_BLOCK128)
    kept = [scale.stored.copy(), *(np.copy(x) for x in (f.order, f.lower, f.pivots))]
    first, second = (gptq(weights, each, scale, INT4_BLOCK128) for each in (f, factor(gram)))
    np.testing.assert_array_equal(bits(first.codes), bits(second.codes))
    for now, then in zip((weights, gram, scale.stored, f.order, f.lower, f.pivots), (*before, *kept), strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("form", ALL, **by_name)
def test_columns_do_not_know_of_each_other(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, f = normal(256, 37), factor(gram_of(activations(300, 256)))
    scale = choose_scale(weights, form)
    whole = gptq(weights, f, scale, form)
    monkeypatch.setattr(module, "_COLUMNS", 8)
    np.testing.assert_array_equal(bits(gptq(weights, f, scale, form).codes), bits(whole.codes))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sources_in_half_precision_and_transposed(dtype: type) -> None:
    stored, f = normal(24, 256).astype(dtype), factor(gram_of(activations(300, 256)))  # [out, in], as in a checkpoint
    scale = choose_scale(stored.T, NVFP4, FP16)
    want = gptq(np.ascontiguousarray(stored.astype(np.float32).T), f, scale, NVFP4)
    np.testing.assert_array_equal(bits(gptq(stored.T, f, scale, NVFP4).codes), bits(want.codes))


def test_blocks_too_small_for_fp16_are_zero() -> None:
    weights = np.concatenate([normal(16, 8), normal(16, 8) * np.float32(1e-9)]) * np.float32(0.005)
    scale = choose_scale(weights, NVFP4, FP16)
    assert (scale.value() > 0).all(axis=1).tolist() == [True, False]
    q = gptq(weights, factor(gram_of(activations(100, 32))), scale, NVFP4)
    assert not q.dequantize()[16:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused(bad: float) -> None:
    gram, weights = gram_of(activations(100, 64)), normal(64, 4)
    scale, f = choose_scale(weights, INT4_BLOCK32), factor(gram)
    gram[40, 7] = bad
    with pytest.raises(OneVisionError, match="Gram matrix holds NaN or infinity"):
        factor(gram)
    weights[3, 2] = bad
    with pytest.raises(OneVisionError, match="tensor layer holds NaN or infinity"):
        gptq(weights, f, scale, INT4_BLOCK32, "layer")


def test_a_factor_of_other_inputs_is_a_mistake_of_the_program() -> None:
    weights = normal(64, 4)
    with pytest.raises(AssertionError, match="factor of 32 inputs"):
        gptq(weights, factor(np.eye(32, dtype=np.float32)), choose_scale(weights, INT4_BLOCK32), INT4_BLOCK32)


def test_an_empty_factor_rounds() -> None:
    f = Factor(np.arange(32), None, np.ones(32), 1.0, 0.01)
    weights = normal(32, 2)
    scale = choose_scale(weights, INT4_BLOCK32)
    want = quantize_with(weights, INT4_BLOCK32, scale)
    np.testing.assert_array_equal(bits(gptq(weights, f, scale, INT4_BLOCK32).codes), bits(want.codes))
