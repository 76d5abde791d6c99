import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onevision_edge.errors import OneVisionError
from onevision_edge.runtime import sampling
from onevision_edge.runtime.sampling import Sampled, Sampler, SamplingParams

VOCAB = 151_936


def sampler(vocab=8, prompt=(), suppress=(), **params):
    return Sampler(SamplingParams(**params), prompt, suppress, vocab)


def logits_of(*values):
    return np.array(values, np.float32)


class Uniforms:
    """Stands in for the generator: the middles of `count` equal parts of [0, 1), one after the other."""

    def __init__(self, count):
        self.values = iter((np.arange(count) + 0.5) / count)

    def random(self):
        return float(next(self.values))


def shares(logits, count, **params):
    """How often each token is chosen when the random numbers are spread evenly."""
    one = sampler(len(logits), **params)
    one._random = Uniforms(count)
    return np.bincount([one.sample(logits).token_id for _ in range(count)], minlength=len(logits)) / count


def naive_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **_):
    """The definition, in float64 and with a full sort; also how near a token is to a filter's edge."""
    scores = np.asarray(logits, np.float64) / temperature
    if top_k:
        kth = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores[scores < kth] = -np.inf
    p = np.exp(scores - scores.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    margin = np.abs(before[1:] - top_p).min(initial=1.0) if top_p < 1 else 1.0
    p[order[before >= top_p]] = 0
    if min_p > 0:
        ratio = p / p.max()
        margin = min(margin, np.abs(ratio - min_p)[ratio < 1].min(initial=1.0))
        p[ratio < min_p] = 0
    return p / p.sum(), margin


SPREAD = logits_of(2.0, -1.0, 0.5, 1.25, 1.25, -3.0, 0.0, 2.5)
FILTERS = {
    "none": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_exact_distribution(name):
    params = {"temperature": 1.0, **FILTERS[name]}
    expected, _ = naive_probabilities(SPREAD, **params)
    count, one = 8_000, sampler(seed=7, **params)
    drawn = np.bincount([one.sample(SPREAD).token_id for _ in range(count)], minlength=8)
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    statistic = ((drawn - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    freedom = possible.sum() - 1
    # Wilson and Hilferty's approximation of the chi-square quantile at 1 - 1e-4 (z = 3.72)
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30),
    st.sampled_from([1, 10, 40]),
    st.fixed_dictionaries(
        {
            "temperature": st.floats(0.2, 5),
            "top_k": st.integers(0, 12),
            "top_p": st.floats(0.05, 1),
            "min_p": st.floats(0, 1),
        }
    ),
)
def test_filters_agree_with_the_definition(levels, repeats, params):
    # Repeated, so that the vocabulary is longer than the 128 rows it is grouped by, with many ties.
    logits = np.tile(np.array(levels, np.float32) / 8, repeats)
    expected, margin = naive_probabilities(logits, **params)
    assume(margin > 1e-4)
    count = 300
    assert np.abs(shares(logits, count, **params) - expected).max() <= 1.01 / count + 1e-4


def test_top_k_keeps_ties_with_the_last():
    assert (shares(logits_of(3, 1, 1, 0), 400, temperature=1, top_k=2) > 0).tolist() == [
        True,
        True,
        True,
        False,
    ]


def test_top_p_counts_only_what_top_k_left():
    # Alone the two best have 0.5 and 0.25 of the whole, after top-k 2 they have 2/3 and 1/3.
    logits = np.log(logits_of(4, 2, 1, 1))
    assert (shares(logits, 100, temperature=1, top_p=0.6) > 0).tolist() == [True, True, False, False]
    assert (shares(logits, 100, temperature=1, top_p=0.6, top_k=2) > 0).tolist() == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_nearly_zero_temperature_is_the_best_token(temperature):
    assert shares(SPREAD, 20, temperature=temperature)[7] == 1


# --- a whole vocabulary ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    return np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32).round(3)


@pytest.mark.parametrize("k", [1, 2, 50, 1000, 1187, 1188, 5000])
def test_best_of_a_vocabulary_is_the_head_of_a_sort(wide, k):
    order = np.argsort(-wide, kind="stable")
    tied = int((wide >= wide[order[k - 1]]).sum())
    assert sampling._best(wide, k).tolist() == order[:tied].tolist()
    if k <= 1000:
        assert len(sampling._contenders(wide, k)) < 4 * k + 100


@pytest.mark.parametrize("top_p", [0.001, 0.01, 0.5, 0.9, 0.999])
def test_a_wide_nucleus_is_the_head_of_a_sort(wide, top_p):
    weights = sampling._weights(wide, float(wide.max()), 1.0)
    order = np.argsort(-weights, kind="stable")
    held = np.cumsum(weights[order], dtype=np.float64)
    size = int(np.searchsorted(held, top_p * held[-1])) + 1
    kept = sampling._nucleus(weights, top_p)
    assert len(np.unique(kept)) == len(kept)
    assert abs(len(kept) - size) <= 2  # the sums differ by float32's rounding
    assert set(order[: size - 2]) <= set(kept) <= set(order[: size + 2])


def test_picking_walks_the_running_sum_and_skips_zeros(wide):
    weights = np.where(wide > 0, wide, 0).astype(np.float32)
    running = np.cumsum(weights, dtype=np.float64)
    for uniform in np.random.default_rng(1).random(200):
        index = sampling._pick(weights, uniform)
        assert weights[index] > 0
        goal, slack = uniform * running[-1], 1e-6 * running[-1]  # rows are summed in float32
        assert running[index] - weights[index] - slack <= goal <= running[index] + slack
    assert sampling._pick(weights, 0.0) == np.flatnonzero(weights)[0]
    assert sampling._pick(weights, 1.0) == np.flatnonzero(weights)[-1]


def test_picking_from_a_single_weight_wherever_it_stands():
    for at in (0, 1, 1186, 1187, 16_383, 16_384, 16_500):
        weights = np.zeros(16_501, np.float32)
        weights[at] = 1
        assert [sampling._pick(weights, u) for u in (0.0, 0.5, np.nextafter(1, 0))] == [at] * 3


# --- greedy, suppression, penalties ---------------------------------------------------------------------


def test_greedy_takes_the_first_of_ties_and_no_random_number():
    one = sampler(4)
    one._random = None
    assert one.sample(logits_of(1, 3, 3, 0)) == Sampled(1, None, None)


def test_logits_are_left_alone():
    logits = logits_of(5, 4, 3, 2)
    logits.flags.writeable = False
    for params in ({}, {"temperature": 1.0, "repetition_penalty": 2.0, "logprobs": 2}):
        sampler(4, [0], [0], **params).sample(logits)
    assert logits.tolist() == [5, 4, 3, 2]


@pytest.mark.parametrize("params", [{}, {"temperature": 2.0, "seed": 1}, {"presence_penalty": 1.0}])
def test_suppressed_ids_are_never_chosen(params):
    one = sampler(4, [], [1, 3, 99, -1], **params)
    assert {one.sample(logits_of(1, 9, 0, 9)).token_id for _ in range(50)} <= {0, 2}


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {}, {"top_k": 4, "top_p": 0.9}])
@pytest.mark.parametrize("best", [False, True])
def test_filters_pass_suppressed_ids_over(wide, params, best):
    """As if they were not there, be they the likeliest or in the middle."""
    logits = np.concatenate([SPREAD, wide[:20_000] - 10])
    suppress = [7, 3] if best else [2, 6]
    without = logits.copy()
    without[suppress] = -np.inf
    params = {"temperature": 0.7, **params}
    one, other = sampler(logits.size, [], suppress, **params), sampler(logits.size, [], [], **params)
    one._random, other._random = Uniforms(200), Uniforms(200)
    found = [one.sample(logits).token_id for _ in range(200)]
    assert found == [other.sample(without).token_id for _ in range(200)]
    assert not set(found) & set(suppress)


