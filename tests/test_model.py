"""Chat on a bundle: media in any order, batches, streaming, sampling, stop strings, errors."""

import base64
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.model import Model

IMAGES = Path(__file__).parent / "data" / "golden" / "images"
LARGE, SMALL = IMAGES / "a_single_image_img0.png", IMAGES / "b_two_images_img1.png"
FRAMES = sorted(IMAGES.glob("d_video_frame*.png"))
QUESTION = "How many digits are there?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The shipped model in FP32."""
    bundle = tmp_path_factory.mktemp("model") / "bundle"
    onevision_edge.export("demo", bundle, dtype="fp32", max_length=1024)
    return onevision_edge.load(bundle, threads=1)


def user(*content: Any) -> list[dict[str, Any]]:
    """One turn: paths and PIL images are images, other strings text."""
    items = [
        {"type": "text", "text": c}
        if isinstance(c, str)
        else c
        if isinstance(c, dict)
        else {"type": "image", "image": c}
        for c in content
    ]
    return [{"role": "user", "content": items}]


def test_every_spelling_of_an_image_gives_the_same_answer(model: Model) -> None:
    raw = LARGE.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    picture = Image.open(LARGE).convert("RGB")
    spellings = (LARGE, str(LARGE), raw, picture, np.asarray(picture))
    answers = [model.generate(user({"type": "image", "image": s}, QUESTION), max_tokens=8) for s in spellings]
    answers.append(model.generate(user({"type": "image_url", "image_url": {"url": url}}, QUESTION), max_tokens=8))
    assert len({tuple(a.token_ids) for a in answers}) == 1
    assert len({a.prompt_tokens for a in answers}) == 1


def test_images_stand_where_the_message_put_them(model: Model) -> None:
    """Each placeholder run has its own image's length, in order, with the text between."""
    content = user("first", LARGE, "then", SMALL, "which?")
    prepared = model.prepared(content)
    runs = np.flatnonzero(np.diff(np.r_[0, prepared.prompt.ids == model.config.image_token_id, 0]))
    lengths = (runs[1::2] - runs[::2]).tolist()
    tokens = [int(np.prod(model.processor([path])[1])) // 4 for path in (LARGE, SMALL)]
    assert lengths == tokens
    for path, start in zip((LARGE, SMALL), runs[::2], strict=True):
        alone = model.encode_images(*model.processor([path]))
        np.testing.assert_allclose(prepared.prompt.embeds[start : start + len(alone)], alone, atol=1e-5)


def test_answer_counts_and_timings(model: Model) -> None:
    answer = model.generate(user(LARGE, QUESTION), max_tokens=8)
    assert str(answer) == answer.text
    assert answer.image_tokens == int(np.prod(model.processor([LARGE])[1])) // 4
    assert answer.prompt_tokens > answer.image_tokens
    assert answer.finish_reason in ("stop", "length")
    t = answer.timings
    assert t.time_to_first_token == t.preprocess + t.vision_encoding + t.prepare_embeddings + t.prefill > 0


def test_pixel_limits_change_the_tokens_an_image_takes(model: Model) -> None:
    counts = [
        model.generate(user(LARGE, QUESTION), max_tokens=1, max_pixels=limit).image_tokens
        for limit in (28 * 28, 28 * 280)
    ]
    assert counts[0] == 1
    assert counts[0] < counts[1] <= 10
    assert (
        model.generate(user(SMALL, QUESTION), max_tokens=1, min_pixels=300_000, max_pixels=400_000).image_tokens > 380
    )


@pytest.mark.parametrize("video", [FRAMES, IMAGES], ids=["frames", "directory"])
def test_a_video_is_its_frames(model: Model, video: Any, tmp_path: Path) -> None:
    if video is IMAGES:
        for frame in FRAMES:
            (tmp_path / frame.name).write_bytes(frame.read_bytes())
        video = tmp_path
    item = {"type": "video", "video": str(video) if isinstance(video, Path) else [str(f) for f in video]}
    answer = model.generate(user(item, QUESTION), max_tokens=4)
    assert answer.image_tokens == 3 * int(np.prod(model.processor([FRAMES[0]])[1])) // 4


def test_a_batch_answers_as_each_alone(model: Model) -> None:
    conversations = [
        user(LARGE, QUESTION),
        user("Hello"),
        user(SMALL, LARGE, "Which image has the larger number?"),
        user(SMALL, "List the digits from left to right."),
    ]
    alone = [model.generate(messages, max_tokens=12) for messages in conversations]
    together = model.generate(conversations, max_tokens=12)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]


