"""The full report of a checkpoint: a bundle in each precision, all held against its FP32 graphs, all timed in turn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..bundle import Bundle, Phases, no_phases
from ..errors import OneVisionError

FLOATS = ("fp32", "fp16", "bf16")
PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8", "nvfp4")


@dataclass(frozen=True, slots=True)
class Bundles:
    """How the bundles are made. calibration: of quantised ones, None for the shipped set; engine: build the CPU's."""

    precisions: Sequence[str] = PRECISIONS
    calibration: str | None = None
    max_length: int | None = None
    seed: int = 0
    engine: bool = False


@contextmanager
def working_directory(kept: Path | None) -> Iterator[Path]:
    """Where the bundles go: a directory that stays, or one that goes with the block."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with TemporaryDirectory(prefix="onevision-edge-report-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def make_bundles(checkpoint: str, folder: Path, wanted: Bundles, phases: Phases = no_phases) -> list[Path]:
    """A bundle in each precision, in `folder` by its name; those that are there are kept. Raises OneVisionError."""
    return [_made(checkpoint, folder / precision, precision, wanted, phases) for precision in wanted.precisions]


def _made(checkpoint: str, path: Path, precision: str, wanted: Bundles, phases: Phases) -> Path:
    if path.exists():
        _check_made_of(checkpoint, path)
    elif precision in FLOATS:
        _export(checkpoint, path, precision, wanted, phases)
    else:
        _quantize(checkpoint, path, precision, wanted, phases)
    if wanted.engine and not (path / "engines" / "cpu").exists():
        _build(path, phases)
    return path


def _export(checkpoint: str, path: Path, dtype: str, wanted: Bundles, phases: Phases) -> None:
    from ..export import export

    with phases(f"{dtype}: export", "B") as progress:
        export(checkpoint, path, dtype=dtype, max_length=wanted.max_length, progress=progress)


def _quantize(checkpoint: str, path: Path, precision: str, wanted: Bundles, phases: Phases) -> None:
    from ..calibration.quantize import quantize

    settings: dict[str, Any] = {"calibration": wanted.calibration, "max_length": wanted.max_length, "seed": wanted.seed}
    quantize(checkpoint, path, precision=precision, evaluate=False, phases=phases, **settings)


def _build(path: Path, phases: Phases) -> None:
    from ..engines.cpu.build import build_cpu

    build_cpu(path, check=False, phases=phases)


def _check_made_of(checkpoint: str, path: Path) -> None:
    """Refuse a bundle of another checkpoint that stands where one is to be made."""
    from ..export.checkpoint import Checkpoint

    if Bundle.open(path).manifest.model != Checkpoint.open(checkpoint).config:
        raise OneVisionError(f"{path} is a bundle of another checkpoint than {checkpoint}; give another folder")
