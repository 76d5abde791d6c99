"""The latency record: subjects timed side by side, as plain data (latency.json)."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from ...bundle import Bundle, Progress, no_progress
from .. import machine as machines
from ..subject import TENSORRT
from .cells import Cell
from .metrics import COMPARED, metrics, mlperf, ratio, stages, statistics, step_seconds
from .process import Contender
from .roofline import bytes_per_token, memory_bandwidth, roofline_share
from .rounds import Samples, Schedule, measure
from .worker import BUNDLE

FORMAT, FORMAT_VERSION = "onevision-edge bench", 1
DECODE_METRICS = ("inter_token_latency",)  # what a subject without a tower is compared by where there are images


def bundle_contender(path: Path, name: str, threads: int | None = None, engines: str | bool | None = None) -> Contender:
    """A bundle to be timed. threads, engines: as for `load`."""
    return Contender(name, BUNDLE, (str(path), name, threads, engines))


def bench(
    contenders: Sequence[Contender],
    cells: Sequence[Cell],
    schedule: Schedule,
    progress: Progress = no_progress,
    threads: int | None = None,
) -> tuple[dict[str, Any], list[Samples]]:
    """Time contenders on cells; the first is the baseline. Returns the record, and what it was made of.

    threads: that read memory for its bandwidth; None for one per core. Raises OneVisionError.
    """
    bandwidth = memory_bandwidth(threads)
    found = measure(contenders, cells, schedule, progress)
    return record(found, schedule, bandwidth), found


def record(found: Sequence[Samples], schedule: Schedule, bandwidth: float | None) -> dict[str, Any]:
    """The record of what was measured. bandwidth: of memory, bytes a second."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": schedule.seed,
        "machine": machines.machine(),
        "rounds": schedule.rounds,
        "warmup": schedule.warmup,
        "memory_bandwidth": bandwidth,
        "subjects": [_subject(samples, bandwidth) for samples in found],
        "ratios": ratios(found),
    }


def _subject(samples: Samples, bandwidth: float | None) -> dict[str, Any]:
    cold = samples.cold
    return {
        "subject": samples.subject,
        "load_seconds": statistics([one.load for one in cold], "s"),
        "cold_start": {
            "process_start": median(one.start for one in cold),
            "load": median(one.load for one in cold),
            "time_to_first_token": median(one.first_token for one in cold),
        },
        "peak_rss": samples.peak,
        "device": samples.device,
        "cells": [_cell(samples, cell, bandwidth) for cell in samples.requests],
        "mlperf": mlperf(samples.requests),
        "profile": samples.profile,
    }


def _cell(samples: Samples, cell: Cell, bandwidth: float | None) -> dict[str, Any]:
    requests = samples.requests[cell]
    token_bytes, share = _roofline(samples, cell, bandwidth)
    return {
        "cell": cell.name,
        "image": cell.image,
        "images": cell.images,
        "prompt_tokens": cell.prompt_tokens,
        "output_tokens": cell.output_tokens,
        "batch": cell.batch,
        "metrics": metrics(requests, cell),
        "stages": stages(requests),
        "bytes_per_token": token_bytes,
        "roofline_share": share,
    }


def _roofline(samples: Samples, cell: Cell, bandwidth: float | None) -> tuple[int | None, float | None]:
    """Bytes a token reads behind half the answer, and the share of the bandwidth that decode reaches; of bundles."""
    step, requests = step_seconds(samples.requests[cell], cell.batch), samples.requests[cell]
    if samples.contender.kind != BUNDLE or step is None:
        return None, None
    backend, bundle = samples.subject["backend"], Bundle.open(samples.contender.arguments[0])
    context = requests[0].input_tokens + cell.output_tokens / 2
    token_bytes = bytes_per_token(bundle, backend, context, cell.batch)
    if token_bytes is None or bandwidth is None or backend == TENSORRT:  # a GPU's memory is not the one measured
        return token_bytes, None
    return token_bytes, roofline_share(token_bytes, cell.batch, step, bandwidth)


def ratios(found: Sequence[Samples]) -> list[dict[str, Any]]:
    """Every subject against the first, by cell and metric. A subject without a tower has its decode compared alone."""
    baseline, lines = found[0], []
    for samples in found[1:]:
        for cell in samples.requests:
            for metric in _comparable(samples, baseline, cell):
                value = ratio(samples.requests[cell], baseline.requests[cell], cell, metric)
                if value is not None:
                    names = {"subject": samples.contender.name, "baseline": baseline.contender.name}
                    lines.append({"cell": cell.name, "metric": metric, **names, **value})
    return lines


def _comparable(samples: Samples, baseline: Samples, cell: Cell) -> tuple[str, ...]:
    towers = all(one.contender.kind == BUNDLE for one in (samples, baseline))
    return tuple(COMPARED) if towers or not cell.images else DECODE_METRICS
