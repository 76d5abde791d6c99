"""Estimates before a build: held against measured builds, and refusals with numbers where something cannot fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onevision_edge.bundle import Bundle, GraphSpec, Manifest, TensorSpec
from onevision_edge.config import ModelConfig, TextConfig, VisionConfig
from onevision_edge.engines.estimate import check_fits, device_memory, engine_bytes, estimate, macs_of
from onevision_edge.engines.linears import linears
from onevision_edge.engines.profiles import profiles
from onevision_edge.engines.targets import target
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import default_plan

VISION = VisionConfig(24, 1024, 16, 4096, 3, 14, 2, 1e-5, "gelu", 2560)
SMALL = TextConfig(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, False, 32768)  # Qwen3-0.6B
RELEASED = TextConfig(151936, 2560, 9728, 36, 32, 8, 128, 1e-6, 5e6, False, 32768)  # the 4B model


def manifest_of(text: TextConfig, weights: dict[str, float], **plan: str) -> Manifest:
    """A manifest of a model of this shape; weights in GB by what they are stored in."""
    kv = [TensorSpec("past_key.0", "float16", ("batch", text.num_key_value_heads, 4096, text.head_dim))]
    stored = {name: int(1e9 * size) for name, size in weights.items()}
    decoder = GraphSpec("decoder.onnx", "fp16", tuple(kv), (), stored)
    vision = GraphSpec("vision.onnx", "fp16", (), (), {"fp16": 630_000_000})
    config = ModelConfig(replace(VISION, text_hidden_size=text.hidden_size), text, 1, 2, (3,), 4)
    quantization = {"plan": default_plan(**plan).to_dict()} if plan else None  # type: ignore[arg-type]
    return Manifest(config, {"vision": vision, "decoder": decoder}, None, 4096, {}, quantization)


# Measured on two cores by TensorRT-RTX 1.7: shape, weights in GB, profiles, engine in GB, peak memory in GB.
MEASURED = [
    (SMALL, {"fp16": 1.19}, 2, 2.11, 7.3),
    (SMALL, {"int8": 0.60}, 1, 0.63, 2.4),
    (SMALL, {"int8": 0.60}, 2, 1.09, 3.9),
    (SMALL, {"int4": 0.31}, 2, 0.35, 2.0),
    (SMALL, {"fp8": 0.60}, 2, 1.09, 4.0),
    (RELEASED, {"int4": 2.07}, 1, 2.06, 7.8),
    (RELEASED, {"int8": 4.02}, 1, 4.06, 13.0),
    # by benchmarks/engine_builds.py
    (SMALL, {"fp16": 1.1921}, 1, 1.2068, 4.199),
    (SMALL, {"fp16": 1.1921}, 2, 2.4128, 7.431),
]


@pytest.mark.parametrize(("text", "weights", "number", "engine", "peak"), MEASURED)
def test_estimates_are_within_a_quarter_of_measured_builds(
    text: TextConfig, weights: dict[str, float], number: int, engine: float, peak: float
) -> None:
    manifest = manifest_of(text, weights)
    chosen = profiles(manifest, max_pixels=448 * 448, decode_profile=number == 2)
    found = estimate(manifest, ["decoder"], chosen, [target("sm80")]).parts["decoder"]
    assert found.engine / 1e9 == pytest.approx(engine, rel=0.25)
    assert found.build / 1e9 == pytest.approx(peak, rel=0.25)


def test_a_decode_profile_costs_weights_but_not_those_of_four_bits() -> None:
    manifest = manifest_of(RELEASED, {"int8": 1.0})
    assert engine_bytes(manifest, "decoder", 2) - engine_bytes(manifest, "decoder") > 1e9
    manifest = manifest_of(RELEASED, {"int4": 1.0})
    assert engine_bytes(manifest, "decoder", 2) - engine_bytes(manifest, "decoder") < 0.05e9


def test_multiply_adds_are_those_of_the_weights(golden_bundle: Callable[[str], Path]) -> None:
    """Every weight once a token; the head once in all, the merger's for a quarter of the rows; attention besides."""
    manifest = Bundle.open(golden_bundle("fp16")).manifest
    sizes = linears("decoder", manifest.model)
    text, tokens = manifest.model.text, 10
    layers = sum(i * o for name, (i, o) in sizes.items() if name != "lm_head")
    attention = tokens**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    head = text.hidden_size * text.vocab_size
    assert macs_of(manifest, "decoder", tokens) == {"fp16": layers * tokens + head + attention}


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_linears_are_all_of_a_graphs_weights(golden_bundle: Callable[[str], Path], part: str) -> None:
    """Products make up the weights, but for norms, biases and constants: a few in a hundred of this small model."""
    manifest = Bundle.open(golden_bundle("fp16")).manifest
    products = 2 * sum(inputs * outputs for inputs, outputs in linears(part, manifest.model).values())
    assert products < sum(manifest.graphs[part].weights.values()) < 1.15 * products


