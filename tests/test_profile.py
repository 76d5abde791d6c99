"""Profiles: modules read from the names that backends give, sums that agree, and real ones of the golden model."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onevision_edge.engines.cpu.build import build_cpu
from onevision_edge.errors import OneVisionError
from onevision_edge.report.latency.bundle import BundleRunner
from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.profile import summary
from onevision_edge.report.latency.profile_names import node_module, node_modules, node_operation
from onevision_edge.report.latency.profile_sources import (
    Timed,
    layer_profiler,
    layer_time,
    node_times,
    timed_operations,
)
from onevision_edge.runtime.cpu_library import Library
from onevision_edge.runtime.engine_graph import EngineGraph

CELL = Cell((84, 56), 5, 4)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model/layers.1/self_attn/q_proj/MatMul_node_51", "model.layers.1.self_attn.q_proj"),
        ("model/layers.0/self_attn/MatMul_node_31/MatmulTransposeFusion/", "model.layers.0.self_attn"),
        ("model/layers.0/mlp/Mul_node_45/QuickGeluFusion/", "model.layers.0.mlp"),
        ("visual/blocks.3/norm1/LayerNormalization_node_16", "visual.blocks.3.norm1"),
        ("lm_head/MatMul_node_190", "lm_head"),
        ("InsertedPrecisionFreeCast_v_model.layers.0.self_attn.k_proj.MatMul_13", "model.layers.0.self_attn.k_proj"),
        ("InsertedPrecisionFreeCast_model.layers.3.mlp.gate_proj.input_scale", "model.layers.3.mlp.gate_proj"),
        ("InsertedPrecisionFreeCast_inputs_embeds", None),
        ("BiasGelu", None),
        ("Mul_147", None),
    ],
)
def test_modules_are_read_from_names(name: str, module: str | None) -> None:
    assert node_module(name) == module


def test_nameless_nodes_belong_to_the_one_before() -> None:
    names = ["Cast_1", "visual/blocks.0/mlp/fc1/MatMul_node_43", "BiasGelu", "visual/blocks.0/mlp/fc2/MatMul_node_46"]
    expected = ["visual", "visual.blocks.0.mlp.fc1", "visual.blocks.0.mlp.fc1", "visual.blocks.0.mlp.fc2"]
    assert node_modules(names, "visual") == expected


def test_operators_are_read_from_names() -> None:
    assert node_operation("model/layers.0/self_attn/RotaryEmbedding_node_21") == "RotaryEmbedding"
    assert node_operation("BiasGelu") is None


def test_events_become_times_in_the_order_in_which_they_ran() -> None:
    def event(name: str, ts: int, dur: int, category: str = "Node") -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": ts, "dur": dur, "args": {"op_name": name[:4]}}

    events = [
        event("model_run", 1, 99, "Session"),
        event("Late_kernel_time", 9, 5),
        event("model/norm/RMS_node_1_kernel_time", 2, 3),
        event("lm_head/MatMul_node_2_fence_before", 4, 7),
        event("lm_head/MatMul_node_2_kernel_time", 5, 7),
    ]
    assert node_times(events, "model") == [
        Timed("model.norm", "mode", 3e-6),
        Timed("lm_head", "lm_h", 7e-6),
        Timed("lm_head", "Late", 5e-6),
    ]


def test_sums_by_hand() -> None:
    found = summary(
        "onnxruntime",
        [
            Timed("model.layers.0.mlp", "Mul", 1.0, 2),
            Timed("model.layers.11.mlp", "Mul", 2.0, 2),
            Timed("model.layers.0", "Add", 4.0),
            Timed("visual.merger.mlp.0", "MatMul", 8.0),
        ],
    )
    assert found["seconds"] == 15
    assert found["operations"] == [
        {"operation": "MatMul", "seconds": 8.0, "calls": 1},
        {"operation": "Add", "seconds": 4.0, "calls": 1},
        {"operation": "Mul", "seconds": 3.0, "calls": 4},
    ]
    assert {m["module"]: m["seconds"] for m in found["modules"]} == {
        "visual.merger.mlp.0": 8.0,
        "model.layers.*": 4.0,
        "model.layers.*.mlp": 3.0,
    }
    model, visual = found["tree"]["children"]
    assert (found["tree"]["seconds"], model["seconds"], visual["seconds"]) == (15, 7, 8)
    assert [(n["name"], n["seconds"]) for n in model["children"][0]["children"]] == [("0", 5), ("11", 2)]


def check_sums(found: dict[str, Any]) -> None:
    """Tree, modules and operations are of the same seconds."""

    def leaves(node: dict[str, Any]) -> float:
        own = node["seconds"] - sum(child["seconds"] for child in node["children"])
        assert own >= -1e-9
        return own + sum(map(leaves, node["children"]))

    total = found["seconds"]
    assert total > 0
    assert leaves(found["tree"]) == pytest.approx(total)
    for kind in ("operations", "modules"):
        assert sum(one["seconds"] for one in found[kind]) == pytest.approx(total)


def modules(found: dict[str, Any]) -> dict[str, int]:
    """Calls by module."""
    return {one["module"]: one["calls"] for one in found["modules"]}


def test_onnx_runtime_tells_of_every_module(golden_bundle: Callable[[str], Path]) -> None:
    found = BundleRunner(str(golden_bundle("fp32")), "golden", 1).profile(CELL, 0)
    check_sums(found)
    assert found["source"] == "onnxruntime"
    calls = modules(found)
    steps, layers = 4, 3
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert calls[f"model.layers.*.self_attn.{name}"] == steps * layers  # one product each, warm-up left out
    assert calls["model.layers.*.mlp.down_proj"] == steps * layers
    assert {"visual.patch_embed.proj", "visual.blocks.*.attn.qkv", "visual.merger.mlp.0", "lm_head"} <= set(calls)
    assert {"MatMul", "RMSNormalization"} <= {one["operation"] for one in found["operations"]}


def test_the_cpu_engine_tells_of_every_step(
    compiled: Callable[[str], Library], golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(golden_bundle("fp32"), tmp_path / "b")
    build_cpu(path)
    runner = BundleRunner(str(path), "engine", 1)
    found = runner.profile(CELL, 0)
    check_sums(found)
    assert found["source"] == "cpu engine"
    calls = modules(found)
    steps, layers, blocks = 4, 3, runner.model.config.vision.depth
    assert calls["model.layers.*.self_attn.qkv_proj"] == steps * layers
    assert calls["model.layers.*.mlp.gate_up_proj"] == steps * layers
    assert calls["model.layers.*.mlp.down_proj"] == 2 * steps * layers  # its rows, and the product
    assert calls["model.layers.*.input_layernorm"] == steps * layers
    assert calls["lm_head"] == steps
    assert calls["visual.blocks.*.attn"] == 2 * blocks  # rotary embedding, and attention
    assert calls["visual.blocks.*.mlp.fc1"] == blocks
    assert {"visual.pre_layernorm", "visual.merger.ln_q", "visual.merger.mlp.0", "visual.merger.mlp.2"} <= set(calls)


def test_steps_are_timed_in_all_later_calls(
    compiled: Callable[[str], Library], golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(golden_bundle("fp32"), tmp_path / "b")
    build_cpu(path)
    runner = BundleRunner(str(path), "engine", 1)
    graph: Any = runner.model.graphs["decoder"]
    times = graph.timed()
    assert (times.calls, np.sum(times.seconds)) == (0, 0)
    runner.request(Cell(None, 5, 3), 0)
    first = float(np.sum(times.seconds))
    assert (times.calls, first > 0) == (3, True)
    runner.request(Cell(None, 5, 3), 0)
    assert times.calls == 6
    assert np.sum(times.seconds) > first


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that has what TensorRT's has: a profiler to derive from, contexts that call it."""
    found: Any = ModuleType("fake_tensorrt")

    class Context:
        profiler: Any = None

        def run(self) -> None:
            self.profiler.report_layer_time("model/layers.0/mlp/down_proj/MatMul_node_48 + Add_node_49", 2.5)
            self.profiler.report_layer_time("__myl_Fused_3", 0.5)

    found.IProfiler = type("IProfiler", (), {})
    found.Context = Context
    Context.__module__ = "fake_tensorrt"
    monkeypatch.setitem(sys.modules, "fake_tensorrt", found)
    return found


