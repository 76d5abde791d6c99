"""config.pbtxt as Triton reads it: the fields of its ModelConfig message that we use, in text format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """One input or output. dims: -1 where a dimension is free."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False

    def text(self) -> str:
        """The entry of a list of inputs or outputs."""
        optional = ", optional: true" if self.optional else ""
        dims = ", ".join(map(str, self.dims))
        return f"{{ name: {_quoted(self.name)}, data_type: {self.data_type}, dims: [ {dims} ]{optional} }}"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. Either backend or platform is given; batches are dimensions of the tensors like others."""

    name: str
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    backend: str | None = None
    platform: str | None = None
    file: str | None = None  # in the version's folder, where it is not the backend's default
    gpu: bool = False
    decoupled: bool = False  # whether it may answer a request several times, which streaming is
    parameters: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file's content."""
        lines = [f"name: {_quoted(self.name)}"]
        for key, value in (("backend", self.backend), ("platform", self.platform)):
            lines += [f"{key}: {_quoted(value)}"] if value else []
        lines += [f"default_model_filename: {_quoted(self.file)}"] if self.file else []
        lines += ["max_batch_size: 0", *_tensors("input", self.inputs), *_tensors("output", self.outputs)]
        lines += [f"instance_group [ {{ kind: {'KIND_GPU' if self.gpu else 'KIND_CPU'}, count: 1 }} ]"]
        lines += ["model_transaction_policy { decoupled: true }"] if self.decoupled else []
        for key, value in self.parameters.items():
            lines.append(f"parameters {{ key: {_quoted(key)}, value: {{ string_value: {_quoted(value)} }} }}")
        return "\n".join(lines) + "\n"


def free_dims(shape: Sequence[int | str]) -> tuple[int, ...]:
    """A graph's shape with -1 for what is free."""
    return tuple(size if isinstance(size, int) else -1 for size in shape)


def _tensors(what: str, tensors: Sequence[TensorConfig]) -> list[str]:
    entries = ",\n".join(f"  {tensor.text()}" for tensor in tensors)
    return [f"{what} [\n{entries}\n]"]


def _quoted(text: str) -> str:
    return json.dumps(text)
