"""Folds: any scale on an activation's channels, taken up by what makes it, leaves the model's answers as they are."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onevision_edge
from onevision_edge.calibration.folds import Fold, folds
from onevision_edge.calibration.stages import BLOCK, LAYER, MERGER, STEM, Kind, Stage
from onevision_edge.config import ModelConfig

# Heads of the decoder, its biases, and merge units.
MODELS: dict[str, dict[str, Any]] = {
    "one query head to a key head": {"num_key_value_heads": 4},
    "two": {"num_key_value_heads": 2},
    "four": {"num_key_value_heads": 1},
    "two, with biases": {"num_key_value_heads": 2, "attention_bias": True},
    "six heads to two, narrow": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
}
READERS = {  # of each tap that has a fold: the matrices that read it
    "attn.qkv": ["attn.qkv"],
    "attn.proj": ["attn.proj"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.0": ["mlp.0"],
    "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def made(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    return tiny(seed=5, **{f"text_config__{key}": value for key, value in request.param.items()})


def config_of(made: Any, tmp_path: Path) -> ModelConfig:
    return ModelConfig.from_checkpoint(made.write(tmp_path / "config"))


def places(config: ModelConfig) -> list[tuple[Kind, int]]:
    """Every stage of the model that has folds."""
    blocks = [(BLOCK, i) for i in range(config.vision.depth)]
    return [*blocks, (MERGER, 0), *((LAYER, i) for i in range(config.text.num_hidden_layers))]


def turned(name: str, values: np.ndarray) -> np.ndarray:
    """A checkpoint's matrix [out, in] as the graph's [in, out], and back."""
    return np.ascontiguousarray(values.T) if values.ndim == 2 and name.endswith("weight") else values


def scaled(tensors: Arrays, kind: Kind, index: int, config: ModelConfig, change: Callable[[str, Fold], Fold]) -> Arrays:
    """A checkpoint's tensors, every activation of one stage divided by random scales from 1/4 to 4."""
    rng, prefix = np.random.default_rng(index), kind.path.format(index)
    local = {kind.path.format(0) + n[len(prefix) :]: turned(n, v) for n, v in tensors.items() if n.startswith(prefix)}
    for tap, found in folds(kind, config).items():
        fold = change(tap, found)
        scale = np.exp(rng.uniform(-1.4, 1.4, fold.outputs)).astype(np.float32)
        fold.apply(scale, local)
        short = tap.removeprefix(f"{kind.path.format(0)}.").removeprefix("merger.")
        for reader in READERS[short]:
            name = tap.removesuffix(short) + reader + ".weight"
            local[name] = local[name] * scale[fold.ties][:, None]
    first = kind.path.format(0)
    return tensors | {prefix + name[len(first) :]: turned(name, values) for name, values in local.items()}


def answers(made: Any, tensors: Arrays, directory: Path) -> np.ndarray:
    """Logits of the exported FP32 graphs about two images."""
    checkpoint = copy.copy(made)
    checkpoint.tensors = tensors
    onevision_edge.export(checkpoint.write(directory / "c"), directory / "b", dtype="fp32", max_length=64)
    rng = np.random.default_rng(1)
    ids = np.array([[3, 7, *[60] * 4, 9, *[60] * 6, 11, 2, 30]])
    grid, pixels = np.array([[1, 4, 4], [1, 4, 6]]), rng.standard_normal((40, 588)).astype(np.float32)
    return onevision_edge.load(directory / "b", threads=1).logits(ids, pixels, grid)


def as_it_is(tap: str, fold: Fold) -> Fold:
    return fold


