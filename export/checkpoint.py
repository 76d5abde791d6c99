"""Lazy reading of a published checkpoint: safetensors headers first, values only when asked for.

Nothing in a checkpoint is executed, and no file is mapped: tensors are read with plain reads, so that
memory holds one tensor at a time whatever the size of the shard. Format:
https://github.com/huggingface/safetensors (8 bytes header length, JSON header, values).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..bundle import MANIFEST, Bundle
from ..config import ModelConfig, read_json
from ..errors import OneVisionError
from ..precision import BF16, FP16, FP32

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# Published layouts, as (prefix in the file, prefix here). The longer ones come first.
_LAYOUTS = (("model.visual.", "visual."), ("model.language_model.", "model."))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `size` bytes from `offset` of `path`.

    transposed: as a matrix [rest of the shape, shape[0]], which is how a bundle's graphs store Linears.
    """

    path: Path
    dtype: str  # safetensors' spelling: BF16, F16, F32
    shape: tuple[int, ...]
    offset: int
    size: int
    transposed: bool = False


class Checkpoint:
    """A checkpoint directory: its configuration and its tensors by their canonical names.

    Canonical names are those of the released files: `visual.*`, `model.*`, `lm_head.weight`. A full-precision
    bundle is one, too: its graphs hold the same tensors. name: what the manifest calls it.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor], name: str | None = None
    ) -> None:
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.name = name or directory.resolve().name

    @classmethod
    def open(cls, source: str | os.PathLike[str], code: bool = False) -> "Checkpoint":
        """Open a local directory, a hub id (with huggingface_hub installed), or "demo", the shipped one.

        A bundle is opened where it is in full precision. Raises OneVisionError for a missing or unsupported
        checkpoint and for broken safetensors.
        """
        directory = locate(source, code)
        if (directory / MANIFEST).is_file():
            return cls(*_bundle(directory))
        config = ModelConfig.from_checkpoint(directory)
        return cls(directory, config, _stored_tensors(directory))

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding table: decided by the head's absence alone."""
        return "lm_head.weight" not in self.tensors

    @property
    def head_name(self) -> str:
        """Name of the tensor that projects to the vocabulary."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def check(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The stored tensor `name`, which must exist with this shape in a floating-point dtype."""
        stored = self.tensors.get(name)
        if stored is None:
            raise OneVisionError(f"{self.directory}: tensor {name} is missing from the checkpoint")
        if stored.shape != shape:
            raise OneVisionError(
                f"{stored.path}: tensor {name} has shape {list(stored.shape)}; config.json asks for {list(shape)}"
            )
        if stored.dtype not in DTYPES:
            raise OneVisionError(
                f"{stored.path}: tensor {name} has dtype {stored.dtype}; supported: {', '.join(DTYPES)}"
            )
        return stored

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in its stored dtype (BF16 as ml_dtypes.bfloat16)."""
        stored = self.tensors[name]
        rows = stored.shape[0]
        shape = (math.prod(stored.shape[1:]), rows) if stored.transposed else stored.shape
        values = np.empty(shape, DTYPES[stored.dtype])
        with _opened(stored) as file:
            _read_exactly(file, values.reshape(-1).view(np.uint8), stored.path, name)
        return values.T.reshape(stored.shape) if stored.transposed else values

    def read_rows(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The tensor in blocks of `rows` along its first axis. The buffer is reused: use each before the next."""
        stored = self.tensors[name]
        count, *rest = stored.shape
        if stored.transposed:
            whole = self.read(name)
            yield from (np.ascontiguousarray(whole[start : start + rows]) for start in range(0, count, rows))
            return
        block = np.empty((min(rows, count), *rest), DTYPES[stored.dtype])
        with _opened(stored) as file:
            for start in range(0, count, rows):
                part = block[: min(rows, count - start)]
                _read_exactly(file, part.reshape(-1).view(np.uint8), stored.path, name)
                yield part


