"""The parity report as Markdown (GitHub's): verdict first, tables, a few questions with their answers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from . import tables
from .examples import ADDED, REMOVED, Answer, Piece, Question, questions
from .numbers import PASS, SIGNS, plural, rank, verdict_text
from .tables import Table
from .verdict import facts, headline, model_line, subject_line

_QUESTIONS = 8  # shown whole; the page has all
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&])")
Record = Mapping[str, Any]


def markdown(parity: Record) -> str:
    """The report of a parity record. Whatever comes from the record is escaped: text stays text."""
    return "\n".join(_blocks(parity)) + "\n"


def _blocks(parity: Record) -> Iterator[str]:
    candidates = parity.get("candidates") or ()
    verdict = f"{verdict_text(parity.get('verdict'))}: " if candidates else ""
    yield f"# {verdict}{text(headline(parity, None))}\n"
    yield from _reasons(candidates)
    yield "What was compared, and on what:\n"
    yield from (f"- {name}: {text(words)}" for name, words in facts(parity, None))
    yield ""
    if candidates:
        yield "## Verdicts\n"
        yield from _table(tables.verdicts(parity, {}))
    for candidate in candidates:
        yield from _candidate(candidate)
    yield from _questions(questions(parity))
    yield from _files(parity)


def _reasons(candidates: Sequence[Record]) -> Iterator[str]:
    failed = [candidate for candidate in candidates if rank(candidate.get("verdict"))]
    for candidate in sorted(failed, key=lambda each: -rank(each.get("verdict"))):
        lines = "; ".join(tables.reasons(candidate)) or "no reason recorded"
        yield f"- **{verdict_text(candidate['verdict'])} {text(candidate['subject']['name'])}**: {text(lines)}"
    yield from [""] if failed else []


def _candidate(candidate: Record) -> Iterator[str]:
    subject = candidate["subject"]
    yield f"## {verdict_text(candidate.get('verdict'))} {text(subject['name'])}\n"
    gates = candidate.get("gates")
    yield text(subject_line(subject) + (f". Gates: {gates.get('name')}, {gates.get('source')}" if gates else "")) + "\n"
    yield from (text(f"Note: {note}") + "\n" for note in subject.get("notes") or ())
    yield from (text(line) + "\n" for line in tables.sentences(candidate))
    for shown in (tables.checks(candidate), tables.metrics_table(candidate), tables.paired(candidate)):
        yield from _table(shown)
    yield from _folded(f"Every stage of {subject['name']}", tables.stages(candidate))


def _table(shown: Table) -> Iterator[str]:
    """A table under its caption; nothing where it has no rows."""
    if not shown.rows:
        return
    yield f"**{text(shown.caption)}**\n"
    yield _row(shown.header)
    yield "|" + "|".join(" ---: " if numeric else " --- " for numeric in shown.numeric) + "|"
    yield from (_row([cell.text for cell in row]) for row in shown.rows)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(text, cells)) + " |"


def _folded(summary: str, shown: Table) -> Iterator[str]:
    """A long table that a reader opens."""
    if shown.rows:
        yield f"<details><summary>{escape(summary)}</summary>\n"
        yield from _table(shown)
        yield "</details>\n"


def _questions(found: list[Question]) -> Iterator[str]:
    """Those that differ first."""
    if not found:
        return
    yield "## Questions and answers\n"
    shown = sorted(found, key=lambda question: not question.differs)[:_QUESTIONS]
    differ = sum(question.differs for question in found)
    yield f"{plural(len(found), 'question')}, {differ} with an answer that differs; {len(shown)} shown."
    yield "In an answer, <del>only the reference says this</del>, <ins>only the candidate says this</ins>.\n"
    for question in shown:
        yield from _question(question)


def _question(question: Question) -> Iterator[str]:
    count = len(question.images) + question.dropped
    pictures = f" ({plural(count, 'image')})" if count else ""
    yield f"### {text(question.row)}{pictures}: {text(question.prompt)}\n"
    if question.expected is not None:
        yield f"- expected: {text(question.expected)}"
    yield f"- reference: {text(question.reference)}"
    yield from map(_answer, question.told)
    if question.same:
        yield f"- {SIGNS[PASS]} the same: {text(', '.join(answer.candidate for answer in question.same))}"
    yield ""


def _answer(answer: Answer) -> str:
    words = "".join(map(_piece, answer.pieces)) if answer.differs else "the reference's answer"
    where = f" ({text(answer.where)})" if answer.where else ""
    return f"- {verdict_text(answer.verdict)} {text(answer.candidate)}: {words}{where}"


def _piece(piece: Piece) -> str:
    tag = {REMOVED: "del", ADDED: "ins"}.get(piece.kind)
    return f"<{tag}>{text(piece.text)}</{tag}>" if tag else text(piece.text)


def _files(parity: Record) -> Iterator[str]:
    yield "## Files and digests\n"
    for subject in (parity.get("reference"), *(c["subject"] for c in parity.get("candidates") or ())):
        if subject:
            words = "; ".join(part for part in (subject_line(subject), model_line(subject)) if part)
            yield f"**{text(subject['name'])}**: {text(words)}\n"
            if subject.get("weights_sha256"):
                yield f"Digest of the checkpoint's weights: {text(subject['weights_sha256'])}\n"
            yield from _folded(f"Files of {subject['name']}", tables.files(subject))


def text(words: str) -> str:
    """Words as Markdown shows them unchanged, on one line."""
    return re.sub(r"\s*[\r\n\u2028\u2029]\s*", "<br>", _SPECIAL.sub(r"\\\1", words))
