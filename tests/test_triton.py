"""A Triton repository: its files, its configurations as Triton's protobuf reads them, and the answers of its models.

The server's Python module is stood in for by one that runs the repository's graphs on ONNX Runtime; the last tests
start the server itself.
"""

import base64
import json
import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import triton_server
from click.testing import CliRunner

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.cli.export_triton import export_triton as command
from onevision_edge.engines.profiles import profiles
from onevision_edge.engines.record import EngineRecord, EngineSet, read_set
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.device import DeviceArray, HostDriver
from onevision_edge.runtime.model import Model, load
from onevision_edge.serve.triton import TritonOptions, cache_bytes, export_triton
from onevision_edge.serve.triton_graph import TritonPlan
from onevision_edge.serve.triton_model import TritonAnswers

IMAGES = Path(onevision_edge.__file__).parent / "demo" / "images"
QUESTION = "Which number is this?"
PARAMETER = r'^parameters { key: "(\w+)", value: { string_value: "(\w*)" } }$'


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return onevision_edge.export("demo", tmp_path_factory.mktemp("demo") / "bundle", dtype="fp32", max_length=256)


@pytest.fixture(scope="module")
def model(demo: Bundle) -> Model:
    return load(demo.directory, threads=1)


@pytest.fixture(scope="module")
def repository(demo: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "repository"
    assert export_triton(demo, path, TritonOptions(slots=2)) == ["onevision", "onevision_vision", "onevision_decoder"]
    return path


def parsed(config: Path) -> Any:
    """A config.pbtxt as Triton's own message."""
    messages = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed: pip install tritonclient[grpc]"
    )
    from google.protobuf import text_format

    return text_format.Parse(config.read_text(), messages.ModelConfig())


ELEMENTS = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64"}


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_a_graphs_configuration_is_what_onnx_runtime_finds_in_its_file(repository: Path, part: str) -> None:
    folder = repository / f"onevision_{part}"
    config = parsed(folder / "config.pbtxt")
    session = ort.InferenceSession(folder / "1" / config.default_model_filename)
    assert (config.name, config.platform, config.max_batch_size) == (f"onevision_{part}", "onnxruntime_onnx", 0)
    for declared, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        told = [(t.name, t.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[t.data_type].name)
                for t in declared]  # fmt: skip
        assert told == [(t.name, ELEMENTS[t.type]) for t in found]
        assert [list(t.dims) for t in declared] == [[d if isinstance(d, int) else -1 for d in t.shape] for t in found]


def test_the_answering_model_is_python_and_decoupled(repository: Path) -> None:
    config = parsed(repository / "onevision" / "config.pbtxt")
    assert (config.backend, config.model_transaction_policy.decoupled) == ("python", True)
    assert [t.name for t in config.input if not t.optional] == []
    assert {k: v.string_value for k, v in config.parameters.items()} == {
        "vision": "onevision_vision",
        "decoder": "onevision_decoder",
        "engines": "",
        "slots": "2",
        "threads": "",
    }


def test_the_bundle_inside_is_whole_and_takes_no_room(repository: Path, demo: Bundle) -> None:
    inside = repository / "onevision" / "1" / "bundle"
    Bundle.open(inside).verify()
    data = "decoder.onnx.data"
    assert os.path.samefile(inside / data, demo.path(data))
    assert os.path.samefile(repository / "onevision_decoder" / "1" / data, demo.path(data))


def test_bytes_of_a_cache(demo: Bundle) -> None:
    assert cache_bytes(demo) == 2 * 4 * 2 * 256 * 32 * 4  # keys and values of 4 layers, 2 heads, 256 rows of 32 floats


# What stands in for the server.


