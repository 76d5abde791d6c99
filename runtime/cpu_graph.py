"""A graph that was built for the CPU, loaded: its program, its weights in a mapped file, the kernels that run it."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import GraphSpec
from ..config import VisionConfig, read_json
from ..errors import OneVisionError
from ..precision import FloatFormat, float32, float_format, from_float32
from .cpu_check import Needs, Place, check_shape
from .cpu_library import BUFFERS, EPILOGUES, KINDS, OPS, PROLOGUES, WEIGHTS, Call, Pool, Step, pointers
from .stitching import OnHost

_NAMES = {"op": OPS, "kind": KINDS, "weights": WEIGHTS, "prologue": PROLOGUES, "epilogue": EPILOGUES}
_ROWS_OF_TILE = 128
_IMAGES_TOKENS = 1 << 14  # rows of one vision call


@dataclass(slots=True)
class StepTimes:
    """Seconds of each step, as c_double that the kernels add to, in all calls so far."""

    seconds: Any
    calls: int = 0


class CpuGraph(OnHost):
    """A program and what it runs on. It takes what backend.Graph does, and its KV cache is of INT8 codes."""

    def __init__(self, folder: Path, part: str, spec: GraphSpec, pool: Pool) -> None:
        self.spec, self.pool, self._decoder = spec, pool, part == "decoder"
        self.fmt: FloatFormat = float_format(spec.dtype)
        path = folder / f"{part}.json"
        try:
            self._load(read_json(path), np.memmap(folder / f"{part}.weights", np.uint8, "r"))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            raise OneVisionError(
                f"{path} is not a program that this version reads ({error!r}): build it again"
            ) from error
        self._capacity: tuple[int, ...] = ()
        self._arrays: list[np.ndarray] = []
        self._addresses: Any = None  # of the arrays
        self._scratch: np.ndarray | None = None
        self._times: StepTimes | None = None

    def timed(self) -> StepTimes:
        """Times of `steps` that all later calls add to, where they do not bring an array of their own."""
        self._times = StepTimes((ctypes.c_double * len(self.steps))())
        return self._times

    def _load(self, program: Mapping[str, Any], weights: np.ndarray) -> None:
        self._weights = weights
        self._sizes = {name: {int(k): int(v) for k, v in each.items()} for name, each in program["buffers"].items()}
        named = [*BUFFERS, *(name for name in self._sizes if name not in BUFFERS)]
        self._buffers = {name: i for i, name in enumerate(named)}
        self.steps = [dict(step) for step in program["steps"]]
        self._steps = (Step * len(self.steps))(*map(self._step, self.steps))
        self._frequencies = np.array(program["frequencies"], np.float32).reshape(-1)
        self._class_angles = np.array(program["class_angles"], np.float32).reshape(-1)
        self.heads, self.kv_heads = int(program["heads"]), int(program["kv_heads"])
        self.head_dim, self.layers = int(program["head_dim"]), int(program["layers"])
        self._check(named)

    def _step(self, step: Mapping[str, Any]) -> Step:
        """A step as the kernels take it."""
        found = Step(in_=-1, out=-1, w=-1, s=-1, b=-1)
        for name, value in step.items():
            if name in _NAMES:
                if value not in _NAMES[name]:
                    raise ValueError(f"{name} is {value!r}")
                value = _NAMES[name].index(value)
            elif name in ("in_", "out"):
                value = self._buffers[value]
            setattr(found, name, value)
            if getattr(found, name) != value and name not in ("eps", "scale"):
                raise ValueError(f"{name} is {value!r}")
        return found

    def _check(self, buffers: Sequence[str]) -> None:
        """Raise ValueError where a step would leave its buffers, its cache or the file."""
        inputs = {tensor.name: tensor.shape for tensor in self.spec.inputs}
        output = next(tensor for tensor in self.spec.outputs if tensor.name in ("logits", "image_embeds"))
        place = Place(
            self._decoder,
            int(output.shape[-1]),
            len(self._weights),
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.layers,
        )
        needs = Needs(place, buffers)
        if self._decoder:
            caches = [shape for name, shape in inputs.items() if name.startswith("past_key.")]
            if {(self.kv_heads, self.head_dim)} != {(shape[1], shape[3]) for shape in caches}:
                raise ValueError("its cache has other heads than the graph's")
            if len(caches) != self.layers:
                raise ValueError(f"it has {self.layers} layers, and the graph {len(caches)}")
            check_shape(place, len(self._frequencies))
            needs.need("stream", 0, 4 * int(inputs["inputs_embeds"][-1]))
        else:
            check_shape(place, 2 * len(self._frequencies))
            check_shape(place, len(self._class_angles))
            if self.layers != 1 or sum(bool(step.skip_first) for step in self._steps) != 1:
                raise ValueError("it has other rows than a tower's")
            needs.need("input", 0, 4 * int(inputs["pixel_values"][-1]))
        for step in self._steps:
            needs.add(step)
        needs.check(self._sizes)

    cache_dtype = np.dtype(np.uint8)

    def images_per_call(self, config: VisionConfig, size: tuple[int, int]) -> int:
        """Images of a size (rows and columns of patches) that share a call; any size will do."""
        return max(1, _IMAGES_TOKENS // (size[0] * size[1] + 1))

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Keys or values of a cache of `shape` [batch, heads, rows, head_dim]: codes and, after a head's, their scales.

        Rows are filled up to whole tiles. Pages are taken from the system when they are written.
        """
        batch, heads, rows, width = shape
        return np.zeros((batch, heads, head_bytes(rows, width)), dtype)

    def bind(self) -> "CpuBinding":
        """A binding to run the decoder on a cache."""
        return CpuBinding(self)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The vision tower's image_embeds.

        inputs: pixel_values [images, patches, patch_dim] and patch_positions [patches, 2].
        """
        with self.pool.lock:
            return [self._encode(float32(inputs["pixel_values"], self.fmt), inputs["patch_positions"])]

    def _encode(self, pixels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        images, patches = pixels.shape[:2]
        joined = self._joined
        if patches % joined:
            raise OneVisionError(f"{patches} patches do not make whole tokens of {joined}")
        angles = positions.astype(np.float32)[:, :, None] * self._frequencies
        angles = np.vstack([self._class_angles[None], angles.reshape(patches, -1)])
        angles = np.tile(angles, (images, 1))
        merged = self.spec.outputs[0].shape[-1]
        tokens = images * patches // joined
        output = np.empty((tokens, int(merged)), np.float32)
        call = Call(sequences=images, tokens=patches + 1, capacity=whole_tiles(patches + 1))
        held = self._prepare(call, (images * patches, images * (patches + 1), tokens), angles, output)
        self._array("input")[: pixels.size * 4].view(np.float32)[:] = pixels.reshape(-1)
        starts = np.zeros(images, np.int64)
        call.starts = starts.ctypes.data
        half = images * self.kv_heads * head_bytes(patches + 1, self.head_dim)
        if self._scratch is None or self._scratch.size < 2 * half:
            self._scratch = np.zeros(2 * half, np.uint8)
        caches = [pointers([self._scratch[start:]]) for start in (0, half)]
        call.keys, call.values = map(ctypes.addressof, caches)
        self.execute(call)
        del held
        return from_float32(output.reshape(images, -1, int(merged)), self.fmt)

    def decode(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        starts: np.ndarray,
        rows: np.ndarray,
        cache: tuple[Any, Any, int],
        output: np.ndarray,
        seconds: Any = None,
    ) -> None:
        """Append tokens [batch, tokens, D] to a cache and write the logits of some of them, [batch, n, vocab].

        positions: [batch, tokens]; starts: [batch]; rows: [batch, n]. cache: addresses of keys and of values by layer,
        and rows of each. seconds: c_double of each step, to add their times to.
        """
        batch, tokens = embeds.shape[:2]
        starts = np.ascontiguousarray(starts, np.int64)
        wanted = np.ascontiguousarray((rows + tokens * np.arange(batch)[:, None]).reshape(-1), np.int64)
        angles = positions.reshape(-1, 1).astype(np.float32) * self._frequencies
        keys, values, capacity = cache
        call = Call(sequences=batch, tokens=tokens, capacity=capacity)
        with self.pool.lock:
            held = self._prepare(call, (batch * tokens, len(wanted)), angles, output)
            self._array("stream")[: 4 * embeds.size].view(np.float32)[:] = float32(embeds, self.fmt).reshape(-1)
            call.starts, call.indices = starts.ctypes.data, wanted.ctypes.data
            call.keys, call.values = ctypes.addressof(keys), ctypes.addressof(values)
            self.execute(call, seconds)
            del held

    @property
    def _joined(self) -> int:
        """Patches that make one token."""
        step = next(step for step in self.steps if step.get("skip_first"))
        return int(step["n"]) // int(step["k"])

    def execute(self, call: Call, seconds: Any = None) -> None:
        """Run all steps on a call that was prepared. seconds: c_double of each step, to add their times to."""
        if seconds is None and self._times is not None:
            seconds = self._times.seconds
            self._times.calls += 1
        self.pool.run(self._steps, len(self._steps), call, seconds)

    def _prepare(self, call: Call, counts: tuple[int, ...], angles: np.ndarray, output: np.ndarray) -> Any:
        """Fill in what all calls have. Returns what must live as long as the call."""
        self._grow(counts)
        cosines, sines = np.cos(angles), np.sin(angles)
        self._addresses[self._buffers["output"]] = output.ctypes.data
        for i, count in enumerate(counts):
            call.counts[i] = count
        call.cosines, call.sines = cosines.ctypes.data, sines.ctypes.data
        call.file, call.buffers = self._weights.ctypes.data, ctypes.addressof(self._addresses)
        return cosines, sines

    def _grow(self, counts: tuple[int, ...]) -> None:
        """Buffers for so many rows of each kind; memory that is never written is never taken."""
        if self._capacity and all(new <= old for new, old in zip(counts, self._capacity, strict=True)):
            return
        self._capacity = tuple(map(max, counts, self._capacity or counts))
        # The output's place is filled by each call.
        sizes = {name: self._sizes.get(name, {}) if name != "output" else {} for name in self._buffers}
        self._arrays = [_aligned(buffer_bytes(each, self._capacity)) for each in sizes.values()]
        self._addresses = pointers(self._arrays)

    def _array(self, buffer: str) -> np.ndarray:
        return self._arrays[self._buffers[buffer]]


class CpuBinding:
    """The decoder's program with a cache: takes what backend.Binding does."""

    def __init__(self, graph: CpuGraph) -> None:
        self.graph = graph
        self._caches: dict[str, np.ndarray] = {}
        self._inputs: dict[str, np.ndarray] = {}
        self._output = np.empty(0, np.float32)
        self._pointers: Any = None

    def input(self, name: str, array: np.ndarray) -> None:
        """Bind a contiguous array to an input."""
        self._inputs[name] = array

    def in_place(self, past: str, present: str, array: np.ndarray) -> None:
        """Bind one contiguous array, made by the graph's `zeros`, to an input and to the output that updates it."""
        self._caches[past] = array

    def output(self, name: str, array: np.ndarray) -> None:
        """Bind a contiguous array to receive the logits."""
        self._output = array

    def run(self, seconds: Any = None) -> None:
        """Run on what is bound. seconds: c_double of each step, to add their times to."""
        found = self._inputs
        capacity = self._capacity()
        self.graph.decode(
            found["inputs_embeds"],
            found["position_ids"],
            found["write_indices"],
            found["logits_indices"],
            (*self._pointers, capacity),
            self._output,
            seconds,
        )

    def _capacity(self) -> int:
        """Rows of a cache; its addresses are taken at the first call."""
        if self._pointers is None:
            layers = range(self.graph.layers)
            keys, values = ([self._caches[f"past_{kind}.{i}"] for i in layers] for kind in ("key", "value"))
            self._pointers = pointers(keys), pointers(values)
        return int(self._caches["past_key.0"].shape[-1]) // (self.graph.head_dim + 4)


def whole_tiles(rows: int) -> int:
    """Rows of a cache, filled up to what attention reads at a time."""
    return -(-rows // _ROWS_OF_TILE) * _ROWS_OF_TILE


def head_bytes(rows: int, width: int) -> int:
    """Bytes of one head's keys, or values, in a cache of so many rows: codes and their scales."""
    return whole_tiles(rows) * (width + 4)


def buffer_bytes(sizes: Mapping[int, int], counts: Sequence[int]) -> int:
    """Bytes of a buffer that has room for a call. sizes: of a row, by its kind; counts: rows of each kind."""
    return max((nbytes * counts[kind] for kind, nbytes in sizes.items()), default=0)


def _aligned(nbytes: int) -> np.ndarray:
    """Bytes at a vector's alignment."""
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]
