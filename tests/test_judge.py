"""onevision-edge judge: stored reports under other gates, exit codes, and the lines that failed."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from onevision_edge.cli.judge import judge
from onevision_edge.errors import OneVisionError

DISTANCE = {"max_abs": 1.0, "mean_abs": 0.1, "cosine": 0.9, "snr_db": 10.0}
STAGE = {"own": None, "noise": None, "own_noise": None, "values": 4, "worst": None, "verdict": "PASS", "why": ""}


def candidate(name: str, kld: float, merger: float) -> dict[str, Any]:
    return {
        "subject": {"name": name, "precision": "int4"},
        "stages": [
            {"stage": "patch_embed", "error": {**DISTANCE, "relative_l2": 0.0}, **STAGE},
            {"stage": "merger", "error": {**DISTANCE, "relative_l2": merger}, **STAGE},
        ],
        "tokens": {"rows": 4, "divergent_rows": 0, "near_ties": 0, "median_first_divergent": None},
        "metrics": {"kld": {"value": kld, "low": None, "high": None, "n": 4}},
        "paired": [],
    }


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "parity.json"
    candidates = [candidate("close", 1e-4, 0.1), candidate("far", 0.2, 0.9)]
    path.write_text(json.dumps({"format": "onevision-edge parity", "format_version": 1, "candidates": candidates}))
    return path


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    path = tmp_path / "loose.toml"
    path.write_text("[default]\nerror.'*' = 1.0\nat_most.kld = 1.0\n")
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(judge, list(map(str, arguments)))


def test_the_shipped_gates_fail_it_with_the_lines(report: Path) -> None:
    found = run(report)
    assert found.exit_code == 1
    assert found.stderr.splitlines() == [
        "FAIL far: merger: relative L2 0.9 is more than 0.25",
        "FAIL far: kld 0.2 is more than 0.05",
    ]
    assert "PASS  close (int4), gates [int4] of parity-gates.toml" in found.stdout
    assert "kld 0.0001 is at most 0.05" in found.stdout


def test_under_other_gates_it_passes(report: Path, loose: Path, tmp_path: Path) -> None:
    found = run(report, "--gates", loose, "-o", tmp_path / "out" / "judged.json", "--json")
    assert (found.exit_code, found.stderr) == (0, "")
    written = json.loads((tmp_path / "out" / "judged.json").read_text())
    assert written == json.loads(found.stdout)
    assert written["verdict"] == "PASS"
    assert [c["gates"] for c in written["candidates"]] == [{"name": "default", "source": "loose.toml"}] * 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["judged.json"]


def test_strict_fails_on_what_is_ambiguous(report: Path, loose: Path) -> None:
    parity = json.loads(report.read_text())
    parity["candidates"][0]["stages"][0]["error"] = None
    report.write_text(json.dumps(parity))
    assert run(report, "--gates", loose).exit_code == 0
    found = run(report, "--gates", loose, "--strict")
    assert found.exit_code == 1
    assert found.stderr == "AMBIGUOUS close: patch_embed: it was not measured\n"


def test_other_files_are_refused(report: Path, tmp_path: Path) -> None:
    report.write_text("{}")
    found = run(report)
    assert isinstance(found.exception, OneVisionError)
    assert str(found.exception).startswith(f"{report}: its format is None")
    assert isinstance(run(tmp_path / "none.json").exception, OneVisionError | click.ClickException)
