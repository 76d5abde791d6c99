"""Train the demo checkpoint on the CPU: `python tools/train_demo/train.py --output DIR`.

Measured on 2 cores of an AMD EPYC (AVX-512) that other work shared: tower and whole model 31 minutes, last stage 16,
neighbours 10. The shipped checkpoint was made stage by stage, the neighbours' with seed 1: one run of this script
follows the same recipe, on other scenes in that stage. Exact answers on the held-out set: 95.3 % (342 of 359).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import initialise
import numpy as np
import optimiser
import tokenizer as tokens
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from batches import HARDEST, IGNORED, Batch, Course, Level, Packer, level, tower_level
from scenes import Samples, Style, load_samples
from torch import Tensor, nn
from torch_model import Config, LLaVAOneVision


@dataclass(frozen=True)
class Options:
    """One run. Rates are peaks: Muon's for the hidden matrices, AdamW's for the rest."""

    output: Path
    tower_steps: int = 600
    whole_steps: int = 1000
    last_steps: int = 650
    neighbour_steps: int = 500
    last_only: bool = False
    seed: int = 0
    muon_lr: float = 0.004
    adam_lr: float = 0.003
    warm_up: int = 60
    check_every: int = 50
    workers: int = 2


@dataclass(frozen=True)
class Stage:
    """Some steps of one kind; `first` numbers them on from the stages before.

    answers: train the whole model on answers, not the tower alone on cells. auxiliary: weight of the cells' loss.
    peak: share of the peak rates. decay: over which last part of the stage the rates fall to zero.
    """

    first: int
    steps: int
    answers: bool
    course: Course
    level: Callable[[float], Level]
    auxiliary: float
    peak: float = 1.0
    decay: float = 0.0

    def rate(self, step: int, warm_up: int) -> float:
        """The share of the peak rates at a step: linear warm-up, constant, linear to zero."""
        left = 1 - (step - 1) / self.steps
        return self.peak * min(1.0, (step - 1) / warm_up, left / self.decay if self.decay else 1.0)


class CellReader(nn.Module):
    """Training only: names the digit and colour in each 28x28 cell, so that the tower learns to see early."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.digit = nn.Linear(hidden, 11)
        self.colour = nn.Linear(hidden, 7)

    def forward(self, image_embeds: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, share of the filled cells whose digit is named right)."""
        x = image_embeds.float().flatten(0, 1)
        digit, colour = batch.cell_digit.flatten(), batch.cell_colour.flatten()
        logits = self.digit(x)
        each = F.cross_entropy(logits, digit, reduction="none")
        filled = digit < 10
        named = F.cross_entropy(self.colour(x), colour, ignore_index=IGNORED)
        loss = each[filled].mean() + each[~filled].mean() + named
        return loss, (logits.argmax(-1) == digit)[filled].float().mean()


def embed(model: LLaVAOneVision, batch: Batch) -> Tensor:
    """image_embeds [B, image tokens, D]: the images of an example one after the other."""
    pairs = zip(batch.pixel_values(), batch.positions, strict=True)
    return torch.cat([model.visual(values, positions) for values, positions in pairs], dim=1)


def answer_logits(model: LLaVAOneVision, batch: Batch, image_embeds: Tensor) -> Tensor:
    """[answer tokens, vocabulary], in reading order."""
    hidden = model.hidden(
        batch.input_ids, batch.image_mask, image_embeds.flatten(0, 1), batch.position_ids, batch.attention_mask()
    )
    return model.lm_head(hidden[batch.labels != IGNORED]).float()


@torch.no_grad()
def exact_answers(model: LLaVAOneVision, batch: Batch) -> tuple[Counter, Counter]:
    """(right, asked) per kind. Greedy decoding gives the exact answer if and only if every argmax along it does."""
    labels = batch.labels
    logits = answer_logits(model, batch, embed(model, batch))
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    wrong[labels != IGNORED] = logits.argmax(-1) != labels[labels != IGNORED]
    right, asked = Counter(), Counter()
    for row, kinds in enumerate(batch.kinds):
        for k, kind in enumerate(kinds, 1):
            asked[kind] += 1
            right[kind] += int(not wrong[row][batch.segments[row] == k].any())
    return right, asked


def accuracy(model: LLaVAOneVision, batches: list[Batch]) -> dict[str, float]:
    """The share of exact answers per kind, and over "all"; the batches of all workers count."""
    mine = [exact_answers(model, batch) for batch in batches]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    right, asked = Counter(), Counter()
    for part_right, part_asked in (part for parts in everyone for part in parts):
        right.update(part_right)
        asked.update(part_asked)
    return {
        "all": right.total() / asked.total(),
        **{kind: right[kind] / asked[kind] for kind in sorted(asked)},
    }


class Run:
    """One worker of a run; it draws step k's scenes from (seed, k, rank) alone: a run is its seed, steps and workers.

    Workers of one thread each lose less than two threads in one process to whatever else the machine does.
    """

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.options = options
        self.tokenizer = tokens.build()
        self.config = Config()
        self.model = LLaVAOneVision(self.config)
        self.cells = CellReader(self.config.text.hidden_size)
        train, held_out = load_samples()
        packer = Packer(self.tokenizer)
        self.start = time.monotonic()
        self.stages = self._stages(train, packer)
        if self.rank == 0:
            checkpoint.save_files(self.config, self.tokenizer, options.output)
        initialise.look_nearby(self.model.visual)
        initialise.whiten(self.model.visual, self._some_patches())
        self.checks = self._held_out_batches(Course(held_out, Style(augment=False), packer))

    def _stages(self, samples: Samples, packer: Packer) -> list[Stage]:
        o, style = self.options, Style(augment=True)
        tower = Course(samples, style, packer, budget=3000, questions=1)
        course = Course(samples, style, packer)
        last = Course(samples, style, packer, emphasis=dict.fromkeys(("left", "right", "list", "number"), 2.0))
        weights = {"left": 6.0, "right": 6.0, "list": 2.0, "number": 2.0, "compare": 2.0}
        neighbours = Course(samples, style, packer, emphasis=weights)
        second, third = o.tower_steps, o.tower_steps + o.whole_steps
        fourth = third + o.last_steps
        return [
            Stage(0, o.tower_steps, False, tower, tower_level, auxiliary=1.0),
            Stage(second, o.whole_steps, True, course, level, auxiliary=0.4, decay=0.5),
            Stage(third, o.last_steps, True, last, lambda _: HARDEST, auxiliary=0.0, peak=0.5, decay=0.9),
            Stage(fourth, o.neighbour_steps, True, neighbours, lambda _: HARDEST, auxiliary=0.0, peak=0.6, decay=0.9),
        ]

    def _some_patches(self) -> Tensor:
        rng = np.random.default_rng((self.options.seed, 2**31 + 1))
        drawn = [self.stages[0].course.draw(tower_level(0.2), pairs=False, rng=rng) for _ in range(12)]
        return torch.cat([batch.pixel_values()[0].flatten(0, 1) for batch in drawn])

    def _held_out_batches(self, course: Course) -> list[Batch]:
        rng = np.random.default_rng((self.options.seed, 2**31))
        return [course.draw(HARDEST, pairs=i % 4 == 3, rng=rng) for i in range(8)][self.rank :: self.workers]

    def train(self) -> None:
        """The tower alone, which sees three times the scenes in the same time; the whole model; and twice more.

        The last two stages start from the checkpoint on disk, so that they can be run by themselves.
        """
        if not self.options.last_only:
            for stage in self.stages[:2]:
                self._run(stage)
        dist.barrier()
        self.model.load_state_dict(checkpoint.load(self.options.output)[0].state_dict())
        for stage in self.stages[2:]:
            self._run(stage)

    def _run(self, stage: Stage) -> None:
        trained = self.model if stage.answers else self.model.visual
        optimisers = optimiser.build(trained, self.cells, self.options.muon_lr, self.options.adam_lr)
        parameters = [*trained.parameters(), *self.cells.parameters()]
        start = time.monotonic()
        for step in range(1, stage.steps + 1):
            optimiser.set_rates(optimisers, stage.rate(step, self.options.warm_up))
            loss, seen = self._loss(self._draw(stage, step), stage)
            loss.backward()
            optimiser.sum_over_workers([parameter.grad for parameter in parameters])
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for each in optimisers:
                each.step()
                each.zero_grad()
            if step % self.options.check_every == 0 or step == stage.steps:
                eta = (time.monotonic() - start) / step * (stage.steps - step) / 60
                line = f"step {stage.first + step} loss {loss.item():.3f} cells {seen.item():.3f} ETA {eta:.1f} min"
                self._report(line, stage.answers)

    def _draw(self, stage: Stage, step: int) -> Batch:
        rng = np.random.default_rng((self.options.seed, stage.first + step, self.rank))
        pairs = stage.answers and (step + self.rank) % 4 == 0
        return stage.course.draw(stage.level(step / stage.steps), pairs, rng)

    def _loss(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        """(loss, share of the filled cells read right)."""
        with torch.autocast("cpu", torch.bfloat16):
            image_embeds = embed(self.model, batch)
            logits = answer_logits(self.model, batch, image_embeds) if stage.answers else None
        loss, seen = self.cells(image_embeds, batch)
        loss = stage.auxiliary * loss
        if logits is not None:
            loss = loss + F.cross_entropy(logits, batch.labels[batch.labels != IGNORED])
        return loss, seen

    def _report(self, line: str, answers: bool) -> None:
        scores = accuracy(self.model, self.checks) if answers else {}
        if self.rank:
            return
        checkpoint.save_weights(self.model.state_dict(), self.options.output)
        minutes = (time.monotonic() - self.start) / 60
        kinds = " ".join(f"{kind} {score:.2f}" for kind, score in scores.items())
        print(f"{line}, {minutes:.1f} min so far | {kinds}", flush=True)


def parse() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    for name in ("tower_steps", "whole_steps", "last_steps", "neighbour_steps", "seed", "check_every", "workers"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Options, name))
    for name in ("muon_lr", "adam_lr"):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=getattr(Options, name))
    parser.add_argument(
        "--last-only", action="store_true", help="run the last two stages on the checkpoint in --output"
    )
    return Options(**vars(parser.parse_args()))


def work(rank: int, options: Options, meeting: str) -> None:
    """One worker process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=options.workers)
    Run(options).train()
    dist.destroy_process_group()


def main() -> None:
    """Start the workers. They keep freed pages, and every kernel oneDNN compiles: both save a quarter of the time."""
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**25), MALLOC_TRIM_THRESHOLD_=str(2**31))
    os.environ.update(ONEDNN_PRIMITIVE_CACHE_CAPACITY="65536")
    options = parse()
    with tempfile.TemporaryDirectory() as meeting:
        multiprocessing.spawn(work, (options, meeting), nprocs=options.workers)


if __name__ == "__main__":
    main()
