"""What tests of the server share: a scheduler that follows a script, a live server, questions."""

import base64
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

import onevision_edge
from onevision_edge.runtime.generation import Timings, TokenLogprob
from onevision_edge.runtime.images import ImageProcessor
from onevision_edge.runtime.model import Generation
from onevision_edge.runtime.scheduler import ChatRequest, Event, Finished, Piece, SchedulerStats
from onevision_edge.runtime.tokenizer import Tokenizer
from onevision_edge.serve.app import create_app
from onevision_edge.serve.errors import ApiError
from onevision_edge.serve.server import Server, listening_socket
from onevision_edge.serve.settings import Settings

CHECKPOINT = Path(onevision_edge.__file__).parent / "demo" / "checkpoint"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))  # of every fuzz test
IMAGES = Path(onevision_edge.__file__).parent / "demo" / "images"


def generation(text: str, tokens: Sequence[int] = (5, 6, 7), **changes: Any) -> Generation:
    """An answer of three tokens after a prompt of ten, four of an image."""
    values: dict[str, Any] = {
        "text": text,
        "token_ids": list(tokens),
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "image_tokens": 4,
        "cached_tokens": 3,
        "cached_image_tokens": 2,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "logprobs": None,
        "timings": Timings(0.5, 0.25, 0.125, 1.0, 4.0),
    }
    return Generation(**(values | changes))


def answer(*pieces: str, queue_seconds: float = 0.5) -> list[Event]:
    """The events of an answer in these pieces."""
    told: list[Event] = [Piece(piece, []) for piece in pieces]
    return [*told, Finished(generation("".join(pieces)), queue_seconds)]


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -0.5, [(token_id, -0.5), (token_id + 1, float("-inf"))])


@dataclass
class ScriptedScheduler:
    """Answers every request by `script`: its events, or an exception that `submit` raises. `hold` keeps them back."""

    script: Callable[[ChatRequest], Sequence[Event] | Exception] = lambda request: answer("Hello", " there")
    requests: list[ChatRequest] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    model: Any = field(
        default_factory=lambda: SimpleNamespace(
            tokenizer=Tokenizer.from_directory(CHECKPOINT), processor=ImageProcessor(), max_length=512
        )
    )
    stats: SchedulerStats = field(default_factory=lambda: SchedulerStats(running=1, waiting=2, slots=3, finished=4))

    def __post_init__(self) -> None:
        self.go.set()

    def submit(self, request: ChatRequest, listener: Callable[[Event], None]) -> int:
        events = self.script(request)
        if isinstance(events, Exception):
            raise events
        self.requests.append(request)
        ticket = len(self.requests) - 1
        threading.Thread(target=self._tell, args=(ticket, events, listener), daemon=True).start()
        return ticket

    def _tell(self, ticket: int, events: Sequence[Event], listener: Callable[[Event], None]) -> None:
        for event in events:
            self.go.wait(20)
            if ticket in self.cancelled:
                return
            listener(event)

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)

    def drain(self, seconds: float | None = None) -> bool:
        return self.go.wait(seconds)


@contextmanager
def live(scheduler: Any, settings: Settings | None = None) -> Iterator[tuple[str, Server]]:
    """A server on a real port, with its address."""
    settings = settings or Settings()
    with listening_socket("127.0.0.1", 0) as listening:
        server = Server(create_app(scheduler, settings), scheduler, 10)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Return once the condition holds; fails if it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come to that"
        time.sleep(0.01)


def refused(action: Callable[[], Any]) -> ApiError | None:
    """What an action is refused with, if it is."""
    try:
        action()
    except ApiError as error:
        return error
    return None


def data_url(image: str | bytes | tuple[int, int]) -> str:
    """A data URL of a shipped image, of bytes, or of a grey image of this size."""
    if isinstance(image, tuple):
        file = io.BytesIO()
        Image.new("L", image, 128).save(file, "PNG")
        image = file.getvalue()
    data = image if isinstance(image, bytes) else (IMAGES / image).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def question(text: str = "What is the total?", *urls: str, **fields: Any) -> dict[str, Any]:
    """A body of one question about images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], **fields}
