"""Where rows come from: lines of a JSONL file, a folder of images, token-level arrays in .npz files.

Opening a source checks what is cheap to check, and names the line or the file: JSON, messages, that each image
exists, ids and grids. Images and pixel rows are read when a row is prepared.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config import ModelConfig
from ..errors import OneVisionError
from ..runtime.chat import media_of
from ..runtime.image_reading import local_path, named, resolve_source
from ..runtime.video import IMAGE_SUFFIXES, natural_order
from .rows import Preparer, Row
from .token_rows import read_npz

MAX_LINE_BYTES = 1 << 26  # room for the data URLs of several photographs
FOLDER_PROMPTS = (
    "Describe this image.",
    "What text is in this image?",
    "What is the main subject of this image?",
    "Describe the colours and the layout of this image.",
)
_MEDIA_KEYS = ("image", "images", "video")
_FOLDER_KINDS = {"images": IMAGE_SUFFIXES, ".npz files": {".npz"}, ".jsonl files": {".jsonl"}}


class Entry(Protocol):
    """A row that is not prepared yet."""

    @property
    def name(self) -> str:
        """What messages call it, such as questions.jsonl:17."""

    @property
    def media(self) -> tuple[str, ...]:
        """What it shows: two rows with a medium in common show the same image. Empty for text alone."""

    def prepare(self, preparer: Preparer) -> Row:
        """Read its images and make the row. Raises OneVisionError."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages, their media as absolute paths or data URLs, and the answer expected of the model."""

    name: str
    messages: list[dict[str, Any]]
    answer: str | None
    media: tuple[str, ...]

    def prepare(self, preparer: Preparer) -> Row:
        """Read its images and make the row. Raises OneVisionError."""
        return preparer.row(self.name, self.messages, self.answer)


def read_jsonl(path: Path) -> list[Conversation]:
    """The rows of a JSONL file, one object a line; blank lines are skipped.

    {"image": path, data URL or list of them (or "images"), "video": path or list of frames, with "nframes" or
    "fps", "prompt": text, "answer": text}, or {"messages": chat messages}, of which the last, where it is the
    assistant's, is the answer. Relative paths start at the file's folder; other keys mean nothing.
    Raises OneVisionError naming the file and the line.
    """
    rows = []
    for number, line in _lines(path):
        try:
            rows.append(_conversation(f"{path.name}:{number}", _object(line), path.parent))
        except OneVisionError as problem:
            raise OneVisionError(f"{path}:{number}: {problem}") from problem.__cause__
    return rows


def read_folder(folder: Path, config: ModelConfig) -> list[Entry]:
    """A row for every image of a folder, in natural order (2 before 10), or the rows of its .npz files.

    Hidden files, other files and subfolders are passed over. Raises OneVisionError for a folder with neither, or
    both.
    """
    names = sorted(_file_names(folder), key=natural_order)
    files = {kind: [n for n in names if Path(n).suffix.lower() in s] for kind, s in _FOLDER_KINDS.items()}
    found = [kind for kind, members in files.items() if members]
    if found == [".npz files"]:
        return [row for name in files[".npz files"] for row in read_npz(folder / name, config)]
    if found == ["images"]:
        return [_folder_image(folder / name, index) for index, name in enumerate(files["images"])]
    advice = f"name one, such as {folder / files['.jsonl files'][0]}" if files[".jsonl files"] else "keep one kind"
    if not found:
        raise OneVisionError(f"{folder}: holds no images and no .npz files; subfolders are not searched")
    raise OneVisionError(f"{folder}: holds {' and '.join(found)}; a folder is images or .npz files: {advice}")


def _file_names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    except OSError as error:
        raise OneVisionError(f"{folder}: cannot be read: {error.strerror}") from error


