"""The sampler chain against llama.cpp's own samplers, and as a function of (seed, i) and ids alone."""

import ctypes
import math

import numpy as np
import pytest

from meshnode.errors import StageError
from meshnode.io.llama.sampler import LaneSampler, _nucleus, log_probabilities, uniform
from meshnode.wire.sampling import Sampling

VOCABULARY = 2000


def logits_of(seed, spread=3.0):
    return (np.random.default_rng(seed).standard_normal(VOCABULARY) * spread).astype(np.float32)


def drawn(sampling, logits, window=(), count=1, generated=0):
    sampler = LaneSampler(sampling, VOCABULARY, window, generated)
    return [sampler.draw(0, i, logits).token for i in range(count)]


def llama_candidates(logits, samplers):
    """{token: probability} that llama.cpp's samplers leave, normalised."""
    import llama_cpp as api

    entries = np.zeros(len(logits), [("id", "i4"), ("logit", "f4"), ("p", "f4")])
    entries["id"], entries["logit"] = np.arange(len(logits)), logits
    array = api.llama_token_data_array()
    array.data = ctypes.cast(entries.ctypes.data, type(array.data))
    array.size, array.selected, array.sorted = len(logits), -1, False
    for sampler in samplers:
        api.llama_sampler_apply(sampler, ctypes.byref(array))
        api.llama_sampler_free(sampler)
    left = entries[: array.size]
    weights = np.exp(left["logit"].astype(np.float64) - left["logit"].max())
    return dict(zip(left["id"].tolist(), (weights / weights.sum()).tolist(), strict=True))


def our_candidates(sampling, logits, window=()):
    sampler = LaneSampler(sampling, VOCABULARY, window)
    adjusted = sampler._adjusted(logits)
    tokens = sampler._filtered(adjusted)
    tokens = np.arange(len(logits)) if tokens is None else tokens
    weights = np.exp((adjusted[tokens].astype(np.float64) - adjusted[tokens].max()) / sampling.temperature)
    return dict(zip(tokens.tolist(), (weights / weights.sum()).tolist(), strict=True))


@pytest.mark.native
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=40),
        Sampling(top_p=0.9),
        Sampling(top_p=0.999),
        Sampling(min_p=0.02),
        Sampling(typical_p=0.8),
        Sampling(repeat_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.4),
        Sampling(temperature=0.7, top_k=100, typical_p=0.95, top_p=0.9, min_p=0.01, repeat_penalty=1.1),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "top_p tail", "min_p", "typical", "penalties", "all"],
)
def test_the_chain_leaves_the_same_candidates_as_llama_cpp(sampling):
    import llama_cpp as api

    window = [*np.random.default_rng(1).integers(0, VOCABULARY, 64).tolist(), 7, 7, 7]
    for seed in range(5):
        logits = logits_of(seed)
        penalties = api.llama_sampler_init_penalties(
            VOCABULARY, 64, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        )
        for token in window:
            api.llama_sampler_accept(penalties, token)
        theirs = llama_candidates(
            logits,
            [
                penalties,
                api.llama_sampler_init_top_k(sampling.top_k),
                api.llama_sampler_init_typical(sampling.typical_p, 1),
                api.llama_sampler_init_top_p(sampling.top_p, 1),
                api.llama_sampler_init_min_p(sampling.min_p, 1),
                api.llama_sampler_init_temp(sampling.temperature),
            ],
        )
        ours = our_candidates(sampling, logits, window)
        # Sums of 2,000 floats differ in their last bits: a candidate at the edge may fall on either side.
        assert len(set(ours) ^ set(theirs)) <= 1
        assert all(math.isclose(ours[token], theirs[token], rel_tol=2e-3) for token in set(ours) & set(theirs))


def test_greedy_takes_the_largest_and_looks_at_nothing_else():
    logits = logits_of(3)
    assert drawn(Sampling(temperature=0.0, top_k=5, seed=9), logits, count=3) == [int(logits.argmax())] * 3


def test_the_draw_of_a_token_depends_on_seed_and_number_only():
    sampling, logits = Sampling(seed=11), logits_of(4)
    whole = drawn(sampling, logits, count=12)
    assert drawn(sampling, logits, count=5, generated=7) == whole[7:]
    assert drawn(Sampling(seed=12), logits, count=12) != whole
    assert len(set(whole)) > 1


