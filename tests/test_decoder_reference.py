"""The decoder of an exported bundle against transformers' Qwen3ForCausalLM with the same random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'onevision-edge[reference]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'onevision-edge[reference]'"
)

SHAPES: dict[str, dict[str, Any]] = {
    "one query head per key head": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "two": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "four, heads wider than hidden": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "one key head": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "theta and eps": {"rope_theta": 100.0, "rms_norm_eps": 1e-2},
    "deep and narrow": {"num_hidden_layers": 6, "hidden_size": 24, "intermediate_size": 16, "vocab_size": 75},
}
BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 5e6,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def reference(shape: dict[str, Any]) -> Any:
    """The model with weights of a spread that makes its logits differ: transformers' own 0.02 gives a flat answer."""
    theta = shape["rope_theta"]
    config = transformers.Qwen3Config(**shape, rope_parameters={"rope_type": "default", "rope_theta": theta})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=spread)
    return model


@pytest.mark.parametrize("changes", SHAPES.values(), ids=list(SHAPES))
def test_logits_and_greedy_tokens(tiny: Callable[..., Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    shape = BASE | changes
    model = reference(shape)
    made = tiny(tied=shape["tie_word_embeddings"], **{f"text_config__{key}": value for key, value in shape.items()})
    decoder = {name: values.numpy() for name, values in model.state_dict().items()}
    if shape["tie_word_embeddings"]:
        del decoder["lm_head.weight"]
    assert decoder.keys() == {name for name in made.tensors if not name.startswith("visual.")}
    made.tensors |= decoder
    onevision_edge.export(made.write(tmp_path / "c"), tmp_path / "b", dtype="fp32", max_length=128, parts=["decoder"])
    bundle = onevision_edge.load(tmp_path / "b", threads=1)
    ids = np.random.default_rng(0).integers(0, 60, (2, 70))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
        never = [made.config["image_token_id"], made.config["video_token_id"]]
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "suppress_tokens": never}
        steps = model.generate(torch.from_numpy(ids), **options)
    assert np.abs(expected).max() > 3
    assert np.abs(bundle.logits(ids, prefill_chunk=32) - expected).max() < 1e-4
    assert bundle.generate_ids(ids, max_tokens=24, eos_token_id=[]).tolist() == steps[:, 70:].tolist()
