"""Questions of the kinds that a server meets, about the shipped held-out images; no two share an image's bytes."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import onevision_edge

EVALUATION = Path(onevision_edge.__file__).parent / "demo" / "evaluation"
DIGIT = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "digit": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["colour", "digit"],
    "additionalProperties": False,
}
SHORT = {"type": "array", "items": DIGIT, "minItems": 4, "maxItems": 4}
LONG = {"type": "array", "items": DIGIT, "minItems": 100}  # every token is text, and max_tokens are too few


@dataclass(frozen=True, slots=True)
class Question:
    """One request: PNG images, text, a limit and perhaps a schema. sent: the body, made before any clock runs."""

    kind: str
    images: list[bytes]
    prompt: str
    max_tokens: int = 48
    schema: dict[str, Any] | None = None
    sent: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sent", json.dumps(self.body()).encode())

    def urls(self) -> list[str]:
        """The images as data URLs."""
        return ["data:image/png;base64," + base64.b64encode(image).decode() for image in self.images]

    def body(self) -> dict[str, Any]:
        """What the API is sent: a stream with its usage."""
        images = [{"type": "image_url", "image_url": {"url": url}} for url in self.urls()]
        content = [*images, {"type": "text", "text": self.prompt}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": self.max_tokens}
        if self.schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": self.schema}}
        return {**body, "stream": True, "stream_options": {"include_usage": True}}

    def messages(self) -> list[dict[str, Any]]:
        """The same as the runtime takes it."""
        images = [{"type": "image", "image": url} for url in self.urls()]
        return [{"role": "user", "content": [*images, {"type": "text", "text": self.prompt}]}]


class Questions:
    """Endless questions, one kind after the other. seed: of what is drawn."""

    def __init__(self, seed: int = 0) -> None:
        lines = (EVALUATION / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        self._one = [row for row in rows if "image" in row]
        self._several = [row for row in rows if "images" in row]
        self._random = np.random.default_rng(seed)
        self._kinds = (self._small, self._large, self._many, self._text, self.long, self._structured)

    def take(self, count: int) -> list[Question]:
        """So many more, in a mixed order."""
        asked = [self._kinds[i % len(self._kinds)]() for i in range(count)]
        return [asked[i] for i in self._random.permutation(count)]

    def forever(self) -> Iterator[Question]:
        """One after the other, without end."""
        while True:
            yield from self.take(len(self._kinds))

    def long(self, tokens: int = 64) -> Question:
        """One image, and an answer of so many tokens."""
        row = self._row(self._one)
        return Question("long", [self._png(row["image"])], row["prompt"], tokens, LONG)

    def _small(self) -> Question:
        row = self._row(self._one)
        return Question("one image", [self._png(row["image"])], row["prompt"])

    def _large(self) -> Question:
        row = self._row(self._one)
        return Question("a large image", [self._png(row["image"], 3)], row["prompt"])

    def _many(self) -> Question:
        row = self._row(self._several)
        return Question("several images", [self._png(name) for name in row["images"]], row["prompt"])

    def _text(self) -> Question:
        number = self._random.integers(10**6)
        return Question("text alone", [], f"How many digits has {number}?", 24)

    def _structured(self) -> Question:
        row = self._row(self._one)
        return Question("JSON", [self._png(row["image"])], row["prompt"], 200, SHORT)

    def _row(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return rows[int(self._random.integers(len(rows)))]

    def _png(self, name: str, scale: int = 1) -> bytes:
        """An image with one pixel of its own, so that no cache has seen it."""
        with Image.open(EVALUATION / name) as file:
            image = file.convert("RGB").resize((file.width * scale, file.height * scale))
        image.putpixel((0, 0), tuple(int(value) for value in self._random.integers(0, 256, 3)))
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
