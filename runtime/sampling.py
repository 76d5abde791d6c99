"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, log-probabilities.

The steps and their order are those of Hugging Face `generate`: suppressed ids and those a constraint does not
allow, penalties, temperature, top-k, top-p, min-p, draw. Presence and frequency penalties, which it lacks, follow
the repetition penalty as in vLLM.

Microseconds per token on one EPYC core, numpy 2.4, 151,936 logits (`python benchmarks/sampling.py`):

    greedy                                               14
    greedy, repetition penalty                           55
    greedy, logprobs=5                                  230
    temperature 0.7                                     176
    temperature 0.7, top_k 20                            80
    temperature 0.7, top_p 0.9                          218
    temperature 0.7, top_k 50, top_p 0.9, min_p 0.05    101
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import OneVisionError
from .constraint import Constraint

_ROWS = 128  # the vocabulary is looked at as 128 rows: 20 us for the maxima of its columns
_COLUMNS = 64  # of so few, the values are gathered; of more, the whole vocabulary is compared
_NUCLEUS = (40, 640)  # top-p sorts about so many tokens, and looks further if these hold too little
_COLDEST = 1e-6  # a smaller temperature would round to zero in float32


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes | bool | np.bool_) or not math.isfinite(value):
        raise TypeError
    return float(value)


