"""The cpu engine of a bundle, end to end: it answers as the plain graphs do, steps back where it cannot run, and
loads nothing that could leave its memory.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import interpreting
import numpy as np
import pytest
from click.testing import CliRunner, Result

import onevision_edge
from onevision_edge.bundle import Bundle, Progress
from onevision_edge.cli import main
from onevision_edge.engines.cpu.build import build_cpu
from onevision_edge.engines.cpu.record import CpuRecord, read_record
from onevision_edge.engines.record import RECORD
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import default_plan
from onevision_edge.runtime import kernels
from onevision_edge.runtime.backend import Graph
from onevision_edge.runtime.cpu_engine import CpuEngine
from onevision_edge.runtime.cpu_graph import CpuGraph
from onevision_edge.runtime.cpu_library import Library
from onevision_edge.runtime.model import Model

DEMO = Path(onevision_edge.__file__).parent / "demo"
GOLDEN = Path(__file__).parent / "data" / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())
CASES = sorted(META["cases"])
QUESTIONS = json.loads((DEMO / "images" / "questions.json").read_text())
Compiled = Callable[[str], Library]
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def demo(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The shipped model in a precision with its cpu engine, made once. Tests that change one copy it."""
    root = tmp_path_factory.mktemp("demo")

    def made(precision: str = "fp16") -> Path:
        path = root / precision
        if not path.exists():
            if precision in ("fp16", "bf16"):
                onevision_edge.export("demo", path, dtype=precision, max_length=512)
            else:
                plan = default_plan(precision, vision="int8" if precision == "int8" else "float")
                few: dict[str, Any] = {"calibration_samples": 4, "evaluate": False, "max_length": 512, "threads": 1}
                onevision_edge.quantize("demo", path, plan=plan, methods=interpreting.METHODS, **few)
            build_cpu(path)
        return path

    return made


@pytest.fixture(scope="module")
def golden_engine(
    compiled: Compiled, golden_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Model]:
    """The golden checkpoint's FP32 bundle, by what its products run in."""
    root, loaded = tmp_path_factory.mktemp("golden"), {}

    def made(floats: str) -> Model:
        if floats not in loaded:
            path = shutil.copytree(golden_bundle("fp32"), root / floats)
            build_cpu(path, floats=floats)
            loaded[floats] = onevision_edge.load(path, engines="cpu", threads=1)
        return loaded[floats]

    return made


@pytest.fixture
def copied(demo: Made, tmp_path: Path) -> Path:
    """The FP16 bundle and its engine, to be changed."""
    return shutil.copytree(demo("fp16"), tmp_path / "copy")


