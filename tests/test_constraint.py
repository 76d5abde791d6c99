"""Structured output: answers follow their schema, whatever the sampling, and hostile grammars cost little."""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime import constraint as constraints
from onevision_edge.runtime.constraint import Constraint, choice, json_object, json_schema, regex
from onevision_edge.runtime.model import Generation, Model
from onevision_edge.runtime.sampling import Sampler, SamplingParams
from onevision_edge.runtime.scheduler import ChatRequest, Event, Failed, Finished, Scheduler

EVALUATION = Path(onevision_edge.__file__).parent / "demo" / "evaluation"
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


def asked(text: str, image: str = "images/000a.png") -> list[dict[str, Any]]:
    shown = {"type": "image", "image": str(EVALUATION / image)}
    return [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]


# Answers of the shipped model.


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


def fits(bound: Constraint, ids: list[int]) -> bool:
    walked = bound.copy()
    if walked.fitting(ids) < len(ids):
        return False
    for token in ids:
        walked.accept(token)
    return walked.complete


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


# What is allowed.


def walked(bound: Constraint, text: str, model: Model) -> Constraint:
    one = bound.copy()
    assert model.tokenizer is not None
    for token in model.tokenizer.encode(text):
        one.accept(token)
    return one


def test_end_tokens_are_allowed_where_the_answer_is_complete(model: Model) -> None:
    bound = choice(["red", "red 9", "blue"], model)
    ends = list(model.eos_token_ids)
    for text, complete, ended in (("", 0, 0), ("re", 0, 0), ("red", 1, 0), ("red ", 0, 0), ("red 9", 1, 1)):
        one = walked(bound, text, model)
        assert one.allowed()[ends].all() == one.allowed()[ends].any() == one.complete == complete
        assert one.ended == ended


def test_placeholders_of_images_are_never_allowed(model: Model) -> None:
    assert model.tokenizer is not None
    mask = regex("(?s:.*)", model).allowed()
    special = sorted(model.tokenizer.special_ids)
    assert mask[special].tolist() == [i in model.eos_token_ids for i in special]
    assert not mask[len(model.tokenizer) :].any()
    assert mask.shape == (model.config.text.vocab_size,)


def test_a_token_that_is_not_allowed_is_refused(model: Model) -> None:
    bound = regex("[0-9]+", model)
    with pytest.raises(OneVisionError, match="the regex cannot be followed"):
        walked(bound, "a", model)
    assert bound.allowed().sum() == 10


WHITE = [
    ('{"a":1}', True),
    ('{"a": 1, "b": "x"}', True),
    ('{\n  "a": 1,\n  "b": "x"\n}', True),
    ('{\r\n\t"a": 1\r\n}', True),
    ('{"a":  1}', False),  # a model that is unsure says blanks for ever
    ('{"a":1} ', False),
    (' {"a":1}', False),
]


