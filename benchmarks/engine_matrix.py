"""Every precision for every compute capability that TensorRT-RTX compiles for: built, or refused before any work.

    python benchmarks/engine_matrix.py --work /some/disk [--precision int4] [--target sm80] [--json]

A decoder of 28 layers of 1024 with the released vocabulary and the released tower, random weights, one profile. A cell
is the engine's size over its weights' and the seconds its build took; memory is the most over the targets.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from engine_builds import bundle_of

from onevision_edge.cli.console import say, size, table
from onevision_edge.engines.builder import build, plan_build
from onevision_edge.engines.dialects import RTX
from onevision_edge.errors import OneVisionError

PRECISIONS = ("fp16", "bf16", "int8", "int8-weight", "int4", "fp8", "nvfp4")
TARGETS = RTX.capabilities or ()


def built(bundle: Path, precision: str, target: str) -> list[dict[str, Any]]:
    """A record for each part: what its build took and gave, or why there is none."""
    row = {"precision": precision, "target": target}
    try:
        plan = plan_build(bundle, [target], max_pixels=1024 * 1024)
    except OneVisionError as error:
        return [{**row, "part": part, "refused": str(error)} for part in ("vision", "decoder")]
    found = build(plan, overwrite=True)
    assert found is not None
    shutil.rmtree(plan.folder)
    return [
        {
            **row,
            "part": part,
            "weights": plan.estimate.parts[part].weights,
            "engine": engine.size,
            "engine_estimate": plan.estimate.parts[part].engine,
            "seconds": engine.seconds,
            "peak_rss": engine.peak_rss,
            "peak_rss_estimate": plan.estimate.parts[part].build,
        }
        for part, engine in found.engines.items()
    ]


def cell(record: dict[str, Any]) -> str:
    """Size over weights, and seconds; a dash for what was refused."""
    if "refused" in record:
        return "-"
    return f"{record['engine'] / record['weights']:.3f}, {record['seconds']:.0f} s"


def rows(records: Sequence[dict[str, Any]], targets: Sequence[str]) -> list[list[str]]:
    """The table: a row for each part and precision."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["part"], record["precision"]), {})[record["target"]] = record
    lines = []
    for (part, precision), by_target in sorted(found.items(), key=lambda item: item[0][0] != "vision"):
        made = [record for record in by_target.values() if "refused" not in record]
        weights = size(made[0]["weights"]) if made else ""
        peak = size(max(record["peak_rss"] for record in made)) if made else ""
        lines.append([part, precision, weights, *(cell(by_target[name]) for name in targets), peak])
    return lines


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Directory for checkpoint and bundles.")
@click.option("--precision", "precisions", type=click.Choice(PRECISIONS), multiple=True, default=PRECISIONS)
@click.option("--target", "targets", type=click.Choice(TARGETS), multiple=True, default=TARGETS)
@click.option("--json", "as_json", is_flag=True)
def main(work: Path, precisions: tuple[str, ...], targets: tuple[str, ...], as_json: bool) -> None:
    """Print the matrix."""
    work.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for precision in precisions:
        bundle = bundle_of("matrix", precision, work)
        for target in targets:
            records += built(bundle, precision, target)
            say(f"{precision} {target}: {', '.join(cell(record) for record in records[-2:])}")
        shutil.rmtree(bundle)
    if as_json:
        click.echo(json.dumps(records, indent=1))
    else:
        click.echo(table(rows(records, targets), ("part", "weights in", "weights", *targets, "memory, at most")))


if __name__ == "__main__":
    main()
