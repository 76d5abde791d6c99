"""The commands that build the same engines elsewhere: trtexec, tensorrt_rtx and polygraphy, as a shell script."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from ..bundle import Manifest
from .dialects import COMPATIBILITIES, POOLS, RTX, TENSORRT, BuildOptions
from .profiles import InputRange, Profile, inputs_of, part_profiles
from .record import BUNDLE

SCRIPT = "build-engines.sh"
TOOLS = {  # tool: what it is, and where it comes from
    "trtexec": "TensorRT 10.15 or later, on the device itself; on Jetson it is in /usr/src/tensorrt/bin",
    "tensorrt_rtx": "TensorRT-RTX",
    "polygraphy": "pip install polygraphy, with TensorRT",
}
_UP = PurePosixPath("../..")  # from engines/<target>/ to the bundle


def engine_file(part: str) -> str:
    """The name of a part's engine file."""
    return f"{part}.engine"


def commands(
    manifest: Manifest,
    parts: Sequence[str],
    profiles: Sequence[Profile],
    options: BuildOptions,
    capabilities: Sequence[str],
) -> dict[str, dict[str, list[str]]]:
    """The arguments of each tool for each part, by tool and part; paths are relative to engines/<target>/.

    trtexec's are those of TensorRT 11; the script adds --stronglyTyped for 10. tensorrt_rtx is there where it builds
    for every compute capability, and has every option.
    """
    found: dict[str, dict[str, list[str]]] = {}
    portable = all(name in (RTX.capabilities or ()) for name in capabilities)
    portable = portable and not any(option in RTX.lacks for option in options.to_dict())
    for part in parts:
        spec = manifest.graphs[part]
        graph, engine = str(_UP / spec.file), engine_file(part)
        ranges = [inputs_of(spec, profile) for profile in part_profiles(part, profiles)]
        found.setdefault("trtexec", {})[part] = _trtexec(graph, engine, ranges, options)
        if portable:
            found.setdefault("tensorrt_rtx", {})[part] = _tensorrt_rtx(graph, engine, ranges, options, capabilities)
        found.setdefault("polygraphy", {})[part] = _polygraphy(graph, engine, ranges, options)
    return found


def _trtexec(graph: str, engine: str, ranges: list[list[InputRange]], options: BuildOptions) -> list[str]:
    """--skipInference: it would time the engine on made-up inputs, positions among them that no cache row has."""
    return [
        "trtexec",
        f"--onnx={graph}",
        f"--saveEngine={engine}",
        *_shapes(ranges),
        *_flags(options),
        "--skipInference",
    ]


def _tensorrt_rtx(
    graph: str, engine: str, ranges: list[list[InputRange]], options: BuildOptions, capabilities: Sequence[str]
) -> list[str]:
    targets = ",".join(name.removeprefix("sm") for name in capabilities)
    head = ["tensorrt_rtx", f"--onnx={graph}", f"--saveEngine={engine}", f"--computeCapabilities={targets}"]
    return [*head, *_shapes(ranges), *_flags(options), "--skipInference"]


def _shapes(ranges: list[list[InputRange]]) -> list[str]:
    """--minShapes and so on, after --profile=N where there are several; a shape tensor's values look like a shape."""
    found = []
    for i, inputs in enumerate(ranges):
        found += [f"--profile={i}"] if len(ranges) > 1 else []
        for option, end in (("minShapes", "min"), ("optShapes", "opt"), ("maxShapes", "max")):
            shapes = ",".join(f"{r.name}:{'x'.join(map(str, getattr(r, end)))}" for r in inputs)
            found.append(f"--{option}={shapes}")
    return found


def _flags(options: BuildOptions) -> list[str]:
    found = []
    for name, value in options.to_dict().items():
        if value is True:
            found.append(f"--{name}")
        elif isinstance(value, Mapping):
            found.append(f"--{name}=" + ",".join(f"{pool}:{size}B" for pool, size in value.items()))
        else:
            found.append(f"--{name}={value}")
    return found


