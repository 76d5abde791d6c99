"""The tables of both records: what stands in which cell, and what is left out where nothing was measured."""

from typing import Any

from report_records import latency_record, parity_record

from onevision_edge.report.page import latency_tables
from onevision_edge.report.page import tables as tables
from onevision_edge.report.page.tables import Table


def texts(table: Table) -> dict[str, dict[str, str]]:
    """Cells by their row's and their column's name."""
    names = table.header[1:]
    return {row[0].text: dict(zip(names, (c.text for c in row[1:]), strict=True)) for row in table.rows}


def test_verdicts_with_the_speed_of_the_same_name() -> None:
    parity, latency = parity_record(3), latency_record(3)
    cell, speeds = latency_tables.speeds(latency, parity)
    found = texts(tables.verdicts(parity, speeds))
    assert list(found) == ["demo-int8-weight", "demo-int8", "demo-int4-broken"]
    assert cell == "1036x728, 64 tokens, 32 out, batch 1"
    assert found["demo-int4-broken"]["verdict"] == "✕ FAIL"
    assert found["demo-int4-broken"]["KLD, nats"] == "0.081"
    assert found["demo-int8"]["size"] == "4.69 MB"
    first = latency["subjects"][2]["cells"][0]["metrics"]["time_to_first_token"]["p50"]
    assert found["demo-int8"]["first token, p50"] == f"{first:.1f} ms"


def test_columns_in_which_nothing_was_measured_are_left_out() -> None:
    assert "first token, p50" not in tables.verdicts(parity_record(2), {}).header
    assert "why" not in tables.stages(parity_record(1)["candidates"][0]).header
    assert "why" in tables.stages(parity_record(3)["candidates"][2]).header


def test_a_name_timed_on_two_backends_is_the_one_compared() -> None:
    parity, latency = parity_record(1), latency_record(1)
    timed: dict[str, Any] = latency["subjects"][1]
    timed["subject"]["name"] = parity["candidates"][0]["subject"]["name"]
    engine = {**timed, "subject": {**timed["subject"], "backend": "cpu engine"}, "cells": [dict(timed["cells"][0])]}
    engine["cells"][0]["metrics"] = {"time_to_first_token": {"unit": "ms", "p50": 1.0}}
    latency["subjects"] += [engine]
    assert latency_tables.subject_names(latency)[1:] == ["demo-int8, onnxruntime", "demo-int8, cpu engine"]
    assert latency_tables.speeds(latency, parity)[1]["demo-int8"] == timed["cells"][0]["metrics"]
    parity["candidates"][0]["subject"]["backend"] = "cpu engine"
    assert latency_tables.speeds(latency, parity)[1]["demo-int8"]["time_to_first_token"]["p50"] == 1.0


def test_a_metric_stands_beside_the_references() -> None:
    found = texts(tables.metrics_table(parity_record(3)["candidates"][2]))
    assert found["right answers"]["candidate (95 % interval)"] == "71.0 % (69.0 to 73.0 %)"
    assert found["right answers"]["reference (95 % interval)"] == "95.3 % (93.3 to 97.3 %)"
    assert found["KL divergence, nats"]["reference (95 % interval)"] == "–"
    assert "accuracy reference" not in found


def test_stages_with_an_exact_one_and_one_that_was_not_measured() -> None:
    found = texts(tables.stages(parity_record(3)["candidates"][2]))
    assert len(found) == 24 + 36 + 6
    assert found["preprocess"]["SNR, dB"] == "exact"
    assert found["tokens"]["error"] == "–"
    assert found["decoder.layers.18"]["why"] == "4.1 times BF16's error"
    assert found["decoder.layers.17"]["why"] == "–"


def test_why_a_candidate_did_not_pass() -> None:
    broken = parity_record(3)["candidates"][2]
    assert tables.reasons(broken) == [
        "kld 0.081 is more than 0.05",
        "accuracy 0.7103 beside 0.94",
        "departs at decoder.layers.18, self_attn.q_proj",
    ]
    assert tables.sentences(broken) == [
        "The first stage to fail is decoder.layers.18.",
        "In decoder.layers.18 it is self_attn.q_proj, whose own error is 0.41 (relative L2).",
        "148 of 359 rows (41.2 %) depart from the reference's tokens, 2 of them at a near tie; "
        "half of them before token 3.",
    ]
    assert tables.reasons(parity_record(3)["candidates"][0]) == []


def test_a_ratio_is_a_difference_only_where_every_round_says_so() -> None:
    latency = latency_record(3)
    for ratio, (low, high) in zip(latency["ratios"], [(1.1, 1.3), (0.8, 0.9), (0.9, 1.1)], strict=True):
        ratio |= {"ratio": (low + high) / 2, "low": low, "high": high}
    rows = latency_tables.ratios(latency).rows
    assert [row[4].text for row in rows] == ["1.20 (1.10 to 1.30)", "0.85 (0.80 to 0.90)", "1.00 (0.90 to 1.10)"]
    assert [row[5].text for row in rows] == ["better in every round", "worse in every round", "rounds disagree"]


def test_every_metric_of_a_cell() -> None:
    latency = latency_record(2, cells=1)
    table = latency_tables.all_metrics(latency, latency_tables.cell_names(latency)[0])
    assert len(table.rows) == 3 * (4 + 5)
    assert {row[-1].text for row in table.rows} == {"7"}


def test_what_takes_longest_is_a_share_of_the_whole() -> None:
    profile = {
        "seconds": 2.0,
        "operations": [{"operation": "Add", "seconds": 0.5}, {"operation": "MatMul", "seconds": 1}],
    }
    table = latency_tables.longest(profile, "operations", "operation")
    assert [[c.text for c in row] for row in table.rows] == [
        ["MatMul", "1.00 s", "50.0 %"],
        ["Add", "500 ms", "25.0 %"],
    ]
