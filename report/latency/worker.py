"""One subject in a process of its own: a job and then requests come on stdin as JSON lines, each has its answer.

The job names the runner; its answer tells seconds of the process' start and of loading, and the subject. A request
names a method of the runner and its arguments. An answer has the result and the most memory, in bytes, that was
resident until then, or what went wrong. What libraries print goes to stderr.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, TextIO

from ...errors import OneVisionError
from ...runtime.memory import process_field
from .cells import Cell
from .metrics import Request

BUNDLE = "bundle"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Serve until stdin ends, or the one that asks does."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent dies, since one that is stopped does not see its stdin end."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Load the subject of the first line and answer the others."""
    job = json.loads(requests.readline())
    runner: list[Any] = []
    print(answer(lambda: _load(job, runner)), file=answers, flush=True)
    for line in requests if runner else ():
        request = json.loads(line)
        print(answer(lambda request=request: _call(runner[0], request)), file=answers, flush=True)  # type: ignore[misc]


def answer(action: Callable[[], Any]) -> str:
    """A line: what came of a call. The user's mistakes and a lack of memory are told; the rest ends the process."""
    try:
        result = action()
    except OneVisionError as error:
        return json.dumps({"error": str(error)})
    except MemoryError:
        return json.dumps({"error": "out of memory: use a smaller batch, image or length"})
    return json.dumps({"result": result, "peak": process_field("VmHWM") or 0})


def _load(job: dict[str, Any], runner: list[Any]) -> dict[str, Any]:
    kind = runner_of(job["kind"])
    started = monotonic()
    runner.append(kind(*job["arguments"]))
    loaded = monotonic()
    subject = runner[0].subject([Cell.from_dict(cell) for cell in job["cells"]])
    return {"process_start": started - job["spawned"], "load": loaded - started, "subject": subject}


def _call(runner: Any, request: dict[str, Any]) -> Any:
    arguments = [Cell.from_dict(a) if isinstance(a, dict) else a for a in request["arguments"]]
    result = getattr(runner, request["method"])(*arguments)
    return result.to_dict() if isinstance(result, Request) else result


def runner_of(kind: str) -> Callable[..., Any]:
    """What loads a subject of a kind: a bundle, or a peer. What it needs is imported."""
    if kind == BUNDLE:
        from .bundle import BundleRunner

        return BundleRunner
    from .peers import PEERS

    return PEERS[kind].load
