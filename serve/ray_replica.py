"""One model on Ray Serve: the HTTP application over its scheduler, called with whole requests."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from .affinity import Mark
from .settings import Settings

_DRAIN_SECONDS = 5.0  # Ray Serve has waited for its requests before
Message = dict[str, Any]  # of ASGI


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request, read to its end."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def scope(self) -> dict[str, Any]:
        """The same as ASGI has it, without its body."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": None,
            "server": None,
        }


class ModelReplica:
    """A loaded bundle. Ray Serve starts it, and lets it end what it has before it goes."""

    def __init__(self, bundle: str, settings: Settings, slots: int, queue: int, load: Mapping[str, Any]) -> None:
        from ..runtime.scheduler import Scheduler
        from .app import create_app
        from .loading import load_to_serve

        self.scheduler = Scheduler(load_to_serve(bundle, **load), slots=slots, queue=queue)
        self.scheduler.start()
        self.app = create_app(self.scheduler, settings)

    async def answer(self, call: Call, marks: list[Mark]) -> AsyncGenerator[Message, None]:
        """The messages of the response. marks: what the router read. Closed early, it gives the request up."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        given: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if given:
                return given.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self.app(call.scope(), receive, sent.put))  # type: ignore[arg-type]
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            task.cancel()

    def __del__(self) -> None:
        scheduler = getattr(self, "scheduler", None)  # not there where loading failed
        if scheduler is not None:
            scheduler.drain(_DRAIN_SECONDS)
            scheduler.stop()
