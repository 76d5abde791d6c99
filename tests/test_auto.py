"""The search under a budget: what is measured is what a bundle would lose, and what comes out is within the budget."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import onevision_edge
from onevision_edge.bundle import Bundle, Progress, no_progress
from onevision_edge.calibration import auto
from onevision_edge.calibration.allocation import Choice
from onevision_edge.calibration.auto import FRONTIER_FILE, Budget, search_and_quantize
from onevision_edge.calibration.data import DataOptions
from onevision_edge.calibration.dataset import Preparer, load_dataset
from onevision_edge.calibration.journal import Journal
from onevision_edge.calibration.recipe import Methods
from onevision_edge.calibration.sensitivity import (
    FLOATING,
    ModuleGroup,
    Sensing,
    group_bytes,
    module_groups,
    with_precision,
)
from onevision_edge.cli import main
from onevision_edge.engines.roofline import decode_bytes
from onevision_edge.engines.targets import target
from onevision_edge.errors import OneVisionError
from onevision_edge.export.checkpoint import Checkpoint
from onevision_edge.export.draft import Draft
from onevision_edge.precision.plan import default_plan
from onevision_edge.runtime.backend import SessionOptions

METHODS = Methods(samples=64)
FLOAT = default_plan(FLOATING, "fp32")


@pytest.fixture(scope="module")
def data(golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows to calibrate on, others to measure on, and all of them."""
    folders = {"calibration": ("b_two_images", "f_resized_maxpixels"), "evaluation": ("a_single_image", "d_video")}
    folders["all"] = (*folders["calibration"], *folders["evaluation"])
    found = {}
    for name, cases in folders.items():
        found[name] = tmp_path_factory.mktemp("rows") / name
        found[name].mkdir()
        for case in cases:
            np.savez(found[name] / f"{case}.npz", **golden(case).inputs)
    return found


