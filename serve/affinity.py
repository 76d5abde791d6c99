"""Which replica has seen the beginning of a conversation, or its images, and so need not compute them again."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_MARKS = 100_000  # that are remembered: some 20 MB
_IMAGE_CHARACTERS = 2_000  # of text that an image weighs as much as: its tokens, and the tower's work


@dataclass(frozen=True, slots=True)
class Mark:
    """A digest of a conversation up to one of its parts, or of one image; weight: in characters of text, all of it."""

    digest: str
    weight: int


def marks_of(body: bytes) -> list[Mark]:
    """What a request may share with earlier ones: every beginning of its conversation, and every image.

    body: of POST /v1/chat/completions. Empty for a body that is something else, whose refusal is not our business.
    """
    try:
        messages = json.loads(body)["messages"]
        parts = [part for message in messages for part in _parts(message)]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []
    beginning, weight, marks = hashlib.sha256(), 0, []
    for role, part in parts:
        text = json.dumps([role, part], sort_keys=True).encode()
        beginning.update(text)
        image = isinstance(part, dict) and part.get("type") != "text"
        weight += _IMAGE_CHARACTERS if image else len(text)
        marks.append(Mark(beginning.hexdigest(), weight))
        if image:
            marks.append(Mark(hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest(), 1_000))
    return marks


class Affinity:
    """Replicas by the marks that they have seen, the latest `capacity` of them."""

    def __init__(self, capacity: int = MAX_MARKS) -> None:
        self._seen: OrderedDict[str, str] = OrderedDict()
        self._capacity = capacity

    def note(self, marks: Sequence[Mark], replica: str) -> None:
        """A replica was sent a request with these marks."""
        for mark in marks:
            self._seen[mark.digest] = replica
            self._seen.move_to_end(mark.digest)
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)

    def best(self, marks: Sequence[Mark]) -> str | None:
        """The replica that has seen the heaviest of these marks; None where none has."""
        known = [mark for mark in marks if mark.digest in self._seen]
        return self._seen[max(known, key=lambda mark: mark.weight).digest] if known else None

    def forget(self, replica: str) -> None:
        """A replica is gone, and what it knew with it."""
        self._seen = OrderedDict((digest, name) for digest, name in self._seen.items() if name != replica)


def _parts(message: Any) -> list[tuple[str, Any]]:
    """The parts of a message, each with who says it."""
    content = message["content"]
    return [(message["role"], part) for part in (content if isinstance(content, list) else [content])]
