"""The quantize command: plans shown before they are paid for, targets that refuse, one line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from onevision_edge.calibration.recipe import Methods
from onevision_edge.cli import main
from onevision_edge.engines.targets import target as named_target
from onevision_edge.export.checkpoint import Checkpoint
from onevision_edge.export.draft import Draft
from onevision_edge.precision.plan import Plan, default_plan


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


def failure(*arguments: object) -> str:
    """The message of a command that must fail with exit code 1, one line of it, and leave nothing."""
    before = set(Path().iterdir())
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert set(Path().iterdir()) == before
    return result.stderr


# Dry runs.


def test_a_dry_run_shows_every_kind_of_module(golden_checkpoint: Path) -> None:
    result = call(golden_checkpoint, "--precision", "int4", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["modules", "precision", "size", "because"]
    rows = {line.split()[0]: line for line in lines[2:] if line.startswith(("model", "visual", "lm_head"))}
    assert "int4-block32  " in rows["model.layers.*.mlp.down_proj"]
    assert "decode reads every weight for each token" in rows["model.layers.*.mlp.down_proj"]
    assert "int8-weight  " in rows["lm_head"]
    assert "float  " in rows["visual.blocks.*.attn.qkv"]
    assert lines[-1].startswith("int4: ")
    assert lines[-1].endswith("KV cache float; everything else fp16")
    assert list(Path().iterdir()) == []


def test_a_dry_run_as_json_adds_up(golden_checkpoint: Path) -> None:
    options = ("--precision", "fp8", "--vision", "int8", "--kv-cache", "int8", "--dtype", "bf16", "--without", "clip")
    found = json.loads(call(golden_checkpoint, *options, "--dry-run", "--json").stdout)
    plan = default_plan("fp8", "bf16", vision="int8", kv_cache="int8")
    assert Plan.from_dict(found["plan"]) == plan
    assert Methods.from_dict(found["methods"]) == Methods(clip=False)
    assert found["bytes"] == Draft.make(Checkpoint.open(golden_checkpoint), plan).nbytes
    assert sum(row["bytes"] for row in found["modules"]) + 512 * 64 * 2 == found["bytes"]
    assert set(found["modules"][0]) == {"modules", "precision", "bytes", "reason"}


def test_a_dry_run_is_what_is_written(golden_checkpoint: Path, golden: Callable[[str], Any]) -> None:
    np.savez("row.npz", **golden("a_single_image").inputs)
    options = ("--precision", "int8-weight", "--max-length", 64)
    planned = json.loads(call(golden_checkpoint, *options, "--dry-run", "--json").stdout)
    result = call(golden_checkpoint, "-o", "b", *options, "--calibration", "row.npz", "--no-evaluate", "--json")
    assert result.exit_code == 0
    manifest = json.loads(result.stdout)
    assert manifest["quantization"]["plan"] == planned["plan"]
    assert manifest["quantization"]["methods"] == planned["methods"]
    weights = [graph["weights"] for graph in manifest["graphs"].values()]
    table = manifest["files"]["embed_tokens.bin"]["size"]
    assert sum(count for graph in weights for count in graph.values()) + table == planned["bytes"]
    assert json.loads(Path("b/manifest.json").read_text()) == manifest
    assert "quality: not measured" in result.stderr


@pytest.mark.parametrize(
    ("target", "precision", "dtype"),
    [("t4", "int8", "fp16"), ("a100", "int4", "fp16"), ("h100", "fp8", "fp16"), ("cpu", "int4", "fp32")],
)
def test_a_target_sets_what_is_not_asked(golden_checkpoint: Path, target: str, precision: str, dtype: str) -> None:
    found = json.loads(call(golden_checkpoint, "--target", target, "--dry-run", "--json").stdout)["plan"]
    assert (found["name"], found["dtype"]) == (precision, dtype)
    assert found["rules"][1]["reason"] == named_target(target).reason
    options = ("--target", target, "--precision", "int8-weight", "--dtype", "fp16", "--lm-head", "float")
    found = json.loads(call(golden_checkpoint, *options, "--dry-run", "--json").stdout)["plan"]
    assert found == default_plan("int8-weight", lm_head="float").to_dict() | {"rules": found["rules"]}
    assert [rule["precision"] for rule in found["rules"]] == ["float", "int8-weight", "float", "float", "float"]


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "a100", "--precision", "fp8"), "a100 (sm80) has no FP8 (it came with sm89)"),
        (("--target", "a100", "--precision", "int4", "--vision", "fp8"), "a100 (sm80) has no FP8"),
        (("--target", "l4", "--precision", "nvfp4"), "l4 (sm89) has no NVFP4"),
        (("--target", "cpu", "--precision", "fp8"), "the cpu target has no FP8"),
        (("--target", "cpu", "--precision", "int8", "--dtype", "bf16"), "the cpu target does not compute in BF16"),
        (("--target", "v100"), "v100 (sm70) is not a target"),
        (("--target", "abacus"), "unknown target 'abacus'"),
        (("--precision", "int4-block128"), "which int4-block128's blocks of 128 do not divide"),
        (("--precision", "int8", "--max-length", 9999), "max_length 9999 is outside 1..4096"),
        (("--precision", "int8", "--recipe", "none.toml"), None),
        (("--recipe", "none.toml"), "none.toml cannot be read: No such file or directory"),
    ],
)
def test_plans_that_cannot_be(golden_checkpoint: Path, options: tuple[Any, ...], message: str | None) -> None:
    """Before any data is read: a dry run refuses the same."""
    if message is None:
        assert call(golden_checkpoint, "-o", "b", *options).exit_code == 2
        return
    for more in (("-o", "b"), ("--dry-run",)):
        assert message in failure(golden_checkpoint, *options, *more)


def test_an_a100_is_told_what_it_can_run(golden_checkpoint: Path) -> None:
    message = failure(golden_checkpoint, "-o", "b", "--target", "a100", "--precision", "fp8")
    assert message.rstrip().endswith("INT8 and INT4 run there; use --precision int8 or int4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("no-such-checkpoint",), "no-such-checkpoint does not exist"),
        (("demo", "--calibration", "none.jsonl"), "none.jsonl: no such file or folder"),
        (("demo", "--calibration", "."), ".: holds .jsonl files; a folder is images or .npz files"),
        (("demo", "--evaluation", "none.npz"), "none.npz: no such file or folder"),
        (("demo", "--calibration", "text.jsonl"), "text.jsonl: its one row does not have an image or a video"),
        (("demo", "--calibration", "bad.jsonl"), "bad.jsonl:1: "),
        (("demo", "--dtype", "bf16"), "a bf16 bundle cannot be measured here"),
        (("demo", "--max-length", 20), "tokens; the bundle will hold 20"),
    ],
)
def test_data_that_cannot_be_used(options: tuple[Any, ...], message: str) -> None:
    Path("text.jsonl").write_text('{"prompt": "Hello?", "answer": "Hello."}\n')
    Path("bad.jsonl").write_text("{\n")
    source, *rest = options
    assert message in failure(source, "-o", "b", "--precision", "int8", "--calibration-samples", 2, *rest)


def test_a_bundle_that_is_there(golden_bundle: Callable[[str], Path], golden_checkpoint: Path) -> None:
    message = failure(golden_checkpoint, "-o", golden_bundle("fp32"), "--precision", "int8")
    assert "exists; pass --overwrite to replace it" in message


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("demo",),
        ("demo", "--dry-run"),  # neither a precision nor a target
        ("demo", "-o", "b"),
        ("demo", "--precision", "int8"),  # no output
        ("demo", "-o", "b", "--precision", "int3"),
        ("demo", "-o", "b", "--precision", "int8", "--kv-cache", "fp8"),
        ("demo", "-o", "b", "--precision", "int8", "--dtype", "int8"),
        ("demo", "-o", "b", "--precision", "int8", "--observer", "max"),
        ("demo", "-o", "b", "--precision", "int8", "--without", "spinquant"),
        ("demo", "-o", "b", "--precision", "int8", "--calibration-samples", "0"),
        ("demo", "-o", "b", "--precision", "int8", "--evaluation-samples", "0"),
        ("demo", "-o", "b", "--precision", "int8", "--max-length", "0"),
        ("demo", "-o", "b", "--precision", "int8", "--max-pixels", "-5"),
        ("demo", "-o", "b", "--precision", "int8", "--seed", "-1"),
        ("demo", "-o", "b", "--precision", "int8", "--threads", "0"),
        ("demo", "-o", "b", "--precision", "int8", "more"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert list(Path().iterdir()) == []
