"""Quantised bundles in a real TensorRT compiler, without a GPU, and the same graphs in ONNX Runtime.

What the parser makes of a graph is read back layer by layer and held against the plan: what each Linear's weights are
stored in, what its input is rounded to, where the cache keeps its codes.
"""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interpreting as shared
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from safetensors import safe_open

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.engines.network import ParsedNetwork, check_network
from onevision_edge.engines.targets import check, target
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.formats import FORMATS
from onevision_edge.precision.plan import Plan, Precision, default_plan
from onevision_edge.runtime import backend

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)

PARTS = ("vision", "decoder")
MAX_LENGTH = 256
LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)  # what is refused on purpose need not be told
METHODS, PLANS = shared.METHODS, shared.PLANS
PRECISIONS = ("int8", "int8-weight", "int4", "fp8", "nvfp4")
HALF = [(c, p, "fp16") for c in ("demo", "real heads") for p in PRECISIONS]
HALF += [("real heads", p, "fp16") for p in ("float", "mixed")]
OTHERS = [("real heads", p, "fp32") for p in ("int8", "int4", "nvfp4")]
OTHERS += [("real heads", p, "bf16") for p in ("int8-weight", "fp8")]
CASES = [(*case, part) for case in HALF + OTHERS for part in PARTS]
every_case = pytest.mark.parametrize(("checkpoint", "precision", "dtype", "part"), CASES)

Quantized = Callable[[str, str, str], Path]
Parsed = Callable[[str, str, str, str], SimpleNamespace]


@pytest.fixture(scope="module")
def checkpoints(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped one, and a random one with heads as wide as the released model's, in groups of four."""
    real_heads = tiny(
        vision_config__hidden_size=128,
        vision_config__intermediate_size=256,
        text_config__head_dim=128,
        text_config__num_attention_heads=8,
        text_config__num_key_value_heads=2,
        text_config__hidden_size=256,
        text_config__intermediate_size=512,
    )
    demo = Path(onevision_edge.__file__).parent / "demo" / "checkpoint"
    return {"demo": demo, "real heads": real_heads.write(tmp_path_factory.mktemp("checkpoint"))}


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    root = tmp_path_factory.mktemp("quantized")
    np.savez(root / "rows.npz", **shared.token_rows())

    def quantized(checkpoint: str, precision: str, dtype: str) -> Path:
        bundle = root / f"{checkpoint} {precision} {dtype}"
        if not bundle.exists():
            onevision_edge.quantize(
                checkpoints[checkpoint],
                bundle,
                plan=replace(PLANS[precision], dtype=dtype),
                methods=METHODS,
                calibration=None if checkpoint == "demo" else root / "rows.npz",
                calibration_samples=2,
                evaluate=False,
                max_length=MAX_LENGTH,
                threads=1,
            )
        return bundle

    return quantized


@pytest.fixture(scope="module")
def parsed(bundles: Quantized) -> Iterator[Parsed]:
    """The network of a graph, with what it was made by (TensorRT's objects must outlive it)."""
    kept: dict[tuple[str, str, str, str], SimpleNamespace] = {}

    def parse(*case: str) -> SimpleNamespace:
        if case not in kept:
            kept[case] = read(bundles(*case[:3]) / f"{case[3]}.onnx")
        return kept[case]

    yield parse
    kept.clear()


def read(path: Path) -> SimpleNamespace:
    """A parsed network, its layers as what they are, and which of them makes each tensor."""
    builder = trt.Builder(LOGGER)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, LOGGER)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        layer.__class__ = CLASSES.get(layer.type, trt.ILayer)
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    return SimpleNamespace(builder=builder, network=network, parser=parser, layers=layers, makers=makers)


KINDS = trt.LayerType
CLASSES = {
    KINDS.CONSTANT: trt.IConstantLayer,
    KINDS.DEQUANTIZE: trt.IDequantizeLayer,
    KINDS.QUANTIZE: trt.IQuantizeLayer,
    KINDS.SCATTER: trt.IScatterLayer,
}


def inputs(layer: Any) -> list[Any]:
    return [tensor for tensor in (layer.get_input(i) for i in range(layer.num_inputs)) if tensor is not None]


def origin(made: SimpleNamespace, tensor: Any, *passed: Any) -> Any:
    """The layer that a tensor comes from, reshaping and `passed` apart; None for an input of the network."""
    layer = made.makers.get(tensor.name)
    while layer is not None and layer.type in (KINDS.SHUFFLE, *passed):
        layer = made.makers.get(layer.get_input(0).name)
    return layer


