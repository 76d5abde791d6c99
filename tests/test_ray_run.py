"""run_ray in a process of its own: until a signal, and not before what is under way is answered. Takes 20 seconds."""

import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

import onevision_edge

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'onevision-edge[ray]'")
pytestmark = pytest.mark.slow

REFUSED = 0
PROGRAM = """
import sys, time
from pathlib import Path
from onevision_edge.serve.ray_app import RayOptions, run_ray
from onevision_edge.serve.settings import Settings

options = RayOptions(slots=2, cpus=0.5, threads=1)
run_ray(Path(sys.argv[1]), Settings(), options, port=int(sys.argv[2]), ready=lambda url: print(url, flush=True))
"""


def test_a_signal_ends_it_after_what_is_under_way(tmp_path: Path, python: Callable[..., subprocess.Popen[str]]) -> None:
    onevision_edge.export("demo", tmp_path / "bundle", dtype="fp32", max_length=256)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = python(PROGRAM, tmp_path / "bundle", port)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url == f"http://127.0.0.1:{port}", process.communicate(timeout=5)

    def ask(index: int) -> int:
        body = {"messages": [{"role": "user", "content": "What is in the image? " * 8}], "max_tokens": 64}
        try:
            return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code
        except httpx.TransportError:  # when nobody listens any more
            return REFUSED

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(ask, index) for index in range(200)]
        assert running[0].result() == 200
        process.send_signal(signal.SIGTERM)
        found = Counter(future.result() for future in running)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert found[200] >= 8  # those that were under way, and what was answered before
    assert found[503] >= 1
    assert found[200] + found[503] + found[REFUSED] == 200