# name: (conversion, test, allowed values in words); None is allowed where the default is None
_ALLOWED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool], str]] = {
    "max_tokens": (_integer, lambda v: v >= 1, "a whole number from 1"),
    "temperature": (_number, lambda v: v >= 0, "a number from 0 (greedy)"),
    "top_k": (_integer, lambda v: v >= 0, "a whole number from 0 (off)"),
    "top_p": (_number, lambda v: 0 < v <= 1, "a number above 0 and up to 1 (off)"),
    "min_p": (_number, lambda v: 0 <= v <= 1, "a number from 0 (off) to 1"),
    "repetition_penalty": (_number, lambda v: v > 0, "a number above 0 (1 is off)"),
    "presence_penalty": (_number, lambda v: -2 <= v <= 2, "a number from -2 to 2 (0 is off)"),
    "frequency_penalty": (_number, lambda v: -2 <= v <= 2, "a number from -2 to 2 (0 is off)"),
    "seed": (_integer, lambda v: 0 <= v < 2**64, "a whole number from 0 to 2**64 - 1, or None"),
    "logprobs": (_integer, lambda v: v >= 0, "a whole number from 0, or None"),
    "speculate": (_integer, lambda v: v >= 0, "a whole number from 0 (off), or None"),
}
_OPTIONAL = ("seed", "logprobs", "speculate")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop, under Hugging Face's names, checked once here.

    `temperature` 0 is greedy. `top_k` keeps every token that ties with the k-th, as Hugging Face does.
    `logprobs` asks for that many alternatives beside the chosen token's own (0: its own only). `stop` takes
    one string or several. `speculate`: at most so many tokens are drafted from the text so far for one call
    to verify (speculation.py), 0: none, None: as many as pay by the times and successes of the calls before.
    Raises OneVisionError naming the field, the value given and the allowed ones.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    speculate: int | None = None

    def __post_init__(self) -> None:
        for name in _ALLOWED:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        if not isinstance(self.ignore_eos, bool):
            raise OneVisionError(f"ignore_eos is {self.ignore_eos!r}; it must be True or False")

    @property
    def penalised(self) -> bool:
        """Whether any penalty is on."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _checked(name: str, value: Any) -> Any:
    convert, allowed, words = _ALLOWED[name]
    if value is None and name in _OPTIONAL:
        return None
    try:
        converted = convert(value)
    except (TypeError, ValueError, OverflowError):
        converted = None
    if converted is None or not allowed(converted):
        raise OneVisionError(f"{name} is {value!r}; it must be {words}")
    return converted


def _checked_stop(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise OneVisionError(f"stop is {stop!r}; it must be a string or a list of strings, none empty")
    return tuple(strings)


class Sampled(NamedTuple):
    """A token, its log-probability and the likeliest tokens' (best first, ties by id), where asked for.

    Log-probabilities are the log-softmax of the model's logits without the suppressed ids, before penalties,
    temperature and filters: what the model thought, not how it was sampled (as OpenAI and vLLM report them). Under a
    constraint they are among the tokens that it allows, as in vLLM: a token that is the only one has 0.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Sampler:
    """Chooses the tokens of one sequence: its parameters, its random numbers, and what it has said so far.

    `prompt_ids` count for the repetition penalty, `suppress` are ids never chosen (the image and video
    placeholders); ids outside the vocabulary (`vocab_size`) can be neither, and are passed over. The same
    seed gives the same tokens: one random number is drawn per sampled token, none by greedy choice. `constraint`
    is told of every token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        suppress: Sequence[int],
        vocab_size: int,
        constraint: Constraint | None = None,
    ) -> None:
        if constraint is not None and constraint.vocab_size != vocab_size:
            raise OneVisionError(
                f"the constraint was made for a vocabulary of {constraint.vocab_size}, not of {vocab_size}: "
                "make it with the model that it is used with"
            )
        self.params, self._constraint = params, constraint
        self.vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._suppress = self._inside(suppress)
        self._never = frozenset(self._suppress.tolist())
        self._seen = self._inside(prompt_ids)  # distinct ids of prompt and answer
        self._said = self._inside(())  # distinct ids of the answer
        self._counts = np.zeros(vocab_size if params.penalised else 0, np.int32)  # of the answer

    def _inside(self, ids: Sequence[int]) -> np.ndarray:
        unique = np.unique(np.asarray(ids, np.int64))
        return unique[(unique >= 0) & (unique < self.vocab_size)]

    def sample(self, logits: np.ndarray) -> Sampled:
        """Choose from `logits` float32 [vocab_size], which is left as it is, and remember the choice.

        Raises OneVisionError for another shape, NaN or infinite logits, or when no token is left to choose.
        """
        logits = np.asarray(logits, np.float32)
        if logits.shape != (self.vocab_size,):
            raise OneVisionError(f"logits have shape {list(logits.shape)}; expected [{self.vocab_size}]")
        greedy = self.params.temperature == 0
        if self._constraint is not None:
            sampled = self._sample_slowly(logits, greedy, self._constraint.allowed())
            self._constraint.accept(sampled.token_id)
            return sampled
        if self.params.logprobs is None and not self.params.penalised:
            token = int(logits.argmax())  # argmax stops at a NaN, so looking at the winner finds any
            if token not in self._never:
                peak = _check_peak(logits[token])
                return Sampled(token if greedy else self._draw(logits, peak))
        return self._sample_slowly(logits, greedy)

    def _sample_slowly(self, logits: np.ndarray, greedy: bool, allowed: np.ndarray | None = None) -> Sampled:
        """allowed: bool [vocab_size], the tokens to choose among; None: all but the suppressed."""
        scores = logits.copy() if allowed is None else np.where(allowed, logits, np.float32(-np.inf))
        scores[self._suppress] = -np.inf
        ids = None if allowed is None else np.flatnonzero(allowed)
        normaliser, top = self._logprobs(scores, ids)
        if self.params.penalised:
            self._penalise(scores)
        peak = _check_peak(scores.max())
        token = int(scores.argmax()) if greedy else self._draw(scores, peak, ids)
        if self.params.penalised:
            self._remember(token)
        logprob = None if normaliser is None else float(logits[token]) - normaliser
        return Sampled(token, logprob, top)

    def _logprobs(
        self, scores: np.ndarray, allowed: np.ndarray | None
    ) -> tuple[float | None, list[tuple[int, float]] | None]:
        """The log of the softmax's denominator, and the likeliest ids with their log-probabilities."""
        if self.params.logprobs is None:
            return None, None
        peak = _check_peak(scores.max())
        normaliser = peak + math.log(_weights(scores, peak, 1.0).sum())
        ids = _best_of(scores, self.params.logprobs, allowed)[: self.params.logprobs]
        return normaliser, [(int(i), float(scores[i]) - normaliser) for i in ids if scores[i] > -np.inf]

    def _penalise(self, scores: np.ndarray) -> None:
        """Repetition: positive logits divided, negative multiplied (CTRL, arXiv:1909.05858, as in HF).

        Presence: subtracted once per id of the answer; frequency: subtracted as often as the id came.
        """
        params = self.params
        seen = scores[self._seen]
        penalty = params.repetition_penalty
        scores[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        said = self._counts[self._said].astype(np.float32)
        scores[self._said] -= params.presence_penalty + params.frequency_penalty * said

    def _remember(self, token: int) -> None:
        if self._counts[token] == 0:
            self._said = np.append(self._said, token)
            if token not in self._seen:
                self._seen = np.append(self._seen, token)
        self._counts[token] += 1

    def _draw(self, scores: np.ndarray, peak: float, allowed: np.ndarray | None = None) -> int:
        """Draw from softmax(scores / temperature) after the filters. The best token has weight 1.

        `peak` is the best score that is not suppressed; those that are need not be below it. allowed: ascending ids
        to draw among, of which the suppressed have scores of minus infinity; None: all.
        """
        params = self.params
        ids = allowed
        if 0 < params.top_k < self.vocab_size:
            ids = _best(scores, params.top_k, self._suppress) if ids is None else _best_of(scores, params.top_k, ids)
        weights = _weights(scores if ids is None else scores[ids], peak, params.temperature)
        if ids is None:
            weights[self._suppress] = 0
        if params.top_p < 1:
            kept = _nucleus(weights, params.top_p)
            ids, weights = (kept if ids is None else ids[kept]), weights[kept]
        if params.min_p > 0:
            kept = np.flatnonzero(weights >= params.min_p)
            ids, weights = (kept if ids is None else ids[kept]), weights[kept]
        index = _pick(weights, self._random.random())
        return index if ids is None else int(ids[index])


def _check_peak(peak: np.floating) -> float:
    """The largest logit, which is NaN if any is, as a float; OneVisionError unless it is finite."""
    value = float(peak)
    if math.isfinite(value):
        return value
    if value == -math.inf:
        raise OneVisionError("no token is left to choose: every logit is minus infinity")
    what = "NaN" if math.isnan(value) else "infinite"
    raise OneVisionError(
        f"the model produced {what} logits; a value overflowed in its precision: try an FP32 or BF16 bundle"
    )


def _weights(scores: np.ndarray, peak: float, temperature: float) -> np.ndarray:
    """exp((scores - peak) / temperature) float32: softmax before its division by the sum."""
    with np.errstate(over="ignore"):  # far below the peak: minus infinity, and its exponential is 0
        shifted = scores - np.float32(peak)
        shifted /= np.float32(max(temperature, _COLDEST))
    return np.exp(shifted, out=shifted)


def _contenders(values: np.ndarray, k: int) -> np.ndarray:
    """Ids, ascending, of a set that holds the k largest `values` and what ties with them.

    The k-th largest of the maxima of disjoint groups cannot exceed the k-th largest value, so everything
    below it is out, whole groups of it unseen. 35 us for 20 of 151,936 values, against 1,300 for np.argpartition.
    """
    groups = values.size // _ROWS
    if k > groups:
        return np.arange(values.size)
    table = values[: _ROWS * groups].reshape(_ROWS, groups)
    maxima = table.max(axis=0)
    least = np.partition(maxima, groups - k)[groups - k]
    columns = np.flatnonzero(maxima >= least)
    if len(columns) > _COLUMNS:
        return np.flatnonzero(values >= least)
    inside = (np.arange(0, table.size, groups)[:, None] + columns).reshape(-1)
    ids = np.append(inside, np.arange(table.size, values.size)) if values.size > table.size else inside
    return ids[values[ids] >= least]


def _best(values: np.ndarray, k: int, without: np.ndarray | tuple[()] = ()) -> np.ndarray:
    """Ids of the k largest `values` and of those that tie with the k-th, best first, ties by id.

    without: ids that are passed over.
    """
    if k == 0:
        return np.arange(0)
    ids = _contenders(values, k + len(without))
    for passed in without:
        ids = ids[ids != passed]
    ids = ids[np.argsort(-values[ids], kind="stable")]
    return ids[values[ids] >= values[ids[min(k, ids.size) - 1]]]


def _best_of(values: np.ndarray, k: int, ids: np.ndarray | None) -> np.ndarray:
    """Those of `ids`, which ascend, with the k largest `values`, as `_best` has them; None: of all."""
    return _best(values, k) if ids is None else ids[_best(values[ids], k)]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ids of the fewest largest `weights` that hold `top_p` of the whole (arXiv:1904.09751), ties by id.

    A language model's nucleus is small, so a few candidates are sorted first.
    """
    goal = top_p * float(weights.sum())
    for size in _NUCLEUS:
        ids = _best(weights, size)
        held = np.cumsum(weights[ids], dtype=np.float64)
        if held[-1] >= goal:
            return ids[: int(np.searchsorted(held, goal)) + 1]
    return _wide_nucleus(weights, goal)


def _wide_nucleus(weights: np.ndarray, goal: float) -> np.ndarray:
    """The same for a nucleus of any size, unordered, sorting only those that share the last one's high bits.

    Under 3,500 us for a nucleus of 120,000 tokens, against 20,000 for sorting them all.
    """
    keys = weights.view(np.uint32) >> 16  # the bits of floats from 0 up are in the order of their values
    held = np.cumsum(np.bincount(keys, weights)[::-1])
    edge = held.size - 1 - int(np.searchsorted(held, goal))
    inside, rim = np.flatnonzero(keys > edge), np.flatnonzero(keys == edge)
    rim = rim[np.argsort(-weights[rim], kind="stable")]
    held = weights[inside].sum(dtype=np.float64) + np.cumsum(weights[rim], dtype=np.float64)
    return np.append(inside, rim[: int(np.searchsorted(held, goal)) + 1])


def _pick(weights: np.ndarray, uniform: float) -> int:
    """The index at which the running sum of `weights` passes the share `uniform` [0, 1) of the whole.

    A running sum over a whole vocabulary takes 1,600 us, the sums of its rows and one row's running sum 50.
    """
    columns = weights.size // _ROWS
    if columns < _ROWS:
        return _pick_directly(weights, uniform * float(weights.sum(dtype=np.float64)))
    sums = weights[: _ROWS * columns].reshape(_ROWS, columns).sum(axis=1).astype(np.float64)
    sums = np.append(sums, weights[_ROWS * columns :].sum(dtype=np.float64))
    goal = uniform * float(sums.sum())
    row = _pick_directly(sums, goal)
    start = row * columns
    stop = start + columns if row < _ROWS else weights.size
    return start + _pick_directly(weights[start:stop], goal - float(sums[:row].sum()))


def _pick_directly(weights: np.ndarray, goal: float) -> int:
    # Rounding can leave the goal below 0 or at the very end: the first or last token of any weight.
    running = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(running, max(goal, 0.0), side="right"))
    return index if index < weights.size else int(np.flatnonzero(weights)[-1])
