"""The peers, installed from PyPI into an environment of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

TORCH = "torch==2.13.0"  # the version that .ci/run installs
# One call of pip each, so that one that fails leaves the others.
PACKAGES = {
    "PyTorch": [TORCH, "transformers", "safetensors", "numpy"],
    "OpenVINO": [TORCH, "openvino", "openvino-genai", "openvino-tokenizers", "nncf", "optimum-intel"],
    "ONNX Runtime": ["onnxruntime", "onnxruntime-genai", "onnx", "onnx-ir"],
    "llama.cpp": ["llama-cpp-python", "gguf"],
}
LLAMA_BUILD = "-DGGML_NATIVE=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF"


def install(folder: Path, say: Callable[[str], None]) -> None:
    """Make the environment and put in it what can be had, llama.cpp compiled for this processor."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    log = folder / "install.log"
    environment = {**os.environ, "CMAKE_ARGS": LLAMA_BUILD, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    for name, packages in PACKAGES.items():
        started = perf_counter()
        command = [*pip, "install", "--no-binary", "llama-cpp-python", *packages]
        with open(log, "a") as file:
            failed = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
        say(f"{name}: {f'failed, see {log}' if failed else 'installed'}, {perf_counter() - started:.0f} s")
    # optimum-intel asks for it and does without; PyPI's, built for PyTorch on GPUs, breaks imports beside a CPU's.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
