"""The TensorRT backend of the runtime, end to end without a GPU: the network that TensorRT-RTX parsed is interpreted
behind an engine's interface, with the host's memory as the device, and answers as ONNX Runtime does.
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import interpreting as shared
import numpy as np
import pytest
from click.testing import CliRunner

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.cli import main
from onevision_edge.engines.builder import build, plan_build
from onevision_edge.engines.interpreter.context import Engine
from onevision_edge.engines.profiles import Profile, inputs_of, part_profiles, profiles
from onevision_edge.engines.record import EngineSet
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import Plan, default_plan
from onevision_edge.runtime.backend import SessionOptions
from onevision_edge.runtime.device import ALIGNMENT, DeviceArray, HostDriver, Staging
from onevision_edge.runtime.engine_backend import Engines
from onevision_edge.runtime.engine_graph import EngineGraph
from onevision_edge.runtime.model import Model
from onevision_edge.runtime.provider_graph import ProviderGraph

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)

DEMO = Path(onevision_edge.__file__).parent / "demo"
MAX_LENGTH = 512


class Replaying(HostDriver):
    """Host memory with CUDA graphs: one that is replayed under other conditions than it was captured in fails."""

    def __init__(self) -> None:
        super().__init__()
        self.captured = self.replayed = 0
        self.graph: EngineGraph | None = None

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        assert self.graph is not None
        context = self.graph.context
        conditions = self._conditions(context)
        enqueue()
        self.captured += 1

        def replay() -> None:
            assert self._conditions(context) == conditions
            enqueue()
            self.replayed += 1

        return replay

    def _conditions(self, context: Any) -> tuple[Any, ...]:
        assert self.graph is not None
        names = list(self.graph.tensors)
        lengths = np.ctypeslib.as_array(
            (np.ctypeslib.ctypes.c_int64 * 1).from_address(context.get_tensor_address("valid_length"))
        )
        return (
            [context.get_tensor_shape(name) for name in names],
            [context.get_tensor_address(name) for name in names],
            context.active_optimization_profile,
            int(lengths[0]),
        )


@dataclass
class Interpreted:
    """A backend of interpreted engines, with profiles as they are built with."""

    limits: dict[str, Any] = field(default_factory=dict)
    cuda_graphs: bool = False
    opened: dict[str, EngineGraph] = field(default_factory=dict)

    @cached_property
    def driver(self) -> Any:
        return Replaying() if self.cuda_graphs else HostDriver()

    def open(self, bundle: Bundle, part: str) -> EngineGraph:
        spec = bundle.graph(part)
        network = shared.parsed(trt, bundle.path(spec.file)).read
        chosen = profiles(bundle.manifest, **{"max_pixels": 512 * 512, "max_batch": 2, **self.limits})
        engine = Engine(trt, network, [ranges(spec, p) for p in part_profiles(part, chosen)])
        context = engine.create_execution_context()
        graph = EngineGraph(engine, spec, self.driver, f"the {part} engine", context, self.cuda_graphs)
        if part == "decoder" and self.cuda_graphs:
            self.driver.graph = graph
        self.opened[part] = graph
        return graph


def ranges(spec: Any, profile: Profile) -> dict[str, Any]:
    return {r.name: (r.min, r.opt, r.max) for r in inputs_of(spec, profile)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The shipped model under a plan, made once."""
    root = tmp_path_factory.mktemp("bundles")
    plans: dict[str, Plan] = {
        "fp32": default_plan("float", "fp32"),
        "fp16": default_plan("float", "fp16"),
        "bf16": default_plan("float", "bf16"),
        "int8": default_plan("int8", "fp16", vision="int8", kv_cache="int8"),
        "int4": default_plan("int4", "fp16"),
    }

    def made(name: str) -> Path:
        if not (root / name).exists():
            if name in ("fp32", "fp16", "bf16"):
                onevision_edge.export("demo", root / name, dtype=name, max_length=MAX_LENGTH)
            else:
                onevision_edge.quantize(
                    "demo",
                    root / name,
                    plan=plans[name],
                    calibration_samples=16,
                    evaluate=False,
                    max_length=MAX_LENGTH,
                )
        return root / name

    return made


QUESTIONS = json.loads((DEMO / "images" / "questions.json").read_text())


