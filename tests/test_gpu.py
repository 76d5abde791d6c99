"""What only a GPU can show: engines built here run here, answer as ONNX Runtime does, and faster.

    pytest -m gpu

Without a GPU, or without PyCUDA and TensorRT, every test is skipped with its reason.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.engines.builder import build, plan_build
from onevision_edge.engines.gpu import compute_capability
from onevision_edge.precision.plan import default_plan
from onevision_edge.runtime.device import DeviceArray, Staging

DEMO = Path(onevision_edge.__file__).parent / "demo"
QUESTIONS = json.loads((DEMO / "images" / "questions.json").read_text())
CAPABILITY = compute_capability()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CAPABILITY is None, reason="there is no GPU here")]


@pytest.fixture(scope="module")
def driver() -> Any:
    pytest.importorskip("pycuda.driver", reason="PyCUDA is not installed: pip install 'onevision-edge[rtx]'")
    from onevision_edge.runtime.cuda import CudaDriver

    return CudaDriver()


def messages(entry: dict[str, Any]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": str(DEMO / "images" / name)} for name in entry["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": entry["prompt"]}]}]


def test_memory_goes_there_and_back(driver: Any) -> None:
    values = np.arange(3000, dtype=np.float32).reshape(3, 1000)
    staging = Staging(driver)
    array = DeviceArray.zeros(driver, (5, 1000), np.dtype(np.float32))
    driver.copy(array[1:4].pointer, staging.upload(values), values.nbytes)
    np.testing.assert_array_equal(np.asarray(array), np.pad(values, ((1, 1), (0, 0))))


def test_a_captured_graph_does_the_same_again(driver: Any) -> None:
    source = DeviceArray.zeros(driver, (1000,), np.dtype(np.int32))
    target = DeviceArray.zeros(driver, (1000,), np.dtype(np.int32))
    staging = Staging(driver)
    replay = driver.capture(lambda: driver.copy(target.pointer, source.pointer, source.nbytes))
    if replay is None:
        pytest.skip("cuda-bindings is not installed: pip install 'onevision-edge[tensorrt]'")
    driver.copy(source.pointer, staging.upload(np.arange(1000, dtype=np.int32)), 4000)
    replay()
    np.testing.assert_array_equal(np.asarray(target), np.arange(1000))


@pytest.mark.parametrize("precision", ["float", "int8", "int4", "fp8", "nvfp4"])
@pytest.mark.parametrize("engine", ["tensorrt-rtx", "tensorrt"])
def test_engines_answer_as_onnx_runtime_does(driver: Any, engine: str, precision: str, tmp_path: Path) -> None:
    try:
        plan = default_plan(precision, "fp16", kv_cache="float" if precision == "float" else "int8")
        onevision_edge.quantize("demo", tmp_path / "bundle", plan=plan, calibration_samples=32, evaluate=False)
        build(plan_build(tmp_path / "bundle", [str(CAPABILITY)], engine=engine, max_batch=2))
    except onevision_edge.OneVisionError as error:
        pytest.skip(str(error))  # a precision that this GPU lacks, or a library that is not installed
    ours, theirs = (onevision_edge.load(tmp_path / "bundle", engines=True), onevision_edge.load(tmp_path / "bundle"))
    for entry in QUESTIONS:
        found, wanted = (model.generate(messages(entry), max_tokens=64) for model in (ours, theirs))
        assert found.text == wanted.text
    together = ours.generate([messages(entry) for entry in QUESTIONS[:2]], max_tokens=64)
    assert [answer.text for answer in together] == [entry["answer"] for entry in QUESTIONS[:2]]
