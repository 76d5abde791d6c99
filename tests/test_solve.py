"""What solving a stage makes: everything the graph wants and nothing else, and numbers that mean what they should.

Bundles made of it are compared with the model in numpy, in float64: weights read from the files and dequantised by
hand, activations and caches rounded by hand.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy_model
import onnx
import pytest
from onnx import numpy_helper

import onevision_edge
from onevision_edge.bundle import no_progress, writing
from onevision_edge.calibration.dataset import Dataset, Preparer, load_dataset
from onevision_edge.calibration.gptq import factor, gptq
from onevision_edge.calibration.journal import Journal
from onevision_edge.calibration.recipe import Methods
from onevision_edge.calibration.walk import Walk
from onevision_edge.export.checkpoint import Checkpoint
from onevision_edge.export.draft import Draft
from onevision_edge.precision import FLOAT_FORMATS, FP32
from onevision_edge.precision.codes import unpack
from onevision_edge.precision.formats import FORMATS, Scale, choose_scale
from onevision_edge.precision.plan import Plan, Rule
from onevision_edge.runtime.images import patch_positions

Arrays = dict[str, np.ndarray]
SIZES = {
    "text_config__hidden_size": 64,
    "text_config__intermediate_size": 128,
    "text_config__attention_bias": True,
    "vision_config__intermediate_size": 128,
    "vision_config__depth": 1,
}
METHODS = Methods(samples=32)
FEEDS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PATCHES = Rule("vision", "visual.patch_embed.proj", "float")  # 588 inputs
# Everything in one precision; then a mixture, with neighbours that read one value in different ones.
PLANS = {
    name: Plan(name, "fp32", "float", (Rule("*", "*", name), PATCHES))
    for name in ("int8", "int8-weight", "int4", "int4-block32", "fp8", "nvfp4")
}
PLANS["mixed"] = Plan(
    "mixed",
    "fp32",
    "int8",
    (
        Rule("*", "*", "int8"),
        Rule("*", "*.k_proj", "float"),
        Rule("*", "*.q_proj", "int4"),
        Rule("*", "*.up_proj", "fp8"),
        Rule("*", "model.layers.1.mlp.*", "nvfp4"),
        Rule("*", "lm_head", "int8-weight"),
        Rule("*", "visual.merger.mlp.0", "fp8"),
    ),
)


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Any]) -> Any:
    """A random checkpoint in memory, with some outliers among its channels."""
    found = tiny(seed=7, **SIZES)
    rng = np.random.default_rng(7)
    for name, values in found.tensors.items():
        if name.endswith(("layernorm.weight", "norm1.weight", "norm2.weight")):
            values[rng.choice(len(values), 4, replace=False)] *= 12
    return found


@pytest.fixture(scope="module")
def checkpoint(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(made.write(tmp_path_factory.mktemp("checkpoint")))


def inputs(seed: int) -> dict[str, np.ndarray]:
    """A row about two images."""
    rng = np.random.default_rng(seed)
    ids = np.array([[*rng.integers(0, 60, 3), *[60] * 4, 9, *[60] * 6, *rng.integers(0, 60, 5)]])
    pixels = rng.standard_normal((40, 588)).astype(np.float32)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": np.array([[1, 4, 4], [1, 4, 6]])}


@pytest.fixture(scope="module")
def rows(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("rows")
    for i in range(4):
        np.savez(directory / f"{i}.npz", **inputs(i))
    return load_dataset(directory, Preparer.from_directory(checkpoint.directory, checkpoint.config))


@pytest.fixture(scope="module")
def solved(
    checkpoint: Checkpoint, rows: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Arrays, dict[str, Any]]]:
    """Values and notes of a plan, each plan solved once."""
    found: dict[Any, tuple[Arrays, dict[str, Any]]] = {}

    def solve(plan: Plan, methods: Methods = METHODS) -> tuple[Arrays, dict[str, Any]]:
        if (plan, methods) not in found:
            book = Journal(tmp_path_factory.mktemp("journal"), "key")
            Walk(checkpoint, plan, methods, [(rows, True)], book, no_progress, threads=1).run()
            found[plan, methods] = dict(book.values()), book.notes
        return found[plan, methods]

    return solve


@pytest.fixture(scope="module")
def written(
    checkpoint: Checkpoint, solved: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The bundle of a plan, each written once."""
    found: dict[Any, Path] = {}

    def write(plan: Plan, methods: Methods = METHODS) -> Path:
        if (plan, methods) not in found:
            path = tmp_path_factory.mktemp("bundle") / "bundle"
            with writing(path) as writer:
                values = solved(plan, methods)[0]
                writer.write_manifest(Draft.make(checkpoint, plan, 64).write(writer, no_progress, values))
            found[plan, methods] = path
        return found[plan, methods]

    return write


