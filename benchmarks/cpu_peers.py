"""Our CPU path beside its peers: the same seeded weights, the same machine, in turns.

    python benchmarks/cpu_peers.py --setup --work /some/disk
    python benchmarks/cpu_peers.py --shape s --work /some/disk [--rounds 5] [--plot FILE.svg] [--json]
    python benchmarks/cpu_peers.py --shape s --work /some/disk --engines 'ours*;llama*' --cells 'decode*'

The first call installs the peers from PyPI into DIR/peers, llama.cpp compiled for this processor; what cannot be had
is left out of the second with the reason. Decode is the median of single greedy steps behind a context, prefill the
time to a prompt's first token, both of one sequence; the first token is that of one image of 1036 x 728 and 64 tokens
of prompt, ours as a whole, a peer's as the best tower and the best decoder one after the other. Ratios are those of
medians, above 1 where ours is better, with the range over the rounds. Shares in brackets are of the roofline: bytes
of weights and cache at the measured bandwidth for decode, products at the best rate of a library otherwise.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
from cpu.accuracy import APART, distance_record
from cpu.engines import CELLS, ENGINES, Engine
from cpu.figure import figure
from cpu.files import Files, UnavailableError
from cpu.install import install
from cpu.machine import Roofline, cpu, read_rates
from cpu.peaks import PEAKS
from cpu.report import cell_record, cell_table, engine_records, engine_table, least_seconds
from cpu.rounds import Pool, Worker, command_of, run_rounds, wait_until_quiet

from onevision_edge.cli.console import say, size
from onevision_edge.config import read_json
from onevision_edge.runtime.memory import memory_field

VERSIONS = (
    *("torch", "transformers", "openvino", "openvino-genai", "nncf", "optimum-intel"),
    *("onnxruntime", "onnxruntime-genai", "llama-cpp-python"),
)
ROWS = 2048 + 256  # of a KV cache


def matching(names: Sequence[str], patterns: str | None) -> list[str]:
    """Names that one of some patterns fits, separated by semicolons; all without any."""
    if patterns is None:
        return list(names)
    wanted = [pattern.strip() for pattern in patterns.split(";")]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in names):
            raise click.UsageError(f"{pattern!r} fits none of {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]


def available(engines: Sequence[Engine], files: Files) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of every engine that can be had, and why the others cannot."""
    models, skipped = {}, {}
    for engine in engines:
        try:
            models[engine.name] = engine.files(files)
        except UnavailableError as error:
            skipped[engine.name] = str(error)
            say(f"{engine.name}: skipped: {error}")
    return models, skipped


def measured_roofline(python: Path, work: Path, threads: int, patience: float, skipped: dict[str, str]) -> Roofline:
    """Bandwidth and the rates of products; a rate that cannot be had is skipped."""
    wait_until_quiet(patience)
    read, products = read_rates(work, threads), {}
    command = [str(python), "-m", "cpu.worker", "cpu.peaks:Peaks", json.dumps({"threads": threads})]
    with closing(Worker(command, work / "workers.log")) as worker:
        for name, (method, kind) in PEAKS.items():
            wait_until_quiet(patience)
            try:
                products[name] = worker.ask(method, kind)
            except UnavailableError as error:
                skipped[name] = str(error)
    return Roofline(read, products)