def test_any_scales_leave_the_logits_as_they_are(made: Any, tmp_path: Path) -> None:
    config, tensors = config_of(made, tmp_path), made.tensors
    for kind, index in places(config):
        tensors = scaled(tensors, kind, index, config, as_it_is)
    changed = [name for name, values in tensors.items() if not np.array_equal(values, made.tensors[name])]
    assert len(changed) > 30
    before, after = answers(made, made.tensors, tmp_path / "before"), answers(made, tensors, tmp_path / "after")
    assert np.abs(before).max() > 1
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("tap", ["model.layers.0.self_attn.o_proj", "visual.merger.mlp.0", "visual.blocks.0.attn.proj"])
def test_another_tie_would_show(tiny: Callable[..., Any], tmp_path: Path, tap: str) -> None:
    """Heads taken in turn, channels of a patch side by side, keys for values: each moves the logits."""
    made = tiny(seed=5)
    config = config_of(made, tmp_path)

    def mistaken(name: str, fold: Fold) -> Fold:
        if name != tap:
            return fold
        if "o_proj" in tap:  # the query heads of a key head are neighbours
            heads = np.arange(4) % 2
            return Fold(fold.source, 0, (heads[:, None] * 16 + np.arange(16)).reshape(-1))
        if "merger" in tap:
            return Fold(fold.source, 0, np.repeat(np.arange(32), 4))
        return Fold(fold.source, 32, fold.ties)

    kind, index = (LAYER, 0) if "layers" in tap else (MERGER, 0) if "merger" in tap else (BLOCK, 0)
    tensors = scaled(made.tensors, kind, index, config, mistaken)
    before, after = answers(made, made.tensors, tmp_path / "before"), answers(made, tensors, tmp_path / "after")
    assert np.abs(after - before).max() > 1e-2 * np.abs(before).max()


def test_folds_are_where_an_activation_is_linear_in_something(made: Any, tmp_path: Path) -> None:
    """Every tap but those behind a GELU; as many channels as the tap has."""
    config = config_of(made, tmp_path)
    for kind in (STEM, BLOCK, MERGER, LAYER):
        stage, found = Stage(kind, config, 1), folds(kind, config)
        assert found.keys() <= stage.taps.keys()
        without = {tap for tap, readers in stage.taps.items() if readers and tap not in found}
        wanted = {"stem": {"visual.patch_embed.proj"}, "block": {"visual.blocks.0.mlp.fc2"}}
        assert without == (wanted | {"merger": {"visual.merger.mlp.2"}}).get(kind.name, set())
        for tap, fold in found.items():
            assert len(fold.ties) == stage.channels(tap)
            assert sorted(READERS[tap.removeprefix(f"{kind.path.format(0)}.").removeprefix("merger.")]) == sorted(
                reader.removeprefix(f"{kind.path.format(0)}.").removeprefix("merger.") for reader in stage.taps[tap]
            )
            assert set(fold.ties.tolist()) == set(range(fold.outputs))
            assert f"{fold.source}.weight" in stage.parameters


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 2**32))
def test_tied_channels_take_the_largest(ties: list[int], seed: int) -> None:
    order = {output: place for place, output in enumerate(dict.fromkeys(ties))}  # every output has a channel
    fold = Fold("source", 0, np.array([order[output] for output in ties]))
    values = np.random.default_rng(seed).random(len(ties)).astype(np.float32)
    found = fold.tied(values)
    assert found.dtype == np.float32
    assert found.tolist() == [max(values[fold.ties == output]) for output in range(fold.outputs)]


def test_what_takes_a_scale_up_is_replaced_in_its_place_alone() -> None:
    weight, bias = np.arange(12.0, dtype=np.float32).reshape(2, 6), np.arange(6, dtype=np.float32)
    weights = {"qkv.weight": weight, "qkv.bias": bias, "other.bias": bias}
    Fold("qkv", 4, np.array([0, 1, 0])).apply(np.array([2, 4], np.float32), weights)
    assert weights["qkv.weight"].tolist() == [[0, 1, 2, 3, 2, 1.25], [6, 7, 8, 9, 5, 2.75]]
    assert weights["qkv.bias"].tolist() == [0, 1, 2, 3, 2, 1.25]
    assert weights["other.bias"] is bias
    assert weight[0, 4] == 4  # the array that was there is untouched
