"""CPU time of a constraint: to make one, and for every token of an answer that follows it.

    python benchmarks/constraint.py DIRECTORY [--vocabulary 151936]

DIRECTORY is a bundle, or holds a tokenizer.json. The answer is given: its next token's logit is raised among normal
ones, so that the tokens are the same with the constraint and without, whose difference is what it costs.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import thread_time
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from onevision_edge.cli.console import table
from onevision_edge.runtime import constraint
from onevision_edge.runtime.constraint import Constraint
from onevision_edge.runtime.sampling import Sampler, SamplingParams
from onevision_edge.runtime.tokenizer import Tokenizer

ROUNDS = 5
RECEIPT = {
    "shop": "Café Müller, Hauptstraße 12",
    "date": "2024-05-17",
    "lines": [
        {"name": "Espresso, double", "count": 2, "price": 2.8},
        {"name": "Apple cake with cream", "count": 1, "price": 4.5},
        {"name": "Still water 0.5 l", "count": 3, "price": 3.2},
    ],
    "total": 19.7,
    "paid": True,
}
LINE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "price": {"type": "number"}},
    "required": ["name", "count", "price"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "shop": {"type": "string", "maxLength": 80},
        "date": {"type": "string", "format": "date"},
        "lines": {"type": "array", "items": LINE},
        "total": {"type": "number"},
        "paid": {"type": "boolean"},
    },
    "required": ["shop", "date", "lines", "total", "paid"],
    "additionalProperties": False,
}
LIST = "yellow 9, blue 8, red 4, green 2, black 7, white 0"
COLOUR = "(red|green|blue|yellow|black|white)"
CITIES = [f"{first}{last}" for first in ("New ", "Old ", "East ", "West ") for last in ("York", "Haven", "Bridge")]
CASES: list[tuple[str, Callable[[Any], Constraint], str]] = [
    (
        "JSON schema",
        lambda model: constraint.json_schema(SCHEMA, model),
        json.dumps(RECEIPT, indent=2, ensure_ascii=False),
    ),
    ("any JSON object", constraint.json_object, json.dumps(RECEIPT, indent=2, ensure_ascii=False)),
    ("regex", lambda model: constraint.regex(f"{COLOUR} [0-9](, {COLOUR} [0-9])*", model), LIST),
    ("choice of 12", lambda model: constraint.choice(CITIES, model), CITIES[-1]),
]


def seconds(make: Callable[[], Constraint | None], ids: Sequence[int], vocabulary: int) -> list[float]:
    """Of every token of `ids`, greedy: the fastest of the rounds."""
    logits = np.random.default_rng(1).standard_normal(vocabulary).astype(np.float32)
    rounds = []
    for _ in range(ROUNDS):
        sampler, times = Sampler(SamplingParams(), (), (), vocabulary, make()), []
        for token in ids:
            row = logits.copy()
            row[token] = 20.0
            started = thread_time()
            chosen = sampler.sample(row).token_id
            times.append(thread_time() - started)
            assert chosen == token
        rounds.append(times)
    return np.min(rounds, axis=0).tolist()


def made(make: Callable[[], object]) -> float:
    """Seconds to make a constraint: the median of some."""
    times = []
    for _ in range(ROUNDS):
        started = thread_time()
        make()
        times.append(thread_time() - started)
    return median(times)


def row(model: Any, name: str, make: Callable[[Any], Constraint], text: str) -> tuple[str, ...]:
    """A line of the table."""
    ids, vocabulary = model.tokenizer.encode(text), model.config.text.vocab_size
    start = make(model)
    free, bound = seconds(lambda: None, ids, vocabulary), seconds(start.copy, ids, vocabulary)
    times = (made(lambda: make(model)), median(free), median(bound), np.percentile(bound, 95), max(bound))
    return (name, str(len(ids)), *(f"{1e6 * time:.0f}" for time in times))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True))
@click.option("--vocabulary", default=151_936, show_default=True, help="Logits of a step.")
def main(directory: Path, vocabulary: int) -> None:
    """Print microseconds for each kind of constraint."""
    tokenizer = Tokenizer.from_directory(directory)
    text = SimpleNamespace(vocab_size=max(vocabulary, len(tokenizer)))
    model = SimpleNamespace(
        tokenizer=tokenizer, config=SimpleNamespace(text=text), eos_token_ids=tokenizer.eos_token_ids
    )
    started = thread_time()
    constraint.json_object(model)  # type: ignore[arg-type]
    click.echo(
        f"{len(tokenizer)} tokens; the first constraint of a model takes {thread_time() - started:.2f} s", err=True
    )
    heads = ("answer", "tokens", "to make", "free token", "bound token", "95 %", "worst")
    click.echo(table([row(model, *case) for case in CASES], heads))


if __name__ == "__main__":
    main()