def messages(entry: dict[str, Any]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": str(DEMO / "images" / name)} for name in entry["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": entry["prompt"]}]}]


# Whole generations.


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_questions_are_answered_as_by_onnx_runtime(bundle: Callable[[str], Path], precision: str) -> None:
    """Images of one and of two, chunked prefill, decode steps replayed as graphs."""
    opened = Bundle.open(bundle(precision))
    backend = Interpreted(cuda_graphs=True)
    ours, theirs = Model(opened, backend, prefill_chunk=24), Model(opened, SessionOptions(exact=True))
    for entry in (QUESTIONS[0], next(q for q in QUESTIONS if len(q["images"]) == 2)):
        found, wanted = (model.generate(messages(entry), max_tokens=64) for model in (ours, theirs))
        assert found.token_ids == wanted.token_ids
        assert found.text == entry["answer"]
    assert backend.driver.captured >= 2
    assert backend.driver.replayed >= 4


def test_bf16_runs_where_onnx_runtime_has_no_kernels(bundle: Callable[[str], Path]) -> None:
    model = Model(Bundle.open(bundle("bf16")), Interpreted())
    assert model.generate(messages(QUESTIONS[0]), max_tokens=64).text == QUESTIONS[0]["answer"]


def test_a_batch_is_answered_as_its_sequences_are(bundle: Callable[[str], Path]) -> None:
    model = Model(Bundle.open(bundle("fp16")), Interpreted())
    first, second = QUESTIONS[:2]
    together = model.generate([messages(first), messages(second)], max_tokens=64)
    assert [answer.text for answer in together] == [first["answer"], second["answer"]]


def test_logits_and_image_embeddings(bundle: Callable[[str], Path], token_inputs: dict[str, np.ndarray]) -> None:
    """At every position, in chunks of as many rows of logits as the engine gives."""
    opened = Bundle.open(bundle("fp32"))
    ours, theirs = Model(opened, Interpreted()), Model(opened, SessionOptions(exact=True))
    found, wanted = ours.logits(**token_inputs), theirs.logits(**token_inputs)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    pixels, grid = token_inputs["pixel_values"], token_inputs["image_grid_thw"]
    assert np.abs(ours.encode_images(pixels, grid) - theirs.encode_images(pixels, grid)).max() < 1e-4


@pytest.fixture(scope="module")
def token_inputs() -> dict[str, np.ndarray]:
    """Two images of different sizes among text."""
    random = np.random.default_rng(0)
    grid = np.array([[1, 8, 8], [1, 4, 12]])
    config = json.loads((DEMO / "checkpoint" / "config.json").read_text())
    image = config["image_token_id"]
    ids = np.concatenate([[5, 6, 7], [image] * 16, [9], [image] * 12, random.integers(10, 90, 20)])
    pixels = random.standard_normal((112, 588)).astype(np.float32)
    return {"input_ids": ids[None], "pixel_values": pixels, "image_grid_thw": grid}


# Profiles.


def test_a_decode_profile_is_used_for_decode_alone(bundle: Callable[[str], Path]) -> None:
    backend = Interpreted({"decode_profile": True})
    model = Model(Bundle.open(bundle("fp16")), backend)
    chosen: list[tuple[int, int]] = []
    graph = backend.opened["decoder"]
    execute = graph.execute

    def noting(binding: Any) -> None:
        execute(binding)
        chosen.append((binding.shapes["inputs_embeds"][1], graph.context.active_optimization_profile))

    graph.execute = noting  # type: ignore[method-assign]
    assert model.generate(messages(QUESTIONS[0]), max_tokens=64).text == QUESTIONS[0]["answer"]
    assert {profile for tokens, profile in chosen if tokens == 1} == {1}
    assert {profile for tokens, profile in chosen if tokens > 1} == {0}


@pytest.mark.parametrize(
    ("limits", "call", "message"),
    [
        (
            {"max_pixels": 56 * 56},
            "question",
            "is 768 patches, and the vision engine takes 16: resize it to 28 x 56, pass max_pixels=3136 ",
        ),
        (
            {"max_batch": 1},
            "batch",
            "takes 1 sequences at a time, not 2: ask for fewer, or build it with --max",
        ),
    ],
)
def test_what_lies_outside_a_profile_is_refused(
    bundle: Callable[[str], Path], limits: dict[str, Any], call: str, message: str
) -> None:
    model = Model(Bundle.open(bundle("fp16")), Interpreted(limits))
    asked = messages(QUESTIONS[0])
    with pytest.raises(OneVisionError, match=message):
        model.generate([asked, asked] if call == "batch" else asked, max_tokens=4)
    if call == "question":
        model.generate(asked, max_tokens=4, max_pixels=3136)  # as the message says


def test_few_tokens_at_a_time(bundle: Callable[[str], Path]) -> None:
    """A prompt is cut into what the engine takes."""
    model = Model(Bundle.open(bundle("fp16")), Interpreted({"max_tokens": 16, "max_rows": 4}))
    assert model.generate(messages(QUESTIONS[0]), max_tokens=64).text == QUESTIONS[0]["answer"]


def test_rows_are_read_in_steps_that_the_mask_covers(bundle: Callable[[str], Path]) -> None:
    backend = Interpreted()
    Model(Bundle.open(bundle("fp16")), backend)
    graph = backend.opened["decoder"]
    assert [graph.valid_length(end, 512) for end in (1, 128, 129, 500, 512)] == [128, 128, 256, 512, 512]
    assert graph.valid_length(3, 100) == 100


def test_an_engine_of_another_graph_is_refused(bundle: Callable[[str], Path]) -> None:
    backend, opened = Interpreted(), Bundle.open(bundle("fp16"))
    vision = backend.open(opened, "vision")
    with pytest.raises(OneVisionError, match="its inputs are not those the manifest names; build it again"):
        EngineGraph(vision.engine, opened.graph("decoder"), backend.driver, "engine", vision.context)
    other = Bundle.open(bundle("fp32")).graph("vision")
    with pytest.raises(OneVisionError, match="its inputs are not those the manifest names"):
        EngineGraph(vision.engine, other, backend.driver, "engine", vision.context)


# Engine files.


class Built(Engines):
    """Engines as `onevision-edge build` wrote them, checked as ever; then interpreted, on the host."""

    capability = "sm80"

    @cached_property
    def driver(self) -> Any:
        return HostDriver()

    def deserialize(self, bundle: Bundle, part: str, path: Path, found: EngineSet) -> Any:
        return Interpreted().open(bundle, part).engine

    def context(self, engine: Any, kind: str) -> Any:
        return engine.create_execution_context()


@pytest.fixture(scope="module")
def built(bundle: Callable[[str], Path]) -> Bundle:
    """The INT4 bundle with engines for two targets."""
    path = bundle("int4")
    for name in ("sm80", "sm86"):
        build(plan_build(path, [name], max_pixels=512 * 512))
    return Bundle.open(path)


def test_built_engines_answer(built: Bundle) -> None:
    for target in (None, "sm80"):
        model = Model(built, Built(target, verify=True))
        assert model.generate(messages(QUESTIONS[0]), max_tokens=64).text == QUESTIONS[0]["answer"]


def test_inspect_shows_engines(built: Bundle) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(built.directory)]).stdout
    assert "sm86  decoder  tensorrt-rtx" in shown
    assert "up to 512 tokens, 1 batch, 512 length" in shown
    found = json.loads(CliRunner().invoke(main, ["inspect", str(built.directory), "--json"]).stdout)
    assert set(found["engines"]) == {"sm80", "sm86"}


