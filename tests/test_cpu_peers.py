"""benchmarks/cpu_peers.py: what samples come to, and what every worker shares. No engine is run."""

import importlib
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.runtime.images import patch_positions

BENCHMARKS = Path(onevision_edge.__file__).parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def part() -> Callable[[str], ModuleType]:
    """A module of benchmarks/cpu."""
    return lambda name: importlib.import_module(f"cpu.{name}")


@pytest.fixture
def config(script: Callable[[str], ModuleType]) -> dict[str, Any]:
    """config.json of the small shape."""
    found: dict[str, Any] = script("tools/make_checkpoint.py").named_config("s")
    return found


@pytest.fixture
def samples(part: Callable[[str], ModuleType]) -> dict[tuple[str, str], Any]:
    """Two rounds of us, two peers' decoders and two peers' towers."""
    found = {
        ("ours, plain", "decode 256"): [0.05, 0.05],
        ("ours, cpu engine", "decode 256"): [0.02, 0.025],
        ("llama.cpp Q4_0", "decode 256"): [0.04, 0.04],
        ("PyTorch BF16", "decode 256"): [0.1, 0.3],
        ("ours, cpu engine", "first token"): [4.0, 4.0],
        ("llama.cpp Q4_0", "prompt"): [3.0, 5.0],
        ("PyTorch BF16", "prompt"): [2.0, 2.0],
        ("OpenVINO tower INT8", "vision 3848"): [7.0, 6.0],
        ("PyTorch tower BF16", "vision 3848"): [9.0, 9.0],
    }
    return {key: part("rounds").Samples(seconds, [0.0, 0.0]) for key, seconds in found.items()}


def test_a_cell_has_ours_every_peer_and_the_ratio_to_the_best(
    part: Callable[[str], ModuleType], samples: dict[tuple[str, str], Any]
) -> None:
    engines = part("engines").ENGINES
    record = part("report").cell_record("decode 256", engines, samples, {"ours, cpu engine": 0.009})
    assert record["unit"] == "tok/s"
    assert record["ours"] == pytest.approx(1 / 0.0225)
    assert record["variants"]["ours, plain"] == pytest.approx(20)
    assert record["peers"] == {"llama.cpp Q4_0": pytest.approx(25), "PyTorch BF16": pytest.approx(5)}
    assert record["best"] == "llama.cpp Q4_0"
    assert record["ratio_to_best"] == pytest.approx(0.04 / 0.0225)
    assert record["spread"] == pytest.approx((1.6, 2.0))
    assert record["roofline_share"] == pytest.approx(0.4)
    json.dumps(record)


def test_a_peers_first_token_is_its_best_tower_and_its_best_decoder(
    part: Callable[[str], ModuleType], samples: dict[tuple[str, str], Any]
) -> None:
    record = part("report").cell_record("first token", part("engines").ENGINES, samples, {})
    assert record["peers"] == {"OpenVINO tower INT8 + PyTorch BF16": pytest.approx(8.5)}
    assert record["ratio_to_best"] == pytest.approx(8.5 / 4)
    assert record["spread"] == pytest.approx((2.0, 2.25))


def test_a_cell_without_peers_or_without_us_has_no_ratio(
    part: Callable[[str], ModuleType], samples: dict[tuple[str, str], Any]
) -> None:
    engines, report = part("engines").ENGINES, part("report")
    alone = [engine for engine in engines if engine.ours]
    assert report.cell_record("decode 256", alone, samples, {})["ratio_to_best"] is None
    peers = [engine for engine in engines if not engine.ours]
    assert report.cell_record("decode 256", peers, samples, {})["ours"] is None
    assert report.cell_record("first token", alone, samples, {})["peers"] == {}
    assert report.cell_record("prefill 512", engines, samples, {}) is None


def test_disturbed_rounds_count_only_where_all_are(part: Callable[[str], ModuleType]) -> None:
    kind = part("rounds").Samples
    found = kind([1.0, 9.0, 2.0], [0.0, 0.5, 0.05])
    assert found.median == 1.5
    assert not found.disturbed
    found = kind([1.0, 9.0, 2.0], [0.2, 0.5, 0.3])
    assert found.median == 2.0
    assert found.disturbed


def test_a_round_takes_turns_by_measurement_or_by_engine(part: Callable[[str], ModuleType]) -> None:
    engines = [e for e in part("engines").ENGINES if e.name in ("ours, plain", "PyTorch BF16", "PyTorch tower BF16")]
    wanted = ["decode 256", "vision 1024", "first token"]

    def order(together: bool) -> list[tuple[str, str]]:
        return [(engine.name, what) for engine, what in part("rounds").turns(engines, wanted, together)]

    apart = [
        ("ours, plain", "decode 256"),
        ("ours, plain", "vision 1024"),
        ("ours, plain", "first token"),
        ("PyTorch BF16", "decode 256"),
        ("PyTorch tower BF16", "vision 1024"),
    ]
    assert order(False) == apart
    assert order(True) == [apart[i] for i in (0, 3, 1, 4, 2)]