def of_kind(made: SimpleNamespace, kind: Any) -> list[Any]:
    return [layer for layer in made.layers if layer.type == kind]


# Parsing


@every_case
def test_every_input_is_consumed(parsed: Parsed, checkpoint: str, precision: str, dtype: str, part: str) -> None:
    """The parser takes the graph, and drops no input of it."""
    made = parsed(checkpoint, precision, dtype, part)
    used = {tensor.name for layer in made.layers for tensor in inputs(layer)}
    assert {made.network.get_input(i).name for i in range(made.network.num_inputs)} - used == set()


FLOATS = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}
TYPES = {**FLOATS, "int64": trt.int64, "int8": trt.int8}
ONNX_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@every_case
def test_the_contract_survives_parsing(
    parsed: Parsed, bundles: Quantized, checkpoint: str, precision: str, dtype: str, part: str
) -> None:
    network = parsed(checkpoint, precision, dtype, part).network
    spec = Bundle.open(bundles(checkpoint, precision, dtype)).graph(part)
    for declared, get, number in (
        (spec.inputs, network.get_input, network.num_inputs),
        (spec.outputs, network.get_output, network.num_outputs),
    ):
        found = [(t.name, t.dtype, tuple(t.shape)) for t in map(get, range(number))]
        assert found == [
            (t.name, TYPES[t.dtype], tuple(-1 if isinstance(d, str) else d for d in t.shape)) for t in declared
        ]
    caches = {t.dtype for t in (*spec.inputs, *spec.outputs) if t.name.startswith(("past", "present"))}
    wanted = "int8" if PLANS[precision].kv_cache == "int8" else ONNX_NAMES[dtype]
    assert caches == ({wanted} if part == "decoder" else set())


# Products


@dataclass(frozen=True)
class Product:
    """What a Linear is in a network: types of its weights and of their scale, rows to a scale, codes of its input."""

    weights: Any
    scale: Any = None
    block: int = 0
    two_level: bool = False
    activation: Any = None


CODES = {"int8": trt.int8, "int4": trt.int4, "fp8": trt.fp8, "fp4": trt.fp4}


def linears(made: SimpleNamespace) -> dict[str, tuple[Any, Any]]:
    """The products with constants, by the checkpoint's name: where the input comes from, and the matrix."""
    found = {}
    for layer in of_kind(made, KINDS.MATRIX_MULTIPLY):
        x, matrix = (origin(made, tensor) for tensor in inputs(layer))
        constant = matrix
        if matrix is not None and matrix.type == KINDS.DEQUANTIZE:
            constant = origin(made, matrix.get_input(0))
        if constant is not None and constant.type == KINDS.CONSTANT:
            name = constant.get_output(0).name.removesuffix("_output")
            assert name.endswith(".weight")
            assert name not in found
            found[name.removesuffix(".weight")] = (x, matrix)
    return found


