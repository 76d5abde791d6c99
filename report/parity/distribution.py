"""How far next-token distributions are from a reference's, position by position of one row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...calibration.quality import divergence, log_softmax
from ...errors import OneVisionError

_FIVE = 5
_BF16_BITS = 8  # of a significand, the leading one included


@dataclass(frozen=True, slots=True, eq=False)
class RowDistribution:
    """What two models say at the same n positions of one row, everything before given to both (teacher forcing).

    kld: float64 [n], KL divergence of the candidate's distribution from the reference's, in nats.
    top1: bool [n], both have the same likeliest token. top5: bool [n], the reference's likeliest token is among the
    candidate's five likeliest, as a label is in top-5 accuracy.
    nll, nll_reference: float64 [n], negative log-likelihoods of the targets in nats; None without targets.
    tokens, tokens_reference: int64 [n], the likeliest of each. right, right_reference: all of them are the targets.
    margin: float64 [n], the reference's log-probability of its own token less that of the candidate's; 0 where equal.
    near_tie: bool [n], the two differ, but by no more than a rounding step of BF16 at the reference's best logit.
    """

    kld: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    nll: np.ndarray | None
    nll_reference: np.ndarray | None
    tokens: np.ndarray
    tokens_reference: np.ndarray
    right: bool | None
    right_reference: bool | None
    margin: np.ndarray
    near_tie: np.ndarray

    @property
    def divergent(self) -> int:
        """Positions where the likeliest tokens differ."""
        return int((~self.top1).sum())

    @property
    def first_divergent(self) -> int | None:
        """The first of them, or None."""
        return int(np.argmin(self.top1)) if self.divergent else None

    @property
    def near_ties(self) -> int:
        """How many of them are near ties."""
        return int(self.near_tie.sum())


def row_distribution(
    reference: np.ndarray, measured: np.ndarray, targets: np.ndarray | None = None, never: Sequence[int] = ()
) -> RowDistribution:
    """Compare logits of one row, float [n, vocab] each. targets: the ids expected after each position, [n].

    never: ids that are never generated, such as placeholders of images; they are passed over when the likeliest token
    is sought. Equal logits: the lower id is the likelier. Logits of the candidate that are NaN or infinite agree with
    nothing. Raises OneVisionError for shapes that do not match.
    """
    if reference.ndim != 2 or reference.shape != measured.shape:
        raise OneVisionError(
            f"logits of {list(measured.shape)} cannot be compared with {list(reference.shape)}; both are [n, vocab]"
        )
    wanted, found = _masked(reference, never), _masked(measured, never)
    best, chosen = wanted.argmax(axis=1), found.argmax(axis=1)
    sound = ~(np.isnan(measured) | (measured == np.inf)).any(axis=1)
    rows = np.arange(len(wanted))
    margin = wanted[rows, best].astype(np.float64) - wanted[rows, chosen]
    top1 = (best == chosen) & sound
    return RowDistribution(
        kld=divergence(reference, measured),
        top1=top1,
        top5=(_rank(found, best) < _FIVE) & sound,
        nll=_nll(measured, targets),
        nll_reference=_nll(reference, targets),
        tokens=chosen,
        tokens_reference=best,
        right=None if targets is None else bool((chosen == targets).all() and sound.all()),
        right_reference=None if targets is None else bool((best == targets).all()),
        margin=margin,
        near_tie=~top1 & sound & (margin <= rounding_step(wanted[rows, best])),
    )


def rounding_step(logits: np.ndarray) -> np.ndarray:
    """The distance between neighbours in BF16 at each value, float64: 2^-7 of the power of two below it.

    Rounded to BF16, two logits may each move by half of it, so that two that are no further apart may change places.
    """
    _, exponent = np.frexp(np.asarray(logits, np.float64))
    return np.ldexp(1.0, exponent - _BF16_BITS)


def _masked(logits: np.ndarray, never: Sequence[int]) -> np.ndarray:
    masked = logits.copy()
    masked[:, list(never)] = -np.inf
    return masked


def _rank(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How many tokens are likelier than `ids` [n], the lower id first among equals."""
    own = logits[np.arange(len(ids)), ids][:, None]
    before = np.arange(logits.shape[1]) < ids[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(axis=1)


def _nll(logits: np.ndarray, targets: np.ndarray | None) -> np.ndarray | None:
    return None if targets is None else -log_softmax(logits)[np.arange(len(targets)), targets]
