"""build --check: what TensorRT parsed runs here before anything is built, and a layer that departs stops the build."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.calibration.recipe import Methods
from onevision_edge.cli import main
from onevision_edge.engines import check
from onevision_edge.engines.dialects import RTX
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import default_plan

pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)


def quantized(path: Path, precision: str, **options: Any) -> Bundle:
    plan = default_plan(precision, "fp16", vision=precision, **options)
    methods = Methods(smoothquant=False, awq=False, gptq=False)
    return onevision_edge.quantize(
        "demo", path, plan=plan, methods=methods, calibration_samples=4, evaluate=False, max_length=128
    )


@pytest.mark.parametrize("precision", ["float", "int8", "int4", "fp8", "nvfp4"])
def test_every_precision_of_the_shipped_model_agrees(precision: str, tmp_path: Path) -> None:
    bundle = quantized(tmp_path / "bundle", precision, kv_cache="int8" if precision == "int4" else "float")
    found = check.check_graphs(bundle, ("vision", "decoder"), RTX)
    assert [(one.part, one.call, one.verdict) for one in found if not one.passed] == []
    assert [one.call for one in found] == [*check._IMAGES, *check._CALLS]
    if precision in ("float", "nvfp4"):  # elsewhere codes of activations, or of the cache, flip on a rounding
        assert all(0 < one.difference < 0.1 for one in found), [one.difference for one in found]
    assert all(one.comparison.compared > 100 for one in found)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return quantized(tmp_path_factory.mktemp("checked") / "bundle", "int8-weight")


def test_the_command_prints_what_it_found(bundle: Bundle) -> None:
    arguments = ["build", str(bundle.directory), "--target", "sm80", "--parts", "decoder", "--check"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("every layer agrees") == 4
    assert (bundle.directory / "engines" / "sm80" / "decoder.engine").exists()


def test_a_departure_stops_the_build(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by other weights than the graph's."""
    original = check.Network.read

    def reading(trt: Any, network: Any) -> Any:
        read = original(trt, network)
        large = next(layer.constant for layer in read.layers if layer.constant and layer.constant.data.size > 1000)
        large.data[:500] ^= 0x40
        return read

    monkeypatch.setattr(check.Network, "read", reading)
    arguments = ["build", str(bundle.directory), "--target", "sm86", "--parts", "decoder", "--check"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "departs by" in result.stderr
    assert result.stderr.strip().endswith("nothing was built")
    assert not (bundle.directory / "engines" / "sm86").exists()


def test_a_check_that_needs_more_memory_than_there_is(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "memory_field", lambda name: 1_000_000)
    with pytest.raises(OneVisionError, match=r"decoder graph of \d+ layers needs about 0 GB of memory"):
        check.check_graphs(bundle, ("decoder",), RTX)