def product(made: SimpleNamespace, x: Any, matrix: Any) -> Product:
    activation = rounding(made, x)
    codes = None if activation is None else activation.dtype
    if matrix.type == KINDS.CONSTANT:
        return Product(matrix.get_output(0).dtype, activation=codes)
    weights, scale = inputs(matrix)  # and no zero point
    rows, outputs = weights.shape
    block = 0 if tuple(scale.shape) == (outputs,) else rows // scale.shape[0]
    assert tuple(scale.shape) == ((rows // block, outputs) if block else (outputs,))
    assert matrix.axis == (0 if block else 1)
    scales = origin(made, scale)
    if scales.type == KINDS.DEQUANTIZE:
        stored, tensor = inputs(scales)
        assert (stored.dtype, tensor.dtype, tuple(tensor.shape)) == (trt.fp8, trt.float32, ())
        assert origin(made, stored).type == origin(made, tensor).type == KINDS.CONSTANT
        return Product(weights.dtype, scale.dtype, block, True, codes)
    assert scales.type == KINDS.CONSTANT
    return Product(weights.dtype, scale.dtype, block, False, codes)


def rounding(made: SimpleNamespace, x: Any) -> Any:
    """The codes that an input is rounded to under one scale, a tensor; None for one that is not rounded."""
    if x is None or x.type != KINDS.DEQUANTIZE or origin(made, x.get_input(0)).type != KINDS.QUANTIZE:
        return None
    quantize = origin(made, x.get_input(0))
    for layer in (quantize, x):
        scale, *zero_points = inputs(layer)[1:]
        assert tuple(scale.shape) == ()
        assert scale.name == inputs(x)[1].name
        assert origin(made, scale).type == KINDS.CONSTANT
        assert [float(np.asarray(origin(made, zero).weights)[0]) for zero in zero_points] == [0.0] * len(zero_points)
    return quantize.get_output(0)


def expected(precision: Precision, fmt: Any) -> Product:
    activation = CODES[precision.activation] if precision.activation else None
    if precision.format is None:
        return Product(fmt, activation=activation)
    form = FORMATS[precision.format]
    return Product(CODES[form.codes.name], fmt, form.block, form.two_level, activation)


def modules(checkpoint: Path, part: str) -> dict[str, int]:
    """The Linears of a graph, by the checkpoint's tensors, and how many inputs each has."""
    prefix = "visual." if part == "vision" else ("model.layers.", "lm_head.")
    with safe_open(checkpoint / "model.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    matrices = {n: s for n, s in shapes.items() if n.startswith(prefix) and n.endswith(".weight") and len(s) > 1}
    return {name.removesuffix(".weight"): int(np.prod(shape[1:])) for name, shape in matrices.items()}


@every_case
def test_products_are_what_the_plan_says(
    parsed: Parsed, checkpoints: dict[str, Path], checkpoint: str, precision: str, dtype: str, part: str
) -> None:
    made, plan = parsed(checkpoint, precision, dtype, part), PLANS[precision]
    found = {path: product(made, *pair) for path, pair in linears(made).items()}
    fmt = FLOATS[ONNX_NAMES[dtype]]
    sizes = modules(checkpoints[checkpoint], part)
    assert found == {path: expected(plan.precision(part, path, size), fmt) for path, size in sizes.items()}


@every_case
def test_what_several_products_read_is_rounded_under_one_scale(
    parsed: Parsed, checkpoint: str, precision: str, dtype: str, part: str
) -> None:
    """Of q, k and v, and of gate and up. FP8 codes are made once for all of them, INT8 ones for each."""
    made = parsed(checkpoint, precision, dtype, part)
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    roundings, used = set(), {}
    scales = matrices = 0
    for path, (x, matrix) in linears(made).items():
        *parents, name = path.split(".")
        if (codes := rounding(made, x)) is not None:
            feed = ".".join([*parents, shared.get(name, name)])
            roundings.add((path if codes.dtype == trt.int8 else feed, str(codes.dtype)))
            scale = inputs(x)[1].name
            assert used.setdefault((feed, str(codes.dtype)), scale) == scale
        matrices += matrix.type == KINDS.DEQUANTIZE
        scales += product(made, x, matrix).two_level
    cached = sum(t.dtype == trt.int8 for t in map(made.network.get_input, range(made.network.num_inputs)))
    assert len(of_kind(made, KINDS.QUANTIZE)) == len(roundings) + cached
    assert len(of_kind(made, KINDS.DEQUANTIZE)) == len(roundings) + cached + matrices + scales


BITS = {trt.int8: 8, trt.int4: 4, trt.fp8: 8, trt.fp4: 4}


@every_case
def test_the_parser_widens_no_weight(
    parsed: Parsed, bundles: Quantized, checkpoint: str, precision: str, dtype: str, part: str
) -> None:
    """Constants take the bytes that the manifest says the codes take."""
    made = parsed(checkpoint, precision, dtype, part)
    names = {"int8": trt.int8, "int4": trt.int4, "fp8": trt.fp8, "nvfp4": trt.fp4}
    stored: dict[Any, int] = dict.fromkeys(BITS, 0)
    for layer in of_kind(made, KINDS.CONSTANT):
        tensor = layer.get_output(0)
        if tensor.dtype in BITS and tensor.name.endswith(".weight_output"):
            stored[tensor.dtype] += int(np.prod(tensor.shape)) * BITS[tensor.dtype] // 8
    declared = Bundle.open(bundles(checkpoint, precision, dtype)).graph(part).weights
    assert stored == {kind: declared.get(name, 0) for name, kind in names.items()}


@every_case
def test_the_checks_before_a_build_pass(
    parsed: Parsed, bundles: Quantized, checkpoint: str, precision: str, dtype: str, part: str
) -> None:
    """What the build command asks of a network, by its own reading of it and the manifest alone."""
    bundle = bundles(checkpoint, precision, dtype)
    opened, network = Bundle.open(bundle), parsed(checkpoint, precision, dtype, part).network
    plan = recorded_plan(bundle)
    check_network(ParsedNetwork(trt, network), part, opened.graph(part), opened.manifest.model, plan)
    other = "int8" if precision == "fp8" else "fp8"
    wrong = default_plan(other, vision=other)
    with pytest.raises(OneVisionError, match=r"in the network; the plan says"):
        check_network(ParsedNetwork(trt, network), part, opened.graph(part), opened.manifest.model, wrong)


# Cache and attention


def layer_count(checkpoint: str) -> int:
    return 4 if checkpoint == "demo" else 2


DECODERS = [case[:3] for case in CASES if case[3] == "decoder"]
in_decoders = pytest.mark.parametrize(("checkpoint", "precision", "dtype"), DECODERS)


@in_decoders
def test_the_cache_holds_what_the_plan_says(parsed: Parsed, checkpoint: str, precision: str, dtype: str) -> None:
    """From past to present by one layer that writes rows: of floats, or of codes made by a QUANTIZE before it."""
    made, codes = parsed(checkpoint, precision, dtype, "decoder"), PLANS[precision].kv_cache == "int8"
    writes = of_kind(made, KINDS.SCATTER if codes else KINDS.KV_CACHE_UPDATE)
    pairs = {(layer.get_input(0).name, layer.get_output(0).name) for layer in writes}
    kinds = [f"{kind}.{i}" for kind in ("key", "value") for i in range(layer_count(checkpoint))]
    assert pairs == {(f"past_{kind}", f"present_{kind}") for kind in kinds}
    assert len(of_kind(made, KINDS.SCATTER)) + len(of_kind(made, KINDS.KV_CACHE_UPDATE)) == len(writes)
    for layer in writes if codes else ():
        assert layer.mode == trt.ScatterMode.ND
        new = origin(made, layer.get_input(2))
        assert (new.type, new.get_output(0).dtype) == (KINDS.QUANTIZE, trt.int8)


@in_decoders
def test_attention_reads_codes_of_the_valid_rows(parsed: Parsed, checkpoint: str, precision: str, dtype: str) -> None:
    """Of an INT8 cache: sliced as codes, then given back their scale, the one they were made with."""
    made = parsed(checkpoint, precision, dtype, "decoder")
    for write in of_kind(made, KINDS.SCATTER):
        present = write.get_output(0).name
        (valid,) = (layer for layer in made.layers if present in {t.name for t in inputs(layer)})
        assert (valid.type, valid.get_output(0).dtype) == (KINDS.SLICE, trt.int8)
        (back,) = (layer for layer in made.layers if valid.get_output(0).name in {t.name for t in inputs(layer)})
        assert back.type == KINDS.DEQUANTIZE
        new = origin(made, write.get_input(2))
        scale, wanted = (inputs(layer)[1] for layer in (back, new))
        assert scale.name == wanted.name
        assert tuple(scale.shape) == ()
        kind, i = present.removeprefix("present_").split(".")
        assert scale.name == f"model.layers.{i}.self_attn.{kind[0]}_scale_output"


@pytest.mark.parametrize(("checkpoint", "precision", "dtype", "part"), [case for case in CASES if case[2] != "fp32"])
def test_attention_is_one_operator(parsed: Parsed, checkpoint: str, precision: str, dtype: str, part: str) -> None:
    made = parsed(checkpoint, precision, dtype, part)
    starts, ends = of_kind(made, KINDS.ATTENTION_INPUT), of_kind(made, KINDS.ATTENTION_OUTPUT)
    assert len(starts) == len(ends) == layer_count(checkpoint)
    for layer in starts:
        assert sum(tensor.dtype == trt.bool for tensor in inputs(layer)) == (part == "decoder")
        if part == "decoder":  # keys are scaled on the way
            sources = [origin(made, tensor, KINDS.ELEMENTWISE).type for tensor in inputs(layer)[1:3]]
            assert sources == [KINDS.DEQUANTIZE if PLANS[precision].kv_cache == "int8" else KINDS.SLICE] * 2


# Engines


def profile_of(made: SimpleNamespace) -> Any:
    """One profile: batch 1..2, tokens 1..128 (patches 4..1024), any number of valid rows."""
    free = {
        "batch": (1, 1, 2),
        "images": (1, 1, 2),
        "tokens": (1, 1, 128),
        "rows": (1, 1, 128),
        "patches": (4, 64, 1024),
    }
    profile = made.builder.create_optimization_profile()
    for tensor in map(made.network.get_input, range(made.network.num_inputs)):
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, (1,), (64,), (MAX_LENGTH,))
        elif -1 in tensor.shape:
            names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
            bounds = [
                [free[n][k] if d == -1 else d for n, d in zip(names, tensor.shape, strict=True)] for k in range(3)
            ]
            profile.set_shape(tensor.name, *bounds)
    return profile


def build(made: SimpleNamespace, capability: str) -> int | None:
    """Bytes of the engine for a compute capability, or None where there is none."""
    config = made.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), 0)
    config.add_optimization_profile(profile_of(made))
    engine = made.builder.build_serialized_network(made.network, config)
    return None if engine is None else int(engine.nbytes)


