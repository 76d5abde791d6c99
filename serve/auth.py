"""Who may ask: the key, the names that the server answers to, and the headers that keep browsers in bounds."""

import hashlib
import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

# What anybody may see: whether the server is up, its page (which asks for the key) and its description.
OPEN_PATHS = ("/", "/health", "/openapi.json")


class Gate:
    """ASGI middleware that refuses requests without the key (401), or to another name than the server's (421).

    The name is checked against rebinding: a page of a stranger whose name resolves to this machine.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        self._names = {name.lower() for name in settings.server_names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, _with_nosniff(send))
            return
        await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, _with_nosniff(send))

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._names and _host_name(headers.get("host", "")) not in self._names:
            return ApiError("this server does not answer to this host name", status=421, code="unknown_host")
        if self._key is None or scope["path"] in OPEN_PATHS or self._is_known(headers.get("authorization", "")):
            return None
        return ApiError(
            "the API key is missing or wrong; send it as Authorization: Bearer KEY",
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_known(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1", "replace"))
        return hmac.compare_digest(given, self._key or b"") and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, so that comparing tells nothing of the key's


def _host_name(host: str) -> str:
    name = host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.strip("[]").rstrip(".").lower()


def _with_nosniff(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
        await send(message)

    return sending
