"""What tests of structured output share."""

from pathlib import Path
from typing import Any

import onevision_edge
from onevision_edge.runtime.constraint import Constraint

EVALUATION = Path(onevision_edge.__file__).parent / "demo" / "evaluation"


def asked(text: str, image: str = "images/000a.png") -> list[dict[str, Any]]:
    """A question about one of the held-out images."""
    shown = {"type": "image", "image": str(EVALUATION / image)}
    return [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]


def fits(bound: Constraint, ids: list[int]) -> bool:
    """Whether these tokens are a whole answer."""
    walked = bound.copy()
    if walked.fitting(ids) < len(ids):
        return False
    for token in ids:
        walked.accept(token)
    return walked.complete
