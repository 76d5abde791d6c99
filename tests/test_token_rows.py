"""Token-level rows: .npz files with any batch, padding and media, and what is unsound in them."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevision_edge.calibration.dataset import Preparer, Row, load_dataset
from onevision_edge.config import ModelConfig
from onevision_edge.errors import OneVisionError

GOLDEN = Path(__file__).parent / "data" / "golden" / "checkpoint"
ARRAYS = ("input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="module")
def token_preparer() -> Preparer:
    """Of the golden checkpoint, which has no tokenizer."""
    return Preparer.from_directory(GOLDEN, ModelConfig.from_checkpoint(GOLDEN))


def same(a: Row, b: Row) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ARRAYS]
    arrays = all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in pairs)
    return arrays and a.answer_start == b.answer_start


@pytest.mark.parametrize("case", ["a_single_image", "b_two_images", "c_text_only", "d_video", "f_resized_maxpixels"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_are_what_was_saved(
    token_preparer: Preparer, golden: Callable[[str], Any], case: str, save: Any, tmp_path: Path
) -> None:
    inputs = golden(case).inputs
    media_ids = [token_preparer.config.image_token_id, token_preparer.config.video_token_id]
    start = int(np.flatnonzero(np.isin(inputs["input_ids"][0], media_ids)).max(initial=3)) + 2
    save(tmp_path / "row.npz", **inputs, answer_start=start, other=np.zeros(3))
    (row,) = load_dataset(tmp_path / "row.npz", token_preparer)
    assert row.answer_start == start
    for name in ARRAYS:
        found, wanted = getattr(row, name), inputs.get(name)
        assert (found is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(found, wanted[0] if name == "input_ids" else wanted)
            assert found.dtype == (np.float32 if name.startswith("pixel") else np.int64)


def test_a_padded_batch_is_its_rows(token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path) -> None:
    inputs = golden("e_batch2_leftpad").inputs
    mask = inputs["attention_mask"].astype(bool)
    starts = np.array([43, 44])
    np.savez(tmp_path / "batch.npz", **inputs, answer_start=starts)
    rows = list(load_dataset(tmp_path / "batch.npz", token_preparer))
    patches = inputs["image_grid_thw"].prod(1)
    pixels = np.split(inputs["pixel_values"], [patches[0]])
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row.input_ids, inputs["input_ids"][i][mask[i]])
        np.testing.assert_array_equal(row.pixel_values, pixels[i])
        np.testing.assert_array_equal(row.image_grid_thw, inputs["image_grid_thw"][[i]])
        assert row.answer_start == mask[i, : starts[i]].sum() < len(row.input_ids)
    assert not mask.all()


media = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)), max_size=3)
batches = st.lists(st.tuples(media, media, st.integers(1, 5), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(batch=batches, seed=st.integers(0, 99))
def test_any_batch_comes_apart_as_it_was_put_together(batch: Any, seed: int, tmp_path_factory: Any) -> None:
    """Rows with any number of images and videos, padded left or right, with and without answers."""
    config = ModelConfig.from_checkpoint(GOLDEN)
    rng = np.random.default_rng(seed)
    rows = [random_row(config, *shape, rng) for shape in batch]
    length = max(len(row.input_ids) for row in rows)
    ids, mask = np.full((2, len(rows), length), 0)
    starts = []
    for i, row in enumerate(rows):
        left = int(rng.choice([0, length - len(row.input_ids)]))
        ids[i, left : left + len(row.input_ids)], mask[i, left : left + len(row.input_ids)] = row.input_ids, 1
        starts.append(left + row.answer_start)
    arrays = {"input_ids": ids, "attention_mask": mask, "answer_start": np.array(starts)}
    for name in ARRAYS[1:]:
        parts = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        arrays |= {name: np.concatenate(parts)} if parts else {}
    file = tmp_path_factory.mktemp("batch") / "batch.npz"
    np.savez(file, **arrays)
    loaded = list(load_dataset(file, Preparer.from_directory(file.parent, config)))
    assert len(loaded) == len(rows)
    assert all(same(a, b) for a, b in zip(loaded, rows, strict=True))


def random_row(config: ModelConfig, images: Any, videos: Any, text: int, answered: bool, rng: Any) -> Row:
    """Grids in units of merged tokens; placeholders stand between text tokens, which 0 to 499 are."""
    pixels, grids, ids = [], [], [rng.integers(0, 499, text)]
    for entries, token in ((images, config.image_token_id), (videos, config.video_token_id)):
        grid = np.array([(t, 2 * h, 2 * w) for t, h, w in entries], np.int64).reshape(-1, 3)
        ids += [np.full(t * h * w, token) for t, h, w in entries] + [rng.integers(0, 499, 1)]
        rows = rng.standard_normal((int(grid.prod(1).sum()), config.vision.patch_dim)).astype(np.float32)
        pixels.append(rows if entries else None)
        grids.append(grid if entries else None)
    prompt = np.concatenate(ids)
    whole = np.concatenate([prompt, rng.integers(0, 499, 2)]) if answered else prompt
    return Row("", whole, len(prompt), pixels[0], grids[0], pixels[1], grids[1])


def changed(**arrays: Any) -> Callable[[dict[str, np.ndarray]], dict[str, Any]]:
    """A change of the arrays of e_batch2_leftpad: None takes one away, a function makes it anew."""

    def change(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        made = {name: value(inputs[name].copy()) if callable(value) else value for name, value in arrays.items()}
        return {name: value for name, value in {**inputs, **made}.items() if value is not None}

    return change


def with_value(index: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(input_ids=None), "has no input_ids; it holds attention_mask"),
        (changed(input_ids=lambda a: a.astype(float)), "input_ids must be integers"),
        (changed(input_ids=with_value((0, -1), 512)), "token id 512 is outside the vocabulary of 512"),
        (changed(input_ids=with_value((0, -1), 505)), "47 image placeholder tokens .* 46 embeddings|must be equal"),
        (changed(attention_mask=lambda a: a[:1]), "attention_mask has shape"),
        (changed(attention_mask=with_value((0, 30), 0)), "must be equal|has holes"),
        (changed(pixel_values=None), "has image_grid_thw alone; pixel_values and image_grid_thw go together"),
        (changed(image_grid_thw=None), "has pixel_values alone"),
        (changed(image_grid_thw=lambda a: a + 1), "multiples of 2"),
        (changed(image_grid_thw=lambda a: a[:1]), "must be equal"),
        (changed(image_grid_thw=lambda a: a.astype(np.float32)), "must be positive integers"),
        (changed(image_grid_thw=lambda a: a * np.int64(1 << 32)), "must be equal"),
        (changed(image_grid_thw=lambda a: a[::-1]), r"row 0 ends after \d+ image placeholders, in the middle of one"),
        (changed(answer_start=0), "answer_start is 0 in row 0; it must be a column from"),
        (changed(answer_start=np.array([40, 46])), "answer_start is 46 in row 1"),
        (changed(answer_start=np.array([1, 2, 3])), "one for each of 2 rows"),
        (changed(answer_start=40.5), "must be an integer"),
        (changed(answer_start=25), "an answer holds placeholders"),
        (changed(input_ids=np.array([None, 1], object)), "not a sound .npz archive of numbers"),
        (changed(input_ids=np.array("text")), "input_ids must be integers"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_unsound_npz_files_are_named_when_opened(
    token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path, change: Any, message: str
) -> None:
    np.savez(tmp_path / "rows.npz", **change(golden("e_batch2_leftpad").inputs))
    with pytest.raises(OneVisionError, match=rf"rows\.npz: .*({message})"):
        load_dataset(tmp_path / "rows.npz", token_preparer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(pixel_values=with_value((3, 5), np.nan)), "hold NaN or infinity"),
        (changed(pixel_values=lambda a: a.astype(np.float64) * 1e300), "hold NaN or infinity"),
        (changed(pixel_values=lambda a: a[:-1]), r"have shape \[87, 588\]; the grid .* asks for \[88, 588\]"),
        (changed(pixel_values=lambda a: a[:, :-1]), r"have shape \[88, 587\]"),
        (changed(pixel_values=lambda a: a.astype(np.int8)), "give floating-point rows"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_unsound_pixel_rows_are_named_when_read(
    token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path, change: Any, message: str
) -> None:
    np.savez(tmp_path / "rows.npz", **change(golden("e_batch2_leftpad").inputs))
    dataset = load_dataset(tmp_path / "rows.npz", token_preparer)
    with pytest.raises(OneVisionError, match=rf"^rows\.npz\[1\]: image pixel values .*{message}"):
        dataset[1]


def test_damaged_npz_files(token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path) -> None:
    file = tmp_path / "row.npz"
    np.savez(file, **golden("a_single_image").inputs)
    sound = file.read_bytes()
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 1000)}"
        archive.writestr("input_ids.npy", header.ljust(127) + b"\n")
    for body in (sound[:1000], sound[:-10], sound[:100] + bytes(200) + sound[300:], b"", b"garbage", b"PK\x03\x04"):
        file.write_bytes(body)
        with pytest.raises(OneVisionError, match=r"row\.npz: "):
            load_dataset(file, token_preparer).digest()
    np.save(tmp_path / "array.npy", np.arange(3))
    (tmp_path / "array.npy").rename(file)
    with pytest.raises(OneVisionError, match=r"row\.npz: holds one array without a name"):
        load_dataset(file, token_preparer)
    with pytest.raises(OneVisionError, match=r"huge\.npz: holds more than fits into memory"):
        load_dataset(tmp_path / "huge.npz", token_preparer)


def test_a_file_that_changes_or_goes_is_noticed(
    token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path
) -> None:
    file, inputs = tmp_path / "row.npz", golden("a_single_image").inputs
    np.savez(file, **inputs)
    dataset = load_dataset(file, token_preparer)
    before = dataset.digest()
    np.savez(file, **{**inputs, "pixel_values": inputs["pixel_values"] + 1})
    assert dataset.digest() != before
    file.unlink()
    with pytest.raises(OneVisionError, match=r"row\.npz: the file can no longer be read: No such file"):
        dataset[0]


def test_rows_of_a_file_do_not_share_memory(
    token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", **golden("e_batch2_leftpad").inputs)
    dataset = load_dataset(tmp_path / "rows.npz", token_preparer)
    digest, row = dataset.digest(), dataset[0]
    row.pixel_values[:], row.image_grid_thw[:], row.input_ids[:] = 0, 0, 0  # type: ignore[index]
    assert dataset.digest() == digest