def recorded_plan(bundle: Path) -> Plan:
    """The plan as a bundle's manifest has it."""
    record = Bundle.open(bundle).manifest.quantization
    assert record is not None
    return Plan.from_dict(record["plan"])


# The first compute capability that has all of a plan, and some that have it, too.
BUILT = {
    "int8": ("sm80", "sm75", "sm86", "sm89", "sm120"),
    "int8-weight": ("sm80", "sm75", "sm120"),
    "int4": ("sm80", "sm86", "sm89", "sm120"),
    "fp8": ("sm89", "sm120"),
    "nvfp4": ("sm120", "sm121"),
    "float": ("sm80", "sm120"),
    "mixed": ("sm120",),
}
BUILDS = [("demo", p, "fp16", part, BUILT[p][0]) for p in PRECISIONS for part in PARTS]
BUILDS += [("real heads", p, "fp16", "decoder", capability) for p, found in BUILT.items() for capability in found]
BUILDS += [("real heads", p, "fp16", "vision", found[0]) for p, found in BUILT.items()]
BUILDS += [(*case, "decoder", BUILT[case[1]][0]) for case in OTHERS]


@pytest.mark.parametrize(("checkpoint", "precision", "dtype", "part", "capability"), BUILDS)
def test_engines_are_built(
    parsed: Parsed, bundles: Quantized, checkpoint: str, precision: str, dtype: str, part: str, capability: str
) -> None:
    check(recorded_plan(bundles(checkpoint, precision, dtype)), target(capability))
    size = build(parsed(checkpoint, precision, dtype, part), capability)
    assert size is not None
    weights = Bundle.open(bundles(checkpoint, precision, dtype)).graph(part).weights
    assert size > sum(weights.values())


