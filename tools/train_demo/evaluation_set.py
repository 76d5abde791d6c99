"""Write the held-out evaluation set: `python tools/train_demo/evaluation_set.py --output demo/evaluation`.

Scenes are composed from the held-out samples only, at native sizes the training also draws from; no model is asked.
What stands left or right of a digit is asked of scenes with up to three digits: in fuller ones a model of this size
finds the neighbour two times in three, so that its own errors would drown those of a precision.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from batches import HARDEST, native_sizes
from PIL import Image
from questions import Question, ask
from scenes import Plan, Samples, Scene, Style, compose, load_samples

NEIGHBOURS, FEW = ("left", "right"), 3
PALETTE = 256  # colours per image: about half of the bytes of 24-bit PNG, and what is stored is what is asked about


@dataclass(frozen=True)
class Size:
    """How much to write."""

    singles: int = 88
    pairs: int = 14
    questions: int = 3
    seed: int = 20


def write(folder: Path, size: Size, samples: Samples) -> int:
    """Write images/*.png and questions.jsonl, composed from `samples`; return the number of questions."""
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(size.seed)
    used: Counter = Counter()
    rows: list[dict] = []
    for index in range(size.singles + size.pairs):
        scenes = draw_scenes(samples, pair=index >= size.singles, rng=rng)
        names = [f"images/{index:03d}{letter}.png" for letter in "ab"[: len(scenes)]]
        for scene, name in zip(scenes, names, strict=True):
            save_png(scene, folder / name)
        where = {"image": names[0]} if len(names) == 1 else {"images": names}
        asked = [q for q in ask(scenes, rng) if q.kind not in NEIGHBOURS or len(scenes[0].digits) <= FEW]
        for question in choose(asked, size.questions + (len(scenes[0].digits) > 2), used):
            body = {"prompt": question.prompt, "answer": question.answer, "kind": question.kind}
            rows.append({"id": f"{len(rows):03d}", **where, **body})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    return len(rows)


def draw_scenes(samples: Samples, pair: bool, rng: np.random.Generator) -> tuple[Scene, ...]:
    """One scene of one to six digits, or two images of a number each; fine noise only on small images."""
    scenes = []
    for _ in range(2 if pair else 1):
        height, width, scale = native_sizes(HARDEST, 36 if pair else 120, rng)
        if scale > 1:
            height, width, scale = round(height / scale), round(width / scale), 1.0
        layout = "row" if pair or rng.random() < 0.3 else "scatter"
        count = int(rng.integers(1, 4 if pair else HARDEST.digits + 1))
        style = Style(augment=False, noise=5.0 if height * width < 25_000 else 0.0)
        scenes.append(compose(samples, Plan(layout, count, height, width, scale), style, rng))
    return tuple(scenes)


def choose(asked: list[Question], count: int, used: Counter) -> list[Question]:
    """`count` questions of the kinds used least so far, of different kinds."""
    chosen: dict[str, Question] = {}
    for question in sorted(asked, key=lambda question: used[question.kind]):
        if question.kind not in chosen and len(chosen) < count:
            chosen[question.kind] = question
    used.update(chosen.keys())
    return list(chosen.values())


def save_png(scene: Scene, path: Path) -> None:
    """A palette PNG; it decodes to the same RGB everywhere."""
    palette = Image.fromarray(scene.pixels).quantize(PALETTE, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    _, held_out = load_samples()
    count = write(parser.parse_args().output, Size(), held_out)
    print(f"{count} questions")


if __name__ == "__main__":
    main()
