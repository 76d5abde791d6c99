"""What this machine can do at most: bytes read and products per second, as measured here."""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onevision_edge.runtime.processor import cpu_flags, cpu_name

from .engines import MEASUREMENTS, Text, cache_bytes, weight_bytes, weights
from .worker import seconds

SOURCE = Path(__file__).with_name("bandwidth.c")


@dataclass(frozen=True, slots=True)
class Roofline:
    """read: bytes a second by number of threads. products: additions and multiplications a second by kind."""

    read: Mapping[int, float]
    products: Mapping[str, float]

    def or_better(self, other: "Roofline") -> "Roofline":
        """The higher of each rate: what disturbs a measurement lowers it."""
        read = {threads: max(rate, other.read[threads]) for threads, rate in self.read.items()}
        products = {kind: max(rate, other.products.get(kind, 0)) for kind, rate in self.products.items()}
        return Roofline(read, products)

    def text_seconds(self, what: str, text: Text, shape: Mapping[str, int]) -> float:
        """The least that a measurement of the text half takes: bytes for decode, products for prefill."""
        measurement = MEASUREMENTS[what]
        tokens = measurement.arguments[0]
        if measurement.method == "decode":
            return (weight_bytes(text, shape) + cache_bytes(text, shape, tokens)) / max(self.read.values())
        layers, head = weights(shape)
        width = shape["num_attention_heads"] * shape["head_dim"]
        return self._seconds(2 * layers * tokens + 2 * head, 2 * shape["num_hidden_layers"] * width * tokens**2)

    def vision_seconds(self, height: int, width: int, shape: Mapping[str, int]) -> float:
        """The least that the tower takes. shape: vision_config of a checkpoint."""
        rows, hidden, joined = height * width + 1, shape["hidden_size"], 4 * shape["hidden_size"]
        block = hidden * (4 * hidden + 2 * shape["intermediate_size"])
        merger = joined * (joined + shape["text_hidden_size"])
        linear = 2 * rows * (shape["depth"] * block + merger / 4)
        return self._seconds(linear, 4 * shape["depth"] * hidden * rows**2)

    def _seconds(self, linear: float, attention: float) -> float:
        """Products with weights at the best rate that there is, attention in floats."""
        floats = max(rate for kind, rate in self.products.items() if "INT8" not in kind)
        return linear / max(self.products.values()) + attention / floats


def read_rates(folder: Path, threads: int) -> dict[int, float]:
    """Bytes a second that one thread reads, and all of them: by a C program, or numpy without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return {1: _numpy_read_rate()}
    program = folder / "bandwidth"
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", SOURCE, "-o", program], check=True)
    return {n: float(subprocess.check_output([program, str(n)])) for n in dict.fromkeys((1, threads))}


def _numpy_read_rate() -> float:
    values = np.ones(1 << 26, np.uint64)
    return values.nbytes / min(seconds(values.sum) for _ in range(5))


def cpu() -> dict[str, Any]:
    """The processor's name, and those of its extensions that matter here."""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "avx_vnni", "asimddp", "i8mm")
    flags = cpu_flags()
    return {"processor": cpu_name(), "extensions": [flag for flag in known if flag in flags]}
