"""What the tests of the cpu engine's kernels share: single steps put together by hand, and what they are to give."""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onevision_edge.engines.cpu import pack
from onevision_edge.runtime import cpu_library
from onevision_edge.runtime.cpu_library import Call, Pool, Step, pointers

KNOWN = ("units", "scales", "sums", "queries", "query_scales", "query_sums")
NAMES = {
    "op": cpu_library.OPS,
    "kind": cpu_library.KINDS,
    "weights": cpu_library.WEIGHTS,
    "prologue": cpu_library.PROLOGUES,
    "epilogue": cpu_library.EPILOGUES,
}
VALUES = {"int8": 4, "bf16": 2, "fp32": 1}  # of a row in a unit
GUARD = np.full(256, 0xA5, np.uint8)  # behind every buffer
EPS = 2.0**-24  # of one float32 operation

F64 = np.float64


def aligned(nbytes: int) -> np.ndarray:
    """Bytes that begin a vector, of no value in particular."""
    raw = np.full(nbytes + 64, 0xFF, np.uint8)  # NaN, as floats
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


@dataclass
class Bench:
    """Steps with their buffers and weights, for one call. Writing behind a buffer fails the run."""

    counts: Sequence[int]
    sequences: int = 1
    tokens: int = 1
    starts: Sequence[int] = (0,)
    indices: Sequence[int] = ()
    angles: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), np.float32))
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    capacity: int = 0
    _buffers: dict[str, np.ndarray] = field(default_factory=lambda: {name: aligned(len(GUARD)) for name in KNOWN})
    _weights: list[np.ndarray] = field(default_factory=list)
    _steps: list[Step] = field(default_factory=list)

    def put(self, name: str, values: np.ndarray) -> np.ndarray:
        """Make a buffer that holds these values; returns them where they lie."""
        room = aligned(values.nbytes + len(GUARD))
        room[values.nbytes :] = GUARD
        found = room[: values.nbytes].view(values.dtype).reshape(values.shape)
        found[...] = values
        self._buffers[name] = room
        return found

    def room(self, name: str, *shape: int, dtype: type = np.float32) -> np.ndarray:
        """Make a buffer of NaN, or of all bits set."""
        return self.put(name, aligned(math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape))

    def store(self, array: np.ndarray) -> int:
        """Where an array begins in the file of weights."""
        place = sum(len(part) for part in self._weights)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._weights.append(np.pad(data, (0, -len(data) % 64)))
        return place

    def step(self, op: str, **settings: Any) -> None:
        """Append a step."""
        buffers = list(self._buffers)
        found = Step(in_=-1, out=-1, w=-1, s=-1, b=-1)
        for name, value in {"op": op, **settings}.items():
            named = NAMES[name].index(value) if name in NAMES else value
            setattr(found, name, buffers.index(value) if name in ("in_", "out") else named)
        self._steps.append(found)

    def rows_for(self, kind: str, rows: int, n: int, group: int) -> None:
        """Make the buffers that prepared rows of n values need, and no more."""
        self.room("units", rows, -(-n // VALUES[kind]), dtype=np.uint32)
        groups = n // group if kind == "int8" else 0
        self.room("scales", rows, groups)
        self.room("sums", rows, groups, dtype=np.int32)

    def run(self, pool: Pool) -> None:
        """Run all steps."""
        call = Call(sequences=self.sequences, tokens=self.tokens, capacity=self.capacity)
        for i, count in enumerate(self.counts):
            call.counts[i] = count
        file = np.concatenate([*self._weights, np.zeros(128, np.uint8)])
        starts, indices = np.array(self.starts, np.int64), np.array(self.indices, np.int64)
        cosines, sines = np.cos(self.angles), np.sin(self.angles)
        buffers = pointers(list(self._buffers.values()))
        keys, values = pointers(self.keys), pointers(self.values)
        call.starts, call.indices, call.file = starts.ctypes.data, indices.ctypes.data, file.ctypes.data
        call.cosines, call.sines = cosines.ctypes.data, sines.ctypes.data
        call.buffers, call.keys, call.values = map(ctypes.addressof, (buffers, keys, values))
        pool.run((Step * len(self._steps))(*self._steps), len(self._steps), call)
        for name, room in self._buffers.items():
            if len(room) > len(GUARD):
                np.testing.assert_array_equal(room[-len(GUARD) :], GUARD, f"{name} was written beyond its end")


@dataclass(frozen=True)
class Form:
    """How a product runs, as engines/cpu/compile.py has it."""

    rows: str
    weights: str
    group: int = 2
    scale: float = 0.0

    def __str__(self) -> str:
        return f"{self.weights}-{self.group}{'-fixed' if self.scale else ''}"


@dataclass(frozen=True)
class Matrix:
    """Weights of a product: floats [in, out], or codes with scales [groups, out]."""

    values: np.ndarray
    scales: np.ndarray | None = None

    @classmethod
    def random(cls, form: Form, inputs: int, outputs: int, seed: int = 0) -> "Matrix":
        """Weights of a form; codes reach both ends of their range."""
        random = np.random.default_rng(seed)
        if form.rows != "int8":
            return cls(random.standard_normal((inputs, outputs)).astype(np.float32))
        four = form.weights == "codes4"
        codes = random.integers(-8, 8, (inputs, outputs)) if four else random.integers(-127, 128, (inputs, outputs))
        groups = inputs // form.group if four else 1
        return cls(codes.astype(np.int8), random.uniform(0.5, 2, (groups, outputs)).astype(np.float32) / 64)

    def packed(self, form: Form) -> np.ndarray:
        packers = {
            "codes4": pack.pack_int4,
            "codes8": pack.pack_int8,
            "pairs": pack.pack_bf16,
            "floats": pack.pack_fp32,
        }
        return packers[form.weights](self.values)

    def __getitem__(self, columns: slice) -> "Matrix":
        scales = None if self.scales is None else self.scales[:, columns]
        return Matrix(np.ascontiguousarray(self.values[:, columns]), scales)


def product(
    pool: Pool,
    x: np.ndarray,
    form: Form,
    weights: Matrix,
    *,
    epilogue: str = "write",
    bias: np.ndarray | None = None,
    out: np.ndarray | None = None,
    column: int = 0,
    prepare: dict[str, Any] | None = None,
) -> np.ndarray:
    """x [rows, in] by weights on the kernels. out: what the rows written to hold before, [rows, stride]."""
    rows, inputs = x.shape
    columns = weights.values.shape[1]
    n = columns // 2 if epilogue == "gated" else columns
    bench = Bench([rows])
    bench.rows_for(form.rows, rows, inputs, form.group)
    bench.put("x", x)
    found = bench.room("out", rows, n) if out is None else bench.put("out", out)
    bench.step(
        "rows",
        **{"in_": "x", "kind": form.rows, "n": inputs, "k": inputs, "stride": inputs}
        | {"group": form.group, "scale": form.scale}
        | (prepare or {}),
    )
    settings = {} if weights.scales is None else {"s": bench.store(pack.pack_scales(weights.scales))}
    if bias is not None:
        settings["b"] = bench.store(pack.padded(bias, pack.whole_panels(columns)))
    bench.step(
        "product",
        **{"in_": "x", "out": "out", "kind": form.rows, "weights": form.weights, "epilogue": epilogue, "n": n}
        | {"k": inputs, "group": form.group, "stride": found.shape[1], "column": column}
        | {"w": bench.store(weights.packed(form)), **settings},
    )
    bench.run(pool)
    return found


def rounded(x: np.ndarray, group: int, fixed: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """INT8 codes [rows, groups, group] and scales [rows, groups] of rows, in float32 as the kernels have it."""
    parts = x.reshape(len(x), -1, group)
    if fixed:
        scales = np.full(parts.shape[:2], fixed, np.float32)
        values = parts / np.float32(fixed)
    else:
        scales = np.abs(parts).max(-1) / np.float32(127)
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
        values = parts * inverse[..., None]
    return np.rint(np.clip(values, -127, 127)), scales


def bf16(x: np.ndarray) -> np.ndarray:
    """Floats rounded to BF16."""
    return (pack.bf16_bits(x).astype(np.uint32) << 16).view(np.float32)


def multiplied(x: np.ndarray, form: Form, weights: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 of what the rounding leaves, and how far float32 sums of the same may be from it.

    Every term is rounded twice or three times, and sums of n terms n times: n + 4 roundings of what the terms'
    magnitudes add up to are a bound, not an estimate.
    """
    if form.rows != "int8":
        rounding = bf16 if form.rows == "bf16" else np.asarray
        a, b = (rounding(m).astype(F64) for m in (x, weights.values))
        return a @ b, (len(b) + 4) * EPS * (np.abs(a) @ np.abs(b))
    assert weights.scales is not None
    codes, scales = rounded(x, form.group, form.scale)
    groups = codes.shape[1]
    w = weights.values.reshape(groups, form.group, -1).astype(F64)
    sums = codes.astype(F64).transpose(1, 0, 2) @ w  # exact
    terms = sums * scales.astype(F64).T[..., None] * weights.scales.astype(F64)[:, None]
    return terms.sum(0), (groups + 4) * EPS * np.abs(terms).sum(0)


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[F64])(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "write": lambda x: x,
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
}
# Of an activation, relative to what it is taken of: erf by a polynomial (1.5e-7), 2^x (2e-7) and some roundings.
ACTIVATION = 1e-6


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(F64)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(F64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps) * weight + bias
