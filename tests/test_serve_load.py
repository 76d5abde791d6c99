"""The load runs: their arithmetic, their client, and each of them on a fake server."""

import asyncio
import json
import math
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="the load runs ask with httpx: pip install 'onevision-edge[serve]'")

FAKE = Path(__file__).parent / "load_fake.py"


@pytest.fixture(scope="module")
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    """benchmarks/serve_load.py"""
    return script("benchmarks/serve_load.py")


@pytest.fixture(scope="module")
def part(bench: ModuleType) -> Callable[[str], ModuleType]:
    """A module of benchmarks/serve."""
    return lambda name: sys.modules[f"serve.{name}"]


@pytest.fixture
def server(bench: ModuleType) -> Iterator[Callable[..., Any]]:
    """Starts fake servers, which end with the test."""
    started: list[Any] = []

    def start(*options: str) -> Any:
        started.append(bench.ServerProcess([sys.executable, str(FAKE), *options], 20))
        return started[-1]

    yield start
    for one in started:
        one.__exit__(None, None, None)


def reply(bench: ModuleType, first: float = 0.1, gaps: tuple[float, ...] = (), **changes: Any) -> Any:
    question = bench.Questions()._small()
    made = bench.Reply(question, started=10.0, status=200, finish_reason="stop", done=True, seconds=1.0)
    made.arrivals = [10.0 + first + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    made.usage = {"completion_tokens": 5}
    for name, value in changes.items():
        setattr(made, name, value)
    return made


# Arithmetic.


def test_percentiles_are_in_milliseconds(part: Callable[[str], ModuleType]) -> None:
    found = part("figures").percentiles([i / 1000 for i in range(101)])
    assert found == pytest.approx({"p50": 50, "p95": 95, "max": 100})
    assert math.isnan(part("figures").percentiles([])["p95"])


def test_latency_counts_answers_alone(bench: ModuleType, part: Callable[[str], ModuleType]) -> None:
    replies = [reply(bench, 0.1, (0.01, 0.03)), reply(bench, 0.3), reply(bench, 9.0, (9.0,), fault="broken")]
    found = part("figures").latency(replies)
    assert found["first"] == pytest.approx({"p50": 200, "p95": 290, "max": 300})
    assert found["gap"] == pytest.approx({"p50": 20, "p95": 29, "max": 30})
    assert math.isnan(found["token"]["p50"])
    replies = [reply(bench, 0.1, (0.0, 0.08), usage={"completion_tokens": n}) for n in (9, 17, 8)]
    assert part("figures").latency(replies)["token"] == pytest.approx({"p50": 7.5, "p95": 9.75, "max": 10})


def test_rates_and_outcomes(bench: ModuleType, part: Callable[[str], ModuleType]) -> None:
    replies = [
        reply(bench),
        reply(bench),
        reply(bench, status=429, done=False, fault="the queue is full"),
        reply(bench, done=False, fault=None),
        reply(bench, status=0, fault="ReadError: "),
    ]
    figures = part("figures")
    assert figures.rates(replies, 4.0) == {"answers": 0.5, "tokens": 2.5, "seconds": 4.0}
    found = figures.outcome(replies)
    assert {name: found[name] for name in ("asked", "answered", "refused", "lost")} == {
        "asked": 5,
        "answered": 2,
        "refused": 1,
        "lost": 2,
    }
    assert found["faults"] == ["0 one image: ReadError: ", "200 one image: None"]


def test_the_slope_of_a_line_is_exact(part: Callable[[str], ModuleType]) -> None:
    minutes = [i / 60 for i in range(600)]
    steepness, error = part("figures").slope(minutes, [300 + 2.5 * m for m in minutes])
    assert steepness == pytest.approx(2.5)
    assert error == pytest.approx(0, abs=1e-6)


def test_noise_has_a_slope_of_nothing(part: Callable[[str], ModuleType]) -> None:
    minutes = [i / 60 for i in range(600)]
    steepness, error = part("figures").slope(minutes, [300 + 5 * (-1) ** (i // 50) for i in range(600)])
    assert abs(steepness) < error
    assert 0 < error < 2
    assert all(math.isnan(value) for value in part("figures").slope([0.0], [1.0]))


def test_ratios_have_a_range(part: Callable[[str], ModuleType]) -> None:
    assert part("figures").spread([2.0, 1.0, 4.0]) == {"median": 2.0, "least": 1.0, "most": 4.0}


def test_samples_of_metrics(part: Callable[[str], ModuleType]) -> None:
    text = '# HELP a b\n# TYPE a gauge\na 3.0\nb{kind="x"} 4\nc_total 1e3\n'
    assert part("process").samples(text) == {"a": 3.0, "c_total": 1000.0}


# Questions.


def test_questions_are_of_all_kinds_and_no_image_comes_twice(bench: ModuleType) -> None:
    asked = bench.Questions(1).take(30)
    kinds = {"one image", "a large image", "several images", "text alone", "long", "JSON"}
    assert {question.kind for question in asked} == kinds
    images = [image for question in asked for image in question.images]
    assert len(set(images)) == len(images) == 30
    assert {len(question.images) for question in asked if question.kind == "several images"} == {2}
    widths = {kind: [_width(q) for q in asked if q.kind == kind] for kind in ("one image", "a large image")}
    assert min(widths["a large image"]) > 200
    assert min(widths["one image"]) < 200
    assert [q.images for q in bench.Questions(1).take(6)] == [q.images for q in bench.Questions(1).take(6)]


def _width(question: Any) -> int:
    return Image.open(BytesIO(question.images[0])).width


def test_a_question_is_the_same_for_the_server_and_the_runtime(bench: ModuleType) -> None:
    for question in bench.Questions(2).take(6):
        (sent,), (own,) = question.body()["messages"], question.messages()
        urls = [part["image_url"]["url"] for part in sent["content"] if part["type"] == "image_url"]
        assert urls == [part["image"] for part in own["content"] if part["type"] == "image"] == question.urls()
        assert sent["content"][-1] == own["content"][-1] == {"type": "text", "text": question.prompt}
        assert question.body()["stream_options"] == {"include_usage": True}
        assert ("response_format" in question.body()) == (question.kind in ("JSON", "long"))


# The client.


def ask(part: Callable[[str], ModuleType], lines: list[str], leave_after: int | None = None, **response: Any) -> Any:
    """One question to a transport that says `lines`."""

    async def said() -> Any:
        for line in lines:
            if line == "broken":
                raise httpx.ReadError("gone")
            yield f"data: {line}\n\n".encode()

    async def asked() -> Any:
        content = response.get("content") or said()
        transport = httpx.MockTransport(
            lambda _: httpx.Response(**{"status_code": 200, **response, "content": content})
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
            question = part("questions").Questions()._small()
            return await part("client").ask(client, question, leave_after)

    return asyncio.run(asked())


def piece(text: str | None, finish_reason: str | None = None) -> str:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"delta": delta, "finish_reason": finish_reason}], "usage": None})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 2}})


