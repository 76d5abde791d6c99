"""The model's configuration, read once from a checkpoint's config.json and trusted afterwards.

Every number comes from the file. Keys that the reference classes default (epsilons, activations) take
those defaults when absent; a missing dimension is an error that names its field.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import OneVisionError

ARCHITECTURE = "LLaVAOneVision1_5_ForConditionalGeneration"
# The published remote code's name, then the one proposed for transformers itself.
_ARCHITECTURES = (ARCHITECTURE, "LlavaOnevision1_5ForConditionalGeneration")
_MODEL_TYPES = ("llavaonevision1_5", "llava_onevision1_5")

# What people most likely hold instead, and the sentence that tells them.
_RELATIVES = {
    "LLaVAOneVision1_5_MoeForConditionalGeneration": "the mixture-of-experts variant",
    "LlavaOnevisionForConditionalGeneration": "the 2024 LLaVA-OneVision (SigLIP and Qwen2)",
    "LlavaQwenForCausalLM": "the 2024 LLaVA-OneVision (SigLIP and Qwen2)",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
}

# Beyond any model of the family; a damaged number is refused before anything is built from it.
_LARGEST_DIMENSION = 1 << 20
_LARGEST_DEPTH = 1 << 10
_LARGEST_NUMBER = 1e30
_LARGEST_ID = (1 << 31) - 1

VISION_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")
_MISSING: Any = object()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The RICE-ViT tower and its merger."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    layer_norm_eps: float
    hidden_act: str
    text_hidden_size: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels * patch_size^2."""
        return self.in_channels * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The Qwen3 decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A LLaVA-OneVision-1.5 model: vision tower, decoder, and the ids that join them."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "ModelConfig":
        """Read config.json, and generation_config.json where present, of a checkpoint directory."""
        raw = read_json(directory / "config.json")
        _check_architecture(raw)
        generation_path = directory / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        return cls.from_hf(raw, generation)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> "ModelConfig":
        """Build from the parsed config.json (and generation_config.json, or an empty mapping)."""
        top = _Section(raw, "config.json")
        text = _text_config(top.section("text_config"))
        config = cls(
            vision=_vision_config(top.section("vision_config"), text.hidden_size),
            text=text,
            image_token_id=top.integer("image_token_id", minimum=0),
            video_token_id=top.integer("video_token_id", minimum=0),
            eos_token_ids=_eos_token_ids(raw, generation),
            pad_token_id=_first_id(generation.get("pad_token_id"), raw.get("pad_token_id")),
        )
        config._check_ids()
        return config

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`, for the manifest of a bundle."""
        try:
            values = dict(raw)
            values["vision"] = VisionConfig(**raw["vision"])
            values["text"] = TextConfig(**raw["text"])
            values["eos_token_ids"] = tuple(raw["eos_token_ids"])
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except (KeyError, TypeError) as error:
            raise OneVisionError(
                f"manifest.json: the model section is not what this version writes: {error}"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    def _check_ids(self) -> None:
        for field in ("image_token_id", "video_token_id"):
            value = getattr(self, field)
            if value >= self.text.vocab_size:
                raise OneVisionError(
                    f"config.json: {field} is {value}, outside the vocabulary of {self.text.vocab_size}"
                )
        if self.image_token_id == self.video_token_id:
            raise OneVisionError(f"config.json: image_token_id and video_token_id are both {self.image_token_id}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`, or an error that says what is wrong with the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OneVisionError(f"{path} does not exist") from None
    except OSError as error:
        raise OneVisionError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OneVisionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise OneVisionError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


