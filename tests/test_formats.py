"""Quantised formats against the ONNX specification, and their graphs in ONNX Runtime and TensorRT-RTX.

Exact means exact: codes and values are compared as bits, with the ONNX reference evaluator. Where that is
wrong (quotients beyond int32, which it wraps) ONNX Runtime's CPU kernels are the reference.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotInRuntime
from onnxscript import GraphBuilder

from onevision_edge.errors import OneVisionError
from onevision_edge.export.patterns import ActivationValues, WeightValues, matmul
from onevision_edge.precision import FLOAT_FORMATS, FP16, FP32, FloatFormat
from onevision_edge.precision.codes import (
    FP4,
    FP8,
    INT4,
    INT8,
    UINT8,
    Codes,
    array_dtype,
    dequantize_linear,
    encode,
    pack,
    packed_nbytes,
    quantize_linear,
    unpack,
)
from onevision_edge.precision.formats import (
    ALL,
    FP8_CHANNEL,
    FP8_TENSOR,
    INT4_BLOCK32,
    INT4_BLOCK128,
    INT8_CHANNEL,
    INT8_TENSOR,
    NVFP4,
    Format,
    Quantized,
    choose_scale,
    grid,
    quantize,
    quantize_with,
)
from onevision_edge.precision.scales import asymmetric, symmetric

FLOATS = list(FLOAT_FORMATS.values())
ALL_CODES = [INT8, UINT8, INT4, FP8, FP4]
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # no overflow, no 0 / 0 that was not meant
by_name = {"ids": lambda value: value.name}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ties(shape: tuple[int, int], largest: float) -> np.ndarray:
    """Halves and quarters up to `largest`, which is in each column of each block: scales are powers of two."""
    values = np.random.default_rng(1).integers(-4 * 7, 4 * 7 + 1, shape) / np.float32(4)
    values[::16] = largest
    return values.astype(np.float32)


SHAPE = (256, 24)  # every block size divides it
MATRICES: dict[str, Callable[[], np.ndarray]] = {
    "normal": lambda: normal(*SHAPE),
    "zeros": lambda: np.zeros(SHAPE, np.float32),
    "zeros and one": lambda: np.eye(*SHAPE, dtype=np.float32),
    "negative zeros": lambda: np.full(SHAPE, -0.0, np.float32),
    "denormals": lambda: normal(*SHAPE) * np.float32(1e-40),
    "denormals of fp16": lambda: normal(*SHAPE) * np.float32(3e-7),
    "ties of int8": lambda: ties(SHAPE, 127),
    "ties of int4": lambda: ties(SHAPE, 7),
    "ties of fp4": lambda: ties(SHAPE, 6),
    "one sign": lambda: -np.abs(normal(*SHAPE)),
    "huge range": lambda: normal(*SHAPE) * np.exp2(np.linspace(-120, 14, SHAPE[0], dtype=np.float32))[:, None],
    "range over columns": lambda: normal(*SHAPE) * np.exp2(np.linspace(-30, 13, SHAPE[1], dtype=np.float32)),
    "largest of fp16": lambda: np.sign(normal(*SHAPE)) * np.float32(65504),
    "outliers": lambda: np.where(normal(*SHAPE, seed=3) > 2.5, 1000, normal(*SHAPE)).astype(np.float32),
    "one column": lambda: normal(256, 1),
    "one block": lambda: normal(128, 3),
    "odd columns": lambda: normal(128, 37),
    "many tiles": lambda: normal(512, 700),
}


def run_reference(op: str, inputs: list[np.ndarray], **attributes: Any) -> np.ndarray:
    """One operator in the ONNX reference evaluator."""
    names = [f"input{i}" for i in range(len(inputs))]
    node = helper.make_node(op, names, ["y"], **attributes)
    types = [helper.np_dtype_to_tensor_dtype(x.dtype) for x in inputs]
    infos = [helper.make_tensor_value_info(n, t, x.shape) for n, t, x in zip(names, types, inputs, strict=True)]
    graph = helper.make_graph([node], "one", infos, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))[0]


def granularity(form: Format) -> dict[str, int]:
    return {"axis": 0, "block_size": form.block} if form.block else {"axis": 1}


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def expanded(q: Quantized) -> np.ndarray:
    """The scale of every value, in float64."""
    scale = grid(q.scale.value(), q.format).astype(np.float64)
    return np.broadcast_to(np.repeat(scale, q.format.block or 1, axis=0), q.codes.shape)


def numbers(codes: Codes) -> np.ndarray:
    """Every number of a set of codes, in order."""
    values = np.unique(np.arange(256, dtype=np.uint8).view(codes.numpy).astype(np.float32))
    return values[np.isfinite(values)]


def squared_error(q: Quantized, weights: np.ndarray) -> np.ndarray:
    """Sum of squared errors of each output channel."""
    return np.square(q.codes.astype(np.float64) * expanded(q) - weights).sum(axis=0)


# Formats


@pytest.mark.parametrize("search_scales", [False, True], ids=["absmax", "search"])
@pytest.mark.parametrize("fmt", FLOATS, **by_name)
@pytest.mark.parametrize("form", ALL, **by_name)
@pytest.mark.parametrize("case", MATRICES)
def test_exactly_as_the_onnx_reference(case: str, form: Format, fmt: FloatFormat, search_scales: bool) -> None:
    weights = MATRICES[case]()
    q = quantize(weights, form, fmt, search_scales=search_scales)
    scale = q.scale.stored
    if q.scale.tensor is not None:
        scale = run_reference("DequantizeLinear", [scale, q.scale.tensor], output_dtype=fmt.onnx_type)
    assert scale.dtype == array_dtype(fmt)
    values = run_reference("DequantizeLinear", [q.codes, scale], **granularity(form))
    np.testing.assert_array_equal(bits(q.dequantize()), bits(values))
    wide = scale.astype(np.float32)
    if (wide > 0).all():
        attributes = {"output_dtype": form.codes.onnx_type, **granularity(form)}
        codes = run_reference("QuantizeLinear", [weights, wide], **attributes)
        np.testing.assert_array_equal(bits(q.codes) & 0xFF, bits(codes))


@pytest.mark.parametrize("fmt", FLOATS, **by_name)
@pytest.mark.parametrize("form", ALL, **by_name)
@pytest.mark.parametrize("case", MATRICES)
def test_scales_are_positive_and_errors_within_half_a_step(case: str, form: Format, fmt: FloatFormat) -> None:
    weights = MATRICES[case]()
    q = quantize(weights, form, fmt)
    stored = q.scale.stored.astype(np.float32)
    assert (stored > 0).all()
    assert np.isfinite(stored).all()
    assert np.isfinite(q.dequantize().astype(np.float32)).all()
    scale, table = expanded(q), numbers(form.codes).astype(np.float64)
    # A product of two scales may be subnormal, or zero, in the graph's format: FP16 then has too few digits.
    held = scale >= (2.0**-14 if fmt is FP16 else 2.0**-126) if form.two_level else np.ones(scale.shape, bool)
    quotient, codes = weights[held] / scale[held], q.codes[held].astype(np.float64)
    assert np.abs(quotient).max(initial=0) <= max(-table[0], table[-1]) + form.codes.gap / 2
    nearest = np.abs(quotient[:, None] - table).min(axis=-1) if quotient.size < 10_000 else form.codes.gap / 2
    np.testing.assert_array_less(np.abs(quotient - codes), nearest + 1e-6 * np.abs(quotient) + 1e-9)


@pytest.mark.parametrize("form", ALL, **by_name)
def test_zeros_have_a_scale_of_one(form: Format) -> None:
    weights = normal(256, 3)
    weights[:, 1] = 0
    scale = quantize(weights, form, FP16).scale.stored.astype(np.float32)
    assert form.pooled or (scale[..., 1] == 1).all()
    everything = quantize(np.zeros((256, 3), np.float32), form).scale
    assert (everything.stored.astype(np.float32) == 1).all()
    assert everything.tensor in (None, 1)


def test_blocks_too_small_for_fp16_are_zero() -> None:
    weights = np.concatenate([normal(16, 8), normal(16, 8) * np.float32(1e-9), np.zeros((16, 8), np.float32)])
    q = quantize(weights * np.float32(0.005), NVFP4, FP16, search_scales=True)
    assert (q.scale.value() > 0).all(axis=1).tolist() == [True, False, True]
    assert not q.codes[16:].astype(np.float32).any()


def test_scales_by_hand() -> None:
    column = np.zeros((128, 2), np.float32)
    column[:2] = [[-8, -4], [3.5, 7]]
    assert quantize(column, INT8_CHANNEL).scale.stored.tolist() == [np.float32(8 / 127), np.float32(7 / 127)]
    assert quantize(column, INT8_TENSOR).scale.stored == np.float32(8 / 127)
    int4 = quantize(column, INT4_BLOCK128)
    assert int4.scale.stored.tolist() == [[1, 1]]  # -8 / -8, 7 / 7: either end sets it
    assert int4.codes[:2].astype(int).tolist() == [[-8, -4], [4, 7]]  # 3.5 is a tie, 4 is even
    assert quantize(column, FP8_CHANNEL).scale.stored.tolist() == [np.float32(8 / 448), np.float32(7 / 448)]
    nvfp4 = quantize(column, NVFP4).scale
    assert nvfp4.tensor == np.float32(8 / 6) / np.float32(448)
    assert nvfp4.stored.astype(float)[:2].tolist() == [[448, 384], [1, 1]]  # 392 lies between 384 and 416


@pytest.mark.parametrize("fmt", [FP32, FP16], **by_name)
@pytest.mark.parametrize("form", ALL, **by_name)
def test_search_is_never_worse_than_absmax(form: Format, fmt: FloatFormat) -> None:
    worse = []
    for case, make in MATRICES.items():
        weights = make()
        plain = squared_error(quantize(weights, form, fmt), weights)
        best = squared_error(quantize(weights, form, fmt, search_scales=True), weights)
        if form.pooled:
            plain, best = plain.sum(keepdims=True), best.sum(keepdims=True)
        worse += [case] * bool((best > plain * (1 + 1e-6)).any())
    assert not worse


@pytest.mark.parametrize(
    ("form", "gain"),
    [(INT8_TENSOR, 0.9), (INT4_BLOCK32, 0.92), (INT4_BLOCK128, 0.85), (NVFP4, 0.78)],
    ids=lambda value: getattr(value, "name", value),
)
def test_search_gains_on_normal_weights(form: Format, gain: float) -> None:
    weights = normal(1024, 256)
    plain = squared_error(quantize(weights, form), weights).sum()
    assert squared_error(quantize(weights, form, search_scales=True), weights).sum() < gain * plain


def test_search_minds_the_importance_of_inputs() -> None:
    weights = normal(128, 64)
    importance = np.exp(3 * normal(128, seed=2))
    errors = [
        (importance[:, None] * np.square(q.dequantize() - weights)).sum()
        for q in (
            quantize(weights, INT4_BLOCK32),
            quantize(weights, INT4_BLOCK32, search_scales=True),
            quantize(weights, INT4_BLOCK32, search_scales=True, importance=importance),
        )
    ]
    assert errors[2] < 0.9 * errors[1] < errors[0]


@pytest.mark.parametrize("search_scales", [False, True], ids=["absmax", "search"])
@pytest.mark.parametrize("power", [-80, -1, 1, 100])
@pytest.mark.parametrize("form", ALL, **by_name)
def test_powers_of_two_move_only_the_scale(form: Format, power: int, search_scales: bool) -> None:
    weights, factor = normal(256, 48), np.float32(2.0**power)
    q = quantize(weights, form, search_scales=search_scales)
    scaled = quantize(weights * factor, form, search_scales=search_scales)
    np.testing.assert_array_equal(bits(q.codes), bits(scaled.codes))
    np.testing.assert_array_equal(q.scale.value() * factor, scaled.scale.value())


@pytest.mark.parametrize("search_scales", [False, True], ids=["absmax", "search"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ALL, **by_name)
def test_sources_in_half_precision_and_transposed(form: Format, dtype: Any, search_scales: bool) -> None:
    stored = normal(40, 256).astype(dtype)  # [out, in], as a checkpoint has it
    want = quantize(np.ascontiguousarray(stored.astype(np.float32).T), form, search_scales=search_scales)
    q = quantize(stored.T, form, search_scales=search_scales)
    np.testing.assert_array_equal(bits(q.codes), bits(want.codes))
    np.testing.assert_array_equal(q.scale.value(), want.scale.value())


@pytest.mark.parametrize("form", [INT4_BLOCK32, NVFP4], **by_name)
def test_slabs_of_rows_give_the_same_bytes(form: Format) -> None:
    weights = normal(256, 31)
    whole = quantize(weights, form)
    scale = choose_scale(weights, form)
    rows = form.block * 2
    for start in range(0, 256, rows):
        part = type(scale)(scale.stored[start // form.block :][:2], scale.fmt, scale.tensor)
        slab = quantize_with(weights[start : start + rows], form, part)
        np.testing.assert_array_equal(bits(slab.codes), bits(whole.codes[start : start + rows]))


@pytest.mark.parametrize("form", ALL, **by_name)
def test_a_clip_saturates(form: Format) -> None:
    weights = normal(256, 8)
    q = quantize(weights, form, clip=0.5)
    assert q.scale.value().max() <= 0.5 / form.codes.reach[1] * 1.07  # FP8 scales: 1/16 apart
    codes = q.codes.astype(np.float32)
    assert codes.max() == form.codes.largest
    assert codes.min() == form.codes.lowest
    per_group = np.full(q.scale.stored.shape, 0.5, np.float32)
    np.testing.assert_array_equal(bits(quantize(weights, form, clip=per_group).codes), bits(q.codes))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ALL, **by_name)
def test_not_a_number_is_refused(form: Format, bad: float) -> None:
    weights = normal(256, 5)
    scale = choose_scale(weights, form)
    weights[200, 3] = bad
    with pytest.raises(OneVisionError, match="tensor layer holds NaN or infinity"):
        quantize(weights, form, name="layer")
    with pytest.raises(OneVisionError, match="tensor layer holds NaN or infinity"):
        quantize_with(weights, form, scale, name="layer")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OneVisionError, match=r"layer has 100 inputs, which blocks of 32 do not divide"):
        quantize(normal(100, 4), INT4_BLOCK32, name="layer")
    with pytest.raises(OneVisionError, match=r"reaches 7e\+04, beyond fp16's 65504"):
        quantize(np.full((32, 1), 7e4, np.float32), INT4_BLOCK32, FP16)
    for clip in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(OneVisionError, match="not positive and finite"):
            quantize(normal(32, 4), INT4_BLOCK32, clip=clip)


@pytest.mark.parametrize("fmt", FLOATS, **by_name)
@pytest.mark.parametrize("case", [case for case in MATRICES if "denormals" not in case and "range" not in case])
def test_nvfp4_in_int8_is_the_same_numbers(case: str, fmt: FloatFormat) -> None:
    q = quantize(MATRICES[case](), NVFP4, fmt)
    np.testing.assert_array_equal(q.in_int8().dequantize(), q.dequantize())
    assert q.in_int8().codes.dtype == np.int8


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = st.integers(1, 3).flatmap(lambda columns: arrays(np.float32, (128, columns), elements=finite, fill=finite))


@pytest.mark.parametrize("form", ALL, **by_name)
@settings(max_examples=40, deadline=None)
@given(weights=matrices)
def test_any_finite_matrix(form: Format, weights: np.ndarray) -> None:
    """Nothing finite makes a scale, a code or a value that is not; the reference agrees on every bit."""
    for search_scales in (False, True):
        q = quantize(weights, form, search_scales=search_scales)
        scale = q.scale.stored
        if q.scale.tensor is not None:
            scale = run_reference("DequantizeLinear", [scale, q.scale.tensor])
        values = run_reference("DequantizeLinear", [q.codes, scale], **granularity(form))
        np.testing.assert_array_equal(bits(q.dequantize()), bits(values))
        assert np.isfinite(values).all()
        attributes = {"output_dtype": form.codes.onnx_type, **granularity(form)}
        codes = run_reference("QuantizeLinear", [weights, scale], **attributes)
        np.testing.assert_array_equal(bits(q.codes), bits(codes))


# Codes


@pytest.mark.parametrize("codes", [FP8, FP4], **by_name)
def test_float_codes_round_as_ml_dtypes(codes: Codes) -> None:
    """On every bfloat16, its neighbours in float32 (so every tie and what lies just beside it), and random bits."""
    coarse = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    near = np.ldexp(normal(200_000), np.random.default_rng(1).integers(-12, 10, 200_000)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        beside = [np.nextafter(coarse, np.float32(sign * np.inf)) for sign in (1, -1)]
    values = np.concatenate([coarse, *beside, random, near])
    values = values[np.isfinite(values)]
    want = np.clip(values, codes.lowest, codes.largest).astype(codes.numpy)
    np.testing.assert_array_equal(bits(encode(values, codes)), bits(want))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("codes", ALL_CODES, **by_name)
def test_activations_exactly_as_the_onnx_reference(codes: Codes, dtype: Any) -> None:
    """The division rounds in the scale's own type: with a scale of 0.0307 in FP16 that moves 1 code in 70."""
    special = [0.0, -0.0, 1e-7, -1e-7, 0.5, 1.5, 2.5, -0.5, -2.5, 100.0, -3e4, 1e-8]
    x = np.concatenate([normal(5000) * 2, np.array(special, np.float32)]).astype(dtype)
    for scale in (np.array(0.0307, dtype), np.array(1, dtype), np.array(2, dtype), np.array(8, dtype)):
        for zero in (0, 100) if codes is UINT8 else (0,):
            point = np.array(zero, codes.numpy)
            got = quantize_linear(x, scale, codes, zero)
            # Without a zero point: the evaluator adds it to floats, too, and makes -0 of them 0.
            inputs = [x, scale, point] if zero else [x, scale]
            want = run_reference("QuantizeLinear", inputs, output_dtype=codes.onnx_type)
            np.testing.assert_array_equal(bits(got), bits(want))
            fmt = next(f for f in FLOATS if array_dtype(f) == dtype)
            values = run_reference("DequantizeLinear", [want, scale, point])
            np.testing.assert_array_equal(bits(dequantize_linear(got, scale, fmt, point)), bits(values))


