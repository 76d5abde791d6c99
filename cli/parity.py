"""onevision-edge parity"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .console import print_json, progress, say, size, table
from .engines_option import engines_of
from .extras import require
from .judge import failed_lines

_MARKS = {"PASS": "ok", "AMBIGUOUS": "~", "FAIL": "!!"}


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--reference",
    metavar="CHECKPOINT|BUNDLE|STORED",
    help="What the bundles are held against: a checkpoint (its FP32 graphs), a bundle, or what --save-reference wrote. "
    "[default: the shipped model, for bundles of it]",
)
@click.option(
    "--runtime",
    type=click.Choice(["onnx", "transformers"]),
    default="onnx",
    show_default=True,
    help="What runs a checkpoint as the reference: its FP32 graphs, or PyTorch.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code for the vision tower.")
@click.option(
    "--data",
    metavar="DATA",
    help="A .jsonl file as for calibration, a folder, an .npz file, samples of lmms-eval, or synthetic:N. "
    "[default: the shipped questions; synthetic without a tokenizer]",
)
@click.option("--samples", type=click.IntRange(1), metavar="N", help="At most so many rows, chosen by --seed.")
@click.option(
    "--walk", "walked", type=click.IntRange(1), default=3, show_default=True, help="Rows whose stages are compared."
)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest answer.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--gates", "gates_file", type=click.Path(path_type=Path), help="Thresholds, TOML.  [default: by precision]"
)
@click.option("--strict", is_flag=True, help="Fail on AMBIGUOUS, too.")
@click.option("--noise/--no-noise", default=True, help="Measure how far BF16 moves the reference.  [default: yes]")
@click.option("--engines", metavar="TARGET", help="What runs the bundles, as for run.  [default: cpu, if built]")
@click.option("--exact", is_flag=True, help="Keep activations of INT4 and INT8 weights in floating point, as for run.")
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; one per physical core if not given.")
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Models that need more run in stages, one at a time.  [default: half of what is free]",
)
@click.option("--save-reference", type=click.Path(path_type=Path), metavar="DIR", help="Keep what the reference said.")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), help="Where a checkpoint's graphs go meanwhile."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Directory for parity.json, parity.md, index.html."
)
@click.option(
    "--lmms-eval",
    "lmms_eval",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write results and samples as lmms-eval does.",
)
@click.option("--overwrite", is_flag=True, help="Replace a stored reference.")
@click.option("--json", "as_json", is_flag=True, help="Print the record.")
def parity(
    bundles: tuple[Path, ...],
    reference: str | None,
    data: str | None,
    samples: int | None,
    walked: int,
    max_tokens: int,
    seed: int,
    gates_file: Path | None,
    strict: bool,
    noise: bool,
    save_reference: Path | None,
    output: Path | None,
    lmms_eval: Path | None,
    overwrite: bool,
    as_json: bool,
    memory: float | None,
    engines: str | None,
    **running: Any,
) -> None:
    """Is it still the same model? Compare bundles with a reference, stage by stage and answer by answer.

    Exit code 1 where a gate fails, with the line that says which.
    """
    require("comparing", "export", "onnx")
    from ..report.files import open_folder, write_parity
    from ..report.parity.comparison import Plan, Running, compare_all
    from ..report.parity.gates import load_gates

    if not bundles and save_reference is None:
        raise click.UsageError("give a bundle to compare, or --save-reference to record what it is compared with")
    source = reference or _shipped(bundles)
    plan = Plan(data, samples, walked, max_tokens, seed, noise)
    most = None if memory is None else int(memory * 1e9)
    how = Running(engines_of(engines), memory=most, **running)
    open_folder(output)
    record = compare_all(
        bundles, source, plan, load_gates(gates_file), how, keep=save_reference, overwrite=overwrite, phases=progress
    )
    if as_json:
        print_json(record)
    else:
        _print(record)
    if output is not None:
        write_parity(output, record)
        say(f"wrote {output}: parity.json, parity.md, index.html")
    if lmms_eval is not None:
        from ..report.parity.lmms_eval import write_lmms_eval

        open_folder(lmms_eval)
        say(f"wrote {lmms_eval}: {len(write_lmms_eval(record, lmms_eval))} files")
    if lines := failed_lines(record, strict):
        for line in lines:
            say(line)
        raise click.exceptions.Exit(1)


def _shipped(bundles: Sequence[Path]) -> str:
    from ..report.parity.comparison import shipped_reference

    found = shipped_reference(bundles[0]) if bundles else None
    if found is None:
        raise click.UsageError("give --reference: the checkpoint that the bundles were made of, or a bundle of it")
    return found


def _print(record: dict[str, Any]) -> None:
    for candidate in record["candidates"]:
        click.echo(candidate_text(record, candidate) + "\n")
    if len(record["candidates"]) > 1:
        click.echo(summary(record) + "\n")


def candidate_text(record: dict[str, Any], candidate: dict[str, Any]) -> str:
    """One candidate as a reader of a terminal wants it: verdict, stages, metrics, checks."""
    subject, first = candidate["subject"], candidate["first_failed_stage"]
    module = candidate["failed_module"]
    inside = f", first in {module['module']}" if module else ""
    where = f": {first} is the first stage out of tolerance{inside}" if first else ""
    lines = [
        f"{candidate['verdict']}  {subject['name']} ({subject['precision']}, {subject['backend']}, "
        f"{size(subject['bytes'])}) against {record['reference']['name']}{where}",
        "",
        table([_stage_row(stage) for stage in candidate["stages"] if stage["error"] or stage["own"]], _STAGES),
        "",
        *(f"{_MARKS[s['verdict']]:3} {s['stage']}: {s['why']}" for s in candidate["stages"] if s["stage"] == "tokens"),
        "",
        table([_metric_row(name, one) for name, one in candidate["metrics"].items()], _METRICS),
        "",
        *(f"{_MARKS[check['verdict']]:3} {check['line']}" for check in candidate["checks"]),
        *(f"    {note}" for note in subject["notes"]),
    ]
    return "\n".join(lines)


_STAGES = ("", "stage", "relative L2", "own", "BF16's", "max error", "cosine", "SNR dB")
_METRICS = ("metric", "value", "95 % interval", "rows")


def _stage_row(stage: dict[str, Any]) -> tuple[str, ...]:
    error, own, noise = (stage[key] or {} for key in ("error", "own", "noise"))
    told = error or own
    return (
        _MARKS[stage["verdict"]],
        stage["stage"],
        *(_number(one.get("relative_l2"), bool(one)) for one in (error, own, noise)),
        _number(told["max_abs"], True),
        f"{told['cosine']:.6f}",
        "exact" if told["snr_db"] is None and told["max_abs"] == 0 else _decibels(told["snr_db"]),
    )


def _number(value: float | None, given: bool) -> str:
    if not given:
        return ""
    return "not finite" if value is None else "0" if value == 0 else f"{value:.2g}"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _metric_row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    value, low, high = (one[key] for key in ("value", "low", "high"))
    interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
    return name, "not finite" if value is None else f"{value:.4g}", interval, str(one["n"])


def summary(record: dict[str, Any]) -> str:
    """All candidates side by side."""
    rows = []
    for one in record["candidates"]:
        metrics, subject = one["metrics"], one["subject"]
        cells = [_value(metrics, name) for name in ("kld", "top1_agreement", "exact_match", "accuracy")]
        rows.append((one["verdict"], subject["name"], subject["precision"], size(subject["bytes"]), *cells))
    return table(rows, ("", "bundle", "precision", "size", "KLD", "top-1", "same answers", "accuracy"))


def _value(metrics: dict[str, Any], name: str) -> str:
    value = metrics.get(name, {}).get("value")
    return "" if value is None else f"{value:.3g}" if name == "kld" else f"{100 * value:.2f} %"
