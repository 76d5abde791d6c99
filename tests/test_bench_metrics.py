"""Metrics by hand: what AIPerf's definitions give for requests whose times are known."""

import numpy as np
import pytest

from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.metrics import (
    DECODE,
    PREFILL,
    Request,
    metrics,
    mlperf,
    ratio,
    stages,
    statistics,
    step_seconds,
)

CELL = Cell((28, 28), 9, 3)
# Two requests of one sequence: tokens after 100, 150, 170 ms, and after 200, 240, 300 ms.
REQUESTS = [
    Request(0.0, {PREFILL: 0.08, DECODE: 0.07}, [[0.1, 0.15, 0.17]], 10),
    Request(1.0, {PREFILL: 0.18, DECODE: 0.1}, [[0.2, 0.24, 0.3]], 10),
]


def test_statistics_by_hand() -> None:
    found = statistics(range(1, 102), "ms")
    assert found["unit"] == "ms"
    assert found["count"] == 101
    assert [found[name] for name in ("min", "p50", "p90", "p95", "p99", "max")] == [1, 51, 91, 96, 100, 101]
    assert found["mean"] == pytest.approx(51)
    assert found["std"] == pytest.approx(np.sqrt((101**2 - 1) / 12))
    alone = statistics([4.5], "s")
    assert {alone[k] for k in ("min", "mean", "p50", "p90", "p95", "p99", "max")} == {4.5}
    assert alone["std"] == 0


def test_latencies_are_in_milliseconds() -> None:
    found = metrics(REQUESTS, CELL)
    assert found["time_to_first_token"]["mean"] == pytest.approx(150)
    assert found["time_to_second_token"]["mean"] == pytest.approx((50 + 40) / 2)
    assert found["request_latency"]["max"] == pytest.approx(300)
    assert found["inter_token_latency"]["count"] == 4  # over tokens
    assert found["inter_token_latency"]["p50"] == pytest.approx(45)
    # AIPerf's own, over requests, has the same mean.
    assert found["inter_token_latency"]["mean"] == pytest.approx(np.mean([70 / 2, 100 / 2]))
    assert {found[name]["unit"] for name in ("time_to_first_token", "inter_token_latency", "request_latency")} == {"ms"}


def test_throughputs_by_hand() -> None:
    found = metrics(REQUESTS, CELL)
    assert found["output_token_throughput"]["max"] == pytest.approx(3 / 0.17)
    assert found["output_token_throughput_per_user"]["max"] == pytest.approx(2 / 0.07)
    assert found["prefill_throughput_per_user"]["max"] == pytest.approx(10 / 0.1)
    assert found["total_token_throughput"]["max"] == pytest.approx(13 / 0.17)
    assert found["request_throughput"]["max"] == pytest.approx(1 / 0.17)
    assert found["input_sequence_length"]["mean"] == 10
    assert found["output_sequence_length"]["mean"] == 3
    assert found["image_latency"]["max"] == pytest.approx(300)
    assert found["image_throughput"]["min"] == pytest.approx(1 / 0.3)


def test_a_batch_counts_each_sequence() -> None:
    batch = Request(0.0, {}, [[0.1, 0.4], [0.2, 0.4]], 10)
    found = metrics([batch], Cell(None, 10, 2, 2))
    assert found["time_to_first_token"]["count"] == 2
    assert found["time_to_first_token"]["max"] == pytest.approx(200)
    assert found["output_token_throughput"]["mean"] == pytest.approx(4 / 0.4)
    assert found["request_throughput"]["mean"] == pytest.approx(2 / 0.4)
    assert "image_latency" not in found


def test_one_token_has_no_latency_between_tokens() -> None:
    found = metrics([Request(0.0, {}, [[0.1]], 10)], Cell(None, 10, 1))
    assert "inter_token_latency" not in found
    assert "output_token_throughput_per_user" not in found
    assert found["request_latency"]["mean"] == pytest.approx(100)
    assert step_seconds([Request(0.0, {}, [[0.1]], 10)], 1) is None


def test_stages_are_those_that_were_told() -> None:
    found = stages(REQUESTS)
    assert list(found) == [PREFILL, DECODE]
    assert found[PREFILL]["mean"] == pytest.approx(130)


def test_a_step_is_counted_once_for_a_batch() -> None:
    batch = Request(0.0, {}, [[0.1, 0.4, 0.6], [0.3, 0.4, 0.6]], 10)
    assert step_seconds([batch, batch], 2) == pytest.approx((0.3 + 0.2) / 2)


def test_ratios_are_of_rounds_that_belong_together() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    slow = [Request(0.0, {}, [[2 * t * f for t in (0.1, 0.2)]], 10) for f in (1, 2, 1)]
    fast = [Request(0.0, {}, [[t * f for t in (0.1, 0.2)]], 10) for f in (1, 2, 1)]
    cell = Cell(None, 10, 2)
    for metric in ("time_to_first_token", "inter_token_latency", "request_latency", "output_token_throughput"):
        found = ratio(fast, slow, cell, metric)
        assert found == {"ratio": pytest.approx(2), "low": pytest.approx(2), "high": pytest.approx(2)}
        assert ratio(slow, fast, cell, metric) == {key: pytest.approx(0.5) for key in ("ratio", "low", "high")}
    spread = ratio(fast, [slow[0], slow[0], slow[0]], cell, "request_latency")
    assert spread == {"ratio": pytest.approx(2), "low": pytest.approx(1), "high": pytest.approx(2)}
    assert ratio([Request(0.0, {}, [[0.1]], 1)], [Request(0.0, {}, [[0.1]], 1)], cell, "inter_token_latency") is None


def test_mlperf_scenarios_by_hand() -> None:
    one, four, other = Cell(None, 8, 2), Cell(None, 8, 2, 4), Cell((28, 28), 8, 2, 8)
    latencies = [Request(0.0, {}, [[0.0, ms / 1000]], 8) for ms in range(1, 12)]
    batches = [Request(0.0, {}, [[0.1, 0.5]] * 4, 8)] * 2
    found = mlperf({one: latencies, four: batches, other: batches})
    assert found["SingleStream"] == {"latency_p90_ms": pytest.approx(10), "samples": 11, "cell": one.name}
    assert found["Offline"] == {"samples_per_second": pytest.approx(8), "samples": 8, "cell": four.name}
    assert "SingleStream" not in mlperf({four: batches})
