"""Engines on disk: engines/<target>/ inside a bundle, with engine.json, which says what each was built of and for.

The directory is written beside its place and renamed when complete. An engine is opened by its record, and refused
before it is deserialised where it cannot run: each refusal names the command that builds it again.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle, FileSpec, file_sha256
from ..config import read_json
from ..errors import OneVisionError
from .dialects import DIALECTS, RTX, version_numbers
from .profiles import Profile

ENGINES = "engines"  # the folder of a bundle
CPU = "cpu"  # the folder there that holds no engines of TensorRT: see engines/cpu
RECORD = "engine.json"
FORMAT = "onevision-edge engines"
FORMAT_VERSION = 1
BUNDLE = "BUNDLE"
# TensorRT-RTX's header, as version 1.7.1 writes it: a tag, the file's size at byte 16, the version at 24, the
# compute capabilities at 32.
HEADER_SIZE = 64
_TAG = b"vtrt"


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine. sources: the graph file and its data file, by name in the bundle. profiles: their limits, in the
    order they were added. seconds and peak_rss (bytes): of its build. layers: of the parsed network, by kind. All three
    are unknown (None, empty) of an engine that was built by a command."""

    file: str
    size: int
    sha256: str
    sources: Mapping[str, FileSpec]
    profiles: Mapping[str, Mapping[str, Mapping[str, int]]]
    seconds: float | None
    peak_rss: int | None
    layers: Mapping[str, int]

    @property
    def limits(self) -> Mapping[str, Mapping[str, int]]:
        """What the engine takes in all: of its first profile, the widest."""
        return next(iter(self.profiles.values()))


