"""How far every engine is from full precision: logits on random weights, next tokens of the shipped model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from qwen3_decoder import Sample, bundle_logits, rows

import onevision_edge
from onevision_edge.calibration.dataset import SHIPPED_EVALUATION
from onevision_edge.calibration.quality import divergence
from onevision_edge.export.checkpoint import Checkpoint

from .engines import Engine
from .files import DEMO, Files, UnavailableError
from .rounds import Worker, command_of
from .worker import seeded_ids

PROMPTS = [(seed, 64) for seed in range(4)]  # a seed and a number of tokens
INSTEAD = {"cpu.openvino:Pipeline": "cpu.openvino:Stateful"}  # workers for those that give no logits

Say = Callable[[str], None]


def logits_apart(files: Files, engines: Sequence[Engine], say: Say, **options: int) -> dict[str, float]:
    """1 - cosine of logits to full precision's behind some prompts, the mean, of engines with a text half.

    options: as for rounds.command_of.
    """
    prompts = [seeded_ids(tokens, options["vocab_size"], seed) for seed, tokens in PROMPTS]

    def logits(engine: Engine) -> np.ndarray:
        with closing(_worker(files, engine, options)) as worker:
            return np.array([worker.ask("logits", prompt) for prompt in prompts])

    reference = logits(Engine("full precision", "cpu.ours:Model", Files.reference))
    found = _each(engines, logits, say)
    return {name: float(np.mean(1 - _cosine(reference, values))) for name, values in found.items()}


def next_tokens_apart(files: Files, engines: Sequence[Engine], say: Say, **options: int) -> dict[str, float]:
    """KL divergence of the shipped model's next tokens from full precision's on its held-out questions, in nats."""
    demo = Files(files.work, DEMO, files.python, say)
    checkpoint = Checkpoint.open(DEMO)
    model = onevision_edge.load(demo.reference())
    samples = rows(SHIPPED_EVALUATION, checkpoint, model)
    source, output = demo.folder / "rows.npz", demo.folder / "logits.npy"
    np.savez(source, **_arrays(samples))
    text = checkpoint.config.text
    of_demo = {**options, "vocab_size": text.vocab_size, "rows": text.max_position_embeddings}

    def logits(engine: Engine) -> np.ndarray:
        with closing(_worker(demo, engine, of_demo)) as worker:
            worker.ask("score", str(source), str(output))
        return np.load(output)

    reference, found = bundle_logits(model, samples), _each(engines, logits, say)
    return {name: float(divergence(reference, values).mean()) for name, values in found.items()}


UNITS = {"logits apart": "1 - cosine", "next tokens apart": "nats"}
APART = {"logits apart": logits_apart, "next tokens apart": next_tokens_apart}


def distance_record(cell: str, engines: Sequence[Engine], apart: Mapping[str, float]) -> dict[str, Any]:
    """A cell of the report; the ratio is above 1 where ours is nearer."""
    ours = {engine.name: apart[engine.name] for engine in engines if engine.ours and engine.name in apart}
    peers = {engine.name: apart[engine.name] for engine in engines if not engine.ours and engine.name in apart}
    mine = next(reversed(ours.values()), None)
    best = min(peers, key=lambda name: peers[name], default=None)
    ratio = peers[best] / mine if best and mine else None
    return {
        "unit": UNITS[cell],
        "ours": mine,
        "variants": ours,
        "peers": peers,
        "best": best,
        "ratio_to_best": ratio,
        "spread": None,
        "roofline_share": None,
        "roofline_shares": {},
        "disturbed": [],
    }


def _arrays(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """What worker.scored_rows reads."""
    embeds = {f"embeds.{i}": sample.embeds[0] for i, sample in enumerate(samples)}
    return embeds | {f"positions.{i}": sample.scored.positions for i, sample in enumerate(samples)}


def _each(engines: Sequence[Engine], logits: Callable[[Engine], np.ndarray], say: Say) -> dict[str, np.ndarray]:
    """Logits of every engine that gives them; torch.compile's are PyTorch's."""
    found = {}
    for engine in engines:
        if engine.text is None or engine.options.get("compiled"):
            continue
        try:
            found[engine.name] = logits(engine)
        except UnavailableError as error:
            say(f"{engine.name}: no logits: {error}")
    return found


def _worker(files: Files, engine: Engine, options: Mapping[str, int]) -> Worker:
    worker = INSTEAD.get(engine.worker, engine.worker)
    command = command_of(replace(engine, worker=worker), files.python, engine.files(files), **options)
    return Worker(command, files.work / "workers.log")


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows, [n]."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
