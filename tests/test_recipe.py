"""Recipes: what a TOML file says, and that everything wrong with one names it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from onevision_edge.calibration.recipe import Methods, Recipe
from onevision_edge.cli import main
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import Rule

RECIPE = """
name = "decoder in INT4, one layer kept"
dtype = "bf16"
kv_cache = "int8"

[[rules]]
graph = "decoder"
modules = "model.layers.*"
precision = "int4"
reason = "a quarter of the bytes"

[[rules]]
graph = "decoder"
modules = "model.layers.0.mlp.down_proj"
precision = "int8-weight"

[methods]
observer = "percentile"
percentile = 99
gptq = false
samples = 512
"""


def recipe(tmp_path: Path, text: str | bytes, name: str = "recipe.toml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(OneVisionError) as caught:
        Recipe.read(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_a_recipe_is_a_plan_and_methods(tmp_path: Path) -> None:
    found = Recipe.read(recipe(tmp_path, RECIPE))
    plan = found.plan
    assert (plan.name, plan.dtype, plan.kv_cache) == ("decoder in INT4, one layer kept", "bf16", "int8")
    assert plan.rules == (
        Rule("decoder", "model.layers.*", "int4", "a quarter of the bytes"),
        Rule("decoder", "model.layers.0.mlp.down_proj", "int8-weight", ""),
    )
    assert plan.precision("decoder", "model.layers.0.mlp.down_proj", 128).name == "int8-weight"
    assert found.methods == Methods(observer="percentile", percentile=99, gptq=False, samples=512)


def test_the_example_in_the_documentation_is_one(tmp_path: Path) -> None:
    import onevision_edge.calibration.recipe as module

    assert module.__doc__ is not None
    found = Recipe.read(recipe(tmp_path, module.__doc__.split("\n\n", 1)[1]))
    assert len(found.plan.rules) == 2
    assert found.methods == Methods(observer="mse", gptq=False)


def test_what_it_leaves_out_takes_its_default(tmp_path: Path) -> None:
    found = Recipe.read(recipe(tmp_path, "", "int4 but the head.toml"))
    assert (found.plan.name, found.plan.dtype, found.plan.rules) == ("int4 but the head", "fp16", ())
    assert found.methods == Methods()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        ('nmae = "x"', "the plan has an unknown 'nmae'"),
        ('dtype = "int8"', "unknown dtype 'int8'"),
        ('kv_cache = "fp8"', "kv_cache is 'fp8'"),
        ("rules = 3", "rules an array of tables"),
        ('rules = ["int8"]', "a rule has graph, modules, precision and reason"),
        ('[rules]\ngraph = "vision"', "rules an array of tables"),
        ('[[rules]]\ngraph = "vision"', "a rule has graph, modules, precision and reason"),
        ('[[rules]]\ngraph = "vision"\nmodules = "*"\nprecision = "int2"', "unknown precision 'int2'"),
        ('[[rules]]\ngraph = "v"\nmodules = "*"\nprecision = "int8"', "graph is 'v'"),
        ("methods = 1", "methods must be a table"),
        ("[[methods]]\ngptq = false", "methods must be a table"),
        ("[methods]\ngptq = 1", "gptq is 1, it must be a bool"),
        ("[methods]\nsamples = 2.5", "samples is 2.5, it must be a int"),
        ("[methods]\nsamples = true", "samples is True, it must be a int"),
        ("[methods]\nsamples = 0", "samples must be from 1"),
        ("[methods]\ndamping = 1", "damping between 0 and 1"),
        ("[methods]\npercentile = 50", "percentile is 50"),
        ("[methods]\npercentile = nan", "percentile is nan"),
        ('[methods]\nobserver = "max"', "observer is 'max': choose one of auto, absmax, percentile, entropy, mse"),
        ("[methods]\nspinquant = true", "methods has an unknown 'spinquant'; it can have observer, percentile"),
    ],
)
def test_whatever_is_wrong_is_said_of_the_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in refusal(recipe(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml").endswith("cannot be read: No such file or directory")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_methods_survive_their_own_data() -> None:
    methods = replace(Methods(), observer="entropy", clip=True, damping=0.1)
    assert Methods.from_dict(methods.to_dict()) == methods


# The command.


def call(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["quantize", "demo", "-o", "never", *map(str, arguments)])
    return result.exit_code, result.stderr


@pytest.mark.parametrize("option", ["precision", "vision", "lm-head", "kv-cache", "dtype"])
def test_a_recipe_and_another_plan_are_wrong_usage(tmp_path: Path, option: str) -> None:
    value = "fp32" if option == "dtype" else "int8"
    code, message = call("--recipe", recipe(tmp_path, RECIPE), f"--{option}", value)
    assert code == 2
    assert f"leave --{option} out" in message


def test_the_command_says_what_is_wrong_in_a_line(tmp_path: Path) -> None:
    code, message = call("--recipe", recipe(tmp_path, "[methods]\ngptq = 1"))
    assert code == 1
    assert message == f"Error: {tmp_path / 'recipe.toml'}: methods: gptq is 1, it must be a bool\n"


def test_the_command_s_switches_change_a_recipe_s_methods(tmp_path: Path) -> None:
    path, options = recipe(tmp_path, RECIPE), ["--without", "awq", "--observer", "mse", "--dry-run", "--json"]
    result = CliRunner().invoke(main, ["quantize", "demo", "--recipe", str(path), *options])
    assert result.exit_code == 0
    assert '"observer": "mse"' in result.stdout
    assert '"awq": false' in result.stdout
    assert '"samples": 512' in result.stdout