@dataclass(frozen=True, slots=True)
class EngineSet:
    """The engines of a bundle for a target."""

    engine: str  # tensorrt-rtx or tensorrt
    version: str  # of the library that built them
    target: str
    capabilities: tuple[str, ...]
    options: Mapping[str, Any]
    command: str  # that builds them again, with BUNDLE for where the bundle is
    estimate: Mapping[str, Any]
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)  # by part

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in reading order."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: Path) -> "EngineSet":
        """Checked reading. Raises OneVisionError for anything this version did not write."""
        check_format(raw, where, FORMAT, FORMAT_VERSION, "build the engines again with onevision-edge build")
        try:
            if raw["engine"] not in DIALECTS:
                raise ValueError(raw["engine"])
            return cls(
                engine=raw["engine"],
                version=str(raw["version"]),
                target=str(raw["target"]),
                capabilities=tuple(map(str, raw["capabilities"])),
                options=dict(raw["options"]),
                command=str(raw["command"]),
                estimate=dict(raw["estimate"]),
                engines={part: _engine_record(engine) for part, engine in raw["engines"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OneVisionError) as error:
            raise OneVisionError(
                f"{where} is not what this version writes ({error!r}): build the engines again with "
                "onevision-edge build"
            ) from error


def check_format(raw: Mapping[str, Any], where: Path, known: str, version: int, again: str) -> None:
    """Raise OneVisionError, which ends in `again`, unless a record names a format and its version."""
    if raw.get("format") != known or raw.get("format_version") != version:
        raise OneVisionError(
            f"{where} is {raw.get('format')!r} version {raw.get('format_version')!r}; this version reads "
            f"{known!r} version {version}: {again}"
        )


def _engine_record(raw: Mapping[str, Any]) -> EngineRecord:
    profiles = {name: Profile.from_limits(name, limits).limits() for name, limits in raw["profiles"].items()}
    if not profiles or Path(raw["file"]).name != raw["file"]:
        raise ValueError(raw["file"])
    return EngineRecord(
        file=str(raw["file"]),
        size=int(raw["size"]),
        sha256=str(raw["sha256"]),
        sources={name: FileSpec(int(f["size"]), str(f["sha256"])) for name, f in raw["sources"].items()},
        profiles=profiles,
        seconds=None if raw["seconds"] is None else float(raw["seconds"]),
        peak_rss=None if raw["peak_rss"] is None else int(raw["peak_rss"]),
        layers={str(kind): int(count) for kind, count in raw["layers"].items()},
    )


def engine_folders(bundle: Bundle) -> list[Path]:
    """The engine sets of a bundle, complete ones alone, without the CPU's."""
    folders = (path.parent for path in (bundle.directory / ENGINES).glob(f"[!.]*/{RECORD}"))
    return sorted(folder for folder in folders if folder.name != CPU)


def read_set(folder: Path) -> EngineSet:
    """The record of a folder of engines. Raises OneVisionError where there is none, or it is malformed."""
    if not (folder / RECORD).is_file():
        raise OneVisionError(f"{folder} holds no {RECORD}: build its engines with onevision-edge build")
    return EngineSet.from_dict(read_json(folder / RECORD), folder / RECORD)


def check_engine(
    bundle: Bundle,
    folder: Path,
    part: str,
    *,
    engine: str,
    version: str,
    capability: str | None = None,
    verify: bool = False,
) -> tuple[Path, EngineSet]:
    """The file of an engine that can be deserialised here, and the record of its set.

    engine, version: the library at hand, tensorrt-rtx or tensorrt. capability: of the GPU, such as sm86; None: not
    checked. verify: hash the engine. Raises OneVisionError, before the file is loaded, where the record is not sound,
    the file differs from it, the library or the GPU is another one, or the bundle's graph has changed since.
    """
    found = read_set(folder)
    again = f"build it again: {found.command.replace(BUNDLE, shlex.quote(str(bundle.directory)))}"
    if part not in found.engines:
        raise OneVisionError(f"{folder} has no {part} engine, only {', '.join(found.engines) or 'none'}; {again}")
    record, path = found.engines[part], folder / found.engines[part].file
    check_file(path, record.size, again)
    if verify and file_sha256(path) != record.sha256:
        raise OneVisionError(f"{path} has changed since it was built: its sha256 is not its record's; {again}")
    if found.engine == RTX.name:
        _check_header(path, found, again)
    if found.engine != engine:
        raise OneVisionError(f"{path} is an engine of {DIALECTS[found.engine].title}, not of {engine}; {again}")
    if not _version_runs(found, version):
        raise OneVisionError(
            f"{path} was built by {DIALECTS[engine].title} {found.version}, and {version} is installed here; {again}"
        )
    if capability is not None and not _capability_runs(found, capability):
        raise OneVisionError(
            f"{path} was built for {', '.join(found.capabilities)}, and this GPU is {capability}; {again}"
        )
    check_sources(bundle, path, record.sources, again)
    return path, found


def check_file(path: Path, wanted: int, again: str) -> None:
    """Raise OneVisionError, which ends in `again`, unless there is a file of the size that its record says."""
    if not path.is_file():
        raise OneVisionError(f"{path} is missing; {again}")
    if (size := path.stat().st_size) != wanted:
        raise OneVisionError(f"{path} has {size} bytes, its record says {wanted}: it was cut or replaced; {again}")


def _check_header(path: Path, found: EngineSet, again: str) -> None:
    """What TensorRT-RTX wrote at the start of the file, held against the record."""
    with open(path, "rb") as file:
        header = read_header(file.read(HEADER_SIZE))
    if header is None:
        raise OneVisionError(f"{path} is not a TensorRT-RTX engine: its first bytes are none of one's; {again}")
    for what, is_now, recorded in (
        ("version", header.version, found.version),
        ("compute capabilities", header.capabilities, tuple(sorted(found.capabilities, key=RTX_ORDER.index))),
    ):
        if is_now != recorded:
            told = [v if isinstance(v, str) else ", ".join(v) for v in (is_now, recorded)]
            raise OneVisionError(f"{path}: its header says {what} {told[0]}, its record says {told[1]}; {again}")
    if header.size != path.stat().st_size:
        raise OneVisionError(f"{path} has {path.stat().st_size} bytes, its header says {header.size}; {again}")


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a TensorRT-RTX engine tell."""

    size: int
    version: str
    capabilities: tuple[str, ...]


RTX_ORDER = RTX.capabilities or ()


def read_header(data: bytes) -> Header | None:
    """The header of a TensorRT-RTX engine; None where these bytes are something else.

    Observed, not documented: engines of version 1.7.1 for every compute capability and several lists of them.
    """
    if len(data) < HEADER_SIZE or data[:4] != _TAG or data[28:32] != _TAG:
        return None
    bits = int.from_bytes(data[32:36], "little")
    capabilities = tuple(name for i, name in enumerate(RTX_ORDER) if bits >> i & 1)
    return Header(int.from_bytes(data[16:24], "little"), ".".join(map(str, data[24:28])), capabilities)


def _version_runs(found: EngineSet, version: str) -> bool:
    """The version that built it; with --versionCompatible, later ones of TensorRT, too."""
    built, installed = version_numbers(found.version), version_numbers(version)
    if found.options.get("versionCompatible"):
        return installed >= built
    return installed == built


def _capability_runs(found: EngineSet, capability: str) -> bool:
    if found.options.get("hardwareCompatibilityLevel") == "ampere+":
        return int(capability.removeprefix("sm")) >= 80
    return capability in found.capabilities


def check_sources(bundle: Bundle, built: Path, sources: Mapping[str, FileSpec], again: str) -> None:
    """Raise OneVisionError, which ends in `again`, unless the bundle holds the files that something was built of."""
    for name, spec in sources.items():
        if bundle.manifest.files.get(name) != spec:
            raise OneVisionError(f"{built} was built of another {name} than the bundle holds; {again}")


def source_digests(bundle: Bundle, names: Sequence[str]) -> dict[str, FileSpec]:
    """Size and sha256 of files of a bundle, hashed. Raises OneVisionError where they are not the manifest's."""
    found = {}
    for name in names:
        spec, path = bundle.manifest.files[name], bundle.path(name)
        found[name] = FileSpec(path.stat().st_size, file_sha256(path))
        if found[name].sha256 != spec.sha256:
            raise OneVisionError(f"{path} has changed since the bundle was written; export or copy it again")
    return found