def _folder_image(path: Path, index: int) -> Conversation:
    body = {"image": path.name, "prompt": FOLDER_PROMPTS[index % len(FOLDER_PROMPTS)]}
    try:
        return _conversation(path.name, body, path.parent)
    except OneVisionError as problem:
        raise OneVisionError(f"{path.parent}: {problem}") from problem.__cause__


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and bytes of the lines that are not blank."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    limit = f"{MAX_LINE_BYTES >> 20} MiB"
                    raise OneVisionError(f"{path}:{number}: is longer than {limit}; name images by path instead")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise OneVisionError(f"{path}: cannot be read: {error.strerror}") from error


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, less what is null in it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise OneVisionError(f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise OneVisionError(f"is not JSON ({error}); every line is one object") from error
    if not isinstance(row, dict):
        raise OneVisionError(f'is a JSON {type(row).__name__}, not an object such as {{"image": ..., "prompt": ...}}')
    return {key: value for key, value in row.items() if value is not None}


def _conversation(name: str, row: dict[str, Any], folder: Path) -> Conversation:
    messages, answer = _turns(row)
    media_of(messages)  # so that what follows reads sound messages
    messages, answer = _without_answer(messages, answer)
    messages = [_located(message, folder) for message in messages]
    images, videos = media_of(messages)
    frames = [s for v in videos for s in (v.source if isinstance(v.source, list) else [v.source])]
    for where, sources in (("image", images), ("video", frames)):
        for source in sources:
            _check_source(source, where)
    return Conversation(name, messages, answer, (*images, *frames))


def _turns(row: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The messages of a row and its "answer"."""
    answer = _text(row, "answer") if "answer" in row else None
    if "messages" not in row:
        content = [*_images(row), *_video(row), {"type": "text", "text": _text(row, "prompt")}]
        return [{"role": "user", "content": content}], answer
    others = [key for key in (*_MEDIA_KEYS, "prompt") if key in row]
    if others:
        raise OneVisionError(f'has both "messages" and "{others[0]}"; put everything into the messages')
    return row["messages"], answer


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise OneVisionError(f'has no "{key}"; a row is {{"image": path, "prompt": text}} or {{"messages": [...]}}')
    if not isinstance(value, str) or not value.strip():
        raise OneVisionError(f'"{key}" is {str(value)[:80]!r}; it must be text')
    return value


def _images(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "image" in row and "images" in row:
        raise OneVisionError('has both "image" and "images"; give one of them, which may be a list')
    value = row.get("image", row.get("images", []))
    return [{"type": "image", "image": source} for source in (value if isinstance(value, list) else [value])]


def _video(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "video" not in row:
        return []
    item = {"type": "video", "video": row["video"]}
    return [item | {key: row[key] for key in ("fps", "nframes") if key in row}]


def _without_answer(messages: Any, answer: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """The messages up to the assistant's last, and its text."""
    *others, last = messages
    if last["role"] != "assistant":
        return messages, answer
    if answer is not None:
        raise OneVisionError('has an "answer" and a last message of the assistant; give one of them')
    if not others:
        raise OneVisionError("its only message is the assistant's; a question has to come before it")
    content = last["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(item["type"] != "text" for item in items):
        raise OneVisionError("the assistant's last message, the answer, must be text alone")
    return others, _text({"answer": "".join(item["text"] for item in items)}, "answer")


def _located(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A sound message with relative paths made absolute."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_located_item(item, folder) for item in message["content"]]}


def _located_item(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    kind = item["type"]
    source = item[kind]
    if kind == "text":
        return item
    if isinstance(source, dict):
        return {**item, kind: {**source, "url": _absolute(source["url"], folder)}}
    paths = [_absolute(s, folder) for s in source] if isinstance(source, list) else _absolute(source, folder)
    return {**item, kind: paths}


def _absolute(source: str, folder: Path) -> str:
    return source if source[:5].lower() == "data:" else str(folder.absolute() / local_path(source))


def _check_source(source: str, where: str) -> None:
    """That a file is there to be read; a video may be a folder of frames. Data URLs are checked when read."""
    if source[:5].lower() == "data:":
        return
    with suppress(OSError, ValueError):  # not a usable path: the next line says why
        if where == "video" and Path(source).is_dir():
            return
    try:
        resolve_source(source)
    except OneVisionError as problem:
        raise OneVisionError(f"{named(where, source)}: {problem}") from problem.__cause__
