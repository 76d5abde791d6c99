"""The runs: load, one at a time, memory, clients that leave, a full queue, an end under load."""

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import httpx
import numpy as np

from .client import Reply, ask, ask_all
from .figures import latency, outcome, rates, slope, spread
from .process import ServerProcess
from .questions import Question, Questions

Report = dict[str, Any]
RUNNING, WAITING = "onevision_edge_requests_running", "onevision_edge_requests_waiting"
CANCELLED = "onevision_edge_requests_cancelled_total"


async def load(server: ServerProcess, questions: Sequence[Question], concurrency: int) -> tuple[Report, list[Reply]]:
    """All questions, so many at a time."""
    async with server.client() as client:
        started = perf_counter()
        replies = await ask_all(client, questions, concurrency)
        seconds = perf_counter() - started
    kinds = {reply.question.kind for reply in replies}
    by_kind = {kind: latency([r for r in replies if r.question.kind == kind]) for kind in sorted(kinds)}
    record = {"concurrency": concurrency, **outcome(replies), **rates(replies, seconds), **latency(replies)}
    return {**record, "kinds": by_kind}, replies


async def rounds(
    server: ServerProcess, draw: Callable[[int], Sequence[Question]], count: int, concurrency: int, times: int
) -> Report:
    """One at a time and so many at a time, in turns, fresh questions of the same kinds in each."""
    found: dict[int, list[dict[str, float]]] = {1: [], concurrency: []}
    faults: list[Reply] = []
    async with server.client() as client:
        for i in range(times):
            for width in (1, concurrency) if i % 2 == 0 else (concurrency, 1):
                questions, started = draw(count), perf_counter()
                replies = await ask_all(client, questions, width)
                found[width].append(rates(replies, perf_counter() - started))
                faults += [reply for reply in replies if not reply.answered]
    pairs = list(zip(found[1], found[concurrency], strict=True))
    return {
        "rounds": times,
        "questions": count,
        "lost": len(faults),
        "one": spread([one["tokens"] for one, _ in pairs]),
        "many": spread([many["tokens"] for _, many in pairs]),
        "tokens_ratio": spread([many["tokens"] / one["tokens"] for one, many in pairs]),
        "answers_ratio": spread([many["answers"] / one["answers"] for one, many in pairs]),
    }


async def memory(server: ServerProcess, minutes: float, concurrency: int, seed: int, warm: float = 0.3) -> Report:
    """Load for so long, with memory sampled every second. The first share `warm` is left out of the slope."""
    began, samples = perf_counter(), list[tuple[float, int, int, int]]()
    ends = began + 60 * minutes

    async def sample() -> None:
        while perf_counter() < ends:
            minute = (perf_counter() - began) / 60
            samples.append((minute, server.resident(), server.open_files(), server.threads()))
            await asyncio.sleep(1)

    async with server.client() as client:
        asked = ask_all(client, Questions(seed).forever(), concurrency, ends)
        replies, _ = await asyncio.gather(asked, sample())
    kept = [one for one in samples if one[0] >= warm * minutes] or samples
    steepness, error = slope([one[0] for one in kept], [one[1] / 1e6 for one in kept])
    return {
        "minutes": minutes,
        **outcome(replies),
        "megabytes": {"begin": samples[0][1] / 1e6, "kept": kept[0][1] / 1e6, "end": samples[-1][1] / 1e6},
        "most_megabytes": max(one[1] for one in samples) / 1e6,
        "megabytes_per_minute": steepness,
        "uncertainty": error,
        "open_files": {"begin": samples[0][2], "end": samples[-1][2]},
        "threads": {"begin": samples[0][3], "end": samples[-1][3]},
    }


async def leaving(server: ServerProcess, count: int, concurrency: int, seed: int) -> tuple[Report, list[Reply]]:
    """Of so many long answers every second one's client hangs up after 1 to 5 pieces; the others lose nothing."""
    drawn, random = Questions(seed), np.random.default_rng(seed)
    plan = [(drawn.long(400), int(random.integers(1, 6)) if i % 2 else None) for i in range(count)]
    before, waiting, replies = server.metrics()[CANCELLED], iter(plan), list[tuple[Reply, bool]]()
    async with server.client() as client:

        async def work() -> None:
            for question, leave_after in waiting:
                replies.append((await ask(client, question, leave_after), leave_after is not None))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = await _idle(server)
    stayed = [reply for reply, left in replies if not left]
    gone = sum(left and not reply.done for reply, left in replies)
    cancelled = server.metrics()[CANCELLED] - before
    record = {"left": gone, "cancelled": cancelled, "idle_after_seconds": seconds, **outcome(stayed)}
    return record, stayed


async def flood(server: ServerProcess, count: int, seed: int) -> tuple[Report, list[Reply]]:
    """So many questions at once, more than the queue holds; then one more, which is answered."""
    drawn = Questions(seed)
    async with server.client() as client:
        replies = await ask_all(client, drawn.take(count), count)
        later = await ask(client, drawn.long(8))
    refused = [reply for reply in replies if reply.status == 429]
    waits = [reply.retry_after for reply in refused]
    record = {
        **outcome(replies),
        "with_retry_after": sum(wait is not None and wait.isdecimal() and int(wait) >= 1 for wait in waits),
        "refused_within_ms": 1000 * max((reply.seconds for reply in refused), default=0.0),
        "answered_later": later.answered,
    }
    return record, [reply for reply in replies if reply.answered]


async def ending(server: ServerProcess, count: int, seed: int) -> tuple[Report, list[Reply]]:
    """SIGTERM with so many answers under way: they are finished, new questions get 503, and the process exits 0."""
    drawn = Questions(seed)
    async with server.client() as client:
        asked = [asyncio.create_task(ask(client, drawn.long(400))) for _ in range(count)]
        await _running(server, count)
        server.terminate()
        signalled = perf_counter()
        await asyncio.sleep(0.05)
        reused = await ask(client, drawn.long(8))
        async with server.client() as other:
            fresh, health = await ask(other, drawn.long(8)), await _status(other, "/health")
        under_way = sum(not task.done() for task in asked)
        replies = await asyncio.gather(*asked)
        last = perf_counter()
    code = await asyncio.to_thread(server.exit_code, 60)
    record = {
        **outcome(replies),
        "under_way_at_503": under_way,
        "new": {"reused": reused.status, "fresh": fresh.status, "health": health},
        "exit_code": code,
        "seconds": {"answers": last - signalled, "exit": perf_counter() - signalled},
    }
    return record, replies


async def _status(client: httpx.AsyncClient, path: str) -> int:
    try:
        return (await client.get(path)).status_code
    except httpx.TransportError:
        return 0


async def _running(server: ServerProcess, count: int, seconds: float = 30.0) -> None:
    """Wait until so many answers are under way."""
    ends = perf_counter() + seconds
    while perf_counter() < ends:
        if (await asyncio.to_thread(server.metrics))[RUNNING] >= count:
            return
        await asyncio.sleep(0.02)
    raise RuntimeError(f"{count} answers were not under way within {seconds:g} s")


async def _idle(server: ServerProcess, seconds: float = 30.0) -> float:
    """Seconds until nothing is running or waiting."""
    began = perf_counter()
    while perf_counter() - began < seconds:
        found = await asyncio.to_thread(server.metrics)
        if found[RUNNING] == found[WAITING] == 0:
            return perf_counter() - began
        await asyncio.sleep(0.02)
    raise RuntimeError(f"the server was not idle within {seconds:g} s of its last client")
