"""Rows answered by replicas of the model on a Ray cluster, through Ray Data.

Rows travel in blocks, each to the replica that is free; a replica that dies is started again and its blocks are
answered once more, of which the output keeps one answer.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import OneVisionError
from .answer_file import Record
from .batch import BatchOptions, BatchRow, Cluster, answer_rows

_BLOCK = 4  # rows for each slot of a replica: few enough that little is answered again


class Replica:
    """A model in a Ray actor; answers blocks of rows."""

    def __init__(self, bundle: str, options: BatchOptions) -> None:
        from ..runtime.model import load

        self.model, self.options = load(bundle, **options.load), options

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """block: {"row": JSON of rows}. Returns {"record": JSON of records}."""
        rows = [BatchRow(**json.loads(row)) for row in block["row"]]
        records = list(answer_rows(rows, self.model, self.options))
        return {"record": [json.dumps(record) for record in records]}


def answer_on_ray(bundle: Path, rows: Sequence[BatchRow], options: BatchOptions, cluster: Cluster) -> Iterator[Record]:
    """Answers as blocks end. Raises OneVisionError where Ray is missing, or gives up."""
    ray = connected(cluster.address)
    data = import_module("ray.data")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data.DataContext.get_current().enable_progress_bars = False  # our own tells rows, not blocks
    size = max(1, min(_BLOCK * options.slots, math.ceil(len(rows) / cluster.replicas)))
    items = [{"row": json.dumps(asdict(row))} for row in rows]
    answered = data.from_items(items, override_num_blocks=math.ceil(len(items) / size)).map_batches(
        Replica,
        fn_constructor_args=(str(bundle.resolve()), options),
        batch_size=size,
        compute=data.ActorPoolStrategy(size=cluster.replicas),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus or None,
    )
    try:
        for row in answered.iter_rows():
            yield json.loads(row["record"])
    except ray.exceptions.RayError as error:
        raise OneVisionError(f"Ray gave up: {str(error).strip().splitlines()[-1]}") from error


def connected(address: str | None) -> Any:
    """Ray, connected to a cluster or to a new one on this machine. Raises OneVisionError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise OneVisionError("Ray is not installed: pip install 'onevision-edge[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise OneVisionError(f"{address or 'Ray on this machine'}: cannot connect: {error}") from error
    return ray
