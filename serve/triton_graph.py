"""Graphs that are models of the Triton server that runs us, called from its Python backend (BLS)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..bundle import Bundle, GraphSpec
from ..config import VisionConfig
from ..engines.record import EngineSet
from ..errors import OneVisionError
from ..precision import float_format
from ..runtime.backend import Binding, Graph
from ..runtime.cache import AnyGraph, Backend
from ..runtime.device import DeviceArray
from ..runtime.stitching import OnDevice


class TritonGraph(Graph):
    """One graph, by the name of its model. Inputs and outputs are arrays of the host.

    server: the module triton_python_backend_utils.
    """

    def __init__(self, spec: GraphSpec, model: str, server: Any) -> None:
        self.spec, self.fmt, self.model, self.server = spec, float_format(spec.dtype), model, server

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Run once; returns the outputs in the graph's order."""
        names = [tensor.name for tensor in self.spec.outputs]
        found = self.call(inputs, names)
        return [found[name] for name in names]

    def bind(self) -> "TritonBinding":
        """A binding to run the graph on arrays that stay where they are."""
        return TritonBinding(self)

    def call(self, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Ask the model for some outputs, by name. Raises OneVisionError with what the server says."""
        server = self.server
        request = server.InferenceRequest(
            model_name=self.model,
            requested_output_names=list(wanted),
            inputs=[server.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
            preferred_memory=server.PreferredMemory(server.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise OneVisionError(f"{self.model}: {response.error().message()}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


class TritonPlan(TritonGraph):
    """The vision graph as a TensorRT plan, beside a decoder on the GPU, where its embeddings are to be."""

    def __init__(self, spec: GraphSpec, model: str, server: Any, engines: EngineSet, decoder: OnDevice) -> None:
        super().__init__(spec, model, server)
        self.limits, self.decoder = engines.engines["vision"].limits, decoder

    def images_per_call(self, config: VisionConfig, size: tuple[int, int]) -> int:
        """As many as the engine was built for. Raises OneVisionError for an image that it does not take."""
        most = self.limits["patches"]["max"]
        if size[0] * size[1] > most:
            raise OneVisionError(
                f"an image of {size[0] * size[1]} patches is larger than the {most} that {self.model} was built for: "
                f"pass max_pixels={most * config.patch_size**2}"
            )
        return self.limits["images"]["max"]

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Run once on host arrays; returns the outputs in the graph's order, on the device."""
        return [self._on_device(array) for array in super().run(inputs)]

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Device memory of floats in the decoder's format."""
        return self.decoder.empty(shape)

    def _on_device(self, array: np.ndarray) -> DeviceArray:
        device = self.decoder.empty(array.shape)
        driver = device.driver
        host = driver.pinned(device.nbytes)
        host[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        driver.upload(device.pointer, host)
        driver.synchronize()
        return device


class TritonBinding(Binding):
    """Arrays that are sent and filled at each call. Of a cache, the rows that the call wrote come back into place."""

    graph: TritonGraph

    def __init__(self, graph: TritonGraph) -> None:
        self.graph = graph
        self._inputs: dict[str, np.ndarray] = {}
        self._caches: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}

    def input(self, name: str, array: np.ndarray) -> None:
        """Send an array with the next call."""
        self._inputs[name] = array

    def in_place(self, past: str, present: str, array: np.ndarray) -> None:
        """Send an array with every call, and take over what it wrote there."""
        self._inputs[past] = self._caches[present] = array

    def output(self, name: str, array: np.ndarray) -> None:
        """Fill an array with an output."""
        self._outputs[name] = array

    def run(self) -> None:
        """Run on what is bound."""
        found = self.graph.call(self._inputs, [*self._outputs, *self._caches])
        for name, array in self._outputs.items():
            array[...] = found[name]
        tokens = self._inputs["inputs_embeds"].shape[1]
        for name, cache in self._caches.items():
            for row, start in enumerate(self._inputs["write_indices"].tolist()):
                cache[row, :, start : start + tokens] = found[name][row, :, start : start + tokens]


class TritonBackend:
    """Opens graphs as models of the server, where `models` names them by part, and else by another backend."""

    def __init__(
        self, server: Any, models: Mapping[str, str], other: Backend | None = None, engines: EngineSet | None = None
    ) -> None:
        self.server, self.models, self.other, self.engines = server, models, other, engines
        self._opened: dict[str, AnyGraph] = {}

    def open(self, bundle: Bundle, part: str) -> AnyGraph:
        """The vision or decoder graph, ready to be called; a graph of the other backend is opened once."""
        if part not in self._opened:
            self._opened[part] = self._open(bundle, part)
        return self._opened[part]

    def _open(self, bundle: Bundle, part: str) -> AnyGraph:
        if part not in self.models:
            assert self.other is not None
            return self.other.open(bundle, part)
        spec, model = bundle.graph(part), self.models[part]
        if self.engines is None:
            return TritonGraph(spec, model, self.server)
        decoder = self.open(bundle, "decoder")
        assert isinstance(decoder, OnDevice)
        return TritonPlan(spec, model, self.server, self.engines, decoder)
