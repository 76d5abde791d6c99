"""The kernels of runtime/native, compiled for the CPU at hand and kept in the user's cache.

They are no part of a bundle: a bundle is data, and loading one runs no code of its own. The cache is named by
XDG_CACHE_HOME, or is ~/.cache; ONEVISION_EDGE_KERNELS names a directory that goes before it, for machines without a
compiler: copy there what `onevision-edge build --target cpu` compiled on one like it.
"""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ..errors import OneVisionError
from .cpu_library import Library
from .processor import cpu_flags, machine

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "native"
DIRECTORY = "ONEVISION_EDGE_KERNELS"
_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-w")
_SECONDS = 300  # that a compiler may take


@dataclass(frozen=True, slots=True)
class Level:
    """What kernels are compiled for: an architecture, what its CPUs must have, and how GCC, Clang and Zig are told."""

    name: str
    machine: str
    needs: frozenset[str]
    options: tuple[str, ...]
    zig_cpu: str

    @property
    def file(self) -> str:
        """The library's name, which changes with the sources."""
        return f"onevision_edge-{self.machine}-{self.name}-{_digest(self)}.so"


_V3 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_NO_HALVES = ("-mprefer-vector-width=512",)
# The best first; each can do what the next one can.
LEVELS = (
    Level(
        "avx512-bf16",
        "x86_64",
        _V4 | {"avx512_vnni", "avx512_bf16"},
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", *_NO_HALVES),
        "x86_64_v4+avx512vnni+avx512bf16",
    ),
    Level(
        "avx512-vnni",
        "x86_64",
        _V4 | {"avx512_vnni"},
        ("-march=x86-64-v4", "-mavx512vnni", *_NO_HALVES),
        "x86_64_v4+avx512vnni",
    ),
    Level("avx2", "x86_64", _V3, ("-march=x86-64-v3",), "x86_64_v3"),
    Level("sse2", "x86_64", frozenset(), ("-march=x86-64",), "x86_64"),
    Level("dotprod", "aarch64", frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod",), "generic+v8_2a+dotprod"),
    Level("neon", "aarch64", frozenset(), ("-march=armv8-a",), "generic"),
)


def levels() -> list[Level]:
    """What this CPU can run, the best first."""
    here, flags = machine(), cpu_flags()
    return [level for level in LEVELS if level.machine == here and level.needs <= flags]


@lru_cache(maxsize=1)
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[hc]*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(level: Level) -> str:
    return hashlib.sha256(" ".join((_source_digest(), *_FLAGS, *level.options)).encode()).hexdigest()[:16]


def compiler() -> list[str] | None:
    """The command of a C++ compiler: CXX, c++, g++, clang++, or the one in the ziglang package; None: there is none."""
    if asked := os.environ.get("CXX"):
        return shlex.split(asked)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onevision-edge"


def find(level: Level) -> Path | None:
    """The compiled library of a level, if there is one."""
    named = os.environ.get(DIRECTORY)
    places = [*([Path(named)] if named else []), cache_directory()]
    return next((place / level.file for place in places if (place / level.file).is_file()), None)


def compile_level(level: Level) -> Path:
    """Compile a level's library into the cache. Raises OneVisionError where there is no compiler, or it fails."""
    command = compiler()
    if command is None:
        raise OneVisionError(
            "there is no C++ compiler for the cpu engine's kernels: install g++ or clang++, or the extra "
            "onevision-edge[cpu], which has one, or name a directory with compiled ones in " + DIRECTORY
        )
    target = cache_directory() / level.file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as room:
            made = Path(room) / level.file
            options = (f"-mcpu={level.zig_cpu}",) if "ziglang" in command else level.options
            words = [*command, *_FLAGS, *options, str(SOURCES / "engine.cpp"), "-o", str(made)]
            LOG.info("compiling the cpu engine's kernels for %s", level.name)
            done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode:
                first = next(iter(done.stderr.strip().splitlines()), "no message")
                raise OneVisionError(f"{command[0]} cannot compile the cpu engine's kernels for {level.name}: {first}")
            os.replace(made, target)
    except FileNotFoundError as error:
        raise OneVisionError(f"{command[0]} is no command here; CXX names the C++ compiler") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OneVisionError(f"{target}: the cpu engine's kernels cannot be compiled: {error}") from error
    return target


def library() -> tuple[Library, Level]:
    """The best kernels for this CPU, loaded: compiled ones, or compiled now. Raises OneVisionError."""
    usable = levels()
    if not usable:
        raise OneVisionError(f"the cpu engine has no kernels for {machine()}")
    best = usable[0]
    return Library(find(best) or compile_level(best)), best
