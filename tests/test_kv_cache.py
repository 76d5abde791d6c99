"""The KV cache is updated where it lies: by address, by ONNX Runtime's own account, and by memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.backend import Graph, SessionOptions
from onevision_edge.runtime.cache import Decoder, KVCache

Exported = Callable[[str], Path]
COPY_WARNING = "in-place optimization not activated"
WARNINGS = 2
MARK = 7.0


def opened(directory: Path, log_severity: int = 3) -> tuple[Graph, KVCache, Decoder]:
    """The decoder of a bundle over a cache of one sequence."""
    bundle = Bundle.open(directory)
    spec, text = bundle.graph("decoder"), bundle.manifest.model.text
    graph = Graph(bundle.path(spec.file), spec, SessionOptions(threads=1, log_severity=log_severity))
    cache = KVCache(text, bundle.manifest.max_length, 1, graph.fmt.numpy)
    return graph, cache, Decoder(graph, cache, text.vocab_size)


def step(decoder: Decoder, position: int, tokens: int = 1, seed: int = 0) -> np.ndarray:
    embeds = np.random.default_rng(seed).standard_normal((1, tokens, 64))
    return decoder(embeds.astype(decoder.cache.layers[0][0].dtype), np.array([position]), np.array([[tokens - 1]]))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_our_own_arrays_are_written(golden_bundle: Exported, dtype: str) -> None:
    """Three tokens from row 5 on fill rows 5, 6 and 7 of the arrays given, and touch no other."""
    _, cache, decoder = opened(golden_bundle(dtype))
    arrays = [array for layer in cache.layers for array in layer]
    for array in arrays:
        array.fill(MARK)
    step(decoder, 5, 3)
    written = [np.flatnonzero((array != MARK).any(axis=(0, 1, 3))).tolist() for array in arrays]
    assert written == [[5, 6, 7]] * 6


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_input_and_output_share_one_address(golden_bundle: Exported, dtype: str) -> None:
    _, cache, decoder = opened(golden_bundle(dtype))
    addresses = [array.ctypes.data for layer in cache.layers for array in layer]
    for position in range(3):
        step(decoder, position)
        *present, logits = decoder._binding._binding.get_outputs()
        assert [value.data_ptr() for value in present] == addresses
        assert logits.data_ptr() == decoder._logits.ctypes.data


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_onnx_runtime_reports_no_copy(golden_bundle: Exported, capfd: pytest.CaptureFixture[str], dtype: str) -> None:
    _, _, decoder = opened(golden_bundle(dtype), WARNINGS)
    step(decoder, 0, 3)
    step(decoder, 3)
    assert COPY_WARNING not in capfd.readouterr().err.lower()


def test_onnx_runtime_reports_a_copy_without_binding(
    golden_bundle: Exported, capfd: pytest.CaptureFixture[str]
) -> None:
    """With plain arrays every buffer is copied: the logits are the same, our arrays stay as they were."""
    graph, cache, decoder = opened(golden_bundle("fp32"), WARNINGS)
    embeds = np.random.default_rng(0).standard_normal((1, 1, 64)).astype(np.float32)
    logits, *present = graph.run(unbound_inputs(cache, embeds, position=0))
    assert capfd.readouterr().err.lower().count(COPY_WARNING) == 6
    assert present[0].any()
    assert not cache.layers[0][0].any()
    np.testing.assert_allclose(logits, step(decoder, 0), atol=1e-5)


def unbound_inputs(cache: KVCache, embeds: np.ndarray, position: int) -> dict[str, np.ndarray]:
    inputs = {
        "inputs_embeds": embeds,
        "position_ids": np.array([[position]]),
        "write_indices": np.array([position]),
        "valid_length": np.array([position + 1]),
        "logits_indices": np.array([[0]]),
    }
    for i, (key, value) in enumerate(cache.layers):
        inputs |= {f"past_key.{i}": key, f"past_value.{i}": value}
    return inputs


def test_unwritten_rows_are_never_seen(golden_bundle: Exported) -> None:
    """Whatever an earlier sequence left behind the last token changes nothing."""
    _, clean, decoder = opened(golden_bundle("fp32"))
    _, dirty, other = opened(golden_bundle("fp32"))
    for array in (array for layer in dirty.layers for array in layer):
        array.fill(1e4)
    for position in range(4):
        np.testing.assert_array_equal(step(decoder, position, seed=position), step(other, position, seed=position))
    np.testing.assert_array_equal(clean.layers[0][0][:, :, :4], dirty.layers[0][0][:, :, :4])


def test_rows_of_a_cache_are_views(golden_bundle: Exported) -> None:
    """A sequence prefilled through its rows of a larger cache lands in that cache, and nowhere else."""
    bundle = Bundle.open(golden_bundle("fp32"))
    spec, text = bundle.graph("decoder"), bundle.manifest.model.text
    graph = Graph(bundle.path(spec.file), spec, SessionOptions(threads=1))
    cache = KVCache(text, 256, 3, graph.fmt.numpy)
    step(Decoder(graph, cache.rows(1, 2), text.vocab_size), 0, 4)
    for key, value in cache.layers:
        for array in (key, value):
            assert array[1, :, :4].all()
            assert not array[[0, 2]].any()
            assert not array[1, :, 4:].any()


def test_a_full_cache_is_refused(golden_bundle: Exported) -> None:
    _, _, decoder = opened(golden_bundle("fp32"))
    step(decoder, 255)
    with pytest.raises(OneVisionError, match="257 tokens do not fit the KV cache of 256"):
        step(decoder, 255, 2)


def test_a_failing_call_is_one_sentence(golden_bundle: Exported) -> None:
    _, _, decoder = opened(golden_bundle("fp32"))
    with pytest.raises(OneVisionError, match=r"decoder\.onnx") as caught:
        decoder(np.zeros((1, 1, 63), np.float32), np.array([0]), np.array([[0]]))
    assert "\n" not in str(caught.value)


# Loads the bundle argv[1], takes 20 tokens through its decoder bound in place or unbound (argv[2]), and
# prints the bytes of the cache and by how much the peak of resident memory rose.
MEMORY = """
import sys
import numpy as np
from onevision_edge.bundle import Bundle
from onevision_edge.runtime.backend import Graph, SessionOptions
from onevision_edge.runtime.cache import Decoder, KVCache

