"""Which positions of a row its quality is measured at, and what greedy decoding would have answered there.

Where a row has an answer, its tokens are given to the model one after the other, whatever the model would have said
(teacher forcing): the positions are those that predict the answer's tokens and its end. Greedy decoding gives
exactly this answer if and only if the likeliest token is right at each of them, so one pass tells both the
distributions and the accuracy.
"""

from dataclasses import dataclass

import numpy as np

from ..config import ModelConfig
from .rows import Row

MOST_POSITIONS = 64  # of a row


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One row's positions, int64 [n], and the ids expected after them, [n]; None where it has no answer."""

    name: str
    positions: np.ndarray
    targets: np.ndarray | None


def scored(row: Row, config: ModelConfig) -> Scored:
    """Positions of a row with an answer: those of the answer. Without: the text after the last image."""
    ids = row.input_ids
    if row.answer_start < len(ids):
        positions = np.arange(row.answer_start - 1, len(ids) - 1)[:MOST_POSITIONS]
        whole = len(positions) == len(ids) - row.answer_start
        return Scored(row.name, positions, ids[positions + 1] if whole else None)
    media = np.flatnonzero(np.isin(ids, (config.image_token_id, config.video_token_id)))
    start = int(media[-1]) + 1 if len(media) and media[-1] + 1 < len(ids) else 0
    return Scored(row.name, np.arange(start, len(ids))[-MOST_POSITIONS:], None)