def test_an_answer_is_its_pieces(part: Callable[[str], ModuleType]) -> None:
    found = ask(part, [piece(""), piece("a"), piece("b"), piece(None, "stop"), USAGE, "[DONE]"])
    assert (found.text, found.finish_reason, found.tokens, found.answered) == ("ab", "stop", 2, True)
    assert len(found.arrivals) == 2
    assert found.started <= found.arrivals[0] <= found.arrivals[1] <= found.started + found.seconds


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([piece("a"), "broken"], "ReadError: gone"),
        ([piece("a"), json.dumps({"error": {"message": "the deadline has passed"}})], "the deadline has passed"),
        ([piece("a"), piece(None, "stop"), USAGE], None),  # without [DONE]
        ([piece("a"), "[DONE]"], None),  # without a reason
    ],
)
def test_an_answer_without_an_end_is_none(part: Callable[[str], ModuleType], lines: list[str], fault: str) -> None:
    found = ask(part, lines)
    assert (found.answered, found.fault, found.text) == (False, fault, "a")


def test_a_refusal_says_when_to_come_back(part: Callable[[str], ModuleType]) -> None:
    content = json.dumps({"error": {"message": "full"}}).encode()
    found = ask(part, [], status_code=429, headers={"Retry-After": "3"}, content=content)
    assert (found.status, found.retry_after, found.fault, found.answered) == (429, "3", "full", False)


def test_a_client_that_leaves_hears_no_more(part: Callable[[str], ModuleType]) -> None:
    found = ask(part, [piece("a"), piece("b"), piece("c"), "[DONE]"], leave_after=2)
    assert (found.text, found.done) == ("ab", False)


# The runs, on a fake server.


