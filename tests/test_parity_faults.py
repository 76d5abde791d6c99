"""Faults that deployments have had, planted one at a time: each is found, and named at the stage where it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

import onevision_edge
from onevision_edge.report.parity.comparison import Plan, compare, record_reference
from onevision_edge.report.parity.gates import load_gates
from onevision_edge.report.parity.recording import Recording
from onevision_edge.report.parity.sides import BundleSide
from onevision_edge.runtime import images
from onevision_edge.runtime.cache import Decoder

pytest.importorskip("onnx")

SHIPPED = Path(onevision_edge.__file__).parent / "demo" / "checkpoint"
PLAN = Plan(samples=6, walked=2, max_tokens=12, examples=0)
Compared = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity") / "fp32"
    onevision_edge.export("demo", out, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def reference(fp32: Path) -> BundleSide:
    return BundleSide(fp32, threads=1)


@pytest.fixture(scope="module")
def recording(reference: BundleSide, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record_reference(reference, PLAN, tmp_path_factory.mktemp("recording"))


@pytest.fixture
def compared(reference: BundleSide, recording: Recording) -> Compared:
    def compared_with(bundle: Path) -> dict[str, Any]:
        return compare(BundleSide(bundle, threads=1), recording, PLAN, load_gates(), reference=reference)

    return compared_with


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(SHIPPED, tmp_path / "checkpoint")


def exported(checkpoint: Path) -> Path:
    onevision_edge.export(checkpoint, checkpoint.parent / "bundle", dtype="fp32")
    return checkpoint.parent / "bundle"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def stage(candidate: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in candidate["stages"] if one["stage"] == name]
    return found


def test_without_a_fault_every_stage_passes_with_zeros(compared: Compared, fp32: Path) -> None:
    found = compared(fp32)
    assert (found["verdict"], found["first_failed_stage"]) == ("PASS", None)
    for one in found["stages"][:-1]:
        for error in (one["error"], one["own"]):
            assert error is None or (error["max_abs"], error["cosine"], error["snr_db"]) == (0, 1, None)
        assert one["noise"] is None or one["noise"]["relative_l2"] > 1e-3 or one["stage"] == "preprocess"
    assert found["metrics"]["kld"]["value"] == 0


def test_a_transposed_weight(compared: Compared, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith("visual.blocks.2.attn.proj.weight")]
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, checkpoint / "model.safetensors")
    found = compared(exported(checkpoint))
    assert (found["verdict"], found["first_failed_stage"]) == ("FAIL", "vision.blocks.2")
    assert found["failed_module"]["module"] == "attn.proj"
    assert stage(found, "vision.blocks.1")["error"]["max_abs"] == 0
    assert stage(found, "vision.blocks.3")["own"]["max_abs"] == 0  # by itself it is right


def test_a_wrong_base_of_rotary_angles(compared: Compared, checkpoint: Path) -> None:
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit(checkpoint / "config.json", text_config=text | {"rope_theta": text["rope_theta"] / 10})
    found = compared(exported(checkpoint))
    assert found["first_failed_stage"] == "decoder.layers.0"
    assert found["failed_module"]["module"] == "self_attn.rotary"
    assert stage(found, "stitched_embeddings")["error"]["max_abs"] == 0


def test_mean_and_deviation_exchanged(compared: Compared, checkpoint: Path) -> None:
    path = checkpoint / "preprocessor_config.json"
    config = json.loads(path.read_text())
    edit(path, image_mean=config["image_std"], image_std=config["image_mean"])
    found = compared(exported(checkpoint))
    assert (found["verdict"], found["first_failed_stage"]) == ("FAIL", "preprocess")
    assert stage(found, "vision.blocks.0")["own"]["max_abs"] == 0


def test_patches_in_row_order(compared: Compared, fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = images.ImageProcessor._patches

    def in_row_order(self: images.ImageProcessor, source: Any, where: str) -> np.ndarray:
        patches = right(self, source, where)
        (rows, columns), merge = patches.shape[:2], self.merge_size
        units = patches.reshape(rows // merge, columns // merge, merge, merge, *patches.shape[2:])
        return units.swapaxes(1, 2).reshape(patches.shape)

    monkeypatch.setattr(images.ImageProcessor, "_patches", in_row_order)
    found = compared(fp32)
    assert found["first_failed_stage"] == "preprocess"
    assert stage(found, "patch_embed")["own"]["max_abs"] == 0


def test_another_resize_filter(compared: Compared, checkpoint: Path) -> None:
    edit(checkpoint / "preprocessor_config.json", resample=2)
    found = compared(exported(checkpoint))
    assert found["first_failed_stage"] == "preprocess"
    assert 1e-3 < stage(found, "preprocess")["error"]["relative_l2"] < 0.1


def test_a_scale_off_by_two(
    compared: Compared, tmp_path: Path, recording: Recording, reference: BundleSide, int8: Path
) -> None:
    broken = shutil.copytree(int8, tmp_path / "int8")
    scale = "model.layers.1.mlp.up_proj.weight_scale"
    graph = onnx.load(broken / "decoder.onnx", load_external_data=False).graph
    (tensor,) = [one for one in graph.initializer if one.name == scale]
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(broken / "decoder.onnx.data", np.float16, "r+", int(place["offset"]), int(place["length"]) // 2)
    data[:] *= 2
    data.flush()
    assert compared(int8)["first_failed_stage"] is None
    found = compared(broken)
    assert found["first_failed_stage"] == "decoder.layers.1"
    assert found["failed_module"]["module"] == "mlp.down_proj"  # up_proj's output may be under another scale
    assert stage(found, "decoder.layers.2")["own"]["relative_l2"] < 0.05


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onevision_edge.calibration.quantize import quantize

    out = tmp_path_factory.mktemp("parity") / "int8"
    quantize("demo", out, precision="int8", calibration_samples=16, evaluate=False)
    return out


def test_positions_off_by_one_after_an_image(
    compared: Compared, fp32: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = recording.config.image_token_id
    behind = {len(recording.ids(i)): int(np.flatnonzero(recording.ids(i) == image)[-1]) + 1 for i in recording.walked}
    assert len(behind) == len(recording.walked)  # told apart by their lengths, which decoding reaches
    lengths = sorted(behind)
    right = Decoder.__call__

    def shifted(self: Decoder, embeds: Any, starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        binding, given = self._binding, self._binding.input
        end = int(starts[0]) + embeds.shape[1]
        first = behind[next(length for length in lengths if length + 2 > end)]

        def bind(name: str, array: np.ndarray) -> None:
            given(name, np.where(array >= first, array + 1, array) if name == "position_ids" else array)

        monkeypatch.setattr(binding, "input", bind)
        try:
            return right(self, embeds, starts, rows)
        finally:
            monkeypatch.setattr(binding, "input", given)

    monkeypatch.setattr(Decoder, "__call__", shifted)
    found = compared(fp32)
    assert found["first_failed_stage"] == "decoder.layers.0"
    assert stage(found, "decoder.layers.0")["worst"]["position"] >= min(behind.values())
    assert stage(found, "stitched_embeddings")["verdict"] == "PASS"


def test_a_row_of_the_cache_overwritten(compared: Compared, fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Decoder.__call__

    def overwriting(self: Decoder, embeds: Any, starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if embeds.shape[1] == 1:  # decoding: the row of the token before takes the next one's place in one layer
            key, value = self.cache.layers[2]
            for cache in (key, value):
                cache[:, :, int(starts[0]) - 1] = cache[:, :, 0]
        return right(self, embeds, starts, rows)

    monkeypatch.setattr(Decoder, "__call__", overwriting)
    found = compared(fp32)
    assert found["first_failed_stage"] == "decoder.layers.2"
    assert stage(found, "decoder.layers.2")["worst"]["phase"] == "decode"
    assert stage(found, "decoder.layers.1")["error"]["max_abs"] == 0
