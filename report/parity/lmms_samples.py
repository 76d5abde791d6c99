"""The samples files of lmms-eval (--log_samples): one JSON object a line, a question and what a model answered.

doc_id, target, doc_hash, filtered_resps (the answer after the task's filters) and resps (before, where it differs).
Up to 0.2 there are doc and arguments too; from 0.7 input (the prompt) and, for images that the task's data names by
path or holds as small files, input_media. Other images are not in the file: such a row can be scored, not run again.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...calibration.rows import Preparer, Row
from ...calibration.sources import Conversation
from ...errors import OneVisionError
from ...runtime.image_reading import local_path, resolve_source
from .question import Question

_NEEDED = {"doc_id", "target", "filtered_resps"}
_IMAGE_KEYS = ("image", "images", "image_path", "img_path")


@dataclass(frozen=True, slots=True)
class Unshown:
    """A row whose images the file does not have: it has recorded answers alone."""

    name: str
    media: tuple[str, ...] = ()

    def prepare(self, preparer: Preparer) -> Row:
        """Always raises OneVisionError: a question asked without its image would be another one."""
        raise OneVisionError(
            "the samples file names no image of this row, so its question cannot be asked again; only the answers "
            "recorded in it can be scored. Give the questions as a .jsonl file with their images"
        )


def is_samples_file(path: Path) -> bool:
    """Whether the first line of a .jsonl file is one of lmms-eval's."""
    try:
        with open(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")
        row = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads the file as questions says what is wrong
    return isinstance(row, dict) and row.keys() >= _NEEDED


def read_samples(path: Path) -> list[Question]:
    """The questions of a samples file, with accepted answers and the recorded one. Raises OneVisionError."""
    questions = []
    for number, sample in _samples(path):
        try:
            questions.append(_question(f"{path.name}:{number}", sample, path.parent))
        except OneVisionError as problem:
            raise OneVisionError(f"{path}:{number}: {problem}") from problem.__cause__
    return questions


def _samples(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line)
            except ValueError as error:
                raise OneVisionError(f"{path}:{number}: is not JSON ({error})") from error
            if not isinstance(sample, dict) or not sample.keys() >= _NEEDED:
                raise OneVisionError(
                    f"{path}:{number}: is no sample of lmms-eval, it needs {', '.join(sorted(_NEEDED))}"
                )
            yield number, sample


def _question(name: str, sample: dict[str, Any], folder: Path) -> Question:
    prompt, answers, images = _prompt(sample), _targets(sample["target"]), _images(sample, folder)
    recorded = _response(sample["filtered_resps"])
    if not images:
        return Question(Unshown(name), prompt, (), answers, recorded=recorded)
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    conversation = Conversation(name, [{"role": "user", "content": content}], (*answers, None)[0], images)
    return Question(conversation, prompt, images, answers, recorded=recorded)


def _prompt(sample: dict[str, Any]) -> str:
    arguments = sample.get("arguments") or [""]
    first = arguments[0] if isinstance(arguments, list) else ""
    text = sample.get("input", first[0] if isinstance(first, list) and first else first)
    if not isinstance(text, str):
        raise OneVisionError(f"its input is {str(text)[:80]!r}; it must be the text of the prompt")
    return text


def _targets(target: Any) -> tuple[str, ...]:
    """Accepted answers: a list is written as Python prints it."""
    if isinstance(target, str) and target[:1] == "[":
        try:
            target = ast.literal_eval(target)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return (target,)
    texts = target if isinstance(target, list) else [target]
    return tuple(str(text) for text in texts if text is not None and str(text))


def _response(value: Any) -> str | None:
    """The first response, however deep; None where it is no text, as in tasks of log-likelihoods."""
    while isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def _images(sample: dict[str, Any], folder: Path) -> tuple[str, ...]:
    doc = sample.get("doc")
    named = [doc[key] for key in _IMAGE_KEYS if key in doc] if isinstance(doc, dict) else []
    sources = sample.get("input_media") or (named[0] if named else [])
    sources = [sources] if isinstance(sources, str) else sources
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        return ()
    found = [_located(source, folder) for source in sources]
    return tuple(path for path in found if path is not None) if None not in found else ()


def _located(source: str, folder: Path) -> str | None:
    """A data URL, or the absolute path of a file that is there; relative paths start at the file's folder."""
    if source[:5].lower() == "data:":
        return source
    try:
        path = str(folder.absolute() / local_path(source))
        resolve_source(path)
    except (OneVisionError, ValueError):  # on the network, or no longer there
        return None
    return path
