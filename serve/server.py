"""The server's process: a socket, uvicorn, and an end in good order."""

import logging
import socket
import threading
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from ..errors import OneVisionError
from ..runtime.scheduler import Scheduler

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


class Server(uvicorn.Server):
    """uvicorn, except that the first signal ends it only when the requests in flight have their answers.

    Until then it goes on to accept connections, so that new questions are told 503; a second signal ends it at once.
    """

    def __init__(self, app: Starlette, scheduler: Scheduler, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
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
