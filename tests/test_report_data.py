"""Data of reports: shipped, synthetic, the user's own and lmms-eval's, with the answers that are accepted."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import onevision_edge
from onevision_edge.calibration.dataset import SHIPPED_EVALUATION, Preparer, load_dataset
from onevision_edge.config import ModelConfig
from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.data import open_data
from onevision_edge.report.parity.question import data_url
from onevision_edge.report.parity.synthetic import ordinary_ids, synthetic_rows
from onevision_edge.runtime.vision import media_tokens

DEMO = Path(onevision_edge.__file__).parent / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def demo() -> Preparer:
    return Preparer.from_directory(DEMO, ModelConfig.from_checkpoint(DEMO))


@pytest.fixture(scope="module")
def golden_preparer(golden_checkpoint: Path) -> Preparer:
    """Without a tokenizer."""
    return Preparer.from_directory(golden_checkpoint, ModelConfig.from_checkpoint(golden_checkpoint))


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """A .jsonl file of rows, beside an image."""
    Image.new("RGB", (56, 84), "red").save(tmp_path / "red.png")

    def written(*rows: Any, name: str = "rows.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        return tmp_path / name

    return written


def test_the_shipped_set_with_answers_prompts_and_images(demo: Preparer) -> None:
    found = open_data(None, demo)
    assert (len(found), found.source) == (359, "shipped evaluation set")
    first = found.questions[0]
    assert (first.prompt, first.answers) == ("How many digits are there?", ("3",))
    assert [Path(image).name for image in first.images] == ["000a.png"]
    assert found.digest() == load_dataset(SHIPPED_EVALUATION, demo).digest()


def test_samples_keep_questions_beside_rows(demo: Preparer) -> None:
    found = open_data(None, demo, seed=3, samples=7)
    whole = load_dataset(SHIPPED_EVALUATION, demo).sample(7, 3)
    assert [question.name for question in found.questions] == [row.name for row in whole] == [row.name for row in found]
    part = found.subset([1, 4])
    assert [question.name for question in part.questions] == [found[1].name, found[4].name]


def test_without_a_tokenizer_rows_are_synthetic(golden_preparer: Preparer) -> None:
    found = open_data(None, golden_preparer, seed=5)
    assert (len(found), found.source) == (12, "synthetic rows, seed 5")
    assert found.digest() == open_data("synthetic:12", golden_preparer, seed=5).digest()
    assert found.digest() != open_data("synthetic", golden_preparer, seed=6).digest()
    assert [row.name for row in open_data("synthetic:30", golden_preparer, samples=30)][29] == "synthetic:29 (text)"


def test_a_synthetic_row_does_not_depend_on_how_many_there_are(golden_preparer: Preparer) -> None:
    few, many = open_data("synthetic:2", golden_preparer), open_data("synthetic:9", golden_preparer)
    for a, b in zip(few, many, strict=False):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.pixel_values, b.pixel_values)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["demo", "golden_preparer"])
def test_synthetic_rows_are_what_the_model_takes(which: str, request: pytest.FixtureRequest) -> None:
    preparer: Preparer = request.getfixturevalue(which)
    config, images = preparer.config, set()
    for row in open_data("synthetic:30", preparer):
        grid = np.empty((0, 3), np.int64) if row.image_grid_thw is None else row.image_grid_thw
        images.add(len(grid))
        places = row.input_ids == config.image_token_id
        assert places.sum() == media_tokens(grid, config.vision).sum()
        assert not (grid[:, 1:] % config.vision.spatial_merge_size).any()
        assert set(row.input_ids[~places]) <= set(ordinary_ids(preparer).tolist())
        assert row.answer_start == len(row.input_ids) < 200
        if len(grid):
            assert row.pixel_values is not None
            assert row.pixel_values.dtype == np.float32
            assert abs(row.pixel_values.mean()) < 0.05
            assert row.pixel_values.std() == pytest.approx(1, abs=0.05)
    assert images == {0, 1, 2, 3}


def test_a_golden_bundle_runs_them(golden_model: onevision_edge.Model, golden_preparer: Preparer) -> None:
    for row in open_data("synthetic:3", golden_preparer):
        logits = golden_model.logits_at(
            np.array([len(row.input_ids) - 1]), row.input_ids, row.pixel_values, row.image_grid_thw
        )
        assert np.isfinite(logits).all()


def test_ordinary_ids_are_no_special_ones(demo: Preparer, golden_preparer: Preparer) -> None:
    assert demo.tokenizer is not None
    ids = ordinary_ids(demo)
    assert ids.max() < min(demo.tokenizer.special_ids)
    assert len(ids) >= demo.config.text.vocab_size / 2
    config = golden_preparer.config
    assert not {config.image_token_id, config.video_token_id, *config.eos_token_ids} & set(
        ordinary_ids(golden_preparer).tolist()
    )


@pytest.mark.parametrize("source", ["synthetic:0", "synthetic:x", "synthetic:-1"])
def test_how_many_synthetic_rows_must_be_a_number(source: str, golden_preparer: Preparer) -> None:
    with pytest.raises(OneVisionError, match="give synthetic:N"):
        open_data(source, golden_preparer)


def test_several_accepted_answers_and_options(demo: Preparer, lines: Callable[..., Path]) -> None:
    path = lines(
        {"image": "red.png", "prompt": "Colour?", "answer": "red", "answers": ["crimson", "scarlet"]},
        {"image": "red.png", "prompt": "Colour?", "answers": ["crimson", "red"], "options": ["blue", "crimson"]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "answers": "yo"},
        {"prompt": "No answer?"},
    )
    found = open_data(path, demo)
    assert [q.answers for q in found.questions] == [("red", "crimson", "scarlet"), ("crimson", "red"), ("yo",), ()]
    assert [q.options for q in found.questions] == [(), ("blue", "crimson"), (), ()]
    assert found.questions[2].prompt == "Hi"
    assert found.questions[1].messages is not None
    lengths = [len(row.input_ids) - row.answer_start for row in found]
    assert lengths[:2] == [len(demo.answer_ids("red")), len(demo.answer_ids("crimson"))]
    assert lengths[3] == 0


def test_answers_that_are_no_texts_are_named(demo: Preparer, lines: Callable[..., Path]) -> None:
    path = lines({"prompt": "One?"}, {"prompt": "Two?", "answers": [2]})
    with pytest.raises(OneVisionError, match=r"rows.jsonl:3: \"answers\" is '\[2\]'; it must be text or a list"):
        open_data(path, demo)


SAMPLE = {"doc_id": 7, "target": "red", "filtered_resps": "Red.", "doc_hash": "0", "input": "Colour?"}


def test_lmms_evals_samples(demo: Preparer, lines: Callable[..., Path]) -> None:
    path = lines(
        SAMPLE | {"input_media": ["red.png"]},
        SAMPLE | {"target": "['red', 'crimson']", "filtered_resps": [["blue"]], "input_media": ["red.png"]},
        {**SAMPLE, "arguments": [["Old?", {}]], "doc": {"image": "red.png"}, "input": "Old?", "target": 3},
    )
    found = open_data(path, demo)
    assert [(q.answers, q.recorded, q.prompt) for q in found.questions] == [
        (("red",), "Red.", "Colour?"),
        (("red", "crimson"), "blue", "Colour?"),
        (("3",), "Red.", "Old?"),
    ]
    assert [len(q.images) for q in found.questions] == [1, 1, 1]
    row, same = found[0], demo.row("x", found.questions[0].messages or [], "red")
    assert np.array_equal(row.input_ids, same.input_ids)
    assert row.pixel_values is not None


@pytest.mark.parametrize("media", [{}, {"input_media": ["https://example.org/a.png"]}, {"input_media": ["gone.png"]}])
def test_a_sample_without_its_image_is_scored_and_not_asked(
    demo: Preparer, golden_preparer: Preparer, lines: Callable[..., Path], media: dict[str, Any]
) -> None:
    path = lines(SAMPLE | media)
    for preparer in (demo, golden_preparer):  # scoring needs no tokenizer
        found = open_data(path, preparer)
        assert (found.questions[0].recorded, found.questions[0].answers) == ("Red.", ("red",))
        with pytest.raises(OneVisionError, match=r"rows.jsonl:1: the samples file names no image"):
            found[0]


def test_likelihoods_are_no_recorded_answer(demo: Preparer, lines: Callable[..., Path]) -> None:
    path = lines(SAMPLE | {"filtered_resps": [[-1.5, True], [-2, False]], "target": "[not a list"})
    question = open_data(path, demo).questions[0]
    assert (question.recorded, question.answers) == (None, ("[not a list",))


def test_a_broken_line_of_samples_is_named(demo: Preparer, lines: Callable[..., Path]) -> None:
    path = lines(SAMPLE, {"prompt": "another kind"})
    with pytest.raises(OneVisionError, match=r"rows.jsonl:3: is no sample of lmms-eval, it needs doc_id"):
        open_data(path, demo)


def test_folders_and_arrays(demo: Preparer, golden_preparer: Preparer, tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "blue").save(tmp_path / "b.png")
    folder = open_data(tmp_path, demo)
    assert (folder.questions[0].answers, folder.questions[0].prompt) == ((), "Describe this image.")
    np.savez(tmp_path / "rows.npz", input_ids=np.arange(1, 9)[None])
    arrays = open_data(tmp_path / "rows.npz", golden_preparer)
    assert (arrays.questions[0].prompt, arrays.questions[0].messages) == ("", None)
    assert arrays[0].input_ids.tolist() == list(range(1, 9))


def test_an_image_as_a_data_url_is_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.new("RGB", (30, 20), "green").save(tmp_path / "flat.png")
    kinds = {}
    for name in ("noise.png", "flat.png"):
        head, _, data = data_url(str(tmp_path / name)).partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        kinds[name] = (head, image.size)
    assert kinds == {
        "noise.png": ("data:image/jpeg;base64", (448, 336)),
        "flat.png": ("data:image/png;base64", (30, 20)),
    }


def test_rows_are_of_each_kind_in_turn() -> None:
    assert [row.kind for row in synthetic_rows(4, 0)] == ["one image", "several images", "text", "one image"]