def locate(source: str | os.PathLike[str], code: bool = False) -> Path:
    """The local directory of a checkpoint named by path, hub id, or "demo". code: fetch its modeling code, too."""
    path = Path(source)
    if source == "demo":  # whatever the working directory holds; ./demo is the way to say that one
        return Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
    if path.is_dir():
        return path
    if path.is_file():
        raise OneVisionError(f"{path} is a file: give the checkpoint's directory, the one that holds config.json")
    if _looks_like_hub_id(str(source)):
        return _download(str(source), code)
    raise OneVisionError(f"{path} does not exist: give a checkpoint directory, a hub id (owner/name), or demo")


def _bundle(directory: Path) -> tuple[Path, ModelConfig, dict[str, StoredTensor], str]:
    """What a Checkpoint is made of, read from a bundle."""
    bundle = Bundle.open(directory)
    manifest = bundle.manifest
    if manifest.quantization is not None:
        raise OneVisionError(
            f"{directory} is a quantised bundle, whose weights are rounded already: give the checkpoint or the "
            "full-precision bundle it was made from"
        )
    tensors = {}
    for spec in manifest.graphs.values():
        graph = ir.load(bundle.path(spec.file)).graph
        for name, value in graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                tensors[name] = _external(bundle, spec.file, value.const_value, name)
    if manifest.embedding is not None:
        path, (rows, width) = bundle.path(manifest.embedding.file), manifest.embedding.shape
        dtype = next(code for code, fmt in _FORMATS.items() if fmt.onnx == manifest.embedding.dtype)
        tensors["model.embed_tokens.weight"] = StoredTensor(path, dtype, (rows, width), 0, path.stat().st_size)
    return directory, manifest.model, tensors, str(manifest.provenance.get("checkpoint"))


_FORMATS = {"BF16": BF16, "F16": FP16, "F32": FP32}


def _external(bundle: Bundle, graph: str, tensor: ir.ExternalTensor, name: str) -> StoredTensor:
    """A parameter of a graph as the tensor it was made from; a matrix lies transposed, [in, out]."""
    dtype = next((code for code, fmt in _FORMATS.items() if fmt.onnx_type == tensor.dtype), None)
    path, offset, size = bundle.path(str(tensor.location)), tensor.offset or 0, tensor.length or 0
    if dtype is None or path.name not in bundle.manifest.files or offset + size > path.stat().st_size:
        raise OneVisionError(f"{bundle.path(graph)}: {name} is not as this version writes it; export it again")
    shape = tuple(int(str(dim)) for dim in tensor.shape)
    if len(shape) == 2 and name.endswith(".weight"):
        return StoredTensor(path, dtype, _source_shape(bundle, name, shape), offset, size, transposed=True)
    return StoredTensor(path, dtype, shape, offset, size)


def _source_shape(bundle: Bundle, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] of a matrix stored [in, out]; a kernel [out, channels, side, side] where it was a convolution's."""
    vision = bundle.manifest.model.vision
    if name == "visual.patch_embed.proj.weight":
        return (shape[1], vision.in_channels, vision.patch_size, vision.patch_size)
    return (shape[1], shape[0])


def _looks_like_hub_id(source: str) -> bool:
    owner, _, name = source.partition("/")
    return bool(owner and name) and "/" not in name and not source.startswith((".", "~"))


