"""The server's process: a socket, uvicorn, and an end in good order."""

import asyncio
import logging
import socket
import threading
from types import FrameType

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import OneVisionError
from ..runtime.scheduler import Scheduler

_HEADER_SECONDS = 20  # for a request's first line and headers to arrive
_CLOSING_SECONDS = 10  # for the last bytes to reach their clients, once nothing is computed any more

_log = logging.getLogger(__name__)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 takes a free one. Raises OneVisionError where that cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OneVisionError(
            f"{host}:{port} cannot be listened on: {reason}; choose another --host or --port"
        ) from None


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose next request does not come within _HEADER_SECONDS of its beginning."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Stop waiting once the headers are complete; begin with what follows them."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect()
        else:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._forget()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._overdue is None:
            self._overdue = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


class Server(uvicorn.Server):
    """uvicorn, except that the first signal ends it only when the requests in flight have their answers.

    Until then it goes on to accept connections, so that new questions are told 503; a second signal ends it at once.
    """

    def __init__(self, app: Starlette, scheduler: Scheduler, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self._app, self._scheduler, self._seconds = app, scheduler, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or on a second signal end."""
        if self._app.state.draining:
            self.force_exit = self.should_exit = True
            return
        self._app.state.draining = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        if not self._scheduler.drain(self._seconds):
            _log.warning("requests in flight did not end within %g seconds and are given up", self._seconds)
        self.should_exit = True
