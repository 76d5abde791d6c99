"""The token level: padding, batches, media, end tokens, the end of the cache, and what it refuses."""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.generation import Timings
from onevision_edge.runtime.model import Model
from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.runtime.token_model import Media

IMAGE, VIDEO, EOS, PAD, VOCABULARY, MAX_LENGTH = 505, 506, 501, 499, 512, 256
Exported = Callable[[str], Path]


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(OneVisionError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 490, length)


def padded(rows: Sequence[np.ndarray], side: str) -> dict[str, np.ndarray]:
    """input_ids and attention_mask of rows of several lengths."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), PAD), np.zeros((len(rows), width), int)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def image(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixel rows and grid of one random image of height x width patches."""
    rows = np.random.default_rng(seed).standard_normal((height * width, 588))
    return rows.astype(np.float32), np.array([[1, height, width]])


def greedy(model: Model, ids: Any, count: int = 12, **options: Any) -> list[list[int]]:
    return model.generate_ids(ids, max_tokens=count, **{"eos_token_id": [], **options}).tolist()


# Padding and batches.


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(golden_model: Model, side: str) -> None:
    rows = [text(5), text(17, 1), text(11, 2)]
    batch = golden_model.logits(**padded(rows, side))
    for i, row in enumerate(rows):
        kept = padded(rows, side)["attention_mask"][i].astype(bool)
        np.testing.assert_array_equal(batch[i, kept], golden_model.logits(row)[0])
        assert not batch[i, ~kept].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_each_alone(golden_model: Model, side: str) -> None:
    rows = [text(5), text(40, 1), text(11, 2), text(1, 3)]
    batch = greedy(golden_model, **_renamed(padded(rows, side)))
    assert batch == [greedy(golden_model, row)[0] for row in rows]


