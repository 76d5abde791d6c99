"""onevision-edge build: real engines by TensorRT-RTX without a GPU, TensorRT by a stand-in, refusals, interrupts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import onevision_edge
from onevision_edge.bundle import Bundle, Progress, file_sha256
from onevision_edge.calibration.recipe import Methods
from onevision_edge.cli import main
from onevision_edge.engines import builder, process
from onevision_edge.engines.builder import build, check_plan, plan_build
from onevision_edge.engines.commands import SCRIPT
from onevision_edge.engines.dialects import BuildOptions, pool_sizes
from onevision_edge.engines.linears import plan_of
from onevision_edge.engines.network import ParsedNetwork, check_network
from onevision_edge.engines.process import run_worker
from onevision_edge.engines.record import HEADER_SIZE, RECORD, check_engine, read_header, read_set
from onevision_edge.engines.worker import Phases
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import Plan, Rule, default_plan

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)

HERE = {"engine": "tensorrt-rtx", "version": trt.__version__}
LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)
LIMITS = {"max_pixels": 224 * 224, "max_tokens": 64}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in FP16. Tests write engines into it, each for a target of its own."""
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    onevision_edge.export("demo", bundle, dtype="fp16", max_length=256)
    return bundle


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model under a plan with every precision, and an INT8 cache."""
    bundle = tmp_path_factory.mktemp("mixed") / "bundle"
    plan = default_plan("int4", vision="int8-weight", kv_cache="int8").with_rules(
        Rule("decoder", f"model.layers.*.{module}", precision)
        for module, precision in (("k_proj", "int8"), ("v_proj", "fp8"), ("o_proj", "nvfp4"))
    )
    methods = Methods(smoothquant=False, awq=False, gptq=False)
    options: dict[str, Any] = {"calibration_samples": 2, "evaluate": False, "max_length": 256, "threads": 1}
    onevision_edge.quantize("demo", bundle, plan=plan, methods=methods, **options)
    return bundle


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["build", *map(str, arguments)])


def failure(bundle: Path, *arguments: object) -> str:
    """The message of a command that must fail with exit code 1, and leave nothing."""
    before = engine_files(bundle)
    result = call(bundle, *arguments)
    assert result.exit_code == 1, result.output
    assert engine_files(bundle) == before
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def engine_files(bundle: Path) -> set[Path]:
    """Everything under engines/, what is half-written or hidden too."""
    return {path for path in (bundle / "engines").rglob("*") if path.is_file()}


# Builds


def test_the_command_builds_a_bundles_engines(demo: Path) -> None:
    result = call(demo, "--target", "a100", "--max-pixels", 224 * 224, "--max-tokens", 64, "--json")
    assert result.exit_code == 0, result.output
    folder = demo / "engines" / "a100"
    assert sorted(path.name for path in folder.iterdir()) == [SCRIPT, "decoder.engine", RECORD, "vision.engine"]
    record = json.loads(result.stdout)
    assert record == json.loads((folder / RECORD).read_text())
    assert (record["engine"], record["version"], record["capabilities"]) == (*HERE.values(), ["sm80"])
    assert record["command"] == (
        "onevision-edge build BUNDLE --target a100 --max-pixels 50176 --max-tokens 64 --overwrite"
    )
    bundle = Bundle.open(demo)
    bundle.verify()
    for part, engine in record["engines"].items():
        path, _ = check_engine(bundle, folder, part, **HERE, capability="sm80", verify=True)
        assert (engine["size"], engine["sha256"]) == (path.stat().st_size, file_sha256(path))
        assert engine["size"] > sum(bundle.graph(part).weights.values())
        assert set(engine["sources"]) == {f"{part}.onnx", f"{part}.onnx.data"}
        assert engine["layers"]["ATTENTION_INPUT"] == 4
        assert 0 < engine["seconds"] < 60
        assert engine["profiles"]["wide"]["patches"]["max"] == 256
        assert engine["profiles"]["wide"]["tokens"]["max"] == 64
        expected = record["estimate"]["parts"][part]
        assert expected["engine"] == pytest.approx(engine["size"], rel=0.25)
        assert expected["build"] == pytest.approx(engine["peak_rss"], rel=0.25)
    assert "wrote " in result.stderr
    assert os.access(folder / SCRIPT, os.X_OK)


def test_engines_are_not_replaced_unasked(demo: Path) -> None:
    plan = plan_build(demo, ["sm75"], parts=["vision"], again="again", **LIMITS)
    build(plan)
    before = engine_files(demo)
    assert "exists; pass --overwrite to replace it" in failure(demo, "--target", "sm75", "--parts", "vision")
    record = build(plan, overwrite=True)
    assert record is not None
    assert engine_files(demo) == before
    assert list(record.engines) == ["vision"]


def test_one_engine_for_several_capabilities(demo: Path) -> None:
    result = call(demo, "--target", "sm80,rtx-3090,sm120", "--parts", "vision")
    assert result.exit_code == 0, result.output
    folder = demo / "engines" / "sm80+rtx-3090+sm120"
    header = read_header((folder / "vision.engine").read_bytes()[:HEADER_SIZE])
    assert header is not None
    assert header.capabilities == read_set(folder).capabilities == ("sm80", "sm86", "sm120")
    assert header.version == trt.__version__
    check_engine(Bundle.open(demo), folder, "vision", **HERE, capability="sm120")


def test_a_decode_profile_is_a_second_one(demo: Path) -> None:
    sizes = []
    for decode_profile in (False, True):
        plan = plan_build(demo, ["sm89"], parts=["decoder"], decode_profile=decode_profile, **LIMITS)
        record = build(plan, overwrite=True)
        assert record is not None
        engine = record.engines["decoder"]
        sizes.append(engine.size)
        assert plan.estimate.parts["decoder"].engine == pytest.approx(engine.size, rel=0.25)
    assert list(engine.profiles) == ["prefill", "decode"]
    assert engine.profiles["decode"]["tokens"]["max"] == 1
    assert engine.limits == engine.profiles["prefill"]
    weights = sum(Bundle.open(demo).graph("decoder").weights.values())
    assert sizes[1] - sizes[0] > weights


def test_every_precision_is_built_and_checked(mixed: Path) -> None:
    record = build(plan_build(mixed, ["sm120"], **LIMITS))
    assert record is not None
    assert record.engines["decoder"].layers["QUANTIZE"] > 8
    assert record.engines["vision"].layers["DEQUANTIZE"] == 18


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--builderOptimizationLevel", 1], {"builderOptimizationLevel": 1}),
        (["--memPoolSize", "workspace:64"], {"memPoolSize": {"workspace": 2**26}}),
        (
            ["--weightStreaming", "--profilingVerbosity", "none"],
            {"weightStreaming": True, "profilingVerbosity": "none"},
        ),
    ],
)
def test_options_reach_the_builder(demo: Path, options: list[Any], kept: dict[str, Any]) -> None:
    result = call(demo, "--target", "sm86", "--parts", "vision", *options, "--overwrite", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["options"] == kept


def test_images_are_as_large_as_the_bundle_makes_them(demo: Path, golden_bundle: Callable[[str], Path]) -> None:
    """392 x 392 pixels in the shipped one; 1600 x 1600, in whole tokens, where it does not say."""
    assert plan_build(demo, ["sm80"]).profiles[0].patches.max == 784
    assert not (golden_bundle("bf16") / "preprocessor_config.json").exists()
    assert plan_build(golden_bundle("bf16"), ["sm80"]).profiles[0].patches.max == 13060


@pytest.mark.parametrize("part", ["vision", "decoder"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_other_floats_are_checked_too(golden_bundle: Callable[[str], Path], dtype: str, part: str) -> None:
    """FP32 has no fused attention, which is not asked of it."""
    Parsed(golden_bundle(dtype), part).check()


# What is not built here


@pytest.mark.parametrize("target", ["jetson-agx-orin-64gb", "h100-80gb-sxm", "sm100", "sm110"])
def test_targets_of_tensorrt_get_their_commands(demo: Path, target: str) -> None:
    result = call(demo, "--target", target, "--overwrite")
    assert result.exit_code == 0, result.output
    folder = demo / "engines" / target
    assert [path.name for path in folder.iterdir()] == [SCRIPT]
    assert "not built here: TensorRT is not installed" in result.stderr
    assert f"wrote {folder / SCRIPT}: run it on the device" in result.stderr
    subprocess.run(["bash", "-n", folder / SCRIPT], check=True)
    with pytest.raises(OneVisionError, match=r"holds no engine.json"):
        check_engine(Bundle.open(demo), folder, "decoder", **HERE)


def test_a_dry_run_writes_nothing(demo: Path) -> None:
    before = engine_files(demo)
    result = call(demo, "--target", "l4", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "engine, about" in result.stdout
    assert "at best, by bandwidth and peak rates: vision" in result.stdout
    assert "--minShapes=inputs_embeds:1x1x192," in result.stdout
    found = json.loads(call(demo, "--target", "l4", "--dry-run", "--json").stdout)
    assert (found["engine"], found["capabilities"]) == ("tensorrt-rtx", ["sm89"])
    assert found["estimate"]["device_bytes"] > 0
    assert set(found["commands"]) == {"trtexec", "tensorrt_rtx", "polygraphy"}
    assert engine_files(demo) == before


def test_a_dry_run_tells_what_does_not_fit(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has the commands all the same: they are for another machine."""
    monkeypatch.setattr(builder, "memory_field", lambda name: 1000)
    result = call(demo, "--target", "l4", "--dry-run")
    assert result.exit_code == 0
    assert "tensorrt_rtx " in result.stdout
    assert result.stderr.startswith("as it is, this would be refused: the build needs about 0.30 GB of memory")
    found = json.loads(call(demo, "--target", "l4", "--dry-run", "--json").stdout)
    assert found["refused"].startswith("the build needs")


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu,sm80"], "the cpu target is built alone"),
        (["--target", "v100"], "v100 (sm70) is not a target"),
        (["--target", "sm90", "--engine", "tensorrt-rtx"], "not for sm90: leave --engine out"),
        (["--target", "sm80", "--engine", "tensorrt"], "TensorRT is not installed: pip install tensorrt"),
        (["--target", "sm80", "--parts", "tower"], "holds no tower graph"),
        (["--target", "sm80", "--timingCacheFile", "t"], "TensorRT-RTX has no --timingCacheFile: it times no kernels"),
        (["--target", "sm80", "--versionCompatible"], "TensorRT-RTX has no --versionCompatible"),
        (["--target", "sm80", "--stripWeights"], "TensorRT-RTX has no --stripWeights"),
        (["--target", "sm80", "--hardwareCompatibilityLevel", "ampere+"], "name several compute capabilities"),
        (["--target", "sm80", "--memPoolSize", "workspace"], "give pool:size"),
        (["--target", "sm80", "--memPoolSize", "heap:4"], "--memPoolSize is 'heap': choose one of workspace"),
        (["--target", "sm80", "--max-tokens", "257"], "more than the KV cache's 256 rows"),
        (["--target", "sm80", "--max-pixels", "700"], "less than one image token"),
    ],
)
def test_what_cannot_be_built_is_refused(demo: Path, arguments: list[str], message: str) -> None:
    assert message in failure(demo, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--target", "sm80", "--engine", "onnx"],
        ["--target", "sm80,,sm86"],
        ["--target", "sm80", "--max-batch", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(demo: Path, arguments: list[str]) -> None:
    assert call(demo, *arguments).exit_code == 2


def test_a_precision_that_the_target_lacks_is_refused_first(mixed: Path) -> None:
    """Before the graphs, the engine and its options are looked at."""
    message = failure(mixed, "--target", "a100", "--parts", "tower", "--timingCacheFile", "t", "--max-pixels", 1)
    assert "has no FP8 (it came with sm89)" in message


def test_a_device_too_small_is_refused_unless_forced(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ["--target", "rtx-3070", "--parts", "decoder", "--max-batch", 40000]
    assert "rtx-3070 has 8.59 GB of memory, and this needs" in failure(demo, *batch)
    monkeypatch.setattr(builder, "memory_field", lambda name: 1000)
    assert "of memory, and this machine has 0.00 GB available" in failure(demo, "--target", "sm86", "--parts", "vision")
    plan = plan_build(demo, ["sm86"], parts=["vision"], **LIMITS)
    with pytest.raises(OneVisionError, match="this machine has"):
        check_plan(plan)
    result = call(demo, "--target", "sm86", "--parts", "vision", "--force", "--overwrite")
    assert result.exit_code == 0, result.output


def test_too_full_a_disk_is_refused(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_free", lambda path: 10**6)
    assert "and the disk has 0.00 GB free" in failure(demo, "--target", "sm86", "--parts", "vision")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_fills_up_leaves_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "engine_file", lambda part: "/dev/full")
    assert "the disk is full" in failure(demo, "--target", "sm121", "--parts", "vision")
    assert not (demo / "engines" / "sm121").exists()


def test_without_a_compiler_there_are_still_the_commands(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "RTX", replace(builder.RTX, modules=("no_such_module",)))
    message = failure(demo, "--target", "sm121")
    assert message.startswith("Error: TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs")
    assert message.endswith("; or take the commands of --dry-run to where it is")
    result = call(demo, "--target", "sm121", "--dry-run")
    assert result.exit_code == 0
    assert "tensorrt_rtx " in result.stdout
    assert "not built here: TensorRT-RTX is not installed" in result.stderr


def test_a_changed_graph_is_not_built(demo: Path) -> None:
    path = demo / "vision.onnx.data"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    try:
        assert "vision.onnx.data has changed since the bundle was written" in failure(demo, "--target", "sm121")
    finally:
        path.write_bytes(data)


# Parsed networks that are not their graphs


class Parsed:
    """A parsed graph; TensorRT's objects must outlive it."""

    def __init__(self, bundle: Path, part: str) -> None:
        self.part, self.opened = part, Bundle.open(bundle)
        self.manifest, self.spec = self.opened.manifest, self.opened.graph(part)
        self.builder = trt.Builder(LOGGER)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, LOGGER)
        assert self.parser.parse_from_file(str(bundle / self.spec.file))

    def check(self, spec: Any = None, config: Any = None, plan: Plan | None = None) -> None:
        parsed = ParsedNetwork(trt, self.network)
        check_network(
            parsed, self.part, spec or self.spec, config or self.manifest.model, plan or plan_of(self.manifest)
        )

    def refused(self, **other: Any) -> str:
        with pytest.raises(OneVisionError) as refusal:
            self.check(**other)
        return str(refusal.value)


@pytest.fixture
def decoder(demo: Path) -> Parsed:
    return Parsed(demo, "decoder")


def test_sound_networks_pass(demo: Path, mixed: Path) -> None:
    for part in ("vision", "decoder"):
        Parsed(demo, part).check()
        parsed = Parsed(mixed, part)
        assert parsed.manifest.quantization is not None
        parsed.check(plan=Plan.from_dict(parsed.manifest.quantization["plan"]))


def test_an_input_that_no_layer_reads(decoder: Parsed) -> None:
    decoder.network.add_input("nonpad_kv_seqlen", trt.int64, (-1,))
    assert decoder.refused() == "decoder.onnx: the parser dropped the input nonpad_kv_seqlen: no layer reads it"


def test_an_output_of_another_type(decoder: Parsed) -> None:
    (logits, *others) = decoder.spec.outputs
    spec = replace(decoder.spec, outputs=(replace(logits, dtype="float16"), *others))
    assert decoder.refused(spec=spec) == (
        "decoder.onnx: the output logits is float32 (-1, -1, 512) in the network, not float16 (-1, -1, 512)"
    )


def test_an_input_that_is_missing_or_too_many(decoder: Parsed) -> None:
    first, *others = decoder.spec.inputs
    spec = replace(decoder.spec, inputs=(first, *others, replace(first, name="extra")))
    assert "the input extra is missing in the network" in decoder.refused(spec=spec)
    spec = replace(decoder.spec, inputs=tuple(others))
    assert "the network has an input that the graph has not: inputs_embeds" in decoder.refused(spec=spec)


def test_attention_that_is_not_fused(decoder: Parsed) -> None:
    text = replace(decoder.manifest.model.text, num_hidden_layers=5)
    config = replace(decoder.manifest.model, text=text)
    assert decoder.refused(config=config) == "decoder.onnx: 4 attention layers of 5 are fused in the network"


def test_a_product_that_is_not_what_the_plan_says(decoder: Parsed, mixed: Path) -> None:
    assert decoder.refused(plan=default_plan("int8")) == (
        "decoder.onnx: model.layers.0.self_attn.q_proj has float16 weights in the network; the plan says int8 weights "
        "with float16 scales, one for an output, inputs rounded to int8"
    )
    assert "q_proj has int4 weights with float16 scales, one for 32 inputs in the network" in Parsed(
        mixed, "decoder"
    ).refused(plan=default_plan("nvfp4"))


# Interrupts


@contextmanager
def interrupted(title: str, unit: str = "B") -> Iterator[Progress]:
    """Ctrl-C at the first step of the build."""

    def report(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    yield report


def test_an_interrupt_ends_the_build_and_leaves_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[int, list[Path]]] = []
    stop = process._stop

    def stopped(worker: Any) -> None:
        stop(worker)
        ended.append((worker.returncode, list((demo / "engines").glob(".sm121.partial/*.engine"))))

    monkeypatch.setattr(process, "_stop", stopped)
    before, started = engine_files(demo), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build(plan_build(demo, ["sm121"], **LIMITS), phases=interrupted)
    assert time.monotonic() - started < 15
    assert ended == [(0, [])]  # by itself, at a step of its progress, before there was an engine
    assert engine_files(demo) == before
    assert not list((demo / "engines").glob("*sm121*"))


def test_a_build_ends_with_whoever_wants_it(demo: Path, tmp_path: Path) -> None:
    """The end of its input, as when the command is killed, stops the compiler between two steps."""
    job = job_of(demo, tmp_path)
    program = "from onevision_edge.engines.worker import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    worker = subprocess.Popen(
        [sys.executable, "-c", program], stdin=-1, stdout=-1, stderr=-3, text=True, env=environment
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(job) + "\n")
    worker.stdin.close()
    answers = [json.loads(line) for line in worker.stdout]
    worker.stdout.close()
    assert worker.wait(20) == 0
    assert answers[-1] == {"error": "the build was stopped"}
    assert not Path(job["output"]).exists()


def test_ctrl_c_in_a_terminal(demo: Path, python: Callable[..., subprocess.Popen[str]]) -> None:
    """SIGINT to the command while a build runs: exit code 1, no engines, nothing half-written."""
    program = "import sys; from onevision_edge.cli import main; main(['build', *sys.argv[1:]])"
    worker = python(program, demo, "--target", "dgx-spark", "--max-pixels", 50176)
    deadline = time.monotonic() + 30
    while not list((demo / "engines").glob(".dgx-spark.partial/*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.send_signal(signal.SIGINT)
    _, errors = worker.communicate(timeout=30)
    assert worker.returncode == 1
    assert errors.endswith("Aborted!\n")
    assert not list((demo / "engines").glob("*dgx-spark*"))


def test_progress_goes_up_to_the_end(demo: Path) -> None:
    told: list[int] = []
    titles: list[tuple[str, str]] = []

    @contextmanager
    def phases(title: str, unit: str = "B") -> Iterator[Progress]:
        titles.append((title, unit))
        yield lambda done, total, label: told.append(1000 * done // total)

    build(plan_build(demo, ["sm89"], parts=["vision"], **LIMITS), overwrite=True, phases=phases)
    assert titles == [("build vision", "steps")]
    assert told == sorted(told)
    assert len(told) > 50
    assert told[-1] == 1000


def test_phases_within_phases() -> None:
    phases = Phases()
    assert phases.fraction() == 0
    phases.start("build", None, 4)
    phases.step("build", 0)
    phases.start("graph", "build", 2)
    phases.step("graph", 0)
    assert phases.fraction() == pytest.approx(0.375)
    phases.finish("graph")
    phases.step("build", 1)
    assert phases.fraction() == pytest.approx(0.5)
    phases.step("unknown", 3)
    phases.finish("unknown")


# TensorRT, by a stand-in: TensorRT-RTX's parser under TensorRT's name, and no compiler behind it

FAKE = '''
"""What the builder sees of TensorRT, noted in the file FAKE_TENSORRT names."""
import json, os
import tensorrt_rtx_bindings as rtx
from tensorrt_rtx_bindings import *

__version__ = os.environ["FAKE_TENSORRT_VERSION"]
noted = {"flags": [], "profiles": 0, "set": {}}
mode = os.environ.get("FAKE_TENSORRT_MODE", "")


class Cache:
    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b"+timings"


class Config:
    progress_monitor = None

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)
        if name != "progress_monitor" and name != "cache":
            noted["set"][name] = getattr(value, "name", value)

    def set_flag(self, flag):
        noted["flags"].append(flag.name)

    def set_memory_pool_limit(self, pool, size):
        noted["set"][pool.name] = size

    def create_timing_cache(self, data):
        return Cache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache

    def get_timing_cache(self):
        return self.cache

    def add_optimization_profile(self, profile):
        noted["profiles"] += 1


class Builder(rtx.Builder):
    def create_network(self, flags):
        noted["network"] = flags
        return super().create_network(0)

    def create_builder_config(self):
        return Config()

    def build_serialized_network(self, network, config):
        with open(os.environ["FAKE_TENSORRT"], "w") as file:
            json.dump(noted, file)
        if mode == "crash":
            os.write(2, b"out of luck\\n")
            os._exit(3)
        if mode == "killed":
            os.kill(os.getpid(), 9)
        return None if mode == "none" else b"plan of " + __version__.encode()
'''


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes `import tensorrt` find the stand-in, of a version, on a GPU; returns where it notes what it is told."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "tensorrt.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "fake")

    def install(version: str, gpu: str | None = "sm87", mode: str = "") -> Path:
        monkeypatch.setitem(os.environ, "FAKE_TENSORRT", str(tmp_path / "noted.json"))
        monkeypatch.setitem(os.environ, "FAKE_TENSORRT_VERSION", version)
        monkeypatch.setitem(os.environ, "FAKE_TENSORRT_MODE", mode)
        monkeypatch.setattr(builder, "compute_capability", lambda: gpu)
        return tmp_path / "noted.json"

    yield install
    sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize(("version", "flags"), [("10.15.1.29", 1), ("10.16.0.72", 1), ("11.4.0.106", 0)])
def test_tensorrt_is_asked_for_strong_typing_where_it_must_be(
    demo: Path, tensorrt: Callable[..., Path], version: str, flags: int
) -> None:
    noted = tensorrt(version)
    bit = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    record = build(plan_build(demo, ["sm87"], decode_profile=True, **LIMITS), overwrite=True)
    assert record is not None
    assert (record.engine, record.version) == ("tensorrt", version)
    told = json.loads(noted.read_text())
    assert told["network"] == flags * bit
    assert (told["profiles"], told["flags"], told["set"]) == (2, [], {})
    path, _ = check_engine(
        Bundle.open(demo), demo / "engines" / "sm87", "decoder", engine="tensorrt", version=version, verify=True
    )
    assert path.read_bytes() == b"plan of " + version.encode()


def test_tensorrt_takes_every_option(demo: Path, tensorrt: Callable[..., Path], tmp_path: Path) -> None:
    noted, cache = tensorrt("10.16.0.72"), tmp_path / "timing.cache"
    cache.write_bytes(b"old")
    options = BuildOptions(
        builderOptimizationLevel=5,
        memPoolSize=pool_sizes("workspace:2G,tacticSharedMem:48K"),
        timingCacheFile=str(cache),
        versionCompatible=True,
        hardwareCompatibilityLevel="ampere+",
        stripWeights=True,
        weightStreaming=True,
        profilingVerbosity="detailed",
    )
    record = build(plan_build(demo, ["sm87"], parts=["vision"], options=options, **LIMITS), overwrite=True)
    assert record is not None
    assert record.options == options.to_dict()
    told = json.loads(noted.read_text())
    assert told["flags"] == ["VERSION_COMPATIBLE", "STRIP_PLAN", "WEIGHT_STREAMING"]
    assert told["set"] == {
        "builder_optimization_level": 5,
        "WORKSPACE": 2 * 2**30,
        "TACTIC_SHARED_MEMORY": 48 * 2**10,
        "hardware_compatibility_level": "AMPERE_PLUS",
        "profiling_verbosity": "DETAILED",
    }
    assert cache.read_bytes() == b"old+timings"


@pytest.mark.parametrize(
    ("version", "gpu", "message"),
    [
        ("10.3.0.30", "sm87", "TensorRT 10.3.0.30 is too old for these graphs: 10.15 is the first"),
        ("10.16.0.72", None, "TensorRT builds on the GPU it builds for, and there is none here"),
        ("10.16.0.72", "sm86", "TensorRT builds on the GPU it builds for, which is sm86 here, not sm87"),
    ],
)
def test_tensorrt_that_cannot_build(
    demo: Path, tensorrt: Callable[..., Path], version: str, gpu: str | None, message: str
) -> None:
    """Asked for, that is an error; else the commands are written."""
    tensorrt(version, gpu)
    with pytest.raises(OneVisionError) as refusal:
        plan_build(demo, ["sm87"], engine="tensorrt", **LIMITS)
    assert str(refusal.value) == message
    plan = plan_build(demo, ["sm87"], **LIMITS)
    assert (plan.dialect, plan.why_not) == (None, message)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("none", "vision: TensorRT builds no engine: it does not say why"),
        ("crash", "the build of the vision engine ended with status 3 (out of luck)"),
        ("killed", "ended with status -9: it was killed, as the system does when memory runs out"),
    ],
)
def test_builds_that_fail_leave_nothing(demo: Path, tensorrt: Callable[..., Path], mode: str, message: str) -> None:
    tensorrt("11.4.0.106", "sm110", mode)
    assert message in failure(demo, "--target", "sm110", "--parts", "vision", "--overwrite")


# Engines that the commands built


def test_engines_that_were_built_on_the_device_are_adopted(demo: Path, tensorrt: Callable[..., Path]) -> None:
    tensorrt("10.16.0.72")
    folder, command = demo / "engines" / "jetson-orin", [demo, "--target", "jetson-orin", "--max-tokens", 64]
    build(replace(plan_build(demo, ["jetson-orin"], max_tokens=64), dialect=None))
    assert f"vision.engine is missing: run {folder / SCRIPT} first" in failure(*command, "--adopt")
    for part in ("vision", "decoder"):
        (folder / f"{part}.engine").write_bytes(b"a plan")
    result = call(*command, "--adopt", "--json")
    assert result.exit_code == 0, result.output
    here = {"engine": "tensorrt", "version": "10.16.0.72", "capability": "sm87"}
    for part in ("vision", "decoder"):
        _, record = check_engine(Bundle.open(demo), folder, part, **here, verify=True)
        assert record.engines[part].limits["tokens"]["max"] == 64
        assert (record.engines[part].seconds, record.engines[part].peak_rss) == (None, None)
    assert record.command == "onevision-edge build BUNDLE --target jetson-orin --max-tokens 64 --overwrite"
    assert json.loads(result.stdout) == record.to_dict() | {"capabilities": ["sm87"]}


def test_what_is_no_engine_is_not_adopted(demo: Path) -> None:
    call(demo, "--target", "rtx-4060", "--parts", "vision")
    folder = demo / "engines" / "rtx-4060"
    (folder / RECORD).unlink()
    (folder / "vision.engine").write_bytes(bytes(1000))
    assert "vision.engine is not a TensorRT-RTX engine" in failure(
        demo, "--target", "rtx-4060", "--parts", "vision", "--adopt"
    )


def test_engines_are_adopted_where_they_run(demo: Path) -> None:
    assert "engines are adopted where they run: TensorRT is not installed" in failure(
        demo, "--target", "sm90", "--adopt"
    )


def test_the_script_ends_with_the_command_that_adopts(demo: Path) -> None:
    found = call(demo, "--target", "sm86", "--max-batch", 2, "--dry-run").stdout
    adopt = "' --target sm86 --max-batch 2 --adopt"
    assert f"{adopt} --engine tensorrt-rtx'" in found
    assert found.count(f"{adopt} --engine tensorrt'") == 2


# Workers


def job_of(bundle: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    plan = plan_build(bundle, ["sm80"], parts=["vision"], **LIMITS)
    ranges = [asdict(r) for r in builder.inputs_of(plan.bundle.graph("vision"), plan.profiles[0])]
    job = {
        "engine": "tensorrt-rtx",
        "bundle": str(bundle),
        "part": "vision",
        "capabilities": ["sm80"],
        "options": {},
        "ranges": [ranges],
        "output": str(folder / "vision.engine"),
        "verbose": False,
    }
    return job | changes


def test_a_profile_that_the_compiler_refuses(demo: Path, tmp_path: Path) -> None:
    job = job_of(demo, tmp_path)
    for r in job["ranges"][0]:
        if r["name"] == "patch_positions":
            r["max"] = (12, 2)
            r["opt"] = (12, 2)
    with pytest.raises(OneVisionError, match=r"^vision: TensorRT-RTX builds no engine: .+"):
        run_worker(job)


def test_shape_tensors_are_those_of_the_network(demo: Path, tmp_path: Path) -> None:
    job = job_of(demo, tmp_path)
    job["ranges"][0][0]["values"] = True
    with pytest.raises(OneVisionError, match="the network's shape tensors are none, not pixel_values"):
        run_worker(job)


def test_a_graph_that_does_not_parse(demo: Path, tmp_path: Path) -> None:
    path = demo / "vision.onnx"
    data = path.read_bytes()
    path.write_bytes(b"\xff" * len(data))
    try:
        with pytest.raises(OneVisionError, match=r"^vision.onnx: TensorRT-RTX does not parse it: .+"):
            run_worker(job_of(demo, tmp_path))
    finally:
        path.write_bytes(data)
