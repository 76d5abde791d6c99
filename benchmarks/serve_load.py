"""`onevision-edge serve` under load, and under clients and signals that are not kind.

    python benchmarks/serve_load.py [BUNDLE] [--requests 200] [--concurrency 8] [--minutes 10] [--json FILE]
    python benchmarks/serve_load.py --only load --only rounds

Without BUNDLE the shipped model is exported. Questions are about the shipped held-out images: one, a large one,
several, none, a long answer, one in JSON; no two images have the same bytes, so that no cache spares the tower. The
runs, each of a server process of its own where it needs one:

    load      all questions, so many at a time: none is lost; times to the first text and between pieces
    rounds    one at a time and so many at a time in turns: the ratio of their rates, with its range
    leaving   every second client hangs up in the middle: the others lose nothing, and the server is idle soon
    memory    minutes of load: megabytes a minute by least squares, the first 30 % left out
    flood     40 at once to 2 slots and a queue of 4: 429 with Retry-After, and answers for those that were taken
    ending    SIGTERM with answers under way: they are finished, new ones get 503, exit code 0

Then the runtime answers the same questions alone, without a server: `alone` counts equal answers. The client takes a
part of the machine, too: 0.1 ms for each piece.
"""

import asyncio
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from serve.alone import compared
from serve.client import Reply
from serve.process import ServerProcess, command
from serve.questions import Questions

import onevision_edge
from onevision_edge.cli.console import say
from serve import report, runs

RUNS = ("load", "rounds", "leaving", "memory", "flood", "ending")
ROUNDS, ROUND = 11, 24  # times, and questions of each


def measured(
    bundle: Path, chosen: Sequence[str], requests: int, concurrency: int, minutes: float, options: Sequence[str]
) -> tuple[dict[str, Any], list[Reply]]:
    """The chosen runs' records, and the replies that were heard to their end."""
    record: dict[str, Any] = {}
    heard: list[Reply] = []

    def note(name: str, found: dict[str, Any], replies: Sequence[Reply] = ()) -> None:
        record[name] = found
        heard.extend(replies)
        say(report.text({name: found}))

    with ServerProcess(command(bundle, *options)) as server:
        if "load" in chosen:
            note("load", *asyncio.run(runs.load(server, Questions(1).take(requests), concurrency)))
        if "rounds" in chosen:
            note("rounds", asyncio.run(runs.rounds(server, Questions(2).take, ROUND, concurrency, ROUNDS)))
        if "leaving" in chosen:
            note("leaving", *asyncio.run(runs.leaving(server, 64, concurrency, 3)))
        if "memory" in chosen:
            note("memory", asyncio.run(runs.memory(server, minutes, concurrency, 4)))
    if "flood" in chosen:
        with ServerProcess(command(bundle, *options, "--slots", "2", "--queue", "4")) as server:
            note("flood", *asyncio.run(runs.flood(server, 40, 5)))
    if "ending" in chosen:
        with ServerProcess(command(bundle, *options)) as server:
            note("ending", *asyncio.run(runs.ending(server, 6, 6)))
    return record, heard


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--requests", default=200, show_default=True, help="Questions of the load run.")
@click.option("--concurrency", default=8, show_default=True, help="Questions at a time.")
@click.option("--minutes", default=10.0, show_default=True, help="Of the memory run.")
@click.option("--threads", type=int, help="Of the server; one per physical core if not given.")
@click.option("--only", "chosen", multiple=True, type=click.Choice(RUNS), help="Of the runs; may be repeated.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where to write the record.")
def main(
    bundle: Path | None,
    requests: int,
    concurrency: int,
    minutes: float,
    threads: int | None,
    chosen: tuple[str, ...],
    output: Path | None,
) -> None:
    """Print what was found; exit code 1 where a question was lost or an answer differs."""
    with ExitStack() as stack:
        if bundle is None:
            bundle = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bundle"
            onevision_edge.export("demo", bundle, dtype="fp32")
        options = [] if threads is None else ["--threads", str(threads)]
        record, heard = measured(bundle, chosen or RUNS, requests, concurrency, minutes, options)
        record["alone"] = compared(onevision_edge.load(bundle, threads=threads), heard)
    record["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(report.text(record))
    lost = sum(found.get("lost", 0) for found in record.values())
    raise SystemExit(lost > 0 or record["alone"]["same"] < record["alone"]["compared"])


if __name__ == "__main__":
    main()