@pytest.mark.parametrize("codes", [INT8, UINT8], **by_name)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_activations_exactly_as_onnx_runtime(codes: Codes, dtype: Any) -> None:
    """With quotients beyond int32, which the reference evaluator wraps to the other end of the range."""
    huge = [3e38, -3e38, 1e30, -1e30, 3e9, -3e9] if dtype is np.float32 else [6e4, -6e4, 3e4]
    x = np.concatenate([normal(5000), np.array(huge, np.float32)]).astype(dtype)
    scale = np.array(0.0307, dtype)
    info = [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)]
    out = [helper.make_tensor_value_info("y", codes.onnx_type, x.shape)]
    constants = [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(np.array(3, codes.numpy), "z")]
    graph = helper.make_graph([helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], "q", info, out, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    want = session(model).run(None, {"x": x})[0]
    np.testing.assert_array_equal(quantize_linear(x, scale, codes, 3), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_numbers_are_refused(bad: float) -> None:
    with pytest.raises(OneVisionError, match="NaN or infinity"):
        quantize_linear(np.array([bad], np.float32), np.float32(1), INT8)


@pytest.mark.parametrize("fmt", FLOATS, **by_name)
@pytest.mark.parametrize(("low", "high"), [(-1, 3), (0, 6), (2, 5), (-7, -3), (-1e-6, 2e-6), (-6e4, 6e4), (0, 1e-12)])
def test_asymmetric_ranges(low: float, high: float, fmt: FloatFormat) -> None:
    scale, zero = asymmetric(low, high, fmt)
    assert scale > 0
    x = np.linspace(low, high, 4001).astype(np.float32)
    values = dequantize_linear(quantize_linear(x, scale.astype(np.float32), UINT8, zero), scale, FP32, zero)
    # Half a step from rounding x, half from rounding the zero point, and the rounding of the scale over 255 steps.
    rounding = 255 * {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}[fmt.name]
    assert np.abs(values - x).max() <= float(scale) * (1 + rounding) * 1.001
    assert dequantize_linear(quantize_linear(np.float32([0]), scale, UINT8, zero), scale, FP32, zero) == 0


@pytest.mark.parametrize("fmt", FLOATS, **by_name)
@pytest.mark.parametrize("codes", [INT8, FP8], **by_name)
def test_symmetric_ranges(codes: Codes, fmt: FloatFormat) -> None:
    for largest in (1e-6, 0.3, 4.0, 65504.0):
        scale = symmetric(largest, codes, fmt)
        assert scale.shape == ()
        assert scale.dtype == array_dtype(fmt)
        assert largest / float(scale) <= codes.largest + codes.gap / 2
        value = dequantize_linear(encode(np.float32([largest / float(scale)]), codes), scale, fmt)
        assert abs(float(value[0]) - largest) <= float(scale) * codes.gap / 2 + largest * 2.0**-8
    assert symmetric(0, codes, fmt) == 1
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(OneVisionError, match="is not a number from 0"):
            symmetric(bad, codes, fmt)


def test_asymmetric_edges() -> None:
    assert [float(v) for v in asymmetric(0, 0)] == [1, 0]
    with pytest.raises(OneVisionError, match="not finite"):
        asymmetric(-np.inf, 1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 2), (7, 1), (1, 7), (0, 4)])
