"""Parity end to end: references of every kind, stored ones, determinism, errors, and the command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import onevision_edge
from onevision_edge.cli import main
from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.answers import Divergence, _divergence
from onevision_edge.report.parity.comparison import (
    Plan,
    Running,
    compare,
    open_reference,
    parity_record,
    record_reference,
)
from onevision_edge.report.parity.gates import load_gates
from onevision_edge.report.parity.recording import Recording, recording_directory
from onevision_edge.report.parity.sides import BundleSide
from onevision_edge.report.parity.walk import rows_to_walk

SMALL = ("--samples", "3", "--walk", "1", "--max-tokens", "8", "--threads", "1")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity") / "fp32"
    onevision_edge.export("demo", out, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity") / "fp16"
    onevision_edge.export("demo", out, dtype="fp16")
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity") / "stored"
    done = run("parity", "--reference", "demo", "--save-reference", out, *SMALL)
    assert done.exit_code == 0, done.output
    return out


def test_the_shipped_model_is_the_reference_of_its_bundles(fp16: Path, tmp_path: Path) -> None:
    done = run("parity", fp16, *SMALL, "-o", tmp_path / "report")
    assert done.exit_code == 0, done.output
    assert "PASS  fp16 (fp16, onnxruntime" in done.output
    assert "against shipped model, FP32 graphs" in done.output
    record = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert record["format"] == "onevision-edge parity"
    assert record["verdict"] == "PASS"
    assert record["data"]["rows"] == 3
    assert len(record["data"]["walked"]) == 1
    (candidate,) = record["candidates"]
    by_name = {stage["stage"]: stage for stage in candidate["stages"]}
    assert next(iter(by_name)) == "preprocess"
    assert list(by_name)[-2:] == ["logits", "tokens"]
    assert 1e-4 < by_name["decoder.layers.3"]["error"]["relative_l2"] < 2e-3
    assert by_name["decoder.layers.3"]["noise"]["relative_l2"] > 2e-3
    assert candidate["metrics"]["accuracy"] == candidate["metrics"]["accuracy_reference"]
    assert len(candidate["examples"]) == 3
    assert candidate["examples"][0]["images"][0].startswith("data:image/")
    assert str(tmp_path) not in json.dumps(record)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"parity.json", "parity.md", "index.html"}


def test_two_runs_with_one_seed_say_the_same(fp16: Path) -> None:
    records = [json.loads(run("parity", fp16, *SMALL, "--json").stdout) for _ in range(2)]
    for record in records:
        record.pop("created")
    assert records[0] == records[1]


def test_a_bundle_against_itself_has_zeros(fp16: Path) -> None:
    record = json.loads(run("parity", fp16, "--reference", fp16, *SMALL, "--json").stdout)
    (candidate,) = record["candidates"]
    assert candidate["verdict"] == "PASS"
    for stage in candidate["stages"][:-1]:
        assert all(stage[key] is None or stage[key]["max_abs"] == 0 for key in ("error", "own"))
    assert candidate["tokens"]["divergent_rows"] == 0
    assert candidate["metrics"]["kld"] == {"value": 0, "low": 0, "high": 0, "n": 3}
    assert all(pair["difference"] == 0 for pair in candidate["paired"])


def test_a_stored_reference_says_what_the_live_one_says(fp16: Path, stored: Path) -> None:
    live, told = (
        json.loads(run("parity", fp16, "--reference", source, *SMALL, "--json").stdout) for source in ("demo", stored)
    )
    for record in (live, told):
        record.pop("created")
    assert live == told


def test_a_stored_reference_that_was_cut_short_is_refused(stored: Path, fp16: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(stored, tmp_path / "stored")
    path = broken / "0000.logits.npy"
    path.write_bytes(path.read_bytes()[:-8])
    done = run("parity", fp16, "--reference", broken, *SMALL)
    assert done.exit_code == 1
    assert "0000.logits.npy is missing or has another size than recorded" in done.output
    (broken / "reference.json").write_text('{"format": "onevision-edge reference", "format_version": 1}')
    assert "is not what this version writes" in run("parity", fp16, "--reference", broken, *SMALL).output


def test_results_as_lmms_eval_writes_them(fp16: Path, tmp_path: Path) -> None:
    done = run("parity", fp16, *SMALL, "--lmms-eval", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = {json.loads(path.read_text())["model_name"]: path for path in tmp_path.rglob("*_results.json")}
    assert len(found) == 2
    samples = [
        json.loads(line) for path in tmp_path.rglob("*_samples_*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len(samples) == 6
    assert {"doc_id", "target", "filtered_resps"} <= set(samples[0])


def test_other_data_than_the_stored_is_refused(fp16: Path, stored: Path) -> None:
    done = run("parity", fp16, "--reference", stored, "--data", "synthetic:3", *SMALL[2:])
    assert done.exit_code == 1
    assert "its rows are not those of the reference (3 of shipped evaluation set)" in done.output


def test_synthetic_rows_of_a_bundle_without_a_tokenizer(tiny: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = tiny().write(tmp_path / "c")
    onevision_edge.export(checkpoint, tmp_path / "b", dtype="fp32", max_length=256)
    done = run("parity", tmp_path / "b", "--reference", checkpoint, "--walk", "3", "--threads", "1", "--json")
    assert done.exit_code == 0, done.output
    (candidate,) = json.loads(done.stdout)["candidates"]
    assert candidate["verdict"] == "PASS"
    assert {"vision.blocks.1", "decoder.layers.1", "logits"} <= {stage["stage"] for stage in candidate["stages"]}
    assert "accuracy" not in candidate["metrics"]
    assert candidate["metrics"]["kld"]["value"] == 0


def test_another_model_is_refused(tiny: Callable[..., Any], fp16: Path, tmp_path: Path) -> None:
    onevision_edge.export(tiny().write(tmp_path / "c"), tmp_path / "b", dtype="fp32", max_length=256)
    done = run("parity", tmp_path / "b", "--reference", fp16, *SMALL)
    assert done.exit_code == 1
    assert "b is another model than fp16: vision depth is 2, not 4" in done.output


def test_other_weights_fail(tiny: Callable[..., Any], tmp_path: Path) -> None:
    for seed in (0, 1):
        onevision_edge.export(
            tiny(seed=seed).write(tmp_path / f"c{seed}"), tmp_path / f"b{seed}", dtype="fp32", max_length=256
        )
    done = run("parity", tmp_path / "b1", "--reference", tmp_path / "b0", *SMALL)
    assert done.exit_code == 1
    assert "FAIL b1: patch_embed: relative L2" in done.output
    assert "FAIL  b1" in done.output


def test_gates_of_ones_own_and_strictness(fp16: Path, tmp_path: Path) -> None:
    tight = tmp_path / "gates.toml"
    tight.write_text('[fp16]\nerror."*" = 1e-5\n')
    done = run("parity", fp16, "--gates", tight, *SMALL)
    assert done.exit_code == 0  # within BF16's noise
    assert "AMBIGUOUS  fp16" in done.output
    assert run("parity", fp16, "--gates", tight, "--strict", *SMALL).exit_code == 1
    assert run("parity", fp16, "--gates", tight, "--no-noise", *SMALL).exit_code == 1
    tight.write_text("[fp17]\n")
    done = run("parity", fp16, "--gates", tight, *SMALL)
    assert done.exit_code == 1
    assert "'fp17' is no known section" in done.output


def test_usage(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    assert run("parity").exit_code == 2
    onevision_edge.export(tiny().write(tmp_path / "c"), tmp_path / "b", dtype="fp32", max_length=256)
    done = run("parity", tmp_path / "b")
    assert done.exit_code == 2
    assert "give --reference" in done.output
    done = run("parity", tmp_path / "nothing", "--reference", "demo", *SMALL)
    assert done.exit_code == 1
    assert "does not exist" in done.output


def test_a_report_joins_what_its_folder_holds(fp16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert run("bench", fp16, "-o", out, "--rounds", "1", "--warmup", "0", "--output-tokens", "2").exit_code == 0
    assert run("parity", fp16, *SMALL, "-o", out).exit_code == 0
    assert {"thesis.txt", "latency.json", "parity.json"} < {path.name for path in out.iterdir()}
    page = (out / "index.html").read_text()
    assert "KL divergence" in page
    assert "first token" in page
    done = run("parity", fp16, *SMALL, "-o", out / "thesis.txt")
    assert done.exit_code == 1
    assert "thesis.txt is no folder, and a report is one" in done.output


def test_an_interrupted_recording_leaves_nothing(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(BundleSide, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt), recording_directory(tmp_path / "kept") as directory:
        record_reference(BundleSide(fp32, threads=1), Plan(samples=2, walked=1), directory)
    assert list(tmp_path.iterdir()) == []


def test_rows_prepared_otherwise_are_left_out_and_told(
    fp32: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan, gates = Plan(samples=4, walked=1, max_tokens=4, examples=0), load_gates()
    recording = record_reference(BundleSide(fp32, threads=1), plan, tmp_path)
    small = shutil.copytree(fp32, tmp_path_factory.mktemp("small") / "small")
    config = json.loads((small / "preprocessor_config.json").read_text())
    text = json.dumps(config | {"max_pixels": 28 * 28 * 6})
    size = (small / "preprocessor_config.json").stat().st_size
    manifest = json.loads((small / "manifest.json").read_text())
    manifest["files"]["preprocessor_config.json"]["size"] = len(text)
    (small / "preprocessor_config.json").write_text(text)
    (small / "manifest.json").write_text(json.dumps(manifest))
    assert size != len(text)
    found = compare(BundleSide(small, threads=1), recording, plan, gates)
    assert found["first_failed_stage"] == "preprocess"
    assert found["subject"]["notes"] == [
        "4 of 4 rows were prepared otherwise than the reference's; distributions leave them out"
    ]
    assert "kld" not in found["metrics"]
    by_name = {stage["stage"]: stage for stage in found["stages"]}
    assert by_name["decoder.layers.1"]["error"] is None
    assert by_name["decoder.layers.1"]["own"]["max_abs"] == 0
    record = parity_record(recording, [found], plan, gates)
    assert (record["verdict"], record["reference"]["precision"]) == ("FAIL", "fp32")


def test_pytorch_is_a_reference(fp32: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'onevision-edge[reference]'")
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = run("parity", fp32, "--reference", "demo", "--runtime", "transformers", *SMALL, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    (candidate,) = record["candidates"]
    assert record["reference"]["backend"] == "transformers"
    assert candidate["verdict"] == "PASS"
    by_name = {stage["stage"]: stage for stage in candidate["stages"]}
    assert "vision.blocks.0" not in by_name
    for layer in range(4):
        stage = by_name[f"decoder.layers.{layer}"]
        assert 0 < stage["error"]["relative_l2"] < 5e-6
        assert 0 < stage["own"]["relative_l2"] < 5e-6
        assert stage["noise"]["relative_l2"] > 1e-3


def test_a_bundle_is_no_checkpoint_for_pytorch(fp32: Path) -> None:
    side = open_reference(str(fp32), Running(runtime="transformers"))
    with pytest.raises(OneVisionError, match="give transformers a checkpoint"), side:
        pass


def test_where_answers_part(tmp_path: Path) -> None:
    recording = Recording(tmp_path, {}, {}, {}, 8)
    logits = np.full((4, 8), -5, np.float32)
    for place, token in enumerate((3, 4, 5, 7)):  # 7 ends the answer
        logits[place, token] = 6
    logits[1, 6] = 5.99
    np.save(tmp_path / "0000.likeliest.npy", np.tile(np.arange(8), (4, 1)))
    np.save(tmp_path / "0000.logits_of.npy", logits)
    assert _divergence([3, 4, 5], [3, 4, 5], recording, 0, [7]) is None
    near = _divergence([3, 6, 5], [3, 4, 5], recording, 0, [7])
    assert near == Divergence(1, pytest.approx(0.01, rel=1e-3), True)
    assert _divergence([3, 4, 2], [3, 4, 5], recording, 0, [7]) == Divergence(2, pytest.approx(11), False)
    assert _divergence([3, 4], [3, 4, 5], recording, 0, [7]) == Divergence(2, pytest.approx(11), False)
    longer = _divergence([3, 4, 5, 1], [3, 4, 5], recording, 0, [7])
    assert longer == Divergence(3, pytest.approx(11), False)


def test_rows_to_walk_are_spread_over_those_with_images() -> None:
    assert rows_to_walk([("a",)] * 10, 3) == [0, 3, 6]
    assert rows_to_walk([(), ("a",), (), ("b",)], 3) == [1, 3]
    assert rows_to_walk([(), ()], 1) == [0]
