"""Generations in the shape of OpenAI's answers, whole and in chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from ..runtime.generation import TokenLogprob
from ..runtime.scheduler import Finished
from ..runtime.tokenizer import Tokenizer

_LEAST = -9999.0  # OpenAI's word for minus infinity, which JSON lacks


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of one answer share."""

    model: str
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """A chat.completion of one choice for each generation."""
        choices = [self._choice(i, one) for i, one in enumerate(finished)]
        return self._head("chat.completion") | {"choices": choices, "usage": usage(finished)}

    def chunk(self, index: int, delta: dict[str, Any], **rest: Any) -> dict[str, Any]:
        """A chat.completion.chunk of one choice."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | rest
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def last_chunk(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The chunk without choices that carries the usage."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage(finished)}

    def logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Log-probabilities of tokens; None for None."""
        if tokens is None:
            return None
        content = [
            self._token(token.token_id, token.logprob)
            | {"top_logprobs": [self._token(token_id, logprob) for token_id, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _choice(self, index: int, finished: Finished) -> dict[str, Any]:
        generation = finished.generation
        return {
            "index": index,
            "message": {"role": "assistant", "content": generation.text, "refusal": None},
            "logprobs": self.logprobs(generation.logprobs),
            "finish_reason": generation.finish_reason,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(self.tokenizer, token_id)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(raw)}


def usage(finished: Sequence[Finished]) -> dict[str, Any]:
    """Token counts, and the seconds of every stage. The prompt counts once; it and the times are the first choice's."""
    first = finished[0]
    prompt, timings = first.generation, first.generation.timings
    completion, later = sum(len(one.generation.token_ids) for one in finished), len(prompt.token_ids) - 1
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt.prompt_tokens + completion,
        "prompt_tokens_details": {
            "cached_tokens": prompt.cached_tokens,
            "image_tokens": prompt.image_tokens,
            "cached_image_tokens": prompt.cached_image_tokens,
        },
        "timings": {
            "queue": first.queue_seconds,
            **asdict(timings),
            "time_to_first_token": first.queue_seconds + timings.time_to_first_token,
            "tokens_per_second": later / timings.decode if later > 0 and timings.decode > 0 else None,
        },
    }


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token stands for; nothing for an id without one."""
    token = tokenizer.token(token_id) or ""
    try:
        return bytes(_byte_values()[character] for character in token)
    except KeyError:  # an added token, which is text as it stands
        return token.encode()


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    """Bytes by the characters that stand for them in a byte-level vocabulary (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves, the others, in order, for the characters from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    shown = {chr(value): value for value in printable}
    return shown | {chr(256 + i): value for i, value in enumerate(others)}
