"""A full-precision bundle as a checkpoint: the same tensors under the same names, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import onevision_edge
from onevision_edge.bundle import MANIFEST, Bundle
from onevision_edge.errors import OneVisionError
from onevision_edge.export.checkpoint import Checkpoint

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(OneVisionError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_the_checkpoint_s(
    golden_checkpoint: Path, golden_bundle: Callable[[str], Path], dtype: str
) -> None:
    """In its shape, the patch kernel's too; in the bundle's format, except for what stays in FP32 in all."""
    source, bundle = Checkpoint.open(golden_checkpoint), Checkpoint.open(golden_bundle(dtype))
    assert bundle.tensors.keys() == source.tensors.keys()
    assert bundle.config == source.config
    assert bundle.name == source.name == "checkpoint"
    for name in source.tensors:
        found, wanted = bundle.read(name), source.read(name)
        kept = np.float32 if name == "visual.class_pos_emb" else DTYPES[dtype]
        assert found.dtype == kept, name
        np.testing.assert_array_equal(found, wanted.astype(kept), err_msg=name)
        bundle.check(name, wanted.shape)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_tensors_in_blocks(golden_bundle: Callable[[str], Path], rows: int) -> None:
    checkpoint = Checkpoint.open(golden_bundle("fp32"))
    for name in ("lm_head.weight", "visual.patch_embed.proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        blocks = [block.copy() for block in checkpoint.read_rows(name, rows)]
        assert all(len(block) == rows for block in blocks[:-1])
        assert all(block.flags.c_contiguous for block in checkpoint.read_rows(name, rows))
        np.testing.assert_array_equal(np.concatenate(blocks), checkpoint.read(name))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_bundle_exported_again_is_the_same(golden_bundle: Callable[[str], Path], tmp_path: Path, dtype: str) -> None:
    source = golden_bundle(dtype)
    again = onevision_edge.export(source, tmp_path / "again", dtype=dtype, max_length=256)
    assert again.manifest.files == Bundle.open(source).manifest.files


def test_a_bf16_checkpoint_survives_fp32(tmp_path: Path) -> None:
    """The shipped one: by way of an FP32 bundle, a BF16 bundle is the same as from the checkpoint itself."""
    onevision_edge.export("demo", tmp_path / "fp32", dtype="fp32")
    direct = onevision_edge.export("demo", tmp_path / "direct", dtype="bf16")
    around = onevision_edge.export(tmp_path / "fp32", tmp_path / "around", dtype="bf16")
    assert around.manifest.files == direct.manifest.files


def test_a_tied_head_is_a_tensor_of_its_own(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The graph holds it; to read it from the embedding table gives the same."""
    source = Checkpoint.open(tiny(tied=True).write(tmp_path / "c"))
    onevision_edge.export(tmp_path / "c", tmp_path / "b", dtype="fp32", max_length=64)
    bundle = Checkpoint.open(tmp_path / "b")
    assert source.tied
    assert not bundle.tied
    np.testing.assert_array_equal(bundle.read("lm_head.weight"), source.read("model.embed_tokens.weight"))


def test_a_part_is_not_a_checkpoint(golden_checkpoint: Path, tmp_path: Path) -> None:
    onevision_edge.export(golden_checkpoint, tmp_path / "b", dtype="fp32", parts=["decoder"])
    message = refusal(onevision_edge.export, tmp_path / "b", tmp_path / "c")
    assert message == f"{tmp_path / 'b'}: tensor visual.class_embedding is missing from the checkpoint"
    assert onevision_edge.export(tmp_path / "b", tmp_path / "c", parts=["decoder"]).manifest.graphs.keys() == {
        "decoder"
    }


# Bundles that are not what they say.


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_bundle("fp32"), tmp_path / "bundle"))


def rewrite(bundle: Path, change: Callable[[onnx.TensorProto], None], name: str = "model.norm.weight") -> None:
    """Change one tensor of the decoder's file, and the manifest with it."""
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    change(tensor)
    onnx.save(model, bundle / "decoder.onnx")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"]["decoder.onnx"]["size"] = (bundle / "decoder.onnx").stat().st_size
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def external(tensor: onnx.TensorProto, key: str, value: str) -> None:
    (entry,) = (entry for entry in tensor.external_data if entry.key == key)
    entry.value = value


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: external(tensor, "offset", "99999999"),
        lambda tensor: external(tensor, "location", "other.data"),
        lambda tensor: setattr(tensor, "data_type", onnx.TensorProto.INT8),
    ],
    ids=["beyond the file", "a file that is not listed", "codes"],
)
def test_a_graph_that_lies_is_refused(bundle: Path, change: Callable[[onnx.TensorProto], None]) -> None:
    (bundle / "other.data").write_bytes(bytes(1 << 21))
    rewrite(bundle, change)
    message = refusal(Checkpoint.open, bundle)
    assert message == (
        f"{bundle / 'decoder.onnx'}: model.norm.weight is not as this version writes it; export it again"
    )


def test_a_file_outside_is_refused(bundle: Path) -> None:
    (bundle.parent / "secret").write_bytes(bytes(1 << 21))
    rewrite(bundle, lambda tensor: external(tensor, "location", "../secret"))
    assert "'../secret' lies outside the bundle" in refusal(Checkpoint.open, bundle)


def test_another_shape_is_refused(bundle: Path) -> None:
    rewrite(bundle, lambda tensor: tensor.dims.__setitem__(0, 32))
    assert "tensor model.norm.weight has shape [32]" in refusal(onevision_edge.export, bundle, bundle.parent / "c")


def test_a_quantised_bundle_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["quantization"] = {"plan": {}}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    message = refusal(onevision_edge.export, bundle, bundle.parent / "c")
    assert message.startswith(f"{bundle} is a quantised bundle, whose weights are rounded already: give the checkpoint")


def test_a_damaged_bundle_is_refused(bundle: Path) -> None:
    (bundle / "vision.onnx.data").unlink()
    assert "vision.onnx.data is missing from the bundle" in refusal(Checkpoint.open, bundle)
