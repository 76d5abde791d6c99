"""Reading one image of any kind the runtime accepts, hostile ones included, as upright 8-bit RGB."""

import base64
import hashlib
import io
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import OneVisionError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# Checked against the header, before a pixel is decoded: 2**28 bytes of RGB, 340 MiB as Pillow holds it. It is
# also where Pillow itself starts to warn, so an image that passes is silent.
MAX_DECODED_PIXELS = 2**28 // 3
# Rasters only: Pillow would also run interpreters (EPS, WMF) and read containers nobody means as a picture.
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]
if find_spec("PIL.AvifImagePlugin"):  # Pillow 11.3 and later
    FORMATS.append("AVIF")

_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_MAX_DIGESTED = 1 << 26  # bytes of a file: a larger one is not read for its digest


def load_image(source: ImageSource, *, where: str = "image") -> Image.Image:
    """Read one image, upright, as 8-bit RGB.

    source: a path (or file:// URL), the bytes of an image file, a data: URL, a Pillow image, or an array:
    [height, width] or [height, width, 1 to 4 channels], uint8, uint16, bool, or float from 0 to 1 (channels:
    grey, grey + alpha, RGB, RGBA). A plain RGB Pillow image is returned as it is, not copied.

    Transparent pixels are laid over white, as the family's own utilities do. 16-bit samples keep their high
    byte. Of an animation the first frame counts. EXIF rotation is applied.
    Raises OneVisionError beginning with `where` and the file's name.
    """
    where = named(where, source)
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source))
        with Image.open(resolve_source(source), formats=FORMATS) as image:
            return _upright_rgb(image)
    except OneVisionError as problem:
        raise OneVisionError(f"{where}: {problem}") from problem.__cause__
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise OneVisionError(f"{where}: not an image, damaged, or in a format other than {known}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise OneVisionError(f"{where}: {_too_large(int(pixels[0]) if pixels else 0)}") from error
    except Exception as error:  # hostile bytes make Pillow's parsers raise nearly any type
        raise OneVisionError(
            f"{where}: cannot be decoded, it is truncated, damaged or of a kind not supported "
            f"({str(error) or type(error).__name__}); save it again as PNG or JPEG"
        ) from error


def resolve_source(source: str | os.PathLike[str] | bytes) -> Path | io.BytesIO:
    """The readable file behind a path or file:// URL, or the bytes of a data: URL or of a file, unread.

    Raises OneVisionError for what is missing, empty, not a regular file, or on the network.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _data_url_bytes(source)
    elif isinstance(source, str | os.PathLike):
        return _regular_file(local_path(source))
    else:
        raise OneVisionError(f"a {type(source).__name__} is not a path, bytes, data URL, Pillow image or array")
    if not data:
        raise OneVisionError("there are no bytes in it")
    return io.BytesIO(data)


def source_digest(source: ImageSource) -> bytes | None:
    """The sha256 of an image file's bytes; None for pixels, for what cannot be read and for more than 64 MiB."""
    if isinstance(source, Image.Image | np.ndarray):
        return None
    try:
        found = resolve_source(source)
        if isinstance(found, io.BytesIO):
            return hashlib.sha256(found.getbuffer()).digest()
        with open(found, "rb") as file:
            small = os.fstat(file.fileno()).st_size <= _MAX_DIGESTED
            return hashlib.file_digest(file, "sha256").digest() if small else None
    except (OneVisionError, OSError):  # whoever reads the image will say so
        return None


def _data_url_bytes(url: str) -> bytes:
    """The payload of data:[type][;base64],payload, with the white space and lost padding browsers forgive."""
    header, comma, payload = url.partition(",")
    if not comma:
        raise OneVisionError("a data URL needs a comma between its type and its data")
    data = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    data = b"".join(data.split()).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise OneVisionError(f"the data URL's base64 is broken ({error})") from error


def local_path(source: str | os.PathLike[str]) -> Path:
    """The path itself, or that of a file:// URL; other URLs are refused."""
    name = os.fsdecode(source)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", name)
    if not scheme:
        return Path(name)
    if scheme[1].lower() == "file":
        return Path(unquote(name[len("file://") :].removeprefix("localhost")))
    raise OneVisionError(
        f"{scheme[1]}:// addresses are not fetched, the runtime works offline; "
        "download it and pass a path, bytes or a data URL"
    )


def _regular_file(path: Path) -> Path:
    try:
        if path.is_dir():
            raise OneVisionError("this is a directory, not a file; name a file in it")
        if not path.exists():
            raise OneVisionError("no such file; check the path")
        if not path.is_file():
            raise OneVisionError("this is a device or pipe, not a file")
        if not path.stat().st_size:
            raise OneVisionError("the file is empty")
        if not os.access(path, os.R_OK):
            raise OneVisionError("there is no permission to read the file")
    except (OSError, ValueError) as error:
        raise OneVisionError(f"this is not a usable path ({getattr(error, 'strerror', None) or error})") from error
    return path


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3):
        raise OneVisionError(f"an array must be [height, width(, channels)], not {list(array.shape)}")
    if not array.size:
        raise OneVisionError(f"the array is empty: {list(array.shape)}")
    if array.ndim == 3 and array.shape[2] > 4:
        first = array.shape[0] <= 4
        advice = "pass array.transpose(1, 2, 0) if they come first" if first else "at most 4 are understood"
        raise OneVisionError(f"an array of shape {list(array.shape)} has {array.shape[2]} channels; {advice}")
    mode = "L" if array.ndim == 2 else ("L", "LA", "RGB", "RGBA")[array.shape[2] - 1]
    levels = _eight_bit(array[..., 0] if array.ndim == 3 and mode == "L" else array)
    return Image.frombytes(mode, levels.shape[1::-1], levels.tobytes())


