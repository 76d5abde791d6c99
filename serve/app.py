"""The HTTP application: routes, and a question's way from the body to the scheduler and back."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..errors import OneVisionError
from ..runtime.scheduler import Finished, Piece, Scheduler
from .answers import Answer
from .auth import Gate
from .body import read_body
from .errors import GONE, ApiError, ClientGoneError, api_error, closing, crowded, report
from .fetching import Fetcher
from .images import read_pictures
from .metrics import CONTENT_TYPE, CountAnswers, Metrics
from .openapi import document
from .protocol import ChatCall, check_model, read_chat
from .requests import ControlTokens, chat_requests
from .settings import Settings
from .stream import Events, EventStream, chunks, while_connected
from .strict_json import parse

Indexed = tuple[int, Piece | Finished]

_LIMITS = ("max_images", "max_frames", "max_pixels", "max_tokens", "max_choices", "max_body_bytes")


def create_app(scheduler: Scheduler, settings: Settings | None = None) -> Starlette:
    """The application over a scheduler that its caller starts, drains and stops.

    `app.state.draining = True` makes it refuse new questions with 503, as a scheduler that drains does.
    Raises OneVisionError where the scheduler's model has no tokenizer.
    """
    settings = settings or Settings()
    metrics = Metrics(scheduler)
    chat = Chat(scheduler, settings, metrics)
    middleware = [Middleware(CountAnswers, metrics=metrics), *_cors(settings), Middleware(Gate, settings=settings)]
    app = Starlette(
        routes=_routes(chat, settings, metrics),
        middleware=middleware,
        exception_handlers={
            HTTPException: _http_error,
            ClientGoneError: _gone,
            ClientDisconnect: _gone,
            ApiError: _error,
            Exception: _error,
        },
    )
    app.state.draining = False
    return app


class Chat:
    """The endpoint /v1/chat/completions."""

    def __init__(self, scheduler: Scheduler, settings: Settings, metrics: Metrics) -> None:
        self._scheduler, self._settings, self._metrics = scheduler, settings, metrics
        self._fetch = Fetcher(settings.image_hosts, settings.max_body_bytes, settings.image_seconds)
        tokenizer = scheduler.model.tokenizer
        if tokenizer is None:
            raise OneVisionError("the bundle has no tokenizer.json, which chat needs")
        self._tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self._open = 0

    def card(self) -> dict[str, Any]:
        """The model as /v1/models lists it, with this server's limits under a name that is not OpenAI's."""
        limits = {name: getattr(self._settings, name) for name in _LIMITS}
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "onevision-edge",
            "onevision_edge": limits | {"context": self._scheduler.model.max_length},
        }

    async def __call__(self, request: Request) -> Response:
        """Answer one body, whole or as a stream; whoever leaves early gives the question up."""
        _refuse_if_draining(request)
        if self._open >= self._settings.max_open:
            raise crowded()
        self._open += 1
        try:
            return await self._answered(request)
        finally:
            self._open -= 1

    async def _answered(self, request: Request) -> Response:
        body = await read_body(request, self._settings)
        deadline = asyncio.get_running_loop().time() + self._settings.request_seconds
        events = Events(self._scheduler, self._metrics, deadline)
        try:
            return await while_connected(request, self._answer(body, events, deadline))
        except ClientGoneError:
            raise
        except Exception as error:
            raise report(error) from error
        finally:
            events.leave()

    async def _answer(self, body: bytes, events: Events, deadline: float) -> Response:
        async with asyncio.timeout_at(deadline):
            call = await asyncio.to_thread(self._read, body)
            files = await read_pictures(call.pictures, self._settings, self._fetch)
            requests = await asyncio.to_thread(chat_requests, call, files, self._scheduler.model)
        events.submit(requests)
        answer = Answer(self._settings.model_name, self._tokenizer)
        if call.stream:
            return await self._stream(call, answer, events)
        finished = {i: event async for i, event in aiter(events) if isinstance(event, Finished)}
        return JSONResponse(answer.whole([finished[i] for i in range(call.choices)]))

    async def _stream(self, call: ChatCall, answer: Answer, events: Events) -> Response:
        """Only when the first event is there, so that a question that fails at once has its own status."""
        arriving = aiter(events)
        first = await anext(arriving)
        with_logprobs = call.params.logprobs is not None
        lines = chunks(answer, _from(first, arriving), call.choices, with_logprobs, call.include_usage)
        return EventStream(lines, events.kept())

    def _read(self, body: bytes) -> ChatCall:
        call = read_chat(parse(body), self._settings)
        self._control.check(call.messages)
        return call


async def _from(first: Indexed, rest: AsyncIterator[Indexed]) -> AsyncIterator[Indexed]:
    yield first
    async for event in rest:
        yield event


def _routes(chat: Chat, settings: Settings, metrics: Metrics) -> list[Route]:
    model, described = chat.card(), document(settings)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        check_model(request.path_params["name"], settings)
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        _refuse_if_draining(request)
        return JSONResponse({"status": "ok"})

    async def measured(request: Request) -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    async def answer(request: Request) -> Response:
        return await chat(request)

    return [
        Route("/", _page, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", measured, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
        Route("/v1/chat/completions", answer, methods=["POST"]),
    ]


async def _page(request: Request) -> Response:
    from .page import csp, page_html

    headers = {
        "Content-Security-Policy": csp(),
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(page_html(), headers=headers)


def _refuse_if_draining(request: Request) -> None:
    if request.app.state.draining:
        raise closing()


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    ]


async def _error(request: Request, error: Exception) -> Response:
    found = api_error(error)
    return JSONResponse(found.body(), found.status, found.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(
        {404: "there is nothing at this address", 405: "this address has other methods"}.get(
            error.status_code, error.detail
        ),
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
    )
    return JSONResponse(found.body(), error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)
