"""A bundle before it is written: what it will take, and values that do not fit its graphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.bundle import Bundle, no_progress, writing
from onevision_edge.errors import OneVisionError
from onevision_edge.export.checkpoint import Checkpoint
from onevision_edge.export.draft import Draft
from onevision_edge.precision.plan import Plan, Rule, default_plan

BYTES = {"int8": 1, "int4-block32": 0.5, "fp8": 1, "nvfp4": 0.5, "int8-weight": 1}


@pytest.fixture(scope="module")
def checkpoint(golden_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(golden_checkpoint)


@pytest.mark.parametrize("precision", [*BYTES, "float"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_bytes_by_counting(checkpoint: Checkpoint, precision: str, dtype: str) -> None:
    """Every weight of the decoder's layers, with its scales; everything else in the graph's float."""
    draft = Draft.make(checkpoint, default_plan(precision, dtype, lm_head="float"), 64)
    size = {"fp32": 4, "fp16": 2}[dtype]
    shapes = [checkpoint.tensors[name].shape for name in checkpoint.tensors]
    whole = sum(int(np.prod(shape)) for shape in shapes) * size
    whole += 8 * (4 - size)  # the class token's angles are FP32 always
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("model.layers.") and "_proj" in name and precision != "float":
            outputs, inputs = tensor.shape
            whole -= outputs * inputs * (size - BYTES[precision])
            blocks = {"int4-block32": inputs // 32, "nvfp4": inputs // 16}.get(precision, 1)
            whole += 4 + outputs * blocks if precision == "nvfp4" else outputs * blocks * size
    inputs_rounded = 3 * 4 if precision in ("int8", "fp8") else 0  # a scale for each of four activations
    assert draft.nbytes == whole + inputs_rounded * size


@pytest.mark.parametrize("precision", ["float", "int8", "int4", "nvfp4"])
def test_the_summary_adds_up(checkpoint: Checkpoint, precision: str) -> None:
    plan = default_plan(precision, "fp16", kv_cache="int8")
    draft = Draft.make(checkpoint, plan, 64)
    rows = draft.summary()
    assert sum(count for _, _, count, _ in rows) + 512 * 64 * 2 == draft.nbytes
    found = {(modules, name): reason for modules, name, _, reason in rows}
    wanted = {"int4": "int4-block32"}.get(precision, precision)
    assert found["model.layers.*.self_attn.q_proj", wanted] == plan.rules[1].reason
    assert found["visual.blocks.*.attn.qkv", "float"].startswith("a fifteenth of the weights")
    assert ("lm_head", "float" if precision == "float" else "int8-weight") in found


def test_layers_that_differ_are_two_rows(checkpoint: Checkpoint) -> None:
    plan = default_plan("int4").with_rules([Rule("decoder", "model.layers.1.mlp.up_proj", "int8", "it hurts most")])
    rows = [row for row in Draft.make(checkpoint, plan, 64).summary() if row[0] == "model.layers.*.mlp.up_proj"]
    assert [(precision, reason == "it hurts most") for _, precision, _, reason in rows] == [
        ("int4-block32", False),
        ("int8", True),
    ]


def test_matrices_are_every_linear(checkpoint: Checkpoint) -> None:
    draft = Draft.make(checkpoint, default_plan("int4"), 64)
    found = dict(draft.matrices("decoder"))
    assert len(found) == 3 * 7 + 1
    assert found["model.layers.2.mlp.down_proj"] == (160, 64)
    assert found["lm_head"] == (64, 512)
    assert dict(draft.matrices("vision"))["visual.patch_embed.proj"] == (588, 64)


def written(draft: Draft, path: Path, values: dict[str, np.ndarray]) -> Bundle:
    with writing(path) as writer:
        writer.write_manifest(draft.write(writer, no_progress, values))
    return Bundle.open(path)


def test_values_take_the_place_of_tensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """In the graph's layout; everything else stays, and so does the digest of what was read."""
    plain = onevision_edge.export(checkpoint.directory, tmp_path / "plain", dtype="fp32", max_length=64)
    name, draft = "model.layers.1.mlp.up_proj.weight", Draft.make(checkpoint, default_plan("float", "fp32"), 64)
    changed = np.random.default_rng(0).standard_normal((64, 160)).astype(np.float32)
    bundle = written(draft, tmp_path / "changed", {name: changed})
    assert bundle.manifest.provenance == plain.manifest.provenance
    read = Checkpoint.open(bundle.directory)
    np.testing.assert_array_equal(read.read(name), changed.T)
    other = "model.layers.1.mlp.gate_proj.weight"
    np.testing.assert_array_equal(read.read(other), checkpoint.read(other))


def test_float_values_take_the_graph_s_format(checkpoint: Checkpoint, tmp_path: Path) -> None:
    draft = Draft.make(checkpoint, default_plan("float", "fp16"), 64)
    given = np.full(64, 1 / 3, np.float32)
    found = Checkpoint.open(written(draft, tmp_path / "b", {"model.norm.weight": given}).directory)
    np.testing.assert_array_equal(found.read("model.norm.weight"), given.astype(np.float16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model.norm.weight": np.ones(32, np.float32)},
            "model.norm.weight: calibration made 64 bytes, the graph holds 128",
        ),
        ({"model.norm.weight": np.full(64, np.nan, np.float32)}, "tensor model.norm.weight holds NaN or infinity"),
        ({"model.norm.weight": np.full(64, 1e6, np.float32)}, "tensor model.norm.weight reaches 1e+06, beyond fp16"),
    ],
)
def test_values_that_do_not_fit(
    checkpoint: Checkpoint, tmp_path: Path, values: dict[str, np.ndarray], message: str
) -> None:
    draft = Draft.make(checkpoint, default_plan("float", "fp16"), 64)
    with pytest.raises(OneVisionError) as caught:
        written(draft, tmp_path / "b", values)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length 0 is outside 1..4096"),
        ({"max_length": 4097}, "max_length 4097 is outside 1..4096"),
        ({"max_length": True}, "max_length True is outside"),
        ({"parts": ["encoder"]}, "parts encoder: choose from vision, decoder"),
        ({"parts": []}, "parts (none): choose from vision, decoder"),
    ],
)
def test_options_out_of_range(checkpoint: Checkpoint, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OneVisionError) as caught:
        Draft.make(checkpoint, Plan("p"), **options)
    assert message in str(caught.value)


def test_a_missing_tensor_is_named_before_anything_is_written(tiny: Callable[..., Any], tmp_path: Path) -> None:
    made = tiny()
    del made.tensors["model.layers.1.mlp.up_proj.weight"]
    source = Checkpoint.open(made.write(tmp_path / "c"))
    with pytest.raises(OneVisionError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        Draft.make(source, Plan("p", rules=(Rule("decoder", "*", "int8"),)), 64)
