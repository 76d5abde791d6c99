"""How a token is chosen among those that are allowed."""

import math
import time
from typing import Any

import numpy as np
import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.constraint import Constraint
from onevision_edge.runtime.sampling import Sampler, SamplingParams


class Mask(Constraint):
    """Always the same tokens."""

    def __init__(self, *allowed: int, size: int = 8) -> None:
        self.vocab_size, self.taken, self.mask = size, list[int](), np.zeros(size, bool)
        self.mask[list(allowed)] = True

    def allowed(self) -> np.ndarray:
        return self.mask

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)


LOGITS = np.array([2.0, -1.0, 0.5, 1.25, 1.25, -3.0, 0.0, 2.5], np.float32)


def test_greedy_takes_the_best_that_is_allowed() -> None:
    mask = Mask(1, 2, 5, 7)
    sampler = Sampler(SamplingParams(logprobs=3), (), (7,), 8, mask)
    found = sampler.sample(LOGITS)
    normaliser = math.log(sum(math.exp(LOGITS[i]) for i in (1, 2, 5)))
    assert found.token_id == 2
    assert found.logprob == pytest.approx(0.5 - normaliser, abs=1e-6)
    assert [i for i, _ in found.top or []] == [2, 1, 5]
    assert sum(math.exp(logprob) for _, logprob in found.top or []) == pytest.approx(1, abs=1e-6)
    assert mask.taken == [2]


def test_the_only_token_has_probability_one() -> None:
    found = Sampler(SamplingParams(logprobs=5), (), (), 8, Mask(5)).sample(LOGITS)
    assert (found.token_id, found.logprob, found.top) == (5, 0.0, [(5, 0.0)])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_draws_follow_the_distribution_of_what_is_allowed(options: dict[str, Any]) -> None:
    """As an unconstrained sampler draws where the others do not exist."""
    allowed, count = [1, 3, 4, 6], 4000
    bound = Sampler(SamplingParams(temperature=1, seed=1, **options), (), (), 8, Mask(*allowed))
    small = Sampler(SamplingParams(temperature=1, seed=1, **options), (), (), 4)
    drawn = [bound.sample(LOGITS).token_id for _ in range(count)]
    assert drawn == [allowed[small.sample(LOGITS[allowed]).token_id] for _ in range(count)]


def test_a_large_vocabulary_with_few_allowed() -> None:
    """The filters look at the allowed alone: minus infinities that tie are never sorted."""
    size = 151_936
    logits = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    mask = Mask(5, 70_000, 151_900, size=size)
    sampler = Sampler(SamplingParams(temperature=1, top_k=20, top_p=0.95, logprobs=5), (), (5,), size, mask)
    started = time.thread_time()
    found = [sampler.sample(logits) for _ in range(20)]
    assert (time.thread_time() - started) / 20 < 0.005
    assert {one.token_id for one in found} == {70_000, 151_900}
    assert all(len(one.top or []) == 2 for one in found)


def test_penalties_count_as_ever() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=2.0), (), (), 8, Mask(2, 3, 6))
    assert [sampler.sample(LOGITS).token_id for _ in range(4)] == [3, 2, 6, 3]


def test_no_token_left_is_an_error() -> None:
    with pytest.raises(OneVisionError, match="no token is left"):
        Sampler(SamplingParams(), (), (5,), 8, Mask(5)).sample(LOGITS)


def test_a_constraint_of_another_model_is_refused() -> None:
    with pytest.raises(OneVisionError, match="a vocabulary of 9, not of 8"):
        Sampler(SamplingParams(), (), (), 8, Mask(1, size=9))
