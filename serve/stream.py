"""The events of a call on their way from the scheduler's threads to the client, and their way back: leaving early."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..runtime.scheduler import ChatRequest, Event, Failed, Finished, Piece, Scheduler, Ticket
from .answers import Answer
from .errors import ClientGoneError, report
from .metrics import Metrics

T = TypeVar("T")


class Events:
    """What the scheduler says of the requests of one call (its choices), in the order it came."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics, deadline: float) -> None:
        self._scheduler, self._metrics, self._deadline = scheduler, metrics, deadline
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Queue[tuple[int, Event]]()
        self._tickets: list[Ticket] = []
        self._is_kept = False

    def submit(self, requests: Sequence[ChatRequest]) -> None:
        """Hand all requests to the scheduler, or none: what it refuses takes those before it back."""
        try:
            for index, request in enumerate(requests):
                listener = partial(self._heard, index, self._metrics.listener())
                self._tickets.append(self._scheduler.submit(request, listener))
        except Exception:
            self.cancel()
            raise

    def kept(self) -> "Events":
        """The same, now with a response that cancels it: `leave` has nothing to do any more."""
        self._is_kept = True
        return self

    def leave(self) -> None:
        """Give every request up, unless a response goes on with them."""
        if not self._is_kept:
            self.cancel()

    def cancel(self) -> None:
        """Give every request up; one that has ended is not touched by it."""
        for ticket in self._tickets:
            self._scheduler.cancel(ticket)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Events after the index of their request, until all have finished. Raises what a request failed with."""
        left = len(self._tickets)
        while left:
            seconds = self._deadline - self._loop.time()
            index, event = await asyncio.wait_for(self._arrived.get(), max(seconds, 0))
            if isinstance(event, Failed):
                raise event.error
            yield index, event
            left -= isinstance(event, Finished)

    def _heard(self, index: int, measure: Callable[[Event], None], event: Event) -> None:
        measure(event)
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, event))


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which ends as soon as the client leaves, with ClientGoneError. The body was read before."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events that give their requests up when the client leaves or anything fails."""

    def __init__(self, lines: AsyncIterator[str], events: Events) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.cancel()


async def chunks(
    answer: Answer,
    events: AsyncIterator[tuple[int, Piece | Finished]],
    choices: int,
    with_logprobs: bool,
    with_usage: bool,
) -> AsyncIterator[str]:
    """The lines of a streamed answer; a failure under way is its last event, in place of [DONE]."""
    finished: dict[int, Finished] = {}
    blank: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        for i in range(choices):
            yield line(answer.chunk(i, {"role": "assistant", "content": ""}) | blank)
        async for i, event in events:
            if isinstance(event, Finished):
                finished[i] = event
                yield line(answer.chunk(i, {}, finish_reason=event.generation.finish_reason) | blank)
            else:
                logprobs = answer.logprobs(event.logprobs) if with_logprobs else None
                yield line(answer.chunk(i, {"content": event.text}, logprobs=logprobs) | blank)
        if with_usage:
            yield line(answer.last_chunk([finished[i] for i in range(choices)]))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield line(report(error).body())


def line(value: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
