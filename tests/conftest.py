"""Shared fixtures: the golden cases, bundles of their checkpoint, random checkpoints of the family, scripts."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import onevision_edge
from onevision_edge.runtime import kernels
from onevision_edge.runtime.cpu_library import Library
from onevision_edge.runtime.model import Model

GOLDEN = Path(__file__).parent / "data" / "golden"
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Golden:
    """One recorded case of the official code: its arrays, and its inputs as the token level takes them."""

    arrays: Mapping[str, np.ndarray]

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
        inputs = {name: self.arrays[name] for name in names if name in self.arrays}
        for name in ("pixel_values", "pixel_values_videos"):
            if f"{name}__u8" in self.arrays:
                inputs[name] = self.pixels(name)
        return inputs

    def pixels(self, name: str) -> np.ndarray:
        """Pixel rows: stored as one code per value and a table of each channel's 256 values."""
        codes, table = self.arrays[f"{name}__u8"], self.arrays["pixel_lut"]
        planes = codes.reshape(len(codes), len(table), -1)
        return np.stack([values[planes[:, c]] for c, values in enumerate(table)], axis=1).reshape(codes.shape)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """The recorded case of a name."""
    return lambda case: Golden(dict(np.load(GOLDEN / f"{case}.npz")))


@pytest.fixture(scope="session")
def golden_checkpoint() -> Path:
    return GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def golden_bundle(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The golden checkpoint's bundle in a dtype, exported once. Tests that change one copy it first."""
    root = tmp_path_factory.mktemp("bundles")

    def exported(dtype: str = "fp32") -> Path:
        if not (root / dtype).exists():
            onevision_edge.export(golden_checkpoint, root / dtype, dtype=dtype, max_length=256)
        return root / dtype

    return exported


@pytest.fixture(scope="session")
def golden_model(golden_bundle: Callable[[str], Path]) -> Model:
    return onevision_edge.load(golden_bundle("fp32"), threads=1)


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script of the repository, such as benchmarks/outliers.py, as a module."""

    def loaded(path: str) -> ModuleType:
        where = Path(onevision_edge.__file__).parent / path
        spec = importlib.util.spec_from_file_location(f"script_{where.stem}", where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # where dataclasses look
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(where.parent)  # where a script finds its neighbours
            spec.loader.exec_module(module)
        return module

    return loaded


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of so much room, such as 200k."""
    directory = tmp_path / "disk"

    def mount(size: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("mounting a small file system needs root")
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            directory.rmdir()
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        return directory

    yield mount
    if directory.exists():
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Library]]:
    """The cpu engine's kernels at a level of this CPU, by its name; all are compiled at once, for the tests alone."""
    if kernels.compiler() is None:
        pytest.skip("there is no C++ compiler for the cpu engine's kernels: install g++ or clang++")
    found = {level.name: level for level in kernels.levels()}
    if not found:
        pytest.skip(f"the cpu engine has no kernels for {kernels.machine()}")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as workers:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = {
            name: workers.submit(lambda level: kernels.find(level) or kernels.compile_level(level), level)
            for name, level in found.items()
        }
        made[next(iter(found))].result()  # the best, which is there for all who look in the cache
        yield cache(lambda name: Library(made[name].result()))


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json. A change is a key, with `text_config__` or `vision_config__` before it."""
    config: dict[str, Any] = {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5",
        "image_token_id": 60,
        "video_token_id": 61,
        "text_config": {
            "vocab_size": 64,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "max_position_embeddings": 512,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
        },
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    return config


def tensor_shapes(config: Mapping[str, Any], tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this config, by its released name."""
    v, t = config["vision_config"], config["text_config"]
    hidden, joined, width = (
        v["hidden_size"],
        v["hidden_size"] * v["spatial_merge_size"] ** 2,
        t["hidden_size"],
    )
    queries, keys = (t[f"num_{kind}_heads"] * t["head_dim"] for kind in ("attention", "key_value"))
    linears = {"visual.merger.mlp.0": (joined, joined), "visual.merger.mlp.2": (width, joined)}
    norms = {"visual.pre_layernorm": hidden, "visual.merger.ln_q": hidden}
    for i in range(v["depth"]):
        block = f"visual.blocks.{i}"
        linears |= {f"{block}.attn.qkv": (3 * hidden, hidden), f"{block}.attn.proj": (hidden, hidden)}
        linears |= {f"{block}.mlp.fc1": (v["intermediate_size"], hidden)}
        linears |= {f"{block}.mlp.fc2": (hidden, v["intermediate_size"])}
        norms |= {f"{block}.norm1": hidden, f"{block}.norm2": hidden}
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (hidden, v["in_channels"], v["patch_size"], v["patch_size"]),
        "visual.class_embedding": (hidden,),
        "visual.class_pos_emb": (1, hidden // v["num_heads"] // 2),
        "model.embed_tokens.weight": (t["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for i in range(t["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, shape in (
            ("q_proj", (queries, width)),
            ("k_proj", (keys, width)),
            ("v_proj", (keys, width)),
            ("o_proj", (width, queries)),
        ):
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if t.get("attention_bias"):
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (t["head_dim"],) for name in "qk"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (t["intermediate_size"], width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, t["intermediate_size"])
        shapes |= {f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes if tied else shapes | {"lm_head.weight": (t["vocab_size"], width)}


@dataclass
class TinyCheckpoint:
    """A random checkpoint in memory: float32 tensors by their released names."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @classmethod
    def random(cls, tied: bool = False, seed: int = 0, **changes: Any) -> "TinyCheckpoint":
        config, rng = tiny_config(**changes), np.random.default_rng(seed)

        def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
            noise = rng.standard_normal(shape).astype(np.float32)
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")):
                return 1 + noise / 10
            fan_in = np.prod(shape[1:]) if len(shape) > 1 and "class" not in name else 10
            return noise / np.float32(np.sqrt(fan_in))

        return cls(config, {name: values(name, shape) for name, shape in tensor_shapes(config, tied).items()})

    def write(self, directory: Path, dtype: str = "F32", long_names: bool = False, shards: int = 1) -> Path:
        """Save in the published form; `shards` > 1 writes that many files and their index."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        stored = {
            long_name(name) if long_names else name: np.ascontiguousarray(values.astype(FLOATS[dtype]))
            for name, values in self.tensors.items()
        }
        if shards == 1:
            save_file(stored, directory / "model.safetensors")
            return directory
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(stored.items())[i::shards])
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory


def long_name(name: str) -> str:
    """The name that transformers gives the tensor after loading."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TinyCheckpoint]:
    """Makes random checkpoints: tiny(tied=..., seed=..., **changes of tiny_config)."""
    return TinyCheckpoint.random


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python program in a process of its own, with the package as importable as it is here."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# Peak of the process's resident memory in bytes. (resource.getrusage would count its parent's.)
PEAK_MEMORY = """
def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(status.read().split("VmHWM:")[1].split()[0])
"""


@pytest.fixture
def python_output(python: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Runs a Python program, which may call peak(), to its end; returns what it printed."""

    def run(program: str, *arguments: Any) -> str:
        process = python(PEAK_MEMORY + program, *arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    return run
