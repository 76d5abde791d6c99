"""Errors as OpenAI's API words them, and what becomes one. No response names a file of the machine."""

import logging
import re
from typing import Any

from ..errors import OneVisionError

_log = logging.getLogger(__name__)

GONE = 499  # the client left before its answer; nobody reads this status but the metrics

# A slash that begins a path: of two names at least, so that "image/png" and "</s>" are none. A space belongs to it
# where the word behind it goes on with a slash.
_NAME = r"(?:[^\s/,;:'\"()]|\s(?=[^\s/]+/))"
_PATH = re.compile(rf"(?<![\w:/.<])(?:file:/{{1,3}}|~?/){_NAME}+(?:/{_NAME}*)+")


class ApiError(Exception):
    """An answer that is an error: {"error": {"message", "type", "param", "code"}} under an HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind = message, status, kind
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ClientGoneError(Exception):
    """Whoever asked has closed the connection."""


def api_error(error: Exception) -> ApiError:
    """The answer to a failure: the scheduler's refusals, a request's own fault, or an error inside."""
    from ..runtime.scheduler import ClosingError, QueueFullError

    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return _retry(429, "the server has as many requests waiting as it takes", "queue_full", error.retry_after)
    if isinstance(error, ClosingError):
        return closing()
    if isinstance(error, TimeoutError):
        return ApiError(
            "the request took longer than the server allows", status=504, kind="timeout_error", code="request_timeout"
        )
    if isinstance(error, OneVisionError):
        return ApiError(without_paths(str(error)))
    return ApiError("an error inside the server", status=500, kind="server_error", code="internal_error")


def report(error: Exception) -> ApiError:
    """As `api_error`; an error inside the server goes to the log, with its trace."""
    answer = api_error(error)
    if answer.status == 500:
        _log.error("a request failed", exc_info=error)
    return answer


def closing() -> ApiError:
    """The answer of a server that ends what it has and takes nothing new."""
    return _retry(503, "the server is about to stop and takes no new requests", "closing", 5.0)


def crowded() -> ApiError:
    """The answer where more requests are open than the server holds."""
    return _retry(429, "the server has as many requests open as it takes", "too_many_requests", 1.0)


def without_paths(message: str) -> str:
    """The message with every path of a file system in it replaced."""
    return _PATH.sub("(a file of the server)", message)


def _retry(status: int, message: str, code: str, seconds: float) -> ApiError:
    kind = "rate_limit_error" if status == 429 else "server_error"
    headers = {"Retry-After": str(max(1, round(seconds)))}
    return ApiError(message, status=status, kind=kind, code=code, headers=headers)
