"""engine.json of engines/cpu/: what the programs were made of. Read by the runtime, so light to import."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...bundle import Bundle, FileSpec
from ...config import read_json
from ...errors import OneVisionError
from ..record import BUNDLE, CPU, ENGINES, RECORD, check_file, check_format, check_sources

FORMAT = "onevision-edge cpu engine"
FORMAT_VERSION = 1
AGAIN = "build it again with onevision-edge build {} --target cpu --overwrite"


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One graph's program. floats: what products run in whose weights the bundle stores as floats.

    sources: the graph's files in the bundle. files: the program and its weights. bytes_per_row: of weights that one
    row reads. check: how its outputs differ from the plain graph's (relative L2 norm and cosine), and both times.
    """

    floats: str
    sources: Mapping[str, FileSpec]
    files: Mapping[str, FileSpec]
    bytes_per_row: int
    check: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CpuRecord:
    """The engine of a bundle for CPUs, and where it was built."""

    machine: Mapping[str, Any]
    parts: Mapping[str, PartRecord]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in reading order."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: Path) -> "CpuRecord":
        """Checked reading. Raises OneVisionError for anything this version did not write."""
        check_format(raw, where, FORMAT, FORMAT_VERSION, AGAIN.format(BUNDLE))
        try:
            return cls(dict(raw["machine"]), {part: _part(one) for part, one in raw["parts"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OneVisionError(
                f"{where} is not what this version writes ({error!r}): {AGAIN.format(BUNDLE)}"
            ) from error


def _part(raw: Mapping[str, Any]) -> PartRecord:
    def files(key: str) -> dict[str, FileSpec]:
        return {str(name): FileSpec(int(f["size"]), str(f["sha256"])) for name, f in raw[key].items()}

    check = {str(name): float(value) for name, value in raw["check"].items()}
    return PartRecord(str(raw["floats"]), files("sources"), files("files"), int(raw["bytes_per_row"]), check)


def folder_of(bundle: Bundle) -> Path:
    """Where a bundle's cpu engine is, or would be."""
    return bundle.directory / ENGINES / CPU


def has_engine(bundle: Bundle) -> bool:
    """Whether a bundle has a cpu engine, sound or not."""
    return (folder_of(bundle) / RECORD).is_file()


def read_record(bundle: Bundle) -> CpuRecord | None:
    """The record of a bundle's cpu engine, None where it has none. Raises OneVisionError where it is malformed."""
    path = folder_of(bundle) / RECORD
    return CpuRecord.from_dict(read_json(path), path) if has_engine(bundle) else None


def check_part(bundle: Bundle, record: CpuRecord, part: str) -> None:
    """Raise OneVisionError unless a part's files are whole and made of the bundle's own graph."""
    folder, again = folder_of(bundle), AGAIN.format(bundle.directory)
    if part not in record.parts:
        raise OneVisionError(f"{folder} has no {part}, only {', '.join(record.parts)}; {again}")
    for name, spec in record.parts[part].files.items():
        check_file(folder / Path(name).name, spec.size, again)
    check_sources(bundle, folder, record.parts[part].sources, again)
