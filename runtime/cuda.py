"""A GPU's memory, stream and events by PyCUDA; capture of CUDA graphs, which it lacks, by cuda-bindings."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import OneVisionError

INSTALL = "pip install 'onevision-edge[tensorrt]' or 'onevision-edge[rtx]'"


class CudaDriver:
    """One GPU: a device.Driver. Its stream is its own; any thread may use it, one at a time."""

    def __init__(self, index: int = 0) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise OneVisionError(f"engines run through PyCUDA, which is not installed: {INSTALL}") from error
        self._cuda = cuda
        try:
            cuda.init()
            self._device = cuda.Device(index)
            self._context = self._device.retain_primary_context()
        except cuda.Error as error:
            raise OneVisionError(f"no GPU to run engines on: {error}; onevision-edge doctor says more") from error
        self._threads = threading.local()
        self._current()
        self._stream = cuda.Stream()
        self.stream = int(self._stream.handle)
        self._memory: dict[int, Any] = {}

    @property
    def capability(self) -> str:
        """The GPU's compute capability, such as sm86."""
        major, minor = self._device.compute_capability()
        return f"sm{major}{minor}"

    def allocate(self, nbytes: int) -> int:
        """Memory on the GPU. Raises OneVisionError where there is not enough."""
        self._current()
        try:
            memory = self._cuda.mem_alloc(nbytes)
        except self._cuda.MemoryError as error:
            free, total = self._cuda.mem_get_info()
            raise OneVisionError(
                f"the GPU has {free / 1e9:.2f} of {total / 1e9:.2f} GB free, {nbytes / 1e9:.2f} more were wanted: use "
                "fewer sequences, a bundle of a smaller --max-length, or an INT8 KV cache"
            ) from error
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self._current()
        self._memory.pop(pointer).free()

    def pinned(self, nbytes: int) -> np.ndarray:
        """Page-locked host memory."""
        self._current()
        found: np.ndarray = self._cuda.pagelocked_empty(nbytes, np.uint8)
        return found

    def upload(self, pointer: int, source: np.ndarray) -> None:
        """Queue a copy to the GPU."""
        if source.nbytes:
            self._current()
            self._cuda.memcpy_htod_async(pointer, source, self._stream)

    def download(self, target: np.ndarray, pointer: int) -> None:
        """Queue a copy to the host."""
        if target.nbytes:
            self._current()
            self._cuda.memcpy_dtoh_async(target, pointer, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy within the GPU."""
        if nbytes:
            self._current()
            self._cuda.memcpy_dtod_async(target, source, nbytes, self._stream)

    def zero(self, pointer: int, nbytes: int) -> None:
        """Queue zeros."""
        if nbytes:
            self._current()
            self._cuda.memset_d8_async(pointer, 0, nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._current()
        self._stream.synchronize()

    def mark(self) -> Any:
        """Queue an event."""
        self._current()
        event = self._cuda.Event()
        event.record(self._stream)
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two events that have passed."""
        return float(end.time_since(start)) / 1e3

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None] | None:
        """Capture what is queued as a CUDA graph and launch it; None without cuda-bindings."""
        try:
            from cuda.bindings import driver
        except ImportError:
            return None
        self._current()
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _checked(driver.cuStreamBeginCapture(self.stream, mode))
        try:
            enqueue()
        finally:
            graph = _checked(driver.cuStreamEndCapture(self.stream))
        replay = _Replay(driver, _checked(driver.cuGraphInstantiate(graph, 0)), self.stream)
        _checked(driver.cuGraphDestroy(graph))
        replay()
        return replay

    def _current(self) -> None:
        """Make the GPU's context this thread's."""
        if not getattr(self._threads, "pushed", False):
            self._context.push()
            self._threads.pushed = True


class _Replay:
    """A CUDA graph ready to launch."""

    def __init__(self, driver: Any, graph: Any, stream: int) -> None:
        self._driver, self._graph, self._stream = driver, graph, stream

    def __call__(self) -> None:
        _checked(self._driver.cuGraphLaunch(self._graph, self._stream))

    def __del__(self) -> None:
        self._driver.cuGraphExecDestroy(self._graph)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returned beside its status."""
    status, *values = result
    if int(status):
        raise OneVisionError(f"CUDA graph capture failed: {status.name}")
    return values[0] if values else None
