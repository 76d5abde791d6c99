"""The script that builds engines elsewhere: what it calls, with every shape, wherever it is run from."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onevision_edge.bundle import Bundle, Manifest
from onevision_edge.engines.commands import SCRIPT, commands, script
from onevision_edge.engines.dialects import BuildOptions
from onevision_edge.engines.profiles import InputRange, Profile, inputs_of, part_profiles, profiles

PARTS = ("vision", "decoder")
ENDS = ("min", "opt", "max")
ALL = BuildOptions(
    builderOptimizationLevel=4,
    memPoolSize={"workspace": 2**30},
    timingCacheFile="timing.cache",
    versionCompatible=True,
    hardwareCompatibilityLevel="ampere+",
    stripWeights=True,
    weightStreaming=True,
    profilingVerbosity="detailed",
)
BASH = shutil.which("bash") or pytest.skip("no bash", allow_module_level=True)

# A tool that notes its arguments, one a line, and fails where the graph is not where it is said to be.
TOOL = """#!/bin/sh
if [ "$1" = --help ]; then echo "{help}"; exit 0; fi
for word in "$@"; do
  printf '%s\\n' "$word"
  case "$word" in --onnx=*) test -f "${{word#--onnx=}}" || exit 9 ;; *.onnx) test -f "$word" || exit 9 ;; esac
done >> "{log}"
echo >> "{log}"
"""


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    shutil.copytree(golden_bundle("fp16"), tmp_path / "a bundle")
    return Bundle.open(tmp_path / "a bundle")


def chosen(manifest: Manifest, decode_profile: bool = False) -> tuple[Profile, ...]:
    return profiles(manifest, max_pixels=448 * 448, max_tokens=64, max_batch=2, decode_profile=decode_profile)


def write(bundle: Bundle, capabilities: tuple[str, ...] = ("sm80", "sm86"), decode_profile: bool = False) -> Path:
    found = commands(bundle.manifest, PARTS, chosen(bundle.manifest, decode_profile), BuildOptions(), capabilities)
    path = bundle.directory / "engines" / "some target" / SCRIPT
    path.parent.mkdir(parents=True)
    adopt = "onevision-edge build BUNDLE --target x --adopt"
    path.write_text(script(found, capabilities, capabilities, adopt))
    path.chmod(0o755)
    return path


def run(path: Path, *arguments: str, tool: str = "", help_text: str = "") -> tuple[int, str, list[list[str]]]:
    """Run the script from elsewhere with one tool on PATH: exit status, its output, and the arguments of each call."""
    tools = path.parent / "tools"
    tools.mkdir(exist_ok=True)
    log = path.parent / "calls"
    for name in ("dirname", "grep"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name) or name)
    if tool:
        (tools / tool).write_text(TOOL.format(help=help_text, log=log))
        (tools / tool).chmod(0o755)
    done = subprocess.run(
        [BASH, str(path), *arguments], cwd="/", env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    calls = log.read_text().split("\n\n")[:-1] if log.exists() else []
    return done.returncode, done.stderr + done.stdout, [call.splitlines() for call in calls]


def shapes_of(call: list[str], profile: int = 0) -> dict[str, dict[str, tuple[int, ...]]]:
    """min, opt and max of each input in a call of trtexec or tensorrt_rtx."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    seen = dict.fromkeys(ENDS, -1)
    for word in call:
        if match := re.fullmatch(r"--(min|opt|max)Shapes=(.*)", word):
            seen[match[1]] += 1
            if seen[match[1]] == profile:
                for item in match[2].split(","):
                    name, _, shape = item.rpartition(":")
                    found.setdefault(name, {})[match[1]] = tuple(map(int, shape.split("x")))
    return found


