"""A bundle as a subject: exact lengths, real stages, and the ids that the runtime gives."""

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import onevision_edge
from onevision_edge.engines.cpu.build import build_cpu
from onevision_edge.errors import OneVisionError
from onevision_edge.report.latency.bundle import BundleRunner
from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.metrics import DECODE, STAGES
from onevision_edge.runtime.cpu_library import Library
from onevision_edge.runtime.generation import Timings
from onevision_edge.runtime.model import Model

IMAGE = (84, 56)  # 3 x 2 tokens


@pytest.fixture(scope="module")
def runner(golden_bundle: Callable[[str], Path]) -> BundleRunner:
    return BundleRunner(str(golden_bundle("fp32")), "golden", 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_request_has_the_lengths_of_its_cell(runner: BundleRunner, batch: int) -> None:
    found = runner.request(Cell(IMAGE, 5, 7, batch), 0)
    assert [len(times) for times in found.tokens] == [7] * batch
    assert found.input_tokens == 6 + 5
    assert set(found.stages) == set(STAGES)
    assert all(seconds > 0 for seconds in found.stages.values())
    for times in found.tokens:
        assert times == sorted(times)
        assert sum(v for k, v in found.stages.items() if k != DECODE) / batch <= times[-1]
    assert sum(found.stages.values()) <= found.seconds


def test_text_alone_has_no_stages_of_images(runner: BundleRunner) -> None:
    assert set(runner.request(Cell(None, 5, 2), 0).stages) == {"prepare_embeddings", "prefill", "decode"}


def test_times_are_read_from_the_clock(runner: BundleRunner) -> None:
    """One reading at the start, two around preprocessing's end, one for each step."""
    clock = map(float, count())
    found = runner.request(Cell(IMAGE, 5, 3), 0, lambda: next(clock))
    assert found.started == 0
    assert found.stages["preprocess"] == 1
    assert found.tokens == [[2, 3, 4]]


def test_requests_of_one_seed_are_the_same(runner: BundleRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    stream = runner.model.stream_ids

    def spy(ids: np.ndarray, pixels: np.ndarray, *rest: object, **options: object) -> object:
        seen.append((ids, pixels))
        return stream(ids, pixels, *rest, **options)

    monkeypatch.setattr(runner.model, "stream_ids", spy)
    for seed in (1, 1, 2):
        runner.request(Cell(IMAGE, 5, 1), seed)
    (ids, pixels), (same_ids, same_pixels), (other_ids, other_pixels) = seen
    np.testing.assert_array_equal(ids, same_ids)
    np.testing.assert_array_equal(pixels, same_pixels)
    assert (ids != other_ids).any()
    assert (pixels != other_pixels).any()
    assert (ids == runner.model.config.image_token_id).sum() == 6


def test_nothing_is_remembered(runner: BundleRunner) -> None:
    """A second request of the same seed does all the work again."""
    cell = Cell(IMAGE, 64, 1)
    runner.request(cell, 3)
    assert runner.model._images.budget == 0
    assert [len(keys) for held in runner.model._idle._held for keys in held.keys] == [0]
    again = runner.request(cell, 3)
    assert again.stages["vision_encoding"] > 0


def test_the_subject_is_described(runner: BundleRunner) -> None:
    found = runner.subject([Cell(IMAGE, 5, 1), Cell((83, 57), 5, 1), Cell((83, 57), 6, 1), Cell(None, 5, 1)])
    assert (found["name"], found["kind"], found["backend"]) == ("golden", "bundle", "onnxruntime")
    assert found["notes"] == ["images of 83x57 are resized to 84x56"]


def test_what_does_not_fit_is_refused_with_its_numbers(runner: BundleRunner) -> None:
    runner._ids(Cell(IMAGE, 200, 51), 0)  # 6 + 200 + 51 - 1 = 256
    with pytest.raises(OneVisionError, match="257 tokens, and golden holds 256"):
        runner.request(Cell(IMAGE, 200, 52), 0)


def test_a_tower_alone_is_refused(golden_checkpoint: Path, tmp_path: Path) -> None:
    onevision_edge.export(golden_checkpoint, tmp_path / "b", dtype="fp32", parts=["vision"])
    with pytest.raises(OneVisionError, match="has no decoder"):
        BundleRunner(str(tmp_path / "b"), "tower")


def test_images_need_a_tower(golden_checkpoint: Path, tmp_path: Path) -> None:
    onevision_edge.export(golden_checkpoint, tmp_path / "b", dtype="fp32", parts=["decoder"], max_length=64)
    runner = BundleRunner(str(tmp_path / "b"), "text", 1)
    assert len(runner.request(Cell(None, 5, 2), 0).tokens[0]) == 2
    with pytest.raises(OneVisionError, match="vision"):
        runner.request(Cell(IMAGE, 5, 2), 0)


def test_the_cpu_engine_is_named(
    compiled: Callable[[str], Library], golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(golden_bundle("fp32"), tmp_path / "b")
    build_cpu(path)
    runner = BundleRunner(str(path), "engine", 1)
    assert runner.backend == "cpu engine"
    assert len(runner.request(Cell(IMAGE, 5, 3), 0).tokens[0]) == 3
    assert BundleRunner(str(path), "plain", 1, False).backend == "onnxruntime"


def test_streamed_ids_are_those_of_generate_ids(golden_model: Model) -> None:
    ids = np.array([[1, 2, 3, 4], [9, 8, 7, 6]])
    whole = golden_model.generate_ids(ids, max_tokens=5, eos_token_id=[])
    timings, rows = Timings(), [[], []]
    for new in golden_model.stream_ids(ids, timings=timings, max_tokens=5, ignore_eos=True):
        for row, token in new.items():
            rows[row].append(token)
    np.testing.assert_array_equal(rows, whole)
    assert timings.prefill > 0
    assert timings.decode > 0
    assert timings.prepare_embeddings > 0


def test_streamed_ids_end_with_the_end_token(golden_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([[1, 2, 3, 4]])
    second = int(golden_model.generate_ids(ids, max_tokens=2, eos_token_id=[])[0, 1])
    first = int(golden_model.generate_ids(ids, max_tokens=1, eos_token_id=[])[0, 0])
    monkeypatch.setattr(golden_model, "eos_token_ids", (second,))
    if first == second:
        pytest.skip("the first token would end it already")
    assert [*golden_model.stream_ids(ids, max_tokens=5)] == [{0: first}, {}]
