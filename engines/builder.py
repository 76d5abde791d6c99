"""From a bundle to engines beside it: what is refused is refused first, then each graph is built in its own process."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle, BundleWriter, Phases, file_sha256, no_phases, writing
from ..config import read_json
from ..errors import OneVisionError
from ..runtime.memory import memory_field
from .commands import SCRIPT, commands, engine_file, script
from .dialects import RTX, TENSORRT, BuildOptions, Dialect
from .estimate import Estimate, check_fits, estimate
from .gpu import compute_capability
from .linears import plan_of
from .process import run_worker
from .profiles import Profile, inputs_of, part_profiles, profiles
from .record import BUNDLE, ENGINES, RECORD, EngineRecord, EngineSet, check_engine, source_digests
from .targets import Target, check, target


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """A build, decided and checked. dialect: None where it is left to the device, by the commands.

    again: the command that builds the same once more, over what is there, as the record keeps it.
    """

    bundle: Bundle
    parts: tuple[str, ...]
    targets: tuple[Target, ...]
    dialect: Dialect | None
    why_not: str  # why it is not built here
    profiles: tuple[Profile, ...]
    options: BuildOptions
    estimate: Estimate
    commands: dict[str, dict[str, list[str]]] = field(hash=False)
    again: str

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities of the targets, each once."""
        return tuple(dict.fromkeys(t.capability for t in self.targets if t.capability))

    @property
    def folder(self) -> Path:
        """Where the engines go: engines/<target>/ in the bundle."""
        return self.bundle.directory / ENGINES / "+".join(t.name for t in self.targets)

    @property
    def script(self) -> str:
        """The shell script of the commands."""
        adopt = self.again.removesuffix(" --overwrite") + " --adopt" if self.again else ""
        return script(self.commands, [t.name for t in self.targets], self.capabilities, adopt)


def plan_build(
    path: str | os.PathLike[str],
    targets: Sequence[str],
    *,
    engine: str | None = None,
    parts: Sequence[str] | None = None,
    options: BuildOptions | None = None,
    max_pixels: int | None = None,
    again: str = "",
    **limits: Any,
) -> BuildPlan:
    """Decide a build of the bundle at `path` for targets, by name; several are compute capabilities of one engine.

    engine: tensorrt-rtx, tensorrt, or None for the one that can build for them here; where none can, the plan holds
    commands alone. limits: max_tokens, max_batch, max_images, max_rows, decode_profile (see profiles.profiles).
    Raises OneVisionError for what a target lacks before anything else is looked at.
    """
    bundle, options = Bundle.open(path), options or BuildOptions()
    found = tuple(_target(name) for name in targets)
    for one in found:
        check(plan_of(bundle.manifest), one)
    parts = tuple(parts or bundle.manifest.graphs)
    for part in parts:
        bundle.graph(part)
    capabilities = tuple(dict.fromkeys(t.capability or "" for t in found))
    dialect, why_not = _choose(engine, capabilities)
    if dialect is not None:
        dialect.check(options)
    pixels = _max_pixels(bundle) if max_pixels is None else max_pixels
    shapes = profiles(bundle.manifest, max_pixels=pixels, **limits)
    expected = estimate(bundle.manifest, parts, shapes, found)
    told = commands(bundle.manifest, parts, shapes, options, capabilities)
    again = again or f"onevision-edge build {BUNDLE} --target {','.join(targets)} --overwrite"
    return BuildPlan(bundle, parts, found, dialect, why_not, shapes, options, expected, told, again)


def _target(name: str) -> Target:
    found = target(name)
    if found.capability is None:
        raise OneVisionError("the cpu target is built alone, by --target cpu")
    return found


def _max_pixels(bundle: Bundle) -> int:
    """What the bundle's own preprocessing shrinks images to."""
    from ..runtime.images import ImageProcessor  # which imports Pillow

    path = bundle.directory / "preprocessor_config.json"
    return ImageProcessor.from_config(read_json(path) if path.is_file() else {}).max_pixels


def _choose(engine: str | None, capabilities: tuple[str, ...]) -> tuple[Dialect | None, str]:
    """What builds for these here; None, and why, where nothing does and nothing was asked for."""
    foreign = _foreign(capabilities)
    if engine == RTX.name or (engine is None and not foreign):
        if foreign:
            raise OneVisionError(
                f"TensorRT-RTX builds for {', '.join(RTX.capabilities or ())}, not for {', '.join(foreign)}: leave "
                f"--engine out, and {SCRIPT} is written for the device itself"
            )
        dialect = RTX
    else:
        dialect = TENSORRT
    try:
        dialect.load()
        if dialect is TENSORRT:
            _check_gpu(capabilities)
    except OneVisionError as error:
        if engine is not None:
            raise
        return None, str(error)
    return dialect, ""


def _foreign(capabilities: Sequence[str]) -> list[str]:
    """Those that TensorRT-RTX does not build for."""
    return [name for name in capabilities if name not in (RTX.capabilities or ())]


