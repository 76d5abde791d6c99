"""config.json of the family is read to the last number; anything else is refused by the field's name."""

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onevision_edge.config import ModelConfig
from onevision_edge.errors import OneVisionError

Tiny = Callable[..., Any]
CHECKPOINT = Path(__file__).parent / "data" / "golden" / "checkpoint"
GOLDEN: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())


def golden_with(path: str, value: Any) -> dict[str, Any]:
    """The golden config with the value at `path` changed, or removed for ..."""
    config = deepcopy(GOLDEN)
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    return config


def refusal(config: dict[str, Any], tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OneVisionError) as caught:
        ModelConfig.from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_golden_config() -> None:
    config = ModelConfig.from_checkpoint(CHECKPOINT)
    vision, text = config.vision, config.text
    assert (vision.depth, vision.hidden_size, vision.num_heads, vision.head_dim) == (3, 64, 4, 16)
    assert (vision.patch_dim, vision.merge_unit, vision.layer_norm_eps) == (588, 4, 1e-5)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (4, 2, 32)
    assert (text.rope_theta, text.rms_norm_eps, text.attention_bias) == (5e6, 1e-6, False)
    assert (config.image_token_id, config.video_token_id) == (505, 506)
    assert (config.eos_token_ids, config.pad_token_id) == ((501,), 499)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_of_the_reference_classes() -> None:
    config = deepcopy(GOLDEN)
    for section, key in (
        ("vision_config", "layer_norm_eps"),
        ("vision_config", "hidden_act"),
        ("vision_config", "in_channels"),
        ("vision_config", "text_hidden_size"),
        ("text_config", "rms_norm_eps"),
        ("text_config", "attention_bias"),
        ("text_config", "hidden_act"),
    ):
        del config[section][key]
    assert ModelConfig.from_hf(config, {}).to_dict() == ModelConfig.from_hf(GOLDEN, {}).to_dict()


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_unscaled_rotary_embedding(key: str) -> None:
    config = golden_with(f"text_config.{key}", {"rope_type": "default", "rope_theta": 123.0})
    assert ModelConfig.from_hf(config, {}).text.rope_theta == 5e6
    del config["text_config"]["rope_theta"]
    if key == "rope_parameters":
        assert ModelConfig.from_hf(config, {}).text.rope_theta == 123.0


def test_every_end_token_is_kept() -> None:
    config = golden_with("eos_token_id", 7)
    config["text_config"]["eos_token_id"] = [8, 7]
    assert ModelConfig.from_hf(config, {"eos_token_id": [5, 7]}).eos_token_ids == (5, 7, 8)


@pytest.mark.parametrize(
    "field",
    [
        "image_token_id",
        "video_token_id",
        "text_config",
        "vision_config",
        *(f"vision_config.{k}" for k in ("depth", "hidden_size", "num_heads", "intermediate_size")),
        *(f"vision_config.{k}" for k in ("patch_size", "spatial_merge_size")),
        *(f"text_config.{k}" for k in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")),
        *(f"text_config.num_{k}" for k in ("hidden_layers", "attention_heads", "key_value_heads")),
        *(f"text_config.{k}" for k in ("rope_theta", "max_position_embeddings")),
    ],
)
def test_a_missing_key(tmp_path: Path, field: str) -> None:
    assert refusal(golden_with(field, ...), tmp_path) == f"config.json: {field} is missing"


RELATIVES = {
    "LLaVAOneVision1_5_MoeForConditionalGeneration": "mixture-of-experts",
    "LlavaOnevisionForConditionalGeneration": "the 2024 LLaVA-OneVision",
    "LlavaQwenForCausalLM": "the 2024 LLaVA-OneVision",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "LlamaForCausalLM": "LlamaForCausalLM",
}


@pytest.mark.parametrize(("architecture", "named"), RELATIVES.items())
def test_another_architecture(tmp_path: Path, architecture: str, named: str) -> None:
    message = refusal(golden_with("architectures", [architecture]), tmp_path)
    assert message.startswith("config.json: architectures is")
    assert named in message
    assert "LLaVA-OneVision-1.5" in message


def test_experts_under_the_dense_name(tmp_path: Path) -> None:
    assert "mixture-of-experts" in refusal(golden_with("text_config.num_experts", 128), tmp_path)


UNSUPPORTED = {
    "text_config.rope_scaling": ({"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn'"),
    "text_config.rope_parameters": ({"type": "linear"}, "rope_type 'linear'"),
    "text_config.layer_types": (["full_attention", "sliding_attention", "full_attention"], "full attention"),
    "text_config.hidden_act": ("gelu", "supported: silu"),
    "vision_config.hidden_act": ("relu", "supported: gelu"),
    "vision_config.embed_dim": (32, "must be equal"),
    "vision_config.text_hidden_size": (65, "text_config.hidden_size 64"),
    "vision_config.num_heads": (3, "heads of hidden_size 64 must be"),
    "text_config.num_key_value_heads": (3, "does not divide"),
    "text_config.head_dim": (31, "even width"),
    "image_token_id": (512, "outside the vocabulary of 512"),
    "video_token_id": (505, "are both 505"),
    "eos_token_id": ("501", "not an id or a list of ids"),
}


@pytest.mark.parametrize(("field", "case"), UNSUPPORTED.items())
def test_an_unsupported_value(tmp_path: Path, field: str, case: tuple[Any, str]) -> None:
    value, why = case
    message = refusal(golden_with(field, value), tmp_path)
    assert field.split(".")[-1] in message
    assert why in message


def test_sliding_window(tmp_path: Path) -> None:
    config = golden_with("text_config.sliding_window", 128)
    assert ModelConfig.from_hf(config, {}).text.head_dim == 32  # the window is not in use
    config["text_config"]["use_sliding_window"] = True
    assert "text_config.sliding_window is 128: sliding-window attention" in refusal(config, tmp_path)


DIMENSIONS = ["text_config.hidden_size", "text_config.num_hidden_layers", "vision_config.depth"]
NOT_DIMENSIONS = [0, -1, True, 2.0, "64", [64], {}, 10**9, 10**400]


@pytest.mark.parametrize("value", NOT_DIMENSIONS, ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("field", [*DIMENSIONS, "text_config.head_dim"])
def test_a_number_that_is_no_dimension(tmp_path: Path, field: str, value: Any) -> None:
    assert f"config.json: {field} is " in refusal(golden_with(field, value), tmp_path)


@pytest.mark.parametrize("value", [0, -1.0, True, "1e-6", [1], float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("field", ["text_config.rms_norm_eps", "text_config.rope_theta"])
def test_a_number_that_is_not_positive(tmp_path: Path, field: str, value: Any) -> None:
    assert f"config.json: {field} is " in refusal(golden_with(field, value), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "\0", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_bad_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(OneVisionError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_checkpoint(tmp_path)


def test_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(OneVisionError, match=r"config\.json holds a JSON list, not an object"):
        ModelConfig.from_checkpoint(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(OneVisionError, match=r"config\.json does not exist"):
        ModelConfig.from_checkpoint(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *GOLDEN,
    "eos_token_id",
    "text_config.rope_parameters",
    *(f"{section}.{key}" for section in ("text_config", "vision_config") for key in GOLDEN[section]),
]


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(FIELDS), json_values)
@example("text_config.layer_types", 5)
@example("eos_token_id", 10**30)
def test_any_value_anywhere(field: str, value: Any) -> None:
    """Reads or is refused: no other exception may come out."""
    config = golden_with(field, value)
    with suppress(OneVisionError):
        ModelConfig.from_hf(config, {"eos_token_id": value, "pad_token_id": value})