def test_codes_are_counted_apart() -> None:
    manifest = manifest_of(RELEASED, {"int8": 4.0}, precision="int8")
    found = macs_of(manifest, "decoder", 100)
    assert set(found) == {"int8", "fp16"}
    assert found["int8"] > 50 * found["fp16"]


def test_seconds_are_the_rooflines() -> None:
    manifest = manifest_of(RELEASED, {"fp16": 8.0})
    chosen = profiles(manifest, max_pixels=448 * 448)
    found = estimate(manifest, ["vision", "decoder"], chosen, [target("a100-80gb-sxm")])
    kv = 1024 * 2 * 36 * 8 * 128 * 2
    assert found.seconds["decode"] == pytest.approx((8e9 + kv) / 2039e9)
    assert found.seconds["prefill"] == pytest.approx(2 * macs_of(manifest, "decoder", 512)["fp16"] / 312e12)
    assert set(found.seconds) == {"vision", "prefill", "decode"}
    assert estimate(manifest, ["decoder"], chosen, [target("sm80")]).seconds == {}


def test_the_cache_is_what_the_largest_batch_takes() -> None:
    manifest = manifest_of(RELEASED, {"fp16": 8.0})
    chosen = profiles(manifest, max_pixels=448 * 448, max_batch=4)
    items = {item.name: item.bytes for item in device_memory(manifest, {"decoder": 10}, chosen)}
    assert items["KV cache"] == 4 * 4096 * 2 * 36 * 8 * 128 * 2
    assert items["decoder engine"] == 10
    assert "vision activations" not in items


def test_it_is_plain_data_for_the_record() -> None:
    manifest = manifest_of(RELEASED, {"int4": 2.0})
    found = estimate(manifest, ["decoder"], profiles(manifest, max_pixels=448 * 448), [target("a100")])
    raw = found.to_dict()
    assert raw["parts"]["decoder"] == {
        "weights": 2_000_000_000,
        "engine": found.engine_bytes,
        "build": found.build_bytes,
    }
    assert raw["device_bytes"] == sum(item["bytes"] for item in raw["memory"])


# Refusals


def found_for(weights: dict[str, float], **limits: Any) -> Any:
    manifest = manifest_of(RELEASED, weights)
    return estimate(manifest, ["vision", "decoder"], profiles(manifest, max_pixels=448 * 448, **limits), [])


def test_a_device_that_is_too_small() -> None:
    found = found_for({"fp16": 8.0})
    with pytest.raises(OneVisionError) as refusal:
        check_fits(found, [target("jetson-orin-nano-8gb")], None, None)
    message = str(refusal.value)
    need = f"{found.device_bytes / 1e9:.2f} GB"
    assert message.startswith(f"jetson-orin-nano-8gb has 8.59 GB of memory, and this needs {need} (decoder engine 8.0")
    check_fits(found_for({"int4": 2.1}), [target("jetson-orin-nano-8gb")], None, None)
    with pytest.raises(OneVisionError, match="KV cache"):
        check_fits(found_for({"int4": 2.1}, max_batch=12), [target("jetson-orin-nano-8gb")], None, None)


def test_a_capability_has_no_memory_to_check() -> None:
    check_fits(found_for({"fp16": 8000.0}), [target("sm80")], None, None)


def test_a_machine_with_too_little_memory() -> None:
    found = found_for({"fp16": 8.0})
    with pytest.raises(OneVisionError, match=r"the build needs about 25\.\d\d GB of memory, .* has 4\.00 GB available"):
        check_fits(found, [], 4_000_000_000, None)
    check_fits(found, [], found.build_bytes, None)


def test_a_disk_that_is_too_full() -> None:
    found = found_for({"fp16": 8.0})
    with pytest.raises(OneVisionError, match=r"the engines need about 8\.6\d GB, and the disk has 1\.00 GB free"):
        check_fits(found, [], None, 1_000_000_000)
