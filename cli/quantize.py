"""onevision-edge quantize"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import print_json, progress, say, size, table
from .extras import require

if TYPE_CHECKING:
    from ..calibration.recipe import Methods
    from ..engines.targets import Target
    from ..precision.plan import Plan

# As precision.plan and calibration.recipe have them, which are too heavy to import for --help.
NAMES = ("float", "int8", "int8-weight", "int4", "int4-block128", "int4-block32", "fp8", "nvfp4")
CACHES = ("float", "int8")
OBSERVERS = ("auto", "absmax", "percentile", "entropy", "mse")
_SWITCHES = ("smoothquant", "awq", "clip", "gptq", "bias-correction")
_PLAN_OPTIONS = ("precision", "vision", "lm_head", "kv_cache", "dtype")
_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}


def _bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """A size such as 2.5GB."""
    return None if value is None else int(_quantity(value, _UNITS))


def _seconds(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """A time such as 15ms."""
    return None if value is None else _quantity(value, {"ms": 1e-3, "s": 1.0})


def _quantity(value: str, units: dict[str, float]) -> float:
    for unit, scale in units.items():
        number = value.strip().removesuffix(unit)
        if number != value.strip():
            try:
                if float(number) > 0:
                    return float(number) * scale
            except ValueError:
                break
    raise click.BadParameter(f"{value!r} is not a positive number with its unit, {' or '.join(units)}")


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory of the bundle to write.")
@click.option(
    "--precision",
    type=click.Choice([*NAMES, "auto"]),
    help="Of the decoder's layers; auto: searched, under a budget.  [default: the target's]",
)
@click.option("--target", "target_name", help="What it will run on (a100, jetson-orin, sm89, cpu, ...): sets defaults.")
@click.option("--vision", type=click.Choice(NAMES), help="Of the tower's blocks and merger.  [default: float]")
@click.option("--lm-head", type=click.Choice(NAMES), help="Of the product with the vocabulary.  [default: int8-weight]")
@click.option("--kv-cache", type=click.Choice(CACHES), help="What keys and values are kept in.  [default: float]")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="What is not quantised.  [default: fp16; fp32 on a CPU]",
)
@click.option("--budget-size", callback=_bytes, metavar="SIZE", help="With auto: of the bundle, such as 2.5GB.")
@click.option("--budget-kld", type=float, help="With auto: nats, from full precision.")
@click.option(
    "--budget-latency", callback=_seconds, metavar="TIME", help="With auto: of a decode step on --target, 15ms."
)
@click.option(
    "--candidates", help="With auto: precisions to choose from.  [default: float,int8-weight,int4, nvfp4 if built]"
)
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file of rules and methods, instead of these.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="JSONL file, folder of images, or .npz rows to calibrate on.  [default: the shipped set]",
)
@click.option("--calibration-samples", type=click.IntRange(1), help="At most so many of its rows.")
@click.option("--evaluation", type=click.Path(path_type=Path), help="Rows to measure the result on, of the same kinds.")
@click.option("--evaluation-samples", type=click.IntRange(1), help="At most so many of its rows.")
@click.option("--no-evaluate", is_flag=True, help="Do not measure the result; the manifest will say so.")
@click.option("--observer", type=click.Choice(OBSERVERS), help="Of activation ranges.")
@click.option("--without", multiple=True, type=click.Choice(_SWITCHES), help="Leave a method out; may be repeated.")
@click.option("--max-length", type=click.IntRange(1), help="Rows of the KV cache, as for export.")
@click.option("--max-pixels", type=click.IntRange(1), help="Larger images are shrunk to this in calibration.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1))
@click.option("--overwrite", is_flag=True, help="Replace the bundle if it exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what it will take, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the bundle's manifest, or the plan with --dry-run.")
def quantize(
    source: str,
    output: Path | None,
    target_name: str | None,
    recipe: Path | None,
    without: tuple[str, ...],
    observer: str | None,
    no_evaluate: bool,
    dry_run: bool,
    as_json: bool,
    budget_size: int | None,
    budget_kld: float | None,
    budget_latency: float | None,
    candidates: str | None,
    **options: Any,
) -> None:
    """Write a checkpoint as a bundle of quantised ONNX graphs, calibrated on images.

    SOURCE is a checkpoint as for export, or a full-precision bundle. Interrupted, the same command goes on where
    it was. The bundle's distance from full precision is measured on rows it was not calibrated on.
    """
    asked = {name: options.pop(name) for name in _PLAN_OPTIONS}
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    target = _target(target_name)
    budgets = (budget_size, budget_kld, budget_latency)
    if asked["precision"] == "auto":
        if dry_run or recipe is not None or asked["vision"] or asked["lm_head"]:
            raise click.UsageError("--precision auto searches: leave --dry-run, --recipe, --vision and --lm-head out")
        budget = _budget(source, budgets, target)
        methods = _methods(observer, without)
        options["evaluate"], asked = not no_evaluate, {**asked, "candidates": candidates}
        run_auto(source, output, budget, target, asked, methods, as_json, **options)
        return
    if candidates is not None or any(budget is not None for budget in budgets):
        raise click.UsageError("a budget and candidates are for --precision auto")
    plan, methods = _plan(asked, target, recipe, observer, without)
    if target is not None:
        from ..engines.targets import check

        check(plan, target)
    if dry_run:
        _show(source, plan, methods, options["max_length"], as_json)
        return
    run_quantize(source, output, plan, methods, evaluate=not no_evaluate, as_json=as_json, **options)


def run_quantize(
    source: str, output: Any, plan: "Plan", methods: "Methods", as_json: bool = False, **options: Any
) -> None:
    """Quantise with progress bars, and say what was written and how far it is from full precision."""
    from ..calibration.quantize import quantize as quantize_bundle

    bundle = quantize_bundle(source, output, plan=plan, methods=methods, phases=progress, **options)
    if as_json:
        print_json(bundle.manifest.to_dict())
    total = sum(spec.size for spec in bundle.manifest.files.values())
    say(f"wrote {output}: {plan.name}, {size(total)}")
    say(quality_text(bundle.manifest.quality))


def run_auto(
    source: str,
    output: Any,
    budget: Any,
    target: "Target | None",
    asked: dict[str, Any],
    methods: "Methods",
    as_json: bool,
    max_length: int | None,
    overwrite: bool,
    threads: int | None,
    **data: Any,
) -> None:
    """Search under a budget, quantise, and show what was found: sensitivities, choice, frontier."""
    from ..calibration.auto import CANDIDATES, FRONTIER_FILE, search_and_quantize
    from ..calibration.data import DataOptions

    names = asked["candidates"].split(",") if asked["candidates"] else _offered(CANDIDATES, target)
    names, cache = [name.strip() for name in names], asked["kv_cache"] or "float"
    dtype = asked["dtype"] or (target.dtype if target else "fp16")
    if target is not None:
        _check_all(names, dtype, cache, target)
    bundle, search = search_and_quantize(
        source,
        output,
        budget,
        candidates=names,
        dtype=dtype,
        kv_cache=cache,
        methods=methods,
        data=DataOptions(**data),
        max_length=max_length,
        overwrite=overwrite,
        threads=threads,
        phases=progress,
    )
    if as_json:
        print_json(bundle.manifest.to_dict())
    else:
        click.echo(table(*search.table()) + "\n\n" + search.plot())
    total = sum(spec.size for spec in bundle.manifest.files.values())
    say(f"wrote {output}: auto, {size(total)}; the frontier as a picture: {output / FRONTIER_FILE}")
    say(quality_text(bundle.manifest.quality))


def _offered(candidates: tuple[str, ...], target: "Target | None") -> list[str]:
    """The precisions to choose from: what the target builds, NVFP4 among them."""
    if target is None:
        return list(candidates)
    needs = {"int8-weight": "int8", "int4": "int4", "nvfp4": "nvfp4"}
    return [name for name in (*candidates, "nvfp4") if name == "float" or needs[name] in target.precisions]


def _check_all(candidates: list[str], dtype: str, kv_cache: str, target: "Target") -> None:
    from ..engines.targets import check
    from ..precision.plan import Plan, Rule

    for name in candidates:
        check(Plan("auto", dtype, kv_cache, (Rule("*", "*", name),)), target)


def _budget(source: str, budgets: tuple[int | None, float | None, float | None], target: "Target | None") -> Any:
    """The one budget that was given. A latency is that of reading the decoder's weights once."""
    size_, kld, latency = budgets
    if sum(budget is not None for budget in budgets) != 1:
        raise click.UsageError("--precision auto needs one of --budget-size, --budget-kld, --budget-latency")
    require("quantisation", "export", "onnxscript")
    from ..calibration.auto import Budget

    if latency is None:
        return Budget(size_, kld)
    if target is None:
        raise click.UsageError("--budget-latency is a device's: name it with --target")
    from ..engines.roofline import decode_bytes

    return Budget(decoder=decode_bytes(latency, target))


