"""The door for images: what a client names becomes the bytes of an image file, and nothing else gets in.

Paths and file: addresses never pass. A picture's size is read from its header, before any pixel is decoded.
"""

import asyncio
import io
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import OneVisionError
from ..runtime.image_reading import FORMATS, resolve_source
from .errors import ApiError
from .protocol import Picture
from .settings import Settings

Fetch = Callable[[str], Awaitable[bytes]]

_REMOTE = re.compile(r"https?://", re.IGNORECASE)
_AT_ONCE = 4  # images fetched for one request


async def read_pictures(pictures: Sequence[Picture], settings: Settings, fetch: Fetch) -> dict[Picture, bytes]:
    """The image file of every picture, decoded from its data URL or fetched from an allowed host.

    Raises ApiError naming the picture's place for any other address, for what is not an image, and where all of
    them together have more than settings.max_pixels pixels.
    """
    remote = [picture for picture in pictures if _is_remote(picture, settings)]
    room = _Room(asyncio.Semaphore(_AT_ONCE), settings.max_body_bytes)
    fetched = await asyncio.gather(*(_fetched(picture, fetch, room) for picture in remote))
    files = dict(zip(remote, fetched, strict=True))
    return await asyncio.to_thread(_read, pictures, files, settings.max_pixels)


def with_files(messages: Sequence[dict[str, Any]], files: Mapping[Picture, bytes]) -> list[dict[str, Any]]:
    """The messages with every Picture in them replaced by its file's bytes."""
    return [{**message, "content": _content(message["content"], files)} for message in messages]


def data_url_bytes(picture: Picture) -> bytes:
    """The bytes of a data URL. Raises ApiError for what is none."""
    if picture.url[:5].lower() != "data:":
        raise _refusal(picture, "it must be a data URL, such as data:image/png;base64,...", "invalid_image_url")
    try:
        source = resolve_source(picture.url)
    except OneVisionError as error:
        raise _refusal(picture, str(error), "invalid_image") from None
    assert isinstance(source, io.BytesIO)
    return source.getvalue()


def image_pixels(picture: Picture, data: bytes) -> int:
    """Width times height of an image file, by its header. Raises ApiError for what is no image."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _refusal(picture, "the image has too many pixels; scale it down", "image_too_large") from None
    except Exception:  # hostile bytes make Pillow's parsers raise nearly any type
        known = ", ".join(FORMATS)
        raise _refusal(
            picture, f"it is not an image, damaged, or in a format other than {known}", "invalid_image"
        ) from None


def _is_remote(picture: Picture, settings: Settings) -> bool:
    if not _REMOTE.match(picture.url):
        return False
    if not settings.image_hosts:
        raise _refusal(
            picture, "this server fetches no images; send the image itself as a data URL", "image_url_not_allowed"
        )
    return True


@dataclass(slots=True)
class _Room:
    """What fetching the images of one request may take: so many at once, so many bytes together."""

    gate: asyncio.Semaphore
    left: int


async def _fetched(picture: Picture, fetch: Fetch, room: _Room) -> bytes:
    try:
        async with room.gate:
            data = await fetch(picture.url) if room.left > 0 else b""
    except OneVisionError as error:
        raise _refusal(picture, str(error), "image_url_not_fetched") from None
    room.left -= len(data)
    if room.left <= 0:
        raise _refusal(picture, "up to here, the request's images have more bytes than allowed", "image_too_large")
    return data


def _read(pictures: Sequence[Picture], fetched: Mapping[Picture, bytes], limit: int) -> dict[Picture, bytes]:
    files, pixels = {}, 0
    for picture in pictures:
        files[picture] = fetched[picture] if picture in fetched else data_url_bytes(picture)
        pixels += image_pixels(picture, files[picture])
        if pixels > limit:
            raise _refusal(
                picture,
                f"up to here, the request's images have {pixels} pixels; the limit is {limit}",
                "image_too_large",
            )
    return files


def _content(content: Any, files: Mapping[Picture, bytes]) -> Any:
    if isinstance(content, str):
        return content
    return [_item(item, files) for item in content]


def _item(item: dict[str, Any], files: Mapping[Picture, bytes]) -> dict[str, Any]:
    if item["type"] == "image":
        return {**item, "image": files[item["image"]]}
    if item["type"] == "video":
        return {**item, "video": [files[frame] for frame in item["video"]]}
    return item


def _refusal(picture: Picture, reason: str, code: str) -> ApiError:
    return ApiError(f"{picture.where}: {reason}", param=picture.where, code=code)
