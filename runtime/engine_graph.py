"""Running a graph's TensorRT engine, with the methods that backend.Graph has for ONNX Runtime.

Works with tensorrt and tensorrt_rtx, whose engines have one interface, and with the interpreter that stands in for them
where there is no GPU. Sources: the IExecutionContext and ICudaEngine pages of TensorRT's API reference.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle import GraphSpec
from ..config import VisionConfig
from ..engines.profiles import resized
from ..errors import OneVisionError
from ..precision import FLOAT_FORMATS, FloatFormat, float_format
from .device import ALIGNMENT, DeviceArray, Driver, Staging
from .stitching import OnDevice

# By TensorRT's names. BF16 is held as its bits, as everywhere on the host.
_DTYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "INT8": np.dtype(np.int8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
}
# Cache rows that a decode step reads are counted in steps of this: the mask hides those that are too many, and so long
# as no shape changes, the step is replayed as one CUDA graph.
_ROWS = 128


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of an engine. host: an input of shapes, which is read from the host's memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]  # -1 where it is free
    is_input: bool
    host: bool


Range = tuple[tuple[int, ...], tuple[int, ...]]  # least and most: of an input's dimensions, or of its values


class EngineGraph(OnDevice):
    """One graph's engine, deserialised, with one execution context that its bindings share."""

    def __init__(
        self, engine: Any, spec: GraphSpec, driver: Driver, where: str, context: Any, cuda_graphs: bool = True
    ) -> None:
        """engine, context: an ICudaEngine and its IExecutionContext. where: what to call it in messages. cuda_graphs:
        capture a call that is made again. Raises OneVisionError where it is not this graph's engine.
        """
        self.engine, self.spec, self.driver, self.where = engine, spec, driver, where
        self.fmt: FloatFormat = float_format(spec.dtype)
        self.tensors = {tensor.name: tensor for tensor in _tensors(engine)}
        self._check_contract()
        self.profiles = [self._ranges(i) for i in range(engine.num_optimization_profiles)]
        self.context, self.cuda_graphs = context, cuda_graphs
        self.seconds = 0.0  # of the last call, on the device
        if context is None:
            raise OneVisionError(f"{where}: not enough device memory for its activations: use a smaller profile")
        self._profile = 0
        self._lock = threading.Lock()
        self._executed: tuple[Any, ...] | None = None  # what the context was last run with
        self._replay: Callable[[], None] | None = None  # the same as a CUDA graph, once it was captured

    # What the model asks of a graph.

    @property
    def cache_dtype(self) -> np.dtype:
        """Of the decoder's KV cache."""
        return self.tensors["past_key.0"].dtype

    @property
    def tokens_per_call(self) -> int:
        """The most tokens of one decoder call."""
        return self._most("inputs_embeds", 1)

    @property
    def logits_per_call(self) -> int:
        """The most rows of logits of one decoder call, for each sequence."""
        return self._most("logits_indices", 1)

    @property
    def rows(self) -> int:
        """The most cache rows that a call can read."""
        return max(ranges["valid_length"][1][0] for ranges in self.profiles)

    def check_batch(self, batch: int) -> None:
        """Refuse more sequences than the engine was built for."""
        most = self._most("inputs_embeds", 0)
        if batch > most:
            raise OneVisionError(
                f"{self.where} takes {most} sequences at a time, not {batch}: ask for fewer, or build it with "
                f"--max-batch {batch}"
            )

    def images_per_call(self, config: VisionConfig, size: tuple[int, int]) -> int:
        """How many images of a size, rows and columns of patches, one call takes. Raises OneVisionError if none."""
        patches = size[0] * size[1]
        fitting = [r["pixel_values"] for r in self.profiles if r["pixel_values"][1][1] >= patches]
        height, width = (n * config.patch_size for n in size)
        if not fitting:
            most, side = self._most("pixel_values", 1), config.patch_size * config.spatial_merge_size
            rows, columns = (n * side for n in resized(most // config.merge_unit, height, width))
            raise OneVisionError(
                f"an image of {height} x {width} pixels is {patches} patches, and {self.where} takes {most}: resize it "
                f"to {rows} x {columns}, pass max_pixels={most * config.patch_size**2} (--max-pixels), or build it "
                f"with --max-pixels {height * width}"
            )
        return max(ranges[1][0] for ranges in fitting)

    def valid_length(self, end: int, max_length: int) -> int:
        """Rows to read of a cache whose first `end` are valid: some more, so that shapes seldom change."""
        return min(math.ceil(end / _ROWS) * _ROWS, max_length, self.rows) if end <= self.rows else end

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[DeviceArray]:
        """Run once on host arrays; returns the outputs in the graph's order, on the device."""
        binding = self.bind()
        for name, values in inputs.items():
            binding.input(name, values)
        outputs = binding.allocate_outputs()
        binding.run()
        return outputs

    def bind(self) -> "EngineBinding":
        """A binding to run the engine on buffers that stay where they are."""
        return EngineBinding(self)

    # Running.

    def execute(self, binding: "EngineBinding") -> None:
        """Run on what is bound and bring back what is wanted, one call at a time."""
        with self._lock:
            state = binding.state()
            again = state == self._executed
            if not again:
                self._prepare(binding)
            started = self.driver.mark()
            if not again:
                self._enqueue(binding)
                self._executed = state
            elif self.cuda_graphs and self._replay is not None:
                self._replay()
            else:
                self._capture(binding)
            ended = self.driver.mark()
            binding.fetch()
            self.seconds = self.driver.seconds(started, ended)

    def shape_of(self, binding: "EngineBinding", name: str) -> tuple[int, ...]:
        """The shape that an output has for the inputs that are bound."""
        with self._lock:
            self._prepare(binding)
            return tuple(self.context.get_tensor_shape(name))

    def _prepare(self, binding: "EngineBinding") -> None:
        """Give the context the profile, shapes and addresses of a binding; what it was run with counts no more."""
        self._executed = self._replay = None
        profile = self._profile_for(binding)
        if profile != self._profile:
            self.context.set_optimization_profile_async(profile, self.driver.stream)
            self.driver.synchronize()
            self._profile = profile
        for name, shape in binding.shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise OneVisionError(f"{self.where} does not take a {name} of {list(shape)}")
        for name, address in binding.addresses.items():
            if not self.context.set_tensor_address(name, address):
                raise OneVisionError(f"{self.where} does not take an address for {name}")

    def _capture(self, binding: "EngineBinding") -> None:
        """Run what was just run once more, and keep it as a CUDA graph where there are such."""
        self._replay = self.driver.capture(lambda: self._enqueue(binding)) if self.cuda_graphs else None
        if self._replay is None:
            self._enqueue(binding)

    def _enqueue(self, binding: "EngineBinding") -> None:
        if not self.context.execute_async_v3(self.driver.stream):
            raise OneVisionError(f"{self.where}: the engine did not run; its log says why")
        binding.copy_back()

    def _profile_for(self, binding: "EngineBinding") -> int:
        """The profile that holds all inputs; of several the one whose largest shapes are smallest."""
        fitting = [i for i, ranges in enumerate(self.profiles) if not self._outside(ranges, binding)]
        if not fitting:
            raise OneVisionError(f"{self.where}: {self._outside(self.profiles[0], binding)}; build it for more")
        return min(fitting, key=lambda i: sum(math.prod(most) for _, most in self.profiles[i].values()))

    def _outside(self, ranges: Mapping[str, Range], binding: "EngineBinding") -> str | None:
        """Which input of a binding is outside a profile."""
        for name, (least, most) in ranges.items():
            found = binding.bounded(name)
            if not all(low <= value <= high for low, value, high in zip(least, found, most, strict=True)):
                return f"{name} is {list(found)}, the engine takes {list(least)} to {list(most)}"
        return None

    def _most(self, name: str, axis: int) -> int:
        return max(ranges[name][1][axis] for ranges in self.profiles)

    def _ranges(self, profile: int) -> dict[str, Range]:
        """What a profile takes, by input: values of those that the host holds, shapes of the others."""
        found: dict[str, Range] = {}
        for tensor in self.tensors.values():
            if tensor.is_input and tensor.host:
                least, _, most = self.engine.get_tensor_profile_values(profile, tensor.name)
                found[tensor.name] = tuple(least), tuple(most)
            elif tensor.is_input and -1 in tensor.shape:
                least, _, most = self.engine.get_tensor_profile_shape(tensor.name, profile)
                found[tensor.name] = tuple(least), tuple(most)
        return found

    def _check_contract(self) -> None:
        formats = {f.onnx: f.numpy for f in FLOAT_FORMATS.values()}
        for what, declared in (("inputs", self.spec.inputs), ("outputs", self.spec.outputs)):
            wanted = {t.name: (formats.get(t.dtype) or np.dtype(t.dtype), len(t.shape)) for t in declared}
            found = {t.name: (t.dtype, len(t.shape)) for t in self.tensors.values() if t.is_input == (what == "inputs")}
            if wanted != found:
                raise OneVisionError(f"{self.where}: its {what} are not those the manifest names; build it again")


class EngineBinding:
    """Tensors for an engine. Arrays on the device are used where they lie, those of the host are copied there."""

    def __init__(self, graph: EngineGraph) -> None:
        self.graph = graph
        self.shapes: dict[str, tuple[int, ...]] = {}  # of inputs
        self.addresses: dict[str, int] = {}
        self._staging: dict[str, Staging] = {}
        self._host: dict[str, np.ndarray] = {}  # inputs that TensorRT reads from the host
        self._held: dict[str, DeviceArray] = {}
        self._back: list[tuple[DeviceArray, DeviceArray]] = []  # arrays, and what is to be copied to them
        self._wanted: dict[str, np.ndarray] = {}  # outputs that go back to the host

    def input(self, name: str, array: np.ndarray | DeviceArray) -> None:
        """Bind an array to an input."""
        self.shapes[name] = tuple(array.shape)
        if self.graph.tensors[name].host:
            assert isinstance(array, np.ndarray)
            self._set_host(name, array)
        elif isinstance(array, DeviceArray):
            self._held[name] = array
            self.addresses[name] = self._aligned(name, array)
        else:
            self.addresses[name] = self._stage(name).upload(array.astype(self.graph.tensors[name].dtype, copy=False))

    def in_place(self, past: str, present: str, array: DeviceArray) -> None:
        """Bind one array to an input and to the output that updates it. Raises OneVisionError if it is not aligned.

        Where the engine does not update it where it lies, as INT8 caches, the output is copied back after each call.
        """
        if array.pointer % ALIGNMENT:
            raise OneVisionError(
                f"{self.graph.where}: a sequence's cache of {array.nbytes} bytes does not end on a multiple of "
                f"{ALIGNMENT}, which engines need of the next one's: ask for one sequence at a time"
            )
        self.shapes[past] = array.shape
        self.addresses[past] = self.addresses[present] = array.pointer
        self._held[past] = array
        if self.graph.engine.get_aliased_input_tensor(present) != past:
            self._held[present] = DeviceArray.empty(array.driver, array.shape, array.dtype)
            self.addresses[present] = self._held[present].pointer
            self._back.append((array, self._held[present]))

    def output(self, name: str, array: np.ndarray) -> None:
        """Bind a contiguous host array to receive an output."""
        self._wanted[name] = array
        self.addresses[name] = self._stage(name).device(array.nbytes)

    def allocate_outputs(self) -> list[DeviceArray]:
        """Bind new device memory to every output, as large as the inputs make it."""
        outputs = []
        for tensor in self.graph.spec.outputs:
            shape = self.graph.shape_of(self, tensor.name)
            array = DeviceArray.empty(self.graph.driver, shape, self.graph.tensors[tensor.name].dtype)
            self.addresses[tensor.name] = array.pointer
            outputs.append(array)
        return outputs

    def run(self) -> None:
        """Run on what is bound, and wait for the outputs."""
        self.graph.execute(self)

    def copy_back(self) -> None:
        """Queue copies of what the engine could not update where it lies."""
        for array, updated in self._back:
            array[:] = updated

    def fetch(self) -> None:
        """Copy the outputs that the host wants, and wait for everything."""
        driver = self.graph.driver
        for name, array in self._wanted.items():
            driver.download(self._staging[name].host(array.nbytes), self.addresses[name])
        driver.synchronize()
        for name, array in self._wanted.items():
            array[...] = self._staging[name].host(array.nbytes).view(array.dtype).reshape(array.shape)

    def state(self) -> tuple[Any, ...]:
        """Everything that a captured graph depends on."""
        values = tuple((name, tuple(array.tolist())) for name, array in self._host.items())
        return tuple(self.shapes.items()), tuple(self.addresses.items()), values

    def bounded(self, name: str) -> Sequence[int]:
        """What a profile bounds of an input: its values if the host holds it, else its shape."""
        return self._host[name].tolist() if name in self._host else self.shapes[name]

    def _set_host(self, name: str, array: np.ndarray) -> None:
        held = self._host.setdefault(name, np.zeros(array.shape, self.graph.tensors[name].dtype))
        held[...] = array
        self.addresses[name] = held.ctypes.data

    def _aligned(self, name: str, array: DeviceArray) -> int:
        """Its address, or that of a copy that is aligned."""
        if array.pointer % ALIGNMENT == 0:
            return array.pointer
        pointer = self._stage(name).device(array.nbytes)
        self.graph.driver.copy(pointer, array.pointer, array.nbytes)
        return pointer

    def _stage(self, name: str) -> Staging:
        return self._staging.setdefault(name, Staging(self.graph.driver))


def _tensors(engine: Any) -> list[Tensor]:
    found = []
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise OneVisionError(f"the engine's {name} is {kind}, which this version does not know")
        host = engine.get_tensor_location(name).name == "HOST"
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        found.append(Tensor(name, _DTYPES[kind], tuple(engine.get_tensor_shape(name)), is_input, host))
    return found
