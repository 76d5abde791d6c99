"""onevision-edge build"""

import logging
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import print_json, progress, say, size, table

if TYPE_CHECKING:
    from ..engines.builder import BuildPlan
    from ..engines.record import EngineSet

# As engines.dialects has them, which is heavier to import for --help.
_ENGINES = ("tensorrt-rtx", "tensorrt")
_VERBOSITIES = ("layer_names_only", "detailed", "none")
_FLOATS = ("auto", "int8", "bf16", "fp32")
_COMPATIBILITIES = ("ampere+", "sameComputeCapability")
_OPTIONS = (
    "builderOptimizationLevel",
    "timingCacheFile",
    "versionCompatible",
    "hardwareCompatibilityLevel",
    "stripWeights",
    "weightStreaming",
    "profilingVerbosity",
)


def _option(name: str, **settings: Any) -> Any:
    """An option under trtexec's name; click would make it lower-case."""
    return click.option(f"--{name}", name, **settings)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "names", required=True, help="Device or compute capability; several as sm80,sm86.")
@click.option("--engine", type=click.Choice(_ENGINES), help="What compiles.  [default: what can for the target, here]")
@click.option("--parts", help="Graphs to build, comma-separated.  [default: those of the bundle]")
@click.option("--max-pixels", type=click.IntRange(1), help="Of an image after resizing.  [default: the bundle's own]")
@click.option("--max-images", type=click.IntRange(1), default=1, show_default=True, help="Of one size in one call.")
@click.option("--max-tokens", type=click.IntRange(1), help="Of one decoder call: a chunk of prefill.  [default: 512]")
@click.option("--max-batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--max-rows", type=click.IntRange(1), help="Of logits in one call.  [default: 32]")
@click.option(
    "--decode-profile", is_flag=True, help="A second profile, for decode alone; weights but INT4's are stored twice."
)
@_option("builderOptimizationLevel", type=click.IntRange(0, 5), help="How long to look for fast kernels.")
@_option("memPoolSize", metavar="POOL:SIZE", help="Memory limits, workspace:4096 (MiB) or workspace:4G.")
@_option("timingCacheFile", type=click.Path(dir_okay=False), help="Kernel timings to reuse and add to (TensorRT).")
@_option("versionCompatible", is_flag=True, help="For later versions of TensorRT, too.")
@_option("hardwareCompatibilityLevel", type=click.Choice(_COMPATIBILITIES), help="For other GPUs, too (TensorRT).")
@_option("stripWeights", is_flag=True, help="Leave weights out, to be refitted from the graph (TensorRT).")
@_option("weightStreaming", is_flag=True, help="Let weights stay on the host in part.")
@_option("profilingVerbosity", type=click.Choice(_VERBOSITIES), help="What the engine tells of its layers.")
@click.option(
    "--floats",
    type=click.Choice(_FLOATS),
    default="auto",
    show_default=True,
    help="Of the cpu target: what products run in whose weights are stored as floats.",
)
@click.option("--adopt", is_flag=True, help="Build nothing: record what build-engines.sh has built here.")
@click.option("--force", is_flag=True, help="Build although the estimate says that it does not fit.")
@click.option("--overwrite", is_flag=True, help="Replace the target's engines if there are any.")
@click.option(
    "--check/--no-check",
    default=None,
    help="Compare with ONNX Runtime first: what TensorRT parsed, layer by layer, or the cpu engine's outputs.  "
    "[default: the latter alone]",
)
@click.option("--dry-run", is_flag=True, help="Print the estimate and the commands, and stop.")
@click.option("--verbose", is_flag=True, help="Pass TensorRT's messages on.")
@click.option("--json", "as_json", is_flag=True, help="Print the engines' record, or the estimate with --dry-run.")
def build(
    bundle: Path,
    names: str,
    engine: str | None,
    parts: str | None,
    adopt: bool,
    force: bool,
    overwrite: bool,
    check: bool | None,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile a bundle's graphs for a target, into engines/<target>/ of the bundle.

    TensorRT-RTX does so on any machine, for GPUs from sm75 on but not for Jetson, Hopper and data-centre Blackwell.
    For those TensorRT builds on the device itself: build-engines.sh, written beside the engines, has the commands.

    The cpu target packs the weights for this package's own kernels, which a C++ compiler makes at first use; it takes
    --parts, --floats, --overwrite and --check alone, and runs of the bundle use it from then on.
    """
    if _split(names) == ["cpu"]:
        _build_cpu(bundle, _split(parts) if parts is not None else None, overwrite, as_json)
        return
    if options.pop("floats") != "auto":
        raise click.UsageError("--floats belongs to the cpu target")
    from ..engines.builder import adopt as adopt_engines
    from ..engines.builder import build as build_engines
    from ..engines.builder import check_plan, plan_build

    if verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stderr)
    chosen = _split(parts) if parts is not None else None
    plan = plan_build(
        bundle,
        _split(names),
        engine=engine,
        parts=chosen,
        options=_build_options(options),
        again=_again(names),
        **options,
    )
    if adopt:
        _tell(plan, adopt_engines(plan), as_json)
        return
    if not as_json:
        _say_estimate(plan, sys.stdout if dry_run else sys.stderr)
    if dry_run:
        _show(plan, as_json)
        return
    if not force:
        check_plan(plan)
    if check:
        _check(plan)
    record = build_engines(plan, overwrite=overwrite, phases=progress, verbose=verbose)
    _tell(plan, record, as_json)


def _build_cpu(bundle: Path, parts: list[str] | None, overwrite: bool, as_json: bool) -> None:
    """The cpu target, whose options are few. Raises UsageError for one of the others."""
    from ..engines.cpu.build import build_cpu

    context = click.get_current_context()
    if given := [option.opts[0] for option in _given(context) if option.name not in _CPU_OPTIONS]:
        raise click.UsageError(
            f"{', '.join(given)}: the cpu target takes --parts, --floats, --check and --overwrite alone"
        )
    record = build_cpu(
        bundle,
        parts=parts,
        floats=context.params["floats"],
        check=context.params["check"] is not False,
        overwrite=overwrite,
        phases=progress,
    )
    if as_json:
        print_json(record.to_dict())
        return
    rows = [_cpu_row(part, one) for part, one in record.parts.items()]
    say(table(rows, ("part", "size", "read per row", "float products", "differs by", "cosine", "time, plain graph's")))
    say(f"wrote {bundle / 'engines' / 'cpu'}: {', '.join(record.parts)} for {record.machine['kernels']} kernels")


def _given(context: click.Context) -> Iterator[click.Option]:
    """The options that stand on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if isinstance(parameter, click.Option) and source == click.core.ParameterSource.COMMANDLINE:
            yield parameter


def _cpu_row(part: str, one: Any) -> tuple[str, ...]:
    found = sum(spec.size for spec in one.files.values())
    check = one.check
    compared = (f"{check['difference']:.2e}", f"{check['cosine']:.5f}") if check else ("not checked", "")
    times = f"{1e3 * check['seconds']:.0f} ms, {1e3 * check['plain_seconds']:.0f} ms" if check else ""
    return part, size(found), size(one.bytes_per_row), one.floats, *compared, times


_CPU_OPTIONS = ("names", "parts", "floats", "overwrite", "check", "as_json")


def _tell(plan: "BuildPlan", record: "EngineSet | None", as_json: bool) -> None:
    if as_json:
        print_json(record.to_dict() if record else {"engines": {}, "commands": plan.commands, "why": plan.why_not})
    _say_written(plan, record)


def _check(plan: "BuildPlan") -> None:
    """Print what every call came to. Raises OneVisionError where a layer departs."""
    from ..engines.check import check_graphs
    from ..engines.dialects import RTX
    from ..errors import OneVisionError

    with progress("check", "calls") as report:
        found = check_graphs(plan.bundle, plan.parts, plan.dialect or RTX, report)
    rows = [(one.part, one.call, str(one.comparison.compared), f"{one.difference:.2e}", one.verdict) for one in found]
    say(table(rows, ("part", "call", "values compared", "outputs differ by", "verdict")))
    wrong = [one for one in found if not one.passed]
    if wrong:
        raise OneVisionError(f"{wrong[0].part}, {wrong[0].call}: {wrong[0].verdict}; nothing was built")


def _split(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise click.UsageError(f"{names!r} is not a list of different names")
    return found


def _build_options(options: dict[str, Any]) -> Any:
    """Takes trtexec's options out of the rest."""
    from ..engines.dialects import BuildOptions, pool_sizes

    pools = options.pop("memPoolSize")
    return BuildOptions(
        memPoolSize=pool_sizes(pools) if pools else {}, **{name: options.pop(name) for name in _OPTIONS}
    )


def _again(names: str) -> str:
    """The command that builds the same again, over what is there, as the record keeps it."""
    from ..engines.record import BUNDLE

    context = click.get_current_context()
    words = ["onevision-edge", "build", BUNDLE, "--target", names]
    for option in _given(context):
        value = context.params.get(option.name or "")
        if option.name not in _REPEATED:
            words += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return shlex.join([*words, "--overwrite"])


_REPEATED = ("names", "adopt", "overwrite", "check", "dry_run", "verbose", "as_json")


def _say_estimate(plan: "BuildPlan", stream: Any) -> None:
    found = plan.estimate
    rows = [(part, size(e.weights), size(e.engine), size(e.build)) for part, e in found.parts.items()]
    lines = [table(rows, ("part", "weights", "engine, about", "memory to build, about")), ""]
    lines.append(f"on the device: about {size(found.device_bytes)}, if all limits are met at once")
    lines += [f"  {item.name}: {size(item.bytes)}, {item.note}" for item in found.memory]
    if found.seconds:
        wide = plan.profiles[0]
        what = {
            "vision": f"vision, {wide.patches.max} patches",
            "prefill": f"prefill, {wide.tokens.max} tokens",
            "decode": f"decode, a token after {wide.length.opt}",
        }
        steps = "; ".join(f"{what[step]}: {1e3 * seconds:.3g} ms" for step, seconds in found.seconds.items())
        lines.append(f"at best, by bandwidth and peak rates: {steps}")
    click.echo("\n".join(lines), file=stream)


def _show(plan: "BuildPlan", as_json: bool) -> None:
    """A dry run's answer: the commands, and what would be refused."""
    refused = _refusal(plan)
    if as_json:
        print_json(
            {
                "engine": plan.dialect.name if plan.dialect else None,
                "target": [t.name for t in plan.targets],
                "capabilities": list(plan.capabilities),
                "profiles": {profile.name: profile.limits() for profile in plan.profiles},
                "estimate": plan.estimate.to_dict(),
                "refused": refused,
                "commands": plan.commands,
            }
        )
        return
    click.echo(f"\n{plan.script}", nl=False)
    if plan.dialect is None:
        say(f"not built here: {plan.why_not}")
    if refused is not None:
        say(f"as it is, this would be refused: {refused}")


def _refusal(plan: "BuildPlan") -> str | None:
    from ..engines.builder import check_plan
    from ..errors import OneVisionError

    try:
        check_plan(plan)
    except OneVisionError as error:
        return str(error)
    return None


def _say_written(plan: "BuildPlan", record: "EngineSet | None") -> None:
    script = plan.folder / "build-engines.sh"
    if record is None:
        say(f"not built here: {plan.why_not}")
        say(f"wrote {script}: run it on the device, with the bundle beside it as it is here")
        return
    for part, engine in record.engines.items():
        took = f" in {engine.seconds:.1f} s" if engine.seconds is not None else ""
        peak = f", {size(engine.peak_rss)} of memory" if engine.peak_rss else ""
        say(f"{part}: {size(engine.size)}{took}{peak}")
    say(f"wrote {plan.folder}: {', '.join(record.engines)} for {', '.join(record.capabilities)}")
