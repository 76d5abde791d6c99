"""How near decode comes to what memory allows: bytes that a step reads, against the bandwidth measured here.

Source: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model" (2009). A decode step
reads every weight of the decoder once, and the keys and values of all sequences.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from ...bundle import Bundle, GraphSpec
from ...engines.cpu.record import read_record
from ...precision import float_format
from ...runtime.memory import memory_field
from ...runtime.processor import physical_cores
from ..subject import CPU_ENGINE, ONNXRUNTIME

_LEAST_BUFFER = 1 << 28
_REPEATS = 5
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def memory_bandwidth(threads: int | None = None) -> float:
    """Bytes a second that threads (None: one per core) read from memory: the median of a few passes over a buffer.

    The buffer is larger than all caches. numpy's maximum reads as fast as a dot product here, 47 GB/s on two cores.
    """
    threads = threads or physical_cores()
    parts = [np.ones(_buffer_bytes() // threads // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return median(_pass(pool, parts) for _ in range(_REPEATS))


def _pass(pool: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    started = perf_counter()
    list(pool.map(np.max, parts))
    return sum(part.nbytes for part in parts) / (perf_counter() - started)


def _buffer_bytes() -> int:
    """Four times the largest cache, as far as memory allows."""
    available = memory_field("MemAvailable")
    wanted = max(_LEAST_BUFFER, 4 * largest_cache())
    return wanted if available is None else min(wanted, available // 4)


def largest_cache(root: Path = _CACHES) -> int:
    """Bytes of the largest cache of the CPU; 0 where the system does not tell."""
    sizes = (path.read_text().strip() for path in root.glob("index*/size"))
    return max((_kilobytes(text) for text in sizes), default=0)


def _kilobytes(text: str) -> int:
    """Bytes of a size as the kernel writes it, such as 32768K."""
    return int(text.removesuffix("K")) * 1024 if text.removesuffix("K").isdecimal() else 0


def weight_bytes(bundle: Bundle, backend: str) -> int | None:
    """Bytes of weights and scales that a decode step reads; None where the backend does not tell."""
    record = read_record(bundle) if backend == CPU_ENGINE else None
    if record is not None:
        return record.parts["decoder"].bytes_per_row if "decoder" in record.parts else None
    return _graph_bytes(bundle.graph("decoder"), backend)


def _graph_bytes(spec: GraphSpec, backend: str) -> int:
    """Of the plain graph, or an engine of its format. ONNX Runtime's CPU provider widens FP16 and NVFP4."""
    found = sum(spec.weights.values())
    if backend != ONNXRUNTIME:
        return found
    if spec.wide is not None:
        found += sum(weight.shape[0] * weight.shape[1] // 2 for weight in spec.wide.weights)
    return found + spec.weights.get("fp16", 0)


def cache_bytes(bundle: Bundle, backend: str, tokens: int) -> int:
    """Bytes of keys and values of one sequence of `tokens`, which a decode step reads."""
    text, spec = bundle.manifest.model.text, bundle.graph("decoder")
    heads = 2 * text.num_hidden_layers * text.num_key_value_heads * tokens
    if backend == CPU_ENGINE:
        return heads * (text.head_dim + 4)  # codes, and a scale for each row
    return heads * text.head_dim * (1 if spec.int8_cache else float_format(spec.dtype).itemsize)


def bytes_per_token(bundle: Bundle, backend: str, context: float, batch: int) -> int | None:
    """Bytes read for one new token behind `context` tokens, weights being shared by `batch` sequences."""
    weights = weight_bytes(bundle, backend)
    if weights is None:
        return None
    return round(weights / batch + cache_bytes(bundle, backend, 1) * context)


def roofline_share(token_bytes: int, batch: int, step_seconds: float, bandwidth: float) -> float:
    """The least time of a step over the time that it took: 1 is as fast as memory can be read.

    More than 1 where the weights stay in the caches, which are faster.
    """
    return token_bytes * batch / bandwidth / step_seconds
