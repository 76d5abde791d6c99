"""Both graphs in a real TensorRT compiler: TensorRT-RTX parses and builds them for SM80, without a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onevision_edge
from onevision_edge.bundle import Bundle

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)

DTYPES = ["fp32", "fp16", "bf16"]
PARTS = ["vision", "decoder"]
MAX_LENGTH = 256
Exported = Callable[[str, str], Path]
Parsed = Callable[[str, str, str], SimpleNamespace]
LOGGER = trt.Logger(trt.Logger.ERROR)


@pytest.fixture(scope="module")
def bundles(golden_checkpoint: Path, tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The golden checkpoint, and one whose heads are as wide as the released model's (64 and 128)."""
    root = tmp_path_factory.mktemp("rtx")
    real_heads = tiny(
        vision_config__hidden_size=128,
        text_config__head_dim=128,
        text_config__num_attention_heads=8,
        text_config__hidden_size=96,
    )
    checkpoints = {"golden": golden_checkpoint, "real heads": real_heads.write(root / "checkpoint")}

    def exported(checkpoint: str, dtype: str) -> Path:
        bundle = root / f"{checkpoint} {dtype}"
        if not bundle.exists():
            onevision_edge.export(checkpoints[checkpoint], bundle, dtype=dtype, max_length=MAX_LENGTH)
        return bundle

    return exported


@pytest.fixture(scope="module")
def parsed(bundles: Exported) -> Iterator[Parsed]:
    """The network of a graph, with what it was made by (TensorRT's objects must outlive it)."""
    kept: dict[tuple[str, str, str], SimpleNamespace] = {}

    def parse(checkpoint: str, part: str, dtype: str) -> SimpleNamespace:
        key = (checkpoint, part, dtype)
        if key not in kept:
            builder = trt.Builder(LOGGER)
            network = builder.create_network(0)
            parser = trt.OnnxParser(network, LOGGER)
            read = parser.parse_from_file(str(bundles(checkpoint, dtype) / f"{part}.onnx"))
            assert read, [parser.get_error(i).desc() for i in range(parser.num_errors)]
            kept[key] = SimpleNamespace(builder=builder, network=network, parser=parser)
        return kept[key]

    yield parse
    kept.clear()


def layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def profile_of(builder: Any, network: Any) -> Any:
    """One profile: batch 1..2, tokens 1..128 (patches 4..1024), any number of valid rows."""
    free = {
        "batch": (1, 1, 2),
        "images": (1, 1, 2),
        "tokens": (1, 1, 128),
        "rows": (1, 1, 128),
        "patches": (4, 64, 1024),
    }
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, (1,), (64,), (MAX_LENGTH,))
        elif -1 in tensor.shape:
            names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
            bounds = [
                [free[n][k] if d == -1 else d for n, d in zip(names, tensor.shape, strict=True)] for k in range(3)
            ]
            profile.set_shape(tensor.name, *bounds)
    return profile


CASES = [(c, p, d) for c in ("golden", "real heads") for p in PARTS for d in DTYPES]


@pytest.mark.parametrize(("checkpoint", "part", "dtype"), CASES)
def test_parses_and_builds_for_sm80(parsed: Parsed, checkpoint: str, part: str, dtype: str) -> None:
    made = parsed(checkpoint, part, dtype)
    config = made.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    config.add_optimization_profile(profile_of(made.builder, made.network))
    engine = made.builder.build_serialized_network(made.network, config)
    assert engine is not None
    assert engine.nbytes > 100_000


@pytest.mark.parametrize(("checkpoint", "part", "dtype"), CASES)
def test_every_input_is_consumed(parsed: Parsed, checkpoint: str, part: str, dtype: str) -> None:
    """The parser drops inputs that it does not know what to do with, and says nothing."""
    network = parsed(checkpoint, part, dtype).network
    inputs = (layer.get_input(i) for layer in layers(network) for i in range(layer.num_inputs))
    used = {tensor.name for tensor in inputs if tensor is not None}
    assert {network.get_input(i).name for i in range(network.num_inputs)} - used == set()


@pytest.mark.parametrize(("checkpoint", "part", "dtype"), CASES)
def test_the_contract_survives_parsing(
    parsed: Parsed, bundles: Exported, checkpoint: str, part: str, dtype: str
) -> None:
    network, spec = parsed(checkpoint, part, dtype).network, Bundle.open(bundles(checkpoint, dtype)).graph(part)
    formats = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16, "int64": trt.int64}
    for declared, get, number in (
        (spec.inputs, network.get_input, network.num_inputs),
        (spec.outputs, network.get_output, network.num_outputs),
    ):
        found = [(t.name, t.dtype, tuple(t.shape)) for t in map(get, range(number))]
        assert found == [
            (t.name, formats[t.dtype], tuple(-1 if isinstance(d, str) else d for d in t.shape)) for t in declared
        ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_is_updated_in_place(parsed: Parsed, dtype: str) -> None:
    """One update for the keys and one for the values of each of the three layers, straight from input to output."""
    network = parsed("golden", "decoder", dtype).network
    updates = [layer for layer in layers(network) if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    pairs = {(layer.get_input(0).name, layer.get_output(0).name) for layer in updates}
    kinds = [f"{kind}.{i}" for kind in ("key", "value") for i in range(3)]
    assert pairs == {(f"past_{kind}", f"present_{kind}") for kind in kinds}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_attention_is_one_operator(parsed: Parsed, part: str, dtype: str) -> None:
    """Three blocks, or layers: each a fused attention, with a mask in the decoder and none in the tower."""
    network = parsed("golden", part, dtype).network
    types = [layer.type for layer in layers(network)]
    assert types.count(trt.LayerType.ATTENTION_INPUT) == types.count(trt.LayerType.ATTENTION_OUTPUT) == 3
    inputs = [layer for layer in layers(network) if layer.type == trt.LayerType.ATTENTION_INPUT]
    for layer in inputs:
        given = [layer.get_input(i) for i in range(layer.num_inputs)]
        masks = [tensor for tensor in given if tensor is not None and tensor.dtype == trt.bool]
        assert len(masks) == (part == "decoder")


def test_float32_has_no_fused_attention(parsed: Parsed) -> None:
    types = [layer.type for layer in layers(parsed("golden", "decoder", "fp32").network)]
    assert trt.LayerType.ATTENTION_INPUT not in types


def test_the_valid_length_sizes_the_attention(parsed: Parsed) -> None:
    """It is a shape tensor: its value, not only its shape, belongs to the profile."""
    network = parsed("golden", "decoder", "fp16").network
    shapes = {t.name for t in (network.get_input(i) for i in range(network.num_inputs)) if t.is_shape_tensor}
    assert shapes == {"valid_length"}
