"""Quantisations that are killed or run out of disk: the same call goes on, and ends with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.bundle import Bundle, Progress
from onevision_edge.calibration.recipe import Methods
from onevision_edge.calibration.walk import Walk
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import Plan, Rule, default_plan

# Everything that a stage can have: codes, folds, Gram matrices, corrected biases, scales of a cache.
PLAN = Plan(
    "mixed",
    "fp32",
    "int8",
    (
        *default_plan("int8", vision="int8").rules,
        Rule("decoder", "*.mlp.*", "int4"),
        Rule("decoder", "lm_head", "int8"),
    ),
)
METHODS = Methods(samples=16)
STAGES = ["visual.stem", *(f"visual.blocks.{i}" for i in range(3)), "visual.merger"]
STAGES += ["embeddings", *(f"model.layers.{i}" for i in range(3)), "lm_head"]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def rows(golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rows") / "data"
    directory.mkdir()
    for case in ("b_two_images", "d_video"):
        np.savez(directory / f"{case}.npz", **golden(case).inputs)
    return directory


@pytest.fixture(scope="module")
def checkpoint(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose times may be changed."""
    return Path(shutil.copytree(golden_checkpoint, tmp_path_factory.mktemp("copy") / "checkpoint"))


Quantize = Callable[..., Bundle]


@pytest.fixture(scope="module")
def quantize(checkpoint: Path, rows: Path) -> Quantize:
    """The call that is made again and again."""

    def call(output: Path, **changes: Any) -> Bundle:
        options: dict[str, Any] = {
            "plan": PLAN,
            "methods": METHODS,
            "calibration": rows,
            "evaluation": rows,
            "max_length": 64,
            "threads": 1,
        }
        return onevision_edge.quantize(changes.pop("source", checkpoint), output, **options | changes)

    return call


