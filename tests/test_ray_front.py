"""The door of a Ray cluster, over replicas that die as told."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2 as httpx
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'onevision-edge[ray]'")

from ray.exceptions import RayActorError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402

from onevision_edge.serve import ray_front  # noqa: E402
from onevision_edge.serve.ray_front import Answers, Front  # noqa: E402
from onevision_edge.serve.ray_replica import Call  # noqa: E402
from onevision_edge.serve.settings import Settings  # noqa: E402

QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}
JSON, STREAM = [(b"content-type", b"application/json")], [(b"content-type", b"text/event-stream; charset=utf-8")]
Turn = list[Any]  # messages of one try, and at its end perhaps an exception


def start(headers: list[tuple[bytes, bytes]] = JSON, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def piece(text: str, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Handle:
    """A deployment's handle. Each call takes the next turn."""

    def __init__(self, *turns: Turn, pause: float = 0.0) -> None:
        self.turns, self.calls, self.cancelled, self.pause = list(turns), list[Call](), 0, pause

    def options(self, **given: Any) -> "Handle":
        assert given == {"stream": True, "method_name": "answer"}
        return self

    def remote(self, call: Call, marks: list[Any]) -> "Handle._Response":
        self.calls.append(call)
        return Handle._Response(self, self.turns.pop(0))

    class _Response:
        def __init__(self, handle: "Handle", turn: Turn) -> None:
            self.handle, self.turn = handle, turn

        async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
            for step in self.turn:
                await asyncio.sleep(self.handle.pause)
                if isinstance(step, Exception):
                    raise step
                yield step

        def cancel(self) -> None:
            self.handle.cancelled += 1


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_front, "_PAUSE", 0.001)


def asked(handle: Handle, *requests: Callable[[httpx.AsyncClient], Any], **settings: Any) -> list[httpx.Response]:
    """Responses to requests that are made at once."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=Front(handle, Settings(**settings)).serve)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return list(await asyncio.gather(*(request(client) for request in requests)))

    return asyncio.run(run())


def post(body: Any = None, **headers: str) -> Callable[[httpx.AsyncClient], Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda client: client.post("/v1/chat/completions", json=QUESTION if body is None else body, headers=named)


def test_a_request_reaches_a_replica_as_it_came() -> None:
    handle = Handle([start(), piece("{}")])
    (response,) = asked(handle, lambda client: client.get("/v1/models?a=1", headers={"x-own": "b"}))
    assert (response.status_code, response.text) == (200, "{}")
    (call,) = handle.calls
    assert (call.method, call.path, call.query, call.body) == ("GET", "/v1/models", b"a=1", b"")
    assert (b"x-own", b"b") in call.headers


@pytest.mark.parametrize(
    "lost", [[RayActorError()], [start(), RayActorError()], [start(), piece("{", True), RayActorError()]]
)
def test_an_answer_that_was_not_whole_is_asked_of_another(lost: Turn) -> None:
    handle = Handle(lost, [RayActorError()], [start(), piece('{"a":', True), piece("1}")])
    (response,) = asked(handle, post())
    assert (response.status_code, response.json()) == (200, {"a": 1})
    assert len(handle.calls) == 3
    assert len({call.body for call in handle.calls}) == 1


def test_a_stream_that_had_not_begun_is_asked_of_another() -> None:
    handle = Handle([RayActorError()], [start(STREAM), piece("data: 1\n\n", True), piece("", False)])
    (response,) = asked(handle, post())
    assert response.text == "data: 1\n\n"


def test_a_stream_that_breaks_off_says_so_and_is_not_answered_twice() -> None:
    handle = Handle([start(STREAM), piece("data: 1\n\n", True), RayActorError()], [start(), piece("again")])
    (response,) = asked(handle, post())
    first, last = response.text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(handle.calls) == 1


def test_no_replica_is_an_error_of_the_server() -> None:
    (response,) = asked(Handle(*[[RayActorError()]] * ray_front.ATTEMPTS), post())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


def test_a_full_queue_is_told() -> None:
    (response,) = asked(Handle([BackPressureError(1, 1)]), post())
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")


def test_the_key_and_the_size_are_checked_at_the_door() -> None:
    handle = Handle()
    (response,) = asked(handle, post(), api_key="secret")
    assert response.status_code == 401
    (response,) = asked(handle, post({"messages": "x" * 200}), max_body_bytes=100)
    assert response.status_code == 413
    assert handle.calls == []


def test_a_request_sent_twice_at_once_is_computed_once() -> None:
    handle = Handle([start(), piece("one")], [start(), piece("two")], pause=0.01)
    same = post(x_request_id="7")
    assert [r.text for r in asked(handle, same, same, post(x_request_id="8"))] == ["one", "one", "two"]


def test_an_id_counts_with_its_body_and_key() -> None:
    handle = Handle(*[[start(), piece(str(i))] for i in range(3)])
    requests = [post(idempotency_key="7"), post({"messages": []}, idempotency_key="7"),
                post(idempotency_key="7", authorization="Bearer a")]  # fmt: skip
    assert {r.text for r in asked(handle, *requests)} == {"0", "1", "2"}


def test_a_door_that_drains_refuses_what_is_new_and_waits_for_the_rest() -> None:
    async def run() -> tuple[int, int, bool, bool]:
        front = Front(Handle([start(), piece("")], pause=0.05), Settings())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=front.serve), base_url="http://front") as client:
            under_way = asyncio.ensure_future(post()(client))
            await asyncio.sleep(0.02)
            in_time = await front.drain(0.0)
            refused, all_ended = (await post()(client)).status_code, await front.drain(10)
            return (await under_way).status_code, refused, in_time, all_ended

    assert asyncio.run(run()) == (200, 503, False, True)


def test_a_failure_is_not_remembered() -> None:
    async def run() -> list[int]:
        handle = Handle([start(status=500), piece("")], [start(status=429), piece("")], [start(), piece("")])
        transport = httpx.ASGITransport(app=Front(handle, Settings()).serve)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return [(await post(x_request_id="7")(client)).status_code for _ in range(4)]

    assert asyncio.run(run()) == [500, 429, 200, 200]


def test_a_stream_that_broke_off_is_not_remembered() -> None:
    async def run() -> list[str]:
        broken = [start(STREAM), piece("data: 1\n\n", True), RayActorError()]
        handle = Handle(broken, [start(STREAM), piece("data: 2\n\n")])
        transport = httpx.ASGITransport(app=Front(handle, Settings()).serve)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return [(await post(x_request_id="7")(client)).text for _ in range(3)]

    first, *again = asyncio.run(run())
    assert "replica_lost" in first
    assert again == ["data: 2\n\n"] * 2


def test_answers_are_kept_up_to_a_number() -> None:
    async def run() -> None:
        answers = Answers(capacity=2)
        for key in "abc":
            assert answers.claim(key) is None
            answers.settle(key, [start()])
        assert answers.claim("a") is None  # forgotten
        kept = answers.claim("c")
        assert kept is not None
        assert await kept == [start()]

    asyncio.run(run())


def test_a_client_that_leaves_takes_its_call_back() -> None:
    handle = Handle([start(STREAM), *[piece("data: 1\n\n", True)] * 1000], pause=0.001)

    async def run() -> None:
        front = Front(handle, Settings())
        body = json.dumps(QUESTION).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "server": ("front", 80),
            "scheme": "http",
        }
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        task = asyncio.ensure_future(front.serve(scope, receive, send))
        while len(sent) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert handle.cancelled == 1