def messages(entry: dict[str, Any]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": str(DEMO / "images" / name)} for name in entry["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": entry["prompt"]}]}]


def kinds(model: Model) -> dict[str, type]:
    return {part: type(graph) for part, graph in model._graphs.items()}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


BOTH = {"vision": CpuGraph, "decoder": CpuGraph}
PLAIN = {"vision": Graph, "decoder": Graph}

# Answers


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_all_questions_are_answered(demo: Made, precision: str) -> None:
    """BF16 as well, which ONNX Runtime does not run here."""
    model = onevision_edge.load(demo(precision))
    assert kinds(model) == BOTH
    for entry in QUESTIONS:
        assert model.generate(messages(entry), max_tokens=64).text == entry["answer"]


# Attention's codes and, of three layers in either graph, everything that follows them: 1.3 to 1.7 % measured; two more
# roundings to BF16 a product, 2.0 %; all rows and weights to INT8, 0.6 % each of eight a layer, 4.1 to 5.4 %. Where the
# weights of attention have seven bits instead of eight (AVX2), 2.8 % instead of 1.7.
LIMITS = {"fp32": 0.035, "bf16": 0.04, "int8": 0.09}


@pytest.mark.parametrize("floats", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_golden_cases(
    golden_engine: Callable[[str], Model], golden: Callable[[str], Any], case: str, floats: str
) -> None:
    """Close in all, and with the same best token wherever the second is further behind than six deviations."""
    found, arrays = golden_engine(floats).logits(**golden(case).inputs), golden(case).arrays
    tokens = arrays["attention_mask"].astype(bool)
    logits, wanted = found[tokens], arrays["logits"][tokens]
    assert difference(logits, wanted) < LIMITS[floats]
    best = np.sort(wanted, axis=-1)
    room = best[:, -1] - best[:, -2] > 6 * np.sqrt(2) * np.std(logits - wanted)
    assert room.mean() > 0.1
    np.testing.assert_array_equal(logits[room].argmax(-1), wanted[room].argmax(-1))


@pytest.mark.parametrize("case", [c for c in CASES if META["cases"][c]["greedy_min_margin"] > 0.15])
def test_greedy_tokens_of_golden_cases_that_leave_room(
    golden_engine: Callable[[str], Model], golden: Callable[[str], Any], case: str
) -> None:
    expected = golden(case).arrays["generated_ids"].tolist()
    found = golden_engine("fp32").generate_ids(**golden(case).inputs, max_tokens=16, eos_token_id=[])
    assert found.tolist() == expected


@pytest.mark.parametrize("chunk", [7, 1])
@pytest.mark.parametrize("case", ["b_two_images", "c_text_only", "e_batch2_leftpad"])
def test_chunks_of_a_prompt_give_what_the_whole_gives(
    golden_engine: Callable[[str], Model], golden: Callable[[str], Any], case: str, chunk: int
) -> None:
    """But for what attention's weights are rounded to, tile by tile: a part of the error that the whole has."""
    model, inputs = golden_engine("fp32"), golden(case).inputs
    assert difference(model.logits(**inputs, prefill_chunk=chunk), model.logits(**inputs)) < 0.015


def test_a_batch_is_answered_as_its_sequences_are(demo: Made) -> None:
    model = onevision_edge.load(demo("fp16"))
    chosen = QUESTIONS[:4]
    answers = model.generate([messages(entry) for entry in chosen], max_tokens=64)
    assert [answer.text for answer in answers] == [entry["answer"] for entry in chosen]
    assert [answer.text for answer in model.generate([messages(QUESTIONS[2])], max_tokens=64)] == [
        QUESTIONS[2]["answer"]
    ]


def test_images_of_one_size_share_a_call(demo: Made) -> None:
    """And come out as they do alone, to the last bits of sums; other sizes are calls of their own."""
    model, random = onevision_edge.load(demo("fp16"), image_cache=0), np.random.default_rng(0)
    pixels, grid = random.standard_normal((128, 588)).astype(np.float32), np.array([[1, 4, 8]] * 3 + [[1, 8, 4]])
    together = model.encode_images(pixels, grid)
    alone = [model.encode_images(pixels[32 * i : 32 * i + 32], grid[i : i + 1]) for i in range(4)]
    assert difference(together, np.concatenate(alone)) < 1e-3


def test_conversations_start_again_on_used_memory(demo: Made) -> None:
    """A long one, a short one, a batch, with caches kept and not: what was there before does not matter."""
    for kept in (0, 2):
        model = onevision_edge.load(demo("fp16"), prefix_caches=kept)
        first = [model.generate(messages(entry), max_tokens=64).token_ids for entry in QUESTIONS[:3]]
        model.generate([messages(entry) for entry in QUESTIONS[2:5]], max_tokens=8)
        again = [model.generate(messages(entry), max_tokens=64).token_ids for entry in QUESTIONS[:3]]
        assert again == first


def test_threads_change_no_bit(demo: Made) -> None:
    inputs = interpreting.token_rows(placeholder=447)
    found = [onevision_edge.load(demo("int4"), threads=threads).logits(**inputs) for threads in (1, 2, 3)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_two_calls_at_once(demo: Made) -> None:
    """From two threads, on one model: they take turns."""
    model = onevision_edge.load(demo("fp16"), threads=2)
    ids = [np.random.default_rng(i).integers(1, 400, (1, 20 + 30 * i)) for i in range(2)]
    expected = [model.logits(one) for one in ids]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(30) if not np.array_equal(model.logits(ids[i]), expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert wrong == []


def test_an_embedding_of_zeros_gives_logits(golden_engine: Callable[[str], Model]) -> None:
    """As padding tokens have it: its queries, keys and values are zero."""
    model = golden_engine("fp32")
    decoder = model._graphs["decoder"]
    assert isinstance(decoder, CpuGraph)
    from onevision_edge.runtime.cache import Decoder, KVCache

    text = model.config.text
    cache = KVCache(text, 256, 1, decoder.cache_dtype, decoder.zeros)
    logits = Decoder(decoder, cache, text.vocab_size)(
        np.zeros((1, 5, text.hidden_size), np.float32), np.zeros(1, np.int64), np.arange(5)[None]
    )
    assert np.isfinite(logits).all()


# Which engine runs


def test_an_engine_is_used_where_there_is_one(demo: Made, caplog: pytest.LogCaptureFixture) -> None:
    path = demo("fp16")
    assert kinds(onevision_edge.load(path)) == kinds(onevision_edge.load(path, engines="cpu")) == BOTH
    assert kinds(onevision_edge.load(path, threads=1)) == BOTH
    assert kinds(onevision_edge.load(path, engines=False)) == PLAIN
    assert kinds(onevision_edge.load(path, exact=True)) == kinds(onevision_edge.load(path, prepack=True)) == PLAIN
    assert not caplog.records
    with pytest.raises(OneVisionError, match="prepack, exact and provider are ONNX Runtime's"):
        onevision_edge.load(path, engines="cpu", exact=True)
    with pytest.raises(OneVisionError, match="threads is 0; it must be a whole number from 1"):
        onevision_edge.load(path, threads=0)


def test_an_engine_that_is_asked_for_must_be_there(golden_bundle: Callable[[str], Path]) -> None:
    path = golden_bundle("fp32")
    with pytest.raises(OneVisionError, match=r"has no cpu engine: make it with onevision-edge build .* --target cpu"):
        onevision_edge.load(path, engines="cpu")
    assert kinds(onevision_edge.load(path)) == PLAIN


def test_parts_that_are_not_built_run_plain(demo: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shutil.copytree(demo("fp16"), tmp_path / "copy")
    record = build_cpu(path, parts=["decoder"], check=False, overwrite=True)
    assert list(record.parts) == ["decoder"]
    model = onevision_edge.load(path)
    assert kinds(model) == {"vision": Graph, "decoder": CpuGraph}
    assert "ONNX Runtime runs the plain vision graph" in caplog.text
    assert "has no vision, only decoder" in caplog.text
    assert model.generate(messages(QUESTIONS[0]), max_tokens=64).text == QUESTIONS[0]["answer"]


def fallen_back(path: Path, caplog: pytest.LogCaptureFixture, reason: str, parts: int = 2) -> None:
    """The plain graphs answer, with a warning for each; a user who insists is told the same."""
    with caplog.at_level(logging.WARNING):
        model = onevision_edge.load(path)
    assert list(kinds(model).values()).count(Graph) == parts
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == parts
    assert all("ONNX Runtime runs the plain" in warning and reason in warning for warning in warnings), warnings
    assert model.generate(messages(QUESTIONS[1]), max_tokens=8).text == QUESTIONS[1]["answer"]
    with pytest.raises(OneVisionError) as refusal:
        onevision_edge.load(path, engines="cpu")
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "is None version None; this version reads"),
        ('{"format": "onevision-edge cpu engine", "format_version": 1}', "is not what this version writes"),
        ('{"format": "onevision-edge cpu engine", "format_version": 2}', "version 2; this version reads"),
        (
            '{"format": "onevision-edge cpu engine", "format_version": 1, "machine": {}, "parts": {"vision": 1}}',
            "is not what this version writes",
        ),
    ],
)
def test_a_malformed_record(copied: Path, caplog: pytest.LogCaptureFixture, record: str, reason: str) -> None:
    (copied / "engines" / "cpu" / RECORD).write_text(record)
    fallen_back(copied, caplog, reason)


@pytest.mark.parametrize("name", ["decoder.weights", "decoder.json"])
def test_files_that_are_cut_or_gone(copied: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    file = copied / "engines" / "cpu" / name
    file.write_bytes(file.read_bytes()[:-1000])
    fallen_back(copied, caplog, "bytes, its record says", parts=1)
    file.unlink()
    caplog.clear()
    fallen_back(copied, caplog, f"{name} is missing", parts=1)


def test_another_graph_than_the_engine_was_built_of(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copied / "engines" / "cpu" / RECORD
    record = json.loads(path.read_text())
    record["parts"]["vision"]["sources"]["vision.onnx"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    fallen_back(copied, caplog, "was built of another vision.onnx than the bundle holds; build it again", parts=1)


def test_without_a_compiler_that_works(
    copied: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Unless there are compiled kernels in a directory that is named."""
    ready = kernels.find(kernels.levels()[0])
    assert ready is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(kernels.DIRECTORY, raising=False)
    monkeypatch.setenv("CXX", "false")
    fallen_back(copied, caplog, "false cannot compile the cpu engine's kernels")
    monkeypatch.setenv("CXX", "no-such-compiler")
    caplog.clear()
    fallen_back(copied, caplog, "no-such-compiler is no command here; CXX names the C++ compiler")
    assert not list((tmp_path / "cache").rglob("*.so"))
    monkeypatch.setattr(kernels, "compiler", lambda: None)
    caplog.clear()
    fallen_back(copied, caplog, "there is no C++ compiler for the cpu engine's kernels: install g++")
    monkeypatch.setenv(kernels.DIRECTORY, str(shutil.copytree(ready.parent, tmp_path / "ready")))
    assert kinds(onevision_edge.load(copied)) == BOTH


def test_kernels_that_do_not_load(
    copied: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / kernels.levels()[0].file).write_bytes(b"not a library")
    monkeypatch.setenv(kernels.DIRECTORY, str(tmp_path))
    fallen_back(copied, caplog, "is not a library of kernels that loads here")


# Programs that were edited


def reloaded(path: Path, part: str, change: Callable[[dict[str, Any]], Any]) -> CpuGraph:
    """A part whose program was changed."""
    file = path / "engines" / "cpu" / f"{part}.json"
    edited = json.loads(file.read_text())
    change(edited)
    file.write_text(json.dumps(edited))
    opened = Bundle.open(path)
    return CpuGraph(file.parent, part, opened.graph(part), CpuEngine(threads=1).pool())


def step_of(edited: dict[str, Any], op: str, index: int = 0, **has: Any) -> dict[str, Any]:
    """A step of a kind that has some settings."""
    steps: list[dict[str, Any]] = edited["steps"]
    return [s for s in steps if s["op"] == op and all(s.get(name) == value for name, value in has.items())][index]


@pytest.mark.parametrize(
    ("part", "op", "setting", "value", "reason"),
    [
        ("decoder", "product", "w", 1 << 40, "lie outside a file of"),
        ("decoder", "product", "w", -64, "lie outside a file of"),
        ("decoder", "product", "s", 1 << 40, "lie outside a file of"),
        ("vision", "product", "b", 1 << 40, "lie outside a file of"),
        ("decoder", "product", "n", 1 << 20, "impossible columns"),
        ("decoder", "product", "n", 0, "impossible columns"),
        ("decoder", "product", "stride", 1 << 20, "for a row, and the steps need"),
        ("decoder", "product", "column", 1 << 20, "impossible columns"),
        ("decoder", "product", "column", -8, "negative or beyond all measure"),
        ("decoder", "product", "k", 128, "other rows than were prepared"),
        ("decoder", "product", "rows", 1, "other rows than were prepared"),
        ("decoder", "product", "rows", 3, "no rows of kind 3"),
        ("decoder", "product", "group", 0, "other rows than were prepared"),
        ("decoder", "product", "weights", "floats", "weights of another form"),
        ("decoder", "product", "weights", "codes2", "weights is 'codes2'"),
        ("decoder", "product", "out", "nowhere", "nowhere"),
        ("decoder", "rows", "k", 0, "impossible rows"),
        ("decoder", "rows", "n", 100, "impossible rows"),
        ("decoder", "rows", "group", 7, "impossible groups of rows"),
        ("decoder", "rows", "group", 0, "impossible groups of rows"),
        ("decoder", "rows", "stride", 1, "impossible rows"),
        ("decoder", "rows", "w", 1 << 40, "lie outside a file of"),
        ("decoder", "rows", "skip_first", 1, "impossible rows without the first"),
        ("decoder", "rows", "k", 2**40, "k is"),
        ("decoder", "rows", "k", "many", "TypeError"),
        ("decoder", "heads", "heads", 8, "impossible heads"),
        ("decoder", "heads", "kv_heads", 0, "impossible heads"),
        ("decoder", "heads", "head_dim", 16, "impossible heads"),
        ("decoder", "heads", "layer", 4, "heads of these rows, or of this layer"),
        ("decoder", "heads", "stride", 320 - 1, "impossible columns of heads"),
        ("decoder", "heads", "b", 1 << 40, "lie outside a file of"),
        ("decoder", "attention", "rows", 1, "heads of these rows"),
        ("decoder", "gather", "rows", 0, "impossible rows to gather"),
        ("decoder", "gather", "k", 1 << 20, "for a row, and the steps need"),
        ("vision", "prepend", "rows", 0, "impossible rows to prepend"),
        ("vision", "prepend", "w", 1 << 40, "lie outside a file of"),
        ("vision", "heads", "layer", 1, "of this layer"),
    ],
)
def test_steps_that_would_leave_their_memory_are_refused(
    copied: Path, part: str, op: str, setting: str, value: Any, reason: str
) -> None:
    has = {"kind": "int8"} if setting in ("group", "s") else {}
    build_cpu(copied, floats="int8", check=False, overwrite=True)
    with pytest.raises(OneVisionError) as refusal:
        reloaded(copied, part, lambda edited: step_of(edited, op, **has).update({setting: value}))
    message = str(refusal.value)
    assert f"{part}.json is not a program that this version reads" in message
    assert reason in message


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("decoder", {"heads": 0}, "groups of heads"),
        ("decoder", {"kv_heads": 3}, "has other heads than the graph's"),
        ("decoder", {"head_dim": 64}, "has other heads than the graph's"),
        ("decoder", {"layers": 5}, "it has 5 layers, and the graph 4"),
        ("decoder", {"frequencies": [1.0]}, "impossible angles"),
        ("decoder", {"buffers": {}}, "not a program"),
        ("decoder", {"buffers": []}, "not a program"),
        ("decoder", {"steps": []}, "the steps do not write rows of 512 values"),
        ("decoder", {"steps": [1]}, "not a program"),
        ("decoder", {"steps": {"op": "rows"}}, "not a program"),
        ("vision", {"class_angles": [0.0] * 4}, "impossible angles"),
        ("vision", {"heads": 1 << 20}, "groups of heads"),
        ("vision", {"layers": 0}, "other rows than a tower's"),
        ("vision", {"steps": []}, "other rows than a tower's"),
    ],
)
def test_programs_that_do_not_fit_their_graph_are_refused(
    copied: Path, part: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OneVisionError, match=reason):
        reloaded(copied, part, lambda edited: edited.update(change))


@pytest.mark.parametrize("buffer", ["units", "scales", "sums", "queries", "heads", "stream", "inner"])
def test_buffers_that_are_too_small_are_refused(copied: Path, buffer: str) -> None:
    build_cpu(copied, floats="int8", check=False, overwrite=True)
    with pytest.raises(OneVisionError, match=f"{buffer} has .* bytes for a row, and the steps need"):
        reloaded(copied, "decoder", lambda edited: edited["buffers"][buffer].update({"0": 3}))


# In a process of its own, which a program that leaves its memory would end.
FUZZ = """
import copy, json, random, sys
from pathlib import Path
import numpy as np
from hypothesis import HealthCheck, given, seed, settings, strategies as st
from onevision_edge.bundle import Bundle
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.cache import Decoder, KVCache
from onevision_edge.runtime.cpu_engine import CpuEngine
from onevision_edge.runtime.cpu_graph import CpuGraph
from onevision_edge.runtime.images import patch_positions

bundle = Bundle.open(sys.argv[1])
folder, pool, text = bundle.directory / "engines" / "cpu", CpuEngine(threads=2).pool(), bundle.manifest.model.text
sound = {part: json.loads((folder / f"{part}.json").read_text()) for part in ("vision", "decoder")}
names = sorted({name for part in sound.values() for step in part["steps"] for name in step})
words = sorted({v for part in sound.values() for step in part["steps"] for v in step.values() if isinstance(v, str)})
numbers = sorted({v for part in sound.values() for step in part["steps"] for v in step.values() if isinstance(v, int)})
values = st.one_of(
    st.sampled_from(numbers), st.sampled_from(words), st.integers(-4, 300), st.integers(-(2**70), 2**70),
    st.sampled_from([None, True, 0.5, -1.0, float("inf"), [], {}, 2**31, 2**31 - 1, -(2**31), 2**32, 2**63]),
)
place, tops = st.integers(0, 10**6), ["heads", "kv_heads", "head_dim", "layers", "frequencies", "class_angles"]
edits = st.one_of(
    st.tuples(st.just("set"), place, st.sampled_from(names), values),
    st.tuples(st.just("nudge"), place, st.sampled_from(names), st.integers(-64, 64)),
    st.tuples(st.just("drop"), place, st.sampled_from(names), values),
    st.tuples(st.sampled_from(["remove", "repeat"]), place, st.none(), values),
    st.tuples(st.just("swap"), place, st.none(), place),
    st.tuples(st.just("top"), place, st.sampled_from(tops), values),
    st.tuples(st.just("buffer"), place, st.integers(0, 3), values),
)
counted = {"refused": 0, "ran": 0}

def edited(program, changes):
    steps = program["steps"]
    for kind, at, name, value in changes:
        step = steps[at % len(steps)] if steps else {}
        if kind == "set":
            step[name] = value
        elif kind == "nudge" and isinstance(step.get(name), int):
            step[name] += value
        elif kind == "drop":
            step.pop(name, None)
        elif kind == "remove" and steps:
            del steps[at % len(steps)]
        elif kind == "repeat" and steps:
            steps.insert(at % len(steps), dict(step))
        elif kind == "swap" and steps:
            a, b = at % len(steps), value % len(steps)
            steps[a], steps[b] = steps[b], steps[a]
        elif kind == "top":
            program[name] = value
        elif kind == "buffer":
            sizes = list(program["buffers"].values())[at % len(program["buffers"])]
            sizes[str(name)] = value
    return program

@seed(1)
@settings(max_examples=int(sys.argv[2]), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["vision", "decoder"]), st.lists(edits, min_size=1, max_size=3))
def fuzz(part, changes):
    program = edited(copy.deepcopy(sound[part]), changes)
    Path(sys.argv[3]).write_text(json.dumps([part, changes], default=repr))
    (folder / f"{part}.json").write_text(json.dumps(program))
    try:
        graph = CpuGraph(folder, part, bundle.graph(part), pool)
    except OneVisionError:
        counted["refused"] += 1
        return
    if part == "vision":
        pixels = np.zeros((2, 16, 588), graph.fmt.numpy)
        graph.run({"pixel_values": pixels, "patch_positions": patch_positions(4, 4, 2)})
    else:
        cache = KVCache(text, 128, 2, graph.cache_dtype, graph.zeros)
        decoder = Decoder(graph, cache, text.vocab_size)
        embeds = np.ones((2, 9, text.hidden_size), graph.fmt.numpy)
        decoder(embeds, np.array([0, 110]), np.array([[0, 8], [1, 2]]))
        decoder(embeds[:, :1], np.array([9, 127]), np.zeros((2, 1), np.int64))
    counted["ran"] += 1

fuzz()
print(json.dumps(counted))
"""


def test_no_program_leaves_its_memory(copied: Path, python: Callable[..., Any], tmp_path: Path) -> None:
    """Edits of all kinds: a program is refused, or runs to its end."""
    build_cpu(copied, floats="int8", check=False, overwrite=True)
    process = python(FUZZ, copied, 400, tmp_path / "last.json")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, f"after {(tmp_path / 'last.json').read_text()}: {errors[-2000:]}"
    counted = json.loads(out)
    assert counted["refused"] > 100
    assert counted["ran"] > 20


def test_patches_that_make_no_whole_token_are_refused(demo: Made) -> None:
    graph = onevision_edge.load(demo("fp16"))._graphs["vision"]
    with pytest.raises(OneVisionError, match="6 patches do not make whole tokens of 4"):
        graph.run({"pixel_values": np.zeros((1, 6, 588), np.float16), "patch_positions": np.zeros((6, 2), np.int64)})


# Builds


def read_by_a_row(product: dict[str, Any]) -> int:
    """Bytes of a product's weights and scales, padded to panels of 32 columns."""
    columns = -(-product["n"] * (1 + (product["epilogue"] == "gated")) // 32) * 32
    weight = {"codes4": 0.5, "codes8": 1, "pairs": 2, "floats": 4}[product["weights"]]
    inputs = product["k"] + product["k"] % 2 if product["weights"] == "pairs" else product["k"]
    scales = {"codes4": product["k"] // product["group"], "codes8": 1}.get(product["weights"], 0)
    return int(columns * (inputs * weight + 4 * scales))


def test_a_record_tells_what_was_built(demo: Made) -> None:
    path = demo("fp16")
    opened = Bundle.open(path)
    opened.verify()
    record = read_record(opened)
    assert record is not None
    assert CpuRecord.from_dict(json.loads(json.dumps(record.to_dict())), path) == record
    assert record.machine["kernels"] == kernels.levels()[0].name
    assert {part: one.floats for part, one in record.parts.items()} == {"vision": "int8", "decoder": "bf16"}
    for part, one in record.parts.items():
        assert set(one.files) == {f"{part}.json", f"{part}.weights"}
        assert set(one.sources) == {f"{part}.onnx", f"{part}.onnx.data"}
        assert one.check["difference"] < 0.03
        assert one.check["cosine"] > 0.999
        steps = json.loads((path / "engines" / "cpu" / f"{part}.json").read_text())["steps"]
        assert one.bytes_per_row == sum(read_by_a_row(step) for step in steps if step["op"] == "product")
        assert 0 < one.bytes_per_row < one.files[f"{part}.weights"].size
    assert sorted(p.name for p in (path / "engines").iterdir()) == ["cpu"]


def test_bf16_is_built_without_a_comparison(demo: Made) -> None:
    record = read_record(Bundle.open(demo("bf16")))
    assert record is not None
    assert {part: (one.floats, dict(one.check)) for part, one in record.parts.items()} == {
        "vision": ("bf16", {}),
        "decoder": ("bf16", {}),
    }
    with pytest.raises(OneVisionError, match="has no bfloat16 kernels"):
        onevision_edge.load(demo("bf16"), engines=False)


def test_engines_are_not_replaced_unasked(copied: Path) -> None:
    before = (copied / "engines" / "cpu" / RECORD).read_text()
    with pytest.raises(OneVisionError, match="exists; pass --overwrite to replace it"):
        build_cpu(copied)
    assert (copied / "engines" / "cpu" / RECORD).read_text() == before
    with pytest.raises(OneVisionError, match="floats is 'fp8': choose one of auto, fp32, bf16, int8"):
        build_cpu(copied, floats="fp8", overwrite=True)
    with pytest.raises(OneVisionError, match="holds no tower graph"):
        build_cpu(copied, parts=["tower"], overwrite=True)
    assert (copied / "engines" / "cpu" / RECORD).read_text() == before


def test_kernels_that_are_wrong_build_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that have nothing to do with the plain graph's are an error, not a number in the record."""
    shutil.rmtree(copied / "engines")
    noise = np.random.default_rng(0).standard_normal((1, 144, 192))
    monkeypatch.setattr(CpuGraph, "run", lambda self, inputs: [noise])
    with pytest.raises(OneVisionError, match=r"vision: the cpu engine's outputs are not the plain graph's \(cosine"):
        build_cpu(copied)
    assert not list((copied / "engines").iterdir())


def test_a_disk_that_fills_up_leaves_nothing(demo: Made, mounted: Callable[[str], Path]) -> None:
    source = demo("fp16")
    files = [path for path in source.iterdir() if path.is_file()]
    disk = mounted(f"{sum(path.stat().st_size for path in files) // 1024 + 600}k")
    for path in files:
        shutil.copy(path, disk)
    with pytest.raises(OneVisionError, match="the disk is full"):
        build_cpu(disk)
    assert not list((disk / "engines").iterdir())
    assert kinds(onevision_edge.load(disk)) == PLAIN


@pytest.mark.parametrize("phase", ["kernels", "pack vision", "check vision", "pack decoder"])
def test_an_interrupt_leaves_nothing(copied: Path, phase: str) -> None:
    @contextmanager
    def interrupted(title: str, unit: str = "B") -> Iterator[Progress]:
        def report(done: int, total: int, label: str) -> None:
            if title == phase:
                raise KeyboardInterrupt

        if title == phase and not phase.startswith("pack"):
            raise KeyboardInterrupt
        yield report

    before = {path: path.read_bytes() for path in (copied / "engines").rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        build_cpu(copied, overwrite=True, phases=interrupted)
    assert {path: path.read_bytes() for path in (copied / "engines").rglob("*") if path.is_file()} == before


def test_progress_goes_up_to_the_end(copied: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def phases(title: str, unit: str = "B") -> Iterator[Progress]:
        told[title] = []
        yield lambda done, total, label: told[title].append((done, total))

    build_cpu(copied, overwrite=True, phases=phases)
    assert list(told) == ["kernels", "pack vision", "check vision", "pack decoder", "check decoder"]
    for part in ("pack vision", "pack decoder"):
        assert told[part] == sorted(told[part])
        assert told[part][-1][0] == told[part][-1][1] > 0


# The command


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_the_command_builds_and_shows_a_table(copied: Path) -> None:
    shutil.rmtree(copied / "engines")
    result = call("build", copied, "--target", "cpu")
    assert result.exit_code == 0, result.output
    for words in ("read per row", "differs by", "vision", "int8", "decoder", "bf16", "ms"):
        assert words in result.stderr
    assert (
        f"wrote {copied / 'engines' / 'cpu'}: vision, decoder for {kernels.levels()[0].name} kernels" in result.stderr
    )
    again = call("build", copied, "--target", "cpu")
    assert (again.exit_code, again.stderr.splitlines()[-1]) == (
        1,
        f"Error: {copied / 'engines' / 'cpu'} exists; pass --overwrite to replace it",
    )


def test_the_command_prints_the_record(copied: Path) -> None:
    options = ("--parts", "decoder", "--floats", "fp32", "--no-check", "--overwrite", "--json")
    result = call("build", copied, "--target", "cpu", *options)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((copied / "engines" / "cpu" / RECORD).read_text())
    assert list(record["parts"]) == ["decoder"]
    assert (record["parts"]["decoder"]["floats"], record["parts"]["decoder"]["check"]) == ("fp32", {})


@pytest.mark.parametrize(
    "options",
    [
        ("--max-tokens", "64"),
        ("--max-batch", "1"),
        ("--engine", "tensorrt"),
        ("--adopt",),
        ("--dry-run",),
        ("--force",),
        ("--verbose",),
        ("--decode-profile",),
        ("--builderOptimizationLevel", "3"),
        ("--stripWeights",),
    ],
)
def test_options_of_other_targets_are_wrong_usage(demo: Made, options: tuple[str, ...]) -> None:
    result = call("build", demo("fp16"), "--target", "cpu", "--overwrite", *options)
    assert result.exit_code == 2
    assert f"{options[0]}: the cpu target takes --parts, --floats, --check and --overwrite alone" in result.stderr


def test_what_belongs_to_the_cpu_target_alone(demo: Made) -> None:
    result = call("build", demo("fp16"), "--target", "sm80", "--floats", "int8")
    assert (result.exit_code, "--floats belongs to the cpu target" in result.stderr) == (2, True)
    assert call("build", demo("fp16"), "--target", "cpu", "--floats", "fp8").exit_code == 2
    result = call("build", demo("fp16"), "--target", "cpu,sm80")
    assert (result.exit_code, "the cpu target is built alone" in result.stderr) == (1, True)


@pytest.mark.parametrize("engines", [(), ("--engines", "cpu"), ("--engines", "none"), ("--threads", "2")])
def test_the_command_runs_a_bundle_in_its_engine(demo: Made, engines: tuple[str, ...]) -> None:
    entry = QUESTIONS[0]
    image = DEMO / "images" / entry["images"][0]
    result = call("run", demo("fp16"), "--image", image, "--prompt", entry["prompt"], *engines)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == entry["answer"]


def test_the_command_insists_on_an_engine(golden_bundle: Callable[[str], Path]) -> None:
    result = call("run", golden_bundle("fp32"), "--prompt", "?", "--engines", "cpu")
    assert result.exit_code == 1
    assert "has no cpu engine: make it with" in result.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are not bound here")
def test_an_engine_gets_a_thread_for_each_core(demo: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pool = Library.pool
    monkeypatch.setattr(Library, "pool", lambda self, threads: asked.append(threads) or pool(self, threads))
    onevision_edge.load(demo("fp16"), threads=3)
    onevision_edge.load(demo("fp16"))
    assert asked[0] == 3
    assert 1 <= asked[1] <= len(os.sched_getaffinity(0))