@pytest.mark.parametrize("codes", ALL_CODES, **by_name)
def test_packing_is_that_of_onnx(codes: Codes, shape: tuple[int, int]) -> None:
    count = shape[0] * shape[1]
    values = np.resize(numbers(codes), count).astype(codes.numpy).reshape(shape)
    packed = pack(values)
    proto = numpy_helper.from_array(values)
    assert proto.data_type == codes.onnx_type
    assert packed.tobytes() == proto.raw_data
    assert packed.nbytes == packed_nbytes(values) == (count * codes.bits + 7) // 8
    back = TensorProto(data_type=codes.onnx_type, dims=shape, raw_data=packed.tobytes())
    np.testing.assert_array_equal(bits(numpy_helper.to_array(back)), bits(values))
    np.testing.assert_array_equal(bits(unpack(packed, codes, shape)), bits(values))


def test_the_first_code_is_in_the_low_half() -> None:
    assert pack(np.array([1, -1, -8], INT4.numpy)).tolist() == [0xF1, 0x08]
    assert pack(np.array([0.5, -6, 1], FP4.numpy)).tolist() == [0xF1, 0x02]


@pytest.mark.parametrize(
    ("form", "fmt", "per_weight"),
    [(INT8_CHANNEL, FP16, 8.0625), (INT4_BLOCK32, FP16, 4.5), (INT4_BLOCK128, FP16, 4.125), (NVFP4, FP16, 4.5)],
    ids=lambda value: getattr(value, "name", value),
)
def test_bits_per_weight(form: Format, fmt: FloatFormat, per_weight: float) -> None:
    q = quantize(normal(256, 64), form, fmt)
    tensor = 4 if form.two_level else 0
    assert q.nbytes == per_weight * 256 * 64 / 8 + tensor


