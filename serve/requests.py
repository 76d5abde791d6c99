"""From a checked body and its image files to what the scheduler takes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import OneVisionError
from ..runtime.model import Model
from ..runtime.scheduler import ChatRequest
from ..runtime.tokenizer import Tokenizer
from .errors import ApiError, without_paths
from .images import with_files
from .protocol import ChatCall, Picture, texts
from .wire import ResponseFormat

if TYPE_CHECKING:
    from ..runtime.constraint import Constraint

_SEEDS = 2**64


class ControlTokens:
    """The special tokens of a vocabulary, which must not be spelt in what a client writes.

    To the tokenizer they mean what they say, so that a text could end its turn and begin one of the system's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = sorted(filter(None, map(tokenizer.token, tokenizer.special_ids)), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def check(self, messages: Sequence[dict[str, Any]]) -> None:
        """Raise ApiError for the first text that holds one."""
        for where, text in texts(messages) if self._pattern else ():
            assert self._pattern is not None
            if found := self._pattern.search(text):
                raise ApiError(
                    f"{where} contains {found[0]}, which controls the model; write it in another way",
                    param=where,
                    code="control_token",
                )


def chat_requests(call: ChatCall, files: Mapping[Picture, bytes], model: Model) -> list[ChatRequest]:
    """A request for each choice; with a seed, the k-th choice has the seed plus k. Raises ApiError."""
    _check_pixels(call, model.processor.max_pixels)
    messages = with_files(call.messages, files)
    constraint = _constraint(call.response_format, model)  # which stays as it is: every sequence goes on by a copy
    return [
        ChatRequest(messages, _seeded(call, i), call.min_pixels, call.max_pixels, constraint)
        for i in range(call.choices)
    ]


def _seeded(call: ChatCall, index: int) -> Any:
    seed = call.params.seed
    return call.params if seed is None else replace(call.params, seed=(seed + index) % _SEEDS)


def _check_pixels(call: ChatCall, most: int) -> None:
    for name in ("min_pixels", "max_pixels"):
        value = getattr(call, name)
        if value is not None and value > most:
            raise ApiError(f"{name} is {value}; this model reads images of {most} pixels at most", param=name)
    if call.min_pixels and call.max_pixels and call.min_pixels > call.max_pixels:
        raise ApiError(f"min_pixels {call.min_pixels} is above max_pixels {call.max_pixels}", param="min_pixels")


def _constraint(asked: ResponseFormat | None, model: Model) -> "Constraint | None":
    if asked is None:
        return None
    from ..runtime.constraint import json_object, json_schema, regex

    try:
        if asked.regex is not None:
            return regex(asked.regex, model)
        return json_object(model) if asked.json_schema is None else json_schema(asked.json_schema.schema_, model)
    except OneVisionError as error:
        raise ApiError(
            f"response_format: {without_paths(str(error))}", param="response_format", code="invalid_response_format"
        ) from None