@pytest.mark.parametrize(
    ("name", "megabytes"), [("llama.cpp Q4_0", 375.4), ("OpenVINO GenAI INT4", 382.7), ("PyTorch BF16", 1192)]
)
def test_bytes_of_a_decode_step(
    part: Callable[[str], ModuleType], config: dict[str, Any], name: str, megabytes: float
) -> None:
    engines = part("engines")
    (engine,) = (engine for engine in engines.ENGINES if engine.name == name)
    assert engines.weight_bytes(engine.text, config["text_config"]) / 1e6 == pytest.approx(megabytes, abs=0.5)


def test_roofline(part: Callable[[str], ModuleType], config: dict[str, Any]) -> None:
    machine, engines = part("machine"), part("engines")
    slow = machine.Roofline({1: 1e10, 2: 1e9}, {"FP32": 1e12})
    roofline = slow.or_better(machine.Roofline({1: 1e9, 2: 2e10}, {"FP32": 1e11}))
    assert roofline.read == {1: 1e10, 2: 2e10}
    half = engines.Text(layers=16, head=16, cache=16)
    text = config["text_config"]
    bytes_read = 2 * (440_401_920 + 155_582_464) + 28 * 2 * 8 * 128 * 2 * 256
    assert roofline.text_seconds("decode 256", half, text) == pytest.approx(bytes_read / 2e10)
    products = 2 * 440_401_920 * 512 + 2 * 155_582_464 + 28 * 2 * 16 * 128 * 512**2
    assert roofline.text_seconds("prefill 512", half, text) == pytest.approx(products / 1e12)
    assert roofline.vision_seconds(52, 74, config["vision_config"]) == pytest.approx(3.82, abs=0.02)


def test_tables_and_figure(part: Callable[[str], ModuleType], samples: dict[tuple[str, str], Any]) -> None:
    engines, report = part("engines").ENGINES, part("report")
    samples["ours, plain", "decode 256"].others[:] = [1.0, 1.0]
    cells = {cell: report.cell_record(cell, engines, samples, {}) for cell in ("decode 256", "first token")}
    lines = report.cell_table(cells).splitlines()
    assert lines[0].split("  ")[0] == "engine"
    assert any(line.startswith("ours, plain") and "20~" in line for line in lines)
    assert any(line.startswith("ours / best peer") and "1.78 (1.60 to 2.00)" in line for line in lines)
    drawing = ET.fromstring(part("figure").figure(cells, "a < b"))
    texts = ["".join(node.itertext()) for node in drawing.iter() if node.tag.endswith("text")]
    assert {"a < b", "decode 256", "first token", "44.4 tok/s, 1.78 x"} <= set(texts)


def test_patterns_choose_names(script: Callable[[str], ModuleType]) -> None:
    benchmark = script("benchmarks/cpu_peers.py")
    names = ["ours, plain", "llama.cpp Q4_0", "llama.cpp Q8_0"]
    assert benchmark.matching(names, None) == names
    assert benchmark.matching(names, "*Q8*; ours*") == ["ours, plain", "llama.cpp Q8_0"]
    with pytest.raises(benchmark.click.UsageError, match="fits none of ours, plain"):
        benchmark.matching(names, "vllm")


def test_the_worker_answers_line_by_line(part: Callable[[str], ModuleType]) -> None:
    requests = [{"method": "read_at_once", "arguments": [2]}, {"method": "fail", "arguments": []}]
    answers = io.StringIO()
    lines = io.StringIO("".join(json.dumps(request) + "\n" for request in requests))
    part("worker").serve(f"{__name__}:Counting", {"vocab_size": 7}, lines, answers)
    loaded, read, failed = map(json.loads, answers.getvalue().splitlines())
    assert loaded["result"] >= 0
    assert loaded["peak"] > 0
    assert read["result"] == 2
    assert failed == {"error": "ValueError: no"}
    answers = io.StringIO()
    part("worker").serve("cpu.worker:Nothing", {}, io.StringIO(""), answers)
    assert "Nothing" in json.loads(answers.getvalue())["error"]


class Counting:
    """An engine for the worker."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def read_at_once(self, tokens: int) -> int:
        return tokens

    def fail(self) -> None:
        raise ValueError("no\nmore")


def test_a_reader_reads_a_context_once(part: Callable[[str], ModuleType]) -> None:
    calls: list[int] = []

    class Fake(part("worker").Reader):  # type: ignore[misc]
        vocab_size = 5

        def read(self, ids: list[int]) -> None:
            calls.append(len(ids))

        def keep(self, tokens: int) -> None:
            calls.append(-tokens)

        def last_logits(self) -> np.ndarray:
            return np.eye(5)[3]

    reader = Fake()
    assert len(reader.decode(4, 2)) == 2
    assert len(reader.decode(4, 1)) == 1
    assert calls == [4, 1, 1, -4, 1]
    reader.prefill(3)
    assert calls[5:] == [0, 3]


def test_workers_order_patches_as_the_runtime(part: Callable[[str], ModuleType]) -> None:
    np.testing.assert_array_equal(part("worker").merge_order(4, 6), patch_positions(4, 6, 2))