# Graphs


PATTERNS: dict[str, tuple[Format, Codes | None]] = {
    "int8": (INT8_CHANNEL, INT8),
    "int8 per tensor": (INT8_TENSOR, INT8),
    "int8 asymmetric": (INT8_CHANNEL, UINT8),
    "int8-weight": (INT8_CHANNEL, None),
    "int4 block 32": (INT4_BLOCK32, None),
    "int4 block 128": (INT4_BLOCK128, None),
    "fp8": (FP8_CHANNEL, FP8),
    "fp8 per tensor": (FP8_TENSOR, FP8),
    "nvfp4": (NVFP4, None),
    "nvfp4 activations in fp8": (NVFP4, FP8),
}
INPUTS, OUTPUTS = 256, 64


def layer(q: Quantized, codes: Codes | None) -> onnx.ModelProto:
    """A graph of one product, x [rows, in] -> y [rows, out]."""
    fmt = q.scale.fmt
    dtype = ir.DataType(fmt.onnx_type)
    builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="layer"))
    x = builder.input("x", dtype, ["rows", q.codes.shape[0]])

    def constant(name: str, values: np.ndarray) -> ir.Value:
        return builder.op.initializer(ir.tensor(values, name=name), name=name)

    tensor = None if q.scale.tensor is None else constant("tensor_scale", q.scale.tensor)
    weight = WeightValues(constant("codes", q.codes), constant("scale", q.scale.stored), q.format.block, tensor)
    activation = None
    if codes is not None:
        scale, zero = activation_scale(codes, fmt)
        point = constant("x_zero_point", zero) if codes is UINT8 else None
        activation = ActivationValues(codes, constant("x_scale", scale), point)
    y = matmul(builder.op, x, weight, fmt, activation)
    y.shape, y.dtype = ir.Shape(["rows", q.codes.shape[1]]), dtype
    builder.add_output(y, "y")
    return ir.to_proto(ir.Model(builder.graph, ir_version=11))


