"""onevision-edge bench: what it prints and writes, its exit codes, one line for every mistake."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from onevision_edge.cli import main
from onevision_edge.cli.bench import bench
from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.plan import common_size, contenders, names, open_bundles
from onevision_edge.report.record import write_text

QUICK = ("--rounds", 1, "--warmup", 0, "--threads", 1, "--prompt-tokens", 5, "--output-tokens", 3, "--image", "56x56")


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the page is made of, in place of the page."""
    seen: list[Any] = []
    module: Any = ModuleType("page")

    def made(parity: Any, latency: Any) -> str:
        seen.append((parity, latency))
        return "<html></html>"

    module.page = made
    monkeypatch.setitem(sys.modules, "onevision_edge.report.page.page", module)
    if "bench" not in main.commands:
        monkeypatch.setitem(main.commands, "bench", bench)
    return seen


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def failure(*arguments: object) -> str:
    """The message of a command that must fail with exit code 1."""
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return result.stderr


def test_two_bundles_side_by_side(golden_bundle: Callable[[str], Path], tmp_path: Path, page: list[Any]) -> None:
    """The whole of it, once: five processes, one round, all files."""
    out, times = tmp_path / "report", tmp_path / "times.json"
    result = call(
        golden_bundle("fp32"), golden_bundle("fp16"), *QUICK, "-o", out, "--profile", "--json", "--exportTimes", times
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((out / "latency.json").read_text())
    assert page == [(None, record)]
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "latency.json", "latency.md"]
    assert [one["subject"]["name"] for one in record["subjects"]] == ["fp32", "fp16"]
    assert record["memory_bandwidth"] > 1e8
    for one in record["subjects"]:
        (cell,) = one["cells"]
        assert cell["cell"] == "56x56, 5 tokens, 3 out, batch 1"
        assert cell["metrics"]["input_sequence_length"]["mean"] == 4 + 5
        assert cell["metrics"]["output_sequence_length"]["mean"] == 3
        assert cell["bytes_per_token"] > 100_000
        assert cell["roofline_share"] > 0
        assert one["profile"]["source"] == "onnxruntime"
        assert one["peak_rss"] > 10_000_000
        assert one["load_seconds"]["count"] == 1
    assert {line["subject"] for line in record["ratios"]} == {"fp16"}
    assert [entry["subject"] for entry in json.loads(times.read_text())] == ["fp32", "fp16"]
    assert "wrote" in result.stderr


def test_tables_without_an_output_and_a_gate_that_fails(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    first = call(golden_bundle("fp32"), *QUICK, "--json")
    record = json.loads(first.stdout)
    path.write_text(json.dumps(record))
    passed = call(golden_bundle("fp32"), *QUICK, "--baseline", path, "--max-regression", 100_000)
    assert passed.exit_code == 0, passed.output
    assert "56x56, 5 tokens, 3 out, batch 1" in passed.stdout
    assert "of bandwidth" in passed.stdout
    for stats in record["subjects"][0]["cells"][0]["metrics"].values():
        stats["p50"] /= 1e6
    path.write_text(json.dumps(record))
    failed = call(golden_bundle("fp32"), *QUICK, "--baseline", path)
    assert failed.exit_code == 1
    assert "fp32, 56x56, 5 tokens, 3 out, batch 1: " in failed.stderr.splitlines()[-1]
    assert "10 % are allowed (and 2 more)" in failed.stderr.splitlines()[-1]
    assert "56x56" in failed.stdout  # what was measured is told all the same


def test_optimum_benchmark_is_a_list(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    result = call(golden_bundle("fp32"), *QUICK, "--json", "--format", "optimum-benchmark", "-o", tmp_path)
    (found,) = json.loads(result.stdout)
    assert found["report"]["decode"]["latency"]["count"] == 1
    assert json.loads((tmp_path / "optimum-benchmark.json").read_text()) == [found]


def test_the_page_shows_parity_where_there_is_some(
    golden_bundle: Callable[[str], Path], tmp_path: Path, page: list[Any]
) -> None:
    (tmp_path / "parity.json").write_text('{"format": "onevision-edge parity"}')
    assert call(golden_bundle("fp32"), *QUICK, "-o", tmp_path).exit_code == 0
    assert page[0][0] == {"format": "onevision-edge parity"}
    assert (tmp_path / "index.html").read_text() == "<html></html>"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("b", "--image", "1036"),
        ("b", "--batch", 0),
        ("b", "--rounds", 0),
        ("b", "--format", "csv"),
        ("b", "--max-regression", 5),
        ("b", "--seed", -1),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[object, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_mistakes_are_one_line(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = golden_bundle("fp32")
    assert "does not exist" in failure(tmp_path / "none")
    assert "PATH" in failure(bundle, "--peer", "vllm=x")
    assert "fp32 holds 256" in failure(bundle, "--prompt-tokens", 300, "--image", "none")
    assert "no cpu engine" in failure(bundle, "--engines", "cpu", "--image", "none")
    assert "missing.json" in failure(bundle, "--baseline", tmp_path / "missing.json")
    assert not list(tmp_path.iterdir())


def test_the_default_image_is_one_that_all_take(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    small = shutil.copytree(golden_bundle("fp32"), tmp_path / "small")
    (small / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 112 * 112}))
    bundles = open_bundles([golden_bundle("fp32"), small])
    assert common_size([bundles["fp32"]]) == (448, 448)
    assert common_size(list(bundles.values())) == (112, 112)


def test_names_tell_bundles_apart() -> None:
    assert names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names([Path("/x/a"), Path("/y/a"), Path("/y/b")]) == ["x/a", "y/a", "b"]
    assert names([Path("/x/a"), Path("/x/a")])[1].endswith("(2)")
    assert len(set(names([Path("/x/a"), Path("/x/a"), Path("/z/x/a")]))) == 3


def test_contenders_know_what_a_peer_reads(
    golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = open_bundles([golden_bundle("fp32")])
    cell = Cell((84, 56), 5, 1)
    monkeypatch.setattr("onevision_edge.report.latency.peers.find_spec", lambda name: object())
    found = contenders(bundles, ["transformers=demo", "transformers=demo"], [cell], 2)
    assert [one.name for one in found] == ["fp32", "transformers", "transformers (2)"]
    assert found[1].arguments == ("demo", "transformers", 2, {cell.name: 6})


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_options_are_documented() -> None:
    text = call("--help").stdout
    for option in bench.params:
        if isinstance(option, click.Option):
            assert option.opts[0] in text
