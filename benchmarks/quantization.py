"""Every precision of the shipped model: size, distance from full precision, exact answers on the held-out questions.

    python benchmarks/quantization.py [--dtype fp16] [--only int4,fp8] [--json]

Calibrated on the shipped calibration set, measured on the shipped evaluation set; the figures are those of each
bundle's own manifest. An exact answer is one that greedy decoding gives to the letter.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import click

import onevision_edge
from onevision_edge.cli.console import progress, size, table
from onevision_edge.precision.plan import Plan, default_plan

# What is measured: a name, and the plan's options.
CASES: dict[str, dict[str, Any]] = {
    "float": {"precision": "float"},
    "INT8 (W8A8)": {"precision": "int8"},
    "INT8 weights": {"precision": "int8-weight"},
    "INT4": {"precision": "int4"},
    "FP8": {"precision": "fp8"},
    "NVFP4": {"precision": "nvfp4"},
    "INT8 KV cache": {"precision": "float", "kv_cache": "int8"},
    "INT8, tower too": {"precision": "int8", "vision": "int8"},
    "FP8, tower too": {"precision": "fp8", "vision": "fp8"},
    "INT4, INT8 KV and tower": {"precision": "int4", "vision": "int8", "kv_cache": "int8"},
}


def measured(plan: Plan, output: Path) -> dict[str, Any]:
    """Size, seconds and quality of the shipped model's bundle under a plan."""
    started = perf_counter()
    bundle = onevision_edge.quantize("demo", output, plan=plan, overwrite=True, phases=progress)
    seconds, manifest = perf_counter() - started, bundle.manifest
    graphs = sum(manifest.files[f"{graph.file}.data"].size for graph in manifest.graphs.values())
    return {
        "bytes": sum(f.size for f in manifest.files.values()),
        "weights": graphs,
        "seconds": seconds,
        **manifest.quality,
    }


def rows(records: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table."""
    for name, found in records.items():
        points = 100 * (found["accuracy"] - found["accuracy_reference"])
        exact = f"{100 * found['accuracy']:.2f} % ({points:+.2f})"
        agreed = f"{100 * found['top1_agreement']:.2f} %"
        yield name, size(found["weights"]), size(found["bytes"]), f"{found['kld']:.1e}", agreed, exact


@click.command()
@click.option("--dtype", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
@click.option("--only", help="Cases to measure, comma-separated.")
@click.option("--json", "as_json", is_flag=True)
def main(dtype: str, only: str | None, as_json: bool) -> None:
    """Print the table."""
    chosen = [name.strip() for name in only.split(",")] if only else list(CASES)
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        raise click.UsageError(f"unknown case {unknown[0]!r}; there are {', '.join(CASES)}")
    records = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            options = dict(CASES[name])
            records[name] = measured(default_plan(options.pop("precision"), dtype, **options), Path(scratch) / "bundle")
    if as_json:
        click.echo(json.dumps(records, indent=1))
        return
    reference = next(iter(records.values()))
    click.echo(
        f"FP32: {100 * reference['accuracy_reference']:.2f} % of {reference['samples']} questions; graphs in {dtype}"
    )
    click.echo(table(list(rows(records)), ("decoder", "weights", "bundle", "KLD (nats)", "top-1", "exact answers")))


if __name__ == "__main__":
    main()
