"""The full report of a checkpoint by one command."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from onevision_edge.cli import main
from onevision_edge.errors import OneVisionError
from onevision_edge.report.files import open_folder
from onevision_edge.report.full import Bundles, make_bundles

QUICK = ("--samples", "4", "--walk", "1", "--rounds", "1", "--threads", "1")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_bundles_are_made_compared_timed_and_kept(tmp_path: Path) -> None:
    kept, out = tmp_path / "bundles", tmp_path / "out"
    done = run("report", "demo", "-o", out, "--precisions", "fp32,int8-weight", "--bundles", kept, *QUICK)
    assert done.exit_code == 0, done.output
    assert {path.name for path in kept.iterdir()} == {"fp32", "int8-weight"}
    parity, latency = (json.loads((out / name).read_text()) for name in ("parity.json", "latency.json"))
    names = [one["subject"]["name"] for one in parity["candidates"]]
    assert names == [one["subject"]["name"] for one in latency["subjects"]] == ["fp32", "int8-weight"]
    assert parity["candidates"][0]["metrics"]["kld"]["value"] == 0
    assert 0 < parity["candidates"][1]["metrics"]["kld"]["value"] < 1e-3
    assert "first token" in done.output
    page = (out / "index.html").read_text()
    assert page.count("int8-weight") > 5
    made = (kept / "fp32" / "manifest.json").stat().st_mtime_ns
    again = run("report", "demo", "-o", out, "--precisions", "fp32", "--bundles", kept, *QUICK)
    assert again.exit_code == 0, again.output
    assert (kept / "fp32" / "manifest.json").stat().st_mtime_ns == made  # used, not made again


def test_usage(tmp_path: Path) -> None:
    done = run("report", "demo", "-o", tmp_path / "out", "--precisions", "fp32,int5")
    assert done.exit_code == 2
    assert "'int5' is none of fp32, fp16, bf16, int8" in done.output
    assert run("report", "demo").exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_another_checkpoint_is_refused(tiny: Any, tmp_path: Path) -> None:
    checkpoint = tiny().write(tmp_path / "c")
    make_bundles("demo", tmp_path / "b", Bundles(["fp32"]))
    with pytest.raises(OneVisionError, match="fp32 is a bundle of another checkpoint than"):
        make_bundles(str(checkpoint), tmp_path / "b", Bundles(["fp32"]))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OneVisionError, match="is no folder, and a report is one"):
        open_folder(tmp_path / "file" / "out")
