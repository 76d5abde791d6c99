"""Workers that take turns: all but the one that is measured are stopped, and what else the machine did is noted."""

import json
import os
import select
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

from onevision_edge.runtime.memory import memory_field

from .engines import MEASUREMENTS, Engine
from .files import BENCHMARKS, UnavailableError

ROOM = 3_000_000_000  # bytes of free memory that a model may need beyond its files
ANSWER_SECONDS = 900
DISTURBED = 0.1  # cores that others may use while something is measured


class Worker:
    """A process with one engine, loaded. Stopped except while it answers."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                command, cwd=BENCHMARKS, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file
            )
        self.peak, self.warm = 0, set[str]()
        self.load_seconds: float = self._answer()
        self._signal(signal.SIGSTOP)

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the engine returns. Raises UnavailableError with what went wrong."""
        self._signal(signal.SIGCONT)
        request = json.dumps({"method": method, "arguments": arguments}) + "\n"
        try:
            self.process.stdin.write(request.encode())  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            return self._answer()
        except BrokenPipeError:
            raise UnavailableError("its worker ended") from None
        finally:
            self._signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """Of its threads until now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]:
            self.close()
            raise UnavailableError(f"no answer in {ANSWER_SECONDS} seconds")
        line = self.process.stdout.readline()
        if not line:
            raise UnavailableError(f"its worker ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UnavailableError(answer["error"])
        self.peak = answer["peak"]
        return answer["result"]

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)


@dataclass(slots=True)
class Samples:
    """Seconds of one measurement of one engine, a round each, and the cores that others used meanwhile."""

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def quiet(self) -> list[float]:
        """Those that nothing disturbed; all, where none is."""
        return [s for s, o in zip(self.seconds, self.others, strict=True) if o <= DISTURBED] or self.seconds

    @property
    def disturbed(self) -> bool:
        """Whether others were at work in every round."""
        return min(self.others) > DISTURBED

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.quiet)


class Pool:
    """Workers by engine, loaded when they are asked for; those that were idle longest make room."""

    def __init__(self, models: Mapping[str, Path], commands: Mapping[str, list[str]], log: Path) -> None:
        self.models, self.commands, self.log = models, commands, log
        self.workers: dict[str, Worker] = {}
        self.loads: dict[str, list[float]] = defaultdict(list)
        self.peaks: dict[str, int] = {}

    def worker(self, name: str) -> Worker:
        """An engine's worker. Raises UnavailableError."""
        if name in self.workers:
            self.workers[name] = self.workers.pop(name)
            return self.workers[name]
        need = max(self.peaks.get(name, 0), bytes_of(self.models[name]) + ROOM)
        while self.workers and (memory_field("MemAvailable") or need) < need:
            self._close(next(iter(self.workers)))
        self.workers[name] = worker = Worker(self.commands[name], self.log)
        self.loads[name].append(worker.load_seconds)
        return worker

    def measure(self, name: str, what: str, samples: Samples, patience: float) -> None:
        """Add one sample; a worker's first call of a kind is not one. Raises UnavailableError."""
        measurement, worker = MEASUREMENTS[what], self.worker(name)
        if what not in worker.warm:
            worker.ask(measurement.method, *measurement.arguments)
            worker.warm.add(what)
        wait_until_quiet(patience)
        started, busy, own = perf_counter(), busy_seconds(), worker.cpu_seconds()
        result = worker.ask(measurement.method, *measurement.arguments)
        elapsed = perf_counter() - started
        others = (busy_seconds() - busy - (worker.cpu_seconds() - own)) / elapsed
        samples.seconds.append(median(result) if isinstance(result, list) else result)
        samples.others.append(others)
        self.peaks[name] = max(self.peaks.get(name, 0), worker.peak)

    def drop(self, name: str) -> None:
        """End an engine's worker, if it has one."""
        if name in self.workers:
            self._close(name)

    def close(self) -> None:
        """End all."""
        for name in list(self.workers):
            self._close(name)

    def _close(self, name: str) -> None:
        self.workers.pop(name).close()


def turns(engines: Sequence[Engine], wanted: Sequence[str], together: bool) -> Iterable[tuple[Engine, str]]:
    """One round: each measurement over all engines, or each engine's measurements where they do not fit together."""
    pairs = [(engine, what) for what in wanted for engine in engines if MEASUREMENTS[what].applies(engine)]
    return pairs if together else sorted(pairs, key=lambda pair: engines.index(pair[0]))


def run_rounds(
    pool: Pool,
    engines: Sequence[Engine],
    wanted: Sequence[str],
    rounds: int,
    together: bool,
    patience: float,
    say: Callable[[str], None],
) -> tuple[dict[tuple[str, str], Samples], dict[str, str]]:
    """Samples by engine and measurement, and the engines that failed, with the reason."""
    samples: dict[tuple[str, str], Samples] = defaultdict(Samples)
    failed: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for engine, what in turns(engines, wanted, together):
            if engine.name in failed:
                continue
            try:
                pool.measure(engine.name, what, samples[engine.name, what], patience)
            except UnavailableError as error:
                failed[engine.name] = f"{what}: {error}"
                pool.drop(engine.name)
                say(f"{engine.name}: {failed[engine.name]}")
                continue
            last, others = samples[engine.name, what].seconds[-1], samples[engine.name, what].others[-1]
            say(f"round {number}: {engine.name}, {what}: {last:.4g} s, others on {others:.2f} cores")
    return {key: found for key, found in samples.items() if found.seconds}, failed


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used; those at low priority, too."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience: float) -> None:
    """Wait until the machine idles for half a second, at most so many seconds."""
    deadline = perf_counter() + patience
    while perf_counter() < deadline:
        busy = busy_seconds()
        sleep(0.5)
        if busy_seconds() - busy <= DISTURBED * 0.5:
            return


def bytes_of(path: Path) -> int:
    """Of a file, or of the files in a folder."""
    files = path.iterdir() if path.is_dir() else (path, path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in files if file.is_file())


def command_of(engine: Engine, python: Path, model: Path, **options: int) -> list[str]:
    """How to start an engine's worker. options: threads, rows of its cache and vocab_size, for those that ask."""
    interpreter = sys.executable if engine.ours else str(python)
    known = {"model": str(model), **options, **engine.options}
    return [interpreter, "-m", "cpu.worker", engine.worker, json.dumps(known)]
