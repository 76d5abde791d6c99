"""Bytes of a decode step and the share of memory's bandwidth, by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from onevision_edge.bundle import Bundle, PackedWeight, WideSpec
from onevision_edge.report.latency.roofline import (
    bytes_per_token,
    cache_bytes,
    largest_cache,
    memory_bandwidth,
    roofline_share,
    weight_bytes,
)
from onevision_edge.report.subject import CPU_ENGINE, ONNXRUNTIME, TENSORRT

# The golden checkpoint: 3 layers of 64 with 4 and 2 heads of 32, an MLP of 160, a vocabulary of 512.
WEIGHTS = 3 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 160) + 512 * 64
CACHE_VALUES = 2 * 3 * 2 * 32  # of a token


def test_weights_are_what_a_step_reads(golden_bundle: Callable[[str], Path]) -> None:
    """ONNX Runtime's CPU provider keeps FP16 weights as FP32; an engine reads them as they are."""
    bundles = {dtype: Bundle.open(golden_bundle(dtype)) for dtype in ("fp32", "fp16")}
    norms = 3 * (2 * 64 + 2 * 32) + 64
    for bundle, backend, itemsize in (
        (bundles["fp32"], ONNXRUNTIME, 4),
        (bundles["fp16"], ONNXRUNTIME, 4),
        (bundles["fp16"], TENSORRT, 2),
    ):
        found = weight_bytes(bundle, backend)
        assert found is not None
        assert itemsize * WEIGHTS <= found <= itemsize * (WEIGHTS + norms)


def test_cache_rows_are_in_the_graphs_own_format(golden_bundle: Callable[[str], Path]) -> None:
    bundle = Bundle.open(golden_bundle("fp32"))
    assert cache_bytes(bundle, ONNXRUNTIME, 10) == 10 * 4 * CACHE_VALUES
    assert cache_bytes(Bundle.open(golden_bundle("fp16")), ONNXRUNTIME, 10) == 10 * 2 * CACHE_VALUES
    assert cache_bytes(bundle, CPU_ENGINE, 10) == 10 * (CACHE_VALUES + CACHE_VALUES // 32 * 4)


def test_a_batch_shares_the_weights_and_not_the_cache(golden_bundle: Callable[[str], Path]) -> None:
    bundle = Bundle.open(golden_bundle("fp32"))
    weights = weight_bytes(bundle, ONNXRUNTIME)
    assert weights is not None
    assert bytes_per_token(bundle, ONNXRUNTIME, 10, 1) == weights + 40 * CACHE_VALUES
    assert bytes_per_token(bundle, ONNXRUNTIME, 10, 4) == round(weights / 4 + 40 * CACHE_VALUES)


def test_nvfp4_weights_run_as_int8(golden_bundle: Callable[[str], Path]) -> None:
    bundle = Bundle.open(golden_bundle("fp32"))
    spec = bundle.graph("decoder")
    wide = WideSpec("twin.onnx", (PackedWeight("w", (64, 32), 16, 0, 0, 1.0),))
    graphs = {**bundle.manifest.graphs, "decoder": replace(spec, weights={"nvfp4": 1024}, wide=wide)}
    bundle = Bundle(bundle.directory, replace(bundle.manifest, graphs=graphs))
    assert weight_bytes(bundle, ONNXRUNTIME) == 2048
    assert weight_bytes(bundle, TENSORRT) == 1024


def test_the_share_by_hand() -> None:
    assert roofline_share(1_000_000, 1, 0.001, 2e9) == pytest.approx(0.5)
    assert roofline_share(250_000, 4, 0.001, 2e9) == pytest.approx(0.5)  # the same step, a quarter for each sequence


def test_the_largest_cache_is_read(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert largest_cache(tmp_path) == 32 << 20
    assert largest_cache(tmp_path / "none") == 0


def test_memory_is_read_at_a_plausible_rate() -> None:
    assert 1e8 < memory_bandwidth(1) < 1e13
