"""What is compared or timed: a bundle, or another reference, described for a report's reader."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..config import ModelConfig

ONNXRUNTIME, CPU_ENGINE, TENSORRT, TRANSFORMERS = "onnxruntime", "cpu engine", "tensorrt", "transformers"
_FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Subject:
    """One side of a comparison. precision: of the decoder's products; files: size and sha256 by name; bytes: of all."""

    name: str
    kind: str  # bundle, checkpoint, transformers or stored
    backend: str
    precision: str
    dtype: str
    bytes: int
    weights_sha256: str | None
    files: Mapping[str, Mapping[str, Any]]
    model: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {**asdict(self), "files": {k: dict(v) for k, v in self.files.items()}, "notes": list(self.notes)}


def bundle_subject(bundle: Bundle, backend: str, *, name: str | None = None, kind: str = "bundle") -> Subject:
    """A bundle that `backend` runs. name: the directory's without one."""
    manifest = bundle.manifest
    files = {name: asdict(spec) for name, spec in manifest.files.items()}
    dtype = next((graph.dtype for graph in manifest.graphs.values()), "fp32")
    return Subject(
        name=name or Path(bundle.directory).resolve().name,
        kind=kind,
        backend=backend,
        precision=_precision(bundle, dtype),
        dtype=dtype,
        bytes=sum(spec.size for spec in manifest.files.values()),
        weights_sha256=manifest.provenance.get("weights_sha256"),
        files=files,
        model=model_shape(manifest.model),
    )


def model_shape(config: ModelConfig) -> dict[str, int]:
    """The numbers by which a reader knows a model."""
    return {
        "vision_depth": config.vision.depth,
        "layers": config.text.num_hidden_layers,
        "hidden_size": config.text.hidden_size,
        "vocab_size": config.text.vocab_size,
    }


def _precision(bundle: Bundle, dtype: str) -> str:
    """The plan's name where the bundle was quantised, else what it computes in."""
    record = bundle.manifest.quantization
    return dtype if record is None else str(record["plan"]["name"])


def names(paths: Sequence[Path]) -> list[str]:
    """A name for each path, all different; a path that comes twice is numbered."""
    found = [path.name for path in paths]
    deepest = max((len(path.parts) for path in paths), default=0)
    for depth in range(2, deepest + 1):
        counts = Counter(found)
        again = [os.path.join(*path.parts[-depth:]) for path in paths]
        found = [long if counts[name] > 1 else name for name, long in zip(found, again, strict=True)]
    return numbered(found)


def numbered(found: Sequence[str]) -> list[str]:
    """Names with a number behind those that came before."""
    seen: Counter[str] = Counter()
    unique = []
    for name in found:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique
