"""KV caches that go on where an earlier call ended: what counts as the same beginning, and that no answer changes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import default_plan
from onevision_edge.runtime.model import Model
from onevision_edge.runtime.prefix import HeldCache, IdleCaches, Keys, media_keys, shared, text_keys

PHOTO = Path(onevision_edge.__file__).parent / "demo" / "images" / "photo.jpg"
FIRST, SECOND = "List all digits from left to right.", "How many digits are there?"
MAX_LENGTH = 512


def user(*content: Any) -> dict[str, Any]:
    """A turn: paths and PIL images are images, strings text."""
    items = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": "user", "content": items}


def said(answer: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": answer.text}


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 490, length)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The shipped model, floats or INT8 with an INT8 cache."""
    root = tmp_path_factory.mktemp("prefix")

    def made(name: str) -> Path:
        if not (root / name).exists() and name == "int8":
            plan = default_plan("int8", "fp32", kv_cache="int8")
            options: dict[str, Any] = {"calibration_samples": 16, "evaluate": False, "max_length": MAX_LENGTH}
            onevision_edge.quantize("demo", root / name, plan=plan, **options)
        elif not (root / name).exists():
            onevision_edge.export("demo", root / name, dtype=name, max_length=MAX_LENGTH)
        return root / name

    return made


@pytest.fixture(scope="module")
def models(bundle: Callable[[str], Path]) -> Callable[..., Model]:
    """A model anew, so that its caches are empty."""
    return lambda name="fp32", **options: onevision_edge.load(bundle(name), threads=1, **options)


# Keys.


def test_keys_tell_images_and_text_apart() -> None:
    one, other = bytes(16), bytes(15) + b"\1"
    assert media_keys([one, other], [2, 3]).shape == (5, 2)
    assert shared(media_keys([one], [4]), media_keys([one], [6])) == 4
    assert shared(media_keys([one], [4]), media_keys([other], [4])) == 0
    assert shared(media_keys([one], [1]), text_keys([0])) == 0
    assert media_keys([], []).shape == text_keys([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 2, 4, 5], 2), ([1], [2], 0), ([], [1], 0), ([1, 2], [1, 2, 3], 2)],
)
def test_what_is_shared_is_the_beginning(one: list[int], other: list[int], count: int) -> None:
    assert shared(text_keys(one), text_keys(other)) == count


# Which cache a call takes.


def held(*keys: Sequence[int]) -> HeldCache:
    decoder: Any = SimpleNamespace(cache=SimpleNamespace(batch=len(keys)))
    return HeldCache(decoder, [decoder], [text_keys(k) for k in keys])


def taken(caches: IdleCaches, *prompts: Sequence[int]) -> HeldCache | None:
    made: list[None] = []
    found = caches.take(len(prompts), [text_keys(p) for p in prompts], lambda: made.append(None) or held(*prompts))  # type: ignore[func-returns-value]
    return None if made else found


def test_the_cache_that_shares_most_is_taken() -> None:
    caches, one, other = IdleCaches(2), held([1, 2, 3, 4]), held([1, 2, 5, 6])
    caches.give(one)
    caches.give(other)
    assert taken(caches, [1, 2, 5, 6, 7]) is other
    caches.give(other)
    assert taken(caches, [1, 2, 3, 4, 7]) is one
    caches.give(one)
    assert taken(caches, [9]) is other  # the oldest, where nothing is shared


def test_a_conversation_is_not_lost_while_there_is_room() -> None:
    caches, one = IdleCaches(2), held([1, 2, 3, 4, 5, 6])
    caches.give(one)
    assert taken(caches, [1, 2, 9]) is None
    caches.give(held([1, 2, 9]))
    assert len(caches) == 2
    assert taken(caches, [1, 2, 3, 4, 5, 6, 7]) is one


def test_other_batches_give_way_where_there_is_no_room() -> None:
    caches = IdleCaches(1)
    caches.give(held([1], [2]))
    assert taken(caches, [1]) is None
    assert len(caches) == 0


def test_no_more_than_are_wanted_are_kept() -> None:
    caches = IdleCaches(2)
    for i in range(4):
        caches.give(held([i]))
    assert len(caches) == 2
    none = IdleCaches(0)
    none.give(held([1, 2, 3]))
    found = taken(none, [1, 2, 3, 4])  # the memory is used again, what is in it is not
    assert found is not None
    assert [len(keys) for keys in found.keys] == [0]


# Answers.


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_turns_of_a_conversation_go_on(models: Callable[..., Model], name: str) -> None:
    """Three turns about an image; with caches and drafts and without, greedy ids are the same."""
    model, plain = models(name), models(name, prefix_caches=0, image_cache=0)
    messages: list[dict[str, Any]] = []
    known = 0
    for number, question in enumerate((FIRST, SECOND, "What color is the 4?")):
        messages.append(user(PHOTO, question) if not number else user(question))
        answer = model.generate(messages, max_tokens=64, speculate=4)
        expected = plain.generate(messages, max_tokens=64, speculate=0)
        assert answer.token_ids == expected.token_ids
        assert (expected.cached_tokens, expected.cached_image_tokens) == (0, 0)
        if number:
            assert answer.cached_tokens > known - 3  # all but the last token and what follows the turn
            assert answer.cached_image_tokens == answer.image_tokens > 0
        known = answer.prompt_tokens + len(answer.token_ids)
        messages.append(said(answer))


