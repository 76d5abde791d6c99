"""The door of a Ray Serve cluster: reads requests, sends each to a replica, and to another where that one dies.

A response goes to the client once it is whole, or, as a stream, once it has begun: what had not begun when its replica
died is sent to another one, and nothing is answered twice. A stream that breaks off ends with an error event.
"""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from hashlib import sha256
from typing import Any

from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .affinity import Mark, marks_of
from .auth import Gate
from .body import read_body
from .errors import ApiError, closing
from .ray_replica import Call, Message
from .settings import Settings

LOG = logging.getLogger(__name__)
ATTEMPTS = 6
_PAUSE = 0.1  # seconds before the second attempt, twice as many before the next
_REMEMBERED = 1_000  # answers, by the ids of their requests
_ID_HEADERS = ("idempotency-key", "x-request-id")
_LOST = (RayError, DeploymentUnavailableError)


class BrokenOffError(Exception):
    """A response that had begun has ended before its end; its client was told."""


class Front:
    """An ASGI application. models: a handle of the replicas' deployment."""

    def __init__(self, models: Any, settings: Settings) -> None:
        self._models, self._settings = models.options(stream=True, method_name="answer"), settings
        self._gate = Gate(self._door, settings)
        self._answers = Answers()
        self._open, self._draining = 0, False

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self._open += 1
        try:
            await self._gate(scope, receive, send)
        finally:
            self._open -= 1

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests, and wait for those under way; whether all have ended in time."""
        self._draining = True
        for _ in range(round(seconds / _PAUSE)):
            if not self._open:
                break
            await asyncio.sleep(_PAUSE)
        return not self._open

    async def _door(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._draining:
                raise closing()
            call = await self._read(Request(scope, receive))
            async with aclosing(self._answered(call)) as messages:
                async for message in messages:
                    await send(message)
        except (ClientDisconnect, BrokenOffError):
            return
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)

    async def _read(self, request: Request) -> Call:
        """The request with its body, of bounded size."""
        body = await read_body(request, self._settings) if request.method == "POST" else b""
        return Call(request.method, request.url.path, request.scope["query_string"], request.headers.raw, body)

    async def _answered(self, call: Call) -> AsyncGenerator[Message, None]:
        """The response's messages; of a request whose id was seen before, those of its first response."""
        key = request_key(call)
        if key is None:
            async with aclosing(self._attempts(call)) as messages:
                async for message in messages:
                    yield message
            return
        first = self._answers.claim(key)
        if first is not None:
            for message in await first:
                yield message
            return
        kept: list[Message] = []
        whole = False
        try:
            async with aclosing(self._attempts(call)) as messages:
                async for message in messages:
                    kept.append(message)
                    yield message
            whole = True
        finally:
            self._answers.settle(key, kept if whole else [])

    async def _attempts(self, call: Call) -> AsyncGenerator[Message, None]:
        """The messages of the first replica that lives long enough."""
        marks = marks_of(call.body)
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
            begun = False
            try:
                async with aclosing(self._once(call, marks)) as messages:
                    async for message in messages:
                        begun = True
                        yield message
                return
            except TaskCancelledError:
                raise
            except BackPressureError:
                raise ApiError("the server has as many requests as it takes", status=429, code="queue_full") from None
            except _LOST as error:
                LOG.warning("a replica was lost: %s", type(error).__name__)
                if begun:
                    yield broken_off()
                    raise BrokenOffError from None
        raise ApiError("no replica could answer", status=503, kind="server_error", code="unavailable")

    async def _once(self, call: Call, marks: list[Mark]) -> AsyncGenerator[Message, None]:
        """The messages of one replica: of a stream as they come, else together, once all are there."""
        arriving = self._models.remote(call, marks)
        held: list[Message] = []
        streaming = False
        try:
            async for message in arriving:
                streaming = streaming or is_stream(message)
                held.append(message)
                if streaming:
                    yield held.pop()
            for message in held:
                yield message
        finally:
            arriving.cancel()


class Answers:
    """What requests with an id were answered, so that one that is sent again is not computed again."""

    def __init__(self, capacity: int = _REMEMBERED) -> None:
        self._capacity = capacity
        self._known: OrderedDict[str, asyncio.Future[list[Message]]] = OrderedDict()

    def claim(self, key: str) -> asyncio.Future[list[Message]] | None:
        """The first answer, which may be on its way; None for whoever is first, and has to `settle` it."""
        found = self._known.get(key)
        if found is not None:
            return asyncio.shield(found)
        self._known[key] = asyncio.get_running_loop().create_future()
        while len(self._known) > self._capacity:
            _, oldest = self._known.popitem(last=False)
            self._fail(oldest)
        return None

    def settle(self, key: str, messages: list[Message]) -> None:
        """Give the answer to who waits for it, none where it broke off. A failure is not kept."""
        future = self._known.get(key)
        if future is None:
            return
        if messages and messages[0].get("status", 500) < 429:
            future.set_result(messages)
            return
        del self._known[key]
        if messages:
            future.set_result(messages)
        else:
            self._fail(future)

    def _fail(self, future: asyncio.Future[list[Message]]) -> None:
        if not future.done():
            future.set_exception(ApiError("the first request with this id was not answered", status=409, code="lost"))
            future.exception()  # nobody may be waiting


def request_key(call: Call) -> str | None:
    """What tells a request that is sent again: its id, body and key; None where it has no id."""
    headers = {name.decode("latin-1").lower(): value for name, value in call.headers}
    given = next((headers[name] for name in _ID_HEADERS if name in headers), None)
    if given is None or call.method != "POST":
        return None
    parts = [given, call.path.encode(), headers.get("authorization", b""), call.body]
    return sha256(b"".join(len(part).to_bytes(8) + part for part in parts)).hexdigest()


def is_stream(message: Message) -> bool:
    """Whether a response that begins so comes in events."""
    headers = dict(message.get("headers", ()))
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))


def broken_off() -> Message:
    """The end of a stream whose replica died."""
    error = ApiError("the replica that answered was lost", status=502, kind="server_error", code="replica_lost")
    return {"type": "http.response.body", "body": f"data: {json.dumps(error.body())}\n\n".encode(), "more_body": False}
