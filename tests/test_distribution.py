"""Distributions of one row: likelihoods written out, ranks, and what counts as a near tie."""

import math

import numpy as np
import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.distribution import rounding_step, row_distribution


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_likelihoods_of_targets_are_written_out() -> None:
    found = row_distribution(logits([0, 0, 0, 0]), logits([0, 0, 0, math.log(5)]), np.array([3]))
    assert found.nll_reference is not None
    assert found.nll is not None
    assert found.nll_reference[0] == pytest.approx(math.log(4))
    assert found.nll[0] == pytest.approx(math.log(8 / 5), rel=1e-6)
    assert found.kld[0] == pytest.approx(math.log(2) - math.log(5) / 4, rel=1e-6)


def test_the_same_agrees_everywhere() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)
    found = row_distribution(rows, rows, rows.argmax(axis=1))
    assert found.top1.all()
    assert found.top5.all()
    assert (found.divergent, found.first_divergent, found.near_ties) == (0, None, 0)
    assert (found.right, found.right_reference) == (True, True)
    assert not found.kld.any()
    assert not found.margin.any()


def test_where_tokens_differ() -> None:
    reference = logits([9, 0, 0], [0, 9, 0], [9, 5, 0], [0, 0, 9])
    measured = logits([9, 0, 0], [0, 9, 0], [0, 9, 0], [9, 0, 0])
    found = row_distribution(reference, measured, np.array([0, 1, 0, 0]))
    assert found.top1.tolist() == [True, True, False, False]
    assert (found.divergent, found.first_divergent) == (2, 2)
    assert found.margin.tolist() == [0, 0, 4, 9]
    assert (found.right, found.right_reference) == (False, False)
    assert found.tokens.tolist() == [0, 1, 1, 0]


def test_top5_is_the_references_token_among_the_candidates_five() -> None:
    reference = np.zeros((2, 8), np.float32)
    reference[:, 7] = 1
    measured = logits([8, 7, 6, 5, 3, 2, 1, 4], [8, 7, 6, 5, 4, 2, 1, 3])
    assert row_distribution(reference, measured).top5.tolist() == [True, False]
    assert row_distribution(reference, measured, never=[0]).top5.tolist() == [True, True]
    assert row_distribution(reference, np.zeros((2, 8), np.float32)).top5.tolist() == [False, False]  # lower ids first


def test_what_is_never_generated_is_passed_over() -> None:
    found = row_distribution(logits([1, 9, 2]), logits([1, 2, 2]), never=[1])
    assert found.tokens_reference.tolist() == [2]
    assert found.top1.all()


def test_a_near_tie_is_within_a_rounding_step_of_bf16() -> None:
    assert rounding_step(np.array([1, 1.99, 2, 18, -0.5])).tolist() == [2**-7, 2**-7, 2**-6, 2**-3, 2**-8]
    reference = logits([18, 17.9, 0], [18, 17.8, 0])
    found = row_distribution(reference, reference[:, [1, 0, 2]])
    assert found.near_tie.tolist() == [True, False]
    assert (found.near_ties, found.divergent) == (1, 2)


def test_rounding_to_bf16_changes_near_ties_alone() -> None:
    import ml_dtypes

    rows = (np.random.default_rng(4).normal(size=(4000, 12)) / 30 + 18).astype(np.float32)
    found = row_distribution(rows, rows.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert found.divergent > 100
    assert found.near_ties == found.divergent


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_agrees_with_nothing(bad: float) -> None:
    reference, measured = logits([9, 0, 0], [9, 0, 0]), logits([9, 0, 0], [bad, 0, 0])
    found = row_distribution(reference, measured, np.array([0, 0]))
    assert found.top1.tolist() == [True, False]
    assert found.top5.tolist() == [True, False]
    assert (found.right, found.right_reference, found.near_ties) == (False, True, 0)
    assert not np.isfinite(found.kld[1])


def test_shapes_must_match() -> None:
    with pytest.raises(OneVisionError, match=r"logits of \[1, 2\] cannot be compared with \[1, 3\]"):
        row_distribution(logits([1, 2, 3]), logits([1, 2]))
