"""A Triton server for the tests: the one inside nvidia-pytriton, which has the Python backend alone.

Graphs run on ONNX Runtime all the same: a backend of that name, written in Python, stands in for the server's own.
"""

import os
import queue
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge

BACKEND = """
import json
from pathlib import Path

import onnxruntime as ort
import triton_python_backend_utils as server


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        name = json.loads(args["model_config"])["default_model_filename"]
        self.session = ort.InferenceSession(Path(args["model_repository"]) / args["model_version"] / name)

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        names = request.requested_output_names()
        found = self.session.run(names, {t.name(): t.as_numpy() for t in request.inputs()})
        return server.InferenceResponse([server.Tensor(n, a) for n, a in zip(names, found)])
"""
Ask = Callable[..., list[dict[str, str]]]


@contextmanager
def running(repository: Path, work: Path) -> Iterator[Ask]:
    """Starts the server; yields what asks it over gRPC and returns every response. Skips where there is none."""
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None or find_spec("tritonclient") is None:
        pytest.skip("there is no Triton server: pip install --no-deps nvidia-pytriton, and tritonclient[grpc]")
    if int(np.__version__.split(".")[0]) > 1:
        pytest.skip("this Triton's Python backend reads no arrays of NumPy 2: pip install 'numpy<2'")
    package = Path(spec.origin).parent
    _backends(package / "tritonserver", work / "backends")
    ports = [_free_port(), _free_port()]
    process = subprocess.Popen(
        [
            str(package / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={work / 'backends'}",
            f"--grpc-port={ports[0]}",
            f"--http-port={ports[1]}",
            "--allow-metrics=false",
            "--disable-auto-complete-config",
        ],
        env=_environment(package),
        cwd=Path(onevision_edge.__file__).parents[1],  # the backend's sys.path begins here
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield _client(process, f"localhost:{ports[0]}")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _backends(server: Path, folder: Path) -> None:
    shutil.copytree(server / "backends" / "python", folder / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "python")
    (folder / "onnxruntime").mkdir()
    (folder / "onnxruntime" / "model.py").write_text(BACKEND)


def _environment(package: Path) -> dict[str, str]:
    libraries = f"{sys.base_prefix}/lib:{package.parent / 'nvidia_pytriton.libs'}"
    return os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _client(process: subprocess.Popen[str], address: str) -> Ask:
    import tritonclient.grpc as grpc

    client, deadline = grpc.InferenceServerClient(address), time.monotonic() + 60
    while not _ready(client):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail("Triton did not start:\n" + process.communicate()[0][-3000:])
        time.sleep(0.2)

    def tensor(name: str, value: Any) -> Any:
        kind = "BOOL" if isinstance(value, bool) else "BYTES"
        array = np.array([value], bool if kind == "BOOL" else np.object_)
        made = grpc.InferInput(name, array.shape, kind)
        made.set_data_from_numpy(array)
        return made

    def ask(**inputs: Any) -> list[dict[str, str]]:
        came: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(callback=lambda result, error: came.put((result, error)))
        client.async_stream_infer("onevision", [tensor(name, value) for name, value in inputs.items()])
        found: list[dict[str, str]] = []
        while not (found and (found[-1].get("error") or found[-1]["finish_reason"])):
            result, error = came.get(timeout=60)
            names = ("text", "finish_reason", "usage")
            found.append(
                {"error": error.message()} if error else {name: result.as_numpy(name)[0].decode() for name in names}
            )
        client.stop_stream()
        return found

    return ask


def _ready(client: Any) -> bool:
    try:
        return bool(client.is_server_ready())
    except Exception:  # not listening yet
        return False