def test_repetition_penalty_covers_prompt_and_answer():
    one = sampler(4, [0, 0], [], repetition_penalty=2.0)
    logits = logits_of(4, 3, -1, -1.5)
    # 4 / 2 < 3; then 3 / 2 < 4 / 2; both stay penalised from there on
    assert [one.sample(logits).token_id for _ in range(3)] == [1, 0, 0]
    negative = sampler(2, [0], [], repetition_penalty=2.0)
    assert negative.sample(logits_of(-1, -1.5)).token_id == 1  # -1 * 2 < -1.5


def test_presence_counts_once_and_frequency_each_time():
    logits = logits_of(1.0, 0.35, 0.0)
    presence = sampler(3, [0], [], presence_penalty=0.7)
    assert [presence.sample(logits).token_id for _ in range(4)] == [0, 1, 0, 0]
    frequency = sampler(3, [0], [], frequency_penalty=0.4)
    assert [frequency.sample(logits).token_id for _ in range(5)] == [0, 0, 1, 0, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-30, 30), min_size=6, max_size=6), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), max_size=8),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_agree_with_the_definition(steps, prompt, repetition, presence, frequency):
    params = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    one, said = sampler(6, prompt, [5], **params), []
    for step in steps:
        logits = np.array(step, np.float32) / 4
        expected = logits.astype(np.float64)
        for i in {*prompt, *said}:
            expected[i] = expected[i] / repetition if expected[i] > 0 else expected[i] * repetition
        for i, count in Counter(said).items():
            expected[i] -= presence + frequency * count
        token = one.sample(logits).token_id
        assert token != 5
        assert expected[token] >= expected[:5].max() - 1e-4
        said.append(token)


