"""A checkpoint's tensors in PyTorch modules: made without memory, then filled one tensor at a time."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...export.checkpoint import Checkpoint
from ...export.weights import source_digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BLOCK_BYTES = 1 << 22
M = TypeVar("M", bound=nn.Module)


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Parameters of modules made here are on the meta device; buffers, such as rotary frequencies, are computed."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Filling:
    """Fills modules from a checkpoint in one dtype, and digests what it reads."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    digests: dict[str, str] = field(default_factory=dict)

    def fill(self, module: M, names: Mapping[str, str], keep: tuple[str, ...] = ()) -> M:
        """Give each parameter its tensor: `names` maps a parameter to its canonical name in the checkpoint.

        keep: parameters that stay in float32. Raises OneVisionError for one that is missing or has another shape.
        """
        for path, name in names.items():
            owner, _, leaf = path.rpartition(".")
            shape = tuple(module.get_parameter(path).shape)
            values = self._read(name, shape, torch.float32 if path in keep else self.dtype)
            module.get_submodule(owner).load_state_dict({leaf: values}, strict=False, assign=True)
        return module.requires_grad_(False).eval()

    def weights_sha256(self) -> str:
        """One digest of all the checkpoint's tensors, the same that a bundle made of it records."""
        for name in self.checkpoint.tensors.keys() - self.digests.keys():
            self._blocks(name, None)
        return source_digest(self.digests)

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.checkpoint.check(name, shape)
        values = torch.empty(shape, dtype=dtype)
        self._blocks(name, values)
        return values

    def _blocks(self, name: str, values: torch.Tensor | None) -> None:
        """Read a tensor block by block, so that it is in memory once."""
        stored, digest, start = self.checkpoint.tensors[name], hashlib.sha256(), 0
        rows = max(1, _BLOCK_BYTES * stored.shape[0] // max(stored.size, 1))
        for block in self.checkpoint.read_rows(name, rows):
            digest.update(block.reshape(-1).view(np.uint8).data)
            if values is not None:
                values[start : start + len(block)] = as_tensor(block)
            start += len(block)
        self.digests[name] = digest.hexdigest()


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory; PyTorch does not know numpy's bfloat16."""
    if values.dtype == np.dtype(ml_dtypes.bfloat16):
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)
