"""Example questions, every candidate's answer to each, and where an answer departs from the reference's, by words."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from .numbers import PASS, figure, rank

EQUAL, REMOVED, ADDED = "equal", "removed", "added"
# A run of white space, one character of a script that is written without spaces, a word, or one sign.
_WORD = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]|\w+|[^\w\s]")
_IMAGE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some words, and whether both answers have them, only the reference's (removed), or only the candidate's."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A candidate's answer to a question."""

    candidate: str
    verdict: str | None
    text: str
    pieces: tuple[Piece, ...]
    where: str  # the first differing token, and the reference's margin there

    @property
    def differs(self) -> bool:
        """Whether it says anything else than the reference."""
        return any(piece.kind != EQUAL for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Question:
    """A row of the data that the report shows whole. images: data URLs; dropped: images that are no such thing."""

    row: str
    prompt: str
    images: tuple[str, ...]
    dropped: int
    expected: str | None
    reference: str
    answers: tuple[Answer, ...]

    @property
    def same(self) -> list[Answer]:
        """Answers that pass and say the reference's words: there is no more to tell of them than who gave them."""
        return [answer for answer in self.answers if not answer.differs and answer.verdict == PASS]

    @property
    def told(self) -> list[Answer]:
        """The other answers."""
        return [answer for answer in self.answers if answer not in self.same]

    @property
    def differs(self) -> bool:
        """Whether any candidate says anything else than the reference."""
        return any(answer.differs for answer in self.answers)


def questions(parity: Mapping[str, Any]) -> list[Question]:
    """The examples of all candidates by row, so that an image is there once; the worst verdicts first."""
    rows: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for candidate in parity.get("candidates") or ():
        for example in candidate.get("examples") or ():
            key = str(example.get("row")), example.get("reference") or ""
            rows.setdefault(key, []).append((candidate["subject"]["name"], example))
    found = [_question(row, reference, examples) for (row, reference), examples in rows.items()]
    return sorted(found, key=lambda question: -max(rank(answer.verdict) for answer in question.answers))


def difference(reference: str, candidate: str) -> tuple[Piece, ...]:
    """What both say, what only the reference says, and what only the candidate says, in reading order."""
    before, after = _WORD.findall(reference), _WORD.findall(candidate)
    return tuple(_pieces(before, after))


def _pieces(before: Sequence[str], after: Sequence[str]) -> Iterator[Piece]:
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            yield Piece(EQUAL, "".join(after[k:m]))
            continue
        if j > i:
            yield Piece(REMOVED, "".join(before[i:j]))
        if m > k:
            yield Piece(ADDED, "".join(after[k:m]))


def _question(row: str, reference: str, examples: Sequence[tuple[str, Mapping[str, Any]]]) -> Question:
    first = examples[0][1]
    images = first.get("images") or ()
    shown = tuple(url for url in images if _IMAGE.fullmatch(url))
    return Question(
        row=row,
        prompt=first.get("prompt") or "",
        images=shown,
        dropped=len(images) - len(shown),
        expected=first.get("expected"),
        reference=reference,
        answers=tuple(_answer(name, reference, example) for name, example in examples),
    )


def _answer(name: str, reference: str, example: Mapping[str, Any]) -> Answer:
    text = example.get("candidate") or ""
    return Answer(name, example.get("verdict"), text, difference(reference, text), _where(example))


def _where(example: Mapping[str, Any]) -> str:
    token, margin = example.get("first_divergent"), example.get("margin")
    parts = [] if token is None else [f"first differing token: {token}"]
    parts += [] if margin is None else [f"the reference's margin there: {figure(margin)}"]
    return ", ".join(parts)
