"""Targets: figures against first principles, precisions against a real compiler, names, refusals."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onevision_edge.engines.devices import CAPABILITIES, DEVICES, SINCE, Device
from onevision_edge.engines.targets import check, recommended, target, targets
from onevision_edge.errors import OneVisionError
from onevision_edge.precision import FLOAT_FORMATS, FP16, FloatFormat
from onevision_edge.precision.codes import FP8, INT8
from onevision_edge.precision.formats import FORMATS, Quantized, quantize
from onevision_edge.precision.plan import NAMES, PRECISIONS, Plan, Rule, default_plan

# Multiprocessors, tensor clock in GHz, memory bus in bits, Gbit a second and pin: what the figures should come from.
HARDWARE = {
    "t4": (40, 1.59, 256, 10),
    "a100-40gb-pcie": (108, 1.41, 5120, 2.43),
    "a100-40gb-sxm": (108, 1.41, 5120, 2.43),
    "a100-80gb-pcie": (108, 1.41, 5120, 3.024),
    "a100-80gb-sxm": (108, 1.41, 5120, 3.186),
    "a30": (56, 1.44, 3072, 2.43),
    "a2": (10, 1.77, 128, 12.5),
    "a10": (72, 1.695, 384, 12.5),
    "a40": (84, 1.74, 384, 14.5),
    "rtx-a6000": (84, 1.8, 384, 16),
    "rtx-3060": (28, 1.777, 192, 15),
    "rtx-3070": (46, 1.725, 256, 14),
    "rtx-3080": (68, 1.71, 320, 19),
    "rtx-3090": (82, 1.695, 384, 19.5),
    "jetson-orin-nano-8gb": (8, 0.625, 128, 4.266),
    "jetson-orin-nano-8gb-super": (8, 1.02, 128, 6.4),
    "jetson-orin-nx-8gb": (8, 0.765, 128, 6.4),
    "jetson-orin-nx-8gb-super": (8, 1.173, 128, 6.4),
    "jetson-orin-nx-16gb": (8, 0.918, 128, 6.4),
    "jetson-orin-nx-16gb-super": (8, 1.173, 128, 6.4),
    "jetson-agx-orin-32gb": (14, 0.93, 256, 6.4),
    "jetson-agx-orin-64gb": (16, 1.3, 256, 6.4),
    "drive-orin": (16, 1.275, 256, 6.4),
    "l4": (58, 2.04, 192, 12.5),
    "l40s": (142, 2.52, 384, 18),
    "rtx-6000-ada": (142, 2.505, 384, 20),
    "rtx-4060": (24, 2.46, 128, 17),
    "rtx-4070": (46, 2.475, 192, 21),
    "rtx-4080": (76, 2.505, 256, 22.4),
    "rtx-4090": (128, 2.52, 384, 21),
    "h100-80gb-pcie": (114, 1.62, 5120, 3.186),
    "h100-80gb-sxm": (132, 1.83, 5120, 5.238),
    "h200": (132, 1.83, 6144, 6.25),
    "gh200-96gb": (132, 1.83, 6144, 5.2),
    "gh200-144gb": (132, 1.83, 6144, 6.4),
    "b200": (148, 1.86, 8192, 7.5),
    "gb200": (148, 2.06, 8192, 7.8),
    "jetson-thor-t4000": (12, 1.53, 256, 8.533),
    "jetson-thor-t5000": (20, 1.575, 256, 8.533),
    "drive-thor": (20, 1.575, 256, 8.533),
    "rtx-5060": (30, 2.497, 128, 28),
    "rtx-5070": (48, 2.512, 192, 28),
    "rtx-5070-ti": (70, 2.452, 256, 28),
    "rtx-5080": (84, 2.617, 256, 30),
    "rtx-5090": (170, 2.407, 512, 28),
    "rtx-pro-6000-blackwell": (188, 2.617, 512, 28),
    "dgx-spark": (48, 2.418, 256, 8.533),
}
# Dense FP16 operations of a multiprocessor in a clock, from the architecture whitepapers; the others are multiples.
PER_CLOCK = {"sm75": 1024, "sm80": 2048, "sm86": 1024, "sm87": 2048, "sm89": 1024, "sm90": 4096}
PER_CLOCK |= {"sm100": 8192, "sm110": 8192, "sm120": 1024, "sm121": 1024}
MULTIPLES = {"fp16": 1, "int8": 2, "fp8": 2, "nvfp4": 4}
# Announced as 1 PFLOP, 1,000 TOPS, 40 TOPS and 2 TB/s: how far round numbers are off.
ROUND = {"dgx-spark": 0.06, "drive-thor": 0.04, "jetson-orin-nano-8gb": 0.025, "h100-80gb-pcie": 0.02}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_figures_come_from_the_hardware(device: Device) -> None:
    multiprocessors, clock, bits, speed = HARDWARE[device.name]
    assert device.bandwidth == pytest.approx(bits / 8 * speed, rel=ROUND.get(device.name, 0.005))
    fp16 = multiprocessors * clock * PER_CLOCK[device.capability] / 1e3
    for name, rate in device.rates.items():
        assert rate == pytest.approx(MULTIPLES[name] * fp16, rel=ROUND.get(device.name, 0.02)), name


def test_rates_are_of_the_precisions_that_are_built() -> None:
    for device in DEVICES:
        built = set(CAPABILITIES[device.capability].precisions) - {"int4"}  # INT4 weights multiply FP16 activations
        assert set(device.rates) == built | {"fp16"}, device.name


def test_the_table_is_whole() -> None:
    listed = targets()
    assert len({t.name for t in listed}) == len(listed) == len(DEVICES) + len(CAPABILITIES) + 1
    assert {t.capability for t in listed if t.bandwidth} == set(CAPABILITIES)
    assert all(t.source and t.reason for t in listed)
    assert len(set(listed)) == len(listed)  # hashable
    assert target("a100-80gb-sxm").memory == 80 * 2**30
    assert target("a100-80gb-sxm").bandwidth == 2.039e12
    assert target("a100-80gb-sxm").rates == {"fp16": 312e12, "int8": 624e12}


def test_a_precision_stays_once_it_came() -> None:
    order = sorted(CAPABILITIES, key=lambda name: int(name[2:]))
    for precision, first in SINCE.items():
        has = [precision in CAPABILITIES[name].precisions for name in order]
        assert has == sorted(has)
        assert order[has.index(True)] == first


# Against the compiler

ACTIVATIONS = {"int8": INT8, "fp8": FP8}
INPUTS, OUTPUTS = 128, 32
COMPILED = ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]  # what TensorRT-RTX 1.7 builds for
# Every quantised precision that can be asked for, and the two formats with one scale for a matrix.
LAYERS = {n: (PRECISIONS[n].format, PRECISIONS[n].activation) for n in NAMES if n in PRECISIONS and n != "float"}
LAYERS |= {"int8-tensor": ("int8-tensor", "int8"), "fp8-tensor": ("fp8-tensor", "fp8")}


def layer(q: Quantized | None, activation: str | None, fmt: FloatFormat) -> onnx.ModelProto:
    """x [rows, in] times a matrix: y [rows, out]."""
    nodes, constants = [], {}
    x, axes = "x", {"axis": 0, "block_size": q.format.block} if q and q.format.block else {"axis": 1}
    if activation:
        codes = ACTIVATIONS[activation]
        constants |= {"x_scale": np.array(0.05, fmt.numpy), "x_zero": np.zeros((), codes.numpy)}
        nodes.append(helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_codes"]))
        nodes.append(helper.make_node("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], ["x_rounded"]))
        x = "x_rounded"
    if q is None:
        constants["w"] = np.ones((INPUTS, OUTPUTS), {"bf16": ml_dtypes.bfloat16}.get(fmt.name, fmt.numpy))
    else:
        constants |= {"codes": q.codes, "scale": q.scale.stored}
        scale = "scale"
        if q.scale.tensor is not None:
            constants["tensor"] = q.scale.tensor
            pair, scale = ["scale", "tensor"], "block_scale"
            nodes.append(helper.make_node("DequantizeLinear", pair, [scale], output_dtype=fmt.onnx_type))
        nodes.append(helper.make_node("DequantizeLinear", ["codes", scale], ["w"], **axes))
    nodes.append(helper.make_node("MatMul", [x, "w"], ["y"]))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, fmt.onnx_type, ["rows", size])]
        for name, size in (("x", INPUTS), ("y", OUTPUTS))
    )
    graph = helper.make_graph(nodes, "layer", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def builds(model: onnx.ModelProto, capability: str) -> bool:
    """Whether TensorRT-RTX makes an engine of it, on a machine without a GPU."""
    trt = pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
    )
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, INPUTS), (4, INPUTS), (64, INPUTS))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("capability", COMPILED)
def test_tensorrt_rtx_builds_what_the_table_says_and_nothing_else(capability: str, name: str) -> None:
    form, activation = LAYERS[name]
    weights = np.random.default_rng(0).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    q = quantize(weights, FORMATS[form or ""], FP16)
    expected = PRECISIONS[name].needs if name in PRECISIONS else activation
    assert builds(layer(q, activation, FP16), capability) == (expected in CAPABILITIES[capability].precisions)


@pytest.mark.parametrize("dtype", FLOAT_FORMATS)
@pytest.mark.parametrize("capability", ["sm75", "sm80", "sm121"])
def test_tensorrt_rtx_computes_in_the_dtypes_of_the_table(capability: str, dtype: str) -> None:
    built = builds(layer(None, None, FLOAT_FORMATS[dtype]), capability)
    assert built == (dtype in CAPABILITIES[capability].dtypes)


def test_every_capability_of_the_compiler_is_in_the_table() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    assert {name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")} <= set(CAPABILITIES)


# Names


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        *((name, "sm80") for name in ("sm80", "SM80", "8.0", "sm_80", "SM-80", "compute_80")),
        *((name, "sm120") for name in ("12.0", "sm120", "sm_120a")),
        ("sm101", "sm110"),
        ("CPU", "cpu"),
        ("Jetson_Orin-NX 16GB", "jetson-orin-nx-16gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),  # as the driver has it
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("gb10", "dgx-spark"),
        ("jetson-t5000", "jetson-thor-t5000"),
        ("jetson-agx-thor", "jetson-thor-t5000"),
        ("drive-agx-orin", "drive-orin"),
        ("jetson orin nano super", "jetson-orin-nano-8gb-super"),
        ("rtx-5070", "rtx-5070"),  # not the Ti
    ],
)
def test_names(asked: str, name: str) -> None:
    assert target(asked).name == name


def test_every_target_answers_to_its_name() -> None:
    for known in targets():
        assert target(known.name) == known
        assert target(known.name.upper().replace("-", "_")) == known


def test_some_words_name_the_least_of_those_that_have_them() -> None:
    a100 = target("a100")
    assert (a100.name, a100.capability, a100.memory, a100.bandwidth) == ("a100", "sm80", 40 * 2**30, 1.555e12)
    assert target("A100 80GB").bandwidth == 1.935e12
    assert target("h100").rates == {"fp16": 756e12, "int8": 1513e12, "fp8": 1513e12}
    orin = target("jetson-orin")
    assert (orin.capability, orin.memory, orin.bandwidth) == ("sm87", 8 * 2**30, 68e9)
    assert target("jetson-agx-orin").memory == 32 * 2**30
    assert "jetson-thor-t4000, jetson-thor-t5000" in target("jetson-thor").source
    for asked in ("a100", "h100", "jetson-orin", "jetson-thor", "jetson-agx-orin", "gh200"):
        for member in targets():
            if set(asked.split("-")) <= set(member.name.split("-")):
                least = target(asked)
                assert (least.memory or 0) <= (member.memory or 0)
                assert all(least.rates[key] <= member.rates[key] for key in member.rates)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("rtx4090", r"unknown target 'rtx4090': did you mean rtx-4090, .*'onevision-edge targets' lists them"),
        ("l40z", r"did you mean .*l40s"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", r"unknown target .* did you mean rtx-4090"),
        ("tpu", r"unknown target 'tpu'.*compute capability runs, of sm75, "),
        ("", r"unknown target ''"),
        ("ti", r"unknown target"),  # a word of rtx-5070-ti, but not its first
        ("sm99", r"unknown compute capability sm99: choose one of sm75, sm80"),
        ("rtx-6000", r"could be rtx-6000-ada \(sm89\), rtx-pro-6000-blackwell \(sm120\): name one"),
        ("jetson", r"jetson could be .*, \.\.\.: name one"),
        *((name, r"\(sm72\) is not a target: .* starts at sm75") for name in ("jetson-agx-xavier", "Jetson Xavier NX")),
        ("jetson-nano", r"jetson-nano \(sm53\) is not a target"),  # and not the Orin Nano
        ("Tesla V100-SXM2-16GB", r"\(sm70\) is not a target"),
        ("7.2", r"^sm72 is not a target"),
    ],
)
def test_other_names_are_refused(asked: str, message: str) -> None:
    with pytest.raises(OneVisionError, match=message):
        target(asked)


# Plans


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_refused_exactly_where_a_precision_is_missing(name: str) -> None:
    need = PRECISIONS[{"int4": "int4-block32"}.get(name, name)].needs
    for known in targets():
        plan = default_plan(name, known.dtype, lm_head="float")
        if need is None or need in known.precisions:
            check(plan, known)
            continue
        with pytest.raises(OneVisionError) as refusal:
            check(plan, known)
        offered = str(refusal.value).rpartition("use --precision ")[2].replace(" or ", ", ").split(", ")
        assert offered == list(known.precisions)
        for other in offered:
            check(default_plan(other, known.dtype), known)


@pytest.mark.parametrize(
    ("plan", "name", "message"),
    [
        (
            default_plan("fp8"),
            "sm80",
            "sm80 (A100, A30) has no FP8 (it came with sm89), which plan fp8 asks for: INT8 and INT4 run there; "
            "use --precision int8 or int4",
        ),
        (
            default_plan("nvfp4", vision="fp8"),
            "a100",
            "a100 (sm80) has no NVFP4 (it came with sm100) and no FP8 (it came with sm89), which plan nvfp4 asks for: "
            "INT8 and INT4 run there; use --precision int8 or int4",
        ),
        (
            default_plan("int4"),
            "t4",
            "t4 (sm75) has no INT4 (it came with sm80), which plan int4 asks for: "
            "INT8 runs there; use --precision int8",
        ),
        (
            default_plan("fp8"),
            "cpu",
            "the cpu target has no FP8 (ONNX Runtime's CPU kernels widen it, which gains nothing), which plan fp8 asks "
            "for: INT8 and INT4 run there; use --precision int8 or int4",
        ),
        (
            default_plan("int8", "bf16"),
            "t4",
            "t4 (sm75) does not compute in BF16 (it came with sm80): use --dtype fp16",
        ),
        (
            default_plan("int8", "bf16"),
            "cpu",
            "the cpu target does not compute in BF16 (ONNX Runtime has no BF16 kernels on the CPU): use --dtype fp32",
        ),
    ],
)
def test_refusals_say_what_would_work(plan: Plan, name: str, message: str) -> None:
    with pytest.raises(OneVisionError) as refusal:
        check(plan, target(name))
    assert str(refusal.value) == message


def test_one_module_and_the_cache_count() -> None:
    mixed = default_plan("int4").with_rules([Rule("decoder", "model.layers.3.mlp.down_proj", "fp8")])
    check(mixed, target("l4"))
    with pytest.raises(OneVisionError, match="has no FP8"):
        check(mixed, target("jetson-agx-orin-64gb"))
    no_int8 = replace(target("t4"), precisions=("int4",))
    check(default_plan("float"), no_int8)
    with pytest.raises(OneVisionError, match="has no INT8"):
        check(default_plan("float", kv_cache="int8"), no_int8)


def test_the_recommended_plan_runs() -> None:
    for known in targets():
        plan = recommended(known)
        check(plan, known)
        assert plan.dtype == known.dtype
        assert plan.precision("vision", "visual.blocks.0.attn.qkv", 1024).name == "float"
        assert plan.precision("decoder", "lm_head", 2560).name == "int8-weight"
        layers = plan.rule("decoder", "model.layers.0.mlp.down_proj")
        assert layers is not None
        assert (layers.precision, layers.reason) == (known.decoder, known.reason)


def test_edge_devices_decode_in_the_fewest_bits_they_have() -> None:
    servers = {"l40s", "h100-80gb-pcie", "h100-80gb-sxm", "h200", "gh200-96gb", "gh200-144gb", "sm90"}
    assert {t.name for t in targets() if t.decoder == "fp8"} == servers
    for known in targets():
        if known.name not in servers:
            fewest = next(p for p in ("nvfp4", "int4", "int8") if p in known.precisions)
            assert known.decoder == fewest, known.name