def expected(ranges: list[InputRange]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {r.name: {end: getattr(r, end) for end in ENDS} for r in ranges}


@pytest.mark.parametrize("capabilities", [("sm80", "sm86"), ("sm87",)])
@pytest.mark.parametrize("decode_profile", [False, True])
def test_the_script_is_sound(bundle: Bundle, capabilities: tuple[str, ...], decode_profile: bool) -> None:
    path = write(bundle, capabilities, decode_profile)
    subprocess.run([BASH, "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    assert str(bundle.directory) not in path.read_text()


@pytest.mark.parametrize(("help_text", "typed"), [("--stronglyTyped  Create a network", True), ("--onnx", False)])
def test_trtexec_builds_both_parts_with_every_shape(bundle: Bundle, help_text: str, typed: bool) -> None:
    """From any directory. TensorRT 10 is asked for strong typing, 11 has no flag for it."""
    status, output, calls = run(write(bundle), "trtexec", tool="trtexec", help_text=help_text)
    place = str(bundle.directory).replace(" ", "\\ ")
    adopt = f"onevision-edge build {place} --target x --adopt --engine tensorrt"
    assert (status, output) == (0, f"built; the runtime takes them after: {adopt}\n")
    (wide,) = chosen(bundle.manifest)
    assert len(calls) == 2
    for part, call in zip(PARTS, calls, strict=True):
        spec = bundle.graph(part)
        assert call[:2] == [f"--onnx=../../{part}.onnx", f"--saveEngine={part}.engine"]
        assert shapes_of(call) == expected(inputs_of(spec, wide))
        assert ("--stronglyTyped" in call) == typed
        assert not {"--fp16", "--int8", "--fp8", "--bf16", "--int4", "--best"} & set(call)
        free = {t.name for t in spec.inputs if any(isinstance(size, str) for size in t.shape)}
        assert set(shapes_of(call)) == free | ({"valid_length"} if part == "decoder" else set())


def test_profiles_come_one_after_another(bundle: Bundle) -> None:
    _, _, calls = run(write(bundle, decode_profile=True), "trtexec", tool="trtexec")
    vision, decoder = calls
    both = chosen(bundle.manifest, decode_profile=True)
    assert [word for word in decoder if word.startswith("--profile=")] == ["--profile=0", "--profile=1"]
    assert not [word for word in vision if word.startswith("--profile=")]
    for i, profile in enumerate(part_profiles("decoder", both)):
        assert shapes_of(decoder, i) == expected(inputs_of(bundle.graph("decoder"), profile))


def test_tensorrt_rtx_is_the_default_where_it_builds(bundle: Bundle) -> None:
    status, _, calls = run(write(bundle), tool="tensorrt_rtx")
    assert status == 0
    assert len(calls) == 2
    (wide,) = chosen(bundle.manifest)
    for part, call in zip(PARTS, calls, strict=True):
        assert "--computeCapabilities=80,86" in call
        assert shapes_of(call) == expected(inputs_of(bundle.graph(part), wide))


def test_polygraphy_has_the_same_shapes(bundle: Bundle) -> None:
    status, _, calls = run(write(bundle), "polygraphy", tool="polygraphy")
    assert status == 0
    (wide,) = chosen(bundle.manifest)
    for part, call in zip(PARTS, calls, strict=True):
        assert call[:2] == ["convert", f"../../{part}.onnx"]
        assert "--strongly-typed" in call
        for end in ENDS:
            start = call.index(f"--trt-{end}-shapes") + 1
            ranges = inputs_of(bundle.graph(part), wide)
            shapes = [f"{r.name}:[{','.join(map(str, getattr(r, end)))}]" for r in ranges]
            assert call[start : start + len(shapes)] == shapes


def test_a_missing_tool_is_named(bundle: Bundle) -> None:
    status, errors, calls = run(write(bundle, ("sm87",)))
    assert (status, calls) == (1, [])
    assert errors == "trtexec is not on PATH: install it, or name another tool, of trtexec, polygraphy\n"


def test_an_unknown_tool(bundle: Bundle) -> None:
    status, errors, _ = run(write(bundle), "grep")
    assert (status, errors) == (2, "unknown tool grep\n")


def test_a_tool_that_fails_stops_the_script(bundle: Bundle) -> None:
    path = write(bundle)
    (bundle.directory / "vision.onnx").unlink()
    status, _, calls = run(path, "trtexec", tool="trtexec")
    assert status == 9
    assert calls == []


def test_tensorrt_rtx_is_left_out_where_it_does_not_build(bundle: Bundle) -> None:
    found = commands(bundle.manifest, PARTS, chosen(bundle.manifest), BuildOptions(), ("sm80", "sm90"))
    assert list(found) == ["trtexec", "polygraphy"]
    found = commands(bundle.manifest, PARTS, chosen(bundle.manifest), BuildOptions(stripWeights=True), ("sm80",))
    assert list(found) == ["trtexec", "polygraphy"]


def test_options_have_each_tools_names(bundle: Bundle) -> None:
    found = commands(bundle.manifest, ["decoder"], chosen(bundle.manifest), ALL, ("sm87",))
    trtexec, polygraphy = found["trtexec"]["decoder"], found["polygraphy"]["decoder"]
    for word in (
        "--builderOptimizationLevel=4",
        "--memPoolSize=workspace:1073741824B",
        "--timingCacheFile=timing.cache",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--stripWeights",
        "--weightStreaming",
        "--profilingVerbosity=detailed",
    ):
        assert word in trtexec
    text = " ".join(polygraphy)
    for words in (
        "--builder-optimization-level 4",
        "--pool-limit workspace:1073741824",
        "--load-timing-cache timing.cache --save-timing-cache timing.cache",
        "--version-compatible",
        "--hardware-compatibility-level ampere_plus",
        "--strip-plan",
        "--weight-streaming",
        "--profiling-verbosity detailed",
    ):
        assert words in text