class Tensor:
    """One named array, as Triton hands them over: strings are bytes."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    CANCELLED = 8

    def __init__(self, message: str, code: int = 0) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class Sender:
    """Collects the responses to one request. cancelled_after: responses."""

    def __init__(self, cancelled_after: int | None = None) -> None:
        self.sent: queue.Queue[tuple[Response, int]] = queue.Queue()
        self.count, self.cancelled_after = 0, cancelled_after

    def send(self, response: Response, flags: int = 0) -> None:
        self.count += 1
        self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        return self.cancelled_after is not None and self.count >= self.cancelled_after


class Request:
    def __init__(self, sender: Sender, **inputs: Any) -> None:
        self.sender, self.inputs = sender, inputs

    def get_response_sender(self) -> Sender:
        return self.sender


class Server:
    """triton_python_backend_utils with the models of a repository on ONNX Runtime."""

    Tensor, TritonError, InferenceResponse = Tensor, TritonError, Response
    TRITONSERVER_RESPONSE_COMPLETE_FINAL, TRITONSERVER_MEMORY_CPU = 1, 0

    def __init__(self, repository: Path) -> None:
        self.calls: list[str] = []
        self.sessions = {
            folder.name: ort.InferenceSession(next((folder / "1").glob("*.onnx")))
            for folder in repository.iterdir()
            if folder.name != "onevision"
        }

    def PreferredMemory(self, kind: int, device: int) -> tuple[int, int]:  # noqa: N802
        return kind, device

    def InferenceRequest(self, **fields: Any) -> "Call":  # noqa: N802
        return Call(self, **fields)

    def get_input_tensor_by_name(self, request: Request, name: str) -> Tensor | None:
        value = request.inputs.get(name)
        return None if value is None else Tensor(name, np.array(value))


class Call:
    def __init__(self, server: Server, model_name: str, requested_output_names: list[str], inputs: list[Tensor],
                 preferred_memory: tuple[int, int]) -> None:  # fmt: skip
        assert preferred_memory == (0, 0)
        self.server, self.model, self.names = server, model_name, requested_output_names
        self.inputs = {t.name(): t.as_numpy() for t in inputs}

    def exec(self) -> Response:
        self.server.calls.append(self.model)
        try:
            found = self.server.sessions[self.model].run(self.names, self.inputs)
        except Exception as error:
            return Response(error=TritonError(str(error)))
        return Response([Tensor(name, array) for name, array in zip(self.names, found, strict=True)])


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], tuple[TritonAnswers, Server]]]:
    """The Python model of a repository, loaded from its model.py and initialised as Triton does."""
    started: list[TritonAnswers] = []

    def start(repository: Path) -> tuple[TritonAnswers, Server]:
        server = Server(repository)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
        lines = re.findall(PARAMETER, (repository / "onevision" / "config.pbtxt").read_text(), re.MULTILINE)
        parameters = {key: {"string_value": value} for key, value in lines}
        answers = loaded(repository / "onevision" / "1" / "model.py").TritonPythonModel()
        answers.initialize({"model_config": json.dumps({"parameters": parameters})})
        started.append(answers)
        return answers, server

    yield start
    for answers in started:
        answers.finalize()


def loaded(path: Path) -> ModuleType:
    spec = spec_from_file_location("triton_repository_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(answers: TritonAnswers, sender: Sender | None = None, **inputs: Any) -> list[dict[str, str]]:
    """The responses to one request, in order; an error as {"error": message}."""
    sender = sender or Sender()
    answers.execute([Request(sender, **inputs)])
    found = []
    while True:
        response, flags = sender.sent.get(timeout=60)
        if response.has_error():
            return [*found, {"error": response.error().message()}]
        found.append({t.name(): t.as_numpy()[0].decode() for t in response.output_tensors()})
        if flags & Server.TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            return found


def image(name: str) -> bytes:
    return (IMAGES / name).read_bytes()


def expected(model: Model, data: bytes, prompt: str = QUESTION) -> Any:
    content = [{"type": "image", "image": data}, {"type": "text", "text": prompt}]
    return model.generate([{"role": "user", "content": content}], max_tokens=16)


OPTIONS = [b'{"max_tokens": 16}']


def prompt_inputs(data: bytes, prompt: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"prompt": [prompt.encode()], "images": np.array([data], object), "options": OPTIONS, **more}


def test_an_answer_is_the_runtimes_by_calls_of_both_graphs(
    answering: Callable[..., Any], repository: Path, model: Model
) -> None:
    answers, server = answering(repository)
    (found,) = ask(answers, **prompt_inputs(image("number.png")))
    wanted = expected(model, image("number.png"))
    assert (found["text"], found["finish_reason"]) == (wanted.text, wanted.finish_reason)
    assert json.loads(found["usage"])["completion_tokens"] == len(wanted.token_ids)
    assert server.calls.count("onevision_vision") == 1
    assert server.calls.count("onevision_decoder") >= len(wanted.token_ids)


def test_a_stream_joins_to_the_answer(answering: Callable[..., Any], repository: Path, model: Model) -> None:
    answers, _ = answering(repository)
    *pieces, last = ask(answers, **prompt_inputs(image("number.png"), stream=[True]))
    assert "".join(piece["text"] for piece in pieces) == expected(model, image("number.png")).text
    assert len(pieces) > 1
    assert (last["text"], last["finish_reason"]) == ("", "stop")


def test_messages_with_data_urls(answering: Callable[..., Any], repository: Path, model: Model) -> None:
    answers, _ = answering(repository)
    url = "data:image/png;base64," + base64.b64encode(image("number.png")).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = json.dumps([{"role": "user", "content": content}]).encode()
    (found,) = ask(answers, messages=[messages], options=OPTIONS)
    assert found["text"] == expected(model, image("number.png")).text


def test_several_at_a_time_are_answered_as_alone(answering: Callable[..., Any], repository: Path, model: Model) -> None:
    answers, _ = answering(repository)
    names = ["number.png", "three.png", "first.png", "second.png"]
    found: dict[str, str] = {}

    def one(name: str) -> None:
        found[name] = ask(answers, **prompt_inputs(image(name)))[0]["text"]

    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: expected(model, image(name)).text for name in names}
    assert answers.scheduler.stats.finished == 4


def test_a_client_that_leaves_frees_its_slot(answering: Callable[..., Any], repository: Path) -> None:
    answers, _ = answering(repository)
    inputs = {"prompt": [b"Count."], "options": [b'{"max_tokens": 200, "ignore_eos": true}'], "stream": [True]}
    assert ask(answers, Sender(cancelled_after=2), **inputs)[-1] == {"error": "cancelled"}
    assert answers.scheduler.drain(10)
    assert (answers.scheduler.stats.cancelled, answers.scheduler.stats.finished) == (1, 0)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "give either messages or prompt"),
        ({"prompt": [b"a"], "messages": [b"[]"]}, "give either messages or prompt"),
        ({"prompt": [b"a"], "options": [b"[1]"]}, "options is not a JSON object"),
        ({"prompt": [b"a"], "options": [b"{"]}, "options is not JSON"),
        ({"prompt": [b"a"], "options": [b'{"max_tokens": 0}']}, "max_tokens"),
        ({"prompt": [b"a"], "options": [b'{"max_pixels": "9"}']}, "max_pixels"),
        ({"prompt": [b"a"], "options": [b'{"best_of": 2}']}, "unknown option best_of"),
        ({"prompt": np.array([b"\xff"], object)}, "prompt is not UTF-8"),
        ({"messages": [b'[{"role": "user", "content": [{"type": "image", "image": "/etc/hostname"}]}]']}, "data URL"),
        ({"messages": [b'[{"role": "user", "content": [{"type": "video", "video": "/tmp"}]}]']}, "data URL"),
        ({"prompt": [b"a"], "images": np.array([b"not an image"], object)}, "image"),
    ],
)
def test_mistakes_are_answered_and_do_not_stop_the_server(
    answering: Callable[..., Any], repository: Path, inputs: dict[str, Any], said: str
) -> None:
    answers, _ = answering(repository)
    assert said in ask(answers, **inputs)[-1]["error"]
    assert "error" not in ask(answers, prompt=[b"Hello"], options=OPTIONS)[-1]


def test_a_graph_that_fails_is_told_to_the_client(answering: Callable[..., Any], repository: Path) -> None:
    answers, server = answering(repository)
    del server.sessions["onevision_decoder"]
    assert "onevision_decoder" in ask(answers, prompt=[b"Hello"])[-1]["error"]


def test_a_decoder_of_the_runtime_is_no_model(
    demo: Bundle, model: Model, answering: Callable[..., Any], tmp_path: Path
) -> None:
    options = TritonOptions(decoder="runtime", slots=1, threads=1)
    assert export_triton(demo, tmp_path / "repository", options) == ["onevision", "onevision_vision"]
    answers, server = answering(tmp_path / "repository")
    (found,) = ask(answers, **prompt_inputs(image("number.png")))
    assert found["text"] == expected(model, image("number.png")).text
    assert server.calls == ["onevision_vision"]


def test_a_plans_embeddings_are_put_on_the_decoders_device() -> None:
    class OnHostDevice:
        driver = HostDriver()

        def empty(self, shape: tuple[int, ...]) -> DeviceArray:
            return DeviceArray.empty(self.driver, shape, np.dtype(np.float32))

    values = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    plan = object.__new__(TritonPlan)
    plan.decoder = OnHostDevice()  # type: ignore[assignment]
    assert np.array_equal(np.asarray(plan._on_device(values)), values)


# Engines.


@pytest.fixture
def with_engines(demo: Bundle, tmp_path: Path) -> Callable[[str], Bundle]:
    """The bundle with a set of engines for a100, as a library built them: records that are sound, and any bytes."""

    def made(library: str) -> Bundle:
        shutil.copytree(demo.directory, tmp_path / "bundle", dirs_exist_ok=True)
        opened = Bundle.open(tmp_path / "bundle")
        folder = opened.directory / "engines" / "a100"
        folder.mkdir(parents=True, exist_ok=True)
        (profile,) = profiles(opened.manifest, max_pixels=200_704)
        engines = {}
        for part in ("vision", "decoder"):
            (folder / f"{part}.engine").write_bytes(part.encode())
            engines[part] = EngineRecord(
                f"{part}.engine", len(part), "", {}, {"wide": profile.limits()}, None, None, {}
            )
        record = EngineSet(library, "10.15.0", "a100", ("sm80",), {}, "build BUNDLE", {}, engines)
        (folder / "engine.json").write_text(json.dumps(record.to_dict()))
        return opened

    return made


def test_an_engine_of_the_tower_is_a_plan_and_the_decoders_stays_with_the_runtime(
    with_engines: Callable[[str], Bundle], tmp_path: Path
) -> None:
    path = tmp_path / "repository"
    options = TritonOptions(engines="a100", decoder="runtime")
    assert export_triton(with_engines("tensorrt"), path, options) == ["onevision", "onevision_vision"]
    assert (path / "onevision_vision" / "1" / "model.plan").read_bytes() == b"vision"
    assert not (path / "onevision_vision" / "1" / "vision.onnx").exists()
    inside = path / "onevision" / "1" / "bundle"
    assert (inside / "engines" / "a100" / "decoder.engine").read_bytes() == b"decoder"
    assert read_set(inside / "engines" / "a100").target == "a100"
    text = (path / "onevision_vision" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"\ndefault_model_filename: "model.plan"\n' in text
    assert "KIND_GPU" in text
    assert 'key: "engines", value: { string_value: "a100" }' in (path / "onevision" / "config.pbtxt").read_text()


def test_a_plan_takes_what_its_engine_was_built_for(with_engines: Callable[[str], Bundle]) -> None:
    bundle = with_engines("tensorrt")
    engines = read_set(bundle.directory / "engines" / "a100")
    decoder: Any = None
    plan = TritonPlan(bundle.graph("vision"), "onevision_vision", None, engines, decoder)
    vision = bundle.manifest.model.vision
    assert plan.images_per_call(vision, (32, 32)) == 1
    with pytest.raises(OneVisionError, match="an image of 1088 patches is larger than the 1024"):
        plan.images_per_call(vision, (34, 32))


def test_engines_of_tensorrt_rtx_are_refused(with_engines: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle, path = with_engines("tensorrt-rtx"), tmp_path / "repository"
    refused(bundle, path, "for which Triton has no backend", engines="a100", decoder="runtime")


# What is refused.


def refused(bundle: Bundle, path: Path, said: str, **options: Any) -> None:
    with pytest.raises(OneVisionError, match=said):
        export_triton(bundle, path, TritonOptions(**options))
    assert not path.exists()


def test_what_cannot_be_served_is_refused_before_anything_is_written(
    demo: Bundle, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "repository"
    refused(demo, path, "not a model's name", name="a/b")
    refused(demo, path, "cannot update a KV cache in place", engines="a100")
    refused(demo, path, "engine.json", engines="a100", decoder="runtime")
    bf16 = onevision_edge.export("demo", tmp_path / "bf16", dtype="bf16")
    refused(bf16, path, "--dtype fp16")
    refused(Bundle.open(golden_bundle("fp32")), path, r"no tokenizer\.json")


def test_a_repository_is_replaced_only_when_asked(demo: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    export_triton(demo, path, TritonOptions())
    with pytest.raises(OneVisionError, match="--overwrite"):
        export_triton(demo, path, TritonOptions())
    assert export_triton(demo, path, TritonOptions(decoder="runtime"), overwrite=True) == [
        "onevision",
        "onevision_vision",
    ]
    assert not (path / "onevision_decoder").exists()


def test_a_full_disk_leaves_nothing(demo: Bundle, mounted: Callable[[str], Path]) -> None:
    disk = mounted("4m")
    with pytest.raises(OneVisionError, match="disk is full"):
        export_triton(demo, disk / "repository", TritonOptions())
    assert list(disk.iterdir()) == []


def test_the_command_says_what_it_wrote(demo: Bundle, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(demo.directory), "-o", str(tmp_path / "r"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["models"] == ["onevision", "onevision_vision", "onevision_decoder"]
    assert "524 kB" in result.stderr
    result = CliRunner().invoke(command, [str(demo.directory), "-o", str(tmp_path / "r2"), "--decoder", "other"])
    assert result.exit_code == 2


# The server itself.


@pytest.mark.slow
def test_triton_serves_the_repository(repository: Path, model: Model, tmp_path: Path) -> None:
    with triton_server.running(repository, tmp_path) as ask_server:
        inputs = {"prompt": QUESTION, "images": image("number.png"), "options": '{"max_tokens": 16}'}
        (found,) = ask_server(**inputs)
        assert found["text"] == expected(model, image("number.png")).text
        *pieces, last = ask_server(**inputs, stream=True)
        assert "".join(piece["text"] for piece in pieces) == found["text"]
        assert json.loads(last["usage"])["image_tokens"] > 0
        assert ask_server(prompt="a", options="[]") == [
            {"error": 'options is not a JSON object such as {"max_tokens": 64}'}
        ]
