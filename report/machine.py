"""The machine that a report was made on."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from typing import Any

from ..runtime.memory import memory_field
from ..runtime.processor import cpu_name, physical_cores

_PACKAGES = ("onevision-edge", "onnxruntime", "numpy", "tokenizers", "Pillow", "onnx", "torch", "transformers")
_ENGINES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "pycuda")


def machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes, system, GPU where there is one, versions of packages: plain data."""
    return {
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "memory": memory_field("MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": _gpu(),
        "packages": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in (*_PACKAGES, *_ENGINES):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _gpu() -> str | None:
    """The first NVIDIA GPU's name, by its driver."""
    with suppress(OSError):
        for folder in sorted(os.listdir("/proc/driver/nvidia/gpus")):
            with open(f"/proc/driver/nvidia/gpus/{folder}/information") as file:
                for line in file:
                    if line.startswith("Model:"):
                        return line.partition(":")[2].strip()
    return None
