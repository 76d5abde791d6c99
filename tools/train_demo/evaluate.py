"""Score a checkpoint on questions.jsonl in float32 PyTorch: `python tools/train_demo/evaluate.py CHECKPOINT QUESTIONS`.

It goes the runtime's way: files, chat template, smart_resize, placeholders, greedy decoding.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import checkpoint
import images
import jinja2
import numpy as np
import torch
from PIL import Image

MAX_TOKENS = 48


class Reader:
    """A checkpoint that answers questions about images, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = checkpoint.load(folder)
        self.template = jinja2.Template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
        self.image_pad = self.tokenizer.token_to_id("<|image_pad|>")
        self.ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]

    @torch.no_grad()
    def answer(self, pictures: list[Image.Image], prompt: str) -> str:
        """The greedy answer; pictures come before the prompt."""
        resized = [images.resize(np.asarray(picture.convert("RGB"))) for picture in pictures]
        rows = torch.cat([self._embed(pixels) for pixels in resized])
        ids = self._prompt_ids(resized, prompt)
        first_new = len(ids)
        while len(ids) < first_new + MAX_TOKENS:
            token = self._next(ids, rows)
            if token in self.ends:
                break
            ids.append(token)
        return self.tokenizer.decode(ids[first_new:], skip_special_tokens=True)

    def _embed(self, pixels: np.ndarray) -> torch.Tensor:
        values = torch.from_numpy(images.normalise(images.patch_rows(pixels)))[None]
        return self.model.visual(values, torch.from_numpy(images.patch_positions(*pixels.shape[:2])))[0]

    def _prompt_ids(self, resized: list[np.ndarray], prompt: str) -> list[int]:
        content = [{"type": "image"}] * len(resized) + [{"type": "text", "text": prompt}]
        text = self.template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        counts = iter([pixels.shape[0] * pixels.shape[1] // images.FACTOR**2 for pixels in resized])
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [i for token in ids for i in [token] * (next(counts) if token == self.image_pad else 1)]

    def _next(self, ids: list[int], image_rows: torch.Tensor) -> int:
        row, size = torch.tensor([ids]), len(ids)
        mask = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
        hidden = self.model.hidden(row, row == self.image_pad, image_rows, torch.arange(size)[None], mask)
        return int(self.model.lm_head(hidden[0, -1]).argmax())


def read_questions(path: Path) -> list[dict]:
    """The rows of questions.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pictures_of(row: dict, folder: Path) -> list[Image.Image]:
    """The images a row names, relative to its folder."""
    return [Image.open(folder / name) for name in row.get("images") or [row["image"]]]


def main() -> None:
    """Print every wrong answer, then the share of exact answers per kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reader = Reader(options.checkpoint)
    right, asked = Counter(), Counter()
    for row in read_questions(options.questions):
        answer = reader.answer(pictures_of(row, options.questions.parent), row["prompt"])
        asked[row["kind"]] += 1
        right[row["kind"]] += int(answer == row["answer"])
        if answer != row["answer"]:
            print(f"{row['id']} {row['prompt']} expected {row['answer']!r}, got {answer!r}", flush=True)
    for kind, count in sorted(asked.items()):
        print(f"{kind:14s} {right[kind]:4d} / {count:4d}  {right[kind] / count:.3f}")
    print(f"{'all':14s} {right.total():4d} / {asked.total():4d}  {right.total() / asked.total():.4f}")


if __name__ == "__main__":
    main()
