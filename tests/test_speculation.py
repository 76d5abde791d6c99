"""Drafts from the text: where they come from, that they change no answer, and what they may cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onevision_edge
from onevision_edge.runtime import generation
from onevision_edge.runtime.generation import Running, Timings
from onevision_edge.runtime.model import Model
from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.runtime.speculation import Drafting, Lookup, Match
from onevision_edge.runtime.token_model import Media

IMAGE, VIDEO, MAX_LENGTH = 505, 506, 256
NO_MEDIA = {"image": Media(None, None), "video": Media(None, None)}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "seed": 3},
    "filtered": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 4},
    "penalised": {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "all": {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "seed": 5},
}


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 490, length)


def lookup(ids: Sequence[int], never: Sequence[int] = ()) -> Lookup:
    return Lookup(np.array(ids, np.int64), 8, frozenset(never))


def run(model: Model, rows: Sequence[np.ndarray], eos: Sequence[int] = (), **options: Any) -> list[Running]:
    """Finished sequences of one batch."""
    prompts = model._embed(list(rows), NO_MEDIA)
    batch = [model._sequence(prompt, SamplingParams(**options), eos) for prompt in prompts]
    with model._loop(len(batch), prompts=[prompt.keys for prompt in prompts]) as loop:
        for _ in loop.steps(batch, Timings()):
            pass
    return batch


class Oracle:
    """Stands in for Lookup: drafts what the answer will be, with so many mistakes, and sometimes nothing."""

    answers: dict[tuple[int, ...], list[int]]
    mistakes: float

    def __init__(self, prompt_ids: np.ndarray, limit: int, never: Any) -> None:
        self.answer, self.said = self.answers[tuple(prompt_ids.tolist())], 0
        self.random = np.random.default_rng(len(prompt_ids))

    def push(self, token_id: int) -> None:
        assert token_id == self.answer[self.said]
        self.said += 1

    def match(self) -> Match | None:
        return Match(2, 0) if self.random.random() < 0.8 else None

    def draft(self, match: Match, count: int) -> list[int]:
        tokens = self.answer[self.said : self.said + int(self.random.integers(0, count + 1))]
        return [int(self.random.integers(0, 490)) if self.random.random() < self.mistakes else t for t in tokens]


@contextmanager
def oracle(monkeypatch: pytest.MonkeyPatch, answers: Sequence[tuple[np.ndarray, list[int]]], mistakes: float) -> Any:
    with monkeypatch.context() as patched:
        Oracle.answers, Oracle.mistakes = {tuple(ids.tolist()): said for ids, said in answers}, mistakes
        patched.setattr(generation, "Lookup", Oracle)
        yield


# Where drafts come from.


def test_the_longest_match_counts_and_the_last_of_several() -> None:
    assert lookup([1, 2, 3, 9, 1, 2, 3, 8, 7, 2, 3]).match() == Match(2, 7)
    assert lookup([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).match() == Match(3, 3)
    assert lookup([1, 2, 3, 9, 4, 3]).match() is None  # one token alone is none
    assert lookup([5]).match() is None
    assert lookup([5, 5]).match() is None
    assert lookup([5, 5, 5]).match() == Match(2, 2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_matches_are_those_of_a_plain_search(ids: list[int]) -> None:
    found = [
        Match(n, end)
        for n in range(2, 9)
        for end in range(n, len(ids))
        if len(ids) > n and ids[end - n : end] == ids[len(ids) - n :]
    ]
    assert lookup(ids).match() == (max(found) if found else None)


def test_a_draft_is_what_followed_and_its_period_goes_on() -> None:
    ids = lookup([1, 2, 3, 4, 5, 1, 2])
    match = ids.match()
    assert match == Match(2, 2)
    assert ids.draft(match, 4) == [3, 4, 5, 1]
    assert ids.draft(match, 8) == [3, 4, 5, 1, 2, 3, 4, 5]
    assert ids.draft(match, 0) == []


def test_placeholders_are_no_draft() -> None:
    ids = lookup([1, 2, 3, IMAGE, IMAGE, 4, 1, 2], [IMAGE, VIDEO])
    match = ids.match()
    assert match is not None
    assert ids.draft(match, 5) == [3]


def test_pushed_tokens_are_found() -> None:
    ids = lookup([1, 2, 3, 4])
    for token in (7, 1, 2):
        ids.push(token)
    assert ids.match() == Match(2, 2)


# Answers.


@pytest.mark.parametrize("mistakes", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_drafts_change_no_answer(
    golden_model: Model, monkeypatch: pytest.MonkeyPatch, name: str, mistakes: float
) -> None:
    """Right drafts, some that are wrong somewhere, and wrong ones; log-probabilities too."""
    ids, options = text(12), {"max_tokens": 60, "logprobs": 2, **OPTIONS[name]}
    (plain,) = run(golden_model, [ids], speculate=0, **options)
    with oracle(monkeypatch, [(ids, plain.token_ids)], mistakes):
        (drafted,) = run(golden_model, [ids], speculate=5, **options)
    assert drafted.token_ids == plain.token_ids
    assert drafted.finish_reason == plain.finish_reason == "length"
    assert [t.token_id for t in drafted.logprobs] == plain.token_ids
    np.testing.assert_allclose([t.logprob for t in drafted.logprobs], [t.logprob for t in plain.logprobs], atol=1e-4)
    assert plain.drafted == 0
    assert drafted.drafted > 30
    assert {0.0: drafted.accepted == drafted.drafted, 1.0: drafted.accepted <= 3}.get(mistakes, True)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 8}], ids=["greedy", "sampled"])
def test_drafts_of_several_lengths_in_a_batch(
    golden_model: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Sequences finish at several times; one is full from the start, so that drafts stop where its neighbours end."""
    rows = [text(5), text(40, 1), text(MAX_LENGTH - 30, 2), text(MAX_LENGTH, 3)]
    plain = run(golden_model, rows, max_tokens=50, speculate=0, **options)
    answers = [(row, s.token_ids) for row, s in zip(rows, plain, strict=True)]
    with oracle(monkeypatch, answers, 0.2):
        drafted = run(golden_model, rows, max_tokens=50, speculate=4, **options)
    assert [s.token_ids for s in drafted] == [s.token_ids for s in plain]
    assert [len(s.token_ids) for s in drafted] == [50, 50, 31, 1]
    assert sum(s.accepted for s in drafted) > 20


