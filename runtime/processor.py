"""The CPU at hand: what it can do, and how many cores it has."""

import os
import platform
from pathlib import Path

from ..errors import OneVisionError

_CPU = Path("/sys/devices/system/cpu")


def machine() -> str:
    """x86_64, aarch64 or another architecture, under the kernel's name."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the kernel says that the CPU has, such as avx2 or asimddp; nothing where it does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.partition(":")[2].split())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's own name, or its architecture."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or machine()


def checked_threads(threads: int) -> int:
    """A number of threads to run on. Raises OneVisionError for what is none."""
    if not isinstance(threads, int) or threads < 1:
        raise OneVisionError(f"threads is {threads}; it must be a whole number from 1")
    return threads


def physical_cores(root: Path = _CPU) -> int:
    """Cores that this process may run on, threads of one core counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        try:
            cores.add((root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
