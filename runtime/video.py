"""A video as a list of frames: which frames to take, and taking them from a file, a folder or a list."""

import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import OneVisionError
from .image_reading import MAX_DECODED_PIXELS, ImageSource, load_image, local_path, named, resolve_source
from .images import check_same_size

DEFAULT_FRAMES = 32
# All frames kept of one video, together: 2 GiB at Pillow's four bytes a pixel, 64 frames of 3840 x 2160.
MAX_VIDEO_PIXELS = 2**29
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
# Self-contained containers only: playlists (hls, concat, dash) make a decoder open other files and URLs. The
# sound formats are there to be told apart from damaged files.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,nut,mjpeg,h264,hevc,m4v,yuv4mpegpipe,"
    "mp3,wav,flac,aac"
)
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    -270: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
    270: Image.Transpose.ROTATE_270,
}
_ATTACHED_PICTURE = 1024  # libavformat's AV_DISPOSITION_ATTACHED_PIC: a cover, not a video


def sample_indices(
    total: int,
    *,
    frames: int | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> list[int]:
    """Ascending indices of the frames to take out of `total`, each at most once.

    The indices are round(linspace(0, total - 1, count)), halves to even: first and last frame included.
    count is min(frames, total) (32 frames unless said); or, by fps, the rule of the family's own utilities,
    total / source_fps * fps held within [min_frames, max_frames and total] and rounded down to an even number
    (1 for a single frame). Only sampling by fps uses source_fps, min_frames and max_frames.
    Raises OneVisionError for both ways at once and for numbers that are not positive.
    """
    if frames is not None and fps is not None:
        raise OneVisionError("give frames or fps for a video, not both")
    if total < 1:
        raise OneVisionError("there are no frames in it")
    if fps is not None:
        count = _count_by_fps(total, fps, source_fps, min_frames, max_frames)
    else:
        count = min(DEFAULT_FRAMES if frames is None else frames, total)
    if count < 1 or count != int(count):
        raise OneVisionError(f"frames must be a positive whole number, not {frames}")
    return [int(index) for index in np.rint(np.linspace(0, total - 1, int(count)))]


def _count_by_fps(total: int, fps: float, source_fps: float | None, least: int, most: int) -> int:
    if source_fps is None:
        raise OneVisionError("there is no frame rate to sample by fps from; give frames instead")
    for name, rate in (("fps", fps), ("the source's frame rate", source_fps)):
        if not 0 < rate < math.inf:
            raise OneVisionError(f"{name} must be a positive number, not {rate}")
    wanted = max(total / source_fps * fps, math.ceil(least / 2) * 2)
    return max(1, int(min(wanted, most, total) / 2) * 2)


def load_video(
    source: str | os.PathLike[str] | bytes | np.ndarray | Sequence[ImageSource],
    *,
    frames: int | None = None,
    fps: float | None = None,
) -> list[Image.Image]:
    """The chosen frames of a video, upright, as RGB images of one size, in order.

    source: a video file (path, file:// URL, bytes or data: URL), read with PyAV, of which `frames` evenly
    spaced frames (32 unless said) or `fps` frames per second are taken; or the frames themselves, as a list
    of images, an array [frames, height, width, channels], or a directory of image files in natural order (2
    before 10), which are all taken unless `frames` says how many.
    The file is decoded from the start; only the chosen frames are kept (600 frames of 1280 x 720: 0.5 s on 2
    CPU cores, 150 MB). Its rotation is applied where PyAV tells it (14.2 and later). Raises OneVisionError.
    """
    try:
        images = _given_frames(source)
        if images is None:
            return _from_file(source, frames, fps)  # type: ignore[arg-type]  # the other kinds are gone
        return _from_images(images, frames, fps)
    except OneVisionError as problem:
        raise OneVisionError(f"{named('video', source)}: {problem}") from problem.__cause__


def _given_frames(source: Any) -> list[ImageSource] | None:
    """The frames of a source that consists of images; None when it has to be decoded."""
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise OneVisionError(f"an array must be [frames, height, width, channels], not {list(source.shape)}")
    if isinstance(source, list | tuple | np.ndarray):
        return list(source)
    if isinstance(source, Image.Image):
        raise OneVisionError("a single image is not a video; pass a list of images")
    if not isinstance(source, str | os.PathLike) or os.fsdecode(source)[:5].lower() == "data:":
        return None
    directory = local_path(source)
    try:
        return _image_files(directory) if directory.is_dir() else None
    except (OSError, ValueError):
        return None  # not a usable path: reading it as a file says why


def _image_files(directory: Path) -> list[ImageSource]:
    names = [path.name for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    visible = [name for name in names if not name.startswith(".")]
    if not visible:
        raise OneVisionError("the directory holds no image files")
    return [directory / name for name in sorted(visible, key=natural_order)]


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A sort key by which frame2 comes before frame10: text and numbers take turns. No two names share one."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if index % 2 else part.lower() for index, part in enumerate(parts)], name


def _from_images(images: list[ImageSource], frames: int | None, fps: float | None) -> list[Image.Image]:
    if frames is None and fps is None:
        frames = max(len(images), 1)
    chosen = sample_indices(len(images), frames=frames, fps=fps)
    return _collected(load_image(images[index], where=f"frame {index + 1} of {len(images)}") for index in chosen)


def _from_file(source: str | os.PathLike[str] | bytes, frames: int | None, fps: float | None) -> list[Image.Image]:
    file = resolve_source(source)
    av = _pyav()
    try:
        total, rate = _survey(av, file)
        wanted = sample_indices(total, frames=frames, fps=fps, source_fps=rate)
        pictures, decoded = _decoded(av, file, wanted)
        if 0 < decoded <= wanted[-1]:  # some packets held no picture of their own
            wanted = sample_indices(decoded, frames=frames, fps=fps, source_fps=rate)
            pictures, _ = _decoded(av, file, wanted)
    except OneVisionError:
        raise
    except Exception as error:  # PyAV's own errors, and whatever else hostile bytes bring about
        raise OneVisionError(
            f"cannot be decoded, it is truncated, damaged or of a kind not supported ({error})"
        ) from error
    if not pictures:
        raise OneVisionError("no frame could be decoded")
    return pictures


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise OneVisionError("reading video files needs PyAV: pip install 'onevision-edge[video]'") from error
    return av


@contextmanager
def _opened(av: Any, file: Path | io.BytesIO) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    if isinstance(file, io.BytesIO):
        file = io.BytesIO(file.getvalue())
    target = str(file.resolve()) if isinstance(file, Path) else file
    with av.open(target, options={"format_whitelist": CONTAINERS}) as container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            raise OneVisionError("there is no video in it")
        context = streams[0].codec_context
        if context is None:
            raise OneVisionError("no decoder for its video is installed")
        if context.width * context.height > MAX_DECODED_PIXELS:
            raise OneVisionError(f"frames of {context.width} x {context.height} pixels are too large")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _is_cover(stream: Any) -> bool:
    return bool(int(getattr(getattr(stream, "disposition", 0), "value", 0)) & _ATTACHED_PICTURE)


def _survey(av: Any, file: Path | io.BytesIO) -> tuple[int, float | None]:
    """Number of coded pictures and frames per second, from one pass over the packets without decoding.

    The count some containers declare is not used: it is missing in Matroska and off after edits.
    """
    total, end, cut = 0, 0.0, False
    with _opened(av, file) as (container, stream):
        rate, promised = stream.average_rate or stream.guessed_rate, (container.duration or 0) / av.time_base
        for packet in container.demux():
            if not packet.size:
                continue
            cut = packet.is_corrupt
            total += packet.stream_index == stream.index and not packet.is_discard
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    # A tenth is left for the rounding and the trailing silence of honest files.
    if cut or end < 0.9 * promised:
        raise OneVisionError(f"it is truncated after {end:.1f} seconds; copy it again from its source")
    return total, float(rate) if rate else None


def _decoded(av: Any, file: Path | io.BytesIO, wanted: list[int]) -> tuple[list[Image.Image], int]:
    """The wanted frames, and how many were decoded on the way."""
    decoded = 0

    def pictures(frames: Iterable[Any]) -> Iterator[Image.Image]:
        nonlocal decoded
        chosen = set(wanted)
        for frame in frames:
            decoded += 1
            if decoded - 1 in chosen:
                yield _upright(frame)
            if decoded > wanted[-1]:
                return

    with _opened(av, file) as (container, stream):
        return _collected(pictures(container.decode(stream))), decoded


def _upright(frame: Any) -> Image.Image:
    """RGB image of a decoded frame, turned by its display matrix (degrees counterclockwise)."""
    image: Image.Image = frame.to_image()
    turn = _TURNS.get(getattr(frame, "rotation", 0))
    return image if turn is None else image.transpose(turn)


def _collected(pictures: Iterable[Image.Image]) -> list[Image.Image]:
    """The frames as a list; refused where they differ in size or do not fit into memory."""
    kept: list[Image.Image] = []
    for picture in pictures:
        kept.append(picture)
        if len(kept) * picture.width * picture.height > MAX_VIDEO_PIXELS:
            raise OneVisionError(
                f"{len(kept)} frames of {picture.width} x {picture.height} pixels are over the limit of "
                f"{MAX_VIDEO_PIXELS:,} pixels a video; take fewer frames or scale them down"
            )
    check_same_size(kept)
    return kept