@pytest.mark.parametrize(("text", "fitting"), WHITE)
def test_white_space_of_json(model: Model, text: str, fitting: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    assert model.tokenizer is not None
    assert fits(json_schema(schema, model), model.tokenizer.encode(text)) == fitting


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=5))
def test_a_choice_is_taken_to_the_letter(model: Model, options: list[str]) -> None:
    assert model.tokenizer is not None
    bound, tokenizer = choice(options, model), model.tokenizer
    for option in options:
        ids = tokenizer.encode(option)
        if tokenizer.decode(ids) == option and not tokenizer.special_ids & set(ids):  # NFC, and no <|im_end|>
            assert fits(bound, ids)
    assert not fits(bound, tokenizer.encode(max(options, key=len) + "!"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(st.characters(codec="ascii"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(JSON_VALUES)
def test_a_value_fits_the_schema_that_is_only_it(model: Model, value: Any) -> None:
    bound = json_schema({"const": value}, model)
    assert model.tokenizer is not None
    assert fits(bound, model.tokenizer.encode(json.dumps(value)))
    assert not fits(bound, model.tokenizer.encode(json.dumps([value])))


# Sampling.


class Mask(Constraint):
    """Always the same tokens."""

    def __init__(self, *allowed: int, size: int = 8) -> None:
        self.vocab_size, self.taken, self.mask = size, list[int](), np.zeros(size, bool)
        self.mask[list(allowed)] = True

    def allowed(self) -> np.ndarray:
        return self.mask

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)


LOGITS = np.array([2.0, -1.0, 0.5, 1.25, 1.25, -3.0, 0.0, 2.5], np.float32)


def test_greedy_takes_the_best_that_is_allowed() -> None:
    mask = Mask(1, 2, 5, 7)
    sampler = Sampler(SamplingParams(logprobs=3), (), (7,), 8, mask)
    found = sampler.sample(LOGITS)
    normaliser = math.log(sum(math.exp(LOGITS[i]) for i in (1, 2, 5)))
    assert found.token_id == 2
    assert found.logprob == pytest.approx(0.5 - normaliser, abs=1e-6)
    assert [i for i, _ in found.top or []] == [2, 1, 5]
    assert sum(math.exp(logprob) for _, logprob in found.top or []) == pytest.approx(1, abs=1e-6)
    assert mask.taken == [2]


def test_the_only_token_has_probability_one() -> None:
    found = Sampler(SamplingParams(logprobs=5), (), (), 8, Mask(5)).sample(LOGITS)
    assert (found.token_id, found.logprob, found.top) == (5, 0.0, [(5, 0.0)])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_draws_follow_the_distribution_of_what_is_allowed(options: dict[str, Any]) -> None:
    """As an unconstrained sampler draws where the others do not exist."""
    allowed, count = [1, 3, 4, 6], 4000
    bound = Sampler(SamplingParams(temperature=1, seed=1, **options), (), (), 8, Mask(*allowed))
    small = Sampler(SamplingParams(temperature=1, seed=1, **options), (), (), 4)
    drawn = [bound.sample(LOGITS).token_id for _ in range(count)]
    assert drawn == [allowed[small.sample(LOGITS[allowed]).token_id] for _ in range(count)]


def test_a_large_vocabulary_with_few_allowed() -> None:
    """The filters look at the allowed alone: minus infinities that tie are never sorted."""
    size = 151_936
    logits = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    mask = Mask(5, 70_000, 151_900, size=size)
    sampler = Sampler(SamplingParams(temperature=1, top_k=20, top_p=0.95, logprobs=5), (), (5,), size, mask)
    started = time.thread_time()
    found = [sampler.sample(logits) for _ in range(20)]
    assert (time.thread_time() - started) / 20 < 0.005
    assert {one.token_id for one in found} == {70_000, 151_900}
    assert all(len(one.top or []) == 2 for one in found)


def test_penalties_count_as_ever() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=2.0), (), (), 8, Mask(2, 3, 6))
    assert [sampler.sample(LOGITS).token_id for _ in range(4)] == [3, 2, 6, 3]


def test_no_token_left_is_an_error() -> None:
    with pytest.raises(OneVisionError, match="no token is left"):
        Sampler(SamplingParams(), (), (5,), 8, Mask(5)).sample(LOGITS)


def test_a_constraint_of_another_model_is_refused() -> None:
    with pytest.raises(OneVisionError, match="a vocabulary of 9, not of 8"):
        Sampler(SamplingParams(), (), (), 8, Mask(1, size=9))


# What is wrong or hostile.

WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "the JSON schema is not JSON"),
    "an array": ("[1]", "must be a JSON object"),
    "a type": ({"type": "intger"}, "Invalid type: intger"),
    "a contradiction": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "another host": ({"$ref": "https://example.com/schema.json"}, "not present"),
    "a file": ({"$ref": "file:///etc/passwd"}, "not present"),
    "a missing part": ({"$ref": "#/$defs/x"}, "does not exist"),
    "itself": ({"$ref": "#"}, "nothing satisfies it"),
    "a keyword that is not supported": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "a pattern": ({"type": "string", "pattern": "("}, "unclosed group"),
    "not data": ({"enum": {1, 2}}, "cannot be read"),
}
REGEXES = {
    "a group": ("(", "unclosed group"),
    "a class": ("[", "unclosed character class"),
    "a look-ahead": ("(?=a)b", "look-around"),
    "a reference": (r"(a)\1", "backreferences"),
    "an empty class": (r"[^\x00-\x{10FFFF}]", "nothing satisfies it"),
    "half a pair": ("\ud800", "not valid Unicode"),
    "no text": (7, "must be text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_schema_is_one_sentence(model: Model, name: str) -> None:
    schema, message = WRONG[name]
    with pytest.raises(OneVisionError, match=re.escape(message)) as caught:
        json_schema(schema, model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the JSON schema ")


@pytest.mark.parametrize("name", REGEXES)
def test_a_wrong_regex_is_one_sentence(model: Model, name: str) -> None:
    pattern, message = REGEXES[name]
    with pytest.raises(OneVisionError, match=re.escape(message)) as caught:
        regex(pattern, model)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [[], "ab", [""], [1], None, ["a", "\ud800"]])
def test_wrong_choices(model: Model, options: Any) -> None:
    with pytest.raises(OneVisionError, match="choices"):
        choice(options, model)


def test_options_of_the_library_in_a_schema_are_not_taken(model: Model) -> None:
    bound = json_schema({"enum": [[1, 2]], "x-guidance": {"item_separator": ";", "lenient": True}}, model)
    assert model.tokenizer is not None
    assert fits(bound, model.tokenizer.encode("[1, 2]"))
    assert not fits(bound, model.tokenizer.encode("[1;2]"))


HOSTILE = """
import json, resource, sys, time
import numpy as np
import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.constraint import choice, json_schema, regex

model = onevision_edge.load(sys.argv[1], threads=1)
nested = lambda n: '{"type":"array","items":' * n + "{}" + "}" * n
wide = {f"p{i}": {"type": "integer"} for i in range(5000)}
folds = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)} | {"a40": {"type": "string"}}
parts = [{"anyOf": [{"properties": {f"k{i}_{j}": {"type": "integer"}}} for j in range(4)]} for i in range(10)]
SCHEMAS = [
    nested(100), nested(100_000), "[" * 100_000, {"$defs": folds, "$ref": "#/$defs/a0"}, {"allOf": parts},
    {"properties": wide, "required": list(wide)}, {"enum": [f"option {i}" for i in range(10_000)]},
    {"type": "string", "maxLength": 10**9}, {"type": "array", "minItems": 10**6, "maxItems": 10**9},
    {"type": "string", "pattern": "(.*a.{15}.*b.{15}.*c.{20})"}, {"type": "string", "pattern": "^(a+)+$"},
    {"type": "string", "pattern": "(.*a){100}.*(b.*){100}", "minLength": 1000}, "x" * 10**6,
    {"type": "number", "multipleOf": 1e-7, "minimum": 0.1234567890123456, "maximum": 1e300},
]
REGEXES = [
    "(a+)+$", "(a|aa)+b", "(.{1000}){1000}", "a{1000000}", "((x{1,100}){1,100}){1,100}y", 
    "(" * 5000 + "a" + ")" * 5000,
    "(.*a.{20}|.*b.{21}|.*c.{22})z", "(.|\\n)*[ab](.|\\n){300}",
    "|".join(f".*{chr(97 + i % 26)}.{{{i}}}" for i in range(300)),
    "(" + "|".join(f"[a-z]{{{i},{i + 50}}}" for i in range(1, 400)) + ")*", ".*" * 200, "a" * 200_000,
]
makers = [lambda s=s: json_schema(s, model) for s in SCHEMAS] + [lambda r=r: regex(r, model) for r in REGEXES]
makers.append(lambda: choice([f"o{i}" for i in range(20_000)], model))
before, slowest, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, 0
for make in makers:
    random, started = np.random.default_rng(1), time.thread_time()
    try:
        bound = make()
        for _ in range(100):
            ids = np.flatnonzero(bound.allowed())
            ids = ids[~np.isin(ids, model.eos_token_ids)]
            if bound.ended or not len(ids):
                break
            bound.accept(int(random.choice(ids)))
    except OneVisionError as error:
        refused += 1
        assert "\\n" not in str(error), error
        assert len(str(error)) < 400, error
    slowest = max(slowest, time.thread_time() - started)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps({"slowest": slowest, "grown": grown, "refused": refused, "of": len(makers)}))
"""


def test_hostile_grammars_are_bounded(bundle: Path) -> None:
    """In a process of its own, which they must not end: seconds of CPU for 100 tokens, and MB."""
    done = subprocess.run([sys.executable, "-c", HOSTILE, str(bundle)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["slowest"] < 5
    assert found["grown"] < 400
    assert 5 <= found["refused"] < found["of"] == 27


# Around it.


def test_without_the_library_it_says_what_to_install(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OneVisionError, match=r"pip install 'onevision-edge\[grammar\]'"):
        regex("a", model)


def test_a_model_without_a_tokenizer_says_so(golden_model: Model) -> None:
    with pytest.raises(OneVisionError, match=r"has no tokenizer\.json"):
        regex("a", golden_model)


def test_a_tokenizer_is_made_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    regex("a", model)
    monkeypatch.setattr(constraints, "_made", None)
    assert regex("[0-9]", model).allowed().sum() == 10


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
