"""Chat messages to the text of a prompt, and placeholders to as many as a medium has embeddings.

Where a medium stands, the prompt holds one placeholder token, and the k-th one belongs to the k-th medium. So
that nothing else can be taken for one, `render` refuses messages whose own text contains a placeholder, and a
rendered prompt with more or fewer of them than media (a template that drops some, text that forms one across
two items). Other special tokens in the text, such as an end of turn, mean to the tokenizer what they say, as
everywhere with these models: a service that takes text from strangers has to filter them.

A template is a program from the bundle. It runs in jinja2's immutable sandbox and sees plain data, never the
media: no private attributes, no changes to what it is given, no files, no imports. Beyond these bounds it
ends with an error: 100,000 loop iterations and calls, 10 seconds (looked at in each of them), ranges of
100,000, products and prompts of 16 million characters, powers of 1,024 bits, Python's nesting. Not bounded:
the memory that joined strings or one filter may take on the way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
import numpy as np
from jinja2 import nodes
from PIL import Image

from ..errors import OneVisionError

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
_MAX_STEPS, _MAX_SECONDS, _MAX_TEXT, _MAX_BITS = 100_000, 10.0, 16_000_000, 1_024

# For a bundle that brings no template; SPEC section 7.
DEFAULT_TEMPLATE = """\
{%- macro turn(role, body) -%}
{{ '<|im_start|>' ~ role ~ '\\n' ~ body ~ '<|im_end|>\\n' }}
{%- endmacro -%}
{%- macro flatten(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for item in content -%}
{{ item.text if item.type == 'text' else '<|vision_start|><|' ~ item.type ~ '_pad|><|vision_end|>' }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}{{ turn('system', 'You are a helpful assistant.') }}{%- endif -%}
{%- for message in messages -%}{{ turn(message.role, flatten(message.content)) }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a message: a path or its frames as images, and one way to sample it, or none."""

    source: Any
    fps: float | None = None
    nframes: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt with one placeholder per medium, and the media in the order of their placeholders.

    An image is what the message held: a path, a data URL, bytes, a PIL image or an array [height, width, 3].
    """

    text: str
    images: list[Any]
    videos: list[Video]


def render(
    messages: Sequence[dict[str, Any]],
    template: str | None,
    *,
    add_generation_prompt: bool = True,
    image_token: str = IMAGE_TOKEN,
    video_token: str = VIDEO_TOKEN,
) -> Prompt:
    """Render chat messages with a Hugging Face chat template, or with the built-in one for None.

    A message is {"role": str, "content": str or a list of items}. Items, as in the model card and in OpenAI's
    interface: {"type": "text", "text": str}; {"type": "image", "image": path, data URL, bytes, PIL image or
    array}; {"type": "image_url", "image_url": str or {"url": str}}; {"type": "video", "video": path or list
    of frames, and optionally "fps" or "nframes"}. Other keys of a message, JSON values, reach the template.

    Raises OneVisionError, naming the place as in `messages[2].content[0].type`, for anything else, and for a
    template that fails or renders other placeholders than one per medium.
    """
    prompt = Prompt("", [], [])
    turns = _Reader(prompt, (image_token, video_token)).messages(messages)
    text = _render_text(template or DEFAULT_TEMPLATE, turns, add_generation_prompt)
    for name, token, media in (("image", image_token, prompt.images), ("video", video_token, prompt.videos)):
        if text.count(token) != len(media):
            raise OneVisionError(
                f"the prompt has {text.count(token)} {name} placeholders ({token}) for {len(media)} {name}s; "
                "the template drops or repeats some, or text next to each other forms one"
            )
    return Prompt(text, prompt.images, prompt.videos)


def media_of(
    messages: Sequence[dict[str, Any]], *, image_token: str = IMAGE_TOKEN, video_token: str = VIDEO_TOKEN
) -> tuple[list[Any], list[Video]]:
    """The images and the videos of chat messages, in order, without rendering or reading any.

    Raises OneVisionError as `render` does for what is not a message.
    """
    prompt = Prompt("", [], [])
    _Reader(prompt, (image_token, video_token)).messages(messages)
    return prompt.images, prompt.videos


def expand_placeholders(
    ids: Sequence[int],
    image_token_id: int,
    video_token_id: int,
    image_tokens: Sequence[int],
    video_tokens: Sequence[int],
) -> np.ndarray:
    """Repeat the k-th image placeholder of `ids` image_tokens[k] times, and videos' alike: int64 [tokens].

    Raises OneVisionError naming both numbers when there are more or fewer placeholders than counts.
    """
    row = np.asarray(ids, np.int64)
    repeats = np.ones(row.shape, np.int64)
    for name, token_id, counts in (
        ("image", image_token_id, image_tokens),
        ("video", video_token_id, video_tokens),
    ):
        places = np.flatnonzero(row == token_id)
        if len(places) != len(counts):
            raise OneVisionError(
                f"the prompt has {len(places)} {name} placeholders (id {token_id}) for {len(counts)} {name}s"
            )
        if any(n < 1 for n in counts):
            raise OneVisionError(f"every {name} needs at least one token; the counts are {list(counts)}")
        repeats[places] = counts
    return np.repeat(row, repeats)


class _Reader:
    """Checks messages, moves their media into a prompt and returns what the template may see."""

    def __init__(self, prompt: Prompt, placeholders: tuple[str, str]) -> None:
        self.prompt = prompt
        self.placeholders = placeholders

    def messages(self, messages: Any) -> list[dict[str, Any]]:
        if not isinstance(messages, list | tuple) or not messages:
            _refuse("messages", messages, "a list of at least one message")
        return [self._message(m, f"messages[{i}]") for i, m in enumerate(messages)]

    def _message(self, message: Any, where: str) -> dict[str, Any]:
        if not isinstance(message, dict):
            _refuse(where, message, 'an object with "role" and "content"')
        role = self._text(_field(message, "role", where), f"{where}.role")
        content, place = _field(message, "content", where), f"{where}.content"
        others = {k: _plain(v, f"{where}.{k}") for k, v in message.items() if k not in ("role", "content")}
        if isinstance(content, list | tuple):
            items = [self._item(item, f"{place}[{i}]") for i, item in enumerate(content)]
            return {**others, "role": role, "content": items}
        if not isinstance(content, str):
            _refuse(place, content, "text or a list of items")
        return {**others, "role": role, "content": self._text(content, place)}

    def _item(self, item: Any, where: str) -> dict[str, str]:
        if not isinstance(item, dict):
            _refuse(where, item, 'an object such as {"type": "text", "text": ...}')
        kind = _field(item, "type", where)
        readers = {"text": self._text_item, "image": self._image, "image_url": self._image_url}
        reader = {**readers, "video": self._video}.get(kind) if isinstance(kind, str) else None
        if reader is None:
            _refuse(f"{where}.type", kind, '"text", "image", "image_url" or "video"')
        return reader(item, where)

    def _text(self, text: Any, where: str) -> str:
        if not isinstance(text, str):
            _refuse(where, text, "text")
        for token in self.placeholders:
            if token in text:
                raise OneVisionError(
                    f"{where} contains {token}, which marks the place of a medium; give the medium as an item"
                )
        return text

    def _text_item(self, item: dict[str, Any], where: str) -> dict[str, str]:
        _only(item, where, "text")
        return {"type": "text", "text": self._text(_field(item, "text", where), f"{where}.text")}

    def _image(self, item: dict[str, Any], where: str) -> dict[str, str]:
        _only(item, where, "image")
        self.prompt.images.append(_image_source(_field(item, "image", where), f"{where}.image"))
        return {"type": "image"}

    def _image_url(self, item: dict[str, Any], where: str) -> dict[str, str]:
        _only(item, where, "image_url")
        value, place = _field(item, "image_url", where), f"{where}.image_url"
        if isinstance(value, dict):
            value, place = _field(value, "url", place), f"{place}.url"
        if not isinstance(value, str) or not value:
            _refuse(place, value, "text: a data URL or a path")
        self.prompt.images.append(value)
        return {"type": "image"}

    def _video(self, item: dict[str, Any], where: str) -> dict[str, str]:
        _only(item, where, "video", "fps", "nframes")
        source = _video_source(_field(item, "video", where), f"{where}.video")
        fps, nframes = item.get("fps"), item.get("nframes")
        if fps is not None and nframes is not None:
            raise OneVisionError(f"{where} has both fps and nframes; give one of them")
        if fps is not None and not (_is_number(fps, int | float) and 0 < fps < float("inf")):
            _refuse(f"{where}.fps", fps, "a number of frames per second above 0")
        if nframes is not None and not (_is_number(nframes, int) and nframes > 0):
            _refuse(f"{where}.nframes", nframes, "a whole number of frames from 1")
        self.prompt.videos.append(Video(source, fps, nframes))
        return {"type": "video"}


def _image_source(value: Any, where: str) -> Any:
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image)
    if not isinstance(value, kinds) or (isinstance(value, str | bytes) and not value):
        _refuse(where, value, "a path, a data URL, bytes, a PIL image or an array")
    return value


def _video_source(value: Any, where: str) -> Any:
    frames = list(value) if isinstance(value, list | tuple | np.ndarray) else None
    if frames:
        return [_image_source(frame, f"{where}[{i}]") for i, frame in enumerate(frames)]
    if frames is not None or not isinstance(value, str | os.PathLike) or value == "":
        _refuse(where, value, "a path or a list of at least one frame")
    return value


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _field(mapping: dict[str, Any], name: str, where: str) -> Any:
    if mapping.get(name) is None:
        raise OneVisionError(f'{where} has no "{name}"')
    return mapping[name]


def _only(item: dict[str, Any], where: str, *names: str) -> None:
    unknown = [name for name in item if name not in ("type", *names)]
    if unknown:
        known = ", ".join(("type", *names))
        raise OneVisionError(f'{where} has an unknown "{unknown[0]}"; it can have {known}')


def _refuse(where: str, value: Any, expected: str) -> NoReturn:
    given = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    raise OneVisionError(f"{where} is {given[:80]}; it must be {expected}")


def _plain(value: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        _refuse(where, value, "a JSON value")


def _render_text(template: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    try:
        _bounds.set(_Bounds())
        program, text = _program(template), ""
        for piece in program.generate(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None
        ):
            text += piece
            if len(text) > _MAX_TEXT:
                raise OneVisionError(f"the chat template renders more than {_MAX_TEXT:,} characters")
        return text
    except OneVisionError:
        raise
    except Exception as error:  # a template is a program: it may fail in any way a program can
        detail = str(error) or type(error).__name__
        line = getattr(error, "lineno", None)
        place = f" in line {line}" if isinstance(line, int) else ""
        raise OneVisionError(f"the chat template failed{place}: {detail[:300]}") from None


class _Bounds:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + _MAX_SECONDS

    def step(self) -> None:
        """Count an iteration or a call."""
        self.steps += 1
        if self.steps > _MAX_STEPS or time.monotonic() > self.deadline:
            raise OneVisionError(
                f"the chat template does not end within {_MAX_STEPS:,} steps and {_MAX_SECONDS:g} seconds"
            )


_bounds: ContextVar[_Bounds] = ContextVar("bounds")  # of the rendering under way in this thread or task


@lru_cache(maxsize=16)
def _program(template: str) -> jinja2.Template:
    """A template compiled, which takes ten times as long as to render it."""
    return _Sandbox().program(template)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that Hugging Face's templates are written for."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters |= {"tojson": _tojson, "counted": self._counted}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def program(self, template: str) -> jinja2.Template:
        """Compile `template`, with every loop's iterations counted."""
        tree = self.parse(template)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(self)
        return self.from_string(tree)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            _bounds.get().step()
            yield value

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _bounds.get().step()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _is_large(operator, left, right):
            raise OneVisionError(f"the chat template computes too large a value with {operator}")
        return super().call_binop(context, operator, left, right)


def _is_large(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        bits, factor = left.bit_length(), right if operator == "**" else 1
        return bits * factor > _MAX_BITS or right.bit_length() > _MAX_BITS
    if isinstance(left, int):
        left, right = right, left
    return isinstance(left, str | list | tuple) and isinstance(right, int) and len(left) * right > _MAX_TEXT


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