def test_another_image_of_the_same_size_shares_what_is_before_it(models: Callable[..., Model]) -> None:
    model, plain = models(), models(prefix_caches=0)
    mirrored = ImageOps.mirror(Image.open(PHOTO).convert("RGB"))
    for image in (PHOTO, mirrored, PHOTO):
        answer, expected = (m.generate([user(image, FIRST)], max_tokens=48) for m in (model, plain))
        assert answer.token_ids == expected.token_ids
        assert answer.cached_tokens < answer.prompt_tokens - answer.image_tokens
    again = model.generate([user(PHOTO, SECOND)], max_tokens=8)
    assert again.cached_tokens > again.image_tokens
    assert again.token_ids == plain.generate([user(PHOTO, SECOND)], max_tokens=8).token_ids


def test_the_same_prompt_again_is_one_token_of_prefill(models: Callable[..., Model]) -> None:
    model = models()
    first, second = (model.generate([user(PHOTO, FIRST)], max_tokens=48) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert (first.cached_tokens, second.cached_tokens) == (0, second.prompt_tokens - 1)
    assert second.timings.prefill < first.timings.prefill


@pytest.mark.parametrize("options", [{"temperature": 1.5, "seed": 2}, {"repetition_penalty": 1.4, "logprobs": 1}])
def test_sampling_is_the_same_behind_a_shared_beginning(models: Callable[..., Model], options: dict[str, Any]) -> None:
    """Penalties count the tokens of the whole prompt, those that were cached too."""
    model = models()
    first = model.generate([user(PHOTO, FIRST)], max_tokens=30, **options)
    second = model.generate([user(PHOTO, FIRST)], max_tokens=30, **options)
    assert second.cached_tokens == second.prompt_tokens - 1
    assert first.token_ids == second.token_ids


def test_each_sequence_of_a_batch_goes_on(models: Callable[..., Model]) -> None:
    model, plain = models(), models(prefix_caches=0)
    turns = [[user(PHOTO, FIRST)], [user("Hello")], [user(PHOTO, SECOND)]]
    for turn in range(2):
        found, wanted = (m.generate(turns, max_tokens=40) for m in (model, plain))
        assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
        assert [a.cached_tokens > 0 for a in found] == [bool(turn)] * 3
        turns = [[*t, said(a), user(SECOND)] for t, a in zip(turns, found, strict=True)]


def test_two_conversations_in_turns(models: Callable[..., Model]) -> None:
    """With a cache for each, both go on; with one, the later takes the place of the other."""
    for caches, going_on in ((2, True), (1, False)):
        model = models(prefix_caches=caches)
        one, other = [user(PHOTO, FIRST)], [user("Tell me about the weather in any number of words.")]
        for turn in range(2):
            counts = []
            for talk in (one, other):
                answer = model.generate(talk, max_tokens=16)
                talk += [said(answer), user(SECOND)]
                counts.append(answer.cached_tokens > 0.6 * answer.prompt_tokens)
            assert counts == [bool(turn) and going_on] * 2
        assert len(model._idle) == caches


def test_an_abandoned_answer_leaves_what_it_had_written(models: Callable[..., Model]) -> None:
    model, messages = models(), [user(PHOTO, FIRST)]
    expected = model.generate(messages, max_tokens=48)
    other = models()
    stream = other.stream(messages, max_tokens=48)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    answer = other.generate(messages, max_tokens=48)
    assert answer.token_ids == expected.token_ids
    assert answer.cached_tokens == answer.prompt_tokens - 1


def test_a_call_that_fails_leaves_what_is_sound(golden_bundle: Callable[[str], Path]) -> None:
    model = onevision_edge.load(golden_bundle("fp32"), threads=1)
    ids = text(60)
    expected = model.generate_ids(ids, max_tokens=8, eos_token_id=[]).tolist()
    changed = np.concatenate([ids[:20], text(40, 1)])
    run, calls = model._graphs["decoder"].session.run_with_iobinding, []

    class Failing:
        def run_with_iobinding(self, *arguments: Any) -> None:
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("out of luck")
            run(*arguments)

    session, model._graphs["decoder"].session = model._graphs["decoder"].session, Failing()
    with pytest.raises(OneVisionError, match="out of luck"):
        model.generate_ids(changed, max_tokens=8, prefill_chunk=8)
    model._graphs["decoder"].session = session
    assert model._idle._held[0].keys[0][:, 0].tolist() == ids[:20].tolist()
    assert model.generate_ids(ids, max_tokens=8, eos_token_id=[]).tolist() == expected


def test_logits_take_the_cache_and_leave_nothing_in_it(golden_bundle: Callable[[str], Path]) -> None:
    model = onevision_edge.load(golden_bundle("fp32"), threads=1)
    expected = model.generate_ids(text(30), max_tokens=8, eos_token_id=[]).tolist()
    model.logits(text(25, 1))
    assert len(model._idle._held[0].keys[0]) == 0
    assert model.generate_ids(text(30), max_tokens=8, eos_token_id=[]).tolist() == expected


def test_keys_are_those_of_the_rows(golden_bundle: Callable[[str], Path]) -> None:
    """Prompt and answer but for its last token, which was not written."""
    model = onevision_edge.load(golden_bundle("fp32"), threads=1)
    answer = model.generate_ids(text(30), max_tokens=8, eos_token_id=[])[0]
    keys: Keys = model._idle._held[0].keys[0]
    np.testing.assert_array_equal(keys[:, 0], [*text(30), *answer[:-1]])


@pytest.mark.parametrize("value", [-1, 1.5, "many"])
def test_bad_options(bundle: Callable[[str], Path], value: Any) -> None:
    for name in ("prefix_caches", "image_cache"):
        with pytest.raises(OneVisionError, match=f"{name} is {value}; it must be a whole number from 0"):
            onevision_edge.load(bundle("fp32"), **{name: value})
