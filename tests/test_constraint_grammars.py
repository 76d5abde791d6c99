"""What a grammar allows, what is wrong with one, and how little hostile ones cost."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from constrained import fits
from hypothesis import given, settings
from hypothesis import strategies as st

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime import constraint as constraints
from onevision_edge.runtime.constraint import Constraint, choice, json_schema, regex
from onevision_edge.runtime.model import Model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("constraint") / "bundle"
    onevision_edge.export("demo", out, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return onevision_edge.load(bundle, threads=1)


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
