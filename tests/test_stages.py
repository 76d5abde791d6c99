"""Stages and their taps against the same layers written in numpy, in float64."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy_model
import pytest

from onevision_edge.calibration.stages import BLOCK, KEYS, LAYER, MERGER, STEM, VALUES, Kind, Stage
from onevision_edge.config import ModelConfig
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import PRECISIONS
from onevision_edge.runtime.images import patch_positions

BOUND = 2e-5  # of values of order one, float32 against float64
Arrays = Mapping[str, np.ndarray]

# Each with the heads of its decoder: two query heads to a key head, four, one.
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "grouped, with biases": {"text_config__num_key_value_heads": 1, "text_config__attention_bias": True},
    "one key head for each": {"text_config__num_key_value_heads": 4, "vision_config__hidden_act": "quick_gelu"},
}


class Model:
    """A random checkpoint: its config, its tensors as the graphs store them, and the same model in numpy."""

    def __init__(self, made: Any, directory: Path) -> None:
        self.config = ModelConfig.from_checkpoint(made.write(directory))
        self.tensors = {name: numpy_model.stored(name, values) for name, values in made.tensors.items()}
        self.reference = numpy_model.NumpyModel(self.config, self.tensors)

    def weights(self, stage: Stage, index: int) -> dict[str, np.ndarray]:
        """A stage's weights by the names of its graph."""
        return {name: self.tensors[stage.kind.place(name, index)] for name in stage.parameters}

    def loaded(self, kind: Kind, index: int) -> Stage:
        """A stage with its weights."""
        stage = Stage(kind, self.config, threads=1)
        stage.load(self.weights(stage, index))
        return stage

    def taps(self, stage: Stage, index: int) -> dict[str, np.ndarray]:
        """What the numpy model's Linears read last, by the stage's taps; heads first for keys and values."""
        found = {}
        for tap in stage.taps:
            if tap in (KEYS, VALUES):
                found[tap] = self.reference.taps[f"model.layers.{index}.self_attn.{tap[0]}"].transpose(1, 0, 2)
            else:
                found[tap] = self.reference.taps[stage.kind.place(tap, index)]
        return found


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny(seed=3, **request.param), tmp_path_factory.mktemp("model"))


