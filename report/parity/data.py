"""What a parity report is made on: the shipped questions, seeded token-level rows, the user's own, lmms-eval's."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...calibration.dataset import SHIPPED_EVALUATION, Preparer, load_dataset
from ...calibration.sources import Conversation, read_jsonl
from ...errors import OneVisionError
from .lmms_samples import Unshown, is_samples_file, read_samples
from .question import Question, Questions, accepted, question_of
from .synthetic import SYNTHETIC_ROWS, synthetic_rows

__all__ = ["SYNTHETIC", "Question", "Questions", "open_data"]

SYNTHETIC = "synthetic"


def open_data(
    source: str | os.PathLike[str] | None, preparer: Preparer, seed: int = 0, samples: int | None = None
) -> Questions:
    """Open the rows to compare models on; images are read when a row is prepared.

    source: None for the shipped evaluation set, or, without a tokenizer, for synthetic rows; "synthetic" or
    "synthetic:30" for so many rows of random images and ids; a .jsonl file as for calibration, whose rows may have
    "answers" (all that are accepted) and "options" (of a multiple choice); a samples file of lmms-eval; an .npz file
    or a folder. samples: at most as many rows, chosen by `seed`. Raises OneVisionError.
    """
    if source is None:
        source = SHIPPED_EVALUATION if preparer.tokenizer else SYNTHETIC
    rows = _synthetic(str(source), preparer, seed) or _file(Path(source), preparer)
    return rows if samples is None else rows.sample(samples, seed)


def _synthetic(source: str, preparer: Preparer, seed: int) -> Questions | None:
    name, _, count = source.partition(":")
    if name != SYNTHETIC:
        return None
    if seed < 0 or (count and not (count.isascii() and count.isdecimal() and int(count))):
        raise OneVisionError(f"{source} with seed {seed}: give synthetic:N with N rows from 1, and a seed from 0")
    rows = synthetic_rows(int(count or SYNTHETIC_ROWS), seed)
    return Questions(f"synthetic rows, seed {seed}", [Question(row) for row in rows], preparer)


def _file(path: Path, preparer: Preparer) -> Questions:
    if path.suffix.lower() == ".jsonl" and is_samples_file(path):
        questions = read_samples(path)
        if not all(isinstance(question.entry, Unshown) for question in questions):
            preparer.require_tokenizer(path)
        return Questions(path.name, questions, preparer)
    dataset = load_dataset(path, preparer)
    if path.suffix.lower() == ".jsonl":
        return Questions(dataset.source, _questions(path), preparer)
    return Questions(dataset.source, [question_of(entry) for entry in dataset.entries], preparer)


def _questions(path: Path) -> list[Question]:
    """The rows of a .jsonl file that was found sound, with what is theirs beside the answer."""
    entries = {entry.name: entry for entry in read_jsonl(path)}
    found = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                entry = entries[f"{path.name}:{number}"]
                try:
                    found.append(_answered(entry, json.loads(line)))
                except OneVisionError as problem:
                    raise OneVisionError(f"{path}:{number}: {problem}") from problem.__cause__
    return found


def _answered(entry: Conversation, row: dict[str, Any]) -> Question:
    answers, options = (accepted(row.get(key) or [], key) for key in ("answers", "options"))
    if entry.answer is not None and answers and entry.answer not in answers:
        answers = (entry.answer, *answers)
    if entry.answer is None and answers:
        entry = replace(entry, answer=answers[0])
    return question_of(entry, answers, options)