@pytest.fixture(scope="module")
def undisturbed(quantize: Quantize, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a quantisation that nothing happened to."""
    return contents(quantize(tmp_path_factory.mktemp("undisturbed") / "bundle").directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def finished(output: Path) -> list[str]:
    """The stages that the journal beside a bundle has."""
    state = output.parent / f".{output.name}.quantizing" / "state.json"
    return json.loads(state.read_text())["finished"] if state.exists() else []


class Interrupted(BaseException):
    """What a test raises in the middle."""


def stopping_at(phase: str, label: str) -> Callable[..., Any]:
    """Phases that raise where something is begun."""

    @contextmanager
    def phases(title: str, unit: str) -> Iterator[Progress]:
        def report(done: int, total: int, what: str) -> None:
            if (title, what) == (phase, label) or (title == phase and label == "*"):
                raise Interrupted

        yield report

    return phases


# In one process.


def test_stopped_before_every_stage(
    quantize: Quantize, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run gets one stage further; none does again what another has done."""
    passed: list[str] = []
    report = Walk._report

    def noting(walk: Walk, label: str, share: float) -> None:
        if not walk.journal.finished(label) and share == 0:
            passed.append(label)
        report(walk, label, share)

    monkeypatch.setattr(Walk, "_report", noting)
    output = tmp_path / "bundle"
    for count, stage in enumerate(STAGES):
        with pytest.raises(Interrupted):
            quantize(output, phases=stopping_at("calibrate", stage))
        assert finished(output) == STAGES[:count]
        assert not output.exists()
    for phase in ("write", "evaluate"):
        with pytest.raises(Interrupted):
            quantize(output, phases=stopping_at(phase, "*"))
        assert finished(output) == STAGES
        assert os.listdir(tmp_path) == [".bundle.quantizing"]  # what was written of the bundle is swept
    assert contents(quantize(output).directory) == undisturbed
    assert list(tmp_path.iterdir()) == [output]
    assert passed == [stage for stage in STAGES for _ in range(2)]


@pytest.fixture(scope="module")
def begun(quantize: Quantize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a quantisation that finished two stages."""
    output = tmp_path_factory.mktemp("begun") / "bundle"
    with pytest.raises(Interrupted):
        quantize(output, phases=stopping_at("calibrate", "visual.blocks.1"))
    assert finished(output) == STAGES[:2]
    return output.parent / ".bundle.quantizing"


@pytest.mark.parametrize(
    ("change", "resumes"),
    [
        ({}, True),
        ({"max_length": 60}, True),  # of the graphs alone
        ({"overwrite": True}, True),
        ({"seed": 1}, False),
        ({"plan": replace(PLAN, dtype="fp16")}, False),
        ({"plan": replace(PLAN, kv_cache="float")}, False),
        ({"methods": Methods(samples=17)}, False),
        ({"calibration_samples": 1}, False),
        ({"evaluation_samples": 1}, False),
        ({"evaluate": False}, False),
    ],
)
def test_another_call_begins_anew(
    quantize: Quantize, begun: Path, tmp_path: Path, change: dict[str, Any], resumes: bool
) -> None:
    shutil.copytree(begun, tmp_path / begun.name)
    with pytest.raises(Interrupted):
        quantize(tmp_path / "bundle", phases=stopping_at("calibrate", "visual.stem"), **change)
    assert finished(tmp_path / "bundle") == (STAGES[:2] if resumes else [])


def test_another_checkpoint_begins_anew(quantize: Quantize, begun: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Told by sizes and times of its files: nothing of it is read for that."""
    shutil.copytree(begun, tmp_path / begun.name)
    weights = checkpoint / "model.safetensors"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    try:
        with pytest.raises(Interrupted):
            quantize(tmp_path / "bundle", phases=stopping_at("calibrate", "visual.stem"))
    finally:
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert finished(tmp_path / "bundle") == []


# Killed.

# Quantises argv[1] to argv[2] on argv[3], and says so and stands still at a phase and label.
QUANTIZE_AND_WAIT = """
import sys, time
from contextlib import contextmanager
import onevision_edge
from onevision_edge.calibration.recipe import Methods
from onevision_edge.precision.plan import Plan
import json

@contextmanager
def phases(title, unit):
    def report(done, total, label):
        if title == sys.argv[4] and label.startswith(sys.argv[5]):
            print("midway", flush=True)
            time.sleep(60)
    yield report

options = {"calibration": sys.argv[3], "evaluation": sys.argv[3], "max_length": 64, "threads": 1, "phases": phases}
plan = Plan.from_dict(json.loads(sys.argv[6]))
onevision_edge.quantize(sys.argv[1], sys.argv[2], plan=plan, methods=Methods(samples=16), **options)
"""
MOMENTS = [
    ("calibrate", "model.layers.1", STAGES[:7]),
    ("write", "model.layers.2.mlp", STAGES),
    ("evaluate", "d_video", STAGES),
]


def standing_at(
    python: Start, checkpoint: Path, output: Path, rows: Path, phase: str, label: str
) -> subprocess.Popen[str]:
    """A process that has come so far."""
    process = python(QUANTIZE_AND_WAIT, checkpoint, output, rows, phase, label, json.dumps(PLAN.to_dict()))
    assert process.stdout is not None
    assert process.stdout.readline() == "midway\n"
    return process


def not_bundles(directory: Path) -> None:
    for path in directory.iterdir():
        with pytest.raises(OneVisionError):
            Bundle.open(path)


def test_killed_again_and_again(
    python: Start, quantize: Quantize, checkpoint: Path, rows: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """In the decoder, in the middle of writing, in the middle of measuring: each time it goes on."""
    output = tmp_path / "bundle"
    for phase, label, done in MOMENTS:
        process = standing_at(python, checkpoint, output, rows, phase, label)
        assert finished(output) == done
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        not_bundles(tmp_path)
    assert contents(quantize(output).directory) == undisturbed
    assert list(tmp_path.iterdir()) == [output]


def test_two_to_one_place(python: Start, quantize: Quantize, checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    """The second is told so, whatever it asks for, and takes nothing from the first."""
    output = tmp_path / "bundle"
    process = standing_at(python, checkpoint, output, rows, "calibrate", "visual.blocks.1")
    for change in ({}, {"seed": 3}):
        with pytest.raises(OneVisionError, match="another process is quantising to this place; wait for it to end"):
            quantize(output, **change)
    assert process.poll() is None
    assert finished(output) == STAGES[:2]
    with pytest.raises(Interrupted):  # beside it there is room
        quantize(tmp_path / "another", phases=stopping_at("calibrate", "visual.stem"))


INTERRUPTED_COMMAND = """
import sys, time
from onevision_edge.calibration.walk import Walk
from onevision_edge.cli import main

def report(walk, label, share):
    if label == "model.layers.1":
        print("midway", flush=True)
        time.sleep(60)

Walk._report = report
main(sys.argv[1:])
"""


def test_the_command_interrupted_from_the_keyboard(python: Start, checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    options = ["--precision", "int8-weight", "--calibration", rows, "--evaluation", rows]
    process = python(INTERRUPTED_COMMAND, "quantize", checkpoint, "-o", tmp_path / "bundle", *options)
    assert process.stdout is not None
    assert process.stdout.readline() == "midway\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert err.strip().endswith("Aborted!")
    assert "Traceback" not in err
    assert finished(tmp_path / "bundle") == STAGES[:7]
    assert os.listdir(tmp_path) == [".bundle.quantizing"]


# Full disks.


@pytest.fixture
def small_disk(mounted: Callable[[str], Path]) -> Path:
    return mounted("2m")


def test_disks_that_fill_up(
    quantize: Quantize, undisturbed: dict[str, bytes], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more and more room, never enough: one sentence each time, each goes on from the last, nothing half-done."""
    monkeypatch.setattr("onevision_edge.bundle._check_space", lambda *_: None)
    other, output, reached = small_disk / "other", small_disk / "bundle", []
    for room in (20, 150, 300, 450, 600):  # kB
        used = sum(path.stat().st_blocks * 512 for path in small_disk.glob(".*/*"))
        other.write_bytes(bytes(max(0, 2048 * 1024 - used - room * 1024)))
        with pytest.raises(OneVisionError, match="the disk is full") as caught:
            quantize(output)
        assert "\n" not in str(caught.value)
        assert {path.name for path in small_disk.iterdir()} <= {"other", ".bundle.quantizing"}
        reached.append(len(finished(output)))
    other.unlink()
    assert reached == sorted(reached)
    assert reached[0] < 3
    assert reached[-1] == len(STAGES)
    assert contents(quantize(output).directory) == undisturbed


def test_a_disk_known_to_be_too_small_for_the_bundle(quantize: Quantize, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(1_200_000))
    with pytest.raises(OneVisionError, match=r"the bundle needs .* MB, the disk has .* MB free"):
        quantize(small_disk / "bundle")
    assert finished(small_disk / "bundle") == STAGES