def activation_scale(codes: Codes, fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    if codes is UINT8:
        return asymmetric(-3, 4, fmt)
    return symmetric(4, codes, fmt), np.zeros((), codes.numpy)


def expected(q: Quantized, codes: Codes | None, x: np.ndarray) -> np.ndarray:
    """The product in float64 of what quantisation leaves of x and of the weights."""
    if codes is not None:
        scale, zero = activation_scale(codes, q.scale.fmt)
        x = dequantize_linear(quantize_linear(x, scale, codes, zero), scale, q.scale.fmt, zero)
    return x.astype(np.float64) @ q.dequantize().astype(np.float64)


def session(model: onnx.ModelProto, optimised: bool = False, **entries: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def made(pattern: str, fmt: FloatFormat) -> tuple[Quantized, Codes | None]:
    form, codes = PATTERNS[pattern]
    return quantize(normal(INPUTS, OUTPUTS) * np.float32(0.05), form, fmt), codes


@pytest.mark.parametrize("fmt", FLOATS, **by_name)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_graphs_are_valid_and_compute_the_product(pattern: str, fmt: FloatFormat) -> None:
    """By the reference evaluator, whose product of half-precision matrices accumulates in half precision."""
    q, codes = made(pattern, fmt)
    model = layer(q, codes)
    onnx.checker.check_model(model, full_check=True)
    x = normal(4, INPUTS, seed=5).astype(array_dtype(fmt))
    y = ReferenceEvaluator(model).run(None, {"x": x})[0].astype(np.float64)
    want = expected(q, codes, x)
    assert np.abs(y - want).max() <= {"fp32": 1e-5, "fp16": 2e-2, "bf16": 1e-1}[fmt.name] * np.abs(want).max()


def check_runtime(model: onnx.ModelProto, want: np.ndarray, x: np.ndarray, optimised: bool) -> None:
    """To the rounding of the product alone: INT8 and INT4 weights multiply float activations, not INT8 ones."""
    y = session(model, optimised, qdq_matmulnbits_accuracy_level="1").run(None, {"x": x})[0]
    tolerance = 1e-6 if x.dtype == np.float32 else 1e-3
    assert np.abs(y.astype(np.float64) - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("optimised", [False, True], ids=["as written", "optimised"])
@pytest.mark.parametrize("fmt", [FP32, FP16], **by_name)
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "nvfp4" not in p])
def test_onnx_runtime_computes_the_product(pattern: str, fmt: FloatFormat, optimised: bool) -> None:
    q, codes = made(pattern, fmt)
    x = normal(4, INPUTS, seed=5).astype(fmt.numpy)
    check_runtime(layer(q, codes), expected(q, codes, x), x, optimised)


@pytest.mark.parametrize("optimised", [False, True], ids=["as written", "optimised"])
@pytest.mark.parametrize("fmt", [FP32, FP16], **by_name)
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "nvfp4" in p])
def test_onnx_runtime_computes_nvfp4_as_int8(pattern: str, fmt: FloatFormat, optimised: bool) -> None:
    q, codes = made(pattern, fmt)
    x = normal(4, INPUTS, seed=5).astype(fmt.numpy)
    check_runtime(layer(q.in_int8(), codes), expected(q, codes, x), x, optimised)