# What is made.


@pytest.mark.parametrize(("name", "dtype"), [*((n, "fp32") for n in PLANS), ("nvfp4", "fp16"), ("mixed", "bf16")])
def test_values_are_what_the_graphs_want(
    checkpoint: Checkpoint, solved: Callable[..., Any], name: str, dtype: str
) -> None:
    """Every code and scale, in its size; else only what takes a scale or a correction up."""
    plan = Plan(name, dtype, PLANS[name].kv_cache, PLANS[name].rules)
    values, _ = solved(plan)
    graphs = Draft.make(checkpoint, plan, 64).graphs.values()
    wanted = {name: weight for _, parameters in graphs for name, weight in parameters.by_name.items()}
    computed = {name for name, weight in wanted.items() if weight.computed}
    assert computed <= values.keys() <= wanted.keys()
    for path in values.keys() - computed:
        assert path.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight", ".bias", "k_proj.weight"))
    float_types = {fmt.onnx_type for fmt in FLOAT_FORMATS.values()}
    for path, array in values.items():
        if wanted[path].dtype in float_types:
            assert (array.dtype, array.shape) == (np.float32, wanted[path].stored_shape), path
        else:
            assert (array.dtype, array.shape) == (np.uint8, (wanted[path].nbytes,)), path


def test_a_plan_with_an_int8_cache_alone(checkpoint: Checkpoint, solved: Callable[..., Any]) -> None:
    values, notes = solved(Plan("cache", "fp32", "int8"))
    assert values.keys() == {f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in "kv"}
    assert notes == {}


def test_notes_are_of_every_module_that_is_quantised(solved: Callable[..., Any]) -> None:
    values, notes = solved(PLANS["mixed"])
    weights = {name.removesuffix(".weight_scale") for name in values if name.endswith(".weight_scale")}
    assert notes.keys() == weights
    assert notes["model.layers.0.self_attn.q_proj"]["precision"] == "int4-block32"
    assert notes["model.layers.1.mlp.down_proj"]["precision"] == "nvfp4"
    assert solved(PLANS["int4"])[1]["model.layers.0.mlp.down_proj"]["precision"] == "int4-block128"
    assert all(10 < note["snr_db"] < 70 for note in notes.values())


def test_a_tied_head_is_made_of_the_embedding_table(tiny: Callable[..., Any], rows: Dataset, tmp_path: Path) -> None:
    """One scale for each token, that of the largest of its row."""
    made = tiny(tied=True, seed=1, **SIZES)
    plan = Plan("head", "fp32", "float", (Rule("decoder", "lm_head", "int8-weight"),))
    (tmp_path / "journal").mkdir()
    book, tied = Journal(tmp_path / "journal", "key"), Checkpoint.open(made.write(tmp_path / "c"))
    Walk(tied, plan, METHODS, [(rows, True)], book, no_progress, threads=1).run()
    assert sorted(book.values()) == ["lm_head.weight", "lm_head.weight_scale"]
    table, scale = made.tensors["model.embed_tokens.weight"].T, book.values()["lm_head.weight_scale"]
    np.testing.assert_allclose(scale, np.abs(table).max(axis=0) / 127, rtol=1e-6)
    codes = book.values()["lm_head.weight"].view(np.int8).reshape(table.shape)
    np.testing.assert_array_equal(codes, np.rint(table / scale))


# What it means.