def _polygraphy(graph: str, engine: str, ranges: list[list[InputRange]], options: BuildOptions) -> list[str]:
    """Its --strongly-typed is there in either version of TensorRT."""
    found = ["polygraphy", "convert", graph, "--convert-to", "trt", "-o", engine, "--strongly-typed"]
    for inputs in ranges:
        for option, end in (("--trt-min-shapes", "min"), ("--trt-opt-shapes", "opt"), ("--trt-max-shapes", "max")):
            found += [option, *(f"{r.name}:[{','.join(map(str, getattr(r, end)))}]" for r in inputs)]
    o = options
    if o.builderOptimizationLevel is not None:
        found += ["--builder-optimization-level", str(o.builderOptimizationLevel)]
    if o.memPoolSize:
        found += ["--pool-limit", *(f"{POOLS[pool].lower()}:{size}" for pool, size in o.memPoolSize.items())]
    if o.timingCacheFile:
        found += ["--load-timing-cache", o.timingCacheFile, "--save-timing-cache", o.timingCacheFile]
    if o.hardwareCompatibilityLevel:
        found += ["--hardware-compatibility-level", COMPATIBILITIES[o.hardwareCompatibilityLevel].lower()]
    if o.profilingVerbosity:
        found += ["--profiling-verbosity", o.profilingVerbosity]
    switches = (("versionCompatible", "--version-compatible"), ("stripWeights", "--strip-plan"))
    found += [flag for name, flag in (*switches, ("weightStreaming", "--weight-streaming")) if getattr(o, name)]
    return found


def script(
    found: dict[str, dict[str, list[str]]], targets: Sequence[str], capabilities: Sequence[str], adopt: str = ""
) -> str:
    """A shell script of the commands: ./build-engines.sh [TOOL] builds every part beside itself.

    adopt: the command, but for --engine, that records what was built, with BUNDLE for where the bundle is.
    """
    default = "tensorrt_rtx" if "tensorrt_rtx" in found else "trtexec"
    lines = [
        "#!/usr/bin/env bash",
        f"# Builds the engines of this bundle for {', '.join(targets)} ({', '.join(capabilities)}), beside itself.",
        f"# Usage: ./{SCRIPT} [TOOL], of:",
        *(f"#   {tool:13}{TOOLS[tool]}{' (default)' if tool == default else ''}" for tool in found),
        "# Graphs are strongly typed, so no precision is asked for. An engine runs on the version of TensorRT that",
        "# built it; trtexec's and polygraphy's also only on the kind of GPU they ran on.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        f'tool="${{1:-{default}}}"',
        'if ! command -v "$tool" >/dev/null; then',
        '  echo "$tool is not on PATH: install it, or name another tool, of ' + ", ".join(found) + '" >&2',
        "  exit 1",
        "fi",
        "",
        'case "$tool" in',
    ]
    for tool, parts in found.items():
        lines.append(f"{tool})")
        if tool == "trtexec":
            lines += [
                "  # TensorRT 10 asks for strong typing by a flag that 11 has no more.",
                "  typed=",
                "  if trtexec --help 2>&1 | grep -q -e --stronglyTyped; then typed=--stronglyTyped; fi",
            ]
        for part, arguments in parts.items():
            lines += [f"  # {part}", *_command(tool, arguments)]
        if adopt:
            engine = RTX.name if tool == "tensorrt_rtx" else TENSORRT.name
            before, _, after = f"built; the runtime takes them after: {adopt} --engine {engine}".partition(BUNDLE)
            lines.append(f"""  printf '%s%q%s\\n' {shlex.quote(before)} "$(cd ../.. && pwd)" {shlex.quote(after)}""")
        lines.append("  ;;")
    return "\n".join([*lines, "*)", '  echo "unknown tool $tool" >&2', "  exit 2", "  ;;", "esac", ""])


def _command(tool: str, arguments: Sequence[str]) -> list[str]:
    """A command over several lines, an option on each."""
    words = [shlex.quote(word) for word in arguments]
    if tool == "trtexec":
        words.append('${typed:+"$typed"}')
    if tool == "polygraphy":
        return _options(words)
    return [f"  {words[0]} \\", *(f"    {word} \\" for word in words[1:-1]), f"    {words[-1]}"]


def _options(words: list[str]) -> list[str]:
    """An option and its values on a line."""
    rows: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-") and rows[-1]:
            rows.append([])
        rows[-1].append(word)
    texts = [" ".join(row) for row in rows]
    return [f"  {texts[0]} \\", *(f"    {text} \\" for text in texts[1:-1]), f"    {texts[-1]}"]
