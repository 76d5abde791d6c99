"""Structured output: answers of the shipped model follow their schema, whatever the sampling."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from constrained import EVALUATION, asked, fits

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.constraint import Constraint, choice, json_object, json_schema, regex
from onevision_edge.runtime.model import Generation, Model
from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.runtime.scheduler import ChatRequest, Event, Failed, Finished, Scheduler

COLOURS = ["red", "green", "blue", "yellow"]
DIGIT = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}, "digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "digit"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "digits": {
        "type": "object",
        "properties": {"digits": {"type": "array", "items": DIGIT, "minItems": 1, "maxItems": 3}},
        "required": ["digits"],
        "additionalProperties": False,
    },
    "words": {
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": 12},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "day": {"type": "string", "format": "date"},
            "sure": {"type": "boolean"},
            "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
        },
        "required": ["text", "code", "day", "sure", "more"],
        "additionalProperties": False,
        "$defs": {
            "point": {"type": "array", "prefixItems": [{"const": 1}, {"const": "x"}], "items": False, "minItems": 2}
        },
    },
    "number": {"type": "integer", "minimum": -5, "maximum": 120},
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "warm": {"temperature": 0.7, "top_p": 0.9},
    "hot": {"temperature": 1.5, "top_k": 40},
    "boiling": {"temperature": 30.0},
    "penalised": {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0},
    "logprobs": {"temperature": 1.0, "min_p": 0.05, "logprobs": 3},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("constraint") / "bundle"
    onevision_edge.export("demo", out, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return onevision_edge.load(bundle, threads=1)


def questions(kind: str, count: int) -> list[list[dict[str, Any]]]:
    """Conversations about the first images that a kind of question is asked about."""
    rows = [json.loads(line) for line in (EVALUATION / "questions.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == kind and "image" in row][:count]
    return [asked(row["prompt"], row["image"]) for row in found]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_answer_is_valid_json(model: Model, name: str, sampling: str) -> None:
    bound, options = json_schema(SCHEMAS[name], model), SAMPLINGS[sampling]
    for seed in range(1 if sampling == "greedy" else 6):
        answer = model.generate(asked("List all digits."), constraint=bound, max_tokens=600, seed=seed, **options)
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
        assert model.tokenizer is not None
        assert model.tokenizer.decode(answer.token_ids) == answer.text


@pytest.mark.parametrize("seed", range(4))
def test_any_object_is_an_object_or_the_beginning_of_one(model: Model, seed: int) -> None:
    answer = model.generate(
        asked("What is it?"), constraint=json_object(model), max_tokens=40, seed=seed, temperature=1.0
    )
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)
    else:
        assert answer.text.startswith("{")
        assert len(answer.token_ids) == 40


def test_an_answer_that_is_cut_off_says_so(model: Model) -> None:
    answer = model.generate(
        asked("List all digits."), constraint=json_schema(SCHEMAS["digits"], model), max_tokens=7, temperature=1, seed=0
    )
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 7)
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(answer.text)


def test_an_answer_that_ends_at_the_last_token_is_complete(model: Model) -> None:
    bound, question = choice(["yellow 9", "blue 8"], model), asked("Which digit has the greatest value?")
    whole = model.generate(question, constraint=bound)
    assert whole.text == "yellow 9"
    exact = model.generate(question, constraint=bound, max_tokens=len(whole.token_ids))
    assert (exact.text, exact.finish_reason) == ("yellow 9", "stop")
    short = model.generate(question, constraint=bound, max_tokens=len(whole.token_ids) - 1)
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:-1], "length")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("count", lambda model: regex("[0-9]+", model)),
        ("count", lambda model: json_schema({"type": "integer", "minimum": 0}, model)),
        ("list", lambda model: regex("([a-z]+ [0-9](, )?)+", model)),
        ("colour", lambda model: choice([*COLOURS, "cyan", "orange", "purple", "pink", "white"], model)),
    ],
)
def test_an_answer_that_fits_stays_the_same(model: Model, kind: str, make: Callable[[Model], Constraint]) -> None:
    bound, fitting = make(model), 0
    for question in questions(kind, 10):
        free = model.generate(question)
        assert model.tokenizer is not None
        if fits(bound, free.token_ids):
            fitting += 1
            assert model.generate(question, constraint=bound).token_ids == free.token_ids
    assert fitting >= 8


def test_drafts_change_nothing(model: Model) -> None:
    """The same tokens with drafts and without, and drafts that are right are taken."""
    schema = {"type": "array", "items": DIGIT, "minItems": 6, "maxItems": 6}
    bound = json_schema(schema, model)
    for options in ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 2.0, "seed": 4}):
        answers = [
            model.generate(asked("List all digits."), constraint=bound, max_tokens=500, speculate=n, **options)
            for n in (0, 4, 15, None)
        ]
        assert {tuple(answer.token_ids) for answer in answers} == {tuple(answers[0].token_ids)}
        jsonschema.validate(json.loads(answers[0].text), schema)
        assert answers[0].drafted_tokens == 0
        assert answers[2].accepted_tokens > 20


def test_a_batch_is_answered_as_each_alone(model: Model) -> None:
    bound = json_schema(SCHEMAS["digits"], model)
    conversations = questions("list", 4)
    together = model.generate(conversations, constraint=bound, max_tokens=300)
    for messages, answer in zip(conversations, together, strict=True):
        assert answer.token_ids == model.generate(messages, constraint=bound, max_tokens=300).token_ids
        jsonschema.validate(json.loads(answer.text), SCHEMAS["digits"])


def test_a_stop_string_ends_an_answer_in_its_middle(model: Model) -> None:
    bound = json_schema(SCHEMAS["digits"], model)
    whole = model.generate(asked("List all digits."), constraint=bound, max_tokens=300)
    cut = model.generate(asked("List all digits."), constraint=bound, max_tokens=300, stop="colour")
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index("colour")], "stop")


def test_a_constraint_can_be_used_again(model: Model) -> None:
    bound, question = regex("[0-9]", model), asked("How many digits are there?")
    answers = [model.generate(question, constraint=bound).text for _ in range(3)]
    assert answers == ["3", "3", "3"]
    assert not bound.complete


def test_ignored_end_tokens_and_a_constraint_exclude_each_other(model: Model) -> None:
    with pytest.raises(OneVisionError, match="ignore_eos"):
        model.generate(asked("How many?"), constraint=regex("a", model), ignore_eos=True)


def test_requests_of_a_scheduler_follow_their_own(model: Model) -> None:
    """Each its own grammar or none; one whose grammar cannot be followed fails alone."""
    scheduler = Scheduler(model, slots=4)
    scheduler.start()
    bounds = [
        json_schema(SCHEMAS["digits"], model),
        regex("[0-9]{3}", model),
        None,
        Broken(model),
        choice(["x"], model),
    ]
    heard: list[list[Event]] = [[] for _ in bounds]
    for bound, events in zip(bounds, heard, strict=True):
        request = ChatRequest(asked("List all digits."), SamplingParams(max_tokens=300), constraint=bound)
        scheduler.submit(request, events.append)
    assert scheduler.drain(60)
    scheduler.stop()
    for bound, events in zip(bounds, heard, strict=True):
        if isinstance(bound, Broken):
            assert isinstance(events[-1], Failed)
            assert "too complex" in str(events[-1].error)
        else:
            assert isinstance(events[-1], Finished)
            alone = model.generate(asked("List all digits."), max_tokens=300, constraint=bound)
            assert events[-1].generation.token_ids == alone.token_ids


class Broken(Constraint):
    """One whose third token takes more work than the limits allow."""

    def __init__(self, model: Model) -> None:
        inner = regex("[a-z]{90}", model)
        super().__init__(inner._matcher, inner.vocab_size, "the regex")
        self.left = 2

    def copy(self) -> "Broken":
        return self

    def allowed(self) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise OneVisionError("the regex cannot be followed: it is too complex")
        return super().allowed()


def run(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    image = str(EVALUATION / "images/000a.png")
    command = [sys.executable, "-m", "onevision_edge", "run", str(bundle), "--threads", "1", "--image", image]
    question = ["--prompt", "How many digits are there?"]
    return subprocess.run([*command, *question, *options], capture_output=True, text=True, timeout=60)


def test_run_takes_a_schema_or_a_regex(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps({"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 2}))
    done = run(bundle, "--json-schema", str(tmp_path / "schema.json"), "--json")
    answer = json.loads(done.stdout)
    assert set(json.loads(answer["text"])) <= {1, 2, 3}
    assert run(bundle, "--regex", "[0-9] digits").stdout == "3 digits\n"


def test_run_says_what_is_wrong(bundle: Path, tmp_path: Path) -> None:
    done = run(bundle, "--regex", "(")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "Error: the regex cannot be used: unclosed group"
    missing = run(bundle, "--json-schema", str(tmp_path / "none.json"))
    assert (missing.returncode, "none.json cannot be read" in missing.stderr) == (1, True)
    both = run(bundle, "--json-schema", "x", "--regex", "a")
    assert (both.returncode, "exclude each other" in both.stderr) == (2, True)


def test_generations_are_generations(model: Model) -> None:
    """A stream under a constraint gives the pieces of the same answer."""
    bound = regex("[0-9] digits", model)
    pieces = list(model.stream(asked("How many digits are there?"), constraint=bound))
    assert "".join(pieces) == "3 digits"
    assert isinstance(pieces[-1].generation, Generation)
    assert pieces[-1].generation.finish_reason == "stop"
