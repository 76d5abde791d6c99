"""The shipped model behind the server, asked by OpenAI's own client over a real port."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving import IMAGES, data_url, live, wait_for

import onevision_edge
from onevision_edge.runtime.model import Model
from onevision_edge.runtime.scheduler import Scheduler
from onevision_edge.serve.settings import Settings

openai = pytest.importorskip("openai")

QUESTIONS = json.loads((IMAGES / "questions.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    bundle = tmp_path_factory.mktemp("served") / "demo"
    onevision_edge.export("demo", bundle, dtype="fp32")
    return onevision_edge.load(bundle, threads=1)


@pytest.fixture(scope="module")
def scheduler(model: Model) -> Iterator[Scheduler]:
    scheduler = Scheduler(model, slots=4, queue=8)
    scheduler.start()
    yield scheduler
    scheduler.stop()


@pytest.fixture(scope="module")
def client(scheduler: Scheduler) -> Iterator[Any]:
    settings = Settings(model_name="demo", api_key="key")
    with (
        live(scheduler, settings) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0) as client,
    ):
        yield client


def messages(text: str, *images: str) -> list[dict[str, Any]]:
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: asked["prompt"])
def test_answers_are_the_models_own(client: Any, model: Model, asked: dict[str, Any]) -> None:
    given = messages(asked["prompt"], *asked["images"])
    whole = client.chat.completions.create(model="demo", messages=given, max_completion_tokens=60)
    assert whole.choices[0].message.content == asked["answer"]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="demo", messages=given, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == asked["answer"]
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens_details.cached_image_tokens == last.usage.prompt_tokens_details.image_tokens > 0


def test_timings(client: Any) -> None:
    usage = client.chat.completions.create(model="demo", messages=messages("Which number?", "number.png")).usage
    timings = usage.model_extra["timings"]
    stages = [timings[name] for name in ("queue", "preprocess", "vision_encoding", "prepare_embeddings", "prefill")]
    assert timings["time_to_first_token"] == pytest.approx(sum(stages))
    assert timings["tokens_per_second"] == pytest.approx((usage.completion_tokens - 1) / timings["decode"])


def test_frames_of_a_video(client: Any, model: Model) -> None:
    frames = [data_url((56, 56)), data_url((56, 56)), data_url((56, 56))]
    content = [{"type": "video_url", "video_url": {"url": frames}}, {"type": "text", "text": "What happens?"}]
    answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": content}], max_tokens=3)
    assert answer.usage.prompt_tokens_details.image_tokens == 3 * 4


def test_logprobs(client: Any) -> None:
    given = messages("Which number is this?", "number.png")
    told = client.chat.completions.create(model="demo", messages=given, logprobs=True, top_logprobs=2).choices[0]
    tokens = told.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == told.message.content == "6472"
    assert all(token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in tokens)
    parts = client.chat.completions.create(model="demo", messages=given, logprobs=True, top_logprobs=2, stream=True)
    streamed = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_sampling_by_seed_stop_and_choices(client: Any) -> None:
    given = messages("Which number is this?", "number.png")
    options: dict[str, Any] = {"model": "demo", "messages": given, "temperature": 1.5, "max_tokens": 8, "n": 3}
    first, second = (
        [choice.message.content for choice in client.chat.completions.create(seed=5, **options).choices] for _ in "12"
    )
    assert first == second
    assert len(first) == 3
    stopped = client.chat.completions.create(model="demo", messages=given, stop=["7"], extra_body={"top_k": 1})
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("64", "stop")
    short = client.chat.completions.create(model="demo", messages=given, max_tokens=2)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("64", "length")


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "onevision-edge"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "other"}, "NotFoundError"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "BadRequestError"),
        ({"max_tokens": 100_000}, "BadRequestError"),
        ({"messages": messages("x" * 100_000)}, "BadRequestError"),
    ],
)
def test_errors(client: Any, options: dict[str, Any], error: str) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**({"model": "demo", "messages": messages("Hi")} | options))
    assert caught.value.body["message"]


def test_wrong_key(client: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def test_many_clients_get_what_each_would_alone(client: Any) -> None:
    got: dict[int, str] = {}

    def ask(i: int) -> None:
        asked = QUESTIONS[i % len(QUESTIONS)]
        given = messages(asked["prompt"], *asked["images"])
        answer = client.chat.completions.create(model="demo", messages=given, max_tokens=60)
        got[i] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {i: QUESTIONS[i % len(QUESTIONS)]["answer"] for i in range(8)}


def test_leaving_frees_the_slot(client: Any, scheduler: Scheduler) -> None:
    before = scheduler.stats.cancelled
    given = messages("List all digits from left to right.", "photo.jpg")
    stream = client.chat.completions.create(
        model="demo", messages=given, stream=True, max_tokens=200, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: scheduler.stats.cancelled == before + 1 and scheduler.stats.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(client: Any, stream: bool) -> None:
    pytest.importorskip("llguidance")
    given = messages("Which number is this?", "number.png")
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    formats = [
        {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}},
        {"type": "regex", "regex": "[a-c]{3}"},
    ]
    told = []
    for form in formats:
        answer = client.chat.completions.create(
            model="demo", messages=given, response_format=form, max_tokens=40, stream=stream
        )
        parts = [part.choices[0].delta.content or "" for part in answer] if stream else None
        told.append("".join(parts) if parts is not None else answer.choices[0].message.content)
    assert json.loads(told[0])["n"] in (1, 22)
    assert set(told[1]) <= set("abc")
    assert len(told[1]) == 3
