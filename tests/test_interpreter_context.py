"""The interpreter behind the interface of a TensorRT engine, with host memory in the place of the device's."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import interpreting as shared
import numpy as np
import pytest

import onevision_edge
from onevision_edge.engines.interpreter.context import Engine, ExecutionContext
from onevision_edge.engines.interpreter.interpreter import Interpreter
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import default_plan

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)


MAX_LENGTH, STREAM = 32, 0


@pytest.fixture(scope="module")
def networks(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Networks of one random checkpoint: networks(part, dtype), or with codes in the cache."""
    root = tmp_path_factory.mktemp("context")
    checkpoint = tiny().write(root / "c")
    kept: dict[tuple[str, str], Any] = {}

    def network(part: str, dtype: str) -> Any:
        bundle = root / dtype
        if dtype == "codes" and not bundle.exists():
            plan = default_plan("float", kv_cache="int8")
            np.savez(root / "rows.npz", **shared.token_rows())
            options = {
                "methods": shared.METHODS,
                "calibration": root / "rows.npz",
                "calibration_samples": 2,
                "threads": 1,
            }
            onevision_edge.quantize(checkpoint, bundle, plan=plan, evaluate=False, max_length=MAX_LENGTH, **options)
        elif not bundle.exists():
            onevision_edge.export(checkpoint, bundle, dtype=dtype, max_length=MAX_LENGTH)
        if (part, dtype) not in kept:
            kept[part, dtype] = shared.parsed(trt, bundle / f"{part}.onnx").read
        return kept[part, dtype]

    return network


def bound(context: ExecutionContext, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bind inputs, ask for the outputs' shapes, make and bind those: caches to the memory of their inputs."""
    engine = context.engine
    for name, array in inputs.items():
        assert context.set_input_shape(name, array.shape)
        assert context.set_tensor_address(name, array.ctypes.data)
    assert context.infer_shapes() == []
    outputs = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            past = name.replace("present_", "past_")
            shape, dtype = context.get_tensor_shape(name), engine.tensor(name).dtype
            outputs[name] = inputs[past] if past in inputs else np.full(shape, -7).astype(dtype)
            assert outputs[name].shape == shape
            context.set_tensor_address(name, outputs[name].ctypes.data)
    return outputs


def step(network: Any, tokens: int, starts: tuple[int, int], caches: dict[str, np.ndarray] | None = None) -> Any:
    embeds = np.random.default_rng(tokens).standard_normal((2, tokens, 24))
    given = shared.empty_caches(network, 2) if caches is None else caches
    return shared.decoder_inputs(network, given, embeds, starts)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "codes"])
def test_prefill_and_steps_through_addresses(networks: Callable[..., Any], dtype: str) -> None:
    network = networks("decoder", dtype)
    context = Engine(trt, network).create_execution_context()
    caches, plain_caches = shared.empty_caches(network, 2), shared.empty_caches(network, 2)
    plain = Interpreter(network)
    for tokens, starts in ((5, (0, 2)), (1, (5, 7)), (3, (6, 8))):
        wanted = plain.run(step(network, tokens, starts, plain_caches))
        shared.advance(plain_caches, wanted)
        inputs = step(network, tokens, starts, caches)
        outputs = bound(context, inputs)
        assert context.execute_async_v3(STREAM) is True
        for name, array in wanted.items():
            np.testing.assert_array_equal(outputs[name].view(np.uint8), array.view(np.uint8))
    assert all(array.any() for array in caches.values())


