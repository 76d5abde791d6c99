"""onevision-edge doctor"""

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from .console import print_json, size, table


@dataclass(frozen=True, slots=True)
class Ability:
    """Something this machine can or cannot do, and what would change that."""

    name: str
    able: bool
    detail: str


# What needs which distributions, and the extra that brings them.
_NEEDS = (
    ("export", ("onnx", "onnx-ir", "onnxscript", "ml_dtypes"), "export"),
    ("run on CPU", ("onnxruntime",), ""),
    ("video files", ("av",), "video"),
    ("hub checkpoints", ("huggingface-hub",), "hub"),
    ("PyTorch reference", ("torch", "transformers"), "reference"),
    ("build TensorRT-RTX engines", ("tensorrt-rtx-cu13-libs|tensorrt-rtx-cu12-libs|tensorrt-rtx",), "rtx"),
    ("build TensorRT engines", ("tensorrt",), "tensorrt"),
    ("run engines", ("pycuda", "tensorrt|tensorrt-rtx|tensorrt-rtx-cu13-libs|tensorrt-rtx-cu12-libs"), "tensorrt"),
    ("replay decode as CUDA graphs", ("cuda-bindings",), "tensorrt"),
)
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve")


@click.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """Say what this machine can do with this package, and what is missing."""
    machine, warnings = machine_facts(), _warnings()
    abilities = [*(_ability(*need) for need in _NEEDS), _kernels()]
    if as_json:
        print_json({"machine": machine, "abilities": [asdict(a) for a in abilities], "warnings": warnings})
        return
    click.echo(table([(name, str(value)) for name, value in _readable(machine)]))
    click.echo("\n" + table([("yes" if a.able else "no", a.name, a.detail) for a in abilities]))
    for warning in warnings:
        click.echo(f"\nwarning: {warning}")


def machine_facts() -> dict[str, Any]:
    """Processor, memory, disk and accelerator of this machine; sizes in bytes."""
    from ..engines.gpu import compute_capability
    from ..runtime.memory import memory_field
    from ..runtime.processor import cpu_flags, cpu_name

    flags = cpu_flags()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": [f for f in _FEATURES if f in flags],
        "memory": memory_field("MemTotal") or 0,
        "memory_available": memory_field("MemAvailable") or 0,
        "disk_free": shutil.disk_usage(".").free,
        "gpu": _gpu(),
        "compute_capability": compute_capability(),
        "onnxruntime_providers": _providers(),
    }


def _readable(machine: dict[str, Any]) -> list[tuple[str, Any]]:
    shown = dict(machine)
    for name in ("memory", "memory_available", "disk_free"):
        shown[name] = size(shown[name])
    for name in ("cpu_features", "onnxruntime_providers"):
        shown[name] = ", ".join(shown[name]) or "none"
    for name in ("gpu", "compute_capability"):
        shown[name] = shown[name] or "none found"
    return [(name.replace("_", " "), value) for name, value in shown.items()]


def _ability(name: str, distributions: tuple[str, ...], extra: str) -> Ability:
    found = {d: _first_version(d) for d in distributions}
    missing = [d.split("|")[0] for d, v in found.items() if v is None]
    if missing:
        return Ability(name, False, f"missing {', '.join(missing)}: pip install 'onevision-edge[{extra}]'")
    return Ability(name, True, ", ".join(f"{d.split('|')[0]} {v}" for d, v in found.items()))


def _first_version(alternatives: str) -> str | None:
    for distribution in alternatives.split("|"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _warnings() -> list[str]:
    warnings = []
    if _first_version("onnxruntime") and _first_version("onnxruntime-gpu"):
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall both, then install onnxruntime-gpu"
        )
    if _gpu() and "CUDAExecutionProvider" not in _providers():
        warnings.append("there is a GPU, but this onnxruntime has no CUDA provider: pip install 'onevision-edge[gpu]'")
    return warnings


def _kernels() -> Ability:
    """Whether this package's own kernels are compiled for this CPU, or can be."""
    from ..runtime.kernels import compiler, find, levels

    name = "run cpu engines"
    best = next(iter(levels()), None)
    if best is None:
        return Ability(name, False, f"there are no kernels for {platform.machine()}")
    if find(best) is not None:
        return Ability(name, True, f"{best.name} kernels, compiled")
    if command := compiler():
        return Ability(name, True, f"{best.name} kernels, compiled at first use by {command[0]}")
    return Ability(name, False, "no C++ compiler: install one, or pip install 'onevision-edge[cpu]'")


def _gpu() -> str | None:
    """The first NVIDIA GPU the driver lists, or the Jetson this is."""
    jetson = Path("/proc/device-tree/model")
    if jetson.exists() and "NVIDIA" in (name := jetson.read_text().strip("\0\n ")):
        return name
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in information.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return onnxruntime.get_available_providers()