def test_streamed_pieces_join_to_the_answer(model: Model) -> None:
    messages = user(LARGE, "List the digits from left to right.")
    pieces = list(model.stream(messages, max_tokens=16))
    answer = model.generate(messages, max_tokens=16)
    assert "".join(pieces) == answer.text
    assert [piece.generation is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert pieces[-1].generation.token_ids == answer.token_ids  # type: ignore[union-attr]


def test_abandoning_a_stream_harms_nobody(model: Model) -> None:
    messages = user(LARGE, "List the digits from left to right.")
    expected = model.generate(messages, max_tokens=8).text
    stream = model.stream(messages, max_tokens=8)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert model.generate(messages, max_tokens=8).text == expected


def test_stop_string_ends_the_answer_before_it(model: Model) -> None:
    messages = user(LARGE, "List the digits from left to right.")
    whole = model.generate(messages, max_tokens=16)
    assert len(whole.text) > 2
    stop = whole.text[1:3]
    cut = model.generate(messages, max_tokens=16, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert "".join(model.stream(messages, max_tokens=16, stop=[stop])) == cut.text


def test_seeded_sampling_repeats_and_differs_from_greedy(model: Model) -> None:
    messages = user(LARGE, "List the digits from left to right.")
    options = {"max_tokens": 12, "temperature": 3.0, "ignore_eos": True}
    draws = [model.generate(messages, seed=seed, **options).token_ids for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws}) == 3


def test_placeholders_are_never_generated(model: Model) -> None:
    """At a temperature that flattens everything, 400 draws over 512 ids would hit one of two with p = 0.79."""
    options = {"max_tokens": 400, "temperature": 1e6, "ignore_eos": True, "seed": 5}
    ids = set(model.generate(user("Hello"), **options).token_ids)
    assert len(ids) > 200
    assert not ids & {model.config.image_token_id, model.config.video_token_id}


def test_logprobs_are_those_of_the_logits(model: Model) -> None:
    answer = model.generate(user("How many digits are there?"), max_tokens=3, logprobs=3)
    assert answer.logprobs is not None
    first = answer.logprobs[0]
    ids = model.prepared(user("How many digits are there?")).prompt.ids
    logits = model.logits(ids[None])[0, -1].astype(np.float64)
    logits[[model.config.image_token_id, model.config.video_token_id]] = -math.inf
    exact = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert first.logprob == pytest.approx(exact[first.token_id], abs=1e-4)
    assert [i for i, _ in first.top] == np.argsort(-exact, kind="stable")[:3].tolist()


def test_a_conversation_goes_on(model: Model) -> None:
    first = user(LARGE, QUESTION)
    answer = model.generate(first, max_tokens=8)
    longer = [*first, {"role": "assistant", "content": answer.text}, *user("And now?")]
    assert model.generate(longer, max_tokens=2).prompt_tokens > answer.prompt_tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([]), "messages"),
        (lambda m: m.generate(user({"type": "image"})), r"messages\[0\].content\[0\]"),
        (lambda m: m.generate(user("x"), max_token=3), "unknown option max_token; known: "),
        (lambda m: m.generate(user("x"), temperature="hot"), "temperature is 'hot'"),
        (lambda m: m.generate(user("<|image_pad|>")), "image_pad"),
        (lambda m: m.generate(user({"type": "image", "image": "https://example.org/x.png"})), "http"),
        (lambda m: m.generate(user("word " * 3000)), r"the prompt has \d+ tokens; this bundle holds 1024"),
        (lambda m: m.generate(user(*[LARGE] * 60)), r"the prompt has \d+ tokens; this bundle holds 1024"),
        (lambda m: m.generate(user(LARGE), min_pixels=100, max_pixels=50), "min_pixels 100 is above max_pixels 50"),
    ],
)
def test_mistakes_are_named(model: Model, call: Callable[[Model], Any], message: str) -> None:
    with pytest.raises(OneVisionError, match=message):
        call(model)


def test_a_bundle_without_tokenizer_serves_the_token_level(golden_model: Model) -> None:
    with pytest.raises(OneVisionError, match=r"has no tokenizer\.json"):
        golden_model.generate(user("x"))
    assert golden_model.generate_ids(np.array([[1, 2, 3]]), max_tokens=2, eos_token_id=[]).shape == (1, 2)


def test_an_image_too_large_for_this_machine_is_refused_with_a_limit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onevision_edge.runtime.backend.memory_field", lambda name: 10_000_000)
    image = Image.new("RGB", (700, 700))
    with pytest.raises(OneVisionError, match=r"needs .* for its attention.*max_pixels=(\d+)") as refused:
        model.generate(user(image, QUESTION), max_pixels=700 * 700)
    limit = int(str(refused.value).split("max_pixels=")[1].split()[0])
    assert model.generate(user(image, QUESTION), max_pixels=limit, max_tokens=1).image_tokens > 0
