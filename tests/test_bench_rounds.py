"""Who runs when: fresh starts and rounds in turn, the same seeds for all, nobody left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.metrics import Request
from onevision_edge.report.latency.process import Contender
from onevision_edge.report.latency.rounds import Schedule, measure

CELLS = [Cell(None, 8, 4), Cell(None, 16, 4)]
A, B, C = (Contender(name, "bundle", ()) for name in "abc")


@dataclass
class Script:
    """Everything that happened, and where it goes wrong."""

    lines: list[tuple[Any, ...]] = field(default_factory=list)
    fails_at: tuple[Any, ...] | None = None
    opened: int = 0

    def start(self, contender: Contender, cells: Sequence[Cell]) -> "Answers":
        self.opened += 1
        self.note("start", contender.name)
        return Answers(self, contender.name)

    def note(self, *line: Any) -> None:
        self.lines.append(line)
        if line == self.fails_at:
            raise OneVisionError("as the script says")


class Answers:
    start, load, peak = 0.5, 0.25, 1000

    def __init__(self, script: Script, name: str) -> None:
        self.script, self.name = script, name
        self.subject = {"name": name, "notes": []}

    def request(self, cell: Cell, seed: int) -> Request:
        self.script.note("request", self.name, cell.prompt_tokens, cell.output_tokens, seed)
        return Request(0.0, {}, [[0.1 * (i + 1) for i in range(cell.output_tokens)]], cell.prompt_tokens)

    def profile(self, cell: Cell, seed: int) -> dict[str, Any]:
        self.script.note("profile", self.name)
        return {"seconds": 1.0}

    def device(self) -> None:
        return None

    def close(self) -> None:
        self.script.opened -= 1
        self.script.lines.append(("close", self.name))


def test_rounds_are_in_turn_and_share_their_seeds() -> None:
    script = Script()
    found = measure([A, B, C], CELLS, Schedule(rounds=2, warmup=1, seed=7), start=script.start)
    requests = [line[1:] for line in script.lines if line[0] == "request" and line[3] == 4]
    warm, first, second = requests[:6], requests[6:12], requests[12:]
    assert warm == [(name, tokens, 4, 7) for tokens in (8, 16) for name in "abc"]
    assert first == [(name, tokens, 4, 7) for tokens in (8, 16) for name in "abc"]
    assert second == [(name, tokens, 4, 8) for tokens in (8, 16) for name in "bca"]
    assert [[len(requests) for requests in samples.requests.values()] for samples in found] == [[2, 2]] * 3
    assert script.opened == 0


@pytest.mark.parametrize(("rounds", "starts"), [(1, 1), (2, 2), (9, 3)])
def test_cold_starts_are_fresh_processes_with_one_token(rounds: int, starts: int) -> None:
    script = Script()
    found = measure([A, B], CELLS, Schedule(rounds=rounds), start=script.start)
    begun = [line for line in script.lines if line[0] == "start"]
    assert begun == [("start", "a"), ("start", "b")] * starts
    assert all(len(samples.cold) == starts for samples in found)
    assert script.lines[1] == ("request", "a", 8, 1, 0)
    cold = found[0].cold[0]
    assert (cold.start, cold.load, cold.first_token) == (0.5, 0.25, pytest.approx(0.1))
    alive = [line for line in script.lines[: 3 * 2 * starts] if line[0] == "close"]
    assert len(alive) == 2 * (starts - 1)  # all but the last of each were closed before the rounds


def test_profiles_come_last() -> None:
    script = Script()
    found = measure([A, B], CELLS, Schedule(rounds=1, profile=True), start=script.start)
    kinds = [line[0] for line in script.lines]
    assert kinds[-4:] == ["profile", "profile", "close", "close"]
    assert [samples.profile for samples in found] == [{"seconds": 1.0}] * 2


def test_a_profile_that_fails_costs_nothing_else() -> None:
    script = Script(fails_at=("profile", "a"))
    found = measure([A, B], CELLS, Schedule(rounds=1, profile=True), start=script.start)
    assert found[0].profile is None
    assert found[0].subject["notes"] == ["no profile: as the script says"]
    assert found[1].profile == {"seconds": 1.0}


@pytest.mark.parametrize("fails_at", [("start", "b"), ("request", "b", 8, 1, 0), ("request", "a", 16, 4, 1)])
def test_a_failure_leaves_nobody_behind(fails_at: tuple[Any, ...]) -> None:
    script = Script(fails_at=fails_at)
    with pytest.raises(OneVisionError, match="as the script says"):
        measure([A, B], CELLS, Schedule(rounds=2), start=script.start)
    assert script.opened == (1 if fails_at[0] == "start" else 0)  # a start that fails gives nothing to close


def test_progress_counts_every_step() -> None:
    seen: list[tuple[int, int]] = []
    schedule = Schedule(rounds=2, warmup=1)
    measure([A, B], CELLS, schedule, lambda done, total, label: seen.append((done, total)), Script().start)
    assert seen == [(i, 2 * (2 + 3 * 2)) for i in range(2 * (2 + 3 * 2))]
