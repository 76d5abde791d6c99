"""Whole graphs as TensorRT-RTX parses them, in numpy, against ONNX Runtime: every precision, prefill to decode.

Two references. ONNX Runtime one node at a time (engines/interpreter/reference.py), where every layer must agree; and
the runtime's own sessions, where the whole answer must. A session keeps float32 between the nodes of a float16 graph
and rounds x / scale to half where the interpreter does not, so the bounds there are what the format explains, not zero.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import interpreting as shared
import numpy as np
import pytest

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.engines.interpreter.compare import Comparison, compare
from onevision_edge.engines.interpreter.interpreter import Interpreter
from onevision_edge.engines.interpreter.network import Network
from onevision_edge.runtime import backend
from onevision_edge.runtime.backend import Graph, SessionOptions

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)


GOLDEN = Path(__file__).parent / "data" / "golden"
MAX_LENGTH = 64
METHODS, PLANS = shared.METHODS, shared.PLANS
FLOATS = ("fp32", "fp16", "bf16")
QUANTIZED = [(precision, "fp16") for precision in PLANS] + [("int8", "fp32"), ("int4", "bf16"), ("fp8", "bf16")]
CASES = [*((dtype, dtype) for dtype in FLOATS), *QUANTIZED]
every_case = pytest.mark.parametrize(("precision", "dtype"), CASES)

Opened = Callable[[str, str, str], SimpleNamespace]


@pytest.fixture(scope="module")
def opened(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A graph of a random checkpoint (heads of 64, in groups of four) in a precision: its path, spec and network."""
    root = tmp_path_factory.mktemp("interpreted")
    made = tiny(
        vision_config__hidden_size=128,
        vision_config__intermediate_size=256,
        text_config__head_dim=64,
        text_config__num_attention_heads=8,
        text_config__num_key_value_heads=2,
        text_config__hidden_size=128,
        text_config__intermediate_size=256,
    )
    checkpoint = made.write(root / "checkpoint")
    np.savez(root / "rows.npz", **shared.token_rows())
    kept: dict[tuple[str, str, str], SimpleNamespace] = {}

    def bundle(precision: str, dtype: str) -> Path:
        path = root / f"{precision} {dtype}"
        if path.exists():
            return path
        if precision in FLOATS:
            onevision_edge.export(checkpoint, path, dtype=dtype, max_length=MAX_LENGTH)
            return path
        onevision_edge.quantize(
            checkpoint,
            path,
            plan=replace(PLANS[precision], dtype=dtype),
            methods=METHODS,
            calibration=root / "rows.npz",
            calibration_samples=2,
            evaluate=False,
            max_length=MAX_LENGTH,
            threads=1,
        )
        return path

    def open_(precision: str, dtype: str, part: str) -> SimpleNamespace:
        key = (precision, dtype, part)
        if key not in kept:
            found = Bundle.open(bundle(precision, dtype))
            spec = found.graph(part)
            path = found.path(spec.file)
            kept[key] = SimpleNamespace(path=path, spec=spec, read=shared.parsed(trt, path).read)
        return kept[key]

    return open_


def embeds(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, tokens, 128))


# A prompt of seven, a chunk of five behind it, two single tokens; the sequences are two rows apart.
CALLS = [(7, (0, 2)), (5, (7, 9)), (1, (12, 14)), (1, (13, 15))]


def agrees(found: Comparison) -> None:
    assert [str(departure) for departure in found.departures] == []
    assert found.unused_inputs == found.unmatched == ()
    assert found.compared > 80


# Every layer type that any graph of any precision parses to. One more here is one more that must be understood.
LAYER_TYPES = """
ACTIVATION ATTENTION_INPUT ATTENTION_OUTPUT CAST CONCATENATION CONSTANT DEQUANTIZE ELEMENTWISE FILL GATHER
KV_CACHE_UPDATE MATRIX_MULTIPLY NORMALIZATION QUANTIZE REDUCE ROTARY_EMBEDDING SCATTER SELECT SHAPE SHUFFLE SLICE
SOFTMAX SQUEEZE UNARY UNSQUEEZE
"""


def test_the_layer_types_of_all_graphs(opened: Opened) -> None:
    graphs = [opened(*case, part).read for case in CASES for part in ("vision", "decoder")]
    assert {layer.type for read in graphs for layer in read.layers} == set(LAYER_TYPES.split())


@every_case
def test_every_vision_layer_agrees(opened: Opened, precision: str, dtype: str) -> None:
    graph = opened(precision, dtype, "vision")
    agrees(compare(trt, graph.read, graph.path, shared.vision_inputs(graph.read)))


@every_case
def test_every_decoder_layer_agrees_from_prefill_to_decode(opened: Opened, precision: str, dtype: str) -> None:
    graph = opened(precision, dtype, "decoder")
    caches = shared.empty_caches(graph.read, 2)
    interpreter = Interpreter(graph.read)
    for call, (tokens, starts) in enumerate(CALLS):
        inputs = shared.decoder_inputs(graph.read, caches, embeds(tokens, call), starts)
        agrees(compare(trt, graph.read, graph.path, inputs))
        shared.advance(caches, interpreter.run(inputs))


