"""Outliers that change no output: what they do to plain rounding, and what SmoothQuant and AWQ do about it."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.calibration.data import Data, DataOptions
from onevision_edge.export.checkpoint import Checkpoint

Quality = Callable[[str, str], dict[str, Any]]

CHANNELS = 16
ROWS = {"calibration_samples": 64, "evaluation_samples": 120}


@pytest.fixture(scope="module")
def outliers(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("benchmarks/outliers.py")


@pytest.fixture(scope="module")
def stressed(outliers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with outliers."""
    return Path(outliers.with_outliers("demo", tmp_path_factory.mktemp("stressed") / "checkpoint", CHANNELS))


@pytest.fixture(scope="module")
def quality(outliers: ModuleType, stressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    """What a case loses on the checkpoint with outliers."""
    cases = {(case.precision, case.name): case for case in outliers.CASES}

    def measured(precision: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = outliers.measured(
            stressed, cases[precision, name], tmp_path_factory.mktemp("b"), **ROWS
        )
        return found

    return measured


def test_the_function_is_the_same(outliers: ModuleType, stressed: Path, tmp_path: Path) -> None:
    for name, source in (("before", "demo"), ("after", stressed)):
        onevision_edge.export(source, tmp_path / name, dtype="fp32")
    data = Data.open(Checkpoint.open("demo"), DataOptions(evaluation_samples=16))
    assert data.evaluation is not None
    difference, largest = outliers.difference(tmp_path / "before", tmp_path / "after", list(data.evaluation))
    assert difference < 3e-5 * largest


def test_every_normalisation_has_them(outliers: ModuleType, stressed: Path) -> None:
    before, after = Checkpoint.open("demo"), Checkpoint.open(stressed)
    readers = dict(outliers.readers(before.config))
    norms = {name.removesuffix(".weight") for name in before.tensors if "norm" in name or "ln_q" in name}
    headed = {"model.norm", "visual.pre_layernorm"}  # read by the head, and by a sum
    assert set(readers) == {name.removesuffix(".bias") for name in norms if "self_attn" not in name} - headed
    for norm in readers:
        ratio = after.read(f"{norm}.weight").astype(np.float32) / np.float32(before.read(f"{norm}.weight"))
        assert ((ratio > 29.9) & (ratio < 100.1)).sum() == CHANNELS
        assert np.isclose(ratio, 1).sum() == len(ratio) - CHANNELS


@pytest.mark.slow
def test_smoothquant_recovers_what_plain_int8_loses(quality: Quality, outliers: ModuleType) -> None:
    plain, smoothed = quality("int8", "plain absmax"), quality("int8", "SmoothQuant")
    assert outliers.points(plain) < -20
    assert outliers.points(smoothed) >= -1
    assert smoothed["kld"] < plain["kld"] / 1000


@pytest.mark.slow
def test_awq_recovers_what_plain_int4_loses(quality: Quality, outliers: ModuleType) -> None:
    plain, scaled, best = (quality("int4", name) for name in ("plain rounding", "AWQ", "AWQ and GPTQ"))
    assert outliers.points(plain) < -10
    assert outliers.points(scaled) >= -2
    assert outliers.points(best) >= -1
    assert best["kld"] < scaled["kld"] < plain["kld"] / 20


def test_the_figure_shows_every_case(outliers: ModuleType) -> None:
    def record(precision: str, case: str, before: float, after: float) -> dict[str, Any]:
        found = [{"accuracy": share, "accuracy_reference": 0.95, "kld": 1e-4} for share in (before, after)]
        return {"precision": precision, "case": case, "as_it_is": found[0], "with_outliers": found[1]}

    records = [record("int8", "a & b", 0.95, 0.0), record("int4", "c", 0.9, 1.0)]
    svg = ET.fromstring(outliers.figure(records, "16 channels < all"))
    texts = [element.text for element in svg.iter() if element.tag.endswith("}text")]
    assert {"INT8, a & b", "95.0 → 0.0 %", "INT4, c", "90.0 → 100.0 %", "full precision 95.0"} <= set(texts)
    drawn = [element for element in svg.iter() if element.get("class") == "diamond"]
    assert len(drawn) == 3  # one of them in the legend
    assert [line[3] for line in outliers.lines(records)] == ["1.0e-04", "1.0e-04"]
