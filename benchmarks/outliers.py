"""Outliers that change no output: what quantisation loses with and without what is there against them.

    python benchmarks/outliers.py [--channels 16] [--low 30 --high 100] [--plot FILE.svg] [--json]

Some channels of every normalisation before a Linear are multiplied by 30 to 100, and the rows of the weights that
read them divided by the same: the function is the same, to the rounding of float32, and the activations have the
outliers that large language models are known for. The shipped model is quantised as it is and with outliers, the
tower with the decoder, and asked its held-out questions.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rows_svg import TOP, bottom_of, diamond, frame, join, middle_of, ring, text, upright
from safetensors.numpy import save_file

import onevision_edge
from onevision_edge.calibration.quality import logits_of
from onevision_edge.calibration.recipe import Methods
from onevision_edge.calibration.rows import Row
from onevision_edge.calibration.scored import scored
from onevision_edge.cli.console import progress, say, table
from onevision_edge.config import ModelConfig
from onevision_edge.export.checkpoint import Checkpoint
from onevision_edge.precision.codes import floats
from onevision_edge.precision.plan import default_plan


@dataclass(frozen=True, slots=True)
class Case:
    """A precision, and what is done against outliers."""

    precision: str
    name: str
    methods: Methods


CASES = (
    Case("int8", "plain absmax", Methods(observer="absmax", smoothquant=False, bias_correction=False)),
    Case("int8", "SmoothQuant", Methods()),
    Case("int4", "plain rounding", Methods(awq=False, gptq=False, bias_correction=False)),
    Case("int4", "AWQ", Methods(gptq=False)),
    Case("int4", "GPTQ", Methods(awq=False)),
    Case("int4", "AWQ and GPTQ", Methods()),
)


def readers(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Every normalisation that Linears read, with these."""
    for i in range(config.vision.depth):
        block = f"visual.blocks.{i}"
        yield f"{block}.norm1", [f"{block}.attn.qkv"]
        yield f"{block}.norm2", [f"{block}.mlp.fc1"]
    yield "visual.merger.ln_q", ["visual.merger.mlp.0"]
    for i in range(config.text.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm", [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        yield f"{layer}.post_attention_layernorm", [f"{layer}.mlp.{name}_proj" for name in ("gate", "up")]


def with_outliers(
    source: str | Path, output: Path, channels: int, low: float = 30, high: float = 100, seed: int = 0
) -> Path:
    """Write a checkpoint of the same function in float32 in which `channels` of every normalisation are outliers."""
    checkpoint, rng = Checkpoint.open(source), np.random.default_rng(seed)
    tensors = {name: np.array(floats(checkpoint.read(name))) for name in checkpoint.tensors}
    for norm, linears in readers(checkpoint.config):
        width = len(tensors[f"{norm}.weight"])
        scale = np.ones(width, np.float32)
        scale[rng.choice(width, channels, replace=False)] = rng.uniform(low, high, channels)
        for name in (f"{norm}.weight", f"{norm}.bias"):
            if name in tensors:
                tensors[name] *= scale
        for linear in linears:  # the merger's reads the normalisation of four patches side by side
            matrix = tensors[f"{linear}.weight"]
            matrix /= np.tile(scale, matrix.shape[1] // width)
    shutil.copytree(checkpoint.directory, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, output / "model.safetensors")
    return output


def difference(one: Path, other: Path, rows: Sequence[Row]) -> tuple[float, float]:
    """The largest difference of two full-precision bundles' logits on some rows, and their largest magnitude."""
    models = [onevision_edge.load(path) for path in (one, other)]
    found, largest = 0.0, 0.0
    for row in rows:
        first, second = (logits_of(model, row, scored(row, model.config)) for model in models)
        found = max(found, float(np.abs(first - second).max()))
        largest = max(largest, float(np.abs(first).max()))
    return found, largest


def measured(source: str | Path, case: Case, scratch: Path, **data: Any) -> dict[str, Any]:
    """The quality of a checkpoint quantised with a case's methods."""
    plan = default_plan(case.precision, "fp32", vision=case.precision)
    bundle = onevision_edge.quantize(
        source, scratch / "bundle", plan=plan, methods=case.methods, overwrite=True, phases=progress, **data
    )
    assert bundle.manifest.quality is not None
    return bundle.manifest.quality


def points(quality: dict[str, Any]) -> float:
    """Exact answers beyond full precision's, in points."""
    return float(100 * (quality["accuracy"] - quality["accuracy_reference"]))


def lines(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table."""
    for record in records:
        cells = [record["precision"], record["case"]]
        for key in ("as_it_is", "with_outliers"):
            found = record[key]
            cells += [f"{100 * found['accuracy']:.2f} % ({points(found):+.2f})", f"{found['kld']:.1e}"]
        yield tuple(cells)


_LEFT, _RIGHT = 190, 600


def figure(records: Sequence[dict[str, Any]], title: str) -> str:
    """Exact answers as they are (a ring) and with outliers (a diamond), a line for each case, as SVG."""
    bottom = bottom_of(len(records))
    reference = records[0]["as_it_is"]["accuracy_reference"]
    body = frame(title, len(records))
    body += [ring(22, 52) + text("", 34, 56, "as trained")]
    body += [diamond(130, 52) + text("", 144, 56, "with outliers, the same function")]
    for percent in range(0, 101, 20):
        body.append(upright("grid", _x(percent / 100), bottom))
        body.append(text("", _x(percent / 100), bottom + 20, str(percent), "middle"))
    body.append(text("", (_LEFT + _RIGHT) / 2, bottom + 42, "held-out questions answered exactly, %", "middle"))
    body.append(upright("reference", _x(reference), bottom))
    body.append(text("", _x(reference), TOP - 12, f"full precision {100 * reference:.1f}", "middle"))
    for number, record in enumerate(records):
        body += _row(record, middle_of(number))
    return "\n".join([*body, "</svg>", ""])


def _row(record: dict[str, Any], y: int) -> Iterator[str]:
    before, after = (record[key]["accuracy"] for key in ("as_it_is", "with_outliers"))
    yield text("name", 16, y + 4, f"{record['precision'].upper()}, {record['case']}")
    yield join(_x(before), _x(after), y)
    yield ring(_x(before), y)
    yield diamond(_x(after), y)
    yield text("name", _RIGHT + 24, y + 4, f"{100 * before:.1f} → {100 * after:.1f} %")


def _x(share: float) -> float:
    return round(_LEFT + share * (_RIGHT - _LEFT), 1)


@click.command()
@click.option("--channels", default=16, show_default=True, help="Outliers of every normalisation.")
@click.option("--low", default=30.0, show_default=True, help="What they are multiplied by, at least.")
@click.option("--high", default=100.0, show_default=True, help="And at most.")
@click.option("--seed", default=0, show_default=True, help="Which channels, and by how much.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the figure there, as SVG.")
@click.option("--json", "as_json", is_flag=True)
def main(channels: int, low: float, high: float, seed: int, plot: Path | None, as_json: bool) -> None:
    """Print exact answers and KLD of each case, without outliers and with them."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stressed = with_outliers("demo", scratch / "stressed", channels, low, high, seed)
        records = [
            {
                "precision": case.precision,
                "case": case.name,
                "as_it_is": measured("demo", case, scratch),
                "with_outliers": measured(stressed, case, scratch),
            }
            for case in CASES
        ]
    if plot is not None:
        factors = f"{low:g} to {high:g}"
        plot.write_text(figure(records, f"{channels} channels of every normalisation times {factors}"), "utf-8")
        say(f"wrote {plot}")
    if as_json:
        click.echo(json.dumps(records, indent=1))
        return
    header = ("precision", "methods", "as trained", "KLD (nats)", "with outliers", "KLD (nats)")
    click.echo(table(list(lines(records)), header))


if __name__ == "__main__":
    main()