def quality_text(quality: Any) -> str:
    """A bundle's quality in a line."""
    if quality is None:
        return "quality: not measured"
    rows = f"{quality['samples']} rows of the {quality['data']}"
    text = f"KLD {quality['kld']:.2e} nats, top-1 agreement {100 * quality['top1_agreement']:.2f} %"
    if quality["accuracy"] is not None:
        exact, reference = 100 * quality["accuracy"], 100 * quality["accuracy_reference"]
        text += f", exact answers {exact:.1f} % (full precision {reference:.1f} %)"
    return f"{text}; on {rows}"


def _target(name: str | None) -> "Target | None":
    if name is None:
        return None
    from ..engines.targets import target

    return target(name)


def _plan(
    asked: dict[str, Any], target: "Target | None", recipe: Path | None, observer: str | None, without: tuple[str, ...]
) -> tuple["Plan", "Methods"]:
    """The plan and the methods that the options ask for."""
    require("quantisation", "export", "onnxscript")
    from ..calibration.recipe import Methods, Recipe

    if recipe is not None:
        given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
        if given:
            raise click.UsageError(f"--recipe says it all: leave {', '.join(given)} out")
        found = Recipe.read(recipe)
        plan, methods = found.plan, found.methods
    else:
        plan, methods = _default(asked, target), Methods()
    return plan, _changed(methods, observer, without)