@pytest.fixture(scope="module")
def checkpoint(golden_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(golden_checkpoint)


@pytest.fixture(scope="module")
def groups(checkpoint: Checkpoint) -> list[ModuleGroup]:
    return module_groups(checkpoint.config)


@pytest.fixture(scope="module")
def choices(
    checkpoint: Checkpoint, groups: list[ModuleGroup], data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Choice]:
    """What every group was measured to lose, in three precisions."""
    preparer = Preparer.from_directory(checkpoint.directory, checkpoint.config)
    roles = [(load_dataset(data[name], preparer), name == "calibration") for name in ("calibration", "evaluation")]
    sizes = group_bytes(Draft.make(checkpoint, FLOAT), groups, [FLOATING, "int8", "int4"])
    journal = Journal(tmp_path_factory.mktemp("sensing"), "key")
    walk = Sensing(checkpoint, FLOAT, METHODS, roles, journal, no_progress, threads=1)
    return walk.measure(sizes, groups)


# Groups.


def test_groups_hold_every_matrix_once(checkpoint: Checkpoint, groups: list[ModuleGroup]) -> None:
    draft = Draft.make(checkpoint, FLOAT)
    for graph in ("vision", "decoder"):
        for path, _ in draft.matrices(graph):
            holders = [group.name for group in groups if group.graph == graph and group.holds(path)]
            assert len(holders) == (path != "visual.patch_embed.proj"), path


def test_a_deep_model_is_measured_in_parts(checkpoint: Checkpoint) -> None:
    """No more variants than a search can carry, neighbours together, each layer in one part."""
    shallow = checkpoint.config
    text, vision = replace(shallow.text, num_hidden_layers=36), replace(shallow.vision, depth=24)
    deep = replace(shallow, text=text, vision=vision)
    names = [group.name for group in module_groups(deep)]
    assert len(names) == 6 + 1 + 2 * 12 + 1
    assert names[0] == "visual.blocks.0-3"
    assert names[-3:] == ["model.layers.33-35.self_attn", "model.layers.33-35.mlp", "lm_head"]
    held = [sum(g.holds(f"model.layers.{i}.mlp.up_proj") for g in module_groups(deep)) for i in range(36)]
    assert held == [1] * 36
    assert len(module_groups(shallow)) == shallow.vision.depth + 1 + 2 * shallow.text.num_hidden_layers + 1


def test_bytes_are_those_of_the_bundle(checkpoint: Checkpoint, groups: list[ModuleGroup]) -> None:
    """Quantising a group changes the draft by what its bytes differ."""
    draft = Draft.make(checkpoint, FLOAT)
    sizes = group_bytes(draft, groups, [FLOATING, "int8", "int4", "nvfp4"])
    for group in groups:
        for precision in ("int8", "int4"):
            other = Draft.make(checkpoint, with_precision(FLOAT, group, precision))
            saved = sizes[group.name, FLOATING] - sizes[group.name, precision]
            # Beside the codes and scales of matrices, INT8 stores the scales of activations.
            assert 0 <= other.nbytes - (draft.nbytes - saved) <= 8 * 16, (group.name, precision)


def test_a_precision_whose_blocks_do_not_divide_is_left_out(checkpoint: Checkpoint) -> None:
    sizes = group_bytes(Draft.make(checkpoint, FLOAT), module_groups(checkpoint.config), [FLOATING, "int4-block128"])
    assert {precision for name, precision in sizes if name == "lm_head"} == {FLOATING}


# Sensitivities.


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_sensitivity_is_the_divergence_of_a_bundle(
    checkpoint: Checkpoint,
    groups: list[ModuleGroup],
    choices: list[Choice],
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    """Of one in which only that group is quantised, on the same rows, its products with 4-bit weights exact."""
    monkeypatch.setattr("onevision_edge.calibration.quantize.SessionOptions", partial(SessionOptions, exact=True))
    measured = {(choice.group, choice.precision): choice.divergence for choice in choices}
    for group in groups:
        bundle = onevision_edge.quantize(
            checkpoint.directory,
            tmp_path / "bundle",
            plan=with_precision(FLOAT, group, precision),
            methods=METHODS,
            calibration=data["calibration"],
            evaluation=data["evaluation"],
            max_length=256,
            threads=1,
            overwrite=True,
        )
        assert bundle.manifest.quality is not None
        found = bundle.manifest.quality["kld"]
        assert found > 1e-9
        assert measured[group.name, precision] == pytest.approx(found, rel=0.02), group.name


def test_floats_lose_nothing_and_each_choice_is_there_once(choices: list[Choice], groups: list[ModuleGroup]) -> None:
    assert {(c.group, c.precision) for c in choices} == {
        (group.name, precision) for group in groups for precision in (FLOATING, "int8", "int4")
    }
    assert len(choices) == 3 * len(groups)
    assert all((c.divergence == 0) == (c.precision == FLOATING) for c in choices)


# The search.

Search = Callable[..., tuple[Bundle, auto.Search]]


@pytest.fixture
def search(golden_checkpoint: Path, data: dict[str, Path], tmp_path: Path) -> Search:
    def call(budget: Budget, output: Path = tmp_path / "bundle", **changes: Any) -> tuple[Bundle, auto.Search]:
        options: dict[str, Any] = {
            "dtype": "fp32",
            "methods": METHODS,
            "data": DataOptions(data["all"], evaluation=data["evaluation"]),
            "max_length": 256,
            "threads": 1,
        }
        return search_and_quantize(golden_checkpoint, output, budget, **options | changes)

    return call


def full_size(checkpoint: Checkpoint, precision: str = FLOATING) -> int:
    return Draft.make(checkpoint, default_plan(precision, "fp32", vision=precision, lm_head=precision)).nbytes


def test_within_a_size(checkpoint: Checkpoint, search: Search) -> None:
    allowed = int(0.6 * full_size(checkpoint))
    bundle, found = search(Budget(size=allowed))
    manifest = bundle.manifest
    assert 0.8 * allowed < sum(spec.size for spec in manifest.files.values()) <= allowed
    assert set(found.allocation.chosen.values()) - {FLOATING}
    record = manifest.quantization
    assert record["plan"]["name"] == "auto"
    assert record["search"]["chosen"] == dict(found.allocation.chosen)
    assert record["search"]["budget"] == {"size": allowed}
    assert all("nats" in rule["reason"] for rule in record["plan"]["rules"] if rule in record["plan"]["rules"][-5:])
    assert manifest.quality is not None
    picture = (bundle.directory / FRONTIER_FILE).read_text()
    assert picture.startswith("<svg")
    assert "budget" in picture
    bundle.verify(no_progress)
    assert found.table()[1][0] == "group"
    assert "chosen" in found.plot()


def test_within_a_divergence(search: Search) -> None:
    spent = []
    for limit in (1e-1, 1e-3, 1e-5):
        bundle, found = search(Budget(kld=limit), overwrite=True)
        assert bundle.manifest.quality is not None
        assert bundle.manifest.quality["kld"] <= limit
        spent.append(found.allocation.bytes)
        assert set(found.allocation.chosen.values()) >= ({FLOATING} if limit < 1e-1 else {"int4"})
    assert spent == sorted(set(spent))


def test_within_a_latency(checkpoint: Checkpoint, search: Search) -> None:
    """Which is that of reading the decoder's weights: the tower is left as it is."""
    floating = sum(w.nbytes for w in Draft.make(checkpoint, FLOAT).graphs["decoder"][1].by_name.values())
    budget = Budget(decoder=floating // 2)
    bundle, found = search(budget)
    assert sum(bundle.manifest.graphs["decoder"].weights.values()) <= floating // 2
    assert not any(name.startswith("visual") for name in found.allocation.chosen)
    assert set(bundle.manifest.graphs["vision"].weights) == {"fp32"}
    jetson = target("jetson-agx-orin-64gb")
    assert decode_bytes(0.01, jetson) == pytest.approx(0.01 * (jetson.bandwidth or 0), rel=0.5)


def test_a_plan_that_misses_is_searched_again_tighter(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where groups together lose more than their sum."""
    _, first = search(Budget(kld=1e-3))
    predicted, tries = first.allocation.divergence, []

    def doubled(bundle: Bundle, budget: Budget) -> tuple[float, float]:
        tries.append(bundle.manifest.quantization["search"]["predicted_kld"])
        return 2 * tries[-1], predicted

    monkeypatch.setattr(auto, "_used", doubled)
    _, second = search(Budget(kld=predicted), overwrite=True)
    assert len(tries) >= 2
    assert tries == sorted(tries, reverse=True)
    assert 2 * second.allocation.divergence <= predicted


def test_a_budget_that_is_never_met_is_said(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_used", lambda bundle, budget: (2.0, 1.0))
    with pytest.raises(OneVisionError, match="after 4 searches the bundle still takes 2 of a budget of 1"):
        search(Budget(kld=1.0))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(size=1000), "the smallest precisions together take"),
        (Budget(decoder=1000), "the smallest precisions together take"),
    ],
)
def test_budgets_that_nothing_fits(search: Search, tmp_path: Path, budget: Budget, message: str) -> None:
    with pytest.raises(OneVisionError, match=message):
        search(budget)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("limits", [{}, {"size": 0}, {"kld": -1.0}, {"size": 5, "kld": 1.0}, {"kld": float("nan")}])
def test_a_budget_is_one_positive_limit(limits: dict[str, Any]) -> None:
    with pytest.raises(OneVisionError, match="one budget"):
        Budget(**limits)


def test_a_divergence_that_is_not_measured_holds_nothing(search: Search, data: dict[str, Path]) -> None:
    with pytest.raises(OneVisionError, match="leave --no-evaluate out"):
        search(Budget(kld=1.0), data=DataOptions(data["all"], evaluate=False))


def test_interrupted_it_goes_on_and_measures_nothing_twice(
    search: Search, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the quantisation that follows the measurements."""
    budget, measured, finish = Budget(size=int(0.6 * full_size(checkpoint))), [], Sensing._finish

    def noting(walk: Sensing, label: str, *arguments: Any) -> None:
        measured.append(label)
        finish(walk, label, *arguments)

    @contextmanager
    def stopping(title: str, unit: str) -> Iterator[Progress]:
        def report(done: int, total: int, label: str) -> None:
            if (title, label) == ("calibrate", "model.layers.1"):
                raise KeyboardInterrupt

        yield report

    monkeypatch.setattr(Sensing, "_finish", noting)
    with pytest.raises(KeyboardInterrupt):
        search(budget, phases=stopping)
    assert not (tmp_path / "bundle").exists()
    once = list(measured)
    again, _ = search(budget)
    assert measured == once
    undisturbed, _ = search(budget, tmp_path / "other")
    assert measured == 2 * once
    for path in again.directory.iterdir():
        assert path.read_bytes() == (undisturbed.directory / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "other"]


# The command.


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


def test_the_command_prints_table_and_frontier(
    golden_checkpoint: Path, data: dict[str, Path], tmp_path: Path, checkpoint: Checkpoint
) -> None:
    allowed = 0.6 * full_size(checkpoint) / 1e3
    rows = ("--calibration", data["all"], "--evaluation", data["evaluation"])
    arguments = (golden_checkpoint, "-o", tmp_path / "b", "--precision", "auto", "--budget-size", f"{allowed:.0f}kB")
    result = call(*arguments, "--dtype", "fp32", "--max-length", 256, "--threads", 1, *rows)
    assert result.exit_code == 0, result.stderr
    assert "model.layers.0.self_attn" in result.stdout
    assert "chosen" in result.stdout
    assert FRONTIER_FILE in result.stderr
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "b")])
    assert "auto" in shown.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "needs one of --budget-size, --budget-kld, --budget-latency"),
        (("--budget-size", "1GB", "--budget-kld", "0.1"), 2, "needs one of"),
        (("--budget-latency", "10ms"), 2, "name it with --target"),
        (("--budget-size", "1 parsec"), 2, "is not a positive number with its unit"),
        (("--budget-size", "-1GB"), 2, "is not a positive number with its unit"),
        (("--budget-size", "1GB", "--vision", "int8"), 2, "leave --dry-run, --recipe, --vision and --lm-head out"),
        (("--budget-size", "1GB", "--candidates", "float,int3"), 1, "int3"),
        (("--budget-size", "1GB", "--target", "a100", "--candidates", "float,nvfp4"), 1, "a100 (sm80) has no NVFP4"),
        (("--budget-size", "1GB", "--target", "t4", "--dtype", "bf16"), 1, "does not compute in BF16"),
        (("--budget-size", "1GB", "--target", "cpu", "--budget-latency", "10ms"), 2, "needs one of"),
        (("--budget-latency", "10ms", "--target", "cpu"), 1, "bandwidth"),
        (("--budget-kld", "0"), 1, "must be positive"),
    ],
)
def test_mistakes_are_said_before_any_work(tmp_path: Path, options: tuple[str, ...], code: int, message: str) -> None:
    result = call("demo", "-o", tmp_path / "b", "--precision", "auto", *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_budget_is_for_auto(tmp_path: Path) -> None:
    result = call("demo", "-o", tmp_path / "b", "--precision", "int4", "--budget-size", "1GB")
    assert result.exit_code == 2
    assert "are for --precision auto" in result.stderr
