"""A server that speaks the page's side of the HTTP interface, its answers scripted by the test."""

import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from onevision_edge.serve.page import csp, page_html

TIMINGS = {
    "queue": 0.0002,
    "preprocess": 0.0014,
    "vision_encoding": 0.01,
    "prepare_embeddings": 0.00005,
    "prefill": 0.02,
    "decode": 0.05,
    "time_to_first_token": 0.032,
    "tokens_per_second": 31.24,
}
LIMITS = {"max_images": 4, "max_pixels": 1_000_000, "max_tokens": 512, "context": 4096}


def usage(prompt: int = 231, completion: int = 42, images: int = 208, cached: int = 0) -> dict[str, Any]:
    """The usage of an answer, as the last chunk has it."""
    details = {"cached_tokens": cached, "image_tokens": images, "cached_image_tokens": min(cached, images)}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**counts, "prompt_tokens_details": details, "timings": TIMINGS}


@dataclass(slots=True)
class Reply:
    """One scripted answer: text in pieces with `usage`, or an error's status and message."""

    pieces: tuple[str, ...] = ("A photo ", "of six digits.")
    usage: Mapping[str, Any] = field(default_factory=usage)
    finish: str = "stop"
    status: int = 200
    message: str = ""
    retry_after: str = ""
    broken_after: int | None = None  # the connection ends after so many pieces
    error_after: int | None = None  # an error comes in the stream after so many pieces
    held: threading.Event | None = None  # the last piece waits for it


class FakeServer(ThreadingHTTPServer):
    """Answers the chat's requests with `replies`, in their order; what it was asked is in `requests`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: deque[Reply] = deque()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []  # the Authorization of each request of the chat
        self.limits: Mapping[str, Any] | None = LIMITS
        self.api_key: str | None = None
        self.left = threading.Event()  # a reader went away in the middle of an answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, page_html().encode(), {"Content-Type": "text/html", "Content-Security-Policy": csp()})
        elif self.path == "/v1/models" and self._allowed():
            limits = {} if self.server.limits is None else {"onevision_edge": self.server.limits}
            self._json(200, {"object": "list", "data": [{"id": "demo-int8", "object": "model", **limits}]})
        elif self.path != "/v1/models":
            self._error(404, "not found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.replies.popleft() if self.server.replies else Reply()
        if reply.status != 200:
            self._error(reply.status, reply.message, {"Retry-After": reply.retry_after} if reply.retry_after else {})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._stream(reply)

    def _stream(self, reply: Reply) -> None:
        for part in _chunks(reply):
            try:
                self.wfile.write(f"data: {part}\n\n".encode())
                self.wfile.flush()
            except OSError:
                self.server.left.set()
                return

    def _allowed(self) -> bool:
        if self.server.api_key in (None, (self.headers["Authorization"] or "").removeprefix("Bearer ")):
            return True
        self._error(401, "an API key is needed")
        return False

    def _error(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._json(status, {"error": {"message": message, "type": "error", "param": None, "code": None}}, headers)

    def _json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _chunks(reply: Reply) -> Iterator[str]:
    """The data of the events of an answer; where it is held, comments' worth of empty chunks until it is let go."""
    for index, piece in enumerate(reply.pieces):
        if index == reply.broken_after:
            return
        if index == reply.error_after:
            yield json.dumps({"error": {"message": "the engine failed", "type": "server_error"}})
            return
        while reply.held and index == len(reply.pieces) - 1 and not reply.held.wait(0.05):
            yield _chunk({"content": ""})
        yield _chunk({"content": piece})
    yield _chunk({}, reply.finish)
    yield json.dumps({"object": "chat.completion.chunk", "choices": [], "usage": reply.usage})
    yield "[DONE]"


def _chunk(delta: Mapping[str, str], finish: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A fake server that listens until the block ends."""
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
