"""The metrics of a parity report: which way is better, in what unit, and what each one says. One table for all."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """higher_is_better: None for what describes rather than judges. unit: share, nats, tokens, or none."""

    higher_is_better: bool | None
    unit: str
    meaning: str


_SCORES = {
    "accuracy": Metric(True, "share", "answers equal to an accepted one, the case of letters and white space aside"),
    "anls": Metric(True, "share", "1 - normalised edit distance to the nearest accepted answer, 0 below one half"),
    "cer": Metric(False, "share", "character errors for each character of the nearest accepted answer"),
    "wer": Metric(False, "share", "word errors for each word of the nearest accepted answer"),
    "choice": Metric(True, "share", "multiple choice questions answered with the right letter"),
}

METRICS: dict[str, Metric] = {
    "kld": Metric(False, "nats", "mean KL divergence of the next token's distribution from the reference's"),
    "kld_p99": Metric(False, "nats", "99th percentile of the same"),
    "top1_agreement": Metric(True, "share", "positions where the likeliest token is the reference's"),
    "top5_agreement": Metric(True, "share", "positions where the reference's likeliest token is among the five first"),
    "perplexity": Metric(False, "", "exp of the mean negative log-likelihood of the expected answers' tokens"),
    "first_divergent_token": Metric(True, "tokens", "tokens of an answer before the first that differs, median"),
    "divergent_tokens": Metric(False, "share", "positions where the likeliest token is not the reference's"),
    "exact_match": Metric(True, "share", "answers whose text is the reference's"),
    **_SCORES,
}
METRICS |= {
    f"{name}_reference": Metric(None, METRICS[name].unit, f"{METRICS[name].meaning}: the reference's own")
    for name in ("perplexity", *_SCORES)
}
