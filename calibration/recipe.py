"""What is asked of a quantisation: the plan, and the methods by which its numbers are found. A TOML file can say it.

name = "decoder in INT4, one layer kept"
dtype = "fp16"
kv_cache = "int8"

[[rules]]
graph = "decoder"
modules = "model.layers.*"
precision = "int4"
reason = "a quarter of the bytes"

[[rules]]
graph = "decoder"
modules = "model.layers.0.mlp.down_proj"
precision = "int8-weight"

[methods]
observer = "mse"
gptq = false
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import OneVisionError
from ..precision.plan import Plan
from .observers import KINDS

OBSERVERS = ("auto", *KINDS)


@dataclass(frozen=True, slots=True)
class Methods:
    """How scales and codes are found.

    observer: what an activation's extremes are taken to be: absmax (with some headroom), percentile, entropy, mse,
    or auto: mse where INT8 holds an activation that could not be smoothed, else absmax. smoothquant: search for
    scales on the channels of activations that INT8 holds; awq: of those that meet 4-bit weights. clip: search for
    scales of weights below the largest magnitude. gptq: let later rows of a 4-bit matrix make up for the rounding
    of earlier ones. bias_correction: take the mean error of a product into its bias, in the tower. samples: rows
    kept of each activation. damping: GPTQ's.

    The defaults are what came out best on 1,398 held-out questions to the shipped model, KLD in 1e-6 nats. INT4:
    186 (201 without AWQ, 249 with the clip search, 394 by rounding alone, 427 with AWQ alone, 551 with the clip
    search alone). NVFP4: 175 (246 with the clip search, 407 with it alone, 541 by rounding alone). INT8: 92 to 101
    (136 without headroom, 263 with mse, 247 with percentile, 427 with entropy, 557 without SmoothQuant). The tower in
    INT8: 100 (313 with absmax, 510 with neither mse nor bias correction). FP8: 88 (60 with mse, 181 when
    smoothed as INT8 is).
    """

    observer: str = "auto"
    percentile: float = 99.99
    smoothquant: bool = True
    awq: bool = True
    clip: bool = False
    gptq: bool = True
    bias_correction: bool = True
    samples: int = 2048
    damping: float = 0.01

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise OneVisionError(f"methods: {field.name} is {value!r}, it must be a {kind.__name__}")  # type: ignore[union-attr]
        if self.observer not in OBSERVERS:
            raise OneVisionError(f"methods: observer is {self.observer!r}: choose one of {', '.join(OBSERVERS)}")
        if not 50 < self.percentile <= 100:
            raise OneVisionError(f"methods: percentile is {self.percentile}, not above 50 and at most 100")
        if self.samples < 1 or not 0 < self.damping < 1:
            raise OneVisionError("methods: samples must be from 1, and damping between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Methods":
        """The inverse of `to_dict`; what is missing takes its default. Raises OneVisionError."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(raw) - set(known))
        if unknown:
            raise OneVisionError(f"methods has an unknown {unknown[0]!r}; it can have {', '.join(known)}")
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A plan and the methods."""

    plan: Plan
    methods: Methods

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a TOML file. Raises OneVisionError with the file's name and what is wrong in it."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise OneVisionError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise OneVisionError(f"{path} is not TOML: {error}") from error
        try:
            methods = raw.pop("methods", {})
            if not isinstance(methods, dict) or not isinstance(raw.get("rules", []), list):
                raise OneVisionError("methods must be a table, and rules an array of tables")
            return cls(Plan.from_dict({"name": path.stem, **raw}, "the plan"), Methods.from_dict(methods))
        except OneVisionError as error:
            raise OneVisionError(f"{path}: {error}") from error
