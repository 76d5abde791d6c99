"""Graphs in stages give what whole graphs give, in every precision, and show what passes between the stages."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onevision_edge
from onevision_edge.calibration.dataset import SHIPPED_EVALUATION, load_dataset
from onevision_edge.calibration.rows import Row
from onevision_edge.calibration.scored import scored
from onevision_edge.engines.cpu.build import build_cpu
from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.cuts import CutGraph
from onevision_edge.report.parity.probe import model_stages, stage_rank
from onevision_edge.report.parity.sides import BundleSide
from onevision_edge.runtime.cpu_library import Library

Bundles = Callable[[str], Path]


class Seen:
    """A probe that keeps what it is told, and may give a stage something else to read."""

    def __init__(self, instead: dict[str, np.ndarray] | None = None) -> None:
        self.pieces: dict[str, list[np.ndarray]] = {}
        self.read: dict[str, list[np.ndarray]] = {}
        self.instead = instead or {}

    def before(self, stage: str, rows: np.ndarray) -> np.ndarray:
        self.read.setdefault(stage, []).append(rows.copy())
        return self.instead.get(stage, rows)

    def after(self, stage: str, rows: np.ndarray) -> None:
        self.pieces.setdefault(stage, []).append(rows.copy())

    def stream(self, stage: str) -> np.ndarray:
        return np.concatenate(self.pieces[stage])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("staged")

    def made(precision: str) -> Path:
        out = folder / precision
        if not out.exists():
            if precision in ("fp32", "fp16", "bf16"):
                onevision_edge.export("demo", out, dtype=precision)
            else:
                from onevision_edge.calibration.quantize import quantize

                options: dict[str, Any] = {"calibration_samples": 8, "evaluate": False}
                quantize("demo", out, precision=precision, **options)
        return out

    return made


@pytest.fixture(scope="module")
def row(bundles: Bundles) -> Row:
    return load_dataset(SHIPPED_EVALUATION, BundleSide(bundles("fp32")).preparer)[3]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "fp8", "nvfp4"])
def test_stages_together_are_the_whole_graph(bundles: Bundles, row: Row, precision: str) -> None:
    side = BundleSide(bundles(precision), threads=1)
    positions = scored(row, side.config).positions
    seen = Seen()
    side.trace(row, seen, positions)
    config = side.config
    assert sorted(seen.pieces, key=stage_rank) == model_stages(config.vision.depth, config.text.num_hidden_layers)
    whole = side.logits(row, positions)
    limit = 1e-5 if precision == "fp32" else 0.02
    assert np.abs(seen.stream("logits") - whole).max() / np.abs(whole).max() < limit
    assert seen.stream("decoder.layers.0").shape == (len(row.input_ids), config.text.hidden_size)
    assert len(seen.pieces["decoder.layers.0"]) == 1 + len(row.input_ids) - row.answer_start  # a prompt, then tokens
    assert len(seen.stream("vision.blocks.0")) == int(row.image_grid_thw.prod()) + 1


def test_a_stage_reads_what_the_one_before_gave(bundles: Bundles, row: Row) -> None:
    seen = Seen()
    BundleSide(bundles("fp16"), threads=1).trace(row, seen, np.array([5]))
    for stage, before in (("vision.blocks.1", "vision.blocks.0"), ("merger", "vision.blocks.3")):
        np.testing.assert_array_equal(seen.read[stage][0], seen.pieces[before][0])
    for given, read in zip(seen.pieces["decoder.layers.2"], seen.read["decoder.layers.3"], strict=True):
        np.testing.assert_array_equal(given, read)


def test_a_stage_reads_what_a_probe_gives_instead(bundles: Bundles, row: Row) -> None:
    side, plain = BundleSide(bundles("fp32"), threads=1), Seen()
    side.trace(row, plain, np.array([5]))
    rows = plain.pieces["vision.blocks.0"][0]
    changed = Seen({"vision.blocks.1": rows * 2, "vision.blocks.2": plain.pieces["vision.blocks.1"][0]})
    side.trace(row, changed, np.array([5]))
    assert np.abs(changed.pieces["vision.blocks.1"][0] - plain.pieces["vision.blocks.1"][0]).max() > 0.1
    np.testing.assert_array_equal(changed.pieces["vision.blocks.2"][0], plain.pieces["vision.blocks.2"][0])


def test_small_memory_gives_the_same(bundles: Bundles, row: Row) -> None:
    side = BundleSide(bundles("int4"), threads=1, memory=1)
    positions = scored(row, side.config).positions
    small = side.logits(row, positions)
    assert len(side.staged_graph("decoder")._open) == 1  # one stage is loaded at a time
    prompt = side.generate(row, 6)
    large = BundleSide(bundles("int4"), threads=1)
    seen = Seen()
    large.trace(row, seen, positions)
    assert len(large.staged_graph("decoder")._open) == 6
    assert np.abs(small - large.logits(row, positions)).max() < 0.02 * np.abs(small).max()
    assert prompt == large.generate(row, 6)


def test_rounding_to_bf16_moves_every_stage_by_its_step(bundles: Bundles, row: Row) -> None:
    side = BundleSide(bundles("fp32"), threads=1)
    plain, rounded = Seen(), Seen()
    side.trace(row, plain, np.array([5]))
    floor = side.floor()
    assert floor is not None
    floor.trace(row, rounded, np.array([5]))
    for stage in ("patch_embed", "vision.blocks.3", "merger", "decoder.layers.0", "decoder.layers.3", "logits"):
        exact, noisy = plain.stream(stage), rounded.stream(stage)
        relative = np.linalg.norm(noisy - exact) / np.linalg.norm(exact)
        assert 2**-10 < relative < 2**-5
        bits = noisy.view(np.uint32) if stage != "logits" else np.zeros(1, np.uint32)
        assert not (bits & 0xFFFF).any()  # BF16 values, all of them


def test_the_engine_in_stages(bundles: Bundles, row: Row, compiled: Callable[[str], Library], tmp_path: Path) -> None:
    folder = shutil.copytree(bundles("int4"), tmp_path / "b")
    build_cpu(folder)
    side = BundleSide(folder, threads=1)
    assert side.subject.backend == "cpu engine"
    positions = scored(row, side.config).positions
    seen, plain = Seen(), Seen()
    side.trace(row, seen, positions)
    BundleSide(folder, engines=False, threads=1, exact=True).trace(row, plain, positions)
    assert (
        np.abs(seen.stream("logits") - side.logits(row, positions)).max() < 0.05 * np.abs(plain.stream("logits")).max()
    )
    for stage in plain.pieces:
        exact, found = plain.stream(stage), seen.stream(stage)
        assert found.shape == exact.shape
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.06
    doubled = Seen({"decoder.layers.1": seen.pieces["decoder.layers.0"][0] * 2})
    with contextlib.suppress(ValueError):  # the probe's rows are those of the prompt; decoding reads one
        side.trace(row, doubled, positions)
    assert np.abs(doubled.pieces["decoder.layers.1"][0] - seen.pieces["decoder.layers.1"][0]).max() > 0.1


def test_a_bf16_bundle_cannot_be_looked_into_without_its_engine(bundles: Bundles, row: Row) -> None:
    with pytest.raises(OneVisionError, match="no bfloat16 kernels"):
        BundleSide(bundles("bf16")).trace(row, Seen(), np.array([5]))


def test_a_graph_of_another_exporter_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    model = onnx.load(bundles("fp32") / "decoder.onnx", load_external_data=False)
    for i, node in enumerate(model.graph.node):
        node.name = f"node_{i}"
    (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OneVisionError, match="not named and ordered as export writes them"):
        CutGraph(tmp_path / "decoder.onnx", "decoder")
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(OneVisionError, match="is not an ONNX file"):
        CutGraph(tmp_path / "decoder.onnx", "decoder")


def test_modules_of_a_stage(bundles: Bundles) -> None:
    cut = CutGraph(bundles("fp32") / "decoder.onnx", "decoder")
    modules = list(cut.modules(cut.cuts[2]))
    assert modules[0] == "input_layernorm"
    assert modules[-1] == "mlp.down_proj"
    assert {"self_attn.q_proj", "self_attn.q_norm", "self_attn.rotary", "self_attn.o_proj"} <= set(modules)
    assert modules.index("self_attn.rotary") < modules.index("self_attn.o_proj") < modules.index("mlp.gate_proj")
