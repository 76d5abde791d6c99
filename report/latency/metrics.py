"""What one request took, and what many of them come to.

Names, units and definitions of metrics are those of NVIDIA's AIPerf. One thing differs: inter_token_latency has its
percentiles over tokens, not over the requests' means, since a few requests have thousands of tokens; its mean is the
same. Source: the metric reference of AIPerf's documentation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from .cells import Cell

PREPROCESS, VISION, EMBEDDINGS, PREFILL, DECODE = STAGES = (
    "preprocess",
    "vision_encoding",
    "prepare_embeddings",
    "prefill",
    "decode",
)
LOWER, HIGHER = "lower", "higher"  # is better
# What subjects are compared by, and which way is better.
COMPARED = {
    "time_to_first_token": LOWER,
    "inter_token_latency": LOWER,
    "request_latency": LOWER,
    "output_token_throughput": HIGHER,
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the sequences of a batch, sent together.

    started: seconds on the machine's monotonic clock. stages: seconds by stage, those that the subject tells.
    tokens: of each sequence, seconds from the start to each of its new tokens. input_tokens: of one sequence, those
    of its image with them.
    """

    started: float
    stages: Mapping[str, float]
    tokens: Sequence[Sequence[float]]
    input_tokens: int

    @property
    def seconds(self) -> float:
        """Until the last token of all."""
        return max(times[-1] for times in self.tokens)

    @property
    def output_tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.tokens))

    def gaps(self) -> list[float]:
        """Seconds between tokens that follow one another, of all sequences."""
        return [later - earlier for times in self.tokens for earlier, later in pairwise(times)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `Request(**plain)`."""
        return asdict(self)


def statistics(values: Iterable[float], unit: str) -> dict[str, Any]:
    """count, min, mean, p50, p90, p95, p99, max and std (of the population) of some values."""
    found = np.array(list(values), np.float64)
    points = dict(zip(("p50", "p90", "p95", "p99"), np.percentile(found, (50, 90, 95, 99)).tolist(), strict=True))
    ends = {"min": float(found.min()), "mean": float(found.mean()), **points, "max": float(found.max())}
    return {"unit": unit, "count": len(found), **ends, "std": float(found.std())}


def _of_sequences(value: Callable[[Request, Sequence[float]], float]) -> Callable[[Request, Cell], list[float]]:
    return lambda request, cell: [value(request, times) for times in request.tokens]


def _of_answers(value: Callable[[Request, Sequence[float]], float]) -> Callable[[Request, Cell], list[float]]:
    """Of sequences with more than one new token."""
    return lambda request, cell: [value(request, times) for times in request.tokens if len(times) > 1]


def _of_images(value: Callable[[float], float]) -> Callable[[Request, Cell], list[float]]:
    return lambda request, cell: [value(times[-1] / cell.images) for times in request.tokens if cell.images]


# By name: the unit, and the values that one request gives.
_METRICS: dict[str, tuple[str, Callable[[Request, Cell], list[float]]]] = {
    "time_to_first_token": ("ms", _of_sequences(lambda request, times: 1e3 * times[0])),
    "time_to_second_token": ("ms", _of_answers(lambda request, times: 1e3 * (times[1] - times[0]))),
    "inter_token_latency": ("ms", lambda request, cell: [1e3 * gap for gap in request.gaps()]),
    "request_latency": ("ms", _of_sequences(lambda request, times: 1e3 * times[-1])),
    "output_token_throughput": ("tokens/sec", lambda request, cell: [request.output_tokens / request.seconds]),
    "output_token_throughput_per_user": (
        "tokens/sec/user",
        _of_answers(lambda request, times: (len(times) - 1) / (times[-1] - times[0])),
    ),
    "prefill_throughput_per_user": ("tokens/sec/user", _of_sequences(lambda r, times: r.input_tokens / times[0])),
    "total_token_throughput": (
        "tokens/sec",
        lambda request, cell: [(cell.batch * request.input_tokens + request.output_tokens) / request.seconds],
    ),
    "request_throughput": ("requests/sec", lambda request, cell: [len(request.tokens) / request.seconds]),
    "input_sequence_length": ("tokens", _of_sequences(lambda request, times: request.input_tokens)),
    "output_sequence_length": ("tokens", _of_sequences(lambda request, times: len(times))),
    "image_throughput": ("images/sec", _of_images(lambda seconds: 1 / seconds)),
    "image_latency": ("ms/image", _of_images(lambda seconds: 1e3 * seconds)),
}


def metrics(requests: Sequence[Request], cell: Cell) -> dict[str, dict[str, Any]]:
    """Statistics of each metric that the requests of a cell have."""
    values = {name: [v for r in requests for v in of(r, cell)] for name, (_, of) in _METRICS.items()}
    return {name: statistics(found, _METRICS[name][0]) for name, found in values.items() if found}


def stages(requests: Sequence[Request]) -> dict[str, dict[str, Any]]:
    """Statistics of each stage, in milliseconds."""
    values = {stage: [1e3 * r.stages[stage] for r in requests if stage in r.stages] for stage in STAGES}
    return {stage: statistics(found, "ms") for stage, found in values.items() if found}


def step_seconds(requests: Sequence[Request], batch: int) -> float | None:
    """The median of a decode step, which gives each of `batch` sequences a token; None without one."""
    steps = [gap for request in requests for gap in request.gaps()[: len(request.gaps()) // batch]]
    return median(steps) if steps else None


def ratio(
    subject: Sequence[Request], baseline: Sequence[Request], cell: Cell, metric: str
) -> dict[str, float | int] | None:
    """How many times better a subject is in a metric: of rounds that belong together, the median, least and most.

    None where one of them lacks the metric.
    """
    _, values = _METRICS[metric]
    pairs = [(values(ours, cell), values(theirs, cell)) for ours, theirs in zip(subject, baseline, strict=True)]
    if not pairs or not all(ours and theirs for ours, theirs in pairs):
        return None
    found = [float(np.mean(ours) / np.mean(theirs)) for ours, theirs in pairs]
    better = [1 / r for r in found] if COMPARED[metric] == LOWER else found
    return {"ratio": median(better), "low": min(better), "high": max(better)}


def mlperf(cells: Mapping[Cell, Sequence[Request]]) -> dict[str, dict[str, Any]]:
    """The metrics of MLPerf Inference's scenarios SingleStream and Offline, over cells with the same image and lengths.

    SingleStream: the 90th percentile of a request's latency, one after the other. Offline: samples a second where the
    largest batch is sent. Source: the table of scenarios in MLPerf's inference rules, whose least numbers of queries
    and seconds are not kept here.
    """
    first = next(iter(cells))
    same = {c: found for c, found in cells.items() if (c.size, c.prompt_tokens, c.output_tokens) == _shape(first)}
    single = next((c for c in same if c.batch == 1), None)
    largest = max(same, key=lambda c: c.batch)
    found: dict[str, dict[str, Any]] = {}
    if single is not None:
        times = [1e3 * request.seconds for request in same[single]]
        found["SingleStream"] = {"latency_p90_ms": float(np.percentile(times, 90)), "samples": len(times)}
        found["SingleStream"]["cell"] = single.name
    samples, seconds = largest.batch * len(same[largest]), sum(request.seconds for request in same[largest])
    found["Offline"] = {"samples_per_second": samples / seconds, "samples": samples, "cell": largest.name}
    return found


def _shape(cell: Cell) -> tuple[Any, int, int]:
    return cell.size, cell.prompt_tokens, cell.output_tokens
