"""Subjects in processes of their own: what they answer, and how their end is told."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.latency.bench import bundle_contender
from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.process import Process

CELL = Cell((56, 56), 5, 3)


@pytest.fixture
def process(golden_bundle: Callable[[str], Path]) -> Iterator[Process]:
    found = Process(bundle_contender(golden_bundle("fp32"), "golden", 1), [CELL])
    yield found
    found.close()


def state(process: Process) -> str:
    """Of the process, as the system has it: T is stopped."""
    return Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_answers_and_stands_still(process: Process) -> None:
    assert process.start > 0
    assert process.load > 0
    assert process.subject["name"] == "golden"
    before = process.peak
    found = process.request(CELL, 0)
    assert (len(found.tokens), len(found.tokens[0]), found.input_tokens) == (1, 3, 4 + 5)
    assert process.peak >= before > 10_000_000
    assert process.device() is None
    os.waitid(os.P_PID, process._process.pid, os.WSTOPPED | os.WNOWAIT)
    assert state(process) == "T"


def test_a_mistake_is_told_and_the_process_goes_on(process: Process) -> None:
    with pytest.raises(OneVisionError, match=r"^golden: no image, 999 tokens, 1 out, batch 1: 999 tokens"):
        process.request(Cell(None, 999, 1), 0)
    assert len(process.request(CELL, 0).tokens[0]) == 3


def test_its_death_is_told(process: Process) -> None:
    process._process.send_signal(signal.SIGKILL)
    with pytest.raises(OneVisionError, match="golden: its process was killed"):
        process.request(CELL, 0)


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(OneVisionError, match=r"lost: .*does not exist"):
        Process(bundle_contender(tmp_path / "none", "lost"), [CELL])


def test_it_ends_with_the_one_that_asks(
    python: Callable[..., "subprocess.Popen[str]"], golden_bundle: Callable[[str], Path]
) -> None:
    """Killed outright, so that nothing can be cleaned up; the process was standing still."""
    program = """
import sys, time
from pathlib import Path
from onevision_edge.report.latency.process import Process
from onevision_edge.report.latency.bench import bundle_contender
process = Process(bundle_contender(Path(sys.argv[1]), "golden", 1), [])
print(process._process.pid, flush=True)
time.sleep(60)
"""
    parent = python(program, golden_bundle("fp32"))
    assert parent.stdout is not None
    stat = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    assert stat.exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline
        time.sleep(0.05)
