"""Thresholds of a parity report, read from a file. They are apart from the metrics, so that a stored report can be
judged again; parity-gates.toml says what each of them means."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...errors import OneVisionError
from .metrics import METRICS
from .probe import LOGITS, MERGER, PATCH_EMBED, STITCHED, block_stage, layer_stage

SHIPPED_GATES = Path(__file__).with_name("parity-gates.toml")
DEFAULT = "default"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-weight", "int4", "fp8", "nvfp4", "mixed")
NOISE_FACTOR = 3.0
_NUMBERS = ("preprocess", "noise_factor", "divergent_rows")
_STAGE_TABLES, _METRIC_TABLES = ("error", "own"), ("at_most", "at_least", "worse_by")
_KEYS = (*_NUMBERS, *_STAGE_TABLES, *_METRIC_TABLES, "required")
_MOST_LAYERS = 256  # which a pattern may name
_STAGES = (
    *(PATCH_EMBED, MERGER, STITCHED, LOGITS),
    *(stage(index) for stage in (block_stage, layer_stage) for index in range(_MOST_LAYERS)),
)

Limits = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class PrecisionGates:
    """The limits of one precision; see parity-gates.toml. None or nothing: not judged.

    error, own: patterns of stages and the relative L2 allowed, of which the last that matches decides.
    """

    name: str
    source: str
    error: Limits
    own: Limits
    preprocess: float | None
    noise_factor: float
    divergent_rows: float | None
    at_most: Mapping[str, float]
    at_least: Mapping[str, float]
    worse_by: Mapping[str, float]
    required: tuple[str, ...]

    def limit(self, kind: str, stage: str) -> float | None:
        """The relative L2 allowed to a stage, of `error` or `own`."""
        rules: Limits = self.error if kind == "error" else self.own
        return next((limit for pattern, limit in reversed(rules) if fnmatchcase(stage, pattern)), None)

    def margin(self, metric: str) -> float:
        """By how much a score may be worse; 0 where nothing says so."""
        return self.worse_by.get(metric, 0.0)


@dataclass(frozen=True, slots=True)
class Gates:
    """All sections of a gates file. source: its name, without folders."""

    source: str
    sections: Mapping[str, Mapping[str, Any]]

    def of(self, precision: str) -> PrecisionGates:
        """The limits of a precision: those of [default], then its own where it has a section."""
        name = precision if precision in self.sections else DEFAULT
        chain = [self.sections.get(DEFAULT, {})] + ([self.sections[name]] if name != DEFAULT else [])

        def rules(key: str) -> Limits:
            return tuple(rule for section in chain for rule in section.get(key, {}).items())

        plain = {key: value for section in chain for key, value in section.items()}
        return PrecisionGates(
            name=name,
            source=self.source,
            error=rules("error"),
            own=rules("own"),
            preprocess=plain.get("preprocess"),
            noise_factor=plain.get("noise_factor", NOISE_FACTOR),
            divergent_rows=plain.get("divergent_rows"),
            at_most=dict(rules("at_most")),
            at_least=dict(rules("at_least")),
            worse_by=dict(rules("worse_by")),
            required=tuple(plain.get("required", ())),
        )


def load_gates(path: Path | None = None) -> Gates:
    """Read a gates file, the shipped one without a path. Raises OneVisionError naming what is unknown or no number."""
    source = path or SHIPPED_GATES
    try:
        raw = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise OneVisionError(f"{source}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OneVisionError(f"{source}: is not TOML: {error}") from error
    try:
        for name, section in raw.items():
            _check_section(name, section)
    except OneVisionError as problem:
        raise OneVisionError(f"{source}: {problem}") from None
    return Gates(source.name, raw)


def _check_section(name: str, section: Any) -> None:
    _check_name(name, (DEFAULT, *PRECISIONS), "section")
    if not isinstance(section, dict):
        raise OneVisionError(f"{name} is {section!r}; it must be a section, such as [{DEFAULT}]")
    for key, value in section.items():
        where = f"[{name}] {key}"
        _check_name(key, _KEYS, f"key of [{name}]")
        if key == "required":
            _check_required(where, value)
        elif key in _NUMBERS:
            _check_number(where, value)
        else:
            _check_table(where, key, value)


def _check_required(where: str, value: Any) -> None:
    if not isinstance(value, list):
        raise OneVisionError(f"{where} is {value!r}; it must be a list of metrics")
    for metric in value:
        _check_name(str(metric), tuple(METRICS), f"metric of {where}")


def _check_table(where: str, key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise OneVisionError(f"{where} is {value!r}; it must be a table of names and limits")
    for name, limit in value.items():
        if key in _METRIC_TABLES:
            judged = [m for m, metric in METRICS.items() if key != "worse_by" or metric.higher_is_better is not None]
            _check_name(name, tuple(judged), f"metric of {where}")
        elif not any(fnmatchcase(stage, name) for stage in _STAGES):
            raise OneVisionError(f"{where} has {name!r}, which matches no stage; stages are such as {_STAGES[4]}")
        _check_number(f"{where} {name}", limit)


def _check_name(name: str, known: tuple[str, ...], what: str) -> None:
    if name not in known:
        raise OneVisionError(f"{name!r} is no known {what}; known are {', '.join(known)}")


def _check_number(where: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise OneVisionError(f"{where} is {value!r}; it must be a number from 0")
