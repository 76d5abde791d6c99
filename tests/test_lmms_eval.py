"""lmms-eval: results in its shape, and bundles as its models, run on a local task of shipped questions."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onevision_edge
from onevision_edge.calibration.dataset import SHIPPED_EVALUATION
from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.lmms_eval import lmms_eval_results, write_lmms_eval
from onevision_edge.report.parity.lmms_samples import is_samples_file, read_samples
from onevision_edge.report.parity.text_metrics import exact

SUBJECT = {"name": "int8", "precision": "int8"}
PARITY: dict[str, Any] = {
    "format": "onevision-edge parity",
    "format_version": 1,
    "created": "2026-11-27T10:00:00+00:00",
    "seed": 3,
    "data": {"source": "shipped evaluation set", "rows": 2},
    "reference": {"name": "fp32"},
    "candidates": [
        {
            "subject": SUBJECT,
            "metrics": {
                "accuracy": {"value": 0.5, "low": 0.0, "high": 1.0, "n": 2},
                "accuracy_reference": {"value": 1.0, "low": None, "high": None, "n": 2},
                "kld": {"value": None, "low": None, "high": None, "n": 2},
            },
            "scores": [
                {
                    "row": "questions.jsonl:1",
                    "reference": {"accuracy": 1.0},
                    "candidate": {"accuracy": float(text == "3")},
                    "reference_text": "3",
                    "candidate_text": text,
                    "expected": "3",
                }
                for text in ("3", "4")
            ],
        }
    ],
}


def test_results_have_the_shape_of_lmms_eval() -> None:
    found = lmms_eval_results(PARITY)
    results = found["results"]["shipped_evaluation_set"]
    assert results["accuracy,none"] == 0.5
    assert results["accuracy_stderr,none"] == pytest.approx(1 / 3.919928, rel=1e-6)
    assert not any(name.startswith(("kld", "accuracy_reference")) for name in results)
    assert found["n-samples"]["shipped_evaluation_set"] == {"original": 2, "effective": 2}
    assert found["higher_is_better"]["shipped_evaluation_set"] == {"accuracy": True}
    samples = found["samples"]["shipped_evaluation_set"]
    assert [(s["doc_id"], s["target"], s["filtered_resps"], s["accuracy"]) for s in samples] == [
        (0, "3", "3", 1.0),
        (1, "3", "4", 0.0),
    ]
    assert samples[0]["doc_hash"] == samples[1]["doc_hash"]
    assert len(samples[0]["doc_hash"]) == 64


def test_the_references_results_are_its_own() -> None:
    found = lmms_eval_results(PARITY, None)
    assert found["model_name"] == "fp32"
    results = found["results"]["shipped_evaluation_set"]
    assert (results["accuracy,none"], results["accuracy_stderr,none"]) == (1.0, "N/A")
    assert [s["filtered_resps"] for s in found["samples"]["shipped_evaluation_set"]] == ["3", "3"]


def test_files_are_laid_out_as_lmms_evals_and_read_back(tmp_path: Path) -> None:
    files = write_lmms_eval(PARITY, tmp_path)
    names = [str(file.relative_to(tmp_path)) for file in files]
    task = "20261127100000_samples_shipped_evaluation_set.jsonl"
    assert names == [f"{m}/{f}" for m in ("fp32", "int8") for f in (task, "20261127100000_results.json")]
    assert is_samples_file(tmp_path / "int8" / task)
    assert [(q.answers, q.recorded) for q in read_samples(tmp_path / "int8" / task)] == [(("3",), "3"), (("3",), "4")]
    assert "samples" not in json.loads((tmp_path / "int8/20261127100000_results.json").read_text())


# Below here lmms-eval runs.
UTILITIES = """
from PIL import Image

def visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["paths"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]

def results(doc, answers):
    return {"exact": float(answers[0].strip() == doc["answer"])}

def choices(doc):
    return doc["choices"]
"""
GENERATION = """
task: shipped_questions
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 48, temperature: 0, do_sample: false}
process_results: !function utils.results
metric_list:
  - {metric: exact, aggregation: mean, higher_is_better: true}