def _renamed(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunks_do_not_change_the_answer(golden_model: Model, chunk: int) -> None:
    ids = np.stack([text(19), text(19, 1)])
    assert greedy(golden_model, ids, prefill_chunk=chunk) == greedy(golden_model, ids)


def test_one_row_needs_no_batch_axis(golden_model: Model) -> None:
    ids = text(6)
    assert golden_model.logits(ids).shape == (1, 6, VOCABULARY)
    np.testing.assert_array_equal(golden_model.logits(ids.tolist()), golden_model.logits(ids[None]))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_any_integer_dtype(golden_model: Model, dtype: Any) -> None:
    np.testing.assert_array_equal(golden_model.logits(text(6).astype(dtype)), golden_model.logits(text(6)))


def test_greedy_is_the_argmax_of_logits(golden_model: Model) -> None:
    ids = text(9).tolist()
    for _ in range(8):
        ids.append(int(golden_model.logits(ids)[0, -1].argmax()))
    assert greedy(golden_model, text(9), 8) == [ids[9:]]


# Images.


def test_images_of_several_sizes_in_one_call(golden_model: Model) -> None:
    """Sizes interleave, so that the groups that run together are not neighbours."""
    images = [image(4, 6, 0), image(2, 2, 1), image(4, 6, 2), image(6, 4, 3), image(2, 2, 4)]
    together = golden_model.encode_images(
        np.concatenate([rows for rows, _ in images]), np.concatenate([grid for _, grid in images])
    )
    alone = np.concatenate([golden_model.encode_images(*one) for one in images])
    assert together.shape == (6 + 1 + 6 + 6 + 1, 64)
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_a_video_is_its_frames(golden_model: Model) -> None:
    rows = np.concatenate([image(4, 4, seed)[0] for seed in range(3)])
    video = golden_model.encode_images(rows, np.array([[3, 4, 4]]))
    images = golden_model.encode_images(rows, np.array([[1, 4, 4]] * 3))
    np.testing.assert_array_equal(video, images)


def test_images_go_to_their_rows_in_order(golden_model: Model) -> None:
    """A batch whose rows have two, no and one image, given in one array."""
    pictures = [image(2, 4, 0), image(4, 2, 1), image(2, 2, 2)]
    rows = [
        np.concatenate([text(3), [IMAGE] * 2, text(2, 1), [IMAGE] * 2, text(2, 2)]),
        text(6, 3),
        np.concatenate([[IMAGE], text(4, 4)]),
    ]
    batch = golden_model.logits(
        **padded(rows, "left"),
        pixel_values=np.concatenate([p for p, _ in pictures]),
        image_grid_thw=np.concatenate([g for _, g in pictures]),
    )
    for i, own in enumerate([pictures[:2], [], pictures[2:]]):
        media = {}
        if own:
            media["pixel_values"] = np.concatenate([p for p, _ in own])
            media["image_grid_thw"] = np.concatenate([g for _, g in own])
        alone = golden_model.logits(rows[i], **media)[0]
        np.testing.assert_allclose(batch[i, -len(rows[i]) :], alone, atol=2e-5)


def test_images_and_videos_together(golden_model: Model) -> None:
    """Each kind fills its own placeholders, whatever order they stand in."""
    (picture, grid), (frames, _) = image(2, 4, 0), image(8, 2, 1)
    clip = {"pixel_values_videos": frames, "video_grid_thw": np.array([[2, 4, 2]])}
    ids = np.concatenate([[VIDEO] * 2, text(2), [IMAGE] * 2, text(1), [VIDEO] * 2, text(2)])
    logits = golden_model.logits(ids, pixel_values=picture, image_grid_thw=grid, **clip)
    as_images = np.where(ids == VIDEO, IMAGE, ids)
    pixels = np.concatenate([frames[:8], picture, frames[8:]])
    grids = np.array([[1, 4, 2], [1, 2, 4], [1, 4, 2]])
    np.testing.assert_allclose(
        logits, golden_model.logits(as_images, pixel_values=pixels, image_grid_thw=grids), atol=2e-5
    )


def test_no_images_given_as_empty_arrays(golden_model: Model) -> None:
    none = {"pixel_values": np.empty((0, 588), np.float32), "image_grid_thw": np.empty((0, 3), int)}
    np.testing.assert_array_equal(golden_model.logits(text(5), **none), golden_model.logits(text(5)))
    assert golden_model.encode_images(*none.values()).shape == (0, 64)


def test_placeholders_are_never_generated(golden_model: Model) -> None:
    ids = np.stack([text(4, seed) for seed in range(8)])
    answers = golden_model.generate_ids(ids, max_tokens=40, eos_token_id=[], temperature=50.0, seed=0)
    assert len(set(answers.flat)) > 100  # nearly uniform
    assert not np.isin(answers, [IMAGE, VIDEO]).any()


@pytest.mark.parametrize(("placeholders", "patches"), [(0, 8), (1, 8), (3, 8), (2, 0)])
def test_counts_must_match(golden_model: Model, placeholders: int, patches: int) -> None:
    media: dict[str, Any] = {}
    if patches:
        media["pixel_values"], media["image_grid_thw"] = image(2, patches // 2)
    message = refusal(golden_model.logits, np.array([1, *[IMAGE] * placeholders, 2]), **media)
    assert f"hold {placeholders} image placeholder tokens (id 505)" in message
    assert f"give {patches // 4} embeddings" in message


def test_counts_of_videos_must_match(golden_model: Model) -> None:
    rows, grid = image(2, 4)
    clip = {"pixel_values_videos": rows, "video_grid_thw": grid}
    message = refusal(golden_model.generate_ids, np.array([1, VIDEO, IMAGE, 2]), **clip)
    assert "hold 1 video placeholder" in message or "hold 1 image placeholder" in message
    assert "hold 1 video placeholder" in refusal(golden_model.logits, np.array([1, VIDEO]), **clip)


ROWS, GRID = image(4, 4)


@pytest.mark.parametrize(
    ("pixels", "grid", "message"),
    [
        (ROWS[:-1], GRID, "have shape [15, 588]; the grid [[1, 4, 4]] asks for [16, 588]"),
        (ROWS[:, :-1], GRID, "have shape [16, 587]"),
        (ROWS[None], GRID, "have shape [1, 16, 588]"),
        (ROWS, GRID[0], "must be positive integers [n, 3], not int64 [3]"),
        (ROWS, GRID[:, :2], "must be positive integers [n, 3], not int64 [1, 2]"),
        (ROWS, GRID.astype(float), "must be positive integers [n, 3], not float64"),
        (ROWS, np.array([[1, -4, -4]]), "must be positive integers"),
        (ROWS, np.array([[0, 4, 4]]), "must be positive integers"),
        (ROWS[:15], np.array([[1, 3, 5]]), "must be multiples of 2: [[1, 3, 5]]"),
        (ROWS * np.nan, GRID, "NaN"),
        (ROWS.astype(str), GRID, "give floating-point rows"),
        (np.zeros((16, 588), np.uint8), GRID, "pixel values are uint8"),
        (ROWS, np.array([[2**40, 2, 2]]), "asks for"),
        (ROWS, np.array([[2**62, 2, 2]]), "asks for"),
    ],
)
def test_pixels_that_do_not_fit(golden_model: Model, pixels: Any, grid: Any, message: str) -> None:
    assert message in refusal(golden_model.encode_images, pixels, grid)


def test_an_image_that_memory_cannot_hold(golden_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names a size that would do: an image of that many pixels passes."""
    monkeypatch.setattr("onevision_edge.runtime.backend.memory_field", lambda _: 100_000)
    message = refusal(golden_model.encode_images, *image(20, 20))
    assert "an image of 400 patches needs" in message
    patches = int(message.split("max_pixels=")[1].split()[0]) // 14**2
    assert 40 < patches < 400
    assert golden_model.encode_images(*image(2, patches // 4 * 2)).shape == (patches // 4, 64)


def test_half_of_an_image_input(golden_model: Model) -> None:
    rows, grid = image(2, 2)
    for media in ({"pixel_values": rows}, {"image_grid_thw": grid}, {"video_grid_thw": grid}):
        assert "one of them is missing" in refusal(golden_model.logits, np.array([1, 2]), **media)


# Ids and masks.


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 512]], "token id 512 is outside the vocabulary of 512"),
        ([[1, -1]], "token id -1 is outside the vocabulary of 512"),
        ([[1.0, 2.0]], "must be integers [batch, tokens], not float64 [1, 2]"),
        ([[True, False]], "must be integers [batch, tokens], not bool"),
        ([], "must be integers [batch, tokens]"),
        (np.empty((0, 3), int), "must be integers [batch, tokens], not int64 [0, 3]"),
        (np.zeros((1, 1, 3), int), "must be integers [batch, tokens], not int64 [1, 1, 3]"),
        ([[1, 2], [3]], "must be integers [batch, tokens]"),
    ],
)
def test_ids_that_are_none(golden_model: Model, ids: Any, message: str) -> None:
    assert message in refusal(golden_model.logits, ids)
    assert message in refusal(golden_model.generate_ids, ids)


def test_ids_under_the_mask_are_not_read(golden_model: Model) -> None:
    ids, mask = np.array([[-100, 5, 6]]), np.array([[0, 1, 1]])
    np.testing.assert_array_equal(golden_model.logits(ids, attention_mask=mask)[0, 1:], golden_model.logits([5, 6])[0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 1], [1, 0, 1, 1]], "attention_mask row 1 has holes: pad on the left or the right only"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "attention_mask row 0 has no token"),
        ([[1, 1, 1], [1, 1, 1]], "attention_mask has shape [2, 3], input_ids [2, 4]"),
        ([1, 1, 1, 1], "attention_mask has shape [1, 4], input_ids [2, 4]"),
    ],
)
def test_masks_that_are_none(golden_model: Model, mask: Any, message: str) -> None:
    ids = np.stack([text(4), text(4, 1)])
    assert message in refusal(golden_model.logits, ids, attention_mask=mask)
    assert message in refusal(golden_model.generate_ids, ids, attention_mask=mask)


# End tokens.


def test_the_bundles_end_token_ends_the_answer(golden_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (free,) = greedy(golden_model, text(7), 10)
    end = free[4]
    first = free.index(end)
    monkeypatch.setattr(golden_model, "eos_token_ids", (end,))
    assert golden_model.generate_ids(text(7), max_tokens=10).tolist() == [free[: first + 1]]
    assert greedy(golden_model, text(7), 10, eos_token_id=[]) == [free]


@pytest.mark.parametrize("form", [int, lambda end: [end], lambda end: [end, 7], lambda end: (end,), np.array])
def test_forms_of_the_end_token(golden_model: Model, form: Callable[[int], Any]) -> None:
    (free,) = greedy(golden_model, text(7), 10)
    stopped = free[: free.index(free[4]) + 1]
    assert greedy(golden_model, text(7), 10, eos_token_id=form(free[4])) == [stopped]


def test_shorter_answers_end_in_padding(golden_model: Model) -> None:
    ids = np.stack([text(7), text(7, 5)])
    first, second = greedy(golden_model, ids, 10)
    end = next(token for token in first[1:] if token not in second)
    length = first.index(end) + 1
    answers = greedy(golden_model, ids, 10, eos_token_id=end)
    assert answers == [first[:length] + [PAD] * (10 - length), second]


def test_ignore_eos(golden_model: Model) -> None:
    (free,) = greedy(golden_model, text(7), 10)
    assert greedy(golden_model, text(7), 10, eos_token_id=free[0], ignore_eos=True) == [free]


def test_an_end_token_that_is_none(golden_model: Model) -> None:
    assert "eos_token_id" in refusal(golden_model.generate_ids, text(3), eos_token_id="</s>")


# The end of the cache.


@pytest.mark.parametrize("room", [0, 1, 5])
def test_generation_stops_where_the_cache_ends(golden_model: Model, room: int) -> None:
    """The last token needs no row: a prompt that leaves `room` rows gets room + 1 tokens."""
    ids = text(MAX_LENGTH - room)
    assert golden_model.generate_ids(ids, max_tokens=50, eos_token_id=[]).shape == (1, room + 1)


def test_a_full_sequence_does_not_stop_the_others(golden_model: Model) -> None:
    rows = [text(MAX_LENGTH), text(MAX_LENGTH - 2, 1), text(9, 2)]
    inputs = padded(rows, "right")
    answers = golden_model.generate_ids(**inputs, max_tokens=12, eos_token_id=[]).tolist()
    for row, answer, length in zip(rows, answers, (1, 3, 12), strict=True):
        assert answer == greedy(golden_model, row)[0] + [PAD] * (12 - length)


def test_a_prompt_longer_than_the_cache(golden_model: Model) -> None:
    message = refusal(golden_model.generate_ids, text(MAX_LENGTH + 1))
    assert f"the prompt has {MAX_LENGTH + 1} tokens; this bundle holds {MAX_LENGTH}" in message
    assert "--max-length" in message
    assert golden_model.logits(text(MAX_LENGTH)).shape == (1, MAX_LENGTH, VOCABULARY)


# Calls after and beside one another.


def test_calls_leave_no_trace(golden_model: Model) -> None:
    """The cache is reused: a long call before a short one, a batch between, change nothing."""
    short, long, batch = text(4), text(200, 1), np.stack([text(30, 2), text(30, 3), text(30, 4)])
    fresh = greedy(golden_model, short)
    for ids in (long, short, batch, short, batch):
        greedy(golden_model, ids)
    np.testing.assert_array_equal(greedy(golden_model, short), fresh)


def test_the_cache_is_kept_between_calls(golden_model: Model) -> None:
    greedy(golden_model, text(4))
    (kept,) = golden_model._idle._held
    greedy(golden_model, text(6))
    assert [held.decoder for held in golden_model._idle._held] == [kept.decoder]


def test_a_call_inside_another_has_its_own_cache(golden_model: Model) -> None:
    """Asking again while an answer is still streaming neither waits for it nor changes it."""
    ids, other = text(20), text(30, 1)
    expected = greedy(golden_model, ids)[0]
    (row,), _ = golden_model._unpadded(ids, None)
    (prompt,) = golden_model._embed([row], {"image": Media(None, None), "video": Media(None, None)})
    sequence = golden_model._sequence(prompt, SamplingParams(max_tokens=len(expected)), ())
    with golden_model._loop(1) as loop:
        for _ in loop.steps([sequence], Timings()):
            greedy(golden_model, other)
    np.testing.assert_array_equal(sequence.token_ids, expected)


def test_two_threads_at_once(golden_model: Model) -> None:
    prompts = [np.stack([text(10 + i, i + k) for k in range(i + 1)]) for i in range(2)]
    expected = [greedy(golden_model, ids, 30) for ids in prompts]
    found: list[list[Any]] = [[], []]

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(greedy(golden_model, prompts[i], 30))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[expected[0]] * 5, [expected[1]] * 5]


# Options.


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(golden_bundle: Exported, golden_model: Model, threads: int) -> None:
    model = onevision_edge.load(golden_bundle("fp32"), threads=threads)
    options = model._graphs["decoder"].session.get_session_options()
    assert options.intra_op_num_threads == threads
    assert greedy(model, text(9)) == greedy(golden_model, text(9))


def test_without_prepacked_weights(golden_bundle: Exported, golden_model: Model) -> None:
    model = onevision_edge.load(golden_bundle("fp32"), threads=1, prepack=False)
    np.testing.assert_allclose(model.logits(text(9)), golden_model.logits(text(9)), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prefill_chunk": 2.5}, "prefill_chunk is 2.5"),
    ],
)
def test_bad_load_options(golden_bundle: Exported, options: dict[str, Any], message: str) -> None:
    assert message in refusal(onevision_edge.load, golden_bundle("fp32"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_new_tokens": 5}, "unknown option max_new_tokens; known: "),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    ],
)
def test_bad_generation_options(golden_model: Model, options: dict[str, Any], message: str) -> None:
    assert message in refusal(golden_model.generate_ids, text(3), **options)


def test_a_grid_whose_product_wraps_is_refused(golden_model: Model) -> None:
    with pytest.raises(OneVisionError, match="the grid"):
        golden_model.encode_images(np.zeros((0, 588), np.float32), np.array([[2**62, 2, 2]]))


def test_a_manifest_whose_limits_are_not_the_graphs_is_refused_at_load(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    lying = tmp_path / "bundle"
    shutil.copytree(golden_bundle("fp32"), lying)
    path = lying / "manifest.json"
    path.write_text(path.read_text().replace('"max_length": 256', '"max_length": 512'))
    with pytest.raises(OneVisionError, match=r"manifest says max_length 512, the decoder's cache has .*256"):
        onevision_edge.load(lying)
    path.write_text(path.read_text().replace("512", "256").replace("\n      256,", "\n      512,"))
    with pytest.raises(OneVisionError, match="not those the manifest names"):
        onevision_edge.load(lying)
