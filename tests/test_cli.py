"""The command line: what it prints where, its exit codes, and one clear line for every mistake."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import onevision_edge
from onevision_edge.cli import main

DEMO = Path(onevision_edge.__file__).parent / "demo"
PNG = Path(__file__).parent / "data" / "golden" / "images" / "a_single_image_img0.png"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, exported by the command."""
    path = tmp_path_factory.mktemp("demo") / "bundle"
    assert call("export", "demo", "-o", path, "--dtype", "fp32").exit_code == 0
    return path


def call(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def failure(*arguments: object) -> str:
    """The message of a command that must fail with exit code 1, one line of it."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_export_writes_a_bundle_and_says_so_on_stderr(demo_bundle: Path, tmp_path: Path) -> None:
    result = call("export", "demo", "-o", tmp_path / "b", "--parts", "vision", "--dtype", "fp16")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert f"wrote {tmp_path / 'b'}: vision in fp16" in result.stderr
    assert "exists; pass --overwrite" in failure("export", "demo", "-o", demo_bundle)
    assert call("export", "demo", "-o", tmp_path / "b", "--overwrite").exit_code == 0


def test_export_json_is_the_manifest(tmp_path: Path) -> None:
    result = call("export", "demo", "-o", tmp_path / "b", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "b" / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "no-such-checkpoint", "-o", "x"), "no-such-checkpoint does not exist"),
        (("export", "demo", "-o", "x", "--parts", "vision,encoder"), "choose from vision, decoder"),
        (("run", "no-such-bundle", "--prompt", "?"), "no-such-bundle does not exist"),
        (("inspect", "/"), "holds no manifest.json"),
        (("verify", "no-such-bundle"), "no-such-bundle does not exist"),
    ],
)
def test_failures_are_one_line_and_exit_code_1(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "demo"),
        ("export", "demo", "-o", "x", "--dtype", "int3"),
        ("export", "demo", "-o", "x", "--max-length", "0"),
        ("run", "bundle"),
        ("run", "bundle", "--prompt", "?", "--frames", "2", "--fps", "1"),
        ("no-such-verb",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_run_streams_the_answer_to_stdout_and_timings_to_stderr(demo_bundle: Path) -> None:
    result = call("run", demo_bundle, "--image", PNG, "--prompt", "How many digits are there?")
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert "prompt tokens" in result.stderr


def test_run_json_matches_the_streamed_answer(demo_bundle: Path) -> None:
    arguments = ("run", demo_bundle, "--image", PNG, "--image", PNG, "--prompt", "-", "--max-tokens", 8)
    value = json.loads(call(*arguments, "--json", "--logprobs", 2, stdin="How many digits are there?\n").stdout)
    assert value["text"] == call(*arguments, stdin="How many digits are there?").stdout.rstrip("\n")
    assert value["usage"]["completion_tokens"] == len(value["token_ids"]) == len(value["logprobs"])
    assert value["usage"]["prompt_tokens"] > value["usage"]["image_tokens"] > 0
    assert value["usage"]["cached_tokens"] == value["usage"]["cached_image_tokens"] == 0
    assert value["usage"]["drafted_tokens"] >= value["usage"]["accepted_tokens"] >= 0
    assert value["timings"]["time_to_first_token"] > value["timings"]["prefill"] > 0
    assert [len(token["top"]) for token in value["logprobs"]] == [2] * len(value["logprobs"])


def test_run_names_what_is_wrong_with_the_question(demo_bundle: Path, golden_bundle: Callable[[str], Path]) -> None:
    assert "none.png: no such file" in failure("run", demo_bundle, "--image", "none.png", "--prompt", "?")
    assert "temperature is -1.0" in failure("run", demo_bundle, "--prompt", "?", "--temperature", "-1")
    assert "has no tokenizer.json" in failure("run", golden_bundle("fp32"), "--prompt", "?")
    assert "no bfloat16" in failure("run", golden_bundle("bf16"), "--prompt", "?")


def test_chat_keeps_the_conversation_and_survives_errors(demo_bundle: Path) -> None:
    lines = (
        f"How many digits are there?\n/image missing.png\nWhat?\n/nonsense\n/image {PNG}\nWhat?\n/reset\nWhat?\n/exit\n"
    )
    result = call("chat", demo_bundle, "--image", PNG, "--max-tokens", 4, stdin=lines)
    assert result.exit_code == 0
    assert result.stderr.count("prompt tokens") == 3
    assert "missing.png" in result.stderr
    assert "/nonsense is not a command" in result.stderr


def test_chat_goes_on_from_its_cache_unless_told_not_to(demo_bundle: Path) -> None:
    lines = "How many digits are there?\nList all digits from left to right.\n"
    arguments = ("chat", demo_bundle, "--image", PNG, "--max-tokens", 16)
    kept = call(*arguments, "--speculate", 4, stdin=lines)
    alone = call(*arguments, "--speculate", 0, "--prefix-caches", 0, "--image-cache", 0, stdin=lines)
    assert kept.exit_code == alone.exit_code == 0
    assert kept.stdout == alone.stdout
    assert " cached), " in kept.stderr
    assert "cached" not in alone.stderr
    assert "drafted" not in alone.stderr
    assert call(*arguments, "--speculate", -1).exit_code == 2


def test_inspect_shows_contracts_and_a_memory_plan(demo_bundle: Path) -> None:
    text = call("inspect", demo_bundle, "--length", 1000).stdout
    assert "pixel_values" in text
    assert "Memory for 1 x 1000 tokens" in text
    value = json.loads(call("inspect", demo_bundle, "--json", "--length", 1000, "--batch", 2).stdout)
    t = value["model"]["text"]
    cache = next(item for item in value["memory_plan"]["items"] if item["name"] == "KV cache")
    per_token = 2 * t["num_hidden_layers"] * t["num_key_value_heads"] * t["head_dim"] * 4
    assert cache["bytes"] == 2 * 1000 * per_token
    assert call("inspect", demo_bundle, "--image-size", "large").exit_code == 2


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    assert call("export", "demo", "-o", bundle).exit_code == 0
    assert json.loads(call("verify", bundle, "--json").stdout)["verified"] is True
    data = bundle / "decoder.onnx.data"
    values = bytearray(data.read_bytes())
    values[len(values) // 2] ^= 1
    data.write_bytes(values)
    assert "changed since it was written: decoder.onnx.data" in failure("verify", bundle)


def test_doctor_knows_this_machine() -> None:
    value = json.loads(call("doctor", "--json").stdout)
    assert value["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert {a["name"]: a["able"] for a in value["abilities"]}["export"] is True
    assert "run on CPU" in call("doctor").stdout


@pytest.mark.slow
def test_targets_are_listed_with_what_they_run() -> None:
    lines = call("targets").stdout.splitlines()
    assert lines[0].split()[:2] == ["target", "capability"]
    rows = {line.split()[0]: line for line in lines[2:]}
    assert {"a100-80gb-sxm", "jetson-agx-orin-64gb", "sm120", "cpu"} <= set(rows)
    assert "fp8" in rows["l40s"]
    assert "fp8" not in rows["a100-80gb-sxm"]
    everything = json.loads(call("targets", "--json").stdout)
    assert [one["name"] for one in everything] == list(rows)
    assert all(one["source"] and one["reason"] for one in everything)


def test_one_target_is_shown_with_its_reasons() -> None:
    shown = call("targets", "NVIDIA GeForce RTX 5090").stdout
    assert "1.79 TB/s" in shown
    assert "decode reads every weight" in shown
    assert "source: " in shown
    assert "did you mean" in failure("targets", "rtx-5091")


def test_demo_answers_its_questions(tmp_path: Path) -> None:
    result = call("demo", "-o", tmp_path / "demo", "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["right"] == len(value["questions"]) >= 6
    assert call("verify", tmp_path / "demo").exit_code == 0


def test_importing_the_runtime_brings_no_heavy_package() -> None:
    program = (
        "import sys, onevision_edge; onevision_edge.load; onevision_edge.preprocess_images; import onevision_edge.cli;"
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxscript', 'onnx_ir', 'av') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_help_imports_neither_numpy_nor_onnxruntime() -> None:
    program = "import sys, onevision_edge.cli; print([m for m in ('numpy', 'onnxruntime', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the command itself: exit code 1, no trace and nothing at the destination."""
    program = (
        "import onevision_edge.export.weights as w, time, sys\n"
        "pump = w.WeightWriter._pump\n"
        "def slow(self, *a):\n"
        "    print('writing', flush=True); time.sleep(5); pump(self, *a)\n"
        "w.WeightWriter._pump = slow\n"
        "from onevision_edge.cli import main\n"
        f"main(['export', 'demo', '-o', {str(tmp_path / 'b')!r}])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    process.send_signal(2)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Aborted!" in stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_demo_names_the_shipped_checkpoint_even_beside_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("export", "demo", "-o", "b").exit_code == 0
    assert "config.json does not exist" in failure("export", "./demo", "-o", "c")
