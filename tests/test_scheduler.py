"""The scheduler: many requests at a time are answered as each would be alone."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.model import Model
from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.runtime.scheduler import (
    ChatRequest,
    ClosingError,
    Event,
    Failed,
    Finished,
    Piece,
    QueueFullError,
    Scheduler,
    Ticket,
)
from onevision_edge.runtime.slots import Slots

IMAGES = Path(onevision_edge.__file__).parent / "demo" / "evaluation" / "images"


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, Piece):
            self.ended.set()

    def answer(self) -> Finished:
        assert self.ended.wait(60)
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return last

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


def asked(text: str, *images: str) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": str(IMAGES / name)} for name in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scheduler") / "b"
    onevision_edge.export("demo", out, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return onevision_edge.load(bundle, threads=1)


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Callable[..., Any]:
    """Answers of a model that has seen nothing before."""
    plain = onevision_edge.load(bundle, threads=1, image_cache=0, prefix_caches=0)
    return lambda messages, **options: plain.generate(messages, **options)


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(model, slots=4, queue=32, piece=32)
    made.start()
    yield made
    made.stop()


def conversations() -> list[list[dict[str, Any]]]:
    names = sorted(path.name for path in IMAGES.iterdir())[:12]
    questions = ("What is in the image?", "How many digits are there?", "List all digits from left to right.")
    shown = [asked(questions[i % 3], name) for i, name in enumerate(names)]
    return [*shown, asked("What is in the image?", *names[:2]), asked("How many digits are there?")]


def test_many_at_a_time_are_answered_as_each_alone(scheduler: Scheduler, alone: Callable[..., Any]) -> None:
    heard = [Heard() for _ in conversations()]
    for messages, one in zip(conversations(), heard, strict=True):
        scheduler.submit(ChatRequest(messages, SamplingParams(max_tokens=24)), one)
    for messages, one in zip(conversations(), heard, strict=True):
        answer, wanted = one.answer().generation, alone(messages, max_tokens=24)
        assert answer.token_ids == wanted.token_ids
        assert (answer.text, answer.finish_reason) == (wanted.text, wanted.finish_reason)
        assert one.text == answer.text
        assert answer.prompt_tokens == wanted.prompt_tokens
    stats = scheduler.stats
    assert (stats.finished, stats.running, stats.waiting, stats.failed) == (len(heard), 0, 0, 0)
    assert stats.decoded_tokens >= stats.steps
    assert stats.generated_tokens == sum(len(one.answer().generation.token_ids) for one in heard)


def test_sequences_share_steps(scheduler: Scheduler) -> None:
    heard = [Heard() for _ in range(4)]
    for one in heard:
        scheduler.submit(ChatRequest(asked("Go on."), SamplingParams(max_tokens=400, ignore_eos=True)), one)
    assert all(len(one.answer().generation.token_ids) == 400 for one in heard)
    assert scheduler.stats.decoded_tokens == 4 * 399
    assert scheduler.stats.steps < 2 * 399


def test_sampled_answers_follow_their_seeds(scheduler: Scheduler, alone: Callable[..., Any]) -> None:
    messages = asked("What is in the image?", "000a.png")
    options: list[dict[str, Any]] = [{"temperature": 1.5, "seed": seed, "max_tokens": 12} for seed in range(6)]
    heard = [Heard() for _ in options]
    for each, one in zip(options, heard, strict=True):
        scheduler.submit(ChatRequest(messages, SamplingParams(**each)), one)
    found = [one.answer().generation.token_ids for one in heard]
    assert found == [alone(messages, **each).token_ids for each in options]
    assert len({tuple(ids) for ids in found}) > 1


def test_a_next_turn_starts_behind_what_it_shares(scheduler: Scheduler, alone: Callable[..., Any]) -> None:
    first, second = Heard(), Heard()
    messages = asked("What is in the image?", "001a.png")
    scheduler.submit(ChatRequest(messages), first)
    answer = first.answer().generation
    longer = [*messages, {"role": "assistant", "content": answer.text}, *asked("How many digits are there?")]
    others = [Heard() for _ in range(2)]
    for one, name in zip(others, ("002a.png", "003a.png"), strict=False):
        scheduler.submit(ChatRequest(asked("What is in the image?", name)), one)
        one.answer()
    scheduler.submit(ChatRequest(longer), second)
    found = second.answer().generation
    assert found.cached_tokens >= answer.prompt_tokens
    assert found.cached_image_tokens == found.image_tokens > 0
    assert found.token_ids == alone(longer).token_ids
    assert scheduler.stats.cached_tokens >= found.cached_tokens


def test_a_long_prompt_lets_others_go_on(model: Model) -> None:
    scheduler = Scheduler(model, slots=2, piece=16)
    order: list[str] = []

    def note(name: str) -> Callable[[Event], None]:
        def listener(event: Event) -> None:
            order.append(name)
            if not isinstance(event, Piece):
                ended.release()

        return listener

    ended = threading.Semaphore(0)
    params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0)  # so that every token is told
    scheduler.submit(ChatRequest(asked("Tell me a story."), params), note("short"))
    words = " ".join(["How many digits are there?"] * 60)
    scheduler.submit(ChatRequest(asked(words), SamplingParams(max_tokens=2, ignore_eos=True, logprobs=0)), note("long"))
    scheduler.start()
    assert ended.acquire(timeout=60)
    assert ended.acquire(timeout=60)
    scheduler.stop()
    assert order.index("long") > 10  # the short one got tokens while the long prompt was read


def test_a_cancelled_request_frees_its_slot(model: Model) -> None:
    scheduler = Scheduler(model, slots=1, queue=8)
    begun, heard, behind = threading.Event(), list[Event](), Heard()

    def listener(event: Event) -> None:
        heard.append(event)
        begun.set()

    scheduler.start()
    endless = SamplingParams(max_tokens=4000, ignore_eos=True)
    ticket = scheduler.submit(ChatRequest(asked("Go on."), endless), listener)
    assert begun.wait(30)
    waiting = scheduler.submit(ChatRequest(asked("Never.")), listener)
    scheduler.submit(ChatRequest(asked("What is in the image?", "000a.png")), behind)
    scheduler.cancel(waiting)
    scheduler.cancel(ticket)
    count = len(heard)
    assert behind.answer().generation.text
    assert len(heard) <= count + 1
    assert not any(isinstance(event, Finished | Failed) for event in heard)
    assert (scheduler.stats.cancelled, scheduler.stats.finished) == (2, 1)
    scheduler.cancel(ticket)  # again, and it is over: nothing happens
    assert scheduler.stats.cancelled == 2
    scheduler.stop()


def test_a_full_queue_says_when_to_come_again(model: Model) -> None:
    scheduler = Scheduler(model, slots=1, queue=2)
    for _ in range(2):
        scheduler.submit(ChatRequest(asked("One.")), Heard())
    with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
        scheduler.submit(ChatRequest(asked("Three.")), Heard())
    assert caught.value.retry_after >= 1
    scheduler.start()
    assert scheduler.drain(60)
    scheduler.stop()


def test_draining_ends_what_is_in_flight(model: Model) -> None:
    scheduler, heard = Scheduler(model, slots=2), [Heard() for _ in range(5)]
    for one in heard:
        scheduler.submit(ChatRequest(asked("What is in the image?", "000a.png")), one)
    scheduler.start()
    assert scheduler.drain(60)
    assert all(isinstance(one.events[-1], Finished) for one in heard)
    with pytest.raises(ClosingError):
        scheduler.submit(ChatRequest(asked("Late.")), Heard())
    scheduler.stop()


def test_stopping_tells_those_in_flight(model: Model) -> None:
    scheduler, heard = Scheduler(model, slots=1), [Heard() for _ in range(3)]
    endless = SamplingParams(max_tokens=4000, ignore_eos=True)
    for one in heard:
        scheduler.submit(ChatRequest(asked("Go on."), endless), one)
    scheduler.start()
    time.sleep(0.2)
    assert not scheduler.drain(0.01)
    scheduler.stop()
    assert all(one.ended.wait(10) and isinstance(one.events[-1], Failed) for one in heard)


def test_a_bad_request_fails_alone(scheduler: Scheduler) -> None:
    bad, good = Heard(), Heard()
    broken = [{"role": "user", "content": [{"type": "image", "image": b"not an image"}]}]
    scheduler.submit(ChatRequest(broken), bad)
    scheduler.submit(ChatRequest(asked("What is in the image?", "000a.png")), good)
    assert good.answer().generation.text
    assert bad.ended.wait(10)
    (event,) = bad.events
    assert isinstance(event, Failed)
    assert isinstance(event.error, OneVisionError)
    assert scheduler.stats.failed == 1


def test_a_fault_of_the_engine_fails_those_in_it_alone(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, good = Heard(), Heard()

    def broken(self: Slots, slots: list[int]) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "decode", broken)
        scheduler.submit(ChatRequest(asked("What is in the image?", "000a.png")), failed)
        assert failed.ended.wait(30)
    assert isinstance(failed.events[-1], Failed)
    scheduler.submit(ChatRequest(asked("What is in the image?", "000a.png")), good)
    assert good.answer().generation.text


def test_a_listener_that_fails_harms_nobody(scheduler: Scheduler) -> None:
    def faulty(event: Event) -> None:
        raise ValueError("mine")

    good = Heard()
    scheduler.submit(ChatRequest(asked("What is in the image?", "000a.png")), faulty)
    scheduler.submit(ChatRequest(asked("What is in the image?", "001a.png")), good)
    assert good.answer().generation.text


def test_stop_strings_logprobs_and_times(scheduler: Scheduler, alone: Callable[..., Any]) -> None:
    heard = Heard()
    options: dict[str, Any] = {"stop": [" and"], "logprobs": 2, "max_tokens": 24}
    messages = asked("What is in the image?", "000a.png")
    scheduler.submit(ChatRequest(messages, SamplingParams(**options)), heard)
    found, wanted = heard.answer(), alone(messages, **options)
    assert (found.generation.text, found.generation.finish_reason) == (wanted.text, "stop")
    told = [one for event in heard.events if isinstance(event, Piece) for one in event.logprobs]
    assert [one.token_id for one in told] == [one.token_id for one in wanted.logprobs]
    np.testing.assert_allclose([one.logprob for one in told], [one.logprob for one in wanted.logprobs], atol=1e-4)
    timings = found.generation.timings
    assert min(timings.preprocess, timings.vision_encoding, timings.prefill, timings.decode) > 0
    assert found.queue_seconds >= 0


def test_slots_in_between_keep_what_they_hold(model: Model) -> None:
    slots, params = Slots(model, 3), SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [model.prepared(asked(text)).prompt for text in ("one", "two", "three")]
    sequences = [model.sequence(prompt, params) for prompt in prompts]
    taken = [slots.take(sequence) for sequence in sequences]
    assert taken == [0, 1, 2]
    assert slots.take(model.sequence(prompts[0], params)) is None
    for slot in range(3):
        assert slots.prefill(slot, 1000)
    slots.leave(1)
    while sequences[0].finish_reason is None:
        slots.decode([0, 2])
    again = model.sequence(prompts[1], params)
    assert slots.take(again) == 1
    assert again.reused == len(prompts[1].ids) - 1
    slots.prefill(1, 1000)
    while again.finish_reason is None:
        slots.decode([1])
    fresh = Slots(model, 1)
    sequence = model.sequence(prompts[1], params)
    fresh.take(sequence)
    fresh.prefill(0, 7)
    while sequence.cached < len(prompts[1].ids):
        fresh.prefill(0, 7)
    while sequence.finish_reason is None:
        fresh.decode([0])
    assert again.token_ids == sequence.token_ids


def test_wrong_sizes_are_refused(model: Model) -> None:
    with pytest.raises(OneVisionError, match="whole numbers from 1"):
        Scheduler(model, slots=0)


def test_tickets_are_told_apart() -> None:
    request = ChatRequest(asked("One."))
    assert Ticket(request, Heard(), 0.0) != Ticket(request, Heard(), 0.0)


def test_a_tower_of_its_own_threads(bundle: Path, compiled: Any, tmp_path: Path) -> None:
    from onevision_edge.engines.cpu.build import build_cpu
    from onevision_edge.serve.loading import load_to_serve

    folder = shutil.copytree(bundle, tmp_path / "b")
    build_cpu(folder, check=False)
    shared, apart = onevision_edge.load(folder, threads=1), load_to_serve(folder, threads=1)
    assert shared.graphs["vision"].pool is shared.graphs["decoder"].pool
    assert apart.graphs["vision"].pool is not apart.graphs["decoder"].pool
    with apart.graphs["vision"].pool.lock:  # an image is being encoded, and the decoder goes on
        assert apart.generate(asked("Go on."), max_tokens=4, ignore_eos=True).finish_reason == "length"
    wanted = shared.generate(asked("What is in the image?", "000a.png"))
    assert apart.generate(asked("What is in the image?", "000a.png")).token_ids == wanted.token_ids
