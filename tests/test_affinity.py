"""Which replica has seen what of a request."""

import json
from typing import Any

from onevision_edge.serve.affinity import Affinity, marks_of

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
OTHER = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BBBB"}}


def body(*messages: tuple[str, Any]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}).encode()


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_a_conversation_goes_where_its_beginning_was() -> None:
    affinity = Affinity()
    affinity.note(marks_of(body(("user", [IMAGE, text("What is it?")]))), "a")
    affinity.note(marks_of(body(("user", [OTHER, text("What is it?")]))), "b")
    later = body(("user", [IMAGE, text("What is it?")]), ("assistant", "A 6."), ("user", "And its colour?"))
    assert affinity.best(marks_of(later)) == "a"
    assert affinity.best(marks_of(body(("user", [OTHER, text("Another question")])))) == "b"
    assert affinity.best(marks_of(body(("user", "What is it?")))) is None


def test_an_image_counts_wherever_it_stands() -> None:
    affinity = Affinity()
    affinity.note(marks_of(body(("user", [text("First"), IMAGE]))), "a")
    assert affinity.best(marks_of(body(("user", [text("Second"), OTHER, IMAGE])))) == "a"


def test_a_shared_system_prompt_weighs_less_than_an_image() -> None:
    affinity, system = Affinity(), ("system", "You are helpful.")
    affinity.note(marks_of(body(("user", [IMAGE, text("a")]))), "image")
    affinity.note(marks_of(body(system, ("user", "b"))), "system")
    assert affinity.best(marks_of(body(system, ("user", [IMAGE])))) == "image"
    assert affinity.best(marks_of(body(system, ("user", "c")))) == "system"


def test_the_role_belongs_to_a_beginning() -> None:
    first, second = marks_of(body(("user", "a"))), marks_of(body(("assistant", "a")))
    assert first[0].digest != second[0].digest
    assert [mark.weight for mark in marks_of(body(("user", "a"), ("user", "b")))] == [13, 26]


def test_what_is_gone_or_old_is_forgotten() -> None:
    affinity = Affinity(capacity=2)
    requests = [marks_of(body(("user", name))) for name in "abc"]
    for marks in requests:
        affinity.note(marks, "one")
    assert [affinity.best(marks) for marks in requests] == [None, "one", "one"]
    affinity.note(requests[2], "two")
    affinity.forget("one")
    assert [affinity.best(marks) for marks in requests] == [None, None, "two"]


def test_bodies_that_are_no_conversation_have_no_marks() -> None:
    for wrong in (
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"messages": 1}',
        b'{"messages": [1]}',
        b'{"messages": [{"role": "a"}]}',
        b"\xff",
    ):
        assert marks_of(wrong) == []
    assert marks_of(b"[" * 100_000) == []