def parameters(bundle: Path) -> Arrays:
    """Every initialiser of a bundle's graphs, codes as numbers."""
    found: Arrays = {}
    for graph in ("vision", "decoder"):
        for tensor in onnx.load(bundle / f"{graph}.onnx").graph.initializer:
            found[tensor.name] = numpy_helper.to_array(tensor).astype(np.float64)
    return found


def dequantized(found: Arrays) -> Arrays:
    """Weights by the checkpoint's names: codes by the scales of their channel or block, these by the tensor's."""
    weights = {}
    for name, values in found.items():
        if name.endswith(("_scale", "_scale_2")):
            continue
        if f"{name}_scale" in found:
            scale = found[f"{name}_scale"] * found.get(f"{name}_scale_2", 1)
            blocks = scale if scale.ndim == 2 else scale[None]
            values = values * np.repeat(blocks, len(values) // len(blocks), axis=0)
        weights[name] = values
    return weights


def rounding(found: Arrays, plan: Plan) -> Callable[[str, np.ndarray], np.ndarray]:
    """What the plan's codes hold of an activation, or of keys and values."""

    def precision(path: str) -> str:
        return plan.precision("vision" if path.startswith("visual") else "decoder", path, 128).name

    def scale_of(path: str) -> float:
        """Linears that read one value in the same codes have one scale, the first's."""
        parent, last = path[: path.rfind(".") + 1], path[path.rfind(".") + 1 :]
        siblings = [parent + name for name in next((feed for feed in FEEDS if last in feed), (last,))]
        names = [f"{sibling}.input_scale" for sibling in siblings if precision(sibling) == precision(path)]
        (scale,) = (float(found[name]) for name in names if name in found)
        return scale

    def rounded(path: str, x: np.ndarray) -> np.ndarray:
        if path.endswith((".k", ".v")):
            scale = found.get(f"{path}_scale")
            return x if scale is None else int8(x, float(scale))
        name = precision(path)
        if name == "fp8":
            codes = np.clip(x / scale_of(path), -448, 448).astype(ml_dtypes.float8_e4m3fn)
            return codes.astype(np.float64) * scale_of(path)
        return int8(x, scale_of(path)) if name == "int8" else x

    return rounded


def int8(x: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(x / scale), -128, 127) * scale


def reference(
    checkpoint: Checkpoint, tensors: Arrays, rounded: Callable[[str, np.ndarray], np.ndarray] = lambda path, x: x
) -> Any:
    """The model in numpy, of the graphs' parameters and the checkpoint's embedding table."""
    table = numpy_model.stored("x.weight", checkpoint.read("model.embed_tokens.weight"))
    return numpy_model.NumpyModel(checkpoint.config, {**tensors, "model.embed_tokens.weight": table}, rounded)


def logits(model: Any, row: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of a row, by numpy: [tokens, vocab]."""
    images, start = [], 0
    for _, height, width in row["image_grid_thw"].tolist():
        pixels = row["pixel_values"][start : start + height * width].astype(float)
        images.append(model.tower(pixels, patch_positions(height, width, 2)))
        start += height * width
    return model.logits(row["input_ids"][0], np.concatenate(images))


@pytest.fixture(scope="module")
def exact(made: Any, checkpoint: Checkpoint) -> Any:
    """The full-precision model in numpy."""
    return reference(checkpoint, {name: numpy_model.stored(name, values) for name, values in made.tensors.items()})


def errors(bundle: Path, model: Any, count: int) -> np.ndarray:
    """The largest differences of a bundle's logits, in each of some rows that calibrated nothing."""
    loaded = onevision_edge.load(bundle, threads=1, exact=True)
    held_out = [inputs(seed) for seed in range(100, 100 + count)]
    return np.array([np.abs(loaded.logits(**row)[0] - logits(model, row)).max() for row in held_out])


@pytest.mark.parametrize("name", ["int8-weight", "int4", "int4-block32", "nvfp4"])
def test_weights_are_worth_their_codes_by_their_scales(
    checkpoint: Checkpoint, written: Callable[..., Path], name: str
) -> None:
    """NVFP4 runs from its twin in INT8, whose codes and scales are made when it is loaded."""
    bundle = written(PLANS[name])
    model = reference(checkpoint, dequantized(parameters(bundle)))
    assert errors(bundle, model, 2).max() < 1e-4


@pytest.mark.parametrize("name", ["int8", "fp8", "mixed"])
def test_activations_and_caches_are_rounded_by_their_scales(
    checkpoint: Checkpoint, written: Callable[..., Path], name: str
) -> None:
    """Float32 and float64 fall on two sides of a rounding boundary here and there, in a row of two or three in ten."""
    bundle, plan = written(PLANS[name]), PLANS[name]
    found = parameters(bundle)
    model = reference(checkpoint, dequantized(found), rounding(found, plan))
    assert np.sort(errors(bundle, model, 6))[:4].max() < 1e-4
    unrounded = reference(checkpoint, dequantized(found))
    assert errors(bundle, unrounded, 2).min() > 1e-2


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_in_fp16(checkpoint: Checkpoint, written: Callable[..., Path], name: str) -> None:
    """Scales are rounded to FP16 before codes are chosen: the noise is no more than an FP16 graph's of floats."""
    noise = []
    for rules in ((), PLANS[name].rules):
        bundle = written(Plan("any", "fp16", "float", rules))
        noise.append(errors(bundle, reference(checkpoint, dequantized(parameters(bundle))), 4).mean())
    assert noise[1] < 2 * noise[0] < 0.1


class Folding(Walk):
    """A walk that keeps the floats whose codes are taken, with all scales taken up."""

    def _finish(self, label: str, stage: Any, index: int, group: Any, stream: np.memmap) -> None:
        super()._finish(label, stage, index, group, stream)
        self.folded = getattr(self, "folded", {}) | {stage.kind.place(n, index): v for n, v in group.weights.items()}


@pytest.mark.parametrize("name", ["int8", "int4", "mixed"])
def test_scales_on_activations_change_no_product(
    made: Any, checkpoint: Checkpoint, rows: Dataset, exact: Any, tmp_path: Path, name: str
) -> None:
    """Before anything is rounded, the model whose weights are quantised is the one that was given."""
    journal = Journal(tmp_path, "key")
    walk = Folding(checkpoint, PLANS[name], METHODS, [(rows, True)], journal, no_progress, threads=1)
    walk.run()
    tensors = {name: numpy_model.stored(name, values) for name, values in made.tensors.items()}
    changed = [name for name, values in walk.folded.items() if not np.array_equal(values, tensors[name])]
    assert len(changed) > 15
    assert sum("strength" in note for note in journal.notes.values()) > 8
    folded = reference(checkpoint, tensors | walk.folded)
    for seed in (100, 101):
        assert np.abs(logits(folded, inputs(seed)) - logits(exact, inputs(seed))).max() < 1e-4


# How it is found.


def read_by(exact: Any, path: str) -> np.ndarray:
    """What a Linear (or a cache) of the full-precision model reads in calibration: [rows, channels]."""
    found = []
    for seed in range(4):
        row = inputs(seed)
        images, start = [], 0
        for _, height, width in row["image_grid_thw"].tolist():
            pixels = row["pixel_values"][start : start + height * width].astype(float)
            images.append(exact.tower(pixels, patch_positions(height, width, 2)))
            start += height * width
            if path.startswith("visual"):
                found.append(exact.taps[path])
        if not path.startswith("visual"):
            exact.logits(row["input_ids"][0], np.concatenate(images))
            found.append(exact.taps[path].reshape(len(row["input_ids"][0]), -1))
    return np.concatenate(found)


PLAIN = Methods(observer="absmax", smoothquant=False, awq=False, gptq=False, bias_correction=False, samples=512)


def test_scales_of_activations_leave_headroom(exact: Any, solved: Callable[..., Any]) -> None:
    """A fifth beyond the largest magnitude for INT8, twice it for FP8."""
    plan = Plan("int8", "fp32", "int8", PLANS["int8"].rules)
    values, _ = solved(plan, PLAIN)
    for path in ("visual.blocks.0.mlp.fc2", "visual.merger.mlp.0", "model.layers.1.self_attn.o_proj", "lm_head"):
        wanted = 1.2 * np.abs(read_by(exact, path)).max() / 127
        assert values[f"{path}.input_scale"] == pytest.approx(wanted, rel=1e-5), path
    for kind in "kv":
        wanted = 1.2 * np.abs(read_by(exact, f"model.layers.1.self_attn.{kind}")).max() / 127
        assert values[f"model.layers.1.self_attn.{kind}_scale"] == pytest.approx(wanted, rel=1e-5)
    values, _ = solved(PLANS["fp8"], PLAIN)
    for path in ("visual.blocks.0.attn.qkv", "model.layers.0.mlp.down_proj"):
        wanted = 2 * np.abs(read_by(exact, path)).max() / 448
        assert values[f"{path}.input_scale"] == pytest.approx(wanted, rel=1e-5), path


def test_what_could_not_be_smoothed_is_clipped(exact: Any, solved: Callable[..., Any]) -> None:
    """Behind the tower's GELU nothing takes a scale up: the observer clips there, and only there."""
    values, notes = solved(PLANS["int8"])
    assert "strength" not in notes["visual.blocks.0.mlp.fc2"]
    largest = np.abs(read_by(exact, "visual.blocks.0.mlp.fc2")).max() / 127
    assert 0.3 * largest < values["visual.blocks.0.mlp.fc2.input_scale"] <= largest


def test_plain_rounding_is_the_nearest_code(made: Any, solved: Callable[..., Any]) -> None:
    """With every method left out: the scale that clips nothing, each weight to the nearest of its codes."""
    values, _ = solved(PLANS["int4-block32"], PLAIN)
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight", "visual.blocks.0.attn.qkv.weight"):
        weights = made.tensors[name].T
        blocks = weights.reshape(-1, 32, weights.shape[1])
        scale = np.maximum(blocks.max(axis=1) / np.float32(7), -blocks.min(axis=1) / np.float32(8))
        np.testing.assert_allclose(values[f"{name}_scale"], scale, rtol=1e-6)
        codes = np.rint(blocks / values[f"{name}_scale"][:, None]).reshape(-1).astype(np.int8)
        np.testing.assert_array_equal(values[name], (codes[0::2] & 15) | (codes[1::2] << 4).view(np.uint8))


@pytest.mark.parametrize(
    ("norm", "readers"),
    [
        ("model.layers.0.input_layernorm", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]),
        ("model.layers.1.post_attention_layernorm", ["model.layers.1.mlp.gate_proj"]),
        ("visual.blocks.0.norm2", ["visual.blocks.0.mlp.fc1"]),
        ("model.norm", ["lm_head"]),
    ],
)
def test_a_smoothed_activation_s_scale_is_taken_up_on_both_sides(
    made: Any, exact: Any, solved: Callable[..., Any], norm: str, readers: list[str]
) -> None:
    """What the normalisation is divided by, the rows of the matrices are multiplied by: to half a code's step."""
    values, notes = solved(PLANS["int8"])
    scale = made.tensors[f"{norm}.weight"] / values[f"{norm}.weight"]
    assert np.ptp(scale) > 0.3
    assert np.exp(np.log(scale).mean()) == pytest.approx(1, rel=1e-4)
    for reader in readers:
        assert notes[reader]["strength"] == notes[readers[0]]["strength"] > 0
        weights = made.tensors[f"{reader}.weight"].T * scale[:, None]
        steps = values[f"{reader}.weight_scale"]
        found = values[f"{reader}.weight"].view(np.int8).reshape(weights.shape) * steps
        assert (np.abs(found - weights) <= steps * 0.5001).all()
    largest = np.abs(read_by(exact, readers[0]) / scale).max()
    assert values[f"{readers[0]}.input_scale"] == pytest.approx(1.2 * largest / 127, rel=1e-4)


def test_a_cache_holds_values_as_far_as_they_were_divided(made: Any, exact: Any, solved: Callable[..., Any]) -> None:
    """Part of o_proj's scale is taken up by v_proj, whose bias shows how much; keys stay as they are."""
    values, notes = solved(Plan("int8", "fp32", "int8", PLANS["int8"].rules), replace(METHODS, bias_correction=False))
    at = "model.layers.1.self_attn"
    assert notes[f"{at}.o_proj"]["strength"] > 0
    scale = made.tensors[f"{at}.v_proj.bias"] / values[f"{at}.v_proj.bias"]
    assert np.ptp(scale) > 0.3
    for kind, read in (("v", read_by(exact, f"{at}.v") / scale), ("k", read_by(exact, f"{at}.k"))):
        assert values[f"{at}.{kind}_scale"] == pytest.approx(1.2 * np.abs(read).max() / 127, rel=1e-4), kind


def folded(made: Any, exact: Any, values: Arrays, norm: str, reader: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A Linear's matrix with a normalisation's scale taken up, what it then reads, and what it read before."""
    scale = made.tensors[f"{norm}.weight"] / values[f"{norm}.weight"]
    assert np.ptp(scale) > 0.3
    read = read_by(exact, reader)
    return made.tensors[f"{reader}.weight"].T * scale[:, None], np.float32(read / scale), np.float32(read)


def test_gptq_rounds_for_what_is_read_in_the_end(made: Any, exact: Any, solved: Callable[..., Any]) -> None:
    """Codes as for the Gram matrix of the divided activation, but for a few that float32 leaves open."""
    values, _ = solved(PLANS["mixed"])
    name, form = "model.layers.0.self_attn.q_proj", FORMATS["int4-block32"]
    weights, after, before = folded(made, exact, values, "model.layers.0.input_layernorm", name)
    scale = Scale(values[f"{name}.weight_scale"], FP32)
    found = unpack(values[f"{name}.weight"], form.codes, weights.shape).astype(int)
    differing = [
        (found != gptq(weights, factor(x.T @ x, METHODS.damping), scale, form).codes.astype(int)).mean()
        for x in (after, before)
    ]
    assert differing[0] < 0.01 < 0.05 < differing[1]


def test_clips_count_errors_by_what_is_read_in_the_end(made: Any, exact: Any, solved: Callable[..., Any]) -> None:
    """FP8 beside INT8, for which the activation is smoothed."""
    rules = (*PLANS["int8"].rules, Rule("*", "*.q_proj", "fp8"))
    values, _ = solved(Plan("fp8", "fp32", "float", rules), replace(METHODS, clip=True))
    name, form = "model.layers.0.self_attn.q_proj", FORMATS["fp8-channel"]
    weights, after, before = folded(made, exact, values, "model.layers.0.input_layernorm", name)
    differing = []
    for x in (after, before):
        scale = choose_scale(weights, form, FP32, search_scales=True, importance=np.square(x).mean(axis=0))
        differing.append((np.abs(values[f"{name}.weight_scale"] / scale.stored - 1) > 1e-5).mean())
    assert differing[0] == 0
    assert differing[1] > 0.05


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_bias_correction_leaves_no_mean_error(made: Any, exact: Any, solved: Callable[..., Any], path: str) -> None:
    """Over the rows of calibration, all of which are kept here."""
    name = f"visual.blocks.0.{path}"
    x, weights, bias = read_by(exact, name), exact.w[f"{name}.weight"], made.tensors[f"{name}.bias"]
    means = {}
    for correct in (True, False):
        methods = Methods(observer="absmax", smoothquant=False, bias_correction=correct, samples=512)
        values, _ = solved(PLANS["int8"], methods)
        assert (f"{name}.bias" in values) is correct
        codes = values[f"{name}.weight"].view(np.int8).reshape(weights.shape)
        found = int8(x, float(values[f"{name}.input_scale"])) @ (codes * values[f"{name}.weight_scale"].astype(float))
        means[correct] = (found + values.get(f"{name}.bias", bias) - (x @ weights + bias)).mean(axis=0)
    assert np.abs(means[True]).max() < 1e-5
    assert np.abs(means[False]).max() > 1e-3