def test_an_end_token_ends_the_answer_inside_a_draft(golden_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(7)
    (free,) = run(golden_model, [ids], max_tokens=20, speculate=0)
    end = free.token_ids[9]
    expected = free.token_ids[: free.token_ids.index(end)]
    with oracle(monkeypatch, [(ids, free.token_ids)], 0.0):
        (ended,) = run(golden_model, [ids], [end], max_tokens=20, speculate=7)
    assert (ended.token_ids, ended.end_token_id, ended.finish_reason) == (expected, end, "stop")
    assert ended.cached == len(ids) + len(expected)


@pytest.mark.parametrize("room", [0, 1, 5, 9])
def test_drafts_end_where_the_cache_does(golden_model: Model, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    ids = text(MAX_LENGTH - room)
    (plain,) = run(golden_model, [ids], max_tokens=50, speculate=0)
    with oracle(monkeypatch, [(ids, plain.token_ids)], 0.1):
        (drafted,) = run(golden_model, [ids], max_tokens=50, speculate=8)
    assert drafted.token_ids == plain.token_ids
    assert len(plain.token_ids) == room + 1


def test_repeated_text_is_drafted_from(golden_model: Model) -> None:
    """The model's own greedy answer, asked for again behind itself, and its loops."""
    (first,) = run(golden_model, [text(10, 4)], max_tokens=80, speculate=0)
    ids = np.array(first.token_ids)
    (plain,) = run(golden_model, [ids], max_tokens=100, speculate=0)
    for speculate in (1, 3, 16, None):
        (drafted,) = run(golden_model, [ids], max_tokens=100, speculate=speculate)
        assert drafted.token_ids == plain.token_ids
        assert 0 <= drafted.accepted <= drafted.drafted


def test_draws_have_the_same_distribution(golden_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drafted: the tokens of 100 seeds, none of which a draft moves."""
    ids, options = text(6), {"temperature": 2.0, "max_tokens": 3}
    plain = [run(golden_model, [ids], speculate=0, seed=seed, **options)[0].token_ids for seed in range(100)]
    monkeypatch.setattr(Lookup, "match", lambda self: Match(2, 1))
    monkeypatch.setattr(Lookup, "draft", lambda self, match, count: [plain[0][1], plain[0][2]][:count])
    drafted = [run(golden_model, [ids], speculate=2, seed=seed, **options)[0] for seed in range(100)]
    assert [s.token_ids for s in drafted] == plain
    assert all(s.drafted for s in drafted)


def test_the_chat_reports_drafts_and_stops_inside_one(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path_factory.mktemp("speculation") / "bundle"
    onevision_edge.export("demo", bundle, dtype="fp32", max_length=512)
    model = onevision_edge.load(bundle, threads=1)
    asked = [{"role": "user", "content": "one two three one two three one two three"}]
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    plain = model.generate(asked, speculate=0, **options)
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    ids = model.prepared(asked).prompt.ids
    with oracle(monkeypatch, [(ids, plain.token_ids)], 0.0):
        drafted = model.generate(asked, speculate=6, **options)
    assert drafted.token_ids == plain.token_ids
    assert 0 < drafted.accepted_tokens == drafted.drafted_tokens < 24
    stop = next(plain.text[i : i + 3] for i in range(4, len(plain.text)))
    cut = model.generate(asked, speculate=0, stop=stop, **options)
    with oracle(monkeypatch, [(ids, plain.token_ids)], 0.0):
        stopped = model.generate(asked, speculate=6, stop=stop, **options)
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == (cut.text, cut.token_ids, "stop")


def test_engines_of_one_row_of_logits_draft_nothing(golden_bundle: Callable[[str], Path]) -> None:
    model = onevision_edge.load(golden_bundle("fp32"), threads=1)
    graph = type("Limited", (type(model._graphs["decoder"]),), {"logits_per_call": 1})
    model._graphs["decoder"].__class__ = graph
    (sequence,) = run(model, [np.tile(text(8), 4)], max_tokens=20, speculate=4)
    assert sequence.drafted == 0
    model._graphs["decoder"].__class__ = type("Wider", (graph,), {"logits_per_call": 3})
    (sequence,) = run(model, [np.tile(text(8), 4)], max_tokens=20, speculate=4)
    assert sequence.drafted > 0


# When they pay.


def pretend(drafting: Drafting, steps: int, cost: dict[int, float], right: Callable[[int], int]) -> Iterator[float]:
    """Steps of a sequence that always has a match, in plain steps: the time of each over its tokens, one by one."""
    for _ in range(steps):
        match = Match(2, 0)
        size = drafting.size([match], 1, 16)
        if size == 1:
            drafting.stepped(0.02)
            yield 1.0
            continue
        found = min(right(size - 1), size - 1)
        drafting.verified(size, 0.02 * cost[size], 1, [(match, found, min(found + 1, size - 1))])
        yield cost[size] / (1 + found)


CHEAP, DEAR = {4: 1.2, 8: 1.35, 16: 1.65}, {4: 2.5, 8: 4.0, 16: 8.0}


@pytest.mark.parametrize("cost", [CHEAP, DEAR])
def test_drafts_that_are_never_right_cost_two_steps_and_one_percent(cost: dict[int, float]) -> None:
    times = list(pretend(Drafting(), 2000, cost, lambda count: 0))
    assert sum(times) - len(times) < 2 + 0.01 * len(times) + cost[4] - 1
    assert sum(t > 1 for t in times[1000:]) >= 3  # now and then it looks again


def test_right_drafts_grow_to_the_largest_call() -> None:
    drafting = Drafting()
    times = list(pretend(drafting, 60, CHEAP, lambda count: count))
    assert times[0] == 1.0  # what a step takes is not known yet
    assert times[-1] == pytest.approx(CHEAP[16] / 16)
    assert drafting.size([Match(2, 0)], 1, 9) == 8
    assert drafting.size([Match(2, 0)], 1, 3) == 1
    assert drafting.size([], 1, 16) == 1


def test_calls_that_take_as_long_as_their_tokens_are_not_made() -> None:
    times = list(pretend(Drafting(), 1000, {size: float(size) for size in (4, 8, 16)}, lambda count: 1))
    assert sum(t == 1.0 for t in times) > 980


def test_it_starts_again_when_the_text_does() -> None:
    drafting, random = Drafting(), np.random.default_rng(0)
    wrong = list(pretend(drafting, 500, CHEAP, lambda count: 0))
    right = list(pretend(drafting, 500, CHEAP, lambda count: int(random.geometric(0.1))))
    again = list(pretend(drafting, 500, CHEAP, lambda count: 0))
    assert sum(right[200:]) < 0.5 * 300
    assert sum(wrong) < 1.02 * 500
    assert sum(again) < 1.02 * 500
