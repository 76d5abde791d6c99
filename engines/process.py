"""The process that builds one engine (worker.py): started, listened to, stopped, and its end told in a sentence."""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from ..bundle import Progress, no_progress
from ..errors import OneVisionError

LOG = logging.getLogger(__name__)
_LEVELS = {"INTERNAL_ERROR": logging.INFO, "ERROR": logging.INFO, "WARNING": logging.INFO, "INFO": logging.DEBUG}
_GRACE = 20.0  # seconds that a build has to stop by itself


def run_worker(job: dict[str, Any], report: Progress = no_progress) -> dict[str, Any]:
    """Build one engine in a process of its own (see worker.py); returns what it says at the end.

    An interrupt ends that process, too. Raises OneVisionError, or OSError where the disk fails.
    """
    package = __name__.rsplit(".", 2)[0]
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {package}.engines.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,  # the terminal's Ctrl-C comes to us, and we end it
    )
    assert process.stdin is not None
    assert process.stdout is not None
    noise: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_drain, args=(process.stderr, noise), daemon=True)
    reader.start()
    last: dict[str, Any] = {}
    try:
        with suppress(BrokenPipeError):  # it died before it read its job; how, is told below
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            last = json.loads(line)
            if "progress" in last:
                report(*last["progress"])
            elif "log" in last:
                severity, message = last["log"]
                LOG.log(_LEVELS.get(severity, logging.DEBUG), "%s", message)
        process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        reader.join(1)
    return _outcome(job, last, process.returncode, noise)


def _drain(stream: Any, lines: "queue.SimpleQueue[str]") -> None:
    """What the library prints by itself is logged, and kept for a death without a word."""
    with stream:
        for line in stream:
            LOG.info("%s", line.rstrip())
            lines.put(line)


def _stop(process: "subprocess.Popen[str]") -> None:
    """End a build: by the end of its input first, at the next step of its progress; else by force."""
    with suppress(BrokenPipeError, ValueError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcome(
    job: dict[str, Any], last: dict[str, Any], returncode: int, noise: "queue.SimpleQueue[str]"
) -> dict[str, Any]:
    if "done" in last:
        return dict(last["done"])
    if "error" in last:
        raise OneVisionError(last["error"])
    if "os_error" in last:
        raise OSError(*last["os_error"], job["output"])
    lines = []
    while not noise.empty():
        lines.append(noise.get().strip())
    said = f" ({lines[-1]})" if lines else ""
    if returncode == -9:
        said = ": it was killed, as the system does when memory runs out"
    raise OneVisionError(f"the build of the {job['part']} engine ended with status {returncode}{said}")
