"""Checkpoint in, bundle out: two ONNX graphs written layer by layer, weights streamed one tensor at a time."""

import os
import sys
import types
from collections.abc import Sequence
from typing import Any

from ..bundle import Bundle, Progress, no_progress, writing
from ..precision.plan import default_plan
from .checkpoint import Checkpoint
from .draft import PARTS, Draft


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "fp16",
    max_length: int | None = None,
    parts: Sequence[str] = PARTS,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Export a checkpoint to a bundle of ONNX graphs.

    checkpoint: a local directory, a hub id, or "demo". output: the bundle's directory, which appears
    complete or not at all. dtype: fp32, fp16 or bf16. max_length: rows of the KV cache, at
    most the model's max_position_embeddings; None for 4096, or that where it is less. parts: any of
    vision and decoder. progress(done, total, label) is told bytes. Raises OneVisionError.
    """
    plan = default_plan("float", dtype)
    draft = Draft.make(Checkpoint.open(checkpoint), plan, max_length, parts)
    with writing(output, overwrite, draft.nbytes) as writer:
        writer.write_manifest(draft.write(writer, progress))
    return Bundle.open(output)


class _CallableModule(types.ModuleType):
    """`onevision_edge.export` names this package and the function in it: calling it calls the function."""

    def __call__(self, *args: Any, **options: Any) -> Bundle:
        return export(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
