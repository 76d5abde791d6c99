"""What a GPU tells of itself, by NVIDIA's management library."""

import os
from importlib import import_module
from typing import Any


class GpuGauge:
    """Memory that this process holds on the first GPU, the most so far, and the power that the GPU draws, on average.

    Without nvidia-ml-py or a driver it tells nothing.
    """

    def __init__(self) -> None:
        self._memory = 0
        self._watts: list[float] = []
        try:
            self._nvml: Any = import_module("pynvml")
            self._nvml.nvmlInit()
            self._gpu = self._nvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no library, or no driver: the errors of the latter have no base that can be named here
            self._nvml = None

    def read(self) -> None:
        """Look at both once."""
        if self._nvml is None:
            return
        running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu)
        own = sum(process.usedGpuMemory or 0 for process in running if process.pid == os.getpid())
        self._memory = max(self._memory, own)
        self._watts.append(self._nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000)

    def result(self) -> dict[str, float] | None:
        """memory in bytes and power_w in watts; None where nothing was read."""
        if not self._watts:
            return None
        return {"memory": self._memory, "power_w": sum(self._watts) / len(self._watts)}