def _methods(observer: str | None, without: tuple[str, ...]) -> "Methods":
    from ..calibration.recipe import Methods

    return _changed(Methods(), observer, without)


def _changed(methods: "Methods", observer: str | None, without: tuple[str, ...]) -> "Methods":
    changes: dict[str, Any] = {name.replace("-", "_"): False for name in without}
    if observer is not None:
        changes["observer"] = observer
    return replace(methods, **changes)


def _default(asked: dict[str, Any], target: "Target | None") -> "Plan":
    from ..precision.plan import default_plan

    if asked["precision"] is None and target is None:
        raise click.UsageError("give --precision, or --target to take that target's")
    dtype = asked["dtype"] or (target.dtype if target else "fp16")
    options = {name: asked[name] for name in ("vision", "lm_head", "kv_cache") if asked[name] is not None}
    if asked["precision"] is None and target is not None and not options:
        from ..engines.targets import recommended

        return replace(recommended(target), dtype=dtype)
    return default_plan(asked["precision"] or target.decoder, dtype, **options)  # type: ignore[union-attr]


def _show(source: str, plan: "Plan", methods: "Methods", max_length: int | None, as_json: bool) -> None:
    """Print the plan, with what its rules come to for this checkpoint."""
    from ..export.checkpoint import Checkpoint
    from ..export.draft import Draft

    draft = Draft.make(Checkpoint.open(source), plan, max_length)
    rows = draft.summary()
    if as_json:
        modules = [{"modules": m, "precision": p, "bytes": n, "reason": r} for m, p, n, r in rows]
        print_json({"plan": plan.to_dict(), "methods": methods.to_dict(), "bytes": draft.nbytes, "modules": modules})
        return
    cells = [(modules, precision, size(count), reason) for modules, precision, count, reason in rows]
    click.echo(table(cells, ("modules", "precision", "size", "because")))
    click.echo(f"\n{plan.name}: {size(draft.nbytes)} in all; KV cache {plan.kv_cache}; everything else {plan.dtype}")
