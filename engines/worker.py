"""One engine, built in a process of its own: so its peak memory can be told, and a crash or a stop leaves ours whole.

The job comes as a line of JSON on stdin, which stays open as long as the build is wanted: at its end, or the death of
whoever holds it, the build stops. Answers are lines of JSON on stdout: progress, log, and at last done or error.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from ..bundle import Bundle
from ..errors import OneVisionError
from .dialects import (
    DIALECTS,
    BuildOptions,
    Dialect,
    add_profiles,
    configure,
    create_network,
    first_line,
    logger,
    parse,
)
from .linears import plan_of
from .network import ParsedNetwork, check_network, layer_counts

STEPS = 1000  # that a build is said to have
_BLOCK = 1 << 24

Answer = Callable[[str, Any], None]  # kind, value


def main() -> None:
    """Read the job, answer, and leave nothing but the engine file."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what the library prints by itself is no answer
    lock = threading.Lock()

    def answer(kind: str, value: Any) -> None:
        with lock:
            answers.write(json.dumps({kind: value}) + "\n")

    job = json.loads(sys.stdin.readline())
    stop = threading.Event()
    threading.Thread(target=_wait_for_end, args=(stop,), daemon=True).start()
    try:
        answer("done", _build(job, stop, answer))
    except OneVisionError as error:
        answer("error", str(error))
    except OSError as error:
        answer("os_error", [error.errno, error.strerror])
    except MemoryError:
        answer("error", "the build ran out of memory")
    answers.flush()
    os._exit(0)  # the library's own clean-up has nothing to add, and the reader thread may wait on stdin


def _wait_for_end(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


def _build(job: dict[str, Any], stop: threading.Event, answer: Answer) -> dict[str, Any]:
    dialect = DIALECTS[job["engine"]]
    trt = dialect.load()
    log = logger(trt, lambda severity, message: _tell(answer, job["verbose"], severity, message))
    bundle = Bundle.open(job["bundle"])
    builder = trt.Builder(log)
    network = create_network(trt, dialect.name, builder)
    layers = _parse(trt, dialect, network, log, bundle, job["part"])
    started = monotonic()
    size, sha256 = _compile(trt, dialect, builder, network, log, job, stop, answer)
    return {
        "size": size,
        "sha256": sha256,
        "seconds": monotonic() - started,
        "version": trt.__version__,
        "layers": layers,
        "peak_rss": _peak_rss(),
    }


def _parse(trt: Any, dialect: Dialect, network: Any, log: Any, bundle: Bundle, part: str) -> dict[str, int]:
    """Fill a network from its graph and check it; returns its layers by kind."""
    spec = bundle.graph(part)
    parser = parse(trt, dialect, network, log, bundle.path(spec.file))
    parsed = ParsedNetwork(trt, network)
    check_network(parsed, part, spec, bundle.manifest.model, plan_of(bundle.manifest))
    del parser  # it had to outlive the reading
    return layer_counts(parsed)


def _compile(
    trt: Any,
    dialect: Dialect,
    builder: Any,
    network: Any,
    log: Any,
    job: dict[str, Any],
    stop: threading.Event,
    answer: Answer,
) -> tuple[int, str]:
    """Compile a network into the engine file; returns its size and sha256."""
    options = BuildOptions(**job["options"])
    config = builder.create_builder_config()
    configure(trt, dialect.name, config, options, tuple(job["capabilities"]))
    add_profiles(builder, network, config, job["ranges"])
    config.progress_monitor = monitor = _monitor(trt, answer, stop)
    engine = None if stop.is_set() else builder.build_serialized_network(network, config)
    del monitor  # it had to outlive the build
    if stop.is_set():
        raise OneVisionError("the build was stopped")
    if engine is None:
        raise OneVisionError(f"{job['part']}: {dialect.title} builds no engine: {first_line(log.errors)}")
    if options.timingCacheFile is not None:
        _keep_cache(Path(options.timingCacheFile), config)
    written = _write(Path(job["output"]), engine)
    answer("progress", [STEPS, STEPS, "written"])
    return written


def _write(path: Path, engine: Any) -> tuple[int, str]:
    """Save a plan; returns its size and sha256."""
    view, digest = memoryview(engine), hashlib.sha256()
    with open(path, "wb") as file:
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return len(view), digest.hexdigest()


def _keep_cache(path: Path, config: Any) -> None:
    """Write the timing cache beside its old self, then over it."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_bytes(memoryview(config.get_timing_cache().serialize()))
    os.replace(staged, path)


def _peak_rss() -> int | None:
    """Bytes that this process had in memory at most."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _tell(answer: Answer, verbose: bool, severity: str, message: str) -> None:
    """Forward a message of TensorRT's."""
    if verbose or severity != "VERBOSE":
        answer("log", [severity, message])


def _monitor(trt: Any, answer: Answer, stop: threading.Event) -> Any:
    """A monitor that tells how much of the build is done, and ends it when asked to."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.phases = Phases()
            self.told = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            done = int(STEPS * self.phases.fraction())
            if done > self.told:
                self.told = done
                answer("progress", [done, STEPS, phase_name])
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()


class Phases:
    """Phases of a build, one inside another, and how much of the outermost is done."""

    def __init__(self) -> None:
        self.active: dict[str, list[Any]] = {}  # name: parent, steps, steps done
        self.lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins."""
        with self.lock:
            self.active[name] = [parent, max(steps, 1), 0]

    def step(self, name: str, step: int) -> None:
        """A step, counted from 0, is complete."""
        with self.lock:
            if name in self.active:
                self.active[name][2] = step + 1

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self.lock:
            self.active.pop(name, None)

    def fraction(self) -> float:
        """Of the outermost phase, 0 to 1: its steps, and within the current one the phase inside."""
        with self.lock:
            roots = [name for name, (parent, _, _) in self.active.items() if parent not in self.active]
            return min(1.0, self._fraction(roots[0])) if roots else 0.0

    def _fraction(self, name: str) -> float:
        _, steps, done = self.active[name]
        inner = [child for child, (parent, _, _) in self.active.items() if parent == name]
        return float(min(steps, done + (self._fraction(inner[-1]) if inner else 0.0)) / steps)
