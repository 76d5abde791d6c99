"""tools/make_checkpoint.py: the released sizes exactly, and files that any reader takes."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors import safe_open

import onevision_edge
from onevision_edge.config import ModelConfig
from onevision_edge.export.checkpoint import Checkpoint

SCRIPT = Path(onevision_edge.__file__).parent / "tools" / "make_checkpoint.py"


@pytest.fixture(scope="module")
def tool(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tools/make_checkpoint.py")


@pytest.mark.parametrize(("shape", "parameters"), [("4b", 4_741_610_528), ("8b", 8_527_214_624)])
def test_released_sizes(tool: ModuleType, shape: str, parameters: int) -> None:
    found = tool.tensors(ModelConfig.from_hf(tool.named_config(shape), {}), tied=False)
    assert len({t.name for t in found}) == len(found) == 698
    assert sum(math.prod(t.shape) for t in found) == parameters


@pytest.mark.parametrize("layout", ["released", "transformers"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_files_are_readable_and_export(golden_checkpoint: Path, tmp_path: Path, layout: str, dtype: str) -> None:
    out = tmp_path / "checkpoint"
    options = ["--config", str(golden_checkpoint / "config.json"), "--layout", layout, "--dtype", dtype]
    command = [sys.executable, str(SCRIPT), str(out), *options, "--shard-bytes", "700000", "--tied", "--seed", "3"]
    subprocess.run(command, check=True, capture_output=True)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = Checkpoint.open(out)
    assert checkpoint.tied
    for shard in shards:
        with safe_open(shard, "np") as file:
            for name in file.keys():  # noqa: SIM118
                assert index[name] == shard.name
                ours = checkpoint.read(onevision_edge.export.checkpoint.canonical_name(name))  # type: ignore[attr-defined]
                np.testing.assert_array_equal(file.get_tensor(name).view(np.uint8), ours.view(np.uint8))
    bundle = onevision_edge.export(out, tmp_path / "bundle", dtype="fp32", max_length=64)
    logits = onevision_edge.load(bundle.directory).logits(np.arange(20)[None])
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
