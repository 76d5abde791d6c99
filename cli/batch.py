"""onevision-edge batch"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import print_json, progress, say
from .engines_option import engines_of

if TYPE_CHECKING:
    from ..serve.batch import BatchOptions, Cluster


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSONL file of rows, or a folder of images."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSONL file of answers to write.")
@click.option("--prompt", help="Asked about every image of a folder.  [default: Describe this image.]")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, help="Sample among the likeliest that hold this probability.")
@click.option("--top-k", type=int, default=0, help="Sample among the k likeliest tokens.")
@click.option("--seed", type=int, default=None)
@click.option("--stop", multiple=True, help="Text that ends an answer; may be repeated.")
@click.option("--min-pixels", type=click.IntRange(1), help="Smaller images are enlarged to this many pixels.")
@click.option("--max-pixels", type=click.IntRange(1), help="Larger images are shrunk to this many pixels.")
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True, help="Rows answered at a time.")
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; one per physical core if not given.")
@click.option("--engines", metavar="TARGET", help="As for run.")
@click.option("--retry-errors", is_flag=True, help="Ask rows again that could not be answered.")
@click.option("--overwrite", is_flag=True, help="Begin anew, whatever the output holds.")
@click.option("--ray", is_flag=True, help="On Ray: rows are spread over replicas of the model.")
@click.option("--ray-address", help="Of a cluster; files are read there under the same names.  [default: this machine]")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="With --ray: of the model.")
@click.option("--replica-cpus", type=float, default=1, show_default=True, help="With --ray: that one takes.")
@click.option("--replica-gpus", type=float, default=0, show_default=True, help="With --ray: that one takes.")
@click.option("--json", "as_json", is_flag=True, help="Print counts of rows as JSON.")
def batch(bundle: Path, data: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Answer all rows of a file or a folder, many at a time.

    Lines are appended to OUTPUT.partial as answers come and become OUTPUT, in the order of the rows, at the end.
    Killed, interrupted or out of disk, the same command goes on where it stopped; no row has two answers. A row that
    cannot be answered has an "error" instead of a "text".
    """
    from ..serve.batch import run_batch

    cluster = _cluster(options)
    with progress("batch", "rows") as report:
        summary = run_batch(bundle, data, output, _batch_options(options), cluster, report)
    if as_json:
        print_json(asdict(summary))
    failed = f", {summary.failed} could not be answered" if summary.failed else ""
    found = f" ({summary.found} by an earlier run)" if summary.found else ""
    say(f"wrote {output}: {summary.rows} rows{found}{failed}")


def _cluster(options: dict[str, Any]) -> "Cluster | None":
    from ..serve.batch import Cluster

    address, replicas = options["ray_address"], options["replicas"]
    if options["ray"]:
        return Cluster(address, replicas, options["replica_cpus"], options["replica_gpus"])
    if address is not None or replicas > 1:
        raise click.UsageError("--ray-address and --replicas need --ray")
    return None


def _batch_options(options: dict[str, Any]) -> "BatchOptions":
    from ..runtime.token_model import sampling_params
    from ..serve.batch import BatchOptions

    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    own = ("min_pixels", "max_pixels", "prompt", "slots", "retry_errors", "overwrite")
    return BatchOptions(
        params=sampling_params({name: options[name] for name in names}),
        load={"threads": options["threads"], "engines": engines_of(options["engines"])},
        **{name: options[name] for name in own},
    )
