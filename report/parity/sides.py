"""The sides of a comparison: bundles, on whatever runs them, that can be looked into."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...bundle import Bundle
from ...calibration.itinerary import pixels, sizes
from ...calibration.rows import Preparer, Row
from ...config import ModelConfig
from ...engines.cpu.record import has_engine
from ...engines.record import CPU
from ...errors import OneVisionError
from ...runtime.backend import SessionOptions
from ...runtime.cpu_engine import CpuOrPlain
from ...runtime.memory import memory_field
from ...runtime.model import Model, load
from ..subject import CPU_ENGINE, ONNXRUNTIME, TENSORRT, Subject, bundle_subject
from .probe import LOGITS, MERGER, PREPROCESS, STITCHED, Probe, layer_stage
from .staged import Staged
from .staged_cpu import StagedEngine


class Side(Protocol):
    """What can be compared: rows in, what passes between its stages, logits and answers out."""

    @property
    def subject(self) -> Subject:
        """What it is, for a report's reader."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""

    @property
    def preparer(self) -> Preparer:
        """What makes rows of messages, as this side does."""

    @property
    def can_be_fed(self) -> bool:
        """Whether its stages can be run by themselves."""

    def trace(self, row: Row, probe: Probe, positions: np.ndarray) -> None:
        """Run a row, its answer token by token behind the prompt, telling the probe; logits of positions [n]."""

    def trace_fed(self, row: Row, probe: Probe, positions: np.ndarray, image_embeds: np.ndarray | None) -> None:
        """The same where the probe gives what each stage is to read. image_embeds: [image tokens, D] to stitch in."""

    def logits(self, row: Row, positions: np.ndarray) -> np.ndarray:
        """Next-token logits, all tokens at once: float32 [n, vocab]."""

    def generate(self, row: Row, max_tokens: int) -> list[int]:
        """New ids after the prompt, greedily, without the end token."""

    def floor(self) -> "Side | None":
        """The same with every value rounded to BF16, which shows how much error is noise; None where it cannot be."""

    def close(self) -> None:
        """Let go of what is loaded."""


class BundleSide:
    """A bundle on ONNX Runtime, in its cpu engine or in TensorRT engines: what `load` makes of `engines`.

    memory: bytes that it may take; where the whole model needs more, it runs in stages. None: half of what is free.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        engines: str | bool | None = None,
        threads: int | None = None,
        exact: bool = False,
        rounded: bool = False,
        memory: int | None = None,
        name: str | None = None,
        kind: str = "bundle",
    ) -> None:
        self.bundle = Bundle.open(path)
        for part in ("vision", "decoder"):
            self.bundle.graph(part)
        self.config = self.bundle.manifest.model
        self._engines, self._threads, self._exact, self._rounded = engines, threads, exact, rounded
        self._memory = memory if memory is not None else (memory_field("MemAvailable") or 1 << 62) // 2
        self._backend = _backend_name(self.bundle, engines)
        self.subject = bundle_subject(self.bundle, self._backend, name=name, kind=kind)
        self.preparer = Preparer.from_directory(self.bundle.directory, self.config)
        self._model: Model | None = None
        self._staged: tuple[Model, list[Any]] | None = None

    def floor(self) -> "BundleSide | None":
        """The plain graphs with every value rounded to BF16."""
        if self.subject.dtype == "bf16":
            return None
        return BundleSide(
            self.bundle.directory,
            engines=False,
            threads=self._threads,
            exact=self._exact,
            rounded=True,
            memory=self._memory,
        )

    def trace(self, row: Row, probe: Probe, positions: np.ndarray) -> None:
        """As the runtime does it: each image alone, then all stitched in, the prompt in chunks, the answer by token."""
        model = self._traced(probe)
        embeds = _encode(model, row, probe)
        self._look(None)
        if self._backend == TENSORRT:
            probe.after(MERGER, embeds)
        probe.after(STITCHED, model.embed(*_inputs(row)))
        self._decode(model, row, probe, positions)

    def trace_fed(self, row: Row, probe: Probe, positions: np.ndarray, image_embeds: np.ndarray | None) -> None:
        """The same where the probe gives what each stage is to read. image_embeds: [image tokens, D] to stitch in."""
        model = self._traced(probe)
        _encode(model, row, probe)
        self._look(None)
        probe.after(STITCHED, model.stitch(row.input_ids, *_split(row, self.config, image_embeds)))
        self._decode(model, row, probe, positions)

    def _decode(self, model: Model, row: Row, probe: Probe, positions: np.ndarray) -> None:
        self._look(_DecoderOnly(probe))
        probe.after(LOGITS, model.logits_at(positions, *_inputs(row), prompt=max(row.answer_start, 1)))
        self._look(None)

    @property
    def can_be_fed(self) -> bool:
        """Whether its stages can be run by themselves."""
        return self._backend != TENSORRT

    def encode(self, row: Row) -> np.ndarray:
        """Embeddings of the row's images and frames: float32 [image tokens, D]."""
        return _image_embeds(self._whole(), row)

    def logits(self, row: Row, positions: np.ndarray) -> np.ndarray:
        """Next-token logits, all tokens at once: float32 [n, vocab]."""
        return self._whole().logits_at(positions, *_inputs(row))

    def generate(self, row: Row, max_tokens: int) -> list[int]:
        """New ids after the prompt, greedily, without the end token."""
        model = self._whole()
        _, *media = _inputs(row)
        prompt = row.input_ids[: row.answer_start]
        ids = model.generate_ids(prompt, *media, max_tokens=max_tokens)[0].tolist()
        return ids[:-1] if ids and ids[-1] in model.eos_token_ids else ids

    def staged_graph(self, part: str) -> Any:
        """The graph of a part that is looked into."""
        return self._staged_model().graphs[part]

    def close(self) -> None:
        """Let go of what is loaded."""
        self._model = self._staged = None

    def _whole(self) -> Model:
        """The model as it is deployed; in stages where its weights would take most of the memory that is free."""
        if self._model is None:
            if self._rounded or (self._backend == ONNXRUNTIME and self._needed() > self._memory):
                return self._staged_model()
            self._staged = None
            self._model = load(
                self.bundle.directory,
                threads=None if self._backend == TENSORRT else self._threads,
                engines=self._engines if self._backend != ONNXRUNTIME else False,
                exact=self._exact,
                image_cache=0,
                prefix_caches=0,
            )
        return self._model

    def _needed(self) -> int:
        """Bytes that the weights take when ONNX Runtime has loaded them: it widens FP16, and repacks codes."""
        graphs = self.bundle.manifest.graphs.values()
        return sum(n * (1 if kind == "fp32" else 3) for g in graphs for kind, n in g.weights.items())

    def _traced(self, probe: Probe) -> Model:
        if self._backend == TENSORRT:
            return self._whole()
        model = self._staged_model()
        self._look(probe)
        return model

    def _staged_model(self) -> Model:
        if self._staged is None:
            self._model = None
            backend, probed = self._staged_backend()
            self._staged = Model(self.bundle, backend, image_cache=0, prefix_caches=0), probed
        return self._staged[0]

    def _staged_backend(self) -> tuple[Any, list[Any]]:
        options = SessionOptions(threads=self._threads, exact=self._exact)
        plain = Staged(options, self._memory, rounded=self._rounded)
        if self._backend == ONNXRUNTIME:
            return plain, [plain]
        engine = StagedEngine(self._threads)
        return (engine if self._engines == CPU else CpuOrPlain(engine, plain)), [engine, plain]

    def _look(self, probe: Probe | None) -> None:
        for backend in self._staged[1] if self._staged else []:
            backend.probe = probe


