"""Running a graph on a GPU by ONNX Runtime, CUDA or TensorRT-RTX, with caches and embeddings in the GPU's memory."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle import GraphSpec
from ..config import VisionConfig
from ..errors import OneVisionError
from .backend import PROVIDERS, Binding, Graph, SessionOptions
from .cuda import CudaDriver
from .device import Borrowed, DeviceArray, Driver
from .stitching import OnDevice

_GPU_SCORES = 1 << 30  # attention scores of one call, where a kernel keeps them


@cache
def _cuda() -> CudaDriver:
    """The one driver that all graphs share."""
    return CudaDriver()


class ProviderGraph(OnDevice, Graph):
    """One graph on one of ONNX Runtime's GPU providers. Its outputs stay on the GPU.

    driver, device: whose memory arrays lie in, and what ONNX Runtime calls it; None for the GPU's.
    """

    def __init__(
        self, path: Path, spec: GraphSpec, options: SessionOptions, driver: Driver | None = None, device: str = "cuda"
    ) -> None:
        self.provider, self.device = options.provider, device
        self._check_provider()
        self.driver = driver if driver is not None else _cuda()
        super().__init__(path, spec, options)

    def images_per_call(self, config: VisionConfig, size: tuple[int, int]) -> int:
        """As many images of a size as keep their attention scores bounded."""
        return max(1, _GPU_SCORES // (config.num_heads * (size[0] * size[1] + 1) ** 2))

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Run once on host arrays; returns the outputs in the graph's order, on the device."""
        binding = self.bind()
        for name, array in inputs.items():
            binding.input(name, array)
        for tensor in self.spec.outputs:
            binding.leave(tensor.name)
        binding.run()
        return binding.left()

    def bind(self) -> "ProviderBinding":
        """A binding to run the graph on buffers that stay where they are."""
        return ProviderBinding(self)

    def element(self, dtype: np.dtype) -> Any:
        """What ONNX Runtime calls the elements of an array: floats are the graph's, whatever holds them."""
        return self.fmt.onnx_type if dtype == self.fmt.numpy else dtype.type

    def _providers(self) -> list[Any]:
        return [(PROVIDERS[self.provider], {"user_compute_stream": str(self.driver.stream)})]

    def _check_provider(self) -> None:
        known = ort.get_available_providers()
        if self.provider not in PROVIDERS:
            raise OneVisionError(f"unknown provider {self.provider!r}: choose one of {', '.join(PROVIDERS)}")
        if PROVIDERS[self.provider] not in known:
            package = "onnxruntime-gpu" if self.provider == "cuda" else "an onnxruntime built with it"
            raise OneVisionError(
                f"this ONNX Runtime {ort.__version__} has no {PROVIDERS[self.provider]}, only {', '.join(known)}: "
                f"uninstall onnxruntime, which shares its files, and install {package}"
            )


class ProviderBinding(Binding):
    """Arrays on the device are bound where they lie; those of the host are copied by ONNX Runtime."""

    graph: ProviderGraph

    def __init__(self, graph: ProviderGraph) -> None:
        super().__init__(graph)

    def input(self, name: str, array: Any) -> None:
        """Bind an array to an input."""
        if isinstance(array, DeviceArray):
            self._bind(self._binding.bind_input, name, array)
        elif array.dtype == self.graph.fmt.numpy and self.graph.fmt.name == "bf16":
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, self.graph.fmt.onnx_type)
            self._held[name] = (value, array)
            self._binding.bind_ortvalue_input(name, value)
        else:
            super().input(name, array)

    def in_place(self, past: str, present: str, array: Any) -> None:
        """Bind one array to an input and to the output that updates it."""
        self._bind(self._binding.bind_input, past, array)
        self._bind(self._binding.bind_output, present, array)

    def output(self, name: str, array: Any) -> None:
        """Bind an array, of the device or of the host, to receive an output."""
        if isinstance(array, DeviceArray):
            self._bind(self._binding.bind_output, name, array)
        else:
            super().output(name, array)

    def leave(self, name: str) -> None:
        """Let an output be allocated on the device."""
        self._binding.bind_output(name, self.graph.device, 0)

    def left(self) -> list[DeviceArray]:
        """The outputs that were allocated there, in the graph's order."""
        found = []
        for value in self._binding.get_outputs():
            memory = Borrowed(self.graph.driver, value.data_ptr(), value)
            found.append(DeviceArray(memory, 0, tuple(value.shape()), self.graph.fmt.numpy))
        return found

    def run(self) -> None:
        """Run on what is bound, and wait for it."""
        super().run()
        self.graph.driver.synchronize()

    def _bind(self, bind: Any, name: str, array: DeviceArray) -> None:
        self._held[name] = (array, array)
        bind(name, self.graph.device, 0, self.graph.element(array.dtype), array.shape, array.pointer)