# Against the runtime's sessions. Largest difference of logits or embeddings of magnitude 3 to 5, and what was measured
# over all calls. A code that flips moves a whole step; one FP8 step at the top of an octave is 1/16 of the value.
BOUNDS = {
    ("fp32", "fp32"): 1e-5,
    ("fp16", "fp16"): 0.01,
    ("int8-weight", "fp16"): 0.01,
    ("nvfp4", "fp16"): 0.01,
    ("float", "fp16"): 0.06,
    ("int4", "fp16"): 0.06,
    ("int8", "fp16"): 0.15,
    ("int8", "fp32"): 0.15,
    ("fp8", "fp16"): 0.4,
    ("mixed", "fp16"): 0.4,
}


def session(graph: SimpleNamespace) -> Graph:
    return Graph(graph.path, graph.spec, SessionOptions(threads=1, exact=True))


@pytest.mark.parametrize(("precision", "dtype"), BOUNDS)
def test_vision_against_the_runtime(opened: Opened, precision: str, dtype: str) -> None:
    graph = opened(precision, dtype, "vision")
    inputs = shared.vision_inputs(graph.read)
    (theirs,) = session(graph).run(inputs)
    ours = Interpreter(graph.read).run(inputs)["image_embeds"]
    assert ours.dtype == theirs.dtype
    difference = float(np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max())
    print(f"{precision} {dtype} vision: {difference:.2g}")
    assert difference < BOUNDS[precision, dtype]


@pytest.mark.parametrize(("precision", "dtype"), BOUNDS)
def test_decoding_against_the_runtime(opened: Opened, precision: str, dtype: str) -> None:
    """Each side fills a cache of its own, call by call."""
    graph = opened(precision, dtype, "decoder")
    other, interpreter = session(graph), Interpreter(graph.read)
    caches, their_caches = shared.empty_caches(graph.read, 2), shared.empty_caches(graph.read, 2)
    names = [tensor.name for tensor in graph.spec.outputs]
    largest = 0.0
    for call, (tokens, starts) in enumerate(CALLS):
        ours = interpreter.run(shared.decoder_inputs(graph.read, caches, embeds(tokens, call), starts))
        given = shared.decoder_inputs(graph.read, their_caches, embeds(tokens, call), starts)
        theirs = dict(zip(names, other.run(given), strict=True))
        largest = max(largest, float(np.abs(ours["logits"] - theirs["logits"]).max()))
        shared.advance(caches, ours)
        shared.advance(their_caches, theirs)
    print(f"{precision} {dtype} decoder: {largest:.2g}")
    assert largest < BOUNDS[precision, dtype]


@every_case
def test_chunks_and_steps_give_what_one_prefill_gives(opened: Opened, precision: str, dtype: str) -> None:
    """To the rounding of sums in other orders: equal operations, but for the products' own blocks."""
    graph = opened(precision, dtype, "decoder")
    whole = embeds(9, 0)
    read, interpreter = graph.read, Interpreter(graph.read)
    wanted = interpreter.run(shared.decoder_inputs(read, shared.empty_caches(read, 2), whole, (0, 0)))["logits"]
    caches = shared.empty_caches(read, 2)
    collected = []
    for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9)):
        outputs = interpreter.run(shared.decoder_inputs(read, caches, whole[:, start:stop], (start, start)))
        collected.append(outputs["logits"])
        shared.advance(caches, outputs)
    difference = float(np.abs(np.concatenate(collected, 1) - wanted).max())
    print(f"{precision} {dtype} chunks: {difference:.2g}")
    assert difference < CHUNK_BOUNDS.get((precision, dtype), BOUNDS.get((precision, dtype), 0.0))


# Of bfloat16, 8 times the bounds of float16 for 3 bits less.
CHUNK_BOUNDS = {("bf16", "bf16"): 0.08, ("int4", "bf16"): 0.48, ("fp8", "bf16"): 0.8}


@every_case
def test_caches_are_updated_in_place_or_handed_on(opened: Opened, precision: str, dtype: str) -> None:
    """KV_CACHE_UPDATE writes the array given; SCATTER, which an INT8 cache needs, makes another, as in TensorRT."""
    read = opened(precision, dtype, "decoder").read
    caches = shared.empty_caches(read, 2)
    outputs = Interpreter(read).run(shared.decoder_inputs(read, caches, embeds(3, 0), (5, 0)))
    codes = precision in PLANS and PLANS[precision].kv_cache == "int8"
    for name, past in caches.items():
        present = outputs[name.replace("past_", "present_")]
        assert (present is past) == (not codes)
        assert past.any() == (not codes)
        written = np.flatnonzero(present[0].astype(np.float32).any(axis=(0, 2)))
        assert written.tolist() == [5, 6, 7]


# The golden checkpoint, by the runtime's own loop with interpreters in the place of its sessions


