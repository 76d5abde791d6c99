"""CPU time of choosing one token from a released vocabulary's logits.

    python benchmarks/sampling.py [--prompt 2000]

Logits are normal with sigma 2.5, 20 of them raised by 12; `prompt` ids count for the repetition penalty.
"""

from time import thread_time
from typing import Any

import click
import numpy as np

from onevision_edge.cli.console import table
from onevision_edge.runtime.sampling import Sampler, SamplingParams

VOCABULARY, RAISED, ROUNDS, STEPS = 151_936, 20, 15, 50
WARM = {"temperature": 0.7}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1}
CASES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.1},
    {"logprobs": 5},
    WARM,
    {**WARM, "top_k": 20},
    {**WARM, "top_p": 0.9},
    {**WARM, "top_k": 20, "top_p": 0.9},
    {**WARM, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {**WARM, "top_p": 0.9, **PENALTIES},
    {**WARM, "top_k": 20, "top_p": 0.9, **PENALTIES},
]


def logits(random: np.random.Generator) -> np.ndarray:
    """float32 [VOCABULARY]."""
    values = 2.5 * random.standard_normal(VOCABULARY).astype(np.float32)
    values[random.integers(0, VOCABULARY, RAISED)] += 12
    return values


def seconds(options: dict[str, Any], prompt: int) -> float:
    """Of one token: the fastest round."""
    rows = [logits(np.random.default_rng(i)) for i in range(8)]
    times = []
    for _ in range(ROUNDS):
        sampler = Sampler(SamplingParams(seed=1, **options), range(prompt), (151_655, 151_656), VOCABULARY)
        started = thread_time()
        for step in range(STEPS):
            sampler.sample(rows[step % len(rows)])
        times.append((thread_time() - started) / STEPS)
    return min(times)


@click.command()
@click.option("--prompt", default=2000, show_default=True)
def main(prompt: int) -> None:
    """Print microseconds for each case."""
    names = [", ".join(f"{name} {value}" for name, value in case.items()) or "greedy" for case in CASES]
    cells = [(name, f"{1e6 * seconds(case, prompt):.0f}") for name, case in zip(names, CASES, strict=True)]
    click.echo(table(cells, ("options", "us")))


if __name__ == "__main__":
    main()