def test_images_through_addresses(networks: Callable[..., Any]) -> None:
    network = networks("vision", "fp16")
    context = Engine(trt, network).create_execution_context()
    for side, images in ((4, 2), (6, 1)):
        inputs = shared.vision_inputs(network, side, images)
        outputs = bound(context, inputs)
        assert outputs["image_embeds"].shape == (images, side * side // 4, 24)
        context.execute_async_v3(STREAM)
        np.testing.assert_array_equal(outputs["image_embeds"], Interpreter(network).run(inputs)["image_embeds"])


def test_the_engine_describes_its_tensors(networks: Callable[..., Any]) -> None:
    network = networks("decoder", "fp16")
    low, best, high = (1, 1, 24), (1, 1, 24), (2, 8, 24)
    engine = Engine(trt, network, [{"inputs_embeds": (low, best, high), "valid_length": ((1,), (8,), (MAX_LENGTH,))}])
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert names == [t.name for t in (*network.inputs, *network.outputs)]
    assert engine.get_tensor_dtype("past_key.0") == trt.DataType.HALF
    assert engine.get_tensor_dtype("logits") == trt.DataType.FLOAT
    assert engine.get_tensor_mode("logits") == trt.TensorIOMode.OUTPUT
    assert engine.get_tensor_shape("inputs_embeds") == (-1, -1, 24)
    assert engine.get_tensor_profile_shape("inputs_embeds", 0) == [low, best, high]
    assert engine.get_tensor_profile_values(0, "valid_length") == [(1,), (8,), (MAX_LENGTH,)]
    assert engine.is_shape_inference_io("valid_length")
    assert not engine.is_shape_inference_io("position_ids")
    assert engine.get_aliased_input_tensor("present_value.1") == "past_value.1"
    assert engine.get_aliased_input_tensor("logits") == ""
    assert engine.num_optimization_profiles == 1
    assert engine.device_memory_size_v2 == 0


def test_a_cache_of_codes_is_no_alias(networks: Callable[..., Any]) -> None:
    """SCATTER has an output of its own; bound to its input's address it overwrites it when all is done."""
    assert Engine(trt, networks("decoder", "codes")).get_aliased_input_tensor("present_key.0") == ""


def test_what_is_missing_is_told(networks: Callable[..., Any]) -> None:
    network = networks("decoder", "fp16")
    context = Engine(trt, network).create_execution_context()
    inputs = step(network, 2, (0, 0))
    assert set(context.infer_shapes()) == set(inputs)
    assert not context.all_binding_shapes_specified
    assert context.get_tensor_shape("logits") == (-1, -1, 64)
    for name, array in inputs.items():
        context.set_input_shape(name, array.shape)
    assert context.all_binding_shapes_specified
    assert context.infer_shapes() == ["valid_length"]  # its value is wanted, too
    context.set_tensor_address("valid_length", inputs["valid_length"].ctypes.data)
    assert context.infer_shapes() == []
    assert context.get_tensor_shape("logits") == (2, 2, 64)
    assert context.get_tensor_address("logits") == 0
    with pytest.raises(OneVisionError, match="no shape or no address was given for inputs_embeds, "):
        context.execute_async_v3(STREAM)


def refusal(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(OneVisionError) as caught:
        action(*arguments)
    return str(caught.value)


def test_misuse_is_refused(networks: Callable[..., Any]) -> None:
    network = networks("decoder", "fp16")
    profile = {"inputs_embeds": ((1, 1, 24), (1, 1, 24), (2, 4, 24)), "valid_length": ((1,), (8,), (16,))}
    context = Engine(trt, network, [profile]).create_execution_context()
    assert "no input or output nothing" in refusal(context.set_input_shape, "nothing", (1,))
    assert "cannot take shape (2, 3, 25)" in refusal(context.set_input_shape, "inputs_embeds", (2, 3, 25))
    assert "outside profile 0" in refusal(context.set_input_shape, "inputs_embeds", (2, 5, 24))
    assert "profile 1 of 1" in refusal(context.set_optimization_profile_async, 1, STREAM)
    assert context.set_optimization_profile_async(0, STREAM)
    inputs = step(network, 3, (14, 14))
    bound(context, inputs)
    assert "valid_length: (17,) is outside profile 0" in refusal(context.execute_async_v3, STREAM)
    inputs = step(network, 3, (2, 2))
    bound(context, inputs)
    other = np.empty_like(inputs["past_key.0"])
    context.set_tensor_address("present_key.0", other.ctypes.data)
    assert "present_key.0 is updated in place" in refusal(context.execute_async_v3, STREAM)


def test_shapes_cost_no_memory(networks: Callable[..., Any]) -> None:
    """A batch whose activations would take terabytes has its shapes told at once."""
    network = networks("decoder", "fp32")
    context = Engine(trt, network).create_execution_context()
    batch, tokens = 1 << 12, 32
    sizes = {"inputs_embeds": (batch, tokens, 24), "position_ids": (batch, tokens), "write_indices": (batch,)}
    sizes |= {"logits_indices": (batch, tokens), "valid_length": (1,)}
    sizes |= {t.name: (batch, *t.shape[1:]) for t in network.inputs if t.name.startswith("past_")}
    length = np.array([32])
    for name, shape in sizes.items():
        context.set_input_shape(name, shape)
    context.set_tensor_address("valid_length", length.ctypes.data)
    tracemalloc.start()
    assert context.get_tensor_shape("logits") == (batch, tokens, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6  # the masks, which are computed; logits alone would take 33 MB, a layer's activations more


def test_addresses_are_read_when_it_runs(networks: Callable[..., Any]) -> None:
    """What changes in a bound buffer between two runs is seen, with nothing bound again."""
    network = networks("vision", "fp32")
    context = Engine(trt, network).create_execution_context()
    inputs = shared.vision_inputs(network)
    outputs = bound(context, inputs)
    context.execute_async_v3(STREAM)
    first = outputs["image_embeds"].copy()
    inputs["pixel_values"] *= np.float32(-1)
    context.execute_async_v3(STREAM)
    assert np.abs(outputs["image_embeds"] - first).max() > 0.01
