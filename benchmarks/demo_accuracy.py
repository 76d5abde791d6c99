"""Exact answers of a bundle of the shipped model on the shipped held-out questions, by kind.

    python benchmarks/demo_accuracy.py [BUNDLE] [--dtype fp32]

Without BUNDLE the shipped checkpoint is exported first. Greedy; an answer counts when it is the expected text.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click

import onevision_edge
from onevision_edge.cli.console import table

EVALUATION = Path(onevision_edge.__file__).parent / "demo" / "evaluation"


def questions() -> list[dict[str, Any]]:
    """Rows of the held-out set: images (paths), prompt, answer, kind."""
    rows = [json.loads(line) for line in (EVALUATION / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{**row, "images": [EVALUATION / name for name in row.get("images") or [row["image"]]]} for row in rows]


def ask(model: onevision_edge.Model, row: dict[str, Any]) -> str:
    """The model's answer to one row."""
    content = [{"type": "image", "image": image} for image in row["images"]]
    return model.generate(
        [{"role": "user", "content": [*content, {"type": "text", "text": row["prompt"]}]}], max_tokens=48
    ).text


def accuracy(model: onevision_edge.Model) -> tuple[Counter[str], Counter[str]]:
    """Right answers and questions, per kind."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    with click.progressbar(questions(), label="questions", file=sys.stderr) as rows:
        for row in rows:
            asked[row["kind"]] += 1
            right[row["kind"]] += ask(model, row) == row["answer"]
    return right, asked


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(bundle: Path | None, dtype: str, as_json: bool) -> None:
    """Print the accuracy by kind of question."""
    with tempfile.TemporaryDirectory() as scratch:
        if bundle is None:
            bundle = Path(scratch) / "bundle"
            onevision_edge.export("demo", bundle, dtype=dtype)
        right, asked = accuracy(onevision_edge.load(bundle))
    rows = [(kind, right[kind], asked[kind]) for kind in sorted(asked)]
    rows.append(("all", right.total(), asked.total()))
    if as_json:
        click.echo(json.dumps({kind: {"right": r, "asked": n, "accuracy": r / n} for kind, r, n in rows}, indent=1))
    else:
        cells = [(kind, str(r), str(n), f"{100 * r / n:.1f} %") for kind, r, n in rows]
        click.echo(table(cells, ("kind", "right", "asked", "exact")))


if __name__ == "__main__":
    main()
