"""Training batches: scenes of one resized size, and several questions packed behind each scene's one prefix.

A row is prefix | question 1, answer 1 | question 2, answer 2 | ...; every question sees the prefix and itself, and its
positions go on from the prefix. So each question reads exactly what the chat template would give it alone, and the
image is encoded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import images
import numpy as np
import tokenizer as tokens
import torch
from questions import Question, ask
from scenes import COLOURS, Plan, Samples, Scene, Style, compose
from tokenizers import Tokenizer

SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ANSWER_TURN = "<|im_end|>\n<|im_start|>assistant\n"
IGNORED = -100
COLOUR_INDEX = {name: i for i, name in enumerate(COLOURS)}


@dataclass(frozen=True)
class Example:
    """One or two scenes and the questions asked about them."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Batch:
    """Tensors of B examples with the same image sizes; S is the longest row.

    pixels: one uint8 [B, patches, 588] per image of an example; positions: its int64 [patches, 2].
    input_ids, position_ids, labels: int64 [B, S]; labels hold the next token, or -100.
    segments: int64 [B, S]; 0 the prefix, k the k-th question, -1 padding. image_mask: bool [B, S].
    cell_digit, cell_colour: int64 [B, image tokens], what stands in each 28x28 cell (10: nothing; -100: no colour).
    """

    pixels: list[torch.Tensor]
    positions: list[torch.Tensor]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    image_mask: torch.Tensor
    cell_digit: torch.Tensor
    cell_colour: torch.Tensor
    kinds: list[list[str]]

    def attention_mask(self) -> torch.Tensor:
        """bool [B, 1, S, S]: causal, and a question sees only the prefix and itself."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        size = self.segments.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        return ((key == 0) | (key == query)).logical_and(causal)[:, None]

    def pixel_values(self) -> list[torch.Tensor]:
        """Normalised float32 rows, one tensor per image of an example."""
        mean, std = (torch.from_numpy(np.repeat(v, images.PATCH**2)) for v in (images.MEAN, images.STD))
        return [(rows.float() / 255 - mean) / std for rows in self.pixels]


class Packer:
    """Turns examples into batches, remembering the token ids of every text seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = lru_cache(maxsize=None)(lambda text: tokens.encode(tokenizer, text))
        self.image_pad = tokenizer.token_to_id("<|image_pad|>")
        self.end = np.array([tokenizer.token_to_id("<|im_end|>")])

    def pack(self, examples: list[Example]) -> Batch:
        """All examples must hold the same number of images, of the same resized sizes in the same order."""
        resized = [[images.resize(scene.pixels) for scene in example.scenes] for example in examples]
        stacks = [np.stack(column) for column in zip(*resized, strict=True)]
        sizes = [stack.shape[1:3] for stack in stacks]
        rows = [self._row(example.questions, sizes) for example in examples]
        columns = [_stack(column, fill) for column, fill in zip(zip(*rows, strict=True), ROW_FILL, strict=True)]
        cells = [[_cells(s, size) for s, size in zip(e.scenes, sizes, strict=True)] for e in examples]
        digit, colour = (
            torch.from_numpy(np.stack([np.concatenate([c[i] for c in row]) for row in cells])) for i in (0, 1)
        )
        ids, position_ids, labels, segments = columns
        return Batch(
            [torch.from_numpy(images.patch_rows(stack)) for stack in stacks],
            [torch.from_numpy(images.patch_positions(*size)) for size in sizes],
            ids,
            position_ids,
            labels,
            segments,
            (ids == self.image_pad) & (segments == 0),
            digit,
            colour,
            [[question.kind for question in example.questions] for example in examples],
        )

    def prefix(self, sizes: list[tuple[int, int]]) -> np.ndarray:
        """The ids up to the question: system turn, user turn opened, each image's placeholders."""
        parts = [self.encode(SYSTEM_TURN)]
        for height, width in sizes:
            pads = np.full(height * width // images.FACTOR**2, self.image_pad)
            parts += [self.encode("<|vision_start|>"), pads, self.encode("<|vision_end|>")]
        return np.concatenate(parts)

    def _row(self, questions: tuple[Question, ...], sizes: list[tuple[int, int]]) -> tuple[np.ndarray, ...]:
        prefix = self.prefix(sizes)
        n = len(prefix)
        parts = [(prefix, np.arange(n), np.full(n, IGNORED), np.zeros(n, np.int64))]
        for k, question in enumerate(questions, 1):
            ask_ids = self.encode(question.prompt + ANSWER_TURN)
            answer = np.concatenate([self.encode(question.answer), self.end])
            ids = np.concatenate([ask_ids, answer[:-1]])
            labels = np.concatenate([np.full(len(ask_ids) - 1, IGNORED), answer])
            parts.append((ids, np.arange(n, n + len(ids)), labels, np.full(len(ids), k)))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


ROW_FILL = (0, 0, IGNORED, -1)  # padding of ids, positions, labels, segments


def _stack(column: tuple[np.ndarray, ...], fill: int) -> torch.Tensor:
    longest = -(-max(map(len, column)) // 32) * 32  # few different shapes: oneDNN compiles a kernel for each
    out = np.full((len(column), longest), fill, dtype=np.int64)
    for row, values in zip(out, column, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(out)


def _cells(scene: Scene, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The digit and the colour whose centre lies in each 28x28 cell, for the auxiliary loss."""
    rows, columns = size[0] // images.FACTOR, size[1] // images.FACTOR
    digit, colour = np.full((rows, columns), 10), np.full((rows, columns), IGNORED)
    height, width = scene.pixels.shape[:2]
    for d in scene.digits:
        cell = int(d.y / height * rows), int(d.x / width * columns)
        digit[cell], colour[cell] = d.value, COLOUR_INDEX[d.colour]
    return digit.ravel(), colour.ravel()


@dataclass(frozen=True)
class Level:
    """How hard the scenes are: cells of 28 pixels per side at most, digits at most and at least."""

    cells: int
    digits: int
    fewest: int = 1


HARDEST = Level(cells=16, digits=6)


def tower_level(progress: float) -> Level:
    """While the tower learns alone: small scenes full of digits, so that few patches are empty."""
    ease = min(1.0, progress / 0.5)
    return Level(cells=round(5 + 5 * ease), digits=round(4 + 2 * ease), fewest=2)


def level(progress: float) -> Level:
    """For the whole model: everything after two fifths of the run."""
    ease = min(1.0, progress / 0.4)
    return Level(cells=round(7 + 9 * ease), digits=round(4 + 2 * ease))


def native_sizes(hardest: Level, most_cells: int, rng: np.random.Generator) -> tuple[int, int, float]:
    """(height, width, scale): usually smart_resize only rounds; one in twelve is a larger picture it shrinks."""
    if hardest.cells == 16 and rng.random() < 1 / 12:
        scale = rng.uniform(1.2, 2.0)
        short, long = sorted(rng.uniform(330, 450, 2) * scale)
        height, width = (short, long) if rng.random() < 0.8 else (long, short)
        return round(height), round(width), height / images.smart_resize(height, width)[0]
    while True:
        cells = 3 + (rng.random(2) ** 1.7 * (hardest.cells - 2)).astype(int)
        if cells.prod() <= most_cells and max(cells) <= 3 * min(cells):
            height, width = cells * images.FACTOR + rng.integers(-13, 14, 2)
            return int(height), int(width), 1.0


def jitter(height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Another native size which is resized to the same size."""
    target = images.smart_resize(height, width)
    other = height + int(rng.integers(-9, 10)), width + int(rng.integers(-9, 10))
    return other if images.smart_resize(*other) == target else (height, width)


@dataclass(frozen=True)
class Course:
    """Draws batches: `budget` bounds the tokens of a batch, `questions` those asked about one scene.

    A kind in `emphasis` is that many times as likely as the others to be asked first.
    """

    samples: Samples
    style: Style
    packer: Packer
    budget: int = 4096
    questions: int = 7
    emphasis: Mapping[str, float] = field(default_factory=dict)

    def draw(self, hardest: Level, pairs: bool, rng: np.random.Generator) -> Batch:
        """A batch of pairs of images, or of single ones."""
        natives = [native_sizes(hardest, 36 if pairs else 196, rng) for _ in range(1 + pairs)]
        grids = [images.smart_resize(*native[:2]) for native in natives]
        cells = sum(h * w for h, w in grids) // images.FACTOR**2
        count = max(4, round(self.budget / (2 * cells + 20 * self.questions) / 4) * 4)
        return self.packer.pack([self._example(natives, hardest, rng) for _ in range(count)])

    def _example(self, natives: list[tuple], hardest: Level, rng: np.random.Generator) -> Example:
        scenes = tuple(self._scene(native, hardest, len(natives) == 2, rng) for native in natives)
        asked = ask(scenes, rng)
        picked = self._order(asked, rng)[: self.questions]
        return Example(scenes, tuple(asked[i] for i in picked))

    def _order(self, asked: list[Question], rng: np.random.Generator) -> np.ndarray:
        """A random order of the questions, emphasised kinds earlier."""
        if not self.emphasis:
            return rng.permutation(len(asked))
        weights = np.array([self.emphasis.get(question.kind, 1.0) for question in asked])
        return np.argsort(-(rng.random(len(asked)) ** (1 / weights)))

    def _scene(self, native: tuple, hardest: Level, pair: bool, rng: np.random.Generator) -> Scene:
        height, width, scale = native
        if scale == 1.0:
            height, width = jitter(height, width, rng)
        if pair:
            plan = Plan("row", int(rng.choice(3, p=(0.4, 0.45, 0.15))) + 1, height, width, scale)
        else:
            layout = "row" if rng.random() < 0.3 else "scatter"
            plan = Plan(layout, int(rng.integers(hardest.fewest, hardest.digits + 1)), height, width, scale)
        return compose(self.samples, plan, self.style, rng)