def _download(hub_id: str, code: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise OneVisionError(
            f"{hub_id} is not a local directory; to fetch it from the hub: pip install 'onevision-edge[hub]'"
        ) from None
    try:
        kinds = ["*.json", "*.safetensors", "*.jinja", "*.txt", *(["*.py"] if code else [])]
        return Path(snapshot_download(hub_id, allow_patterns=kinds))
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise OneVisionError(
            f"{hub_id} is not a local directory and could not be fetched from the hub: {first}"
        ) from error


def _stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by canonical name."""
    found: dict[str, StoredTensor] = {}
    for path, names in _shards(directory).items():
        header = read_safetensors_header(path)
        for name in names if names is not None else header:
            if name not in header:
                raise OneVisionError(f"{path}: tensor {name} is missing, but the index places it there")
            canonical = canonical_name(name)
            if canonical in found:
                raise OneVisionError(f"{path}: tensor {name} is stored twice (also in {found[canonical].path.name})")
            found[canonical] = header[name]
    return found


def _shards(directory: Path) -> dict[Path, list[str] | None]:
    """Each shard with the names the index gives it; None where there is no index."""
    index_path, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index_path.exists():
        return _indexed_shards(directory, index_path)
    if single.exists():
        return {single: None}
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise OneVisionError(
            f"{directory}: only pickled weights are here, which can execute code; convert them to safetensors first"
        )
    raise OneVisionError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is here")


def _indexed_shards(directory: Path, index_path: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OneVisionError(f"{index_path}: weight_map is missing or empty")
    shards: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not _is_shard_name(file):
            raise OneVisionError(
                f"{index_path}: weight_map places {name} in {file!r}, not a safetensors file beside it"
            )
        names = shards.setdefault(directory / file, [])
        assert names is not None
        names.append(name)
    return shards


def _is_shard_name(file: Any) -> bool:
    """A plain file name; what cannot be printed (a null byte, a lone surrogate) cannot be opened either."""
    return isinstance(file, str) and file.isprintable() and Path(file).name == file and file.endswith(".safetensors")


def canonical_name(name: str) -> str:
    """A tensor's name in the released layout."""
    for prefix, canonical in _LAYOUTS:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, every claim of its header checked against the file."""
    try:
        with open(path, "rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            raw, start = _header_json(file, file_size, path)
    except FileNotFoundError:
        raise OneVisionError(f"{path} does not exist, but the checkpoint's index names it") from None
    except OSError as error:
        raise OneVisionError(f"{path} cannot be read: {error.strerror}") from error
    raw.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, start, file_size) for name, entry in raw.items()}
    _check_coverage(path, tensors, start, file_size)
    return tensors


def _header_json(file: Any, file_size: int, path: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if file_size < 8 or length > min(_MAX_HEADER_BYTES, file_size - 8):
        raise OneVisionError(
            f"{path}: truncated or not safetensors (header of {length} bytes in a file of {file_size})"
        )
    try:
        raw = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise OneVisionError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise OneVisionError(f"{path}: the safetensors header is not an object")
    return raw, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in entries if names.count(name) > 1)} twice")
    return entries


def _stored(path: Path, name: str, entry: Any, start: int, file_size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end))
        sound = whole and begin <= end and isinstance(entry["shape"], list) and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise OneVisionError(f"{path}: tensor {name} has a malformed header entry")
    if start + end > file_size:
        raise OneVisionError(
            f"{path}: truncated: tensor {name} ends at byte {start + end}, the file at {file_size}; fetch it again"
        )
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise OneVisionError(f"{path}: tensor {name} claims {list(shape)} {dtype} but holds {end - begin} bytes")
    return StoredTensor(path, dtype, shape, start + begin, end - begin)


def _check_coverage(path: Path, tensors: Mapping[str, StoredTensor], start: int, file_size: int) -> None:
    """Values must follow one another without gap or overlap up to the end of the file."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != position:
            raise OneVisionError(f"{path}: tensor {name} overlaps its neighbour or leaves a gap before it")
        position += tensor.size
    if position != file_size:
        raise OneVisionError(f"{path}: {file_size - position} bytes after the last tensor belong to none")


@contextmanager
def _opened(stored: StoredTensor) -> Iterator[Any]:
    """The tensor's file, at its first byte; what goes wrong with it is said of it."""
    try:
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.offset)
            yield file
    except OSError as error:
        raise OneVisionError(f"{stored.path} cannot be read: {error.strerror}") from error


def _read_exactly(file: Any, buffer: np.ndarray, path: Path, name: str) -> None:
    view = buffer.data
    while view:
        count = file.readinto(view)
        if not count:
            raise OneVisionError(f"{path}: truncated while reading tensor {name}; fetch the file again")
        view = view[count:]
