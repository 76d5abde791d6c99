"""The journal: what is finished stays finished, whenever the process dies; one process at a time; full disks."""

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onevision_edge.calibration.journal import Journal, journal
from onevision_edge.errors import OneVisionError

KEY = {"plan": "int8", "seed": 0}


def fill(book: Journal, stage: str, number: float, rows: int = 3) -> None:
    """Pass a stage that gives `number` everywhere."""
    stream = book.new_stream(stage, rows, 4)
    stream[:] = number
    book.finish(stage, {f"{stage}.weight": np.full(5, number, np.float32)}, {stage: {"snr_db": number}}, stream)


def refusal(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(OneVisionError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_finished_is_there_for_the_next(tmp_path: Path) -> None:
    first = Journal(tmp_path, "key")
    assert first.resumed == 0
    fill(first, "a", 1)
    fill(first, "b", 2)
    first.finish("head", {"codes": np.arange(4, dtype=np.uint8)}, {})
    second = Journal(tmp_path, "key")
    assert second.resumed == 3
    assert [second.finished(stage) for stage in ("a", "b", "head", "c")] == [True, True, True, False]
    assert second.notes == {"a": {"snr_db": 1}, "b": {"snr_db": 2}}
    assert second.stream().tolist() == [[2.0] * 4] * 3  # of the last stage that had one
    values = second.values()
    assert sorted(values) == ["a.weight", "b.weight", "codes"]
    assert values["b.weight"].tolist() == [2.0] * 5
    assert values["codes"].dtype == np.uint8


def test_a_name_is_looked_up_without_reading(tmp_path: Path) -> None:
    book = Journal(tmp_path, "key")
    fill(book, "a", 1)
    values = book.values()
    (tmp_path / "a.npz").write_bytes(b"")
    assert "a.weight" in values
    assert "b.weight" not in values
    assert len(values) == 1


def test_only_the_last_stream_is_kept(tmp_path: Path) -> None:
    book = Journal(tmp_path, "key")
    for i, stage in enumerate("abc"):
        fill(book, stage, i, rows=i + 1)
    assert [path.name for path in tmp_path.glob("*.npy")] == ["c.stream.npy"]
    assert book.stream().shape == (3, 4)
    assert book.stream().dtype == np.float32


def test_a_stage_that_was_not_finished_begins_again(tmp_path: Path) -> None:
    book = Journal(tmp_path, "key")
    fill(book, "a", 1)
    half = book.new_stream("b", 3, 4)
    half[0] = 7
    half.flush()
    again = Journal(tmp_path, "key")
    assert (again.resumed, again.finished("b")) == (1, False)
    assert again.stream()[0, 0] == 1
    fill(again, "b", 2)
    assert again.stream().tolist() == [[2.0] * 4] * 3


@pytest.mark.parametrize("call", range(2))
@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_dying_anywhere_while_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Before the state names the stage it is not done; everything else can be done again over what is there."""
    book = Journal(tmp_path, "key")
    fill(book, "a", 1)
    real, calls = getattr(os, name), [0]

    def dying(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > call:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(os, name, dying)
    with pytest.raises(KeyboardInterrupt):
        fill(book, "b", 2)
    monkeypatch.undo()
    again = Journal(tmp_path, "key")
    assert again.resumed == 1
    assert again.stream()[0, 0] == 1
    assert list(again.values()) == ["a.weight"]
    fill(again, "b", 3)
    assert again.values()["b.weight"][0] == 3


def test_another_key_sweeps_everything(tmp_path: Path) -> None:
    fill(Journal(tmp_path, "key"), "a", 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    assert Journal(tmp_path, "another").resumed == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"finished": ["a"]}', "\x00"])
def test_a_broken_state_sweeps_everything(tmp_path: Path, content: str) -> None:
    fill(Journal(tmp_path, "key"), "a", 1)
    (tmp_path / "state.json").write_text(content)
    assert Journal(tmp_path, "key").resumed == 0
    assert list(tmp_path.iterdir()) == []


def test_work_that_cannot_be_picked_up_in_its_middle(tmp_path: Path) -> None:
    fill(Journal(tmp_path, "key"), "a", 1)
    book = Journal(tmp_path, "key")
    book.restart_unless("a")
    assert book.finished("a")
    book.restart_unless("b")
    assert not book.finished("a")
    assert list(tmp_path.iterdir()) == []
    fill(book, "a", 2)
    assert Journal(tmp_path, "key").resumed == 1


# Beside the destination.


def test_it_goes_when_all_is_well_and_stays_when_not(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    directory = target.parent / ".bundle.quantizing"

    def stop_in_the_middle() -> None:
        with journal(target, KEY) as book:
            fill(book, "a", 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_in_the_middle()
    assert directory.is_dir()
    with journal(target, KEY) as book:
        assert book.resumed == 1
    assert list(target.parent.iterdir()) == []
    with journal(target, KEY) as book:
        assert book.resumed == 0


def test_nothing_is_left_where_nothing_was_begun(tmp_path: Path) -> None:
    def refuse() -> None:
        with journal(tmp_path / "bundle", KEY):
            raise OneVisionError("no")

    assert refusal(refuse) == "no"
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time(tmp_path: Path) -> None:
    messages: list[str] = []

    def second() -> None:
        with journal(tmp_path / "bundle", {"plan": "another"}):
            messages.append("in")

    with journal(tmp_path / "bundle", KEY) as book:
        fill(book, "a", 1)
        thread = threading.Thread(target=lambda: messages.append(refusal(second)))
        thread.start()
        thread.join()
        assert "another process is quantising to this place" in messages[0]
        assert book.stream()[0, 0] == 1  # the other's key has swept nothing
    second()
    assert messages[1:] == ["in"]


HOLD = """
import sys, time
from pathlib import Path
from onevision_edge.calibration.journal import journal
with journal(Path(sys.argv[1]), {"plan": "int8", "seed": 0}) as book:
    book.new_stream("a", 2, 2)
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_nothing(python: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = python(HOLD, tmp_path / "bundle")
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"

    def enter() -> int:
        with journal(tmp_path / "bundle", KEY) as book:
            return book.resumed

    assert "another process" in refusal(enter)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert enter() == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_the_journal_is_kept(tmp_path: Path, number: int) -> None:
    def fill_up() -> None:
        with journal(tmp_path / "bundle", KEY) as book:
            fill(book, "a", 1)
            raise OSError(number, "full")

    message = refusal(fill_up)
    kept = tmp_path / ".bundle.quantizing"
    assert message.startswith(f"{tmp_path / 'bundle'}: the disk is full; what was finished is kept in {kept}: ")
    with journal(tmp_path / "bundle", KEY) as book:
        assert book.resumed == 1


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fail() -> None:
        with journal(tmp_path / "bundle", KEY):
            raise OSError(errno.EIO, "broken", "weights")

    with pytest.raises(OSError, match="broken"):
        fail()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def enter(target: Path) -> None:
        with journal(target, KEY):
            pass

    for target in (tmp_path / "file" / "bundle", tmp_path / "file" / "deeper" / "bundle"):
        assert refusal(enter, target) == f"{target}: cannot be written: Not a directory"


# Streams are mapped files. A page of one that finds no room on the disk ends the process without a word.


@pytest.fixture
def small_disk(mounted: Callable[[str], Path]) -> Path:
    return mounted("200k")


def test_a_stream_takes_its_room_when_it_is_made(small_disk: Path) -> None:
    with journal(small_disk / "bundle", KEY) as book:
        before = os.statvfs(small_disk).f_bavail
        book.new_stream("a", 100, 200)
        taken = before - os.statvfs(small_disk).f_bavail
        assert taken * os.statvfs(small_disk).f_frsize >= 80_000


def test_a_stream_without_room_is_a_full_disk(small_disk: Path) -> None:
    def fill_up() -> None:
        with journal(small_disk / "bundle", KEY) as book:
            fill(book, "a", 1)
            fill(book, "b", 2, rows=20_000)

    assert "the disk is full; what was finished is kept" in refusal(fill_up)
    with journal(small_disk / "bundle", KEY) as book:
        assert book.resumed == 1
