"""Judging: a record, every stage and metric against limits, at their edges."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.gates import Gates, load_gates
from onevision_edge.report.parity.judging import judge, judge_record

GATES = """
[default]
preprocess = 1e-3
divergent_rows = 0.1
error."*" = 0.1
own."*" = 0.05
at_most = { kld = 0.05 }
at_least = { top1_agreement = 0.9 }
worse_by = { accuracy = 0.02, cer = 0.02 }
[fp32]
error."*" = 0.001
"""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Gates:
    path = tmp_path_factory.mktemp("gates") / "mine.toml"
    path.write_text(GATES)
    return load_gates(path)


def distance(relative: float | None, largest: float | None = 1.0) -> dict[str, float | None]:
    return {"max_abs": largest, "mean_abs": 0.1, "relative_l2": relative, "cosine": 0.9, "snr_db": 10.0}


def stage(name: str = "merger", **found: float | None) -> dict[str, Any]:
    """A stage whose distances are those relative L2s."""
    values: dict[str, Any] = dict.fromkeys(("error", "own", "noise", "own_noise"))
    values |= {kind: distance(value) for kind, value in found.items()}
    return {"stage": name, **values, "values": 10, "worst": None, "verdict": "PASS", "why": ""}


def candidate(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = {
        "subject": {"name": "small", "precision": "int8"},
        "stages": list(stages),
        "first_failed_stage": None,
        "failed_module": None,
        "tokens": {"rows": 10, "divergent_rows": 0, "near_ties": 0, "median_first_divergent": None},
        "metrics": {},
        "paired": [],
        "examples": [],
        "scores": [],
        "gates": {"name": "", "source": ""},
        "checks": [],
        "verdict": "PASS",
    }
    return made | changes


def record(*candidates: dict[str, Any]) -> dict[str, Any]:
    return {"format": "onevision-edge parity", "format_version": 1, "candidates": list(candidates), "verdict": "PASS"}


@pytest.mark.parametrize(
    ("found", "verdict", "why"),
    [
        ({"error": 0.1}, "PASS", "relative L2 0.1 is within 0.1"),
        ({"error": 0.11}, "FAIL", "relative L2 0.11 is more than 0.1"),
        ({"error": 0.0, "own": 0.06}, "FAIL", "its own relative L2 0.06 is more than 0.05"),
        ({"own": 0.05}, "PASS", "its own relative L2 0.05 is within 0.05"),
        ({"error": 0.12, "noise": 0.04}, "AMBIGUOUS", "relative L2 0.12 is more than 0.1, but within 3 times that of"),
        ({"error": 0.13, "noise": 0.04}, "FAIL", "relative L2 0.13 is more than 0.1, and than 3 times that of BF16"),
        ({"error": 0.12, "noise": 0.04, "own": 0.2, "own_noise": 0.01}, "FAIL", "its own relative L2 0.2"),
        ({"error": None}, "FAIL", "relative L2 is not a finite number"),
        ({"error": math.nan}, "FAIL", "relative L2 is not a finite number"),
        ({"error": 0.2, "noise": math.inf}, "FAIL", "relative L2 0.2 is more than 0.1"),
        ({}, "AMBIGUOUS", "it was not measured"),
    ],
)
def test_a_stage(gates: Gates, found: dict[str, float], verdict: str, why: str) -> None:
    judged = judge(candidate(stage(**found)), gates)["stages"][0]
    assert judged["verdict"] == verdict
    assert judged["why"].startswith(why)


def test_the_precision_decides_and_can_be_given(gates: Gates) -> None:
    one = candidate(stage(error=0.01))
    assert judge(one, gates)["verdict"] == "PASS"
    found = judge(one, gates, "fp32")
    assert (found["verdict"], found["gates"]) == ("FAIL", {"name": "fp32", "source": "mine.toml"})


@pytest.mark.parametrize(("largest", "verdict"), [(1e-3, "PASS"), (2e-3, "FAIL"), (None, "FAIL")])
def test_preprocessing_is_judged_by_the_largest_difference(gates: Gates, largest: float | None, verdict: str) -> None:
    one = stage("preprocess") | {"error": distance(0.9, largest)}
    assert judge(candidate(one), gates)["stages"][0]["verdict"] == verdict


@pytest.mark.parametrize(
    ("rows", "divergent", "ties", "verdict"),
    [
        (10, 1, 0, "PASS"),
        (10, 2, 0, "FAIL"),
        (10, 2, 1, "AMBIGUOUS"),
        (10, 5, 3, "FAIL"),
        (10, 5, 4, "AMBIGUOUS"),
        (0, 0, 0, "AMBIGUOUS"),
    ],
)
def test_tokens(gates: Gates, rows: int, divergent: int, ties: int, verdict: str) -> None:
    tokens = {"rows": rows, "divergent_rows": divergent, "near_ties": ties, "median_first_divergent": None}
    found = judge(candidate(stage("tokens"), tokens=tokens), gates)
    assert found["stages"][0]["verdict"] == verdict
    assert found["verdict"] == verdict


def test_the_first_failed_stage_and_its_module(gates: Gates) -> None:
    stages = stage("patch_embed", error=0.2, noise=0.1), stage("merger", error=0.2), stage("logits", error=0.3)
    module = {"stage": "merger", "module": "mlp.0", "relative_l2": 0.2}
    found = judge(candidate(*stages, failed_module=module), gates)
    assert [s["verdict"] for s in found["stages"]] == ["AMBIGUOUS", "FAIL", "FAIL"]
    assert (found["first_failed_stage"], found["failed_module"], found["verdict"]) == ("merger", module, "FAIL")
    other = judge(candidate(*stages, failed_module=module | {"stage": "logits"}), gates)
    assert other["failed_module"] is None


def interval(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": 5}


@pytest.mark.parametrize(
    ("metrics", "wanted"),
    [
        ({"kld": interval(0.05)}, [("kld", "PASS", "kld 0.05 is at most 0.05")]),
        ({"kld": interval(0.08)}, [("kld", "FAIL", "kld 0.08 is more than 0.05")]),
        ({"kld": interval(None)}, [("kld", "FAIL", "kld is not a finite number")]),
        ({"top1_agreement": interval(0.9)}, [("top1_agreement", "PASS", "top1_agreement 0.9 is at least 0.9")]),
        ({"top1_agreement": interval(0.8)}, [("top1_agreement", "FAIL", "top1_agreement 0.8 is less than 0.9")]),
        ({"anls": interval(0.1)}, []),
    ],
)
def test_metrics(gates: Gates, metrics: dict[str, Any], wanted: list[tuple[str, str, str]]) -> None:
    found = judge(candidate(metrics=metrics), gates)
    assert [(c["gate"], c["verdict"], c["line"]) for c in found["checks"]] == wanted
    assert found["verdict"] == (wanted[0][1] if wanted else "PASS")


@pytest.mark.parametrize(
    ("metric", "low", "high", "worse", "verdict"),
    [
        ("accuracy", -0.05, -0.021, 5, "FAIL"),
        ("accuracy", -0.05, -0.01, 5, "AMBIGUOUS"),
        ("accuracy", -0.05, 0.05, 0, "PASS"),
        ("accuracy", -0.02, 0.01, 5, "PASS"),
        ("accuracy", 0.03, 0.05, 1, "PASS"),
        ("cer", 0.021, 0.05, 5, "FAIL"),
        ("cer", 0.01, 0.05, 5, "AMBIGUOUS"),
        ("cer", -0.05, -0.03, 1, "PASS"),
        ("cer", math.nan, 0.1, 1, "FAIL"),
    ],
)
def test_scores_on_the_same_rows(gates: Gates, metric: str, low: float, high: float, worse: int, verdict: str) -> None:
    pair = {"metric": metric, "difference": (low + high) / 2, "low": low, "high": high, "margin": 0.5}
    pair |= {"p_value": 0.5, "n": 100, "better": 0, "worse": worse}
    found = judge(candidate(paired=[pair]), gates)
    assert [(c["gate"], c["limit"], c["verdict"]) for c in found["checks"]] == [(f"{metric}_drop", 0.02, verdict)]


def test_what_is_required_has_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_text("[default]\nrequired = ['kld']\n")
    found = judge(candidate(), load_gates(path))
    assert [c["line"] for c in found["checks"]] == ["kld was not measured, and the gates require it"]
    assert found["verdict"] == "FAIL"
    assert judge(candidate(metrics={"kld": interval(9)}), load_gates(path))["verdict"] == "PASS"


def test_a_record_has_the_worst_verdict_and_is_not_changed(gates: Gates) -> None:
    parity = record(candidate(stage(error=0.01)), candidate(stage(error=0.12, noise=0.1)))
    before = json.dumps(parity)
    found = judge_record(parity, gates)
    assert [c["verdict"] for c in found["candidates"]] == ["PASS", "AMBIGUOUS"]
    assert found["verdict"] == "AMBIGUOUS"
    assert json.dumps(parity) == before
    assert judge_record(found, gates) == found
    assert judge_record(record(*parity["candidates"], candidate(stage(error=1))), gates)["verdict"] == "FAIL"


@pytest.mark.parametrize(
    "broken",
    [
        lambda: {"format": "onevision-edge bench", "format_version": 1},
        lambda: record() | {"format_version": 2},
        lambda: record({}),
        lambda: record(candidate({"stage": "merger"})),
        lambda: record(candidate(metrics=None)),
    ],
)
def test_other_json_is_refused(gates: Gates, broken: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(OneVisionError, match=r"its format is|not a parity record"):
        judge_record(broken(), gates)
