"""A body of JSON, read strictly: what two readers could understand differently is refused."""

import json
import math
import re
from typing import Any, NoReturn

from .errors import ApiError

MAX_DEPTH = 64  # of nested arrays and objects
_MAX_DIGITS = 40
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(body: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises ApiError (400) for anything else: other encodings, a key twice in an object, NaN and infinities,
    numbers out of range, half a surrogate pair, more than MAX_DEPTH levels.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(f"it is not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
        )
    except RecursionError:
        raise _refusal(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise _refusal(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    _check(value, check_text=_SURROGATE.search(body) is not None)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _refusal(f"the key {_shown(twice)} is twice in one object")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _refusal(f"a number has {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value) or len(digits) > 400:
        raise _refusal("a number is out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise _refusal(f"{name} is not a JSON number")


def _check(value: Any, check_text: bool) -> None:
    """Depth, and that every text can be written again."""
    level, depth = [value], 0
    while level:
        if depth >= MAX_DEPTH and any(isinstance(inner, dict | list) for inner in level):
            raise _refusal(f"it is nested deeper than {MAX_DEPTH} levels")
        for text in level if check_text else ():
            if isinstance(text, str) and not _is_unicode(text):
                raise _refusal("a text holds half a surrogate pair, which is no character")
        level, depth = [inner for outer in level for inner in _inside(outer, check_text)], depth + 1


def _inside(value: Any, keys: bool) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()] if keys else list(value.values())
    return value if isinstance(value, list) else []


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    return ascii(name[:60])


def _refusal(reason: str) -> ApiError:
    return ApiError(f"the body is not acceptable JSON: {reason}", code="invalid_json")