def test_a_chain_rebuilt_from_its_ids_goes_on_with_the_same_choices():
    sampling = Sampling(seed=5, temperature=1.2, top_k=50, repeat_penalty=1.5, penalty_window=8)
    prompt, steps = list(range(20)), [logits_of(i) for i in range(20)]
    sampler = LaneSampler(sampling, VOCABULARY, prompt)
    whole = [sampler.draw(0, i, step).token for i, step in enumerate(steps)]
    rebuilt = LaneSampler(sampling, VOCABULARY, (prompt + whole[:9])[-8:], 9)
    assert [rebuilt.draw(0, i, step).token for i, step in enumerate(steps[9:])] == whole[9:]


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = LaneSampler(Sampling(seed=1), 4)
    counts = np.bincount([sampler.draw(0, i, logits).token for i in range(4000)], minlength=4) / 4000
    assert np.abs(counts - np.exp(logits)).max() < 0.03


def test_uniform_numbers_are_golden_and_in_range():
    # Wire-visible: two nodes of different versions must draw alike.
    assert [round(uniform(1, i), 6) for i in range(3)] == [0.648751, 0.207987, 0.643403]
    assert all(0 <= uniform(2**64 - 1, i) < 1 for i in range(1000))


def test_a_bias_forbids_and_forces_tokens():
    logits = logits_of(6)
    best = int(logits.argmax())
    assert drawn(Sampling(temperature=0.0, logit_bias=((best, -100.0),)), logits) == [int(np.argsort(logits)[-2])]
    assert drawn(Sampling(logit_bias=((17, 1000.0),)), logits) == [17]
    with pytest.raises(StageError) as caught:
        LaneSampler(Sampling(logit_bias=((VOCABULARY, 1.0),)), VOCABULARY)
    assert caught.value.reason == "bad_sampling"


def test_penalties_see_only_the_window_and_never_change_the_logits_given():
    logits = logits_of(7)
    kept, best = logits.copy(), int(logits.argmax())
    sampling = Sampling(temperature=0.0, presence_penalty=100.0, penalty_window=2)
    assert drawn(sampling, logits, window=[best, 1, 2]) == [best]
    first, second, third, fourth = drawn(sampling, logits, window=[1, best], count=4)
    assert len({best, first, second}) == 3
    assert (third, fourth) == (best, first)
    assert (logits == kept).all()


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = logits_of(8)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    sample = LaneSampler(Sampling(temperature=0.0, top_logprobs=5, presence_penalty=50.0), VOCABULARY).draw(
        2, 9, logits
    )
    assert (sample.lane, sample.position) == (2, 9)
    assert math.isclose(sample.logprob, expected[sample.token], abs_tol=1e-4)
    assert [token for token, _ in sample.alternatives] == np.argsort(-logits)[:5].tolist()
    assert all(math.isclose(p, expected[t], abs_tol=1e-4) for t, p in sample.alternatives)
    assert LaneSampler(Sampling(temperature=0.0), VOCABULARY).draw(0, 0, logits).logprob is None


@pytest.mark.parametrize("top", [0, 1, 2, 20])
def test_a_score_is_of_the_raw_logits_and_equals_that_of_the_likeliest_exactly_where_it_is_that(top):
    logits = logits_of(9)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    sampler = LaneSampler(Sampling(temperature=0.0, top_logprobs=top, presence_penalty=50.0), VOCABULARY, [3, 4])
    best = int(logits.argmax())
    for target in (best, 3, 4, VOCABULARY - 1):
        sample = sampler.score(1, 6, logits, target)
        assert (sample.lane, sample.position, sample.token) == (1, 6, target)
        assert math.isclose(sample.logprob, expected[target], abs_tol=1e-4)
        assert [token for token, _ in sample.alternatives] == np.argsort(-logits)[:top].tolist()
        if top:
            assert (sample.logprob == max(likely for _, likely in sample.alternatives)) is (target == best)


def test_scoring_draws_nothing_and_remembers_nothing():
    logits = logits_of(10)
    sampling = Sampling(temperature=1.0, seed=4, presence_penalty=50.0)
    plain, scoring = LaneSampler(sampling, VOCABULARY), LaneSampler(sampling, VOCABULARY)
    for position in range(6):
        scoring.score(0, position, logits, 7)
        assert scoring.draw(0, position, logits) == plain.draw(0, position, logits)


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises(StageError) as refused:
        LaneSampler(Sampling(), VOCABULARY).score(0, 0, logits_of(1), VOCABULARY)
    assert refused.value.reason == "bad_rows"


def test_a_certain_token_has_log_probability_zero_not_above():
    logits = np.full(8, -1e4, np.float32)
    logits[3] = 1e4
    assert log_probabilities(logits, 3, 3)[0] == 0.0


def test_a_nucleus_wider_than_the_part_that_is_sorted_first_is_complete():
    logits = np.zeros(20_000, np.float32)
    assert len(_nucleus(logits, 0.9)) in range(17_999, 18_002)
    assert len(_nucleus(logits[:3], 1.0 - 1e-9)) == 3
