"""Subjects timed in turn: each starts afresh a few times, then all answer the same requests, round by round.

On a machine that others use, a number alone says little: what disturbs one subject in a round disturbs its neighbours
in the same round, so that ratios within a round hold where absolute times do not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ...bundle import Progress, no_progress
from ...errors import OneVisionError
from .cells import Cell
from .metrics import Request
from .process import Contender, Process

COLD_STARTS = 3


class Answering(Protocol):
    """A contender that answers requests, as Process does."""

    subject: dict[str, Any]
    start: float
    load: float
    peak: int

    def request(self, cell: Cell, seed: int) -> Request:
        """One request of a cell."""

    def profile(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """Where the time of one request goes."""

    def device(self) -> dict[str, float] | None:
        """Memory and power of the GPU."""

    def close(self) -> None:
        """End it."""


Start = Callable[[Contender, Sequence[Cell]], Answering]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often what is done. Requests of round n have the seed `seed` + n, for all subjects alike."""

    rounds: int = 5
    warmup: int = 1
    seed: int = 0
    profile: bool = False

    @property
    def cold_starts(self) -> int:
        """Fresh processes of each subject; the last one answers the rounds."""
        return min(COLD_STARTS, self.rounds)


@dataclass(slots=True)
class ColdStart:
    """Seconds of a fresh process: until it loads, of loading, and of its first request until the first token."""

    start: float
    load: float
    first_token: float


@dataclass(slots=True)
class Samples:
    """What was measured of one contender: requests by cell, one a round."""

    contender: Contender
    subject: dict[str, Any] = field(default_factory=dict)
    cold: list[ColdStart] = field(default_factory=list)
    requests: dict[Cell, list[Request]] = field(default_factory=dict)
    peak: int = 0
    device: dict[str, float] | None = None
    profile: dict[str, Any] | None = None


def measure(
    contenders: Sequence[Contender],
    cells: Sequence[Cell],
    schedule: Schedule,
    progress: Progress = no_progress,
    start: Start = Process,
) -> list[Samples]:
    """All contenders timed on all cells, in turn. Raises OneVisionError; no process is left behind."""
    found = [Samples(contender, requests={cell: [] for cell in cells}) for contender in contenders]
    count = _Count(progress, _total(found, cells, schedule))
    with ExitStack() as stack:
        running = _start_all(found, cells, schedule, start, stack, count)
        for _ in range(schedule.warmup):
            for samples, cell in turns(found, cells, 0):
                count(f"{samples.contender.name}, warm-up")
                running[samples.contender.name].request(cell, schedule.seed)
        for number in range(schedule.rounds):
            for samples, cell in turns(found, cells, number):
                count(f"{samples.contender.name}, round {number + 1}: {cell.name}")
                request = running[samples.contender.name].request(cell, schedule.seed + number)
                samples.requests[cell].append(request)
        _finish(found, running, cells[0], schedule)
    return found


def turns(found: Sequence[Samples], cells: Sequence[Cell], number: int) -> Iterator[tuple[Samples, Cell]]:
    """One round: cell by cell, all contenders, each round beginning with another one."""
    first = number % len(found)
    for cell in cells:
        yield from ((samples, cell) for samples in (*found[first:], *found[:first]))


def _start_all(
    found: Sequence[Samples],
    cells: Sequence[Cell],
    schedule: Schedule,
    start: Start,
    stack: ExitStack,
    count: "_Count",
) -> Mapping[str, Answering]:
    """Fresh processes in turn; the last of each contender stays, by its name."""
    running: dict[str, Answering] = {}
    short = replace(cells[0], output_tokens=1)
    for number in range(schedule.cold_starts):
        for samples in found:
            count(f"{samples.contender.name}, start {number + 1}")
            with ExitStack() as own:
                process = start(samples.contender, cells)
                own.callback(process.close)
                first = process.request(short, schedule.seed)
                samples.cold.append(ColdStart(process.start, process.load, first.tokens[0][0]))
                samples.subject = process.subject
                if number == schedule.cold_starts - 1:
                    running[samples.contender.name] = process
                    stack.push(own.pop_all())
    return running


def _finish(found: Sequence[Samples], running: Mapping[str, Answering], cell: Cell, schedule: Schedule) -> None:
    """What is known at the end; a profile comes last, since it takes memory of its own."""
    for samples in found:
        process = running[samples.contender.name]
        samples.device, samples.peak = process.device(), process.peak
        if not schedule.profile:
            continue
        try:
            samples.profile = process.profile(cell, schedule.seed)
        except OneVisionError as error:  # what was timed counts without
            samples.subject["notes"].append(f"no profile: {error}")


def _total(found: Sequence[Samples], cells: Sequence[Cell], schedule: Schedule) -> int:
    return len(found) * (schedule.cold_starts + (schedule.warmup + schedule.rounds) * len(cells))


class _Count:
    """Progress by steps."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, label: str) -> None:
        self._progress(self._done, self._total, label)
        self._done += 1