class _DecoderOnly:
    """Passes on what the decoder tells; the tower, which ran before, is run again for its embeddings."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def before(self, stage: str, rows: np.ndarray) -> np.ndarray:
        return self.probe.before(stage, rows) if _of_decoder(stage) else rows

    def after(self, stage: str, rows: np.ndarray) -> None:
        if _of_decoder(stage):
            self.probe.after(stage, rows)


def _of_decoder(stage: str) -> bool:
    return stage == LOGITS or stage.startswith(layer_stage(0)[:-1])


def _backend_name(bundle: Bundle, engines: str | bool | None) -> str:
    if engines is False or (engines is None and not has_engine(bundle)):
        return ONNXRUNTIME
    return CPU_ENGINE if engines in (None, CPU) else TENSORRT


def segments(row: Row) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Pixel rows [patches, patch_dim] and size in patches of every image and frame of a row, images first."""
    return zip(pixels(row), sizes(row), strict=True)


def pixel_rows(row: Row) -> np.ndarray | None:
    """All pixel rows of a row, images first, as the stage preprocess gives them; None without any."""
    found = [values for values, _ in segments(row)]
    return np.concatenate(found).astype(np.float32, copy=False) if found else None


def _encode(model: Model, row: Row, probe: Probe) -> np.ndarray:
    """Run the tower on every image by itself, the pixels told first; returns the embeddings of all."""
    rows = pixel_rows(row)
    if rows is not None:
        probe.after(PREPROCESS, rows)
    return _image_embeds(model, row)


def _image_embeds(model: Model, row: Row) -> np.ndarray:
    found = [model.encode_images(values, np.array([[1, h, w]])) for values, (h, w) in segments(row)]
    return np.concatenate(found) if found else np.empty((0, model.config.text.hidden_size), np.float32)


def _split(row: Row, config: ModelConfig, embeds: np.ndarray | None) -> list[np.ndarray | None]:
    """Embeddings of the images of a row, and of its videos."""
    if embeds is None:
        return [None, None]
    images = int((row.input_ids == config.image_token_id).sum())
    return [embeds[start:stop] for start, stop in pairwise((0, images, len(embeds)))]


def _inputs(row: Row) -> tuple[Any, ...]:
    """A row as TokenModel takes it."""
    return row.input_ids, row.pixel_values, row.image_grid_thw, row.pixel_values_videos, row.video_grid_thw


def check_same_model(reference: ModelConfig, candidate: ModelConfig, names: tuple[str, str]) -> None:
    """Refuse to compare models of different shapes; the error names what differs."""
    for where in ("vision", "text"):
        wanted, found = getattr(reference, where), getattr(candidate, where)
        for name in wanted.__dataclass_fields__:
            if name in _SHAPE and getattr(wanted, name) != getattr(found, name):
                raise OneVisionError(
                    f"{names[1]} is another model than {names[0]}: {where} {name} is {getattr(found, name)}, not "
                    f"{getattr(wanted, name)}"
                )


_SHAPE = {
    *("depth", "hidden_size", "patch_size", "spatial_merge_size", "num_hidden_layers", "vocab_size", "num_heads"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
}
