"""What the runtime answers by itself, one question after the other, to the questions that a server was asked."""

from collections.abc import Sequence
from typing import Any

from onevision_edge.runtime.constraint import json_schema
from onevision_edge.runtime.model import Model

from .client import Reply


def compared(model: Model, replies: Sequence[Reply]) -> dict[str, Any]:
    """How many of the answers that came are the same, to the letter and in their count of tokens and their reason."""
    answered = [reply for reply in replies if reply.answered]
    apart = [reply for reply in answered if not _is_same(model, reply)]
    return {
        "compared": len(answered),
        "same": len(answered) - len(apart),
        "apart": [f"{reply.question.kind}: {reply.text!r}" for reply in apart][:5],
    }


def _is_same(model: Model, reply: Reply) -> bool:
    question = reply.question
    bound = json_schema(question.schema, model) if question.schema is not None else None
    alone = model.generate(question.messages(), max_tokens=question.max_tokens, constraint=bound)
    wanted = (alone.text, len(alone.token_ids), alone.finish_reason)
    return (reply.text, reply.tokens, reply.finish_reason) == wanted
