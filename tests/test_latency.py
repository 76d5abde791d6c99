"""The latency record, its tables, and the shapes of other tools, of samples whose times are known."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.latency.bench import bundle_contender, ratios, record
from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.formats import export_times, optimum_benchmarks
from onevision_edge.report.latency.metrics import Request
from onevision_edge.report.latency.process import Contender
from onevision_edge.report.latency.regression import read_record, regressions
from onevision_edge.report.latency.rounds import ColdStart, Samples, Schedule
from onevision_edge.report.page.latency_markdown import markdown, tables

CELL, TEXT = Cell((56, 56), 5, 3), Cell(None, 5, 3)
STAGES = {"preprocess": 0.01, "vision_encoding": 0.05, "prepare_embeddings": 0.01, "prefill": 0.03, "decode": 0.1}


def requests(factor: float, rounds: int = 2) -> list[Request]:
    """Tokens after 100, 140 and 200 ms, times a factor, a second apart."""
    stages = {name: seconds * factor for name, seconds in STAGES.items()}
    tokens = [[factor * t for t in (0.1, 0.14, 0.2)]]
    return [Request(10.0 + i, stages, tokens, 9) for i in range(rounds)]


def samples(contender: Contender, factor: float, backend: str = "onnxruntime") -> Samples:
    subject = {"name": contender.name, "kind": "bundle", "backend": backend, "precision": "fp32", "dtype": "fp32"}
    subject |= {"bytes": 1000, "weights_sha256": None, "files": {}, "model": {}, "notes": ["one note"]}
    cold = [ColdStart(0.5, 0.2, 0.3), ColdStart(0.7, 0.4, 0.5), ColdStart(0.6, 0.3, 0.4)]
    return Samples(contender, subject, cold, {CELL: requests(factor), TEXT: requests(factor)}, 5_000_000)


@pytest.fixture
def pair(golden_bundle: Callable[[str], Path]) -> list[Samples]:
    """The second is twice as fast as the first."""
    path = golden_bundle("fp32")
    return [samples(bundle_contender(path, "slow"), 2.0), samples(bundle_contender(path, "fast"), 1.0)]


@pytest.fixture
def found(pair: list[Samples]) -> dict[str, Any]:
    return record(pair, Schedule(rounds=2, warmup=1, seed=3), 1e9)


def test_the_record_has_what_it_promises(found: dict[str, Any]) -> None:
    assert (found["format"], found["format_version"], found["seed"], found["rounds"]) == (
        "onevision-edge bench",
        1,
        3,
        2,
    )
    slow, fast = found["subjects"]
    assert slow["load_seconds"]["p50"] == pytest.approx(0.3)
    assert slow["load_seconds"]["unit"] == "s"
    assert slow["cold_start"] == {"process_start": 0.6, "load": 0.3, "time_to_first_token": 0.4}
    assert slow["peak_rss"] == 5_000_000
    assert slow["mlperf"]["SingleStream"]["latency_p90_ms"] == pytest.approx(400)
    cell = fast["cells"][0]
    assert {k: cell[k] for k in ("cell", "image", "images", "prompt_tokens", "output_tokens", "batch")} == {
        "cell": "56x56, 5 tokens, 3 out, batch 1",
        "image": "56x56",
        "images": 1,
        "prompt_tokens": 5,
        "output_tokens": 3,
        "batch": 1,
    }
    assert cell["metrics"]["time_to_first_token"]["p50"] == pytest.approx(100)
    assert list(cell["stages"]) == list(STAGES)
    assert cell["stages"]["decode"]["p99"] == pytest.approx(100)
    # Median step 50 ms at 1 GB/s.
    assert cell["roofline_share"] == pytest.approx(cell["bytes_per_token"] / 1e9 / 0.05)
    json.dumps(found, allow_nan=False)


def test_a_record_names_no_path_of_the_machine(found: dict[str, Any], golden_bundle: Callable[[str], Path]) -> None:
    assert str(golden_bundle("fp32").parent) not in json.dumps(found)


def test_ratios_are_to_the_first(found: dict[str, Any]) -> None:
    assert len(found["ratios"]) == 2 * 4
    for line in found["ratios"]:
        assert (line["subject"], line["baseline"]) == ("fast", "slow")
        assert [line[key] for key in ("ratio", "low", "high")] == pytest.approx([2, 2, 2])


def test_a_peer_without_a_tower_has_its_decode_compared(pair: list[Samples]) -> None:
    peer = samples(Contender("peer", "llama.cpp", ()), 1.0)
    lines = {(line["cell"], line["metric"]) for line in ratios([pair[0], peer])}
    assert {metric for cell, metric in lines if cell == CELL.name} == {"inter_token_latency"}
    assert len({metric for cell, metric in lines if cell == TEXT.name}) == 4
    alone = record([peer], Schedule(rounds=2), 1e9)["subjects"][0]["cells"][0]
    assert (alone["bytes_per_token"], alone["roofline_share"]) == (None, None)


def test_a_gpu_has_no_share_of_the_hosts_memory(golden_bundle: Callable[[str], Path]) -> None:
    contender = bundle_contender(golden_bundle("fp32"), "gpu")
    cell = record([samples(contender, 1.0, "tensorrt")], Schedule(rounds=2), 1e9)["subjects"][0]["cells"][0]
    assert cell["bytes_per_token"] > 0
    assert cell["roofline_share"] is None


def test_tables_say_what_the_record_says(found: dict[str, Any]) -> None:
    first = tables(found)[0]
    assert first.title == CELL.name
    assert all(len(row) == len(table.header) for table in tables(found) for row in table.rows)
    assert [row[:2] for row in first.rows] == [("slow", "200"), ("fast", "100")]
    text = markdown(found)
    assert "| fast | 56x56, 5 tokens, 3 out, batch 1 | inter_token_latency | 2.00 | 2.00 to 2.00 |" in text
    assert "slow: one note." in text
    for table in tables(found):
        assert f"## {table.title}" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert min(widths) >= 5


def test_a_profile_becomes_two_tables(found: dict[str, Any]) -> None:
    one = {"seconds": 0.004, "calls": 3}
    found["subjects"][1]["profile"] = {
        "source": "onnxruntime",
        "seconds": 0.016,
        "tree": {},
        "operations": [{"operation": "MatMul", **one}],
        "modules": [{"module": "lm_head", **one}],
    }
    modules, operations = tables(found)[-2:]
    assert modules.title == "fast: where 16 ms of a request go, by module"
    assert modules.rows == [("lm_head", "4.000", "25.0%", "3")]
    assert operations.rows == [("MatMul", "4.000", "25.0%", "3")]


def test_a_share_above_one_is_explained(pair: list[Samples]) -> None:
    first = tables(record(pair, Schedule(rounds=2), 1.0))[0]
    assert "caches" in first.note
    assert tables(record(pair, Schedule(rounds=2), 1e12))[0].note == ""


def test_times_are_those_of_trtexec(pair: list[Samples]) -> None:
    entries = export_times(pair)
    assert len(entries) == 2 * 2 * 2
    assert [entry["startEnqMs"] for entry in entries] == sorted(entry["startEnqMs"] for entry in entries)
    entry = next(e for e in entries if (e["subject"], e["cell"], e["round"]) == ("fast", CELL.name, 1))
    del entry["subject"], entry["cell"], entry["round"]
    assert entry == {key: pytest.approx(value) for key, value in {
        "startEnqMs": 1000, "endEnqMs": 1200, "startH2dMs": 1000, "endH2dMs": 1010, "startComputeMs": 1010,
        "endComputeMs": 1200, "startD2hMs": 1200, "endD2hMs": 1200, "h2dMs": 10, "computeMs": 190, "d2hMs": 0,
        "latencyMs": 200,
    }.items()}  # fmt: skip


def test_reports_are_those_of_optimum_benchmark(pair: list[Samples]) -> None:
    found = optimum_benchmarks(pair)
    assert len(found) == 4
    report = next(f["report"] for f in found if f["config"]["name"] == f"fast, {CELL.name}")
    assert list(report) == ["load_model", "first_generate", "prefill", "generate", "decode", "per_token"]
    assert set(report["prefill"]) == {"memory", "latency", "throughput", "energy", "efficiency"}
    assert report["prefill"]["latency"]["mean"] == pytest.approx(0.1)
    assert report["prefill"]["throughput"] == {"unit": "samples/s", "value": pytest.approx(10)}
    assert report["decode"]["latency"]["values"] == pytest.approx([0.1, 0.1])
    assert report["decode"]["throughput"] == {"unit": "tokens/s", "value": pytest.approx(20)}
    assert report["per_token"]["latency"]["count"] == 4
    assert report["load_model"]["latency"]["p50"] == pytest.approx(0.3)
    assert report["load_model"]["latency"]["stdev"] == pytest.approx(0.1 * math.sqrt(2 / 3))
    assert report["generate"]["memory"]["max_ram"] == 5.0


def test_a_regression_is_named(found: dict[str, Any], pair: list[Samples]) -> None:
    worse = record([samples(pair[0].contender, 2.6), pair[1]], Schedule(rounds=2), 1e9)
    lines = regressions(worse, found, 25)
    assert len(lines) == 2 * 4
    assert re.fullmatch(
        r"slow, 56x56, 5 tokens, 3 out, batch 1: time_to_first_token 260 ms was 200: 30 % worse, and 25 % are allowed",
        next(line for line in lines if "56x56" in line and "time_to_first" in line),
    )
    assert "output_token_throughput 5.769 tokens/sec was 7.5" in " ".join(lines)
    assert regressions(worse, found, 31) == []
    assert regressions(found, worse, 0) == []  # better is no regression


def test_records_are_matched_by_name(found: dict[str, Any], pair: list[Samples]) -> None:
    renamed = record([samples(bundle_contender(Path(pair[0].contender.arguments[0]), "new"), 9.0)], Schedule(), 1e9)
    with pytest.raises(OneVisionError, match="no cell of these subjects"):
        regressions(renamed, found, 10)
    alone = record([pair[0]], Schedule(), 1e9)
    assert len(regressions(renamed, alone, 10)) == 8  # one alone with one alone


def test_only_latency_records_are_baselines(tmp_path: Path, found: dict[str, Any]) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(found))
    assert read_record(path) == found
    path.write_text(json.dumps({**found, "format": "onevision-edge parity"}))
    with pytest.raises(OneVisionError, match="is no latency record"):
        read_record(path)
    with pytest.raises(OneVisionError, match="missing"):
        read_record(tmp_path / "missing")