class _Section:
    """Typed reading of one JSON object; every error names the field by its full path."""

    def __init__(self, raw: Any, path: str) -> None:
        if not isinstance(raw, Mapping):
            raise OneVisionError(f"{path} is not an object")
        self.raw, self.path = raw, path

    def name(self, key: str) -> str:
        return f"{self.path}: {key}" if self.path == "config.json" else f"{self.path}.{key}"

    def section(self, key: str) -> "_Section":
        if key not in self.raw:
            raise OneVisionError(f"{self.name(key)} is missing")
        return _Section(self.raw[key], self.name(key))

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _MISSING:
                raise OneVisionError(f"{self.name(key)} is missing")
            return default
        return value

    def integer(self, key: str, default: Any = _MISSING, minimum: int = 1, maximum: int = _LARGEST_DIMENSION) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise OneVisionError(f"{self.name(key)} is {value!r}, not an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST_NUMBER:
            raise OneVisionError(f"{self.name(key)} is {value!r}, not a positive number")
        return float(value)

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self._get(key, default)
        if value not in allowed:
            raise OneVisionError(f"{self.name(key)} is {value!r}; supported: {', '.join(allowed)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise OneVisionError(f"{self.name(key)} is {value!r}, not true or false")
        return value

    def refuse(self, key: str, why: str, *harmless: Any) -> None:
        """Refuse a key that changes the model in a way the graphs do not implement."""
        value = self.raw.get(key)
        if value is not None and value not in harmless:
            raise OneVisionError(f"{self.name(key)} is {value!r}: {why}")


def _check_architecture(raw: Mapping[str, Any]) -> None:
    text = raw.get("text_config")
    experts = [s for s in (raw, text) if isinstance(s, Mapping) and s.get("num_experts")]
    names = raw.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if experts or "moe" in str(name).lower():
        raise OneVisionError(
            f"config.json: architectures is {names!r} with experts: the mixture-of-experts variant is not "
            "supported; use a dense LLaVA-OneVision-1.5 checkpoint (4B or 8B)"
        )
    if name in _ARCHITECTURES or (name is None and raw.get("model_type") in _MODEL_TYPES):
        return
    relative = _RELATIVES.get(str(name))
    found = f"{names!r}" + (f", {relative}" if relative else "")
    raise OneVisionError(
        f"config.json: architectures is {found}; this toolkit takes {ARCHITECTURE} (LLaVA-OneVision-1.5, 4B or 8B)"
    )


def _vision_config(s: _Section, text_hidden_size: int) -> VisionConfig:
    hidden = s.integer("hidden_size")
    embed = s.integer("embed_dim", hidden)
    if embed != hidden:
        raise OneVisionError(f"{s.name('embed_dim')} is {embed} but hidden_size is {hidden}: they must be equal")
    config = VisionConfig(
        depth=s.integer("depth", maximum=_LARGEST_DEPTH),
        hidden_size=hidden,
        num_heads=s.integer("num_heads"),
        intermediate_size=s.integer("intermediate_size"),
        in_channels=s.integer("in_channels", 3),
        patch_size=s.integer("patch_size"),
        spatial_merge_size=s.integer("spatial_merge_size"),
        layer_norm_eps=s.number("layer_norm_eps", 1e-5),
        hidden_act=s.choice("hidden_act", "gelu", VISION_ACTIVATIONS),
        text_hidden_size=s.integer("text_hidden_size", text_hidden_size),
    )
    if config.text_hidden_size != text_hidden_size:
        raise OneVisionError(
            f"{s.name('text_hidden_size')} is {config.text_hidden_size}, text_config.hidden_size {text_hidden_size}"
        )
    if hidden % config.num_heads or config.head_dim % 4:
        raise OneVisionError(
            f"{s.name('num_heads')} is {config.num_heads}: heads of hidden_size {hidden} must be a multiple of 4 wide"
        )
    return config


def _text_config(s: _Section) -> TextConfig:
    s.choice("hidden_act", "silu", ("silu",))
    layer_types = s.raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        s.refuse("layer_types", "only full attention is supported")
    if s.raw.get("use_sliding_window"):
        s.refuse("sliding_window", "sliding-window attention is not supported")
    config = TextConfig(
        vocab_size=s.integer("vocab_size"),
        hidden_size=s.integer("hidden_size"),
        intermediate_size=s.integer("intermediate_size"),
        num_hidden_layers=s.integer("num_hidden_layers", maximum=_LARGEST_DEPTH),
        num_attention_heads=s.integer("num_attention_heads"),
        num_key_value_heads=s.integer("num_key_value_heads"),
        head_dim=s.integer("head_dim"),
        rms_norm_eps=s.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(s),
        attention_bias=s.flag("attention_bias", False),
        max_position_embeddings=s.integer("max_position_embeddings", maximum=_LARGEST_ID),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise OneVisionError(
            f"{s.name('num_key_value_heads')} is {config.num_key_value_heads}, which does not divide "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if config.head_dim % 2:
        raise OneVisionError(f"{s.name('head_dim')} is {config.head_dim}: rotary embedding needs an even width")
    return config


def _rope_theta(s: _Section) -> float:
    """RoPE base, from `rope_theta` or from the `rope_parameters` object of transformers 5."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling = s.raw.get(key)
        if isinstance(scaling, Mapping):
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            if kind != "default":
                raise OneVisionError(
                    f"{s.name(key)} has rope_type {kind!r}: only unscaled rotary embedding is supported"
                )
        elif scaling is not None:
            raise OneVisionError(f"{s.name(key)} is {scaling!r}, not an object")
    parameters = s.raw.get("rope_parameters")
    if s.raw.get("rope_theta") is None and isinstance(parameters, Mapping):
        return _Section(parameters, s.name("rope_parameters")).number("rope_theta")
    return s.number("rope_theta")


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that any of the published files names as an end of the answer, in that order."""
    text = raw.get("text_config")
    sources = [
        ("generation_config.json", generation),
        ("config.json", raw),
        ("config.json: text_config", text),
    ]
    ids: list[int] = []
    for path, section in sources:
        value = section.get("eos_token_id") if isinstance(section, Mapping) else None
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not _is_id(item):
                raise OneVisionError(f"{path}: eos_token_id is {value!r}, not an id or a list of ids")
            if item is not None and item not in ids:
                ids.append(item)
    return tuple(ids)


def _first_id(*values: Any) -> int | None:
    return next((v for v in values if _is_id(v)), None)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_ID