# --- seeds, log-probabilities, broken logits ------------------------------------------------------------


def test_the_same_seed_gives_the_same_tokens(wide):
    def tokens(seed):
        one = sampler(VOCAB, seed=seed, temperature=1.0, top_p=0.95)
        return [one.sample(wide).token_id for _ in range(12)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_the_model_without_suppressed_ids(temperature):
    params = {"temperature": temperature, "top_k": 2, "repetition_penalty": 1.5, "seed": 0}
    token, logprob, top = sampler(8, [7], [0], logprobs=3, **params).sample(SPREAD)
    reference = SPREAD.astype(np.float64)
    reference[0] = -np.inf
    reference -= np.log(np.exp(reference).sum())
    assert logprob == pytest.approx(reference[token], abs=1e-6)
    assert [i for i, _ in top] == [7, 3, 4]
    assert [v for _, v in top] == pytest.approx(reference[[7, 3, 4]], abs=1e-6)


def test_number_of_logprobs():
    assert sampler(logprobs=0).sample(SPREAD).top == []
    assert sampler(logprobs=0).sample(SPREAD).logprob < 0
    everything = sampler(suppress=[0], logprobs=100).sample(SPREAD).top
    assert len(everything) == 7
    assert sum(math.exp(v) for _, v in everything) == pytest.approx(1, abs=1e-6)


def test_other_float_types_are_taken():
    assert sampler().sample(SPREAD.astype(np.float16)).token_id == 7
    assert sampler().sample(SPREAD.astype(np.float64)).token_id == 7


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"logprobs": 1}, {"frequency_penalty": 1.0}])
@pytest.mark.parametrize(
    ("bad", "message"),
    [(math.nan, "the model produced NaN logits"), (math.inf, "the model produced infinite")],
)
def test_broken_logits_are_an_error(params, bad, message):
    for at in (0, 5, 7):
        logits = SPREAD.copy()
        logits[at] = bad
        with pytest.raises(OneVisionError, match=message):
            sampler(**params).sample(logits)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
def test_nothing_left_to_choose_is_an_error(params):
    with pytest.raises(OneVisionError, match="no token is left"):
        sampler(2, [], [0, 1], **params).sample(logits_of(1, 2))


def test_another_shape_is_an_error():
    with pytest.raises(OneVisionError, match=r"shape \[1, 8\]; expected \[8\]"):
        sampler().sample(SPREAD[None])


# --- parameters -----------------------------------------------------------------------------------------


def test_parameters_are_normalised():
    params = SamplingParams(temperature=1, top_k=np.int64(3), top_p=np.float32(0.5), stop="END", seed=np.int32(4))
    assert (params.temperature, params.top_k, params.top_p, params.stop) == (1.0, 3, 0.5, ("END",))
    assert [type(v) for v in (params.temperature, params.top_k, params.top_p, params.seed)] == [
        float,
        int,
        float,
        int,
    ]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams() == SamplingParams(max_tokens=512)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "a whole number from 1"),
        ("max_tokens", 2.5, "a whole number from 1"),
        ("max_tokens", None, "a whole number from 1"),
        ("max_tokens", True, "a whole number from 1"),
        ("temperature", -0.1, "a number from 0"),
        ("temperature", math.nan, "a number from 0"),
        ("temperature", math.inf, "a number from 0"),
        ("temperature", "1", "a number from 0"),
        ("top_k", -1, "a whole number from 0"),
        ("top_p", 0, "above 0 and up to 1"),
        ("top_p", 1.01, "above 0 and up to 1"),
        ("min_p", -0.5, "from 0 (off) to 1"),
        ("min_p", [0.5], "from 0 (off) to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -3, "from -2 to 2"),
        ("seed", -1, "from 0 to 2**64 - 1"),
        ("seed", 1.0, "from 0 to 2**64 - 1"),
        ("logprobs", -1, "a whole number from 0, or None"),
        ("logprobs", True, "a whole number from 0, or None"),
        ("stop", "", "a string or a list of strings, none empty"),
        ("stop", ["a", ""], "a string or a list of strings, none empty"),
        ("stop", [1], "a string or a list of strings, none empty"),
        ("stop", None, "a string or a list of strings, none empty"),
        ("ignore_eos", 1, "True or False"),
    ],
)
def test_parameter_errors_name_field_value_and_range(field, value, allowed):
    with pytest.raises(OneVisionError) as caught:
        SamplingParams(**{field: value})
    assert f"{field} is {value!r}; it must be" in str(caught.value)
    assert allowed in str(caught.value)