def test_engines_are_chosen_by_the_gpu(built: Bundle) -> None:
    backend = Built()
    assert backend.folder(built).name == "sm80"
    backend.capability = "sm89"
    with pytest.raises(OneVisionError, match="has engines for sm80, sm86: choose one of these"):
        backend.folder(built)
    backend.target = "sm86"
    with pytest.raises(OneVisionError, match=r"was built for sm86, and this GPU is sm89; build it again: .* build "):
        backend.open(built, "decoder")
    backend.target = "sm90"
    with pytest.raises(OneVisionError, match="has no engines for sm90, only sm80, sm86"):
        backend.open(built, "decoder")


def test_a_truncated_engine_is_not_loaded(built: Bundle, tmp_path: Path) -> None:
    copied = Bundle.open(shutil.copytree(built.directory, tmp_path / "copy"))
    engine = next((copied.directory / "engines" / "sm80").glob("decoder*"))
    engine.write_bytes(engine.read_bytes()[:-100])
    with pytest.raises(OneVisionError, match="it was cut or replaced; build it again: onevision-edge build "):
        Built("sm80").open(copied, "decoder")


# Memory.


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    made = HostDriver()
    yield made
    gc.collect()
    assert not made._buffers  # everything was given back


def test_rows_of_device_arrays_lie_in_them(driver: HostDriver) -> None:
    array = DeviceArray.zeros(driver, (4, 3), np.dtype(np.float32))
    other = DeviceArray.zeros(driver, (2, 3), np.dtype(np.float32))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    driver.upload(other.pointer, values)
    array[1:3] = other
    np.testing.assert_array_equal(np.asarray(array), [[0, 0, 0], *values, [0, 0, 0]])
    assert array[1:3].pointer == array.pointer + 12
    np.testing.assert_array_equal(np.asarray(array[2]), values[1])
    assert [row.shape for row in array] == [(3,)] * 4
    assert array.reshape((2, 6)).shape == (2, 6)
    assert len(array[3:9]) == 1
    assert array.pointer % ALIGNMENT == 0
    assert np.asarray(array, np.float64).dtype == np.float64


