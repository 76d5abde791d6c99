"""What a model answers and how sure it is, row by row, beside the reference's; and the metrics over all rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...bundle import Progress, no_progress
from ...calibration.rows import Row
from ...calibration.scored import scored
from ...runtime.tokenizer import Tokenizer
from .distribution import RowDistribution, rounding_step, row_distribution
from .metrics import METRICS
from .question import Question, Questions
from .recording import Recording
from .sides import Side
from .statistics import Interval, bootstrap, bootstrap_statistic, paired
from .text_metrics import score


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where an answer leaves the reference's: the token's place, by how much the reference preferred its own."""

    place: int
    margin: float | None  # in logits; None where the other token is not among the reference's likeliest
    near_tie: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """One row. distribution: None where the row was prepared otherwise than the reference's."""

    question: Question
    distribution: RowDistribution | None
    ids: list[int]
    reference_ids: list[int]
    text: str | None
    reference_text: str | None
    divergence: Divergence | None
    scores: dict[str, float] = field(default_factory=dict)
    reference_scores: dict[str, float] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether both answers are the same: their text, or their ids without a tokenizer."""
        return self.ids == self.reference_ids or (self.text is not None and self.text == self.reference_text)


def answer_rows(side: Side, recording: Recording, data: Questions, progress: Progress = no_progress) -> list[Answered]:
    """Ask every row of the recording."""
    rows = []
    for index, question in enumerate(data.questions):
        rows.append(_answered(side, recording, index, data[index], question))
        progress(index + 1, len(recording.rows), question.name)
    return rows


def _answered(side: Side, recording: Recording, index: int, row: Row, question: Question) -> Answered:
    recorded, tokenizer = recording.rows[index], side.preparer.tokenizer
    ids = side.generate(row, recording.max_tokens)
    text, reference_text = (_text(tokenizer, found) for found in (ids, recorded.generated))
    scores = [{} if t is None else score(t, question.answers, question.options) for t in (text, reference_text)]
    alike = np.array_equal(row.input_ids, recording.ids(index))
    return Answered(
        question=question,
        distribution=_distribution(side, recording, index, row) if alike else None,
        ids=ids,
        reference_ids=recorded.generated,
        text=text,
        reference_text=reference_text,
        divergence=_divergence(ids, recorded.generated, recording, index, side.config.eos_token_ids),
        scores=scores[0],
        reference_scores=scores[1],
    )


def _distribution(side: Side, recording: Recording, index: int, row: Row) -> RowDistribution:
    recorded, config = recording.rows[index], side.config
    targets = None if recorded.targets is None else np.array(recorded.targets)
    measured = side.logits(row, scored(row, config).positions)
    never = [config.image_token_id, config.video_token_id]
    return row_distribution(np.asarray(recording.logits(index)), measured, targets, never)


def _text(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str | None:
    return None if tokenizer is None else tokenizer.decode(list(ids))


def _divergence(
    ids: list[int], reference: list[int], recording: Recording, index: int, ends: Sequence[int]
) -> Divergence | None:
    """The first place where two answers differ; the end of one counts as an end token."""
    if ids == reference:
        return None
    count = min(len(ids), len(reference))
    place = next((i for i in range(count) if ids[i] != reference[i]), count)
    likeliest, logits = recording.likeliest(index)
    if place >= len(likeliest):
        return Divergence(place, None, False)
    own = set(reference[place : place + 1]) or set(ends)
    found = set(ids[place : place + 1]) or set(ends)
    best = max((v for i, v in zip(likeliest[place], logits[place], strict=True) if int(i) in own), default=None)
    other = max((v for i, v in zip(likeliest[place], logits[place], strict=True) if int(i) in found), default=None)
    if best is None or other is None:
        return Divergence(place, None, False)
    margin = float(best - other)
    return Divergence(place, margin, bool(margin <= rounding_step(np.array(best))))


def metrics(rows: Sequence[Answered], seed: int) -> dict[str, Any]:
    """Every metric that the rows have, with its interval: plain data."""
    found: dict[str, Interval] = {}
    told = [row.distribution for row in rows if row.distribution is not None and len(row.distribution.kld)]
    if told:
        found |= _distribution_metrics(told, seed)
    found |= _answer_metrics(rows, seed)
    order = list(METRICS)
    names = sorted(found, key=lambda name: (order.index(name.removesuffix("_reference")), name))
    return {name: found[name].to_dict() for name in names}


def _distribution_metrics(told: Sequence[RowDistribution], seed: int) -> dict[str, Interval]:
    counts = np.array([len(d.kld) for d in told])

    def mean(values: list[float]) -> Interval:
        return bootstrap(np.array(values, np.float64), counts, seed)

    found = {
        "kld": mean([float(d.kld.sum()) for d in told]),
        "kld_p99": bootstrap_statistic([d.kld for d in told], lambda v: float(np.quantile(v, 0.99)), seed),
        "top1_agreement": mean([float(d.top1.sum()) for d in told]),
        "top5_agreement": mean([float(d.top5.sum()) for d in told]),
        "divergent_tokens": mean([float(d.divergent) for d in told]),
    }
    expected = [d for d in told if d.nll is not None]
    for name in ("nll", "nll_reference") if expected else ():
        likelihoods = [getattr(d, name) for d in expected]
        sums, sizes = np.array([v.sum() for v in likelihoods]), np.array([len(v) for v in likelihoods])
        found[name.replace("nll", "perplexity")] = _exponential(bootstrap(sums, sizes, seed))
    return found


def _exponential(interval: Interval) -> Interval:
    low, high = (None if v is None else math.exp(v) for v in (interval.low, interval.high))
    return Interval(math.exp(interval.value), low, high, interval.n)


def _answer_metrics(rows: Sequence[Answered], seed: int) -> dict[str, Interval]:
    ones = np.ones(len(rows))
    found = {"exact_match": bootstrap(np.array([float(row.same) for row in rows]), ones, seed)}
    places = [float(row.divergence.place) for row in rows if row.divergence is not None]
    if places:
        found["first_divergent_token"] = bootstrap_statistic(np.array(places), lambda v: float(np.median(v)), seed)
    for name in ("accuracy", "anls", "cer", "wer", "choice"):
        scored_rows = [row for row in rows if name in row.scores and name in row.reference_scores]
        if scored_rows:
            count = np.ones(len(scored_rows))
            found[name] = bootstrap(np.array([row.scores[name] for row in scored_rows]), count, seed)
            found[f"{name}_reference"] = bootstrap(
                np.array([row.reference_scores[name] for row in scored_rows]), count, seed
            )
    return found


def paired_tests(rows: Sequence[Answered], margins: Mapping[str, float], seed: int) -> list[dict[str, Any]]:
    """Of every scored metric that has a margin: is the candidate worse than the reference by more than it."""
    found = []
    for name, margin in margins.items():
        both = [row for row in rows if name in row.scores and name in row.reference_scores]
        if both:
            mine = np.array([row.scores[name] for row in both])
            theirs = np.array([row.reference_scores[name] for row in both])
            better = METRICS[name].higher_is_better is not False
            found.append(paired(name, mine, theirs, margin, seed, better).to_dict())
    return found


def token_record(rows: Sequence[Answered]) -> dict[str, Any]:
    """How many answers leave the reference's, how many of them at a near tie."""
    apart = [row.divergence for row in rows if row.divergence is not None]
    return {
        "rows": len(rows),
        "divergent_rows": len(apart),
        "near_ties": sum(one.near_tie for one in apart),
        "median_first_divergent": float(np.median([one.place for one in apart])) if apart else None,
    }