"""
CHOICES = """
task: shipped_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: right
doc_to_choice: !function utils.choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
RUN = """
import json, sys
from lmms_eval import evaluator, models
from lmms_eval.tasks import TaskManager
from onevision_edge.report.parity.lmms_eval import manifest
models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
task, bundle, folder, simple = sys.argv[1:]
found = evaluator.simple_evaluate(
    model="onevision_edge", model_args=f"pretrained={bundle},threads=1", tasks=[task], batch_size=2,
    task_manager=TaskManager(include_path=folder, include_defaults=False), force_simple=simple == "simple",
    bootstrap_iters=0, log_samples=True,
)
samples = [[s["filtered_resps"], s["target"]] for s in found["samples"][task]]
print("RESULT" + json.dumps({"results": found["results"][task], "samples": samples}, default=str))
"""
needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
QUESTIONS = 12


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two task files and their rows: some shipped questions, and for each its answer among three."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.loads(line) for line in SHIPPED_EVALUATION.read_text().splitlines()[:QUESTIONS]]
    for index, row in enumerate(lines):
        images = row.pop("images", None) or [row.pop("image")]
        row["paths"] = [str(SHIPPED_EVALUATION.parent / image) for image in images]
        row["choices"] = [row["answer"], f"{row['answer']} {row['answer']}", "blue 3"]
        row["right"] = 0
        row["choices"] = row["choices"][-(index % 3) :] + row["choices"][: -(index % 3)]
        row["right"] = row["choices"].index(row["answer"])
    (folder / "rows.json").write_text(json.dumps(lines))
    (folder / "utils.py").write_text(UTILITIES)
    for name, text in (("generation", GENERATION), ("choices", CHOICES)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "bundle"
    onevision_edge.export("demo", path)
    return path


@pytest.fixture(scope="module")
def expected(demo_bundle: Path, task_folder: Path) -> list[tuple[str, str]]:
    """What the bundle answers without lmms-eval, and what it should."""
    model = onevision_edge.load(demo_bundle, threads=1)
    pairs = []
    for row in json.loads((task_folder / "rows.json").read_text()):
        content = [
            *({"type": "image", "image": path} for path in row["paths"]),
            {"type": "text", "text": row["prompt"]},
        ]
        pairs.append((model.generate([{"role": "user", "content": content}], max_tokens=48).text, row["answer"]))
    return pairs


@pytest.fixture
def evaluated(
    task_folder: Path, demo_bundle: Path, python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, str], dict[str, Any]]:
    """lmms-eval's results of a task, in a process of its own without the network."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)

    def run(task: str, kind: str) -> dict[str, Any]:
        process = python(RUN, task, demo_bundle, task_folder, kind)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        return json.loads(out.rpartition("RESULT")[2])

    return run


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "simple"])
def test_a_bundle_answers_lmms_eval_as_it_does_alone(
    evaluated: Callable[..., Any], expected: list[tuple[str, str]], kind: str
) -> None:
    """About 15 s."""
    found = evaluated("shipped_questions", kind)
    assert [answer[0] if isinstance(answer, list) else answer for answer, _ in found["samples"]] == [
        answer for answer, _ in expected
    ]
    right = sum(answer == wanted for answer, wanted in expected)
    assert right >= QUESTIONS - 2
    assert found["results"]["exact,none"] == pytest.approx(right / QUESTIONS)


@needs_lmms_eval
@pytest.mark.slow
def test_likelihoods_choose_the_right_answer(evaluated: Callable[..., Any], expected: list[tuple[str, str]]) -> None:
    """Where greedy decoding gives the right answer, it is the likeliest of the choices, too. About 15 s."""
    found = evaluated("shipped_choices", "simple")
    right = sum(exact(answer, [wanted]) for answer, wanted in expected)
    assert found["results"]["acc,none"] >= right / QUESTIONS


@needs_lmms_eval
def test_options_are_translated() -> None:
    from onevision_edge.report.parity.lmms_eval_model import ChatBundle, SimpleBundle, generation_options

    assert (ChatBundle.is_simple, SimpleBundle.is_simple) == (False, True)
    given = {"max_new_tokens": 7, "until": ["\n\n", ""], "temperature": 0, "top_p": None, "num_beams": 1}
    assert generation_options(given) == {"max_tokens": 7, "stop": ("\n\n",), "temperature": 0.0}
    assert generation_options({"until": "x", "temperature": 0.5, "top_p": 0.9}) == {
        "max_tokens": 128,
        "stop": ("x",),
        "temperature": 0.5,
        "top_p": 0.9,
    }


@needs_lmms_eval
def test_sound_is_refused() -> None:
    from onevision_edge.report.parity.lmms_eval_model import ChatBundle

    bundle = object.__new__(ChatBundle)
    bundle.task_dict = {"task": {"test": [{}]}}
    message = {"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}
    request = SimpleNamespace(args=("", lambda doc: [message], {}, 0, "task", "test"))
    with pytest.raises(OneVisionError, match="a message has audio"):
        bundle.messages(request)
