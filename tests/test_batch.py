"""onevision-edge batch: every row once, in order, whatever interrupts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.cli.batch import batch
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.model import load
from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.serve.answer_file import AnswerFile
from onevision_edge.serve.batch import BatchOptions, BatchRow, Cluster, read_rows, run_batch

IMAGES = Path(onevision_edge.__file__).parent / "demo" / "images"
OPTIONS = BatchOptions(SamplingParams(max_tokens=12), slots=3, load={"threads": 1})
QUESTIONS = [
    {"id": "which", "image": "number.png", "prompt": "Which number is this?", "answer": "6472"},
    {"id": 7, "image": "three.png", "prompt": "What color is the 4?"},
    {"images": ["first.png", "second.png"], "prompt": "Read the number in the second image."},
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"image": "photo.jpg", "prompt": "How many digits are there?"},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "bundle"
    onevision_edge.export("demo", path, dtype="fp32", max_length=256)
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A JSONL file beside the shipped images; blank lines mean nothing."""
    folder = tmp_path / "data"
    shutil.copytree(IMAGES, folder)
    return write(folder / "in.jsonl", QUESTIONS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_answered_in_order_as_the_model_answers_them(bundle: Path, questions: Path, tmp_path: Path) -> None:
    output, said = tmp_path / "out" / "answers.jsonl", []
    summary = run_batch(bundle, questions, output, OPTIONS, progress=lambda *state: said.append(state))
    assert (summary.rows, summary.found, summary.answered, summary.failed) == (5, 0, 5, 0)
    found, model = read(output), load(bundle, threads=1)
    assert [row["id"] for row in found] == ["which", "7", "in.jsonl:5", "in.jsonl:7", "in.jsonl:9"]
    rows = read_rows(Bundle.open(bundle), questions, OPTIONS)
    for row, record in zip(rows, found, strict=True):
        alone = model.generate(row.messages, max_tokens=12)
        assert (record["text"], record["finish_reason"]) == (alone.text, alone.finish_reason)
        assert record["usage"]["prompt_tokens"] == alone.prompt_tokens
    assert found[0]["expected"] == "6472"
    assert "expected" not in found[1]
    assert [(done, total) for done, total, _ in said] == [(n, 5) for n in range(1, 6)]
    assert sorted(os.listdir(output.parent)) == ["answers.jsonl"]


def test_a_folder_is_asked_one_question(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("three.png", "number.png"):
        shutil.copy(IMAGES / name, folder)
    run_batch(bundle, folder, output, replace(OPTIONS, prompt="Which number is this?"))
    found, model = read(output), load(bundle, threads=1)
    assert [row["id"] for row in found] == ["number.png", "three.png"]
    content = [
        {"type": "image", "image": str(IMAGES / "number.png")},
        {"type": "text", "text": "Which number is this?"},
    ]
    assert found[0]["text"] == model.generate([{"role": "user", "content": content}], max_tokens=12).text


def test_a_second_run_answers_what_is_new(bundle: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    run_batch(bundle, questions, output, OPTIONS)
    before = read(output)
    write(questions, [{"id": "new", "messages": [{"role": "user", "content": "What?"}]}, *QUESTIONS[:2]])
    summary = run_batch(bundle, questions, output, OPTIONS)
    assert (summary.rows, summary.found, summary.answered) == (3, 2, 1)
    after = read(output)
    assert [row["id"] for row in after] == ["new", "which", "7"]
    assert after[1:] == before[:2]


def test_other_options_are_another_question(bundle: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    run_batch(bundle, questions, output, OPTIONS)
    summary = run_batch(bundle, questions, output, replace(OPTIONS, params=SamplingParams(max_tokens=2)))
    assert (summary.found, summary.answered) == (0, 5)
    assert max(row["usage"]["completion_tokens"] for row in read(output)) == 2


def test_a_row_that_cannot_be_answered_has_an_error(bundle: Path, questions: Path, tmp_path: Path) -> None:
    output, broken = tmp_path / "answers.jsonl", questions.parent / "three.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    summary = run_batch(bundle, questions, output, OPTIONS)
    found = read(output)
    assert summary.failed == 1
    assert "three.png" in found[1]["error"]
    assert "text" in found[0]
    broken.write_bytes(whole)
    assert run_batch(bundle, questions, output, OPTIONS).answered == 0
    summary = run_batch(bundle, questions, output, replace(OPTIONS, retry_errors=True))
    assert (summary.answered, summary.failed) == (1, 0)
    assert read(output)[1]["text"]


KILLED = """
import os, sys
from pathlib import Path
from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.serve.batch import BatchOptions, run_batch

options = BatchOptions(SamplingParams(max_tokens=12), slots=3, load={"threads": 1})
bundle, data, output, after = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
def progress(done, total, label):
    if done == after:
        os.kill(os.getpid(), 9)
run_batch(bundle, data, output, options, progress=progress)
"""


def test_kill_9_loses_nothing_and_answers_nothing_twice(
    bundle: Path, questions: Path, tmp_path: Path, python: Callable[..., subprocess.Popen[str]]
) -> None:
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    for after in (2, 4):
        process = python(KILLED, bundle, questions, output, after)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
        assert len(read(partial)) == after
        assert not output.exists()
    kept = read(partial)
    with open(partial, "a") as file:
        file.write('{"id": "torn", "ke')
    summary = run_batch(bundle, questions, output, OPTIONS)
    assert (summary.found, summary.answered) == (4, 1)
    found = {row["key"]: row for row in read(output)}
    assert len(found) == 5
    assert all(found[row["key"]] == row for row in kept)
    assert not partial.exists()


def test_ctrl_c_keeps_what_was_answered(
    bundle: Path, questions: Path, tmp_path: Path, python: Callable[..., subprocess.Popen[str]]
) -> None:
    program = (
        "import sys; from onevision_edge.cli import _Group; from onevision_edge.cli.batch import batch\n"
        "group = _Group('x'); group.add_command(batch); group()"
    )
    write(questions, [{"id": i, "messages": [{"role": "user", "content": f"Say {i}"}]} for i in range(2000)])
    output = tmp_path / "answers.jsonl"
    process = python(program, "batch", bundle, "--data", questions, "-o", output, "--threads", "1")
    partial, deadline = tmp_path / "answers.jsonl.partial", time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    kept = len(read(partial))
    assert 0 < kept < 2000
    assert f"interrupted: {kept} of 2000 answers are kept" in err
    assert "Traceback" not in err


def test_a_full_disk_keeps_whole_lines(bundle: Path, tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    disk = mounted("64k")
    with AnswerFile(disk / "a.jsonl") as answers:
        with pytest.raises(OneVisionError, match=r"disk is full; \d+ answers are kept in a.jsonl.partial"):
            fill(answers)
        kept = len(answers.records)
        assert kept > 5
    assert [row["id"] for row in read(disk / "a.jsonl.partial")] == [str(i) for i in range(kept)]
    with AnswerFile(disk / "a.jsonl") as answers:
        assert len(answers.records) == kept
        with pytest.raises(OneVisionError, match="disk is full"):
            answers.complete(map(str, range(kept)))
    assert sorted(os.listdir(disk)) == ["a.jsonl.partial"]


def fill(answers: AnswerFile) -> None:
    for i in range(100):
        answers.append({"id": str(i), "key": str(i), "text": "x" * 3000})


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl"), pytest.raises(OneVisionError, match="another process"):
        AnswerFile(tmp_path / "a.jsonl")


def test_the_first_answer_counts(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl") as answers:
        answers.append({"key": "1", "text": "first"})
        answers.append({"key": "1", "text": "second"})
        answers.complete(["1"])
    assert read(tmp_path / "a.jsonl") == [{"key": "1", "text": "first"}]


def test_a_file_of_others_is_not_touched(tmp_path: Path, bundle: Path, questions: Path) -> None:
    output = tmp_path / "notes.jsonl"
    output.write_text("my notes\n")
    with pytest.raises(OneVisionError, match=r"notes\.jsonl:1: is no answer"):
        run_batch(bundle, questions, output, OPTIONS)
    assert output.read_text() == "my notes\n"
    assert run_batch(bundle, questions, output, replace(OPTIONS, overwrite=True)).answered == 5


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (
            [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}],
            OPTIONS,
            'in.jsonl:1 and in.jsonl:3 both have the id "1"',
        ),
        ([{"image": "missing.png", "prompt": "a"}], OPTIONS, "in.jsonl:1: image"),
        ([], OPTIONS, "holds no rows"),
        ([{"prompt": "a"}], replace(OPTIONS, prompt="b"), "--prompt is for a folder"),
    ],
)
def test_rows_are_checked_before_the_model_is_loaded(
    bundle: Path, questions: Path, tmp_path: Path, rows: list[dict[str, Any]], options: BatchOptions, said: str
) -> None:
    write(questions, rows)
    with pytest.raises(OneVisionError, match=said):
        run_batch(bundle, questions, tmp_path / "answers.jsonl", options)
    assert not (tmp_path / "answers.jsonl").exists()


def test_faults_of_the_model_are_not_answers(
    bundle: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("in a kernel")

    monkeypatch.setattr("onevision_edge.runtime.slots.Slots.decode", broken)
    with pytest.raises(OneVisionError, match="ZeroDivisionError: in a kernel"):
        run_batch(bundle, questions, tmp_path / "answers.jsonl", OPTIONS)


def test_a_cluster_needs_ray(bundle: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OneVisionError, match="Ray is not installed: pip install"):
        run_batch(bundle, questions, tmp_path / "answers.jsonl", OPTIONS, Cluster())
    assert list(tmp_path.glob("answers*")) == []


def test_the_command_tells_counts(bundle: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = [str(bundle), "--data", str(questions), "-o", str(output), "--max-tokens", "4", "--threads", "1"]
    result = CliRunner().invoke(batch, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"rows": 5, "found": 0, "answered": 5, "failed": 0}
    assert "5 rows" in CliRunner().invoke(batch, arguments).stderr
    assert CliRunner().invoke(batch, [*arguments, "--replicas", "2"]).exit_code == 2


def test_keys_tell_questions_apart(bundle: Path, questions: Path) -> None:
    opened = Bundle.open(bundle)
    keys = [row.key for row in read_rows(opened, questions, OPTIONS)]
    assert len(set(keys)) == 5
    assert [row.key for row in read_rows(opened, questions, OPTIONS)] == keys
    assert isinstance(read_rows(opened, questions, replace(OPTIONS, max_pixels=50_000))[0], BatchRow)
    assert read_rows(opened, questions, replace(OPTIONS, max_pixels=50_000))[0].key != keys[0]
