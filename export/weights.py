"""Streaming of weights: from the checkpoint, through the format of the graph, into one data file per graph.

Memory holds the largest tensor once, in the checkpoint's format, plus a few blocks. The digest of what is
written and of what was read come out of the same pass.
"""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..bundle import BundleWriter, Progress
from ..errors import OneVisionError
from ..precision import BF16, FLOAT_FORMATS, FP16, FP32, FloatFormat
from .checkpoint import Checkpoint, StoredTensor
from .layers import Weight

BLOCK_BYTES = 1 << 20  # converted and written at a time: what the processor's cache holds
_TILE = 256  # values a side of what is transposed at a time: 128 kB, and whole cache lines of every row


class Stream:
    """A file being written and hashed while the next block is converted."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self.file, self.pool = file, pool
        self.digest = hashlib.sha256()
        self.position = 0
        self._pending: Future[None] | None = None

    def write(self, block: np.ndarray | bytes) -> None:
        """Append a contiguous block; it must not change until the next call returns."""
        view = memoryview(block) if isinstance(block, bytes) else _bytes(block)
        self.flush()
        self.position += len(view)
        self._pending = self.pool.submit(self._append, view)

    def align(self, boundary: int) -> None:
        """Pad with zeros so that the next block starts at a multiple of `boundary`."""
        self.write(bytes(-self.position % boundary))

    def flush(self) -> None:
        """Wait until everything is in the file."""
        if self._pending is not None:
            self._pending.result()

    def _append(self, view: memoryview) -> None:
        self.digest.update(view)
        while view:
            view = view[self.file.write(view) :]


# What parameters hold that are not the checkpoint's tensors as they are, by name, in the graph's layout: float32
# values where the graph's are floats, else the bytes as stored.
Values = Mapping[str, np.ndarray]
NO_VALUES: Values = {}


class WeightWriter:
    """Writes tensors of one checkpoint into the files of a bundle, with progress over all of them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: BundleWriter,
        progress: Progress,
        total: int,
        values: Values = NO_VALUES,
    ) -> None:
        self.checkpoint, self.writer, self.values = checkpoint, writer, values
        self.progress, self.total, self.done = progress, total, 0
        self.source_digests: dict[str, str] = {}
        self._hasher = ThreadPoolExecutor(1)

    def write_graph(self, model: ir.Model, weights: dict[str, Weight], file: str) -> None:
        """Write the graph to `file` and its weights to `file`.data."""
        data = file + ".data"
        with ThreadPoolExecutor(1) as pool, open(self.writer.path(data), "wb", buffering=0) as out:
            stream = Stream(out, pool)
            for name, weight in weights.items():
                self._write_weight(stream, name, weight, data)
            stream.flush()
        self.writer.seal(data, stream.digest.hexdigest())
        ir.save(model, self.writer.path(file))
        self.writer.seal(file)

    def write_table(self, name: str, fmt: FloatFormat, file: str) -> None:
        """Write a tensor as it is stored, rows in order, in format `fmt`."""
        shape = self.checkpoint.tensors[name].shape
        with ThreadPoolExecutor(1) as pool, open(self.writer.path(file), "wb", buffering=0) as out:
            stream = Stream(out, pool)
            self._pump(stream, self._straight(name, shape, fmt), name)
            stream.flush()
        self.writer.seal(file, stream.digest.hexdigest())

    def _write_weight(self, stream: Stream, name: str, weight: Weight, data: str) -> None:
        assert weight.dtype is not None
        stream.align(4096 if weight.nbytes >= 4096 else 64)
        start = stream.position
        self._pump(stream, self._given(name, weight) if name in self.values else self._read(name, weight), name)
        weight.const_value = ir.ExternalTensor(
            data, start, stream.position - start, weight.dtype, shape=ir.Shape(weight.stored_shape), name=name
        )

    def _read(self, name: str, weight: Weight) -> Iterator[np.ndarray]:
        """The checkpoint's values in the graph's layout and format, in blocks."""
        source = self.source_name(name)
        assert weight.source_shape is not None
        self.checkpoint.check(source, weight.source_shape)
        fmt = next(f for f in FLOAT_FORMATS.values() if f.onnx_type == weight.dtype)
        return (self._transposed if weight.transposed else self._straight)(source, weight.stored_shape, fmt)

    def _given(self, name: str, weight: Weight) -> Iterator[np.ndarray]:
        """Values that calibration made. Of the tensor they were made from, the digest is still taken."""
        if weight.source_shape is not None:
            self._digest(self.source_name(name))
        values, fmt = self.values[name], next((f for f in FLOAT_FORMATS.values() if f.onnx_type == weight.dtype), None)
        block = convert(values, fmt, name) if fmt else values
        if block.nbytes != weight.nbytes:
            raise OneVisionError(f"{name}: calibration made {block.nbytes} bytes, the graph holds {weight.nbytes}")
        yield np.ascontiguousarray(block)

    def _digest(self, source: str) -> None:
        stored, digest = self.checkpoint.tensors[source], hashlib.sha256()
        for block in self.checkpoint.read_rows(source, _block_rows(stored)):
            digest.update(_bytes(block))
        self.source_digests[source] = digest.hexdigest()

    def source_name(self, name: str) -> str:
        """The tensor that fills parameter `name`: the embedding table for a tied head."""
        return self.checkpoint.head_name if name == "lm_head.weight" else name

    def _pump(self, stream: Stream, blocks: Iterator[np.ndarray], label: str) -> None:
        for block in blocks:
            stream.write(block)
            self.done += block.nbytes
            self.progress(self.done, self.total, label)

    def _straight(self, name: str, shape: tuple[int, ...], fmt: FloatFormat) -> Iterator[np.ndarray]:
        """The tensor in blocks, in the order it is stored."""
        digest = hashlib.sha256()
        for block in self.checkpoint.read_rows(name, _block_rows(self.checkpoint.tensors[name])):
            digest.update(_bytes(block))
            converted = convert(block, fmt, name)
            # The reader reuses its buffer, and the stream still writes what it was given.
            yield converted.copy() if np.may_share_memory(converted, block) else converted
        self.source_digests[name] = digest.hexdigest()

    def _transposed(self, name: str, shape: tuple[int, ...], fmt: FloatFormat) -> Iterator[np.ndarray]:
        """[out, in...] as [in, out]: the tensor is read whole, its transpose made in slabs of rows."""
        inputs, outputs = shape
        values = self.checkpoint.read(name)
        digest = self._hasher.submit(hashlib.sha256, _bytes(values))
        # Moved as bits: numpy moves the values of an added dtype such as bfloat16 one call at a time.
        bits = values.reshape(outputs, inputs).view(f"u{values.itemsize}")
        rows = min(inputs, max(_TILE, BLOCK_BYTES // (outputs * fmt.itemsize)))
        slabs = [np.empty((rows, outputs), fmt.numpy) for _ in range(2)]  # one is written while one is filled
        for index, start in enumerate(range(0, inputs, rows)):
            stop = min(start + rows, inputs)
            slab = slabs[index % 2][: stop - start]
            for out in range(0, outputs, _TILE):
                part = np.ascontiguousarray(bits[out : out + _TILE, start:stop].T)
                slab[:, out : out + _TILE] = convert(part.view(values.dtype), fmt, name)
            yield slab
        self.source_digests[name] = digest.result().hexdigest()


def _block_rows(stored: StoredTensor) -> int:
    """Rows of a tensor that make a block."""
    return max(1, BLOCK_BYTES * stored.shape[0] // max(stored.size, 1))


def convert(values: np.ndarray, fmt: FloatFormat, name: str) -> np.ndarray:
    """`values` (BF16, FP16 or FP32) in format `fmt`, BF16 as its bits in uint16.

    Raises OneVisionError for NaN or infinity, and for values that `fmt` cannot hold.
    """
    result = _cast(values, fmt)
    if not _all_finite(result, fmt):
        if np.isfinite(values.astype(np.float32)).all():
            largest = float(np.abs(values.astype(np.float32)).max())
            wider, limit = "bf16 or fp32" if fmt is FP16 else "fp32", f"{fmt.name}'s {fmt.largest:.5g}"
            raise OneVisionError(f"tensor {name} reaches {largest:.4g}, beyond {limit}: export with --dtype {wider}")
        raise OneVisionError(f"tensor {name} holds NaN or infinity: the checkpoint is damaged")
    return result


def _cast(values: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    if fmt is BF16:
        return values.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)
    if values.dtype == ml_dtypes.bfloat16:
        return _from_bf16(fmt.name).take(values.view(np.uint16), mode="clip")
    with np.errstate(over="ignore"):
        return values.astype(fmt.numpy, copy=False)


@cache
def _from_bf16(name: str) -> np.ndarray:
    """Every BF16 value in format `name`, by its bits: a look-up converts at 1.7 GB/s, arithmetic at 0.4."""
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(FLOAT_FORMATS[name].numpy)


_EXPONENTS = {
    FP32.name: (np.uint32, 0x7F800000),
    FP16.name: (np.uint16, 0x7C00),
    BF16.name: (np.uint16, 0x7F80),
}


def _all_finite(values: np.ndarray, fmt: FloatFormat) -> bool:
    bits, exponent = _EXPONENTS[fmt.name]
    return not bool(((values.view(bits) & bits(exponent)) == exponent).any())


def source_digest(digests: dict[str, str]) -> str:
    """One digest of the tensors read, whatever files they were sharded into."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _bytes(values: np.ndarray) -> memoryview:
    """A contiguous array's memory."""
    return values.reshape(-1).view(np.uint8).data