bundle = Bundle.open(sys.argv[1])
spec, text = bundle.graph("decoder"), bundle.manifest.model.text
graph = Graph(bundle.path(spec.file), spec, SessionOptions(threads=1))
baseline = peak()
cache = KVCache(text, bundle.manifest.max_length, 1, graph.fmt.numpy)
embeds = np.ones((1, 1, text.hidden_size), np.float32)
if sys.argv[2] == "bound":
    decoder = Decoder(graph, cache, text.vocab_size)
    for position in range(20):
        decoder(embeds, np.array([position]), np.zeros((1, 1), np.int64))
else:
    inputs = {"inputs_embeds": embeds, "position_ids": np.array([[0]]), "write_indices": np.array([0])}
    inputs |= {"valid_length": np.array([1]), "logits_indices": np.array([[0]])}
    for i, (key, value) in enumerate(cache.layers):
        inputs |= {f"past_key.{i}": key, f"past_value.{i}": value}
    graph.run(inputs)
print(cache.nbytes, peak() - baseline)
"""


@pytest.fixture(scope="module")
def roomy_bundle(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder whose cache takes 512 MiB when full."""
    root = tmp_path_factory.mktemp("roomy")
    made = tiny(
        text_config__max_position_embeddings=1 << 17,
        text_config__num_key_value_heads=4,
        text_config__head_dim=64,
    )
    bundle = root / "bundle"
    onevision_edge.export(made.write(root / "c"), bundle, dtype="fp32", max_length=1 << 17, parts=["decoder"])
    return bundle


def test_memory_follows_the_rows_in_use(roomy_bundle: Path, python_output: Callable[..., str]) -> None:
    cache, rise = map(int, python_output(MEMORY, roomy_bundle, "bound").split())
    assert cache == 512 << 20
    assert rise < 64e6  # 27 MB measured: the first huge page of each head of each buffer
    cache, rise = map(int, python_output(MEMORY, roomy_bundle, "unbound").split())
    assert rise > 256e6