def versions(python: Path) -> dict[str, str]:
    """Of the peers' packages, and of what runs ours."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.check_output([python, "-c", code], text=True))
    theirs = {name.lower().replace("_", "-"): version for name, version in found.items()}
    ours = {"python": platform.python_version(), "onnxruntime, ours": importlib.metadata.version("onnxruntime")}
    return {**ours, **{name: theirs[name] for name in VERSIONS if name in theirs}}


def accuracy(
    files: Files, engines: Sequence[Engine], cells: Sequence[str], options: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """The cells that are distances from full precision."""
    return {
        cell: distance_record(cell, engines, APART[cell](files, engines, say, **options))
        for cell in cells
        if cell in APART
    }


def measured(
    work: Path, shape: str, cells: Sequence[str], names: Sequence[str], rounds: int, threads: int, patience: float
) -> dict[str, Any]:
    """Everything that `--json` prints."""
    peers = work / "peers" / "bin" / "python"
    python = peers if peers.exists() else Path(sys.executable)
    files = Files(work, shape, python, say)
    config = read_json(files.checkpoint() / "config.json")
    models, skipped = available([engine for engine in ENGINES if engine.name in names], files)
    engines = [engine for engine in ENGINES if engine.name in models]
    roofline = measured_roofline(python, work, threads, patience, skipped)
    text = config["text_config"]
    options = {"threads": threads, "rows": ROWS, "vocab_size": text["vocab_size"]}
    commands = {engine.name: command_of(engine, python, models[engine.name], **options) for engine in engines}
    wanted = list(dict.fromkeys(what for cell in cells if cell in CELLS for what in CELLS[cell]))
    with closing(Pool(models, commands, work / "workers.log")) as pool:
        samples, failed = run_rounds(pool, engines, wanted, rounds, shape == "s", patience, say)
    roofline = roofline.or_better(measured_roofline(python, work, threads, patience, {}))
    timed = [cell for cell in cells if cell in CELLS]
    limits = {cell: least_seconds(cell, engines, roofline, config) for cell in timed}
    found = {cell: cell_record(cell, engines, samples, limits[cell]) for cell in timed}
    found |= accuracy(files, engines, cells, options)
    return {
        "shape": shape,
        "cells": {cell: record for cell, record in found.items() if record},
        "engines": engine_records(engines, pool.loads, pool.peaks, text),
        "roofline": {"read_bytes_per_s": roofline.read, "operations_per_s": roofline.products},
        "machine": {**cpu(), "cores": os.cpu_count(), "threads": threads, "memory": memory_field("MemTotal")},
        "versions": versions(python),
        "skipped": {**skipped, **failed},
        "rounds": rounds,
    }


def summary(record: Mapping[str, Any]) -> str:
    """The tables, and what else there is to know."""
    read, products = record["roofline"].values()
    limits = [f"{rate / 1e9:.1f} GB/s read by {threads}" for threads, rate in read.items()]
    limits += [f"{name} {rate / 1e12:.2f} T/s" for name, rate in products.items()]
    machine = record["machine"]
    parts = [
        f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory'])}: {', '.join(limits)}",
        cell_table(record["cells"]),
        engine_table(record["engines"]),
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "\n".join(f"{name}: skipped: {reason}" for name, reason in record["skipped"].items()),
    ]
    return "\n\n".join(part for part in parts if part)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Directory of peers, models and logs.")
@click.option("--setup", is_flag=True, help="Install the peers into WORK/peers, and stop.")
@click.option("--shape", type=click.Choice(["s", "4b"]), default="s", show_default=True)
@click.option(
    "--cells", "cell_patterns", metavar="PATTERNS", help=f"Of {', '.join((*CELLS, *APART))}; semicolons between."
)
@click.option("--engines", "engine_patterns", metavar="PATTERNS", help="Of the engines' names; semicolons between.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--patience", default=20.0, show_default=True, help="Seconds to wait for a quiet machine, each time.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the ratios there, as SVG.")
@click.option("--json", "as_json", is_flag=True)
def main(
    work: Path,
    setup: bool,
    shape: str,
    cell_patterns: str | None,
    engine_patterns: str | None,
    rounds: int,
    threads: int,
    patience: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure and print the table."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if setup:
        install(work / "peers", say)
        return
    cells = matching([*CELLS, *APART], cell_patterns)
    names = matching([engine.name for engine in ENGINES], engine_patterns)
    record = measured(work, shape, cells, names, rounds, threads, patience)
    if plot is not None:
        plot.write_text(figure(record["cells"], f"On {record['machine']['processor']}, shape {shape}"), "utf-8")
        say(f"wrote {plot}")
    click.echo(json.dumps(record, indent=1) if as_json else summary(record))


if __name__ == "__main__":
    main()