def test_staging_keeps_its_addresses_while_values_fit(driver: HostDriver) -> None:
    staging = Staging(driver)
    first = staging.upload(np.arange(6).reshape(2, 3))
    assert staging.upload(np.arange(4)) == first
    read = np.empty(32, np.uint8)
    driver.download(read, first)
    np.testing.assert_array_equal(read.view(np.int64), np.arange(4))
    staging.upload(np.arange(60))


def test_a_sequence_that_cannot_be_aligned_is_refused(bundle: Callable[[str], Path]) -> None:
    backend = Interpreted()
    binding = backend.open(Bundle.open(bundle("fp16")), "decoder").bind()
    cache = DeviceArray.zeros(backend.driver, (2, 8), np.dtype(np.float16))
    binding.in_place("past_key.0", "present_key.0", cache[0:1])
    with pytest.raises(OneVisionError, match="ask for one sequence at a time"):
        binding.in_place("past_key.0", "present_key.0", cache[1:2])


# ONNX Runtime's GPU providers.


class OnCpu(ProviderGraph):
    """The graph of a GPU provider, on the CPU's, with the host's memory as the GPU's."""

    def _check_provider(self) -> None:
        pass

    def _providers(self) -> list[Any]:
        return ["CPUExecutionProvider"]


class OnCpuOptions:
    def __init__(self) -> None:
        self.driver = HostDriver()

    def open(self, bundle: Bundle, part: str) -> ProviderGraph:
        spec = bundle.graph(part)
        options = SessionOptions(provider="cuda", exact=True)
        return OnCpu(bundle.path(spec.file), spec, options, self.driver, "cpu")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_arrays_that_lie_on_the_device_are_bound_where_they_lie(
    bundle: Callable[[str], Path], precision: str, token_inputs: dict[str, np.ndarray]
) -> None:
    opened = Bundle.open(bundle(precision))
    ours, theirs = Model(opened, OnCpuOptions()), Model(opened, SessionOptions(exact=True))
    np.testing.assert_array_equal(ours.logits(**token_inputs), theirs.logits(**token_inputs))
    asked = [messages(entry) for entry in QUESTIONS[:2]]
    answers = [[a.token_ids for a in model.generate(asked, max_tokens=64)] for model in (ours, theirs)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "cuda"}, "has no CUDAExecutionProvider, only .*: uninstall onnxruntime.*install onnxruntime-gpu"),
        ({"provider": "tensorrt-rtx"}, "has no NvTensorRTRTXExecutionProvider"),
        ({"provider": "rocm"}, "unknown provider 'rocm': choose one of cpu, cuda, tensorrt-rtx"),
        ({"engines": True}, "has no engines yet: make them with onevision-edge build"),
        ({"engines": "sm86"}, "has no engines yet"),
        ({"engines": "sm86", "threads": 2}, "engines have none"),
    ],
)
def test_what_is_not_here_is_said(bundle: Callable[[str], Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OneVisionError, match=message):
        onevision_edge.load(bundle("fp16"), **options)


def test_engines_are_compared_at_the_ends_of_their_graphs(
    bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onevision_edge.report.parity import sides
    from onevision_edge.report.parity.comparison import Plan as ParityPlan
    from onevision_edge.report.parity.comparison import compare, record_reference
    from onevision_edge.report.parity.gates import load_gates

    path, plan = bundle("fp32"), ParityPlan(samples=2, walked=1, max_tokens=4, examples=0, noise=False)
    recording = record_reference(sides.BundleSide(path, threads=1), plan, tmp_path)
    monkeypatch.setattr(sides, "load", lambda *_, **__: Model(Bundle.open(path), Interpreted()))
    engines = sides.BundleSide(path, engines="sm86")
    assert engines.subject.backend == "tensorrt"
    found = compare(engines, recording, plan, load_gates())
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages) == ["preprocess", "merger", "stitched_embeddings", "logits", "tokens"]
    assert (found["verdict"], found["first_failed_stage"]) == ("PASS", None)
    assert 0 < stages["merger"]["error"]["relative_l2"] < 1e-5
    assert 0 < stages["logits"]["error"]["relative_l2"] < 1e-5
    assert stages["logits"]["own"] is None
