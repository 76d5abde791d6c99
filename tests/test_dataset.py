"""Calibration data: every source to token rows, the choice of rows, digests, and what is refused."""

import base64
import itertools
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import onevision_edge
from onevision_edge.calibration.dataset import (
    SHIPPED_CALIBRATION,
    SHIPPED_EVALUATION,
    Dataset,
    Preparer,
    Row,
    hold_out,
    load_dataset,
    require_images,
)
from onevision_edge.calibration.sources import FOLDER_PROMPTS
from onevision_edge.config import ModelConfig
from onevision_edge.errors import OneVisionError

ROOT = Path(onevision_edge.__file__).parent
CHECKPOINT = ROOT / "demo" / "checkpoint"
ARRAYS = ("input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="module")
def preparer() -> Preparer:
    """Of the shipped checkpoint."""
    return Preparer.from_directory(CHECKPOINT, ModelConfig.from_checkpoint(CHECKPOINT))


@pytest.fixture(scope="module")
def token_preparer(golden_checkpoint: Path) -> Preparer:
    """Of the golden checkpoint, which has no tokenizer."""
    return Preparer.from_directory(golden_checkpoint, ModelConfig.from_checkpoint(golden_checkpoint))


@pytest.fixture(scope="module")
def reference(script: Callable[[str], ModuleType]) -> ModuleType:
    """The image processing that the shipped model was trained with: code that shares nothing with the runtime."""
    return script("tools/train_demo/images.py")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Names of three images of different sizes in tmp_path / images."""
    rng = np.random.default_rng(3)
    (tmp_path / "images").mkdir()
    names = ["images/one.png", "images/two.png", "images/three.png"]
    for name, (height, width) in zip(names, [(60, 90), (112, 60), (84, 84)], strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / name)
    return names


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def same(a: Row, b: Row) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ARRAYS]
    arrays = all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in pairs)
    return arrays and a.answer_start == b.answer_start


def expected(reference: ModuleType, names: list[Path], prompt: str, answer: str) -> tuple[list[int], int, np.ndarray]:
    """Ids, answer start and pixel rows of one question about images, by the template and library alone."""
    tokenizer = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    template = jinja2.Template((CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8"))
    content = [{"type": "image"}] * len(names) + [{"type": "text", "text": prompt}]
    text = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    resized = [reference.resize(np.asarray(Image.open(name).convert("RGB"))) for name in names]
    counts = iter([pixels.shape[0] * pixels.shape[1] // 28**2 for pixels in resized])
    pad, end = (tokenizer.token_to_id(t) for t in ("<|image_pad|>", "<|im_end|>"))
    ids = [i for t in tokenizer.encode(text).ids for i in [t] * (next(counts) if t == pad else 1)]
    rows = np.concatenate([reference.normalise(reference.patch_rows(pixels)) for pixels in resized])
    return [*ids, *tokenizer.encode(answer).ids, end], len(ids), rows


# Messages


def test_a_row_is_what_template_tokenizer_and_processor_say(
    preparer: Preparer, reference: ModuleType, tmp_path: Path, pictures: list[str]
) -> None:
    file = jsonl(tmp_path / "rows.jsonl", {"image": pictures[:2], "prompt": "Which is larger?", "answer": "the 2nd"})
    (row,) = load_dataset(file, preparer)
    ids, start, pixels = expected(reference, [tmp_path / p for p in pictures[:2]], "Which is larger?", "the 2nd")
    assert row.input_ids.dtype == row.image_grid_thw.dtype == np.int64  # type: ignore[union-attr]
    assert row.input_ids.tolist() == ids
    assert row.answer_start == start
    np.testing.assert_array_equal(row.pixel_values, pixels)
    assert row.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 4]]  # type: ignore[union-attr]
    assert row.pixel_values_videos is None
    assert row.video_grid_thw is None


def test_rows_are_those_the_model_runs(preparer: Preparer, tmp_path: Path) -> None:
    """Of a bundle: ids, and embeddings of the pixel rows."""
    onevision_edge.export("demo", tmp_path / "bundle", dtype="fp32", max_length=512)
    model = onevision_edge.load(tmp_path / "bundle", threads=1)
    of_bundle = Preparer.from_directory(tmp_path / "bundle", model.config)
    for number in (0, 100, 358):
        raw = json.loads(SHIPPED_EVALUATION.read_text(encoding="utf-8").splitlines()[number])
        paths = [SHIPPED_EVALUATION.parent / name for name in raw.get("images") or [raw["image"]]]
        items = [*({"type": "image", "image": p} for p in paths), {"type": "text", "text": raw["prompt"]}]
        prepared = model.prepared([{"role": "user", "content": items}])
        row = load_dataset(SHIPPED_EVALUATION, of_bundle)[number]
        assert same(row, load_dataset(SHIPPED_EVALUATION, preparer)[number])
        assert row.input_ids[: row.answer_start].tolist() == prepared.prompt.ids.tolist()
        embeds = model.encode_images(row.pixel_values, row.image_grid_thw)  # type: ignore[arg-type]
        np.testing.assert_array_equal(
            embeds, prepared.prompt.embeds[prepared.prompt.ids == model.config.image_token_id]
        )
        assert model.tokenizer.decode(row.input_ids[row.answer_start :]) == raw["answer"]  # type: ignore[union-attr,arg-type]


def test_every_spelling_of_a_question_is_the_same_row(
    preparer: Preparer, tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, question, text = tmp_path / pictures[0], "What is it?", {"type": "text", "text": "What is it?"}
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()

    def messages(item: dict[str, Any]) -> dict[str, Any]:
        user = {"role": "user", "content": [item, text]}
        return {"messages": [user, {"role": "assistant", "content": [{"type": "text", "text": "noise"}]}]}

    answer = {"prompt": question, "answer": "noise"}
    spellings: list[dict[str, Any]] = [
        {"image": pictures[0], **answer},
        {"image": [pictures[0]], "images": None, **answer, "kind": "any", "id": 7},
        {"images": [str(image)], **answer},
        {"images": image.as_uri(), **answer},
        {"image": url, **answer},
        messages({"type": "image", "image": pictures[0]}),
        messages({"type": "image_url", "image_url": pictures[0]}),
        messages({"type": "image_url", "image_url": {"url": url}}),
        {"messages": messages({"type": "image", "image": pictures[0]})["messages"][:1], "answer": "noise"},
    ]
    file = jsonl(tmp_path / "rows.jsonl", *spellings)
    monkeypatch.chdir(tmp_path)
    relative = load_dataset("rows.jsonl", preparer)
    monkeypatch.chdir(ROOT)  # after opening, the working folder does not matter
    for dataset in (load_dataset(file, preparer), relative):
        assert all(same(row, dataset[0]) for row in dataset)
        assert [row.name for row in dataset] == [f"rows.jsonl:{i}" for i in range(1, 10)]


def test_a_video_is_its_frames(preparer: Preparer, tmp_path: Path, pictures: list[str]) -> None:
    (tmp_path / "clip").mkdir()
    frame = np.random.default_rng(1).integers(0, 256, (56, 84, 3), np.uint8)
    for i in range(5):
        Image.fromarray(np.roll(frame, i, 1)).save(tmp_path / "clip" / f"frame{i + 7}.png")
    frames = [f"clip/frame{i + 7}.png" for i in range(5)]
    whole, some, listed, both = load_dataset(
        jsonl(
            tmp_path / "rows.jsonl",
            {"video": "clip", "prompt": "What moves?"},
            {"video": "clip", "nframes": 3, "prompt": "What moves?"},
            {"video": frames[::2], "prompt": "What moves?"},
            {"image": pictures[2], "video": "clip", "prompt": "What moves?"},
        ),
        preparer,
    )
    assert same(some, listed)
    video = preparer.config.video_token_id
    assert [int((row.input_ids == video).sum()) for row in (whole, some, both)] == [30, 18, 30]
    assert whole.video_grid_thw.tolist() == [[5, 4, 6]]  # type: ignore[union-attr]
    assert whole.pixel_values is None
    np.testing.assert_array_equal(both.pixel_values_videos, whole.pixel_values_videos)
    assert both.image_grid_thw.tolist() == [[1, 6, 6]]  # type: ignore[union-attr]
    assert whole.answer_start == len(whole.input_ids)


def test_a_conversation_keeps_its_earlier_turns(preparer: Preparer, tmp_path: Path, pictures: list[str]) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "no"},
    ]
    (row,) = load_dataset(jsonl(tmp_path / "rows.jsonl", {"messages": turns}), preparer)
    tokenizer = preparer.tokenizer
    assert tokenizer is not None
    text = tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=False).replace("<|image_pad|>", "")
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>One?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )
    assert tokenizer.decode(row.input_ids[row.answer_start :].tolist(), skip_special_tokens=False) == "no<|im_end|>"


def test_byte_order_mark_blank_lines_and_line_ends(preparer: Preparer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "\xc3\xa9"}')
    assert [row.name for row in load_dataset(file, preparer)] == ["rows.jsonl:1", "rows.jsonl:4"]


# Folders


def test_a_folder_is_its_images_in_natural_order(
    preparer: Preparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    names = ["A.png", "a.png", "p2.PNG", "p02.png", "p10.jpg", "z.webp"]
    for i, name in enumerate([*names, ".hidden.png"]):
        Image.new("RGB", (56, 56), (i, 20 * i, 40 * i)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    dataset = load_dataset(folder, preparer)
    assert dataset.source == "photos"
    assert [row.name for row in dataset] == ["A.png", "a.png", "p02.png", "p2.PNG", "p10.jpg", "z.webp"]
    one_each = [{"image": f"photos/{row.name}", "prompt": FOLDER_PROMPTS[i % 4]} for i, row in enumerate(dataset)]
    asked = load_dataset(jsonl(tmp_path / "rows.jsonl", *one_each), preparer)
    assert all(same(a, b) for a, b in zip(dataset, asked, strict=True))
    listing = list(os.scandir(folder))
    monkeypatch.setattr(os, "scandir", lambda path: iter(listing[::-1]))
    assert load_dataset(folder, preparer).digest() == dataset.digest()


def test_a_folder_of_npz_files(token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "row10.npz", **golden("a_single_image").inputs)
    np.savez(tmp_path / "row9.npz", **golden("e_batch2_leftpad").inputs)
    dataset = load_dataset(tmp_path, token_preparer)
    assert [row.name for row in dataset] == ["row9.npz[0]", "row9.npz[1]", "row10.npz"]
    assert [len(shown) for shown in dataset.media] == [1, 1, 1]


# Choosing rows


@pytest.fixture(scope="module")
def shipped(preparer: Preparer) -> Dataset:
    return load_dataset(None, preparer)


def numbers(dataset: Dataset) -> list[int]:
    return [int(entry.name.split(":")[1]) for entry in dataset._entries]


def test_samples_are_a_fixed_choice_in_file_order(preparer: Preparer, shipped: Dataset) -> None:
    chosen = {
        (n, seed): numbers(load_dataset(None, preparer, samples=n, seed=seed)) for n in (8, 32) for seed in (0, 1)
    }
    assert all(len(set(rows)) == n and rows == sorted(rows) for (n, _), rows in chosen.items())
    assert chosen[8, 0] == numbers(load_dataset(None, preparer, samples=8))
    assert chosen[8, 0] != chosen[8, 1]
    assert set(chosen[8, 0]) < set(chosen[32, 0])
    assert numbers(load_dataset(None, preparer, samples=10_000, seed=5)) == numbers(shipped)


def test_samples_are_drawn_evenly(preparer: Preparer, shipped: Dataset) -> None:
    """8 of 86 rows by 500 seeds: each about 46.5 times; the bounds are five standard deviations."""
    drawn = np.bincount(
        [n for seed in range(500) for n in numbers(shipped.sample(8, seed))], minlength=len(shipped) + 1
    )
    share = 8 / len(shipped)
    assert (np.abs(drawn[1:] - 500 * share) < 5 * np.sqrt(500 * share * (1 - share))).all()


def test_held_out_rows_share_no_image_with_calibration(shipped: Dataset) -> None:
    for seed in range(20):
        calibration, evaluation = hold_out(shipped, 0.25, seed)
        assert sorted(numbers(calibration) + numbers(evaluation)) == numbers(shipped)
        assert not set(itertools.chain(*calibration.media)) & set(itertools.chain(*evaluation.media))
        assert abs(len(evaluation) - len(shipped) / 4) <= 1
        assert numbers(hold_out(shipped, 0.25, seed)[1]) == numbers(evaluation) == sorted(numbers(evaluation))
    assert numbers(hold_out(shipped, 0.25, 0)[1]) != numbers(hold_out(shipped, 0.25, 1)[1])


class Shown:
    """An entry that is only looked at."""

    def __init__(self, number: int, items: set[int]) -> None:
        self.name, self.media = f"x:{number}", tuple(map(str, items))

    def prepare(self, preparer: Preparer) -> Row:
        raise AssertionError("nothing is to be read")


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.sets(st.integers(0, 12), max_size=3), min_size=2, max_size=25),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_any_rows_are_split_cleanly_or_refused(rows: list[set[int]], share: float, seed: int) -> None:
    dataset = Dataset("x", [Shown(i, items) for i, items in enumerate(rows)], None)  # type: ignore[arg-type]
    joined = np.array([[i == j or bool(a & b) for j, b in enumerate(rows)] for i, a in enumerate(rows)])
    connected = np.linalg.matrix_power(joined.astype(float), len(rows)) > 0
    if connected.all():
        with pytest.raises(OneVisionError, match="cannot be split"):
            hold_out(dataset, share, seed)
        return
    sides = [numbers(side) for side in hold_out(dataset, share, seed)]
    assert sorted(sides[0] + sides[1]) == list(range(len(rows)))
    assert all(sides)
    assert not connected[np.ix_(*sides)].any()


# Digests


def test_the_digest_tells_data_tokenizer_and_preprocessing_apart(
    preparer: Preparer, tmp_path: Path, pictures: list[str]
) -> None:
    rows = [{"image": name, "prompt": f"Is this {name}?", "answer": "yes"} for name in pictures]
    file = jsonl(tmp_path / "rows.jsonl", *rows)
    small = Preparer.from_directory(CHECKPOINT, preparer.config, max_pixels=56 * 56)
    digests = [load_dataset(file, preparer).digest(), load_dataset(file, small).digest()]
    for changed in (
        [rows[1], rows[0], rows[2]],
        rows[:2],
        [{**rows[0], "prompt": "Is that?"}, *rows[1:]],
        [{**rows[0], "answer": "no"}, *rows[1:]],
        [{"image": pictures[0], "prompt": rows[0]["prompt"]}, *rows[1:]],
    ):
        digests.append(load_dataset(jsonl(tmp_path / "changed.jsonl", *changed), preparer).digest())
    pixels = np.array(Image.open(tmp_path / pictures[2]))
    pixels[-1, -1, -1] ^= 1
    Image.fromarray(pixels).save(tmp_path / pictures[2])
    digests.append(load_dataset(file, preparer).digest())
    assert len(set(digests)) == len(digests) == 8


def test_the_digest_does_not_depend_on_names_and_places(
    preparer: Preparer, tmp_path: Path, pictures: list[str]
) -> None:
    first = jsonl(tmp_path / "rows.jsonl", {"image": pictures[0], "prompt": "What?", "kind": "a"})
    (tmp_path / "other").mkdir()
    second = jsonl(tmp_path / "other" / "x.jsonl", {"id": 1, "images": [f"../{pictures[0]}"], "prompt": "What?"})
    told: list[tuple[int, int, str]] = []
    digest = load_dataset(first, preparer).digest(lambda *report: told.append(report))
    assert digest == load_dataset(second, preparer).digest()
    assert len(digest) == 64
    assert told == [(1, 1, "rows.jsonl:1")]


def test_the_digest_tells_answers_grids_and_videos_apart(
    token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path
) -> None:
    """With the same pixel rows, and the same ids but for the placeholders."""
    config, shown, digests = token_preparer.config, golden("a_single_image").inputs, []
    video_ids = np.where(shown["input_ids"] == config.image_token_id, config.video_token_id, shown["input_ids"])
    turned = shown["image_grid_thw"][:, [0, 2, 1]]
    cases = [shown, {**shown, "answer_start": 40}, {**shown, "image_grid_thw": turned}]
    for grid in (shown["image_grid_thw"], turned):
        cases.append({"input_ids": video_ids, "pixel_values_videos": shown["pixel_values"], "video_grid_thw": grid})
    for arrays in cases:
        np.savez(tmp_path / "row.npz", **arrays)
        digests.append(load_dataset(tmp_path / "row.npz", token_preparer).digest())
    assert len(set(digests)) == 5


# The shipped set


def test_the_shipped_set(preparer: Preparer, shipped: Dataset) -> None:
    rows = [json.loads(line) for line in SHIPPED_CALIBRATION.read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line) for line in SHIPPED_EVALUATION.read_text(encoding="utf-8").splitlines()]
    assert shipped.source == "shipped calibration set"
    assert load_dataset(SHIPPED_EVALUATION, preparer).source == "shipped evaluation set"
    assert 64 <= len(shipped) == len(rows) <= 96
    assert {row["kind"] for row in rows} == {row["kind"] for row in held_out}
    assert sum(len(shown) == 2 for shown in shipped.media) >= 8
    files = [path for path in SHIPPED_CALIBRATION.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 450_000
    assert {str(p) for p in files if p.suffix == ".png"} == set(itertools.chain(*shipped.media))
    seen = {path.read_bytes() for path in (SHIPPED_EVALUATION.parent / "images").iterdir()}
    assert not seen & {path.read_bytes() for path in files}
    require_images(shipped)
    assert preparer.tokenizer is not None
    for raw, row in zip(rows, shipped, strict=True):
        assert preparer.tokenizer.decode(row.input_ids[row.answer_start :].tolist()) == raw["answer"]


# What is refused


QUESTION = b'{"image": "images/one.png", "prompt": "What?"'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'image': 1}", "is not JSON .*every line is one object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"prompt": "\xff"}', "is not UTF-8 .* at byte 12"),
        (b"[1, 2]", "is a JSON list, not an object"),
        (b'{"image": "images/one.png"}', 'has no "prompt"'),
        (b'{"image": "images/one.png", "prompt": null}', 'has no "prompt"'),
        (b'{"prompt": " "}', "\"prompt\" is ' '; it must be text"),
        (b'{"prompt": ["x"]}', '"prompt" is .*it must be text'),
        (QUESTION + b', "answer": 3}', "\"answer\" is '3'; it must be text"),
        (QUESTION + b', "images": []}', 'has both "image" and "images"'),
        (QUESTION + b', "messages": []}', 'has both "messages" and "image"'),
        (b'{"image": "images/none.png", "prompt": "x"}', r"image .*none\.png: no such file"),
        (b'{"image": "images", "prompt": "x"}', "this is a directory"),
        (b'{"image": "a\\u0000b.png", "prompt": "x"}', "no such file"),
        (b'{"image": "' + b"x" * 5000 + b'", "prompt": "x"}', "not a usable path"),
        (b'{"image": 5, "prompt": "x"}', "image is 5; it must be a path"),
        (b'{"image": "https://example.org/x.png", "prompt": "x"}', "https:// addresses are not fetched"),
        (b'{"video": "clip.mp4", "prompt": "x"}', r"video .*clip\.mp4: no such file"),
        (b'{"video": ["images/one.png", "images/no.png"], "prompt": "x"}', r"video .*no\.png: no such file"),
        (b'{"video": "images", "fps": 1, "nframes": 2, "prompt": "x"}', "both fps and nframes"),
        (b'{"messages": "x"}', "messages is 'x'; it must be a list"),
        (b'{"messages": [{"role": "user"}]}', r'messages\[0\] has no "content"'),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "its only message is the assistant's"),
        (
            b'{"answer": "y", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}',
            'has an "answer" and a last message of the assistant',
        ),
        (
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": '
            b'[{"type": "image", "image": "images/one.png"}]}]}',
            "must be text alone",
        ),
        (b'{"prompt": "<|image_pad|>"}', "marks the place of a medium"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_line_is_named_when_the_file_is_opened(
    preparer: Preparer, tmp_path: Path, pictures: list[str], line: bytes, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(OneVisionError, match=rf"rows\.jsonl:3: .*{message}") as refused:
        load_dataset(file, preparer)
    assert len(str(refused.value)) < 700


def test_a_huge_line_is_refused_unread(preparer: Preparer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with open(file, "wb") as sparse:
        sparse.write(b'{"prompt": "fine"}\n')
        sparse.truncate(1 << 36)
    with pytest.raises(OneVisionError, match=r"rows\.jsonl:2: is longer than 64 MiB"):
        load_dataset(file, preparer)


def bomb() -> bytes:
    """A PNG that says it has 30000 x 30000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = [header, b"IDAT" + zlib.compress(bytes(90_001)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [(bomb(), "900,000,000 pixels are over the limit"), (b"garbage", "not an image"), (None, "cannot be decoded")],
    ids=["30000x30000", "garbage", "truncated"],
)
def test_a_broken_image_is_named_when_its_row_is_read(
    preparer: Preparer, tmp_path: Path, pictures: list[str], body: bytes | None, message: str
) -> None:
    """Not before: opening a dataset reads no image."""
    broken = tmp_path / pictures[1]
    broken.write_bytes(broken.read_bytes()[:500] if body is None else body)
    file = jsonl(tmp_path / "rows.jsonl", *({"image": name, "prompt": "What?"} for name in pictures))
    dataset = load_dataset(file, preparer)
    assert [dataset[i].name for i in (0, 2)] == ["rows.jsonl:1", "rows.jsonl:3"]
    with pytest.raises(OneVisionError, match=rf"^rows\.jsonl:2: image .*two\.png: .*{message}"):
        dataset[1]
    with pytest.raises(OneVisionError, match=r"^rows\.jsonl:2: "):
        dataset.digest()


def test_an_answer_has_no_placeholder(preparer: Preparer, tmp_path: Path) -> None:
    dataset = load_dataset(jsonl(tmp_path / "rows.jsonl", {"prompt": "x", "answer": "<|video_pad|>"}), preparer)
    with pytest.raises(OneVisionError, match=r"rows\.jsonl:1: the answer contains a placeholder"):
        dataset[0]


def test_folders_that_are_not_a_dataset(preparer: Preparer, tmp_path: Path, pictures: list[str]) -> None:
    with pytest.raises(OneVisionError, match=r"holds no images and no \.npz files; subfolders are not searched"):
        load_dataset(tmp_path, preparer)
    images = tmp_path / "images"
    np.savez(images / "row.npz", input_ids=[1])
    with pytest.raises(OneVisionError, match=r"holds images and \.npz files; .*keep one kind"):
        load_dataset(images, preparer)
    (images / "row.npz").unlink()
    jsonl(images / "rows.jsonl", {"prompt": "x"})
    with pytest.raises(OneVisionError, match=r"holds images and \.jsonl files; .*name one, such as .*rows\.jsonl"):
        load_dataset(images, preparer)
    (images / "rows.jsonl").unlink()
    (images / "four.png").touch()
    with pytest.raises(OneVisionError, match=r"images: image .*four\.png: the file is empty"):
        load_dataset(images, preparer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "no such file or folder"),
        ("rows.csv", r"is no \.jsonl file, no \.npz file and no folder"),
        ("empty.jsonl", "has no rows"),
    ],
)
def test_other_sources_are_refused(preparer: Preparer, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text("image,prompt\n")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(OneVisionError, match=message):
        load_dataset(tmp_path / name, preparer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: load_dataset(None, p, samples=0), "samples is 0; at least one row"),
        (lambda p: load_dataset(None, p, samples=5, seed=-1), "seed is -1"),
        (lambda p: hold_out(load_dataset(None, p), 1.0), "the share held out is 1.0"),
        (lambda p: hold_out(load_dataset(None, p, samples=1)), "cannot be split"),
    ],
)
def test_impossible_choices_are_refused(preparer: Preparer, call: Any, message: str) -> None:
    with pytest.raises(OneVisionError, match=message):
        call(preparer)


