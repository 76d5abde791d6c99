"""onevision-edge report"""

from pathlib import Path
from typing import Any

import click

from .console import progress, say, size, table
from .extras import require
from .judge import failed_lines


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the report.")
@click.option(
    "--precisions",
    default="fp32,fp16,int8,int4,fp8,nvfp4",
    show_default=True,
    help="A bundle of each is made and compared, as export --dtype and quantize --precision make them.",
)
@click.option("--bundles", type=click.Path(path_type=Path, file_okay=False), help="Keep the bundles here, or use them.")
@click.option("--calibration", metavar="DATA", help="Of quantised bundles, as for quantize.")
@click.option("--max-length", type=click.IntRange(1), help="Rows of the KV cache.")
@click.option("--target", type=click.Choice(["cpu"]), help="Build and use the engine for CPUs.")
@click.option("--data", metavar="DATA", help="What is asked, as for parity.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="At most so many rows, chosen by --seed.")
@click.option("--walk", "walked", type=click.IntRange(1), default=3, show_default=True, help="Rows compared by stage.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Requests that are timed.")
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; one per physical core if not given.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--profile", is_flag=True, help="Where a request's time goes, too.")
@click.option("--strict", is_flag=True, help="Fail on AMBIGUOUS, too.")
def report(
    checkpoint: str,
    output: Path,
    precisions: str,
    bundles: Path | None,
    calibration: str | None,
    max_length: int | None,
    target: str | None,
    **options: Any,
) -> None:
    """Make a checkpoint's bundles in several precisions, and one page that says which to deploy.

    Each is held against the checkpoint's FP32 graphs as `parity` does, and timed as `bench` does, all in turn.
    """
    require("comparing", "export", "onnx")
    from ..report.files import open_folder, write_latency, write_parity
    from ..report.full import Bundles, make_bundles, working_directory

    wanted = Bundles(_names(precisions), calibration, max_length, options["seed"], target == "cpu")
    open_folder(output)
    with working_directory(bundles) as folder:
        paths = make_bundles(checkpoint, folder, wanted, progress)
        parity = _parity(checkpoint, paths, options)
        write_parity(output, parity)
        latency = _latency(paths, options)
        write_latency(output, latency)
    click.echo(summary(parity, latency))
    say(f"wrote {output}: index.html, parity.json, parity.md, latency.json, latency.md")
    if lines := failed_lines(parity, options["strict"]):
        for line in lines:
            say(line)
        raise click.exceptions.Exit(1)


def _names(precisions: str) -> tuple[str, ...]:
    from ..precision.plan import NAMES
    from ..report.full import FLOATS

    names = tuple(dict.fromkeys(name.strip() for name in precisions.split(",")))
    known = (*FLOATS, *(name for name in NAMES if name != "float"))
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--precisions")
    return names


def _parity(checkpoint: str, paths: list[Path], options: dict[str, Any]) -> dict[str, Any]:
    from ..report.parity.comparison import Plan, Running, compare_all
    from ..report.parity.gates import load_gates

    plan = Plan(options["data"], options["samples"], options["walked"], seed=options["seed"])
    running = Running(threads=options["threads"])
    return compare_all(paths, checkpoint, plan, load_gates(), running, phases=progress)


def _latency(paths: list[Path], options: dict[str, Any]) -> dict[str, Any]:
    from ..report.latency.bench import bench
    from ..report.latency.cells import Cell
    from ..report.latency.plan import common_size, contenders, open_bundles
    from ..report.latency.rounds import Schedule

    found = open_bundles(paths)
    size_of_all = common_size(list(found.values()))
    cells = [Cell(size_of_all, 64, 32, 1)]
    schedule = Schedule(options["rounds"], 1, options["seed"], options["profile"])
    with progress("bench", "requests") as told:
        return bench(contenders(found, (), cells, options["threads"]), cells, schedule, told, options["threads"])[0]


def summary(parity: dict[str, Any], latency: dict[str, Any]) -> str:
    """A line for every bundle: verdict, size, distance, answers, times."""
    times = {one["subject"]["name"]: one["cells"][0]["metrics"] for one in latency["subjects"]}
    rows = []
    for one in parity["candidates"]:
        name, metrics = one["subject"]["name"], one["metrics"]
        accuracy = metrics.get("accuracy", metrics["exact_match"])["value"]
        first, later = (times[name][key]["p50"] for key in ("time_to_first_token", "inter_token_latency"))
        kld = metrics["kld"]["value"] if "kld" in metrics else None
        told = ("" if kld is None else f"{kld:.2g}", f"{100 * accuracy:.1f} %", f"{first:.3g} ms", f"{later:.3g} ms")
        rows.append((one["verdict"], name, size(one["subject"]["bytes"]), *told))
    return table(rows, ("", "bundle", "size", "KLD", "right", "first token", "each further"))