class InterpretedGraph(Graph):
    """runtime.backend.Graph on the network that TensorRT parses."""

    def __init__(self, path: Path, spec: Any, options: SessionOptions) -> None:
        self.spec, self.fmt = spec, onevision_edge.precision.float_format(spec.dtype)
        self.interpreter = Interpreter(shared.parsed(trt, path).read)

    @property
    def network(self) -> Network:
        return self.interpreter.network

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.interpreter.run(dict(inputs)).values())

    def bind(self) -> "InterpretedBinding":
        return InterpretedBinding(self)


class InterpretedBinding:
    """Arrays by name, in the place of runtime.backend.Binding."""

    def __init__(self, graph: InterpretedGraph) -> None:
        self.graph = graph
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: dict[str, np.ndarray] = {}

    def input(self, name: str, array: np.ndarray) -> None:
        self.inputs[name] = array

    def in_place(self, past: str, present: str, array: np.ndarray) -> None:
        self.inputs[past] = self.outputs[present] = array

    def output(self, name: str, array: np.ndarray) -> None:
        self.outputs[name] = array

    def run(self) -> None:
        for name, result in self.graph.interpreter.run(self.inputs).items():
            if result is not self.outputs[name]:
                self.outputs[name][...] = result


GOLDEN_CASES = sorted(json.loads((GOLDEN / "meta.json").read_text())["cases"])
# As in test_goldens.py: 1e-4 of float32 against the official code; float16 within 0.1 of logits of magnitude 18.
GOLDEN_BOUNDS = {"fp32": 1e-4, "fp16": 0.1}


@pytest.fixture(scope="module")
def golden_models(golden_bundle: Callable[..., Path]) -> dict[str, Any]:
    patch = pytest.MonkeyPatch()
    patch.setattr(backend, "Graph", InterpretedGraph)
    try:
        return {dtype: onevision_edge.load(golden_bundle(dtype), threads=1) for dtype in GOLDEN_BOUNDS}
    finally:
        patch.undo()


@pytest.mark.parametrize("dtype", GOLDEN_BOUNDS)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_recorded_logits_and_tokens(
    golden_models: dict[str, Any], golden: Callable[[str], Any], dtype: str, case: str
) -> None:
    """Text, one image, two images, padding, video: the official code's logits and its sixteen tokens."""
    model, recorded = golden_models[dtype], golden(case)
    tokens = recorded.arrays["attention_mask"].astype(bool)
    logits = model.logits(**recorded.inputs)
    largest = float(np.abs(logits - recorded.arrays["logits"])[tokens].max())
    print(f"{case} {dtype}: {largest:.2g}")
    assert largest < GOLDEN_BOUNDS[dtype]
    generated = model.generate_ids(**recorded.inputs, max_tokens=16, eos_token_id=[])
    assert generated.tolist() == recorded.arrays["generated_ids"].tolist()


def test_recorded_logits_in_chunks(golden_models: dict[str, Any], golden: Callable[[str], Any]) -> None:
    recorded = golden("b_two_images")
    tokens = recorded.arrays["attention_mask"].astype(bool)
    logits = golden_models["fp32"].logits(**recorded.inputs, prefill_chunk=7)
    assert np.abs(logits - recorded.arrays["logits"])[tokens].max() < GOLDEN_BOUNDS["fp32"]


# The shipped checkpoint, which is trained: its answers do not hang on single codes, as those of a random one do. (In
# FP8, one unit in the last place of the inputs moves the golden checkpoint's logits, of magnitude 18, by 1.5.)


@pytest.fixture(scope="module")
def questions(script: Callable[[str], ModuleType]) -> tuple[Any, list[dict[str, Any]]]:
    """benchmarks/demo_accuracy.py, and five of its questions on held-out images, two of them on two images."""
    benchmark = script("benchmarks/demo_accuracy.py")
    rows = benchmark.questions()
    pairs = [row for row in rows if len(row["images"]) > 1][:2]
    return benchmark, [*rows[:: len(rows) // 3][:3], *pairs]


@pytest.mark.parametrize("precision", PLANS)
def test_answers_of_quantized_bundles(
    questions: tuple[Any, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Token by token those of the runtime's sessions, on one and on two images."""
    bundle = tmp_path / "bundle"
    onevision_edge.quantize(
        "demo", bundle, plan=PLANS[precision], methods=METHODS, calibration_samples=4, evaluate=False, threads=1
    )
    benchmark, rows = questions
    sessions = onevision_edge.load(bundle, threads=1, exact=True)
    wanted = [benchmark.ask(sessions, row) for row in rows]
    monkeypatch.setattr(backend, "Graph", InterpretedGraph)
    interpreted = onevision_edge.load(bundle, threads=1)
    answers = [benchmark.ask(interpreted, row) for row in rows]
    print(f"{precision}: {sum(a == w for a, w in zip(answers, wanted, strict=True))} of {len(rows)} {answers}")
    assert answers == wanted
