"""NVFP4 where there is no FP4: the twin graph's numbers are the same, and stored once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

import onevision_edge
from onevision_edge.bundle import Bundle, PackedWeight
from onevision_edge.calibration.recipe import Methods
from onevision_edge.export.wide import wide_plan
from onevision_edge.precision import FP16, FP32, FloatFormat
from onevision_edge.precision.plan import Plan, Rule, default_plan
from onevision_edge.runtime.wide import widened

PLAN = Plan(
    "nvfp4",
    "fp32",
    "float",
    (Rule("*", "*", "nvfp4"), Rule("vision", "visual.patch_embed.proj", "float"), Rule("*", "*.v_proj", "int8-weight")),
)


def packed(codes: np.ndarray) -> bytes:
    bits = codes.reshape(-1).view(np.uint8) & 15
    return (bits[0::2] | bits[1::2] << 4).tobytes()


def read(data: Path, weight: PackedWeight, fmt: FloatFormat) -> dict[str, np.ndarray]:
    """Codes and scales, copied while the values that hold their memory are there."""
    values = widened(data, weight, fmt)
    return {name: value.numpy().copy() for name, value in values.items()}


@pytest.mark.parametrize("fmt", [FP32, FP16], ids=lambda fmt: fmt.name)
def test_every_code_and_every_scale(tmp_path: Path, fmt: FloatFormat) -> None:
    """All sixteen numbers of FP4 under all 254 of FP8 that are numbers."""
    values = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, -0.0, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    codes = np.tile(values[:, None], (1, 254)).astype(ml_dtypes.float4_e2m1fn)
    bits = np.arange(256, dtype=np.uint8)
    scales = bits[bits & 127 != 127].view(ml_dtypes.float8_e4m3fn)[None]
    (tmp_path / "data").write_bytes(bytes(64) + packed(codes) + bytes(64) + scales.tobytes())
    weight = PackedWeight("w", (16, 254), 16, 64, 128 + 16 * 127, tensor_scale=0.375)
    found = read(tmp_path / "data", weight, fmt)
    assert found.keys() == {"w", "w_scale"}
    assert (found["w"].dtype, found["w_scale"].dtype) == (np.int8, fmt.numpy)
    np.testing.assert_array_equal(found["w"], np.tile((2 * values)[:, None], (1, 254)))
    worth = (scales.astype(np.float32) * np.float32(0.375)).astype(fmt.numpy)
    product = found["w"].astype(np.float32) * found["w_scale"].astype(np.float32)
    large = np.abs(worth[0]) >= 2.0**-13  # halving a smaller one may round in FP16
    assert large.sum() > 200
    np.testing.assert_array_equal(product[:, large], (values[:, None] * worth.astype(np.float32))[:, large])


@pytest.fixture(scope="module")
def bundle(golden_checkpoint: Path, golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("nvfp4")
    np.savez(root / "row.npz", **golden("a_single_image").inputs)
    options: dict[str, Any] = {"calibration": root / "row.npz", "evaluate": False, "max_length": 128, "threads": 1}
    methods = Methods(samples=16, awq=False)
    return onevision_edge.quantize(golden_checkpoint, root / "b", plan=PLAN, methods=methods, **options)


def initializers(path: Path) -> dict[str, TensorProto]:
    return {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}


def place(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize(("part", "count"), [("vision", 14), ("decoder", 19)])
def test_the_twin_shares_the_data(bundle: Bundle, part: str, count: int) -> None:
    spec = bundle.manifest.graphs[part]
    assert spec.wide is not None
    assert spec.wide.file == f"{part}.int8.onnx"
    graph, twin = initializers(bundle.path(spec.file)), initializers(bundle.path(spec.wide.file))
    codes = {name for name, tensor in graph.items() if tensor.data_type == TensorProto.FLOAT4E2M1}
    assert {weight.name for weight in spec.wide.weights} == codes
    assert len(codes) == count
    assert all(twin[name].data_type == TensorProto.INT8 for name in codes)
    kinds = {tensor.data_type for tensor in twin.values()}
    assert not kinds & {TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN}
    for name, tensor in twin.items():
        if tensor.external_data and name not in codes and name.removesuffix("_scale") not in codes:
            assert place(tensor) == place(graph[name]), name
    assert f"{part}.int8.onnx.data" not in bundle.manifest.files
    assert sum(size for size in spec.weights.values()) <= bundle.manifest.files[f"{part}.onnx.data"].size


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_the_numbers_are_those_of_the_fp4_graph(bundle: Bundle, part: str) -> None:
    """As onnx reads them from the file, block by block."""
    spec = bundle.manifest.graphs[part]
    assert spec.wide is not None
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(bundle.path(spec.file)).graph.initializer}
    for weight in spec.wide.weights:
        found = read(bundle.path(f"{spec.file}.data"), weight, FP32)
        scale = tensors[f"{weight.name}_scale"].astype(np.float32) * tensors[f"{weight.name}_scale_2"]
        wanted = tensors[weight.name].astype(np.float32) * np.repeat(scale, 16, axis=0)
        np.testing.assert_array_equal(
            found[weight.name] * np.repeat(found[f"{weight.name}_scale"], 16, axis=0), wanted, err_msg=weight.name
        )


def test_it_is_what_is_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    session = ort.InferenceSession

    def noting(path: str, *arguments: Any, **options: Any) -> Any:
        loaded.append(Path(path).name)
        return session(path, *arguments, **options)

    monkeypatch.setattr("onnxruntime.InferenceSession", noting)
    model = onevision_edge.load(bundle.directory, threads=1)
    assert sorted(loaded) == ["decoder.int8.onnx", "vision.int8.onnx"]
    assert np.isfinite(model.logits(np.arange(20)[None])).all()


def test_graphs_without_fp4_have_no_twin(golden_bundle: Callable[[str], Path]) -> None:
    assert all(spec.wide is None for spec in Bundle.open(golden_bundle("fp32")).manifest.graphs.values())


def test_the_twin_s_plan_changes_nvfp4_alone() -> None:
    plan = default_plan("nvfp4", vision="int4", lm_head="nvfp4")
    found = wide_plan(plan)
    assert [rule.precision for rule in found.rules] == ["float", "int8-block16", "int8-block16", "int4", "float"]
    assert [rule.modules for rule in found.rules] == [rule.modules for rule in plan.rules]
