"""A request's body, of bounded size and in bounded time."""

import asyncio

from starlette.requests import Request

from .errors import ApiError
from .settings import Settings


async def read_body(request: Request, settings: Settings) -> bytes:
    """The bytes of a body of JSON.

    Raises ApiError: 415 for another content type, which a page of another origin could send without being asked
    about; 413 for too many bytes, announced or not; 408 where they do not arrive in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("the content type must be application/json", status=415, code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("a compressed body is not read", status=415, code="unsupported_encoding")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > settings.max_body_bytes:
        raise _too_large(settings)
    try:
        async with asyncio.timeout(settings.body_seconds):
            return await _collected(request, settings)
    except TimeoutError:
        raise ApiError(
            f"the body did not arrive within {settings.body_seconds:g} seconds",
            status=408,
            code="body_timeout",
            headers={"Connection": "close"},
        ) from None


async def _collected(request: Request, settings: Settings) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > settings.max_body_bytes:
            raise _too_large(settings)
    return bytes(body)


def _too_large(settings: Settings) -> ApiError:
    return ApiError(
        f"the body has more than {settings.max_body_bytes} bytes",
        status=413,
        code="body_too_large",
        headers={"Connection": "close"},
    )
