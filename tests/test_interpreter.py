"""The network interpreter: what each layer type computes, on values where it matters, against ONNX Runtime."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import interpreting as shared
import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest

from onevision_edge.engines.interpreter import kernels
from onevision_edge.engines.interpreter.compare import compare
from onevision_edge.engines.interpreter.interpreter import Interpreter, run_layer
from onevision_edge.engines.interpreter.network import Layer, Network, Tensor
from onevision_edge.engines.interpreter.reading import LAYER_TYPES
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.codes import FP4, FP8, INT4

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)


node = shared.node
F32, F16, BF16, I64 = np.float32, np.float16, ml_dtypes.bfloat16, np.int64
RNG = np.random.default_rng(0)


def noise(*shape: int, dtype: Any = F32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(F32).astype(dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, I64)


def interpreted(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    made = shared.parsed(trt, path)
    return Interpreter(made.read).run({name: array.copy() for name, array in inputs.items()})


def agree(path: Path, inputs: dict[str, np.ndarray]) -> None:
    """The network departs from ONNX Runtime by no more than bounds.py allows, and has every value of the graph."""
    made = shared.parsed(trt, path)
    found = compare(trt, made.read, path, inputs)
    assert [str(departure) for departure in found.departures] == []
    assert found.compared
    assert found.unused_inputs == found.unmatched == ()


EDGES = np.array([0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, 127.5, -127.5, -128.5, 1e4, -1e4, 6e-8, 448, 464, -500])

# name: nodes, inputs, constants
Case = tuple[list[Any], dict[str, np.ndarray], dict[str, np.ndarray]]
CASES: dict[str, Case] = {}


def case(name: str, nodes: list[Any], inputs: dict[str, np.ndarray], **constants: np.ndarray) -> None:
    CASES[name] = (nodes, inputs, constants)


FLOAT_TYPES = {"fp32": F32, "fp16": F16, "bf16": BF16}
for label, dtype in FLOAT_TYPES.items():
    a, b = noise(2, 3, 5, dtype=dtype), noise(2, 1, 5, dtype=dtype)
    a[0, 0] = np.array([0.0, -0.0, 65504, -3e4, 1e-7]).astype(dtype)
    for op in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
        case(f"{op} {label}", [node(op, "a b", "y")], {"a": a, "b": b})
    case(
        f"MatMul {label}",
        [node("MatMul", "a b", "y")],
        {"a": noise(2, 4, 37, dtype=dtype), "b": noise(1, 37, 6, dtype=dtype)},
    )
    case(f"Sigmoid {label}", [node("Sigmoid", "x", "y")], {"x": noise(4, 50, dtype=dtype) * 6})
    case(f"Gelu {label}", [node("Gelu", "x", "y")], {"x": noise(4, 50, dtype=dtype) * 3})
    case(f"Relu {label}", [node("Relu", "x", "y")], {"x": a})
    case(f"Softmax {label}", [node("Softmax", "x", "y", axis=-1)], {"x": noise(3, 40, dtype=dtype) * 5})
    case(
        f"LayerNormalization {label}",
        [node("LayerNormalization", "x scale bias", "y", axis=-1, epsilon=1e-5)],
        {"x": noise(2, 3, 48, dtype=dtype) + dtype(3)},
        scale=noise(48, dtype=dtype),
        bias=noise(48, dtype=dtype),
    )
    case(
        f"RMSNormalization {label}",
        [node("RMSNormalization", "x scale", "y", axis=-1, epsilon=1e-6)],
        {"x": noise(2, 3, 48, dtype=dtype)},
        scale=noise(48, dtype=dtype),
    )
    case(
        f"TensorScatter {label}",
        [node("TensorScatter", "past rows at", "y", axis=2)],
        {"past": noise(2, 3, 9, 4, dtype=dtype), "rows": noise(2, 3, 2, 4, dtype=dtype), "at": ints(7, 0)},
    )
    if label != "fp32":
        heads = {"q": noise(2, 4, 3, 16, dtype=dtype)} | {n: noise(2, 2, 7, 16, dtype=dtype) for n in "kv"}
        mask = RNG.random((2, 1, 3, 7)) < 0.5
        mask[..., 0] = True
        case(f"Attention {label}", [node("Attention", "q k v", "y", scale=0.2)], heads)
        case(f"Attention, mask {label}", [node("Attention", "q k v m", "y", scale=0.25)], {**heads, "m": mask})
        added = noise(2, 1, 3, 7, dtype=dtype)
        case(f"Attention, added mask {label}", [node("Attention", "q k v m", "y", scale=0.25)], {**heads, "m": added})

for op in ("Sqrt", "Exp", "Log", "Reciprocal"):
    case(op, [node(op, "x", "y")], {"x": np.abs(noise(5, 20)) + F32(0.01)})
for op in ("Sin", "Cos", "Erf", "Neg", "Abs", "Floor", "Ceil", "Tanh"):
    case(op, [node(op, "x", "y")], {"x": np.concatenate([EDGES.astype(F32), noise(40) * 100])})
case("Round", [node("Round", "x", "y")], {"x": EDGES.astype(F32)})
for op in ("Div", "Add", "Sub", "Mul", "Max", "Min"):
    case(f"{op} of integers", [node(op, "a b", "y")], {"a": ints(7, -7, 7, -7, 0), "b": ints(2, 2, -2, -2, 3)})
for op in ("Less", "LessOrEqual", "Greater", "Equal"):
    case(f"{op} of integers", [node(op, "a b", "y")], {"a": ints(1, 2, 3), "b": ints(2, 2, 2)})
for op in ("And", "Or", "Xor"):
    case(op, [node(op, "a b", "y")], {"a": np.array([0, 0, 1, 1], bool), "b": np.array([0, 1, 0, 1], bool)})
case("Not", [node("Not", "a", "y")], {"a": np.array([False, True])})
for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
    case(op, [node(op, "x axes", "y", keepdims=0)], {"x": noise(3, 4, 31)}, axes=ints(0, 2))

TYPES = {"FLOAT": 1, "FLOAT16": 10, "BFLOAT16": 16, "INT64": 7, "INT32": 6, "BOOL": 9, "INT8": 3, "FLOAT8E4M3FN": 17}
HALVES = np.concatenate([EDGES, [65519.9, 65520, 70000, -70000, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3e38]]).astype(F32)
case("Cast to half", [node("Cast", "x", "y", to=10)], {"x": HALVES})
case("Cast to bfloat16", [node("Cast", "x", "y", to=16)], {"x": HALVES})
case("Cast from half", [node("Cast", "x", "y", to=1)], {"x": np.clip(HALVES, -65504, 65504).astype(F16)})
case("Cast to int64", [node("Cast", "x", "y", to=7)], {"x": EDGES.astype(F32)})
case("Cast of int64", [node("Cast", "x", "y", to=1)], {"x": ints(0, -3, 16777217, 2**40 + 1)})

case("Reshape", [node("Reshape", "x shape", "y")], {"x": noise(2, 3, 8)}, shape=ints(0, -1, 2, 4))
case("Transpose", [node("Transpose", "x", "y", perm=[2, 0, 1])], {"x": noise(2, 3, 8)})
case("Expand", [node("Expand", "x shape", "y")], {"x": noise(2, 1, 8)}, shape=ints(2, 5, 1))
case(
    "Slice",
    [node("Slice", "x s e a t", "y")],
    {"x": noise(4, 9)},
    s=ints(1, -2),
    e=ints(4, -9),
    a=ints(0, 1),
    t=ints(2, -3),
)
case("Slice to a value", [node("Slice", "x s e a", "y")], {"x": noise(4, 9), "e": ints(5)}, s=ints(0), a=ints(1))
case("Split", [node("Split", "x", "y z", axis=-1, num_outputs=2)], {"x": noise(3, 8)})
case("Concat", [node("Concat", "a b", "y", axis=1)], {"a": noise(2, 3), "b": noise(2, 1)})
case("Gather", [node("Gather", "x i", "y", axis=1)], {"x": noise(2, 6, 3), "i": ints(5, 0, 0)})
case(
    "GatherElements",
    [node("GatherElements", "x i", "y", axis=1)],
    {"x": noise(2, 4), "i": ints(3, 0, 1, 1).reshape(2, 2)},
)
case(
    "GatherND",
    [node("GatherND", "x i", "y", batch_dims=1)],
    {"x": noise(2, 6, 3), "i": ints(5, 0, 1, 1).reshape(2, 2, 1)},
)
case(
    "ScatterND",
    [node("ScatterND", "x i u", "y")],
    {
        "x": np.zeros((2, 3, 4), np.int8),
        "i": ints(1, 2, 0, 1).reshape(2, 2),
        "u": np.arange(8, dtype=np.int8).reshape(2, 4),
    },
)
case(
    "ScatterElements",
    [node("ScatterElements", "x i u", "y", axis=1)],
    {"x": noise(2, 4), "i": ints(3, 0).reshape(2, 1), "u": noise(2, 1)},
)
case("Squeeze", [node("Squeeze", "x axes", "y")], {"x": noise(1, 3, 1)}, axes=ints(0))
case("Unsqueeze", [node("Unsqueeze", "x axes", "y")], {"x": noise(3, 2)}, axes=ints(0, 2))
case("Where", [node("Where", "c a b", "y")], {"c": np.array([[True], [False]]), "a": noise(2, 3), "b": noise(1, 3)})
case("Shape", [node("Shape", "x", "y", start=1)], {"x": noise(2, 3, 4)})
case("Range", [node("Range", "a b c", "y")], {"b": np.array(11, I64)}, a=np.array(2, I64), c=np.array(3, I64))
for interleaved in (0, 1):
    half = noise(2, 5, 8)
    case(
        f"RotaryEmbedding, interleaved {interleaved}",
        [node("RotaryEmbedding", "x c s", "y", interleaved=interleaved)],
        {"x": noise(2, 3, 5, 16), "c": np.cos(half), "s": np.sin(half)},
    )

SCALES = {"exact": 0.5, "odd": 0.0371}
for label, scale in SCALES.items():
    for dtype in (F32, F16):
        name = f"{label} {np.dtype(dtype)}"
        values = np.concatenate([EDGES * scale, noise(3000) * 40 * scale]).astype(dtype)
        one = np.array(scale, dtype)
        pair = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")]
        case(f"INT8 {name}", pair, {"x": values}, s=one, z=np.zeros((), np.int8))
        pair = [node("QuantizeLinear", "x s", "q", output_dtype=17), node("DequantizeLinear", "q s", "y")]
        case(f"FP8 {name}", pair, {"x": values}, s=one)
every_fp8 = np.arange(256, dtype=np.uint8).view(FP8.numpy)
every_fp8 = np.where(np.isnan(every_fp8.astype(F32)), every_fp8[:1], every_fp8).reshape(16, 16)
every_int4 = np.tile(np.arange(16, dtype=np.uint8), 128).view(INT4.numpy).reshape(64, 32)
every_fp4 = np.tile(np.arange(16, dtype=np.uint8), 64).view(FP4.numpy).reshape(32, 32)
for label, dtype in FLOAT_TYPES.items():
    times = [node("Mul", "w x", "y")]
    case(
        f"FP8 codes {label}",
        [node("DequantizeLinear", "q s", "w"), *times],
        {"x": noise(16, 1, dtype=dtype)},
        q=every_fp8,
        s=np.array(0.013, dtype),
    )
    case(
        f"INT8 columns {label}",
        [node("DequantizeLinear", "q s", "w", axis=1), *times],
        {"x": noise(8, 1, dtype=dtype)},
        q=np.arange(-128, 128).astype(np.int8).reshape(8, 32),
        s=np.abs(noise(32, dtype=dtype)),
    )
    case(
        f"INT4 blocks {label}",
        [node("DequantizeLinear", "q s", "w", axis=0, block_size=32), *times],
        {"x": noise(64, 1, dtype=dtype)},
        q=every_int4,
        s=np.abs(noise(2, 32, dtype=dtype)),
    )
    case(
        f"NVFP4 {label}",
        [
            node("DequantizeLinear", "s8 t", "s", output_dtype=int(shared.onnx_type(np.zeros(0, dtype)))),
            node("DequantizeLinear", "q s", "w", axis=0, block_size=16),
            *times,
        ],
        {"x": noise(32, 1, dtype=dtype)},
        q=every_fp4,
        s8=np.abs(noise(2, 32)).astype(FP8.numpy),
        t=np.array(0.01, F32),
    )


@pytest.mark.parametrize("name", CASES)
def test_layers_against_onnx_runtime(name: str, tmp_path: Path) -> None:
    nodes, inputs, constants = CASES[name]
    outputs = [output for made in nodes[-1:] for output in made.output]
    batch = next(iter(inputs.values())).shape[:1]
    free = [name for name, array in inputs.items() if array.shape[:1] == batch]
    agree(shared.graph(tmp_path / "g.onnx", nodes, inputs, outputs, constants, free), inputs)


# Semantics of our own knowledge: values that must come out, whatever ONNX Runtime says.


def result(tmp_path: Path, name: str) -> np.ndarray:
    nodes, inputs, constants = CASES[name]
    output = nodes[-1].output[0]
    path = shared.graph(tmp_path / "g.onnx", nodes, inputs, [output], constants)
    return interpreted(path, inputs)[output]


def test_quantize_rounds_ties_to_even_and_saturates(tmp_path: Path) -> None:
    codes = np.round(result(tmp_path, "INT8 exact float32") / 0.5)[: len(EDGES)]
    assert codes.tolist() == [0, 0, 0, 0, 2, 2, -2, 126, 127, -128, -128, 127, -128, 0, 127, 127, -128]
    fp8 = (result(tmp_path, "FP8 exact float32") / 0.5)[: len(EDGES)]
    assert fp8[:7].tolist() == [0, 0, 0.5, -0.5, 1.5, 2.5, -2.5]
    assert fp8[7:13].tolist() == [128, 128, -128, -128, 448, -448]
    assert fp8[14:].tolist() == [448, 448, -448]
    assert np.signbit(fp8[1])


def test_a_half_product_is_summed_in_float32(tmp_path: Path) -> None:
    """4,096 times 1 and one 2,048: summed in half it would stay at 2,048."""
    a, b = np.ones((1, 4097), F16), np.ones((4097, 1), F16)
    a[0, 0] = 2048
    path = shared.graph(tmp_path / "g.onnx", [node("MatMul", "a b", "y")], {"a": a, "b": b}, ["y"])
    y = interpreted(path, {"a": a, "b": b})["y"]
    assert (y.dtype, float(y[0, 0])) == (np.float16, 6144)


def test_float16_quotients_are_not_rounded_before_the_code(tmp_path: Path) -> None:
    """ONNX Runtime rounds x / scale to half first, and then half of the ties it made go the wrong way."""
    x, scale = (noise(100_000) * 3).astype(F16), np.array(0.0231, F16)
    path = shared.graph(
        tmp_path / "g.onnx", [node("QuantizeLinear", "x s", "y", output_dtype=3)], {"x": x}, ["y"], {"s": scale}
    )
    # TensorRT wants codes read as floats again before they leave the network.
    nodes = [node("QuantizeLinear", "x s", "q", output_dtype=3), node("DequantizeLinear", "q s", "y")]
    both = shared.graph(tmp_path / "both.onnx", nodes, {"x": x}, ["y"], {"s": scale})
    ours = np.rint(interpreted(both, {"x": x})["y"].astype(np.float64) / float(scale))
    exact = np.clip(np.rint(x.astype(np.float64) / float(scale)), -128, 127)
    theirs = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert (ours != exact).sum() == 0
    assert 0.005 < (theirs != exact).mean() < 0.03  # 1.3 % measured


def test_the_cache_is_written_where_it_lies(tmp_path: Path) -> None:
    nodes, inputs, _ = CASES["TensorScatter fp16"]
    path = shared.graph(tmp_path / "g.onnx", nodes, inputs, ["y"])
    given = {name: array.copy() for name, array in inputs.items()}
    made = shared.parsed(trt, path)
    y = Interpreter(made.read).run(given)["y"]
    assert y is given["past"]
    np.testing.assert_array_equal(y[0, :, 7:], inputs["rows"][0])
    np.testing.assert_array_equal(y[1, :, :2], inputs["rows"][1])
    np.testing.assert_array_equal(y[0, :, :7], inputs["past"][0, :, :7])


def test_causal_attention(tmp_path: Path) -> None:
    q, k, v = (noise(1, 2, 6, 16, dtype=F16) for _ in range(3))
    inputs = {"q": q, "k": k, "v": v}
    made = [node("Attention", "q k v", "y", is_causal=1, scale=0.25)]
    agree(shared.graph(tmp_path / "g.onnx", made, inputs, ["y"]), inputs)


# Networks made by hand, for what the parser does not make


def layer(kind: str, inputs: int, dtype: Any, sizes: tuple[int, ...], **attributes: Any) -> Layer:
    names = tuple(f"i{k}" for k in range(inputs))
    return Layer(kind, "l", names, (Tensor("y", np.dtype(dtype), sizes),), attributes)


def test_vectors_and_transposes() -> None:
    a, b = noise(3, 4), noise(3)
    made = layer("MATRIX_MULTIPLY", 2, F32, (4,), op0="TRANSPOSE", op1="VECTOR")
    np.testing.assert_allclose(run_layer(made, [a, b]), a.T @ b, rtol=1e-5)


def test_gather_with_shared_dimensions() -> None:
    x, indices = noise(2, 5, 3), ints(4, 0, 1, 1).reshape(2, 2)
    made = layer("GATHER", 2, F32, (2, 2, 3), axis=1, mode="DEFAULT", batch=1)
    np.testing.assert_array_equal(run_layer(made, [x, indices]), np.stack([x[0, [4, 0]], x[1, [1, 1]]]))


def test_part_of_a_head_is_turned() -> None:
    x, angles = noise(1, 1, 2, 8), noise(1, 2, 2)
    made = layer("ROTARY_EMBEDDING", 3, F32, (1, 1, 2, 8), interleaved=False, dim=4)
    y = run_layer(made, [x, np.cos(angles), np.sin(angles)])
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_allclose(y[..., :2], x[..., :2] * np.cos(angles) - x[..., 2:4] * np.sin(angles), rtol=1e-5)


def test_lower_right_causal_mask() -> None:
    """The last token sees every row."""
    q, k, v = noise(1, 1, 2, 4), noise(1, 1, 5, 4), noise(1, 1, 5, 4)
    made = layer("ATTENTION_INPUT", 3, F32, (1, 1, 2, 4), causal="LOWER_RIGHT")
    full = run_layer(replace(made, attributes={"causal": "NONE"}), [q, k, v])
    y = run_layer(made, [q, k, v])
    np.testing.assert_allclose(y[:, :, 1], full[:, :, 1], rtol=1e-6)
    seen = run_layer(replace(made, attributes={"causal": "NONE"}), [q, k[:, :, :4], v[:, :, :4]])
    np.testing.assert_allclose(y[:, :, 0], seen[:, :, 0], rtol=1e-6)


def test_every_layer_type_read_has_a_kernel() -> None:
    assert set(kernels.KERNELS) == LAYER_TYPES


# Refusals


def refused(action: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(OneVisionError) as caught:
        action()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[Layer, list[np.ndarray], str]] = {
    "types": (layer("ELEMENTWISE", 2, F32, (2,), op="SUM"), [noise(2), noise(2, dtype=F16)], "float32 and float16"),
    "ranks": (layer("ELEMENTWISE", 2, F32, (2,), op="SUM"), [noise(2), noise(1, 2)], "do not fit"),
    "operation": (layer("UNARY", 1, F32, (2,), op="ACOSH"), [noise(2)], "ACOSH"),
    "activation": (layer("ACTIVATION", 1, F32, (2,), op="SELU", alpha=1, beta=1), [noise(2)], "SELU"),
    "shape": (layer("CAST", 1, F32, (3,)), [noise(2)], "has shape (2,) where the network says (3,)"),
    "result type": (layer("IDENTITY", 1, F16, (2,)), [noise(2)], "is float32 where the network says float16"),
    "bounds": (
        layer("SLICE", 1, F32, (2,), start=(1,), shape=(2,), stride=(1,), axes=None),
        [noise(2)],
        "values 1 to 2 of axis 0 leave its 2",
    ),
    "index": (layer("GATHER", 2, F32, (1,), axis=0, mode="DEFAULT", batch=0), [noise(2), ints(-1)], "indices from -1"),
    "zero point": (
        layer("QUANTIZE", 3, np.int8, (2,), axis=0),
        [noise(2), np.array(1, F32), np.array(3, F32)],
        "a zero point that is not zero",
    ),
    "blocks": (layer("DEQUANTIZE", 2, F32, (3, 2), axis=0), [np.ones((3, 2), np.int8), np.ones((2, 2), F32)], "blocks"),
    "NaN": (layer("QUANTIZE", 2, np.int8, (1,), axis=0), [np.array([np.nan], F32), np.array(1, F32)], "NaN"),
    "cache": (
        layer("KV_CACHE_UPDATE", 3, F32, (1, 1, 4, 2)),
        [noise(1, 1, 4, 2), noise(1, 1, 2, 2), ints(3)],
        "rows 3 to 4 leave a cache of 4",
    ),
    "division": (layer("ELEMENTWISE", 2, I64, (1,), op="DIV"), [ints(1), ints(0)], "divided by zero"),
    "product": (
        layer("MATRIX_MULTIPLY", 2, F32, (2, 2), op0="NONE", op1="NONE"),
        [noise(2, 3), noise(2, 2)],
        "shapes (2, 3) and (2, 2)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_the_layers_name(name: str) -> None:
    made, inputs, part = REFUSED[name]
    refused(lambda: run_layer(made, inputs), f"layer l ({made.type})", part)


def test_unknown_layers_are_refused(tmp_path: Path) -> None:
    x = noise(1, 2, 8, 8)
    path = shared.graph(tmp_path / "g.onnx", [node("MaxPool", "x", "y", kernel_shape=[2, 2])], {"x": x}, ["y"])
    refused(lambda: shared.parsed(trt, path), "POOLING", "does not know")


def test_inputs_are_checked(tmp_path: Path) -> None:
    x = noise(2, 3)
    path = shared.graph(tmp_path / "g.onnx", [node("Relu", "x", "y")], {"x": x}, ["y"])
    made = shared.parsed(trt, path)
    run = Interpreter(made.read).run
    refused(lambda: run({}), "inputs [] where the network has ['x']")
    refused(lambda: run({"x": x.astype(F16)}), "input x is float16")
    refused(lambda: run({"x": x[:1]}), "input x has shape (1, 3)")


def test_constants_outlive_the_parser(tmp_path: Path) -> None:
    nodes, inputs, constants = CASES["INT4 blocks fp16"]
    path = shared.graph(tmp_path / "g.onnx", nodes, inputs, ["y"], constants)
    read: Network = shared.parsed(trt, path).read  # the parser and its memory are gone
    first = Interpreter(read).run(inputs)["y"]
    np.testing.assert_array_equal(
        first, (every_int4.astype(F32) * constants["s"].repeat(32, 0)).astype(F16) * inputs["x"]
    )


def test_what_constants_make_is_kept_within_a_budget(tmp_path: Path) -> None:
    nodes, inputs, constants = CASES["INT4 blocks fp16"]
    path = shared.graph(tmp_path / "g.onnx", nodes, inputs, ["y"], constants)
    read = shared.parsed(trt, path).read
    calls: list[str] = []

    def counted(made: Layer, given: Any) -> np.ndarray:
        calls.append(made.name)
        return kernels.dequantize(made, given)

    for budget, times in ((1 << 20, 1), (100, 3)):
        calls.clear()
        interpreter = Interpreter(read, budget, {**kernels.KERNELS, "DEQUANTIZE": counted})
        results = [interpreter.run(inputs)["y"] for _ in range(3)]
        assert len(calls) == times
        np.testing.assert_array_equal(results[0], results[2])


def test_values_are_freed_after_their_last_use(tmp_path: Path) -> None:
    """Forty layers of 1 MB: no more than four are alive at once."""
    x = noise(512, 512)
    names = ["x", *(f"v{i}" for i in range(40))]
    nodes = [node("Relu", a, b) for a, b in pairwise(names)]
    path = shared.graph(tmp_path / "g.onnx", nodes, {"x": x}, [names[-1]])
    interpreter = Interpreter(shared.parsed(trt, path).read)
    tracemalloc.start()
    interpreter.run({"x": x})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * x.nbytes


def test_the_observer_sees_every_layer(tmp_path: Path) -> None:
    nodes, inputs, constants = CASES["INT8 exact float32"]
    path = shared.graph(tmp_path / "g.onnx", nodes, inputs, ["y"], constants)
    read = shared.parsed(trt, path).read
    interpreter = Interpreter(read)
    seen: list[str] = []
    for _ in range(2):
        seen.clear()
        interpreter.run(inputs, lambda made, results: seen.append(made.name))
        assert seen == [made.name for made in read.layers]
