"""A replica without Ray: whole requests in, the messages of responses out."""

import asyncio
import json
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import onevision_edge
from onevision_edge.runtime.slots import Slots
from onevision_edge.serve.ray_replica import Call, ModelReplica
from onevision_edge.serve.settings import Settings

pytest.importorskip("starlette", reason="Starlette is not installed: pip install 'onevision-edge[serve]'")


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> ModelReplica:
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    onevision_edge.export("demo", bundle, dtype="fp32", max_length=256)
    return ModelReplica(str(bundle), Settings(), slots=2, queue=4, load={"threads": 1})


def question(text: str, **more: Any) -> Call:
    body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 16, **more}).encode()
    return Call("POST", "/v1/chat/completions", b"", [(b"content-type", b"application/json")], body)


async def messages_of(replica: ModelReplica, call: Call) -> list[dict[str, Any]]:
    async with aclosing(replica.answer(call, [])) as messages:
        return [message async for message in messages]


def test_a_call_is_answered_by_the_application(replica: ModelReplica) -> None:
    start, *rest = asyncio.run(messages_of(replica, question("Hello")))
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    answer = json.loads(b"".join(message["body"] for message in rest))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    start, *_ = asyncio.run(messages_of(replica, Call("GET", "/nothing", b"", [], b"")))
    assert start["status"] == 404


def test_who_stops_reading_frees_the_slot(replica: ModelReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Slots.decode

    def slowly(slots: Slots, members: list[int]) -> None:
        time.sleep(0.1)
        decode(slots, members)

    monkeypatch.setattr(Slots, "decode", slowly)
    wait_until_idle(replica)
    before = replica.scheduler.stats

    async def leave() -> None:
        async with aclosing(replica.answer(question("What is in the image?", stream=True), [])) as messages:
            async for message in messages:
                if message["type"] == "http.response.body":
                    break

    asyncio.run(leave())
    wait_until_idle(replica)
    after = replica.scheduler.stats
    assert (after.running, after.cancelled - before.cancelled, after.finished) == (0, 1, before.finished)


def wait_until_idle(replica: ModelReplica) -> None:
    deadline = time.monotonic() + 10
    while replica.scheduler.stats.running and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_replica_that_ends_drains(tmp_path: Path) -> None:
    onevision_edge.export("demo", tmp_path / "bundle", dtype="fp32", max_length=256)
    replica = ModelReplica(str(tmp_path / "bundle"), Settings(), slots=1, queue=1, load={"threads": 1})
    scheduler = replica.scheduler
    replica.__del__()
    assert not any(thread.is_alive() for thread in scheduler._threads)
