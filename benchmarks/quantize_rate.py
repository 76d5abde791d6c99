"""How fast weights are quantised, per format: scales from the extremes, and by search.

    python benchmarks/quantize_rate.py [--shape 2560x9728] [--source bf16] [--dtype fp16] [--repeat 5]

The source is a checkpoint's tensor, [out, in], read through its transpose. GB/s are of the source; memory is
the most that one call holds beside its source and its result; the error is against the source, in
decibels of signal to noise, on normal weights.
"""

import tracemalloc
from collections.abc import Callable
from statistics import median
from time import perf_counter

import click
import ml_dtypes
import numpy as np

from onevision_edge.precision import FLOAT_FORMATS
from onevision_edge.precision.formats import ALL, Quantized, quantize

SOURCES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


@click.command()
@click.option("--shape", default="2560x9728", show_default=True, help="INxOUT")
@click.option("--source", default="bf16", type=click.Choice(list(SOURCES)), show_default=True)
@click.option("--dtype", default="fp16", type=click.Choice(list(FLOAT_FORMATS)), show_default=True)
@click.option("--repeat", default=5, show_default=True)
def main(shape: str, source: str, dtype: str, repeat: int) -> None:
    """Print rate, time, memory and error of each format."""
    inputs, outputs = map(int, shape.split("x"))
    weights = np.random.default_rng(0).standard_normal((outputs, inputs), np.float32) * np.float32(0.02)
    weights = weights.astype(SOURCES[source]).T
    print(f"{shape} {source} for a graph in {dtype}, medians of {repeat}")
    print(f"{'format':<15}{'scales':<9}{'GB/s':>6}{'seconds':>9}{'MB':>6}{'bits/weight':>13}{'dB':>7}")
    for form in ALL:
        for scales in ("extremes", "search"):

            def run(form=form, search=scales == "search") -> Quantized:
                return quantize(weights, form, FLOAT_FORMATS[dtype], search_scales=search)

            seconds, (memory, result) = median(_seconds(run) for _ in range(repeat)), _memory(run)
            columns = (weights.nbytes / seconds / 1e9, seconds, memory / 1e6, result.nbytes * 8 / weights.size)
            print(
                f"{form.name:<15}{scales:<9}{columns[0]:>6.2f}{columns[1]:>9.2f}{columns[2]:>6.0f}{columns[3]:>13.3f}"
                f"{_decibels(weights, result):>7.2f}"
            )


def _seconds(action: Callable[[], object]) -> float:
    started = perf_counter()
    action()
    return perf_counter() - started


def _memory(action: Callable[[], Quantized]) -> tuple[int, Quantized]:
    """The most bytes allocated at a time beside the result, and the result."""
    tracemalloc.start()
    result = action()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - kept, result


def _decibels(weights: np.ndarray, result: Quantized) -> float:
    exact = weights.astype(np.float32)
    noise = result.dequantize().astype(np.float32) - exact
    return float(10 * np.log10(np.square(exact).mean() / np.square(noise).mean()))


if __name__ == "__main__":
    main()
