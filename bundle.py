"""The deployable directory: what is in it, how it is written whole or not at all, how it is verified.

manifest.json     what follows, described: model, contracts, limits, provenance, sha256 of every file
vision.onnx, decoder.onnx, *.onnx.data
embed_tokens.bin  the token embedding table, rows of `dtype`, read by the host through a memory map
tokenizer and processor files as published
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .config import ModelConfig, read_json
from .errors import OneVisionError

MANIFEST = "manifest.json"
FORMAT = "onevision-edge bundle"
FORMAT_VERSION = 2

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being worked on


def no_progress(done: int, total: int, label: str) -> None:
    """The progress of callers who want none."""


# A title and what is counted (B for bytes) to a callback for what is done under it.
Phases = Callable[[str, str], AbstractContextManager[Progress]]


def no_phases(title: str, unit: str) -> AbstractContextManager[Progress]:
    """The phases of callers who want no progress."""
    return nullcontext(no_progress)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph. A dimension is a size or the name of a free one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """NVFP4 weights [rows, columns] in a data file: byte offsets of FP4 codes and of FP8 scales, and their scale."""

    name: str
    shape: tuple[int, int]
    block: int  # rows that share a scale
    codes: int
    scales: int
    tensor_scale: float


@dataclass(frozen=True, slots=True)
class WideSpec:
    """A graph's twin for engines without FP4: INT8 where it says FP4, the same data file."""

    file: str
    weights: tuple[PackedWeight, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """The contract of one graph file."""

    file: str
    dtype: str  # fp32, fp16 or bf16: what it computes in
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Mapping[str, int]  # bytes by what they are stored in: fp32, fp16, bf16, int8, int4, fp8, nvfp4
    wide: WideSpec | None = None

    @property
    def quantized(self) -> bool:
        """Whether any weights are stored in codes."""
        return set(self.weights) != {self.dtype}

    @property
    def int8_cache(self) -> bool:
        """Whether a decoder's KV cache holds INT8 codes."""
        return any(tensor.name == "past_key.0" and tensor.dtype == "int8" for tensor in self.inputs)


@dataclass(frozen=True, slots=True)
class TableSpec:
    """The embedding table: rows of `dtype`, row-major, nothing else in the file."""

    file: str
    dtype: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FileSpec:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json holds."""

    model: ModelConfig
    graphs: Mapping[str, GraphSpec]
    embedding: TableSpec | None
    max_length: int
    provenance: Mapping[str, Any]
    quantization: Mapping[str, Any] | None = None  # plan, methods and data of a quantised bundle
    quality: Mapping[str, Any] | None = None  # its measured distance from full precision; None: not measured
    files: Mapping[str, FileSpec] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in reading order."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "limits": {"max_length": self.max_length},
            "graphs": {name: asdict(graph) for name, graph in self.graphs.items()},
            "embedding": asdict(self.embedding) if self.embedding else None,
            "provenance": dict(self.provenance),
            "quantization": dict(self.quantization) if self.quantization else None,
            "quality": dict(self.quality) if self.quality else None,
            "files": {name: asdict(spec) for name, spec in self.files.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Manifest":
        """Checked reading; raises OneVisionError for anything this version did not write."""
        if raw.get("format") != FORMAT:
            raise OneVisionError(f"{MANIFEST}: format is {raw.get('format')!r}, not {FORMAT!r}")
        if raw.get("format_version") != FORMAT_VERSION:
            raise OneVisionError(
                f"{MANIFEST}: format_version is {raw.get('format_version')!r}; this version reads {FORMAT_VERSION}: "
                "export the bundle again"
            )
        try:
            return cls(
                model=ModelConfig.from_dict(raw["model"]),
                graphs={name: _graph_spec(graph) for name, graph in raw["graphs"].items()},
                embedding=_table_spec(raw["embedding"]),
                max_length=int(raw["limits"]["max_length"]),
                provenance=dict(raw["provenance"]),
                quantization=dict(raw["quantization"]) if raw["quantization"] else None,
                quality=dict(raw["quality"]) if raw["quality"] else None,
                files={name: FileSpec(int(f["size"]), str(f["sha256"])) for name, f in raw["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OneVisionError(f"{MANIFEST} is not what this version writes: {error!r}") from error


def _graph_spec(raw: Mapping[str, Any]) -> GraphSpec:
    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), t["meaning"]) for t in raw[key])

    weights = {str(name): int(count) for name, count in raw["weights"].items()}
    inputs, outputs = tensors("inputs"), tensors("outputs")
    return GraphSpec(raw["file"], raw["dtype"], inputs, outputs, weights, _wide_spec(raw["wide"]))


def _wide_spec(raw: Mapping[str, Any] | None) -> WideSpec | None:
    if raw is None:
        return None
    weights = (PackedWeight(**{**weight, "shape": tuple(weight["shape"])}) for weight in raw["weights"])
    return WideSpec(raw["file"], tuple(weights))


def _table_spec(raw: Mapping[str, Any] | None) -> TableSpec | None:
    if raw is None:
        return None
    rows, width = raw["shape"]
    return TableSpec(raw["file"], raw["dtype"], (int(rows), int(width)))


class Bundle:
    """A bundle on disk, opened: its manifest is sound and its files are there with the right sizes."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Open the bundle at `path`. Raises OneVisionError when it is missing, partial or malformed."""
        directory = Path(path)
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise OneVisionError(f"{directory} {what}: give a bundle directory, as `onevision-edge export` writes it")
        if not (directory / MANIFEST).is_file():
            raise OneVisionError(f"{directory} holds no {MANIFEST}, so it is not a bundle; export the checkpoint first")
        bundle = cls(directory, Manifest.from_dict(read_json(directory / MANIFEST)))
        bundle._check_files()
        return bundle

    def path(self, name: str) -> Path:
        """The path of a file of the bundle; names that leave the bundle are refused."""
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise OneVisionError(f"{self.directory / MANIFEST}: {name!r} lies outside the bundle")
        return self.directory / parts

    def graph(self, part: str) -> GraphSpec:
        """The contract of `vision` or `decoder`; an error where the bundle was exported without it."""
        if part not in self.manifest.graphs:
            raise OneVisionError(
                f"{self.directory} holds no {part} graph (it has {', '.join(self.manifest.graphs)}): "
                f"export again with --parts vision,decoder"
            )
        return self.manifest.graphs[part]

    def verify(self, progress: Progress = no_progress) -> None:
        """Hash every file and compare with the manifest, offline. Raises OneVisionError listing what differs."""
        total = sum(spec.size for spec in self.manifest.files.values())
        done, wrong = 0, []
        for name, spec in self.manifest.files.items():
            digest = hashlib.sha256()
            for block in _blocks(self.path(name)):
                digest.update(block)
                done += len(block)
                progress(done, total, name)
            if digest.hexdigest() != spec.sha256:
                wrong.append(name)
        if wrong:
            raise OneVisionError(f"{self.directory}: changed since it was written: {', '.join(wrong)}")

    def _check_files(self) -> None:
        named = [g.file for g in self.manifest.graphs.values()]
        named += [g.wide.file for g in self.manifest.graphs.values() if g.wide]
        named += [self.manifest.embedding.file] if self.manifest.embedding else []
        for name in named:
            self.path(name)
            if name not in self.manifest.files:
                raise OneVisionError(f"{self.directory / MANIFEST}: {name} is used but not listed under files")
        for name, spec in self.manifest.files.items():
            path = self.path(name)
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise OneVisionError(f"{path} is missing from the bundle; export or copy it again")
            if size != spec.size:
                raise OneVisionError(f"{path} has {size} bytes, the manifest says {spec.size}; export or copy it again")


def file_sha256(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, size: int = 1 << 22) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while block := file.read(size):
            yield block


class BundleWriter:
    """A bundle being written: a hidden directory beside the destination, renamed to it when complete.

    Use `writing(...)`. What a killed process leaves behind is swept by the next write to the same place.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, FileSpec] = {}

    def path(self, name: str) -> Path:
        """Where to write the file `name`; call `seal` when it is complete."""
        return self.directory / name

    def seal(self, name: str, sha256: str | None = None) -> None:
        """Flush a finished file to disk and record its digest (hashed here unless given)."""
        path = self.path(name)
        if sha256 is None:
            sha256 = file_sha256(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self.files[name] = FileSpec(path.stat().st_size, sha256)

    def write_manifest(self, manifest: Manifest) -> None:
        """The last file: with it the directory is a bundle."""
        path = self.path(MANIFEST)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(manifest.to_dict(), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def writing(
    destination: str | os.PathLike[str],
    overwrite: bool = False,
    expected_bytes: int = 0,
    *,
    marker: str = MANIFEST,
    what: str = "bundle",
) -> Iterator[BundleWriter]:
    """Write a bundle to `destination`: all of it, or nothing. Other directories, too, that hold a `marker` file.

    expected_bytes: refuse at once where the disk has less free. Raises OneVisionError when the destination
    exists (unless `overwrite` and it is a bundle), another process writes it, or the disk is full.
    """
    target = Path(os.path.abspath(destination))
    check_destination(target, overwrite, marker, what)
    staging = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(staging, what)
    except (FileExistsError, NotADirectoryError) as error:
        raise OneVisionError(f"{target}: cannot be written: {error.filename} is not a directory") from error
    except OSError as error:
        raise OneVisionError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        check_destination(target, overwrite, marker, what)  # again: another process may have finished in between
        _check_space(staging, expected_bytes, what)
        yield BundleWriter(staging)
        _replace(staging, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(staging).free
            raise OneVisionError(
                f"{target}: the disk is full ({_size(free)} free); nothing of the {what} was kept, free some room and "
                "try again"
            ) from error
        raise OneVisionError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if _stands_at(staging, lock):  # after the rename, the name belongs to whoever writes next
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def check_destination(target: Path, overwrite: bool, marker: str = MANIFEST, what: str = "bundle") -> None:
    """Refuse to write where something else stands."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OneVisionError(f"{target} exists and is not a directory")
    if not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise OneVisionError(f"{target} exists and is not a {what}; choose another destination")
    if not overwrite:
        raise OneVisionError(f"{target} exists; pass --overwrite to replace it")


def _claim(staging: Path, what: str) -> int:
    """Take the staging directory for this process, swept clean; returns the locked descriptor."""
    while True:
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OneVisionError(f"{staging}: another process is writing this {what}; wait for it to end") from None
        if _stands_at(staging, lock):
            break
        os.close(lock)  # another process finished and renamed it between the two calls
    for entry in staging.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return lock


def _stands_at(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the directory behind `descriptor`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _check_space(directory: Path, expected_bytes: int, what: str) -> None:
    free = shutil.disk_usage(directory).free
    if expected_bytes > free:
        raise OneVisionError(
            f"{directory.parent}: the {what} needs {_size(expected_bytes)}, the disk has {_size(free)} free"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _replace(staging: Path, target: Path) -> None:
    """Rename the finished directory to its destination, over an older bundle if there is one."""
    old = target.parent / f".{target.name}.old"
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(old, target)
            raise
    else:
        os.rename(staging, target)
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