def score_record(row: Answered) -> dict[str, Any]:
    """One row's scores and texts."""
    return {
        "row": row.question.name,
        "reference": row.reference_scores,
        "candidate": row.scores,
        "reference_text": row.reference_text,
        "candidate_text": row.text,
        "expected": row.question.answers[0] if row.question.answers else None,
    }


def examples(rows: Sequence[Answered], wanted: int) -> list[dict[str, Any]]:
    """Rows to show: those whose answers differ first, then others, in the data's order."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].same, i))[:wanted]
    return [_example(rows[i]) for i in order]


def _example(row: Answered) -> dict[str, Any]:
    from .question import data_url

    apart = row.divergence
    verdict = "PASS" if row.same else "AMBIGUOUS" if apart is not None and apart.near_tie else "FAIL"
    return {
        "row": row.question.name,
        "prompt": row.question.prompt,
        "images": [data_url(image) for image in row.question.images],
        "expected": row.question.answers[0] if row.question.answers else None,
        "reference": row.reference_text if row.reference_text is not None else _numbers(row.reference_ids),
        "candidate": row.text if row.text is not None else _numbers(row.ids),
        "first_divergent": apart.place if apart is not None else None,
        "margin": apart.margin if apart is not None else None,
        "verdict": verdict,
    }


def _numbers(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))
