"""What a GPU tells, from a library that says known things; nothing where there is none."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from onevision_edge.report.latency.device import GpuGauge


def test_memory_is_the_most_and_power_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = ModuleType("pynvml")
    memory, watts = iter([100, 300, 200]), iter([50_000, 70_000, 90_000])
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetPowerUsage = lambda gpu: next(watts)
    other = SimpleNamespace(pid=-1, usedGpuMemory=10**9)
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda gpu: [
        other,
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=next(memory)),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gauge = GpuGauge()
    assert gauge.result() is None
    for _ in range(3):
        gauge.read()
    assert gauge.result() == {"memory": 300, "power_w": pytest.approx(70)}


def test_without_a_library_or_a_driver_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = ModuleType("pynvml")

    def fail() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    nvml.nvmlInit = fail
    for module in (nvml, None):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        gauge = GpuGauge()
        gauge.read()
        assert gauge.result() is None
