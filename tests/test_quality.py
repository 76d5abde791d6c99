"""Quality: divergences against sums written out, accuracy against answers that the model really gives."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onevision_edge
from onevision_edge.calibration.dataset import SHIPPED_EVALUATION, Dataset, Preparer, load_dataset
from onevision_edge.calibration.quality import Tally, divergence, logits_of, measure
from onevision_edge.calibration.scored import Scored, scored
from onevision_edge.config import ModelConfig
from onevision_edge.runtime.model import Model

SMALL = 112 * 112  # pixels of an image that is too small for many of its questions


def by_hand(p_logits: list[float], q_logits: list[float]) -> float:
    """Sum of p log(p / q)."""
    p, q = ([math.exp(x - max(logits)) for x in logits] for logits in (p_logits, q_logits))
    p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32)), min_size=2, max_size=30),
    st.sampled_from([0.0, 512.0, -8192.0]),
)
def test_divergence_is_the_sum_written_out(pairs: list[tuple[float, float]], shift: float) -> None:
    reference, measured = np.float32(pairs).T[:, None] + np.float32([shift, 0])[:, None, None]
    found = divergence(reference, measured)
    assert found.dtype == np.float64
    wanted = by_hand(reference[0].tolist(), measured[0].tolist())
    assert found[0] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert divergence(reference, reference)[0] == 0


def test_divergence_is_of_the_reference_from_what_is_measured() -> None:
    """Not the other way round: a token that the reference never gives costs little."""
    reference, measured = np.float32([[0, 0, -30]]), np.float32([[0, 0, 0]])
    assert divergence(reference, measured)[0] == pytest.approx(math.log(3 / 2), rel=1e-6)
    assert divergence(measured, reference)[0] > 9


@pytest.fixture(scope="module")
def golden_config(golden_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_checkpoint(golden_checkpoint)


def one_hot(ids: list[int], vocab: int = 512) -> np.ndarray:
    logits = np.zeros((len(ids), vocab), np.float32)
    logits[np.arange(len(ids)), ids] = 5
    return logits


def test_counts_of_positions_and_of_rows(golden_config: ModelConfig) -> None:
    tally = Tally(golden_config)
    tally.add(one_hot([1, 2, 3]), one_hot([1, 2, 3]), np.array([1, 2, 3]))  # both right
    tally.add(one_hot([4, 5]), one_hot([4, 6]), np.array([4, 5]))  # full precision alone is right
    tally.add(one_hot([7]), one_hot([8]), np.array([8]))  # the other alone
    tally.add(one_hot([9, 9, 9, 9]), one_hot([9, 9, 9, 9]), None)  # no answer is expected
    quality = tally.quality()
    assert (quality.samples, quality.positions) == (4, 10)
    assert quality.top1_agreement == 8 / 10
    assert (quality.accuracy, quality.accuracy_reference) == (2 / 3, 2 / 3)
    changed = by_hand(one_hot([5])[0].tolist(), one_hot([6])[0].tolist())
    assert quality.kld == pytest.approx(2 * changed / 10, rel=1e-9)
    assert quality.kld_p99 == pytest.approx(changed, rel=1e-9)
    assert quality.to_dict()["kld"] == quality.kld


def test_without_answers_there_is_no_accuracy(golden_config: ModelConfig) -> None:
    tally = Tally(golden_config)
    tally.add(one_hot([1]), one_hot([2]), None)
    assert (tally.quality().accuracy, tally.quality().accuracy_reference) == (None, None)
    assert tally.quality().top1_agreement == 0


def test_tokens_that_are_never_generated_do_not_count(golden_config: ModelConfig) -> None:
    """Placeholders of images and videos are suppressed in generation, so their logits decide nothing."""
    reference, measured = one_hot([10, 11]), one_hot([10, 11])
    measured[0, golden_config.image_token_id] = measured[1, golden_config.video_token_id] = 9
    tally = Tally(golden_config)
    tally.add(reference, measured, np.array([10, 11]))
    assert (tally.quality().top1_agreement, tally.quality().accuracy) == (1, 1)


# The shipped model and its questions, images shrunk so that it answers many of them wrong.


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("demo") / "bundle"
    onevision_edge.export("demo", path, dtype="fp32", max_length=512)
    return onevision_edge.load(path, threads=1)


@pytest.fixture(scope="module")
def questions(demo: Model) -> tuple[Dataset, list[dict[str, Any]]]:
    """60 rows, and the same as they stand in the file."""
    preparer = Preparer.from_directory(demo.bundle.directory, demo.config, max_pixels=SMALL)
    chosen = list(range(0, 360, 6))
    lines = SHIPPED_EVALUATION.read_text().splitlines()
    return load_dataset(SHIPPED_EVALUATION, preparer).subset(chosen), [json.loads(lines[i]) for i in chosen]


@pytest.fixture(scope="module")
def logits(demo: Model, questions: tuple[Dataset, Any]) -> tuple[list[Scored], np.ndarray]:
    """Where each row is scored, and the bundle's own logits there."""
    places = [scored(row, demo.config) for row in questions[0]]
    found = [logits_of(demo, row, place) for row, place in zip(questions[0], places, strict=True)]
    return places, np.concatenate(found)


