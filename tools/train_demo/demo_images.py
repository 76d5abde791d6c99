"""Write the demo's images: `python tools/train_demo/demo_images.py --checkpoint demo/checkpoint --output demo/images`.

Held-out digits. Scenes are drawn until the checkpoint answers all that is asked about one: these show the demo at
work, and measure nothing (the evaluation set does).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evaluate import Reader
from evaluation_set import save_png
from PIL import Image
from questions import Question, ask
from scenes import Plan, Samples, Scene, Style, compose, load_samples

ATTEMPTS = 60


@dataclass(frozen=True)
class Shot:
    """The images to show together, by file name, and the kinds of question to ask about them."""

    files: tuple[str, ...]
    plans: tuple[Plan, ...]
    kinds: tuple[str, ...]


SHOTS = (
    Shot(("photo.jpg",), (Plan("scatter", 6, 1200, 1600, 1200 / 336),), ("list", "count")),
    Shot(("number.png",), (Plan("row", 4, 110, 215),), ("number",)),
    Shot(("three.png",), (Plan("scatter", 3, 180, 250),), ("colour", "left", "describe")),
    Shot(("first.png", "second.png"), (Plan("row", 2, 100, 140), Plan("row", 2, 118, 160)), ("compare", "read_one")),
)


def draw(shot: Shot, samples: Samples, rng: np.random.Generator) -> tuple[tuple[Scene, ...], list[Question]] | None:
    """The scenes and one question of each kind; None where a scene lacks digits or a question has no answer."""
    style = Style(augment=False, noise=4.0)
    scenes = tuple(compose(samples, plan, style, rng) for plan in shot.plans)
    if any(len(scene.digits) != plan.count for scene, plan in zip(scenes, shot.plans, strict=True)):
        return None
    by_kind = {question.kind: question for question in ask(scenes, rng) if question.answer != "nothing"}
    if not set(shot.kinds) <= set(by_kind):
        return None
    return scenes, [by_kind[kind] for kind in shot.kinds]


def save(scenes: tuple[Scene, ...], shot: Shot, folder: Path) -> list[Image.Image]:
    """Write the images, and read them back as the demo will."""
    for scene, name in zip(scenes, shot.files, strict=True):
        if name.endswith(".png"):
            save_png(scene, folder / name)
        else:
            Image.fromarray(scene.pixels).save(folder / name, quality=90)
    return [Image.open(folder / name) for name in shot.files]


def write_shot(shot: Shot, reader: Reader, samples: Samples, folder: Path, seed: int) -> list[dict]:
    """Draw until every answer is right; the rows for questions.json."""
    for attempt in range(ATTEMPTS):
        drawn = draw(shot, samples, np.random.default_rng((seed, attempt)))
        if drawn is None:
            continue
        pictures = save(drawn[0], shot, folder)
        if all(reader.answer(pictures, question.prompt) == question.answer for question in drawn[1]):
            print(f"{', '.join(shot.files)}: attempt {attempt}", flush=True)
            return [{"images": list(shot.files), "prompt": q.prompt, "answer": q.answer} for q in drawn[1]]
    raise SystemExit(f"{shot.files}: the checkpoint answered none of {ATTEMPTS} scenes in full")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=30)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    reader, (_, held_out) = Reader(options.checkpoint), load_samples()
    rows = [
        row
        for index, shot in enumerate(SHOTS)
        for row in write_shot(shot, reader, held_out, options.output, options.seed + index)
    ]
    (options.output / "questions.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
