"""onevision-edge bench"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import print_json, progress, say, table
from .engines_option import engines_of

if TYPE_CHECKING:
    from ..report.latency.cells import Cell


def _sizes(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int] | None]:
    """Sizes of images, read here so that a wrong one is wrong usage."""
    from ..errors import OneVisionError
    from ..report.latency.cells import read_size

    try:
        return [read_size(value) for value in values]
    except OneVisionError as error:
        raise click.BadParameter(str(error), context, option) from error


def _many(name: str, default: int, text: str) -> Any:
    return click.option(
        name, type=click.IntRange(1), multiple=True, default=(default,), show_default=True, metavar="N", help=text
    )


@click.command()
@click.argument("paths", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--peer", "peers", multiple=True, metavar="PEER=PATH", help="transformers, llama.cpp or openvino, too.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for the report.")
@click.option(
    "--image",
    "sizes",
    multiple=True,
    metavar="WxH",
    callback=_sizes,
    help="Size of a sequence's image in pixels; none: text alone.  [default: one that all take, at most 448x448]",
)
@_many("--prompt-tokens", 64, "Of text, besides those of the image.")
@_many("--output-tokens", 32, "Of the answer; end tokens are ignored.")
@_many("--batch", 1, "Sequences at a time.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Requests of each cell.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Requests before them.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of images and prompts.")
@click.option("--threads", type=click.IntRange(1), help="Of each subject; one per physical core if not given.")
@click.option(
    "--engines",
    metavar="TARGET",
    help="Run engines as built for TARGET; auto: those for this GPU; none: ONNX Runtime.  [default: cpu, if built]",
)
@click.option("--profile", is_flag=True, help="Where a request's time goes, by module and by operation.")
@click.option(
    "--exportTimes", "times", type=click.Path(path_type=Path, dir_okay=False), help="Every request, as trtexec does."
)
@click.option(
    "--format",
    "shape",
    type=click.Choice(["record", "optimum-benchmark"]),
    default="record",
    show_default=True,
    help="Of --json; optimum-benchmark is a list, a benchmark for each subject and cell.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
@click.option("--baseline", type=click.Path(path_type=Path), help="An earlier latency.json to compare with.")
@click.option(
    "--max-regression",
    type=click.FloatRange(0),
    metavar="PERCENT",
    help="With --baseline: exit with 1 where a median is worse by more.  [default: 10]",
)
def bench(
    paths: tuple[Path, ...],
    peers: tuple[str, ...],
    output: Path | None,
    times: Path | None,
    shape: str,
    as_json: bool,
    baseline: Path | None,
    max_regression: float | None,
    threads: int | None,
    engines: str | None,
    **options: Any,
) -> None:
    """Time bundles side by side: first token, further tokens, stages, memory, against the first of them.

    Each subject runs in a process of its own; they answer the same seeded requests in turn, round by round. What is
    known from earlier requests is not used, and nothing is drafted. On a machine that others use, trust the ratios.
    """
    if max_regression is not None and baseline is None:
        raise click.UsageError("--max-regression needs --baseline, the record to compare with")
    from ..report.files import open_folder, write_latency
    from ..report.latency.bench import bench as measured
    from ..report.latency.formats import export_times, optimum_benchmarks
    from ..report.latency.plan import contenders, open_bundles
    from ..report.latency.regression import read_record
    from ..report.latency.rounds import Schedule
    from ..report.record import write_json

    open_folder(output)
    earlier = read_record(baseline) if baseline is not None else None
    bundles = open_bundles(paths)
    cells = _cells(options, bundles)
    found = contenders(bundles, peers, cells, threads, engines_of(engines))
    schedule = Schedule(options["rounds"], options["warmup"], options["seed"], options["profile"])
    with progress("bench", "requests") as report:
        record, samples = measured(found, cells, schedule, report, threads)
    if times is not None:
        write_json(times, export_times(samples))
    if output is not None:
        write_latency(output, record)
        if shape != "record":
            write_json(output / "optimum-benchmark.json", optimum_benchmarks(samples))
        say(f"wrote {output}: latency.json, latency.md, index.html")
    if as_json:
        print_json(record if shape == "record" else optimum_benchmarks(samples))
    else:
        _show(record)
    if earlier is not None:
        _gate(record, earlier, 10.0 if max_regression is None else max_regression)


def _cells(options: Mapping[str, Any], bundles: Mapping[str, Any]) -> "list[Cell]":
    from ..report.latency.cells import grid
    from ..report.latency.plan import common_size

    sizes = options["sizes"] or [common_size(list(bundles.values()))]
    return grid(sizes, options["prompt_tokens"], options["output_tokens"], options["batch"])


def _show(record: Mapping[str, Any]) -> None:
    from ..report.page.latency_markdown import tables

    for part in tables(record):
        click.echo(f"\n{part.title}\n{table(part.rows, part.header)}")
        if part.note:
            click.echo(part.note)


def _gate(record: Mapping[str, Any], earlier: Mapping[str, Any], percent: float) -> None:
    """Raise OneVisionError, which names what became worse."""
    from ..errors import OneVisionError
    from ..report.latency.regression import regressions

    lines = regressions(record, earlier, percent)
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        for line in lines[1:]:
            say(line)
        raise OneVisionError(f"{lines[0]}{more}")
    say(f"no median is more than {percent:g} % worse than the baseline's")
