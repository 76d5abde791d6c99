"""The PyTorch reference: transformers' Qwen3, and the checkpoint's own vision tower where its code is trusted."""

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...bundle import MANIFEST, FileSpec, file_sha256
from ...calibration.itinerary import pixels, sizes
from ...calibration.rows import Row
from ...config import ModelConfig
from ...errors import OneVisionError
from ...runtime.stitching import check_counts, check_ids
from ..subject import TRANSFORMERS, Subject, model_shape
from .probe import STITCHED, Probe

if TYPE_CHECKING:
    from ...export.checkpoint import Checkpoint
    from .remote_tower import RemoteTower
    from .torch_decoder import TorchDecoder

Encode = Callable[[Row], np.ndarray]

_DTYPES = ("fp32", "bf16")
_METADATA = ("config.json", "generation_config.json", "model.safetensors.index.json", MANIFEST)
_GIVEN_EMBEDDINGS = (
    "image embeddings are given to it: modeling code of the checkpoint was not run, so vision stages are not compared"
)
_MISREADS = (
    "the checkpoint's modeling code, given several images or frames at once, reads the rows of each after the first "
    "too early (its offsets leave out the class tokens): here each is given to it alone, which it computes rightly"
)


@dataclass(frozen=True, slots=True)
class TransformersSide:
    """One row at a time. tower: None where `encode` gives the embeddings of a row's media, [tokens, width]."""

    subject: Subject
    config: ModelConfig
    decoder: "TorchDecoder"
    tower: "RemoteTower | None"
    encode: Encode | None

    def trace(self, row: Row, probe: Probe) -> None:
        """Run a row once, its answer given, and tell of every stage.

        First patch_embed, vision.blocks.N and merger of each segment in turn, where there is a tower; then
        stitched_embeddings, which reads the tokens of all media, images first, and in a row of text nothing (there
        is no `before`); then decoder.layers.N. What `probe.before` returns is what the stage reads.
        """
        self.decoder.trace(self._stitched(row, len(row.input_ids), probe), probe)

    def logits(self, row: Row, positions: np.ndarray) -> np.ndarray:
        """Logits at positions of a row (int64 [n]), its answer given: float32 [n, vocab]."""
        return self.decoder.logits(self._stitched(row, len(row.input_ids)), np.asarray(positions, np.int64))

    def generate(self, row: Row, max_tokens: int) -> list[int]:
        """The greedy answer to a row's prompt, at most max_tokens ids, without the one that ends it."""
        if max_tokens < 1:
            return []
        embeds = self._stitched(row, row.answer_start)
        media_ids = (self.config.image_token_id, self.config.video_token_id)
        return self.decoder.generate(embeds, max_tokens, self.config.eos_token_ids, media_ids)

    def media(self, row: Row, probe: Probe | None = None) -> np.ndarray:
        """Tokens of a row's images, then of its videos: float32 [tokens, width]."""
        segments = list(zip(pixels(row), sizes(row), strict=True))
        if not segments:
            return np.empty((0, self.config.text.hidden_size), np.float32)
        if self.tower is not None:
            return np.concatenate([self.tower.segment(values, size, probe) for values, size in segments])
        if self.encode is None:
            raise OneVisionError(
                f"{row.name}: has images, and this reference has neither a vision tower nor embeddings"
            )
        return np.asarray(self.encode(row), np.float32)

    def _stitched(self, row: Row, count: int, probe: Probe | None = None) -> np.ndarray:
        """Embeddings of the first `count` tokens, [count, width]."""
        ids, media = row.input_ids[:count], self.media(row, probe)
        check_ids(ids, self.config.text.vocab_size)
        if probe is not None and len(media):
            media = probe.before(STITCHED, media)
        embeds = self.decoder.embeddings(ids, np.array(media, np.float32), self._places(row, ids, len(media)))
        if probe is not None:
            probe.after(STITCHED, embeds)
        return embeds

    def _places(self, row: Row, ids: np.ndarray, count: int) -> np.ndarray:
        """Where the tokens of the media stand, images first: int64 [count]."""
        unit, grids = self.config.vision.merge_unit, (row.image_grid_thw, row.video_grid_thw)
        images, videos = (0 if grid is None else int(grid.prod(axis=1).sum()) // unit for grid in grids)
        check_counts(ids, self.config.image_token_id, images, "image")
        check_counts(ids, self.config.video_token_id, videos, "video")
        if images + videos != count:
            raise OneVisionError(f"{row.name}: its grids make {images + videos} media tokens; {count} were given")
        return np.concatenate(
            [np.flatnonzero(ids == i) for i in (self.config.image_token_id, self.config.video_token_id)]
        )


def open_transformers(
    checkpoint: str | os.PathLike[str],
    *,
    encode: Encode | None = None,
    trust_remote_code: bool = False,
    dtype: str = "fp32",
    threads: int | None = None,
) -> TransformersSide:
    """Read a checkpoint, or a full-precision bundle, into PyTorch modules, tensor by tensor.

    encode: gives the embeddings of a row's media where there is no tower, images first. trust_remote_code: run the
    checkpoint's own modeling code for the tower. dtype: fp32, or bf16 for weights and activations, with rotary angles
    in float32. threads: of PyTorch in this process. Raises OneVisionError.
    """
    if dtype not in _DTYPES:
        raise OneVisionError(f"dtype is {dtype!r}; the reference computes in {' or '.join(_DTYPES)}")
    _require_packages()
    import torch

    from ...export.checkpoint import Checkpoint
    from .remote_tower import RemoteTower
    from .torch_decoder import TorchDecoder
    from .torch_weights import DTYPES, Filling

    if threads is not None:
        torch.set_num_threads(threads)
    filling = Filling(Checkpoint.open(checkpoint, trust_remote_code), DTYPES[dtype])
    config = filling.checkpoint.config
    tower = RemoteTower.filled(config.vision, filling) if trust_remote_code else None
    decoder = TorchDecoder.filled(config.text, filling)
    subject = _subject(filling.checkpoint, dtype, filling.weights_sha256(), tower)
    return TransformersSide(subject, config, decoder, tower, encode)


def _require_packages() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise OneVisionError(
            f"the PyTorch reference needs torch and transformers ({error}): pip install 'onevision-edge[reference]'"
        ) from error


def _subject(checkpoint: "Checkpoint", dtype: str, weights_sha256: str, tower: "RemoteTower | None") -> Subject:
    files = _files(checkpoint, code=tower is not None)
    return Subject(
        name=checkpoint.name,
        kind=TRANSFORMERS,
        backend=TRANSFORMERS,
        precision=dtype,
        dtype=dtype,
        bytes=sum(spec.size for spec in files.values()),
        weights_sha256=weights_sha256,
        files={name: asdict(spec) for name, spec in files.items()},
        model=model_shape(checkpoint.config),
        notes=_notes(tower),
    )


def _notes(tower: "RemoteTower | None") -> tuple[str, ...]:
    torch, transformers = (importlib.metadata.version(name) for name in ("torch", "transformers"))
    decoder = f"decoder: Qwen3ForCausalLM of transformers {transformers}, PyTorch {torch}"
    if tower is None:
        return decoder, _GIVEN_EMBEDDINGS
    vision = f"vision tower: {type(tower.module).__name__} of the checkpoint's own modeling code, one image at a time"
    return (decoder, vision, *([_MISREADS] if tower.misreads_segments() else []))


def _files(checkpoint: "Checkpoint", code: bool) -> dict[str, FileSpec]:
    """What was read, by name: weights, configuration, and code that was run."""
    from .remote_tower import code_files

    paths = {stored.path for stored in checkpoint.tensors.values()}
    paths |= {path for name in _METADATA if (path := checkpoint.directory / name).is_file()}
    paths |= set(code_files(checkpoint.directory) if code else [])
    return {path.name: _digest(path, path.stat().st_mtime_ns) for path in sorted(paths)}


@cache
def _digest(path: Path, changed: int) -> FileSpec:
    """Once a file and time of change: the same checkpoint is read again for its noise floor."""
    return FileSpec(path.stat().st_size, file_sha256(path))