@pytest.mark.xfail(raises=NotInRuntime, reason="ONNX Runtime 1.32 has no FLOAT4E2M1 on the CPU, not even in Cast")
def test_onnx_runtime_reads_nvfp4() -> None:
    q, codes = made("nvfp4", FP32)
    x = normal(4, INPUTS, seed=5)
    check_runtime(layer(q, codes), expected(q, codes, x), x, False)


@pytest.mark.parametrize("pattern", ["int8-weight", "int4 block 32"])
def test_onnx_runtime_left_alone_rounds_activations_to_int8(pattern: str) -> None:
    """Its default for weight-only products (accuracy level 4): 100 times the error of level 1, and more."""
    q, codes = made(pattern, FP32)
    x = normal(4, INPUTS, seed=5)
    want = expected(q, codes, x)
    y = session(layer(q, codes), True).run(None, {"x": x})[0]
    assert 1e-4 < np.abs(y - want).max() / np.abs(want).max() < 2e-2


# What a compute capability builds, by pattern. INT8 with a zero point is for ONNX Runtime alone.
TARGETS = {
    "SM80": {"int8", "int8 per tensor", "int8-weight", "int4 block 32", "int4 block 128"},
    "SM89": {"fp8", "fp8 per tensor"},
    "SM120": {"nvfp4", "nvfp4 activations in fp8"},
}
BUILDS = [(sm, p, f) for sm, patterns in TARGETS.items() for p in sorted(patterns) for f in FLOATS]
REFUSALS = [("SM80", "fp8"), ("SM80", "nvfp4"), ("SM89", "nvfp4")]


def build(model: onnx.ModelProto, target: str) -> tuple[list[str], bool]:
    """What TensorRT-RTX's parser has to say, and whether an engine was built."""
    trt = pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
    )
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    if not parser.parse(model.SerializeToString()):
        return [parser.get_error(i).desc() for i in range(parser.num_errors)], False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, INPUTS), (4, INPUTS), (64, INPUTS))
    config.add_optimization_profile(profile)
    return [], builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize(("target", "pattern", "fmt"), BUILDS, ids=lambda value: getattr(value, "name", value))
def test_tensorrt_rtx_builds(target: str, pattern: str, fmt: FloatFormat) -> None:
    assert build(layer(*made(pattern, fmt)), target) == ([], True)


@pytest.mark.parametrize(("target", "pattern"), REFUSALS)
def test_tensorrt_rtx_parses_but_does_not_build_what_a_target_lacks(target: str, pattern: str) -> None:
    assert build(layer(*made(pattern, FP16)), target) == ([], False)


def test_tensorrt_rtx_refuses_zero_points() -> None:
    errors, built = build(layer(*made("int8 asymmetric", FP16)), "SM80")
    assert not built
    assert "Non-zero zero point is not supported" in errors[0]