def asked(demo: Model, question: dict[str, Any]) -> str:
    """The answer that greedy decoding gives."""
    images = question.get("images") or [question["image"]]
    content = [{"type": "image", "image": SHIPPED_EVALUATION.parent / image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question["prompt"]}]}]
    return demo.generate(messages, max_tokens=96, max_pixels=SMALL).text


def test_accuracy_is_that_of_the_answers_given(
    demo: Model, questions: tuple[Dataset, list[dict[str, Any]]], logits: tuple[list[Scored], np.ndarray]
) -> None:
    """Row by row: teacher forcing says right where, and only where, the generated text is the expected answer."""
    dataset, lines = questions
    places, found = logits
    given = [asked(demo, line) == line["answer"] for line in lines]
    forced = []
    ends = np.cumsum([len(place.positions) for place in places])
    for place, own in zip(places, np.split(found, ends[:-1]), strict=True):
        tally = Tally(demo.config)
        tally.add(own, own, place.targets)
        forced.append(tally.quality().accuracy == 1)
    assert forced == given
    assert 10 < sum(given) < 50
    quality = measure(demo, dataset, places, found)
    assert quality.accuracy == quality.accuracy_reference == sum(given) / 60


def test_a_bundle_is_no_distance_from_itself(
    demo: Model, questions: tuple[Dataset, Any], logits: tuple[list[Scored], np.ndarray]
) -> None:
    seen: list[tuple[int, int, str]] = []
    report: Callable[..., Any] = lambda *state: seen.append(state)  # noqa: E731
    quality = measure(demo, questions[0], *logits, report)
    assert (quality.kld, quality.kld_p99, quality.top1_agreement) == (0, 0, 1)
    assert (quality.samples, quality.positions) == (60, len(logits[1]))
    assert [done for done, _, _ in seen] == list(range(1, 61))
    assert seen[0][2] == "questions.jsonl:1"


def test_rows_are_measured_against_their_own_reference(
    demo: Model, questions: tuple[Dataset, Any], logits: tuple[list[Scored], np.ndarray]
) -> None:
    """Noise on the logits of one row alone: what it costs there, shared by all positions."""
    places, found = logits
    start, stop = (sum(len(place.positions) for place in places[:n]) for n in (20, 21))
    reference = found.copy()
    reference[start:stop] += np.random.default_rng(0).standard_normal((stop - start, found.shape[1])) * 3
    quality = measure(demo, questions[0], places, reference)
    wanted = [by_hand(reference[i].tolist(), found[i].tolist()) for i in range(start, stop)]
    assert quality.kld == pytest.approx(sum(wanted) / len(found), rel=1e-6)
    assert quality.kld > 1e-3
