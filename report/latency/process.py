"""A subject's process as the one that asks sees it: started, stopped but while it answers, ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from ...errors import OneVisionError
from .cells import Cell
from .metrics import Request


@dataclass(frozen=True, slots=True)
class Contender:
    """What is to be timed. name: no other's. kind: bundle, or a peer of peers.PEERS. arguments: of its runner."""

    name: str
    kind: str
    arguments: tuple[Any, ...]


class Process:
    """A contender, loaded in a process of its own, which stands still while others are timed.

    start: seconds from the start of the process until it loads; load: seconds of that. Raises OneVisionError.
    """

    def __init__(self, contender: Contender, cells: Sequence[Cell]) -> None:
        self.contender, self.peak = contender, 0
        package = __name__.rsplit(".", 3)[0]
        job = {"kind": contender.kind, "arguments": contender.arguments, "cells": [cell.to_dict() for cell in cells]}
        spawned = monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {package}.report.latency.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            process_group=0,  # the terminal's Ctrl-C comes to us alone, and we end it
        )
        try:
            found = self._exchange({**job, "spawned": spawned})
        except BaseException:
            self.close()
            raise
        self.subject: dict[str, Any] = found["subject"]
        self.start, self.load = float(found["process_start"]), float(found["load"])
        self._signal(signal.SIGSTOP)

    def request(self, cell: Cell, seed: int) -> Request:
        """One request of a cell."""
        return Request(**self._ask("request", cell.to_dict(), seed))

    def profile(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """Where the time of one request goes; None of a peer."""
        found: dict[str, Any] | None = self._ask("profile", cell.to_dict(), seed)
        return found

    def device(self) -> dict[str, float] | None:
        """Memory and power of the GPU, where the contender runs on one."""
        found: dict[str, float] | None = self._ask("device")
        return found

    def close(self) -> None:
        """End the process."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _ask(self, method: str, *arguments: Any) -> Any:
        self._signal(signal.SIGCONT)
        try:
            return self._exchange({"method": method, "arguments": arguments})
        finally:
            self._signal(signal.SIGSTOP)

    def _exchange(self, message: dict[str, Any]) -> Any:
        """Send a line and return the result of its answer. Raises OneVisionError with what went wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # its end is told below
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OneVisionError(f"{self.contender.name}: {_end(self._process.wait())}")
        answer = json.loads(line)
        if "error" in answer:
            raise OneVisionError(f"{self.contender.name}: {answer['error']}")
        self.peak = max(self.peak, int(answer["peak"]))
        return answer["result"]

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


def _end(status: int) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out"
    return f"its process ended with status {status}; what it said is above"
