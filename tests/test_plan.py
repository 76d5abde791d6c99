"""Plans: which rule decides, what int4 becomes, what a target must have, what is refused; and the command's names."""

import itertools
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onevision_edge.calibration.recipe import OBSERVERS, Methods
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.formats import FORMATS
from onevision_edge.precision.plan import CACHES, NAMES, PRECISIONS, Plan, Rule, default_plan

Q, OUT, DOWN = (f"model.layers.3.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
HEAD, QKV, PATCHES = "lm_head", "visual.blocks.0.attn.qkv", "visual.patch_embed.proj"
GRAPHS = {HEAD: "decoder", Q: "decoder", OUT: "decoder", DOWN: "decoder", QKV: "vision", PATCHES: "vision"}


def names(plan: Plan, inputs: int = 256) -> dict[str, str]:
    """The precision of some modules of a model."""
    return {module: plan.precision(graph, module, inputs).name for module, graph in GRAPHS.items()}


def refusal(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(OneVisionError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Rules.


def test_the_last_rule_that_matches_decides() -> None:
    broad, narrow = Rule("decoder", "model.layers.*", "int8"), Rule("decoder", "model.layers.?.mlp.*", "fp8")
    assert names(Plan("p", rules=(broad, narrow)))[DOWN] == "fp8"
    assert names(Plan("p", rules=(narrow, broad)))[DOWN] == "int8"
    assert names(Plan("p", rules=(broad, narrow)))[Q] == "int8"
    assert Plan("p", rules=(broad,)).with_rules([narrow]).rule("decoder", DOWN) == narrow


def test_without_a_rule_a_module_stays_as_it_is() -> None:
    assert set(names(Plan("p")).values()) == {"float"}
    assert Plan("p").rule("decoder", Q) is None
    assert not Plan("p").quantized


def test_a_rule_speaks_of_its_graph_or_of_both() -> None:
    assert names(Plan("p", rules=(Rule("vision", "*", "int8"),)))[Q] == "float"
    assert names(Plan("p", rules=(Rule("vision", "*", "int8"),)))[QKV] == "int8"
    assert set(names(Plan("p", rules=(Rule("*", "*", "int8"),))).values()) == {"int8"}


@pytest.mark.parametrize(
    ("modules", "module", "matches"),
    [
        ("model.layers.*", Q, True),
        ("model.layers.?.*", "model.layers.12.mlp.up_proj", False),
        ("model.layers.[0-3].*", Q, True),
        ("model.layers.[!3].*", Q, False),
        ("*.q_proj", Q, True),
        ("MODEL.layers.*", Q, False),
        ("model.layers", Q, False),
        ("lm_head", "lm_head", True),
    ],
)
def test_globs_as_in_file_names(modules: str, module: str, matches: bool) -> None:
    assert Rule("*", modules, "int8").matches("decoder", module) is matches


@given(st.lists(st.tuples(st.sampled_from(["vision", "decoder", "*"]), st.sampled_from(["*", "model.*", Q, "*_proj"]))))
def test_any_rules_against_a_search_from_the_back(patterns: list[tuple[str, str]]) -> None:
    choices = itertools.cycle(["int8", "fp8", "int8-weight", "float"])
    rules = [Rule(graph, modules, next(choices)) for graph, modules in patterns]
    found = names(Plan("p", rules=tuple(rules)))
    for module, graph in GRAPHS.items():
        wanted = "float"
        for rule in rules:
            if rule.graph in (graph, "*") and fnmatchcase(module, rule.modules):
                wanted = rule.precision
        assert found[module] == wanted


# INT4's blocks.


@pytest.mark.parametrize(
    ("inputs", "name"), [(128, "int4-block128"), (2560, "int4-block128"), (32, "int4-block32"), (160, "int4-block32")]
)
def test_int4_takes_the_largest_blocks_that_divide(inputs: int, name: str) -> None:
    plan = Plan("p", rules=(Rule("*", "*", "int4"),))
    assert plan.precision("decoder", Q, inputs).name == name


@pytest.mark.parametrize(
    ("precision", "inputs", "block"),
    [("int4", 588, 32), ("int4", 24, 32), ("int4-block128", 160, 128), ("int4-block32", 588, 32), ("nvfp4", 588, 16)],
)
def test_blocks_that_do_not_divide_are_refused(precision: str, inputs: int, block: int) -> None:
    plan = Plan("p", rules=(Rule("*", "*", precision),))
    assert refusal(plan.precision, "vision", PATCHES, inputs) == (
        f"{PATCHES} has {inputs} inputs, which {precision}'s blocks of {block} do not divide: "
        f"give it another precision by a rule for {PATCHES}"
    )


def test_precisions_say_what_their_format_is() -> None:
    for precision in PRECISIONS.values():
        if precision.format is not None:
            form = FORMATS[precision.format]
            assert (precision.block, precision.bits) == (form.block, form.codes.bits), precision.name
    assert {p.name for p in PRECISIONS.values() if p.activation} == {"int8", "fp8"}
    assert set(NAMES) == {*PRECISIONS, "int4"} - {"int8-block16"}


# What it asks of a target.


@pytest.mark.parametrize(
    ("precision", "needs"),
    [
        ("float", ()),
        ("int8", ("int8",)),
        ("int8-weight", ("int8",)),
        ("int4", ("int4", "int8")),  # the head is INT8
        ("int4-block32", ("int4", "int8")),
        ("fp8", ("fp8", "int8")),
        ("nvfp4", ("nvfp4", "int8")),
    ],
)
def test_needs(precision: str, needs: tuple[str, ...]) -> None:
    assert default_plan(precision).needs == needs


def test_an_int8_cache_needs_int8_and_is_quantised() -> None:
    plan = Plan("p", kv_cache="int8")
    assert plan.needs == ("int8",)
    assert plan.quantized
    assert default_plan("fp8", lm_head="fp8", kv_cache="int8").needs == ("fp8", "int8")


# As data.


@pytest.mark.parametrize("precision", NAMES)
def test_a_plan_survives_its_own_data(precision: str) -> None:
    plan = default_plan(precision, "bf16", vision="int8", kv_cache="int8")
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["rules"][1] == {
        "graph": "decoder",
        "modules": "model.layers.*",
        "precision": precision,
        "reason": plan.rules[1].reason,
    }


def test_what_is_missing_takes_its_default() -> None:
    assert Plan.from_dict({}) == Plan("custom", "fp16", "float", ())
    rule = {"graph": "*", "modules": "*", "precision": "int8"}
    assert Plan.from_dict({"rules": [rule]}).rules == (Rule("*", "*", "int8", ""),)


RULE = {"graph": "decoder", "modules": "*", "precision": "int8"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"dype": "fp32"}, "here has an unknown 'dype'; it can have dtype, kv_cache, name, rules"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8': choose one of fp32, fp16, bf16"),
        ({"dtype": 16}, "unknown dtype '16'"),
        ({"kv_cache": "int4"}, "kv_cache is 'int4': choose one of float, int8"),
        ({"rules": [{**RULE, "graph": "audio"}]}, "rule for *: graph is 'audio', not vision, decoder or *"),
        (
            {"rules": [{**RULE, "precision": "int3"}]},
            "unknown precision 'int3': choose one of float, int8, int8-weight",
        ),
        ({"rules": [{**RULE, "precision": 8}]}, "here: a rule's graph, modules, precision and reason are texts"),
        ({"rules": [{**RULE, "modules": ["a"]}]}, "here: a rule's graph, modules, precision and reason are texts"),
        ({"rules": [{**RULE, "because": "x"}]}, "here: a rule has graph, modules, precision and reason"),
        ({"rules": [{"graph": "vision"}]}, "here: a rule has graph, modules, precision and reason"),
        ({"rules": ["int8"]}, "here: a rule has graph, modules, precision and reason"),
        ({"rules": 8}, "here: a rule has graph, modules, precision and reason"),
    ],
)
def test_data_that_is_no_plan(raw: dict[str, Any], message: str) -> None:
    assert message in refusal(Plan.from_dict, raw, "here")


def test_a_plan_made_in_python_is_checked_alike() -> None:
    assert "unknown precision 'int3'" in refusal(Plan, "p", rules=(Rule("*", "*", "int3"),))
    assert "unknown dtype" in refusal(Plan, "p", "int8")
    assert "unknown precision 'int9'" in refusal(default_plan, "int8", lm_head="int9")
    assert "unknown precision 'w4'" in refusal(default_plan, "w4")
    assert "int8-block16" not in refusal(default_plan, "w4")  # nobody asks for it by name


# Defaults.

EXPECTED = {  # decoder's layers, with 256 inputs
    "float": "float",
    "int8": "int8",
    "int8-weight": "int8-weight",
    "int4": "int4-block128",
    "int4-block128": "int4-block128",
    "int4-block32": "int4-block32",
    "fp8": "fp8",
    "nvfp4": "nvfp4",
}


@pytest.mark.parametrize("precision", NAMES)
def test_the_default_plan_of_each_precision(precision: str) -> None:
    plan, layers = default_plan(precision), EXPECTED[precision]
    head = "float" if precision == "float" else "int8-weight"
    assert names(plan) == {Q: layers, OUT: layers, DOWN: layers, HEAD: head, QKV: "float", PATCHES: "float"}
    assert (plan.name, plan.dtype, plan.kv_cache) == (precision, "fp16", "float")
    assert plan.quantized is (precision != "float")
    assert all(rule.reason for rule in plan.rules)


@pytest.mark.parametrize("vision", NAMES)
def test_what_is_asked_for_apart_from_the_decoder(vision: str) -> None:
    plan = default_plan("int4", "fp32", vision=vision, lm_head="float", kv_cache="int8")
    found = names(plan, 128)
    assert (found[QKV], found[HEAD], found[PATCHES]) == (EXPECTED[vision], "float", "float")  # 588 pixels stay floats
    assert (plan.dtype, plan.kv_cache) == ("fp32", "int8")
    reasons = {rule.modules: rule.reason for rule in plan.rules}
    assert reasons["lm_head"] == "as asked"
    assert (reasons["visual.*"] == "as asked") is (vision != "float")


# The command's own copies of these names, made so that --help stays quick.


def test_the_command_knows_the_same_names() -> None:
    command = import_module("onevision_edge.cli.quantize")  # the package's own `quantize` is the command
    assert command.NAMES == NAMES
    assert command.CACHES == CACHES
    assert command.OBSERVERS == OBSERVERS
    switches = [name for name, value in Methods().to_dict().items() if isinstance(value, bool)]
    assert [name.replace("-", "_") for name in command._SWITCHES] == switches
    for switch in command._SWITCHES:
        replace(Methods(), **{switch.replace("-", "_"): False})
