"""What a client says to /v1/chat/completions, checked, in the runtime's words.

OpenAI's fields of which nothing depends here are passed over, those that would change the answer are refused,
and so is every name that neither OpenAI nor this server knows: a misspelt option should not go unnoticed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ..errors import OneVisionError
from ..runtime.sampling import SamplingParams
from .errors import ApiError, without_paths
from .settings import Settings
from .wire import ChatBody, Image, Message, ResponseFormat, Text, Video

# OpenAI's fields that change nothing here.
IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
# OpenAI's fields that would change the answer, and the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# What OpenAI's clients send back in a message of the assistant; anything but these values is refused.
MESSAGE_REFUSED: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image or frame that a client named, unread. It is no path, bytes or text, so the runtime refuses it."""

    url: str
    where: str
    is_frame: bool = False


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A body that keeps to the rules: messages as the runtime takes them, with a Picture where its image will be."""

    messages: list[dict[str, Any]]
    params: SamplingParams
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    response_format: ResponseFormat | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    pictures: list[Picture] = field(default_factory=list)


def read_chat(value: Any, settings: Settings) -> ChatCall:
    """Check a body against the types and the server's limits. Raises ApiError naming the field."""
    body = _validated(value)
    if body.model is not None:
        check_model(body.model, settings)
    pictures: list[Picture] = []
    messages = [_message(message, f"messages[{i}]", pictures) for i, message in enumerate(body.messages)]
    _check_count(pictures, settings)
    return ChatCall(
        messages,
        _sampling(body, settings),
        _choices(body, settings),
        bool(body.stream),
        bool(body.stream_options and body.stream_options.include_usage),
        _format(body.response_format),
        body.min_pixels,
        body.max_pixels,
        pictures,
    )


def check_model(name: str, settings: Settings) -> None:
    """Raise ApiError (404) for another model than the server's."""
    if name != settings.model_name:
        raise ApiError(
            f"there is no model of this name; this server has {settings.model_name}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _validated(value: Any) -> ChatBody:
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object")
    known = _without(value, REFUSED, "")
    if isinstance(known.get("messages"), list):
        known["messages"] = [
            _without(m, MESSAGE_REFUSED, f"messages[{i}].") if isinstance(m, dict) else m
            for i, m in enumerate(known["messages"])
        ]
    try:
        return ChatBody.model_validate({name: v for name, v in known.items() if name not in IGNORED})
    except ValidationError as error:
        raise _field_error(error) from None


def _without(value: dict[str, Any], refused: dict[str, tuple[Any, ...]], prefix: str) -> dict[str, Any]:
    for name, neutral in refused.items():
        if name in value and not any(_same(value[name], allowed) for allowed in neutral):
            raise ApiError(
                f"{prefix}{name} is not supported by this server; leave it out",
                param=prefix + name,
                code="unsupported_parameter",
            )
    return {name: v for name, v in value.items() if name not in refused}


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def _field_error(error: ValidationError) -> ApiError:
    """The error that is deepest in the value, as it knows most of what was meant."""
    worst = max(
        error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"])
    )
    place = "".join(_step(step) for step in worst["loc"]).removeprefix(".")[:200]
    if worst["type"] == "extra_forbidden":
        return ApiError(f"{place} is not a field that this server knows", param=place, code="unknown_parameter")
    if worst["type"] == "missing":
        return ApiError(f"{place} is missing", param=place, code="missing_required_parameter")
    reason = worst["msg"].replace("Input should", "it should", 1)
    return ApiError(f"{place}: {reason}", param=place, code="invalid_value")


def _step(step: int | str) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return "" if step.startswith("<") or step in ("str", "list[str]") or "constrained" in step else f".{step}"


def _message(message: Message, where: str, pictures: list[Picture]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    items = []
    for i, part in enumerate(message.content):
        if not isinstance(part, Text) and role != "user":
            raise ApiError(f"{where}.content[{i}]: images belong in messages of the user", param=f"{where}.content")
        items.append(_item(part, f"{where}.content[{i}]", pictures))
    return {"role": role, "content": items}


def _item(part: Text | Image | Video, where: str, pictures: list[Picture]) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Image):
        picture = Picture(part.image_url.url, f"{where}.image_url.url")
        pictures.append(picture)
        return {"type": "image", "image": picture}
    place = f"{where}.video_url.url"
    frames = [Picture(url, f"{place}[{i}]", is_frame=True) for i, url in enumerate(part.video_url.url)]
    pictures.extend(frames)
    return {"type": "video", "video": frames, "nframes": len(frames)}


def _check_count(pictures: list[Picture], settings: Settings) -> None:
    frames = sum(picture.is_frame for picture in pictures)
    images = len(pictures) - frames
    for count, limit, noun in ((images, settings.max_images, "images"), (frames, settings.max_frames, "video frames")):
        if count > limit:
            raise ApiError(
                f"the request has {count} {noun}; this server takes {limit}", param="messages", code="too_many_images"
            )


def _choices(body: ChatBody, settings: Settings) -> int:
    if (body.n or 1) > settings.max_choices:
        raise ApiError(f"n is {body.n}; this server gives {settings.max_choices} answers at most", param="n")
    return body.n or 1


def _sampling(body: ChatBody, settings: Settings) -> SamplingParams:
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    tokens = getattr(body, name)
    if tokens is not None and tokens > settings.max_tokens:
        raise ApiError(
            f"{name} is {tokens}; this server gives {settings.max_tokens} at most", param=name, code="too_many_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    given = {option: getattr(body, option) for option in _OPTIONS if getattr(body, option) is not None}
    try:
        return SamplingParams(
            max_tokens=tokens or settings.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            **given,
        )
    except OneVisionError as error:
        raise ApiError(without_paths(str(error)), code="invalid_value") from None


_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
)


def _format(asked: ResponseFormat | None) -> ResponseFormat | None:
    if asked is None:
        return None
    for kind in ("json_schema", "regex"):
        if (asked.type == kind) != (getattr(asked, kind) is not None):
            problem = "is missing" if asked.type == kind else f'does not go with the type "{asked.type}"'
            raise ApiError(f"response_format.{kind} {problem}", param=f"response_format.{kind}")
    return None if asked.type == "text" else asked


def texts(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Every text of the messages after the place where it stands."""
    for i, message in enumerate(messages):
        where = f"messages[{i}].content"
        if isinstance(message["content"], str):
            yield where, message["content"]
            continue
        for j, item in enumerate(message["content"]):
            if item["type"] == "text":
                yield f"{where}[{j}].text", item["text"]
