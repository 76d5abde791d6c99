"""Questions: rows of data together with what a report shows of them and scores them against."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...calibration.dataset import Dataset, Preparer, Row
from ...calibration.sources import Conversation, Entry
from ...errors import OneVisionError
from ...runtime.chat import media_of
from ...runtime.image_reading import load_image

SHOWN_EDGE = 448  # pixels of the longer edge of an image in a report


@dataclass(frozen=True, slots=True)
class Question:
    """A row that is not prepared yet, and its answers.

    prompt: the text of the user's messages; empty for token-level rows. images: paths or data URLs.
    answers: every accepted answer, the first of which the row is given to the model with; empty where there is none.
    options: the texts of a multiple choice, in the order of their letters. recorded: an answer that was given before.
    """

    entry: Entry
    prompt: str = ""
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    recorded: str | None = None

    @property
    def name(self) -> str:
        """What messages call it, such as questions.jsonl:17."""
        return self.entry.name

    @property
    def media(self) -> tuple[str, ...]:
        """What it shows: two questions with a medium in common show the same image."""
        return self.entry.media

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """Its chat messages up to the answer, None for token-level rows."""
        return self.entry.messages if isinstance(self.entry, Conversation) else None

    def prepare(self, preparer: Preparer) -> Row:
        """Read its images and make the row. Raises OneVisionError."""
        return self.entry.prepare(preparer)


class Questions(Dataset):
    """A dataset that knows the question behind each row."""

    def __init__(self, source: str, questions: Sequence[Question], preparer: Preparer) -> None:
        super().__init__(source, questions, preparer)
        self.questions = tuple(questions)

    def subset(self, indices: Sequence[int]) -> "Questions":
        """The rows of these indices, in file order."""
        return Questions(self.source, [self.questions[i] for i in sorted(indices)], self.preparer)

    def sample(self, samples: int, seed: int = 0) -> "Questions":
        """At most `samples` rows, chosen without replacement, in file order; fewer are a part of more."""
        chosen = super().sample(samples, seed)
        assert isinstance(chosen, Questions)  # made by subset
        return chosen


def question_of(entry: Entry, answers: Sequence[str] = (), options: Sequence[str] = ()) -> Question:
    """The question of any entry. answers: the accepted ones, in place of the entry's own."""
    if not isinstance(entry, Conversation):
        return Question(entry)
    images, _ = media_of(entry.messages)
    own = () if entry.answer is None else (entry.answer,)
    prompt = "\n".join(text for message in entry.messages if message["role"] == "user" for text in _texts(message))
    return Question(entry, prompt, tuple(map(str, images)), tuple(answers) or own, tuple(options))


def data_url(source: str, edge: int = SHOWN_EDGE) -> str:
    """An image of a question as a data URL, no longer than `edge` pixels: PNG, or JPEG where that is smaller.

    Raises OneVisionError where it cannot be read.
    """
    image = load_image(source)
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    forms = {"png": io.BytesIO(), "jpeg": io.BytesIO()}
    for form, buffer in forms.items():
        image.save(buffer, form, optimize=True, quality=85)
    form, buffer = min(forms.items(), key=lambda item: len(item[1].getvalue()))
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def accepted(value: Any, key: str) -> tuple[str, ...]:
    """A text or a list of texts, as a tuple. Raises OneVisionError naming the key."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise OneVisionError(f'"{key}" is {str(value)[:80]!r}; it must be text or a list of texts')
    return tuple(texts)


def _texts(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [item["text"] for item in items if item["type"] == "text"]