def same(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == (1, *values.shape), name
        assert np.abs(found[name][0] - values).max() < BOUND * max(1, np.abs(values).max()), name


def prompt(config: ModelConfig, tokens: int) -> dict[str, np.ndarray]:
    """A layer's inputs over a prompt of so many tokens."""
    c, rng = config.text, np.random.default_rng(0)
    cache = np.zeros((1, c.num_key_value_heads, tokens, c.head_dim), np.float32)
    return {
        "x": rng.standard_normal((1, tokens, c.hidden_size)).astype(np.float32),
        "position_ids": np.arange(tokens)[None],
        "write_indices": np.zeros(1, np.int64),
        "valid_length": np.array([tokens]),
        "past_key": cache,
        "past_value": cache.copy(),
    }


@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_and_its_taps(model: Model, index: int) -> None:
    stage = model.loaded(LAYER, index)
    for tokens in (1, 9, 30):  # one session serves all lengths
        inputs = prompt(model.config, tokens)
        y = model.reference.layer(index, inputs["x"][0].astype(float))
        same(stage.run(inputs), {"y": y, **model.taps(stage, index)})


def test_a_block_and_its_taps(model: Model) -> None:
    stage, rng, c = model.loaded(BLOCK, 1), np.random.default_rng(1), model.config.vision
    for rows in (5, 17):
        x = rng.standard_normal((rows, c.hidden_size)).astype(np.float32)
        angles = rng.uniform(-3, 3, (rows, c.head_dim // 2))
        cos, sin = np.cos(angles)[None].astype(np.float32), np.sin(angles)[None].astype(np.float32)
        y = model.reference.block(1, x.astype(float), angles)
        same(stage.run({"x": x[None], "cos": cos, "sin": sin}), {"y": y, **model.taps(stage, 1)})


def test_the_merger_and_its_taps(model: Model) -> None:
    stage = model.loaded(MERGER, 0)
    x = np.random.default_rng(2).standard_normal((13, model.config.vision.hidden_size)).astype(np.float32)
    y = model.reference.merger(x.astype(float))
    same(stage.run({"x": x[None]}), {"image_embeds": y, **model.taps(stage, 0)})


def test_the_stem_and_its_tap(model: Model) -> None:
    stage, positions = model.loaded(STEM, 0), patch_positions(4, 6, 2)
    pixels = np.random.default_rng(4).standard_normal((24, model.config.vision.patch_dim)).astype(np.float32)
    x, angles = model.reference.stem(pixels.astype(float), positions)
    found = stage.run({"pixel_values": pixels[None], "patch_positions": positions})
    same(found, {"x": x, "cos": np.cos(angles), "sin": np.sin(angles), **model.taps(stage, 0)})


def test_taps_say_who_reads_them(model: Model) -> None:
    layer, block, merger = (Stage(kind, model.config, 1) for kind in (LAYER, BLOCK, MERGER))
    at = "model.layers.0"
    assert layer.taps == {
        f"{at}.self_attn.q_proj": [f"{at}.self_attn.{n}_proj" for n in "qkv"],
        f"{at}.self_attn.o_proj": [f"{at}.self_attn.o_proj"],
        f"{at}.mlp.gate_proj": [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"],
        f"{at}.mlp.down_proj": [f"{at}.mlp.down_proj"],
        KEYS: [],
        VALUES: [],
    }
    assert sorted(block.linears) == [f"visual.blocks.0.{n}" for n in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert sorted(merger.linears) == ["visual.merger.mlp.0", "visual.merger.mlp.2"]
    c = model.config.text
    assert layer.channels(f"{at}.self_attn.o_proj") == c.num_attention_heads * c.head_dim
    assert layer.channels(KEYS) == layer.channels(VALUES) == c.num_key_value_heads * c.head_dim


def test_without_taps_the_outputs_are_the_same(model: Model) -> None:
    stage = model.loaded(LAYER, 0)
    inputs = prompt(model.config, 8)
    whole, alone = stage.run(inputs), stage.run(inputs, taps=False)
    assert list(alone) == ["y"]
    np.testing.assert_array_equal(alone["y"], whole["y"])
    np.testing.assert_array_equal(stage.run(inputs)["y"], whole["y"])


def test_rounding_is_of_the_inputs_named_and_no_others(model: Model) -> None:
    """A Linear's input rounded to INT8 codes of scale 1/20: down_proj's, the weights left as floats."""
    stage = model.loaded(LAYER, 1)
    path, inputs = "model.layers.0.mlp.down_proj", prompt(model.config, 12)
    exact = stage.run(inputs)
    rounding = Stage(LAYER, model.config, 1, rounding={path: PRECISIONS["int8"]})
    assert rounding.parameters.keys() - stage.parameters.keys() == {f"{path}.input_scale"}
    assert rounding.outputs == ("y",)
    weights = model.weights(stage, 1)
    rounding.load({**weights, f"{path}.input_scale": np.array(0.05, np.float32)})
    read = exact[path][0].astype(float)
    codes = np.clip(np.rint(exact[path][0] / np.float32(0.05)), -128, 127) * 0.05
    assert np.abs(codes - read).max() > 0.01
    wanted = exact["y"][0] + (codes - read) @ weights[f"{path}.weight"]
    assert np.abs(rounding.run(inputs)["y"][0] - wanted).max() < BOUND * np.abs(wanted).max()


def test_weights_are_those_of_the_graph(model: Model) -> None:
    stage = model.loaded(LAYER, 0)
    weights, name = model.weights(stage, 0), "model.layers.0.mlp.up_proj.weight"
    assert stage.loaded
    assert not Stage(LAYER, model.config, 1).loaded
    with pytest.raises(ValueError, match=name):
        stage.load({**weights, name: weights[name].T})
    with pytest.raises(ValueError, match="float64"):
        stage.load({**weights, name: weights[name].astype(float)})


def test_inputs_that_do_not_fit_are_one_sentence(model: Model) -> None:
    stage = model.loaded(MERGER, 0)
    with pytest.raises(OneVisionError, match=r"^calibration of visual: [^\n]*$"):
        stage.run({"x": np.zeros((1, 5, 3), np.float32)})


@pytest.mark.parametrize(
    ("kind", "index", "label", "name", "place"),
    [
        (LAYER, 7, "model.layers.7", "model.layers.0.mlp.up_proj", "model.layers.7.mlp.up_proj"),
        (BLOCK, 11, "visual.blocks.11", "visual.blocks.0.attn.qkv.bias", "visual.blocks.11.attn.qkv.bias"),
        (MERGER, 0, "visual.merger", "visual.merger.mlp.2.weight", "visual.merger.mlp.2.weight"),
        (LAYER, 3, "model.layers.3", KEYS, KEYS),
    ],
)
def test_names_of_the_graph_and_of_the_model(kind: Kind, index: int, label: str, name: str, place: str) -> None:
    assert kind.label(index) == label
    assert kind.place(name, index) == place
