"""Stages of PyTorch modules, told to a probe by forward hooks."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .probe import Probe


@contextmanager
def watched(stages: Mapping[str, nn.Module], probe: Probe) -> Iterator[None]:
    """Tell `probe` of each call of the modules, under their stages' names; it may replace what they read."""
    with ExitStack() as hooks:
        for stage, module in stages.items():
            hooks.callback(module.register_forward_pre_hook(partial(_before, stage, probe)).remove)
            hooks.callback(module.register_forward_hook(partial(_after, stage, probe)).remove)
        yield


def rows(values: torch.Tensor) -> np.ndarray:
    """A copy as float32 rows, [n, width], whatever the leading axes."""
    return values.detach().reshape(-1, values.shape[-1]).to(torch.float32, copy=True).numpy()


def _before(stage: str, probe: Probe, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    stream, *rest = inputs
    given = rows(stream)
    read = probe.before(stage, given)
    if read is given:
        return None
    return (torch.from_numpy(np.array(read, np.float32)).to(stream.dtype).reshape(stream.shape), *rest)


def _after(stage: str, probe: Probe, module: nn.Module, inputs: Any, output: Any) -> None:
    """Layers of older versions of transformers give a tuple, the stream first."""
    probe.after(stage, rows(output[0] if isinstance(output, tuple) else output))
