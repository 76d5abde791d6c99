"""A server as a process of its own, and what it weighs."""

import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType

import httpx
import psutil

ADDRESS = re.compile(r"http://[^\s()]+")


def command(bundle: Path, *options: str) -> list[str]:
    """Of a server of this bundle, on a free port."""
    return [sys.executable, "-m", "onevision_edge", "serve", str(bundle), "--port", "0", *options]


class ServerProcess:
    """A server, from when it is ready until the block ends. address: where it listens; said: its last lines."""

    def __init__(self, command: Sequence[str], seconds: float = 60.0) -> None:
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.said: deque[str] = deque(maxlen=50)
        self._found = threading.Event()
        self.address = ""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._wait(seconds)
        except BaseException:
            self._process.kill()
            raise
        self._weighed = psutil.Process(self._process.pid)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def client(self, connections: int = 1000) -> httpx.AsyncClient:
        """A client of this server that waits as long as it takes."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self.address, timeout=600.0, limits=limits, trust_env=False)

    def resident(self) -> int:
        """Bytes of memory that are resident now."""
        return int(self._weighed.memory_info().rss)

    def open_files(self) -> int:
        """File descriptors, sockets among them."""
        return int(self._weighed.num_fds())

    def threads(self) -> int:
        """Threads that run."""
        return int(self._weighed.num_threads())

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics without labels, by their names."""
        text = httpx.get(f"{self.address}/metrics", timeout=10, trust_env=False).raise_for_status().text
        return samples(text)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def exit_code(self, seconds: float) -> int:
        """How the process ended. Raises TimeoutExpired."""
        return self._process.wait(seconds)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said.append(line.rstrip())
            found = ADDRESS.search(line)
            if found and not self.address:
                self.address = found[0]
                self._found.set()
        self._found.set()

    def _wait(self, seconds: float) -> None:
        ends = monotonic() + seconds
        self._found.wait(seconds)
        while self._process.poll() is None and self.address and monotonic() < ends:
            try:
                if httpx.get(f"{self.address}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                sleep(0.05)
        raise RuntimeError("the server did not start: " + " / ".join(self.said))


def samples(text: str) -> dict[str, float]:
    """Lines `name value` of a Prometheus text; those with labels are left out."""
    pairs = (line.split() for line in text.splitlines() if line and not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value, *_ in pairs}
