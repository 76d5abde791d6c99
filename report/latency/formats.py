"""What was measured in the shapes that other tools write: trtexec's times, optimum-benchmark's report."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .cells import Cell
from .metrics import DECODE, PREPROCESS, Request
from .rounds import Samples


def export_times(found: Sequence[Samples]) -> list[dict[str, Any]]:
    """One entry a request, with the keys of trtexec's --exportTimes, in milliseconds from the first request on.

    Its transfers are those of a device's inputs and outputs: here preprocessing stands for the first, nothing for the
    second. Which subject, cell and round it was comes besides.
    """
    begun = min((r.started for s in found for rs in s.requests.values() for r in rs), default=0.0)
    entries = [
        {"subject": s.contender.name, "cell": cell.name, "round": i, **_times(request, begun)}
        for s in found
        for cell, requests in s.requests.items()
        for i, request in enumerate(requests)
    ]
    return sorted(entries, key=lambda entry: entry["startEnqMs"])


def _times(request: Request, begun: float) -> dict[str, float]:
    start, end = 1e3 * (request.started - begun), 1e3 * (request.started - begun + request.seconds)
    compute = start + 1e3 * request.stages.get(PREPROCESS, 0.0)
    return {
        "startEnqMs": start,
        "endEnqMs": end,
        "startH2dMs": start,
        "endH2dMs": compute,
        "startComputeMs": compute,
        "endComputeMs": end,
        "startD2hMs": end,
        "endD2hMs": end,
        "h2dMs": compute - start,
        "computeMs": end - compute,
        "d2hMs": 0.0,
        "latencyMs": end - start,
    }


def optimum_benchmarks(found: Sequence[Samples]) -> list[dict[str, Any]]:
    """A benchmark for each subject and cell, as optimum-benchmark saves it: what was run, and its BenchmarkReport."""
    return [
        {"config": _config(samples, cell), "report": _report(samples, cell)}
        for samples in found
        for cell in samples.requests
    ]


def _config(samples: Samples, cell: Cell) -> dict[str, Any]:
    shapes = {"batch_size": cell.batch, "num_images": cell.images, "sequence_length": cell.prompt_tokens}
    tokens = {"max_new_tokens": cell.output_tokens, "min_new_tokens": cell.output_tokens}
    subject = samples.subject
    return {
        "name": f"{samples.contender.name}, {cell.name}",
        "backend": {"name": subject["backend"], "model": subject["name"], "torch_dtype": subject["dtype"]},
        "scenario": {"name": "inference", "input_shapes": {**shapes, "image": cell.image}, "generate_kwargs": tokens},
        "launcher": {"name": "process"},
    }


def _report(samples: Samples, cell: Cell) -> dict[str, Any]:
    """Targets of a text generation: its volumes are samples for prefill and generate, tokens for decode."""
    requests = samples.requests[cell]
    memory = {"unit": "MB", "max_ram": samples.peak / 1e6, **dict.fromkeys(("max_reserved", "max_allocated"))}
    gpu = samples.device["memory"] / 1e6 if samples.device else None
    memory |= {"max_global_vram": None, "max_process_vram": gpu}
    prefill = [sum(v for k, v in r.stages.items() if k != DECODE) for r in requests]
    decode = [r.seconds - first for r, first in zip(requests, prefill, strict=True)]
    tokens = cell.batch * (cell.output_tokens - 1)
    found = {
        "load_model": _target([one.load for one in samples.cold], memory=memory),
        "first_generate": _target([one.first_token for one in samples.cold]),
        "prefill": _target(prefill, cell.batch, "samples/s", memory),
        "generate": _target([r.seconds for r in requests], cell.batch, "samples/s", memory),
    }
    if tokens:
        found["decode"] = _target(decode, tokens, "tokens/s", memory)
        found["per_token"] = _target([gap for r in requests for gap in r.gaps()])
    return found


def _target(
    seconds: Sequence[float], volume: int = 0, unit: str = "", memory: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A TargetMeasurements: latency in seconds, and throughput of so much a call."""
    mean = float(np.mean(seconds))
    throughput = {"unit": unit, "value": volume / mean if mean > 0 else 0.0} if volume else None
    return {
        "memory": memory,
        "latency": _latency(seconds),
        "throughput": throughput,
        "energy": None,
        "efficiency": None,
    }


def _latency(seconds: Sequence[float]) -> dict[str, Any]:
    values = np.array(seconds, np.float64)
    p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99)).tolist()
    mean, spread = float(values.mean()), float(values.std())
    return {
        "unit": "s",
        "values": values.tolist(),
        "count": len(values),
        "total": float(values.sum()),
        "mean": mean,
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "stdev": spread,
        "stdev_": 100 * spread / mean if mean else 0.0,
    }
