"""A client that notes when every piece of an answer arrives."""

import asyncio
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx

from .questions import Question

PATH = "/v1/chat/completions"
FEW = 8  # tokens of which no time per token is made
JSON = {"Content-Type": "application/json"}


@dataclass(slots=True)
class Reply:
    """What came of one question. arrivals: times of pieces of text."""

    question: Question
    started: float = field(default_factory=perf_counter)
    status: int = 0
    retry_after: str | None = None
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None  # what went wrong on the way, or was said in place of an answer
    done: bool = False  # whether the stream came to its end
    seconds: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether the whole answer came."""
        return self.status == 200 and self.done and self.finish_reason is not None and self.fault is None

    @property
    def first(self) -> float:
        """Seconds to the first piece of text; to the end where there was none."""
        return self.arrivals[0] - self.started if self.arrivals else self.seconds

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Seconds a token from the first piece to the last; None for few tokens.

        Single gaps say less: pieces of several steps may arrive in one packet.
        """
        later = self.tokens - 1
        return (self.arrivals[-1] - self.arrivals[0]) / later if later >= FEW and self.arrivals else None

    @property
    def tokens(self) -> int:
        """Of the answer, as the server counts them."""
        return int(self.usage.get("completion_tokens", 0))

    def take(self, data: str) -> None:
        """An event of the stream."""
        if data == "[DONE]":
            self.done = True
            return
        value = json.loads(data)
        if "error" in value:
            self.fault = value["error"]["message"]
            return
        self.usage = value.get("usage") or self.usage
        for choice in value["choices"]:
            if choice["delta"].get("content"):
                self.arrivals.append(perf_counter())
                self.text += choice["delta"]["content"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason


async def ask(client: httpx.AsyncClient, question: Question, leave_after: int | None = None) -> Reply:
    """Put a question. leave_after: pieces of text after which the client hangs up."""
    reply = Reply(question)
    try:
        async with client.stream("POST", PATH, content=question.sent, headers=JSON) as response:
            await _read(response, reply, leave_after)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        reply.fault = f"{type(error).__name__}: {error}"
    reply.seconds = perf_counter() - reply.started
    return reply


async def _read(response: httpx.Response, reply: Reply, leave_after: int | None) -> None:
    reply.status, reply.retry_after = response.status_code, response.headers.get("retry-after")
    if reply.status != 200:
        reply.fault = json.loads(await response.aread())["error"]["message"]
        return
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            reply.take(line.removeprefix("data: "))
        if leave_after is not None and len(reply.arrivals) >= leave_after:
            return


async def ask_all(
    client: httpx.AsyncClient, questions: Iterable[Question], concurrency: int, until: float | None = None
) -> list[Reply]:
    """Put questions, so many at a time, in their order. until: when to begin none any more (perf_counter)."""
    waiting, replies = iter(questions), list[Reply]()

    async def work() -> None:
        for question in _begun_before(waiting, until):
            replies.append(await ask(client, question))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return replies


def _begun_before(questions: Iterator[Question], until: float | None) -> Iterator[Question]:
    while until is None or perf_counter() < until:
        question = next(questions, None)
        if question is None:
            return
        yield question