def test_tensorrt_reports_its_layers(library: Any) -> None:
    context = library.Context()
    layers = layer_profiler(context)
    context.run()
    assert isinstance(layers, library.IProfiler)
    assert [layer_time(name, seconds, "model") for name, seconds in layers.times] == [
        Timed("model.layers.0.mlp.down_proj", "MatMul", 0.0025),
        Timed("model", "merged", 0.0005),
    ]


def test_tensorrt_is_timed_without_cuda_graphs(library: Any) -> None:
    """Twice, of which the second counts; a replayed graph would report nothing."""
    graph = object.__new__(EngineGraph)
    graph.context, graph.cuda_graphs = library.Context(), True
    model: Any = SimpleNamespace(graphs={"decoder": graph})
    seen: list[bool] = []

    def run(_: Any) -> None:
        seen.append(graph.cuda_graphs)
        if graph.context.profiler is not None:
            graph.context.run()

    found = timed_operations(model, "tensorrt", None, run)
    assert [(one.module, one.seconds) for one in found] == [("model.layers.0.mlp.down_proj", 0.0025), ("model", 0.0005)]
    assert seen == [False, False]
    assert graph.cuda_graphs


def test_an_engine_without_a_profiler_says_so(library: Any) -> None:
    del library.IProfiler
    with pytest.raises(OneVisionError, match="no access to the times of their layers"):
        layer_profiler(library.Context())
