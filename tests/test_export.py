"""The exported files: standard ONNX, the checkpoint's weights, the same bytes every time."""

import hashlib
import itertools
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

import onevision_edge
from onevision_edge.bundle import MANIFEST, Bundle
from onevision_edge.errors import OneVisionError
from onevision_edge.export import weights

Exported = Callable[[str], Path]
Tiny = Callable[..., Any]
DTYPES = ["fp32", "fp16", "bf16"]
GRAPHS = list(itertools.product(["vision", "decoder"], DTYPES))
FLOATS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(OneVisionError) as caught:
        onevision_edge.export(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("part", "dtype"), GRAPHS)
def test_the_checker_finds_nothing(golden_bundle: Exported, part: str, dtype: str) -> None:
    onnx.checker.check_model(golden_bundle(dtype) / f"{part}.onnx", full_check=True)


@pytest.mark.parametrize(("part", "dtype"), GRAPHS)
def test_standard_operators_only(golden_bundle: Exported, part: str, dtype: str) -> None:
    model = onnx.load(golden_bundle(dtype) / f"{part}.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    for node in model.graph.node:
        assert onnx.defs.has(node.op_type, max_inclusive_version=24)


@pytest.mark.parametrize(("part", "dtype"), GRAPHS)
def test_every_value_has_a_type_and_a_shape(golden_bundle: Exported, part: str, dtype: str) -> None:
    graph = onnx.load(golden_bundle(dtype) / f"{part}.onnx", load_external_data=False).graph
    described = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    for node in graph.node:
        for name in node.output:
            assert described[name].elem_type != onnx.TensorProto.UNDEFINED
            assert described[name].HasField("shape")
            for dim in described[name].shape.dim:
                assert dim.HasField("dim_value") or dim.dim_param, (node.name, described[name].shape)


@pytest.mark.parametrize(("part", "dtype"), GRAPHS)
def test_contracts_are_those_of_the_manifest(golden_bundle: Exported, part: str, dtype: str) -> None:
    spec = Bundle.open(golden_bundle(dtype)).graph(part)
    graph = onnx.load(golden_bundle(dtype) / spec.file, load_external_data=False).graph
    numeric = {1: "float32", 10: "float16", 16: "bfloat16", 7: "int64"}
    for declared, values in ((spec.inputs, graph.input), (spec.outputs, graph.output)):
        found = [
            (
                value.name,
                numeric[value.type.tensor_type.elem_type],
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]
        assert [(t.name, t.dtype, t.shape) for t in declared] == found
        assert all(t.meaning for t in declared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_initializers_are_the_checkpoints_tensors(golden_bundle: Exported, golden_checkpoint: Path, dtype: str) -> None:
    """Every tensor but the embedding table is in one graph, by name, and transposed where it is a matrix."""
    tensors = load_file(golden_checkpoint / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    stored = {
        i.name: onnx.numpy_helper.to_array(i, base_dir=str(golden_bundle(dtype)))
        for part in ("vision", "decoder")
        for i in onnx.load(golden_bundle(dtype) / f"{part}.onnx", load_external_data=False).graph.initializer
        if i.data_location == onnx.TensorProto.EXTERNAL
    }
    assert stored.keys() == tensors.keys()
    for name, values in stored.items():
        expected = tensors[name]
        if expected.ndim > 1 and name != "visual.class_pos_emb":
            expected = expected.reshape(len(expected), -1).T
        kept = "fp32" if name == "visual.class_pos_emb" else dtype
        np.testing.assert_array_equal(values, expected.astype(FLOATS[kept]), err_msg=name)
    rows = np.fromfile(golden_bundle(dtype) / "embed_tokens.bin", FLOATS[dtype]).reshape(table.shape)
    np.testing.assert_array_equal(rows, table.astype(FLOATS[dtype]))


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_nodes_carry_their_module_path(golden_bundle: Exported, part: str) -> None:
    graph = onnx.load(golden_bundle("fp32") / f"{part}.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    users = {name: node.name for node in graph.node for name in node.input if name.endswith(".weight")}
    assert len(users) > 20
    for weight, node in users.items():
        assert node.replace("/", ".").startswith(weight.removesuffix("weight"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests_of_the_manifest(golden_bundle: Exported, dtype: str) -> None:
    files = json.loads((golden_bundle(dtype) / MANIFEST).read_text())["files"]
    assert {"vision.onnx.data", "decoder.onnx.data", "embed_tokens.bin"} <= files.keys()
    for name, spec in files.items():
        content = (golden_bundle(dtype) / name).read_bytes()
        assert spec == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_weights_are_aligned_in_their_file(golden_bundle: Exported) -> None:
    """Large ones to pages, so that a memory map can serve them."""
    for initializer in onnx.load(golden_bundle("fp32") / "decoder.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in initializer.external_data}
        if place:
            assert int(place["offset"]) % (4096 if int(place["length"]) >= 4096 else 64) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bytes_every_time(
    golden_bundle: Exported, golden_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    onevision_edge.export(golden_checkpoint, tmp_path / "again", dtype=dtype, max_length=256)
    first, second = (
        {path.name: path.read_bytes() for path in directory.iterdir()}
        for directory in (golden_bundle(dtype), tmp_path / "again")
    )
    assert first == second


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_a_tensor_arrive_whole(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, dtype: str
) -> None:
    """Tensors of many blocks, on a disk that is slow enough for the next block to be ready early."""
    made = tiny(text_config__vocab_size=257, image_token_id=250)
    checkpoint = made.write(tmp_path / "c", source)
    onevision_edge.export(checkpoint, tmp_path / "whole", dtype=dtype, max_length=64)
    append = weights.Stream._append

    def slow_append(stream: weights.Stream, view: memoryview) -> None:
        time.sleep(0.0005)
        append(stream, view)

    monkeypatch.setattr(weights, "BLOCK_BYTES", 1 << 11)
    monkeypatch.setattr(weights, "_TILE", 8)
    monkeypatch.setattr(weights.Stream, "_append", slow_append)
    bundle = onevision_edge.export(checkpoint, tmp_path / "blocks", dtype=dtype, max_length=64)
    bundle.verify()
    for name in ("vision.onnx.data", "decoder.onnx.data", "embed_tokens.bin"):
        assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_progress_counts_every_byte_once(golden_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    onevision_edge.export(
        golden_checkpoint,
        tmp_path / "bundle",
        dtype="fp16",
        max_length=64,
        progress=lambda *progress: seen.append(progress),
    )
    done = [d for d, _, _ in seen]
    assert all(a < b for a, b in itertools.pairwise(done))
    assert {total for _, total, _ in seen} == {done[-1]}
    # Half of the float32 checkpoint, but for the learned angles (4 * 8 values), which stay in float32.
    values = sum(v.size for v in load_file(golden_checkpoint / "model.safetensors").values())
    assert done[-1] == 2 * values + 2 * 8


def test_overwrite_replaces(golden_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    onevision_edge.export(golden_checkpoint, output, dtype="fp32", max_length=64)
    (output / "stray").write_text("not of the bundle")
    assert "exists; pass --overwrite" in refusal(golden_checkpoint, output, dtype="fp16", max_length=32)
    bundle = onevision_edge.export(golden_checkpoint, output, dtype="fp16", max_length=32, overwrite=True)
    bundle.verify()
    assert (bundle.graph("decoder").dtype, bundle.manifest.max_length) == ("fp16", 32)
    assert not (output / "stray").exists()
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_bundle_is_never_replaced(golden_checkpoint: Path, tmp_path: Path, overwrite: bool) -> None:
    directory, file = tmp_path / "directory", tmp_path / "file"
    directory.mkdir()
    (directory / "thesis.txt").write_text("three years")
    file.write_text("two years")
    options = {"dtype": "fp32", "max_length": 64, "overwrite": overwrite}
    assert "exists and is not a bundle" in refusal(golden_checkpoint, directory, **options)
    assert "exists and is not a directory" in refusal(golden_checkpoint, file, **options)
    assert (directory / "thesis.txt").read_text() == "three years"
    assert file.read_text() == "two years"


def test_an_empty_directory_may_be_the_destination(golden_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "deeper" / "bundle"
    output.mkdir(parents=True)
    onevision_edge.export(golden_checkpoint, output, dtype="fp32", max_length=64).verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "unknown dtype 'int3': choose one of fp32, fp16, bf16"),
        ({"parts": ["vision", "audio"]}, "parts vision, audio: choose from vision, decoder"),
        ({"parts": []}, "parts (none): choose from vision, decoder"),
        ({"parts": "vision"}, "choose from vision, decoder"),
        ({"max_length": 0}, "max_length 0 is outside 1..4096"),
        ({"max_length": -1}, "max_length -1 is outside 1..4096"),
        ({"max_length": 4097}, "max_length 4097 is outside 1..4096 (the model's max_position_embeddings)"),
        ({"max_length": 2.5}, "max_length 2.5"),
        ({"max_length": True}, "max_length True"),
    ],
)
def test_bad_options(golden_checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refusal(golden_checkpoint, tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


def test_vision_alone(golden_checkpoint: Path, golden: Callable[[str], Any], tmp_path: Path) -> None:
    bundle = onevision_edge.export(golden_checkpoint, tmp_path / "b", dtype="fp32", max_length=64, parts=["vision"])
    bundle.verify()
    assert not (tmp_path / "b" / "embed_tokens.bin").exists()
    model, inputs = onevision_edge.load(tmp_path / "b", threads=1), golden("a_single_image").inputs
    assert model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]).shape == (24, 64)
    for call in (model.logits, model.generate_ids):
        with pytest.raises(OneVisionError, match=r"holds no decoder graph \(it has vision\)"):
            call(**inputs)


def test_decoder_alone(golden_checkpoint: Path, golden: Callable[[str], Any], tmp_path: Path) -> None:
    onevision_edge.export(golden_checkpoint, tmp_path / "b", dtype="fp32", max_length=64, parts=["decoder"])
    model, text = onevision_edge.load(tmp_path / "b", threads=1), golden("c_text_only")
    assert np.abs(model.logits(**text.inputs) - text.arrays["logits"]).max() < 1e-4
    inputs = golden("a_single_image").inputs
    missing = r"holds no vision graph \(it has decoder\)"
    with pytest.raises(OneVisionError, match=missing):
        model.logits(**inputs)
    with pytest.raises(OneVisionError, match=missing):
        model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])


def test_bf16_is_refused_at_loading(golden_bundle: Exported) -> None:
    with pytest.raises(OneVisionError, match="no bfloat16 kernels; export with --dtype fp32 or fp16"):
        onevision_edge.load(golden_bundle("bf16"))


def test_a_tied_head_is_written_from_the_table(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny(tied=True)
    onevision_edge.export(made.write(tmp_path / "c"), tmp_path / "b", dtype="fp32", max_length=64)
    graph = onnx.load(tmp_path / "b" / "decoder.onnx").graph
    (head,) = (i for i in graph.initializer if i.name == "lm_head.weight")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(head), made.tensors["model.embed_tokens.weight"].T)


# Prints by how many bytes the export of argv[1] to argv[2] raises the peak of resident memory.
PEAK = """
import sys
import onevision_edge
import onevision_edge.export.weights

baseline = peak()
onevision_edge.export(sys.argv[1], sys.argv[2], dtype=sys.argv[3], max_length=64)
print(peak() - baseline)
"""
HEAD_SHAPE = (150_000, 1024)  # 307 MB in BF16


def checkpoint_with_a_large_head(tiny: Tiny, directory: Path) -> Path:
    """A tied checkpoint whose table is one hole in a sparse file, which reads as zeros."""
    made = tiny(tied=True, text_config__hidden_size=HEAD_SHAPE[1], text_config__num_hidden_layers=1)
    made.config["text_config"]["vocab_size"] = HEAD_SHAPE[0]
    made.write(directory, "BF16", shards=2)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.embed_tokens.weight"] = "table.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    size = 2 * HEAD_SHAPE[0] * HEAD_SHAPE[1]
    entry = {"dtype": "BF16", "shape": HEAD_SHAPE, "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (directory / "table.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return directory


def test_memory_holds_one_tensor(tiny: Tiny, tmp_path: Path, python_output: Callable[..., str]) -> None:
    if shutil.disk_usage(tmp_path).free < 2e9:
        pytest.skip("needs 0.7 GB of disk, and some to spare")
    checkpoint = checkpoint_with_a_large_head(tiny, tmp_path / "c")
    peak = int(python_output(PEAK, checkpoint, tmp_path / "b", "fp16"))
    assert (tmp_path / "b" / "decoder.onnx.data").stat().st_size > 300e6
    shutil.rmtree(tmp_path / "b")
    assert 50e6 < peak < 307.2e6 + 200e6  # 464 MB measured: the tensor, and two slabs of its transpose


def test_default_length_is_the_models_where_that_is_less(tiny: Callable[..., Any], tmp_path: Path) -> None:
    made = tiny(text_config__max_position_embeddings=100)
    assert onevision_edge.export(made.write(tmp_path / "c"), tmp_path / "b").manifest.max_length == 100