def _eight_bit(samples: np.ndarray) -> np.ndarray:
    """uint8 levels of bool, uint8, uint16, or float samples from 0 to 1."""
    if samples.dtype == np.uint8:
        return samples
    if samples.dtype == bool:
        return samples * np.uint8(255)
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2:
        return (samples >> 8).astype(np.uint8)
    if samples.dtype.kind != "f":
        raise OneVisionError(f"samples of type {samples.dtype} have no known range; convert them to uint8")
    low, high = samples.min(), samples.max()
    if not (low >= 0 and high <= 1):  # written so that NaN is refused too
        raise OneVisionError(
            f"floating-point samples must be from 0 to 1, these go from {low:g} to {high:g}; convert them to uint8"
        )
    return np.rint(samples * samples.dtype.type(255)).astype(np.uint8)


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise OneVisionError(_too_large(image.width * image.height))
    image.load()
    turn = _turn(image)
    rgb = _to_rgb(image)
    if turn is None:
        return rgb
    rgb = rgb.transpose(turn)
    rgb.info = {}  # the copied EXIF block would turn it again
    return rgb


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG) or 1)
    except Exception:  # a malformed EXIF block says nothing about the pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bit(_deep_samples(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if type(image) is Image.Image and image.mode == "RGB" else image.convert("RGB")


def _deep_samples(image: Image.Image) -> np.ndarray:
    """The samples of a grey image of more than 8 bits; Pillow's 32-bit mode "I" is read as 16-bit values."""
    samples = np.asarray(image)
    if image.mode != "I":
        return samples
    low, high = samples.min(), samples.max()
    if low < 0 or high > 0xFFFF:
        raise OneVisionError(f"its 32-bit samples, {low} to {high}, have no known range; convert it to 8 bits")
    return samples.astype(np.uint16)


def _too_large(pixels: int) -> str:
    return f"{pixels:,} pixels are over the limit of {MAX_DECODED_PIXELS:,}; scale it down first"


def named(where: str, source: object) -> str:
    """`where` and, when the source is a path, its name, shortened."""
    if not isinstance(source, str | os.PathLike):
        return where
    name = os.fsdecode(source)
    shown = "data URL" if name[:5].lower() == "data:" else name if len(name) <= 100 else f"...{name[-97:]}"
    return f"{where} ({shown})" if " of " in where else f"{where} {shown}"