# What a compute capability lacks, and what the refusal offers instead.
REFUSED = {
    ("int4", "sm75"): ("no INT4", "INT8 runs there; use --precision int8"),
    ("fp8", "sm80"): ("no FP8", "INT8 and INT4 run there; use --precision int8 or int4"),
    ("fp8", "sm86"): ("no FP8", "INT8 and INT4 run there; use --precision int8 or int4"),
    ("nvfp4", "sm80"): ("no NVFP4", "INT8 and INT4 run there; use --precision int8 or int4"),
    ("nvfp4", "sm86"): ("no NVFP4", "INT8 and INT4 run there; use --precision int8 or int4"),
    ("nvfp4", "sm89"): ("no NVFP4", "INT8, INT4 and FP8 run there; use --precision int8, int4 or fp8"),
    ("mixed", "sm80"): ("no FP8 (it came with sm89) and no NVFP4", "INT8 and INT4 run there"),
    ("mixed", "sm89"): ("no NVFP4", "INT8, INT4 and FP8 run there"),
}


@pytest.mark.parametrize(("precision", "capability"), REFUSED)
def test_what_a_target_lacks_is_refused_before_the_build_and_would_fail(
    parsed: Parsed, bundles: Quantized, precision: str, capability: str
) -> None:
    plan = recorded_plan(bundles("real heads", precision, "fp16"))
    with pytest.raises(OneVisionError) as refusal:
        check(plan, target(capability))
    for part in REFUSED[precision, capability]:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert build(parsed("real heads", precision, "fp16", "decoder"), capability) is None


def test_engines_shrink_as_their_weights_do(parsed: Parsed, bundles: Quantized) -> None:
    """Engines of weight-only precisions differ by the weights' bytes alone, so those are stored as the codes they are.

    Of a decoder of 122 million weights, whose kernels no longer count, engines take 1.05 to 1.09 times the weights in
    every precision.
    """
    sizes, weights = [], []
    for precision in ("float", "int4"):
        assert PLANS[precision].kv_cache == "int8"
        sizes.append(build(parsed("real heads", precision, "fp16", "decoder"), "sm80"))
        spec = Bundle.open(bundles("real heads", precision, "fp16")).graph("decoder")
        weights.append(sum(spec.weights.values()))
    assert sizes[0] - sizes[1] == pytest.approx(weights[0] - weights[1], rel=0.1)