def test_load_loses_nothing(bench: ModuleType, server: Callable[..., Any]) -> None:
    found, replies = asyncio.run(bench.runs.load(server("99"), bench.Questions(1).take(18), 6))
    assert (found["asked"], found["answered"], found["lost"]) == (18, 18, 0)
    assert found["tokens"] * found["seconds"] == pytest.approx(3 * (48 + 48 + 48 + 24 + 64 + 200))
    assert found["gap"]["p50"] > 0.5
    assert set(found["kinds"]) == {reply.question.kind for reply in replies}


def test_load_finds_what_is_lost(bench: ModuleType, server: Callable[..., Any]) -> None:
    found, _ = asyncio.run(bench.runs.load(server("99", "breaks"), bench.Questions(1).take(15), 3))
    assert (found["answered"], found["lost"]) == (13, 2)


def test_rounds_have_a_ratio(bench: ModuleType, server: Callable[..., Any]) -> None:
    """The fake sleeps: four at a time are nearly four times as fast as one."""
    found = asyncio.run(bench.runs.rounds(server("99"), bench.Questions(1).take, 6, 4, 3))
    assert (found["rounds"], found["lost"]) == (3, 0)
    ratio = found["tokens_ratio"]
    assert 1.2 < ratio["median"] <= ratio["most"]


def test_clients_that_leave_are_counted(bench: ModuleType, server: Callable[..., Any]) -> None:
    found, stayed = asyncio.run(bench.runs.leaving(server("99"), 8, 4, 1))
    assert (found["left"], found["cancelled"], found["answered"], len(stayed)) == (4, 4, 4, 4)
    assert found["idle_after_seconds"] < 5


def test_memory_is_sampled(bench: ModuleType, server: Callable[..., Any]) -> None:
    found = asyncio.run(bench.runs.memory(server("99"), 2 / 60, 2, 1))
    assert found["lost"] == 0
    assert found["answered"] > 4
    assert 5 < found["megabytes"]["begin"] <= found["most_megabytes"] < 500
    assert found["open_files"]["begin"] > 3


def test_a_full_queue_refuses(bench: ModuleType, server: Callable[..., Any]) -> None:
    found, taken = asyncio.run(bench.runs.flood(server("6"), 40, 1))
    assert found["answered"] + found["refused"] == 40
    assert found["answered"] == len(taken) >= 6
    assert found["with_retry_after"] == found["refused"] > 0
    assert found["answered_later"]


def test_an_end_under_load(bench: ModuleType, server: Callable[..., Any]) -> None:
    found, replies = asyncio.run(bench.runs.ending(server("99"), 3, 1))
    assert (found["answered"], found["lost"], found["exit_code"]) == (3, 0, 0)
    assert found["new"] == {"reused": 503, "fresh": 503, "health": 503}
    assert found["under_way_at_503"] == 3
    assert {reply.text for reply in replies} == {"x" * 400}
    assert 0 < found["seconds"]["answers"] <= found["seconds"]["exit"] < 20


def test_a_server_that_does_not_start_says_why(bench: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="no such bundle"):
        bench.ServerProcess([sys.executable, "-c", "import sys; sys.exit('no such bundle')"], 20)


# What it prints and compares.


def test_the_same_answers_alone(bench: ModuleType) -> None:
    """Text, number of tokens and reason must agree; what was not answered is not compared."""
    model = SimpleNamespace(
        generate=lambda *_, **options: SimpleNamespace(text="ab", token_ids=[1] * 5, finish_reason="stop")
    )
    replies = [
        reply(bench, text="ab"),
        reply(bench, text="ac"),
        reply(bench, text="ab", usage={"completion_tokens": 4}),
        reply(bench, text="ab", finish_reason="length"),
        reply(bench, text="a", fault="broken"),
    ]
    found = bench.compared(model, replies)
    assert (found["compared"], found["same"]) == (4, 1)
    assert found["apart"] == ["one image: 'ac'", "one image: 'ab'", "one image: 'ab'"]


def test_a_report_says_what_was_found(bench: ModuleType, server: Callable[..., Any]) -> None:
    found, _ = asyncio.run(bench.runs.flood(server("6"), 12, 1))
    text = bench.report.text({"flood": found, "alone": {"same": 3, "compared": 4}})
    assert f"{found['answered']} of 12 answered, {found['refused']} refused, 0 lost" in text
    assert text.splitlines()[-1].split() == ["the", "same", "answers", "alone", "3", "of", "4"]