def test_without_a_tokenizer_text_is_refused(token_preparer: Preparer, tmp_path: Path, pictures: list[str]) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", {"prompt": "x"})
    for source in (rows, tmp_path / "images", None):
        with pytest.raises(OneVisionError, match=r"has no tokenizer\.json, which text needs; give token-level rows"):
            load_dataset(source, token_preparer)


def test_text_alone_is_refused(
    preparer: Preparer, token_preparer: Preparer, golden: Callable[[str], Any], tmp_path: Path, pictures: list[str]
) -> None:
    text = jsonl(tmp_path / "text.jsonl", *({"prompt": f"How much is {n} + 1?", "images": []} for n in range(128)))
    with pytest.raises(OneVisionError, match=r"^text\.jsonl: none of its 128 rows has an image or a video; .*add rows"):
        require_images(load_dataset(text, preparer))
    np.savez(tmp_path / "text.npz", **golden("c_text_only").inputs)
    with pytest.raises(OneVisionError, match=r"^text\.npz: its one row does not have an image or a video"):
        require_images(load_dataset(tmp_path / "text.npz", token_preparer))
    (tmp_path / pictures[1]).write_bytes(b"no image is read to find out")
    rows = [{"prompt": "x"}, {"prompt": "y", "image": pictures[1]}]
    require_images(load_dataset(jsonl(tmp_path / "rows.jsonl", *rows), preparer))