# ONNX


def graph_files(bundle: Path) -> list[Path]:
    """Every graph of a bundle, those for engines without FP4 among them."""
    graphs = Bundle.open(bundle).manifest.graphs.values()
    return [bundle / name for g in graphs for name in (g.file, g.wide.file if g.wide else None) if name]


in_bundles = pytest.mark.parametrize(("checkpoint", "precision", "dtype"), HALF + OTHERS)


@in_bundles
def test_graphs_are_standard_onnx(bundles: Quantized, checkpoint: str, precision: str, dtype: str) -> None:
    """The checker finds nothing; opset 24 alone; every value has a type and a shape."""
    for file in graph_files(bundles(checkpoint, precision, dtype)):
        onnx.checker.check_model(file, full_check=True)
        model = onnx.load(file, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        described = {v.name: v.type.tensor_type for v in (*model.graph.value_info, *model.graph.output)}
        for node in model.graph.node:
            assert onnx.defs.has(node.op_type, max_inclusive_version=24)
            for name in node.output:
                assert described[name].elem_type != onnx.TensorProto.UNDEFINED
                assert described[name].HasField("shape"), node.name
                assert all(d.HasField("dim_value") or d.dim_param for d in described[name].shape.dim), node.name


# ONNX Runtime

PLACEHOLDERS = {"demo": 447, "real heads": 60}
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module")
def exact_logits(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Of `token_rows`, in full precision."""
    found = {}
    for name, checkpoint in checkpoints.items():
        bundle = tmp_path_factory.mktemp("exact") / "bundle"
        onevision_edge.export(checkpoint, bundle, dtype="fp32", max_length=MAX_LENGTH)
        found[name] = onevision_edge.load(bundle, threads=1).logits(**shared.token_rows(PLACEHOLDERS[name]))
    return found


@pytest.mark.parametrize(("checkpoint", "precision", "dtype"), [c for c in HALF + OTHERS if c[2] != "bf16"])
def test_onnx_runtime_runs_it(
    bundles: Quantized, exact_logits: dict[str, np.ndarray], checkpoint: str, precision: str, dtype: str
) -> None:
    """Both graphs, on ids and pixels at random: as far from full precision as rounding takes it, and no farther."""
    model = onevision_edge.load(bundles(checkpoint, precision, dtype), threads=1)
    logits, exact = model.logits(**shared.token_rows(PLACEHOLDERS[checkpoint])), exact_logits[checkpoint]
    assert logits.shape == exact.shape
    distance = np.sqrt(np.square(logits - exact).mean() / np.square(exact).mean())
    assert 1e-3 < distance < 0.3  # 0.01 to 0.2 measured; of unrelated logits it would be 1.4


def fused(model: onnx.ModelProto, folder: Path) -> set[str]:
    """The Linears that ONNX Runtime multiplies in integers."""
    onnx.save(model, folder / "graph.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4  # it warns that an optimised graph is for this machine
    providers = ["CPUExecutionProvider"]
    ort.InferenceSession(folder / "graph.onnx", options, providers, disabled_optimizers=backend.DISABLED_OPTIMIZERS)
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    names = [node.name.rpartition("/")[0] for node in nodes if node.op_type == "MatMulIntegerToFloat"]
    assert len(set(names)) == len(names)
    return {name.replace("/", ".") for name in names}


def int8_linears(checkpoints: dict[str, Path], part: str) -> set[str]:
    """Those whose activations the plan rounds to INT8."""
    sizes = modules(checkpoints["real heads"], part)
    return {path for path, size in sizes.items() if PLANS["int8"].precision(part, path, size).activation == "int8"}


@pytest.mark.parametrize("part", PARTS)
def test_int8_products_run_in_integers(
    bundles: Quantized, checkpoints: dict[str, Path], tmp_path: Path, part: str
) -> None:
    """Because activations have a zero point: without, none of them does on x86."""
    model = onnx.load(bundles("real heads", "int8", "fp32") / f"{part}.onnx")
    assert fused(model, tmp_path) == int8_linears(checkpoints, part)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) == 3:
            del node.input[2]
            if node.op_type == "QuantizeLinear":
                node.attribute.append(helper.make_attribute("output_dtype", onnx.TensorProto.INT8))
    onnx.checker.check_model(model, full_check=True)
    if X86:
        assert fused(model, tmp_path) == set()
