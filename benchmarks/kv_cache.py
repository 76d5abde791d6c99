"""Time of one decode step with the KV cache bound in place, and with the copy that plain arrays cost.

    python benchmarks/kv_cache.py [CHECKPOINT] [--dtype fp32] [--lengths 512,4096,32768] [--steps 50]

Each length is a decoder of its own, with `length` cache rows of which the first 64 are in use, so that what
differs between lengths is the cache alone. Steps of both kinds alternate; the table gives their medians.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.export.checkpoint import locate
from onevision_edge.runtime.backend import Graph, SessionOptions
from onevision_edge.runtime.cache import Decoder, KVCache

POSITION = 64


@click.command()
@click.argument("checkpoint", default="demo")
@click.option("--dtype", default="fp32", type=click.Choice(["fp32", "fp16"]))
@click.option("--lengths", default="512,4096,32768", help="Cache rows, comma-separated.")
@click.option("--steps", default=50, help="Steps of each kind.")
@click.option("--threads", default=1)
def main(checkpoint: str, dtype: str, lengths: str, steps: int, threads: int) -> None:
    """Print cache size and median step times for each length."""
    print("rows    cache MB    in place ms    copied ms")
    for length in map(int, lengths.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            bundle = _decoder_bundle(locate(checkpoint), Path(directory), dtype, length)
            cache, in_place, copied = _measure(bundle, steps, threads)
        print(f"{length:<7} {cache / 1e6:<11.1f} {in_place * 1e3:<14.2f} {copied * 1e3:.2f}")


def _decoder_bundle(checkpoint: Path, directory: Path, dtype: str, length: int) -> Bundle:
    """Export the decoder for `length` rows, whatever the checkpoint's own limit."""
    longer = directory / "checkpoint"
    longer.mkdir()
    for file in checkpoint.resolve().iterdir():
        (longer / file.name).symlink_to(file)
    config = json.loads((longer / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = length
    (longer / "config.json").unlink()
    (longer / "config.json").write_text(json.dumps(config))
    return onevision_edge.export(longer, directory / "bundle", dtype=dtype, max_length=length, parts=["decoder"])


def _measure(bundle: Bundle, steps: int, threads: int) -> tuple[int, float, float]:
    """Bytes of the cache, and median seconds of a step in place and copied."""
    spec, text = bundle.graph("decoder"), bundle.manifest.model.text
    graph = Graph(bundle.path(spec.file), spec, SessionOptions(threads=threads))
    cache = KVCache(text, bundle.manifest.max_length, 1, graph.fmt.numpy)
    for array in (array for layer in cache.layers for array in layer):
        array.fill(0.5)  # every page is there, so that the copy is one of real memory
    decoder = Decoder(graph, cache, text.vocab_size)
    embeds = np.ones((1, 1, text.hidden_size), graph.fmt.numpy)
    starts, rows = np.array([POSITION]), np.zeros((1, 1), np.int64)
    inputs = {
        "inputs_embeds": embeds,
        "position_ids": starts[None],
        "write_indices": starts,
        "valid_length": starts + 1,
        "logits_indices": rows,
    }
    for i, (key, value) in enumerate(cache.layers):
        inputs |= {f"past_key.{i}": key, f"past_value.{i}": value}
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        times[0].append(_seconds(lambda: decoder(embeds, starts, rows)))
        times[1].append(_seconds(lambda: graph.run(inputs)))
    return cache.nbytes, median(times[0]), median(times[1])


def _seconds(action: Callable[[], object]) -> float:
    started = perf_counter()
    action()
    return perf_counter() - started


if __name__ == "__main__":
    main()
