"""Records: JSON without what it has no name for, written whole or not at all."""

import json
import math
from pathlib import Path

import pytest

from onevision_edge.report import record
from onevision_edge.report.record import plain, write_json, write_text


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    value = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf}, "d": "é"}
    assert plain(value) == {"a": [1.5, None, [None, 2]], "b": {"c": None}, "d": "é"}
    write_json(tmp_path / "new" / "r.json", value)
    assert json.loads((tmp_path / "new" / "r.json").read_text(encoding="utf-8")) == plain(value)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["r.json"]


def test_others_may_read_it(tmp_path: Path) -> None:
    write_text(tmp_path / "r.txt", "x")
    (tmp_path / "plain.txt").write_text("x")
    assert (tmp_path / "r.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
