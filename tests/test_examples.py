"""Which words of two answers differ, and every candidate's answer to one question in one place."""

from hypothesis import given
from hypothesis import strategies as st
from report_records import parity_record

from onevision_edge.report.page.examples import ADDED, EQUAL, REMOVED, Piece, difference, questions


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_pieces_hold_both_answers_whole(reference: str, candidate: str) -> None:
    pieces = difference(reference, candidate)
    assert "".join(piece.text for piece in pieces if piece.kind != ADDED) == reference
    assert "".join(piece.text for piece in pieces if piece.kind != REMOVED) == candidate


def test_words_are_told_apart_and_chinese_by_its_characters() -> None:
    assert difference("a red 4 and", "a blue 4 and") == (
        Piece(EQUAL, "a "),
        Piece(REMOVED, "red"),
        Piece(ADDED, "blue"),
        Piece(EQUAL, " 4 and"),
    )
    assert difference("青い八が", "青い三が") == (
        Piece(EQUAL, "青い"),
        Piece(REMOVED, "八"),
        Piece(ADDED, "三"),
        Piece(EQUAL, "が"),
    )
    assert difference("", "") == ()


def test_a_row_is_one_question_however_many_answered_it() -> None:
    found = questions(parity_record(8, examples=6))
    assert [len(question.answers) for question in found] == [8] * 6
    html = next(question for question in found if question.row == "html")
    assert [answer.candidate for answer in html.told] == ["demo-int4-broken"]
    assert len(html.same) == 7
    assert html.told[0].where == "first differing token: 2, the reference's margin there: 0.0213"


def test_only_images_in_the_page_itself_are_let_through() -> None:
    record = parity_record(1, examples=1)
    good = record["candidates"][0]["examples"][0]["images"][0]
    bad = ["https://example.org/a.png", "data:image/svg+xml;base64,PHN2Zz4=", 'data:image/png;base64,AAAA" onerror="x']
    record["candidates"][0]["examples"][0]["images"] = [good, *bad]
    (question,) = questions(record)
    assert question.images == (good,)
    assert question.dropped == 3
