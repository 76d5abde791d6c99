"""The vision tower of a checkpoint's own modeling code, which is run only where the user trusts it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ...config import VisionConfig, read_json
from ...errors import OneVisionError
from .probe import MERGER, PATCH_EMBED, Probe, block_stage
from .torch_stages import rows, watched
from .torch_weights import Filling, parameters_without_memory

# The one that the release names, then those that other copies may name.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
_ANGLES = "class_pos_emb"
# Reading a row too early gives other values altogether; rounding differs by a hundredth at most, in BF16.
_OTHER_VALUES = 0.1


class RemoteTower:
    """One segment (an image or a frame) a call: the published code is right about the first of a call only."""

    def __init__(self, module: Any, config: VisionConfig) -> None:
        self.module, self.config = module, config
        self.last_block = block_stage(config.depth - 1)
        self.stages: dict[str, nn.Module] = {block_stage(i): block for i, block in enumerate(module.blocks)}
        self.stages[MERGER] = module.merger

    @classmethod
    def filled(cls, config: VisionConfig, filling: Filling) -> "RemoteTower":
        """Import the code, make its tower, read the weights, and try it. Raises OneVisionError."""
        directory = filling.checkpoint.directory
        kind = _auto_class(directory)
        with _blamed_on_the_code(directory):
            module = _made(kind, directory)
            tower = cls(module, config)
        names = {name: f"visual.{name}" for name, _ in module.named_parameters()}
        filling.fill(module, names, keep=(_ANGLES,))
        with _blamed_on_the_code(directory):
            tower.segment(_try_out(config)[: config.merge_unit], (config.spatial_merge_size,) * 2)
        return tower

    def segment(self, pixels: np.ndarray, size: tuple[int, int], probe: Probe | None = None) -> np.ndarray:
        """Tokens of one segment, float32 [tokens, text width]. pixels: [patches, patch_dim] of (rows, columns)."""
        if probe is None:
            return self.verbatim(pixels, np.array([[1, *size]]))
        pixels = probe.before(PATCH_EMBED, pixels)
        with watched(self.stages, _Segment(probe, self.last_block)):
            return self.verbatim(pixels, np.array([[1, *size]]))

    @torch.inference_mode()
    def verbatim(self, pixels: np.ndarray, grids: np.ndarray) -> np.ndarray:
        """The code's own call, of any number of segments: its answer as it is, wrong or right."""
        dtype = self.module.patch_embed.proj.weight.dtype
        return rows(self.module(torch.tensor(pixels, dtype=dtype), grid_thw=torch.from_numpy(grids)))

    def misreads_segments(self) -> bool:
        """Whether two segments in a call get other tokens than each in a call of its own."""
        pixels, side = _try_out(self.config), self.config.spatial_merge_size
        alone = np.concatenate([self.segment(part, (side, side)) for part in np.split(pixels, 2)])
        together = self.verbatim(pixels, np.array([[1, side, side]] * 2))
        return bool(np.linalg.norm(together - alone) > _OTHER_VALUES * np.linalg.norm(alone))


@dataclass
class _Segment:
    """Completes what hooks see of one segment: the first block reads what patch_embed gave.

    The merger is handed the patches alone; as a stage it reads the last block's stream, class token first.
    """

    probe: Probe
    last_block: str
    stream: np.ndarray = field(init=False)

    def before(self, stage: str, given: np.ndarray) -> np.ndarray:
        if stage == block_stage(0):
            self.probe.after(PATCH_EMBED, given)
        if stage != MERGER:
            return self.probe.before(stage, given)
        read = self.probe.before(stage, self.stream)
        return given if read is self.stream else read[1:]

    def after(self, stage: str, given: np.ndarray) -> None:
        if stage == self.last_block:
            self.stream = given
        self.probe.after(stage, given)


def code_files(directory: Path) -> list[Path]:
    """The Python files of a checkpoint."""
    return sorted(directory.glob("*.py"))


def _auto_class(directory: Path) -> str:
    """The auto class that config.json maps to a modeling file beside it, before anything is imported."""
    path = directory / "config.json"
    classes = (read_json(path).get("auto_map") if path.is_file() else None) or {}
    name = next((name for name in _AUTO_CLASSES if name in classes), None)
    if name is None:
        raise OneVisionError(
            f"{directory}: config.json maps no model class to modeling code (auto_map); give the checkpoint as "
            "published, with its .py files, or do not ask for its code"
        )
    file = f"{str(classes[name]).partition('.')[0]}.py"
    if not (directory / file).is_file():
        raise OneVisionError(f"{directory}: auto_map names {classes[name]}, but {file} is not here; fetch it, too")
    return name


def _made(kind: str, directory: Path) -> Any:
    """The tower's module, with no weights. What the code prints is no result: it goes to stderr."""
    with redirect_stdout(sys.stderr), parameters_without_memory():
        config = transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=True)
        auto = getattr(transformers, kind)
        model = auto.from_config(config, trust_remote_code=True, attn_implementation="sdpa")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "visual":
            return module
    raise ValueError("it has no module of the name visual")


@contextmanager
def _blamed_on_the_code(directory: Path) -> Iterator[None]:
    """Whatever a stranger's code raises is one sentence."""
    try:
        yield
    except Exception as error:
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OneVisionError(
            f"{directory}: its modeling code does not work with transformers {transformers.__version__} ({what}); the "
            "published code needs a version from 4.53 and below 5: pip install 'transformers>=4.53,<5', or do not ask "
            "for the checkpoint's code"
        ) from error


def _try_out(config: VisionConfig) -> np.ndarray:
    """Pixel rows of two segments of one token each."""
    shape = (2 * config.merge_unit, config.patch_dim)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