def _check_gpu(capabilities: tuple[str, ...]) -> None:
    """TensorRT builds for the GPU it runs on."""
    here = compute_capability()
    if here is None:
        raise OneVisionError("TensorRT builds on the GPU it builds for, and there is none here")
    if capabilities != (here,):
        raise OneVisionError(
            f"TensorRT builds on the GPU it builds for, which is {here} here, not {', '.join(capabilities)}"
        )


def check_plan(plan: BuildPlan) -> None:
    """Raise OneVisionError, with numbers, where the estimate says that a build cannot fit: see estimate.check_fits."""
    here = plan.dialect is not None
    ram = memory_field("MemAvailable") if here else None
    check_fits(plan.estimate, plan.targets, ram, _free(plan.bundle.directory) if here else None)


def _free(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def build(
    plan: BuildPlan, *, overwrite: bool = False, phases: Phases = no_phases, verbose: bool = False
) -> EngineSet | None:
    """Build a plan's engines into its folder: all of them and their record, or nothing.

    Returns the record; None where only the commands were written, which is what there is for targets of TensorRT
    alone. Raises OneVisionError where a build fails, the folder exists (unless `overwrite`), or the disk is full.
    verbose: pass TensorRT's verbose messages on.
    """
    if plan.dialect is None and not _foreign(plan.capabilities):
        raise OneVisionError(f"{plan.why_not}; or take the commands of --dry-run to where it is")
    with writing(plan.folder, overwrite, marker=SCRIPT, what="folder of engines") as writer:
        _write_script(writer, plan.script)
        record = None
        if plan.dialect is not None:
            record = _build_parts(plan, plan.dialect, writer, phases, verbose)
            writer.path(RECORD).write_text(_text(record), encoding="utf-8")
            writer.seal(RECORD)
    return record


def adopt(plan: BuildPlan) -> EngineSet:
    """Write the record of engines that the commands built in a plan's folder, by the library that is installed here.

    Raises OneVisionError where an engine is missing, or is not what the plan says as far as its header tells.
    """
    if plan.dialect is None:
        raise OneVisionError(f"engines are adopted where they run: {plan.why_not}")
    engines = {}
    for part in plan.parts:
        path = plan.folder / engine_file(part)
        if not path.is_file():
            raise OneVisionError(f"{path} is missing: run {plan.folder / SCRIPT} first")
        digests = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        engines[part] = _record(plan, part, {**digests, "seconds": None, "peak_rss": None, "layers": {}})
    found = _set(plan, plan.dialect, plan.dialect.load().__version__, engines)
    staged = plan.folder / f".{RECORD}.partial"
    staged.write_text(_text(found), encoding="utf-8")
    try:
        os.replace(staged, plan.folder / RECORD)
        for part in plan.parts:
            check_engine(plan.bundle, plan.folder, part, engine=found.engine, version=found.version)
    except OneVisionError:
        (plan.folder / RECORD).unlink()
        raise
    return found


def _text(record: EngineSet) -> str:
    return json.dumps(record.to_dict(), indent=1) + "\n"


def _write_script(writer: BundleWriter, text: str) -> None:
    writer.path(SCRIPT).write_text(text, encoding="utf-8")
    writer.path(SCRIPT).chmod(0o755)
    writer.seal(SCRIPT)


def _build_parts(plan: BuildPlan, dialect: Dialect, writer: BundleWriter, phases: Phases, verbose: bool) -> EngineSet:
    engines, version = {}, ""
    for part in plan.parts:
        spec = plan.bundle.graph(part)
        ranges = [inputs_of(spec, profile) for profile in part_profiles(part, plan.profiles)]
        job = {
            "engine": dialect.name,
            "bundle": str(plan.bundle.directory.absolute()),
            "part": part,
            "capabilities": plan.capabilities,
            "options": plan.options.to_dict(),
            "ranges": [[asdict(r) for r in inputs] for inputs in ranges],
            "output": str(writer.path(engine_file(part)).absolute()),
            "verbose": verbose,
        }
        with phases(f"build {part}", "steps") as report:
            done = run_worker(job, report)
        version = done.pop("version")
        engines[part] = _record(plan, part, done)
    return _set(plan, dialect, version, engines)


def _record(plan: BuildPlan, part: str, done: dict[str, Any]) -> EngineRecord:
    """The record of an engine: what its build tells, and what it was built of and for."""
    file = plan.bundle.graph(part).file
    limits = {profile.name: profile.limits() for profile in part_profiles(part, plan.profiles)}
    sources = source_digests(plan.bundle, [file, f"{file}.data"])
    return EngineRecord(file=engine_file(part), sources=sources, profiles=limits, **done)


def _set(plan: BuildPlan, dialect: Dialect, version: str, engines: dict[str, EngineRecord]) -> EngineSet:
    return EngineSet(
        engine=dialect.name,
        version=version,
        target="+".join(t.name for t in plan.targets),
        capabilities=plan.capabilities,
        options=plan.options.to_dict(),
        command=plan.again,
        estimate=plan.estimate.to_dict(),
        engines=engines,
    )
