"""The network that TensorRT parses against ONNX Runtime, on the shipped model: the largest difference of each stage.

    python benchmarks/interpreter.py [--precision int4] [--json]

Both graphs in every precision, graphs in FP16 and with an INT8 cache where the row says so: one image and two of
another size; a prompt, a chunk behind it, two single tokens. A stage's difference includes what the layers before it
left. "Departs" counts layers that give another value than ONNX Runtime on equal inputs, rounding apart.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import onevision_edge
from onevision_edge.calibration.recipe import Methods
from onevision_edge.cli.console import table
from onevision_edge.engines.check import Check, check_graphs
from onevision_edge.engines.dialects import RTX
from onevision_edge.precision.plan import Plan, default_plan

PLANS: dict[str, Plan] = {
    "fp32": default_plan("float", "fp32"),
    "fp16": default_plan("float", "fp16"),
    "bf16": default_plan("float", "bf16"),
    **{name: default_plan(name, "fp16", vision=name) for name in ("int8", "int8-weight", "int4", "fp8", "nvfp4")},
    "int4, INT8 KV": default_plan("int4", "fp16", kv_cache="int8"),
}
STAGES = {  # a column, and what its modules' names hold
    "tower": ("visual/blocks",),
    "merger": ("visual/merger",),
    "attention": ("self_attn",),
    "MLP": ("mlp",),
    "logits": ("lm_head",),
}


def checked(plan: Plan, work: Path) -> list[Check]:
    """The shipped model under a plan, quantised without searches, which change numbers and not graphs."""
    methods = Methods(smoothquant=False, awq=False, gptq=False)
    bundle = onevision_edge.quantize(
        "demo", work, plan=plan, methods=methods, calibration_samples=16, evaluate=False, max_length=256, overwrite=True
    )
    return check_graphs(bundle, ("vision", "decoder"), RTX)


def largest(found: Sequence[Check]) -> dict[str, float]:
    """Per column, over all calls."""
    result = dict.fromkeys(STAGES, 0.0)
    for one in found:
        for stage, difference in one.comparison.stages.items():
            column = column_of(one.part, stage)
            if column is not None:
                result[column] = max(result[column], difference)
    return result


def column_of(part: str, stage: str) -> str | None:
    """The column of a module; the tower's own attention and MLP are the tower's."""
    columns = ("tower", "merger") if part == "vision" else ("attention", "MLP", "logits")
    return next((c for c in columns if any(key in stage for key in STAGES[c])), None)


@click.command()
@click.option("--precision", "names", type=click.Choice(list(PLANS)), multiple=True, default=tuple(PLANS))
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], as_json: bool) -> None:
    """Print a row for each precision."""
    records: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = checked(PLANS[name], Path(folder) / "bundle")
            records[name] = {
                **largest(found),
                "values": sum(one.comparison.compared for one in found),
                "departs": sum(len(one.comparison.departures) for one in found),
            }
    if as_json:
        click.echo(json.dumps(records, indent=1))
        return
    rows = [
        [name, *(f"{record[c]:.2g}" for c in STAGES), str(record["values"]), str(record["departs"])]
        for name, record in records.items()
    ]
    click.echo(table(rows, ("precision", *STAGES, "values compared", "departs")))


if __name__ == "__main__":
    main()
