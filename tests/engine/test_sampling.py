"""The sampler: its distribution, its filters against a plain float64 rendering of their definitions, its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kvlab.engine.sampling import Choices, Mode, Sampling, draw_tokens, filter_threshold
from kvlab.schema import ConfigError

VOCAB = 12


def draws(logits: np.ndarray, sampling: Sampling, num_seeds: int, position: int = 5) -> np.ndarray:
    """One token for each of many seeds, from the same logits [V]."""
    choices = Choices.of([(sampling, seed, 0) for seed in range(num_seeds)], num_seeds)
    wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (num_seeds, 1, len(logits)))
    positions = jnp.full((num_seeds, 1), position, jnp.int32)
    drawn = draw_tokens(wide, positions, choices, None, mode=Mode.of([sampling]))
    return np.asarray(drawn.tokens)[:, 0]


def filtered(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that a sampling asks for, one token at a time in float64."""
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    kept = set(order[: sampling.top_k] if sampling.top_k else order)

    def softmax(names):
        weights = {i: np.exp(scores[i] - scores.max()) for i in names}
        return {i: weight / sum(weights.values()) for i, weight in weights.items()}

    if sampling.top_p < 1:
        probabilities, total, nucleus = softmax(kept), 0.0, set()
        for i in order:
            if i in kept and total < sampling.top_p:
                nucleus.add(i)
                total += probabilities[i]
        kept = nucleus
    if sampling.min_p:
        probabilities = softmax(kept)
        kept = {i for i in kept if probabilities[i] >= sampling.min_p * max(probabilities.values())}
    final = softmax(kept)
    return np.array([final.get(i, 0.0) for i in range(len(logits))])


SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7, top_k=4),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.3, top_k=8, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_distribution_is_the_one_asked_for(sampling):
    """Chi-square over 20,000 seeds; tokens that a filter removed never come."""
    logits = np.random.default_rng(0).normal(0, 1.5, VOCAB)
    expected = filtered(logits, sampling)
    counts = np.bincount(draws(logits, sampling, 20_000), minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], expected[kept] * counts.sum()).pvalue > 1e-3


def test_filters_leave_what_their_definitions_say():
    rng = np.random.default_rng(1)
    for _ in range(60):
        sampling = Sampling(
            temperature=float(rng.uniform(0.3, 2)),
            top_k=int(rng.integers(0, VOCAB + 3)),
            top_p=float(rng.uniform(0.05, 1)),
            min_p=float(rng.choice([0.0, rng.uniform(0, 1)])),
        )
        logits = rng.normal(0, 2, VOCAB)
        choices = Choices.of([(sampling, 0, 0)], 1)
        scores = jnp.asarray(logits[None, None] / sampling.temperature, jnp.float32)
        threshold = float(filter_threshold(scores, choices)[0, 0])
        kept = np.asarray(scores)[0, 0] >= threshold
        np.testing.assert_array_equal(kept, filtered(logits, sampling) > 0, err_msg=str(sampling))


def test_noise_depends_on_seed_sample_and_position_and_on_nothing_else():
    logits = np.zeros((3, 2, VOCAB), np.float32)
    sampling, mode = Sampling(temperature=1.0), Mode(random=True)
    positions = jnp.asarray([[4, 5], [5, 6], [4, 5]], jnp.int32)
    tokens = np.asarray(
        draw_tokens(
            logits, positions, Choices.of([(sampling, 9, 0)] * 2 + [(sampling, 9, 1)], 3), None, mode=mode
        ).tokens
    )
    assert tokens[0, 1] == tokens[1, 0]  # the same position in another row and place
    alone = draw_tokens(logits[:1], positions[:1], Choices.of([(sampling, 9, 0)], 1), None, mode=mode)
    np.testing.assert_array_equal(alone.tokens[0], tokens[0])
    many = [draws(np.zeros(VOCAB), sampling, 200, position) for position in (1, 2)]
    assert 2 < (many[0] == many[1]).sum() < 40  # one in twelve by chance


def test_penalty_greedy_rows_and_log_probabilities():
    logits = np.array([[[2.0, 1.9, -1.0, -1.1]]] * 3, np.float32)
    seen = np.array([[True, False, False, False]] * 3)
    samplings = [Sampling(repetition_penalty=1.5), Sampling(), Sampling(num_logprobs=2)]
    choices = Choices.of([(sampling, 0, 0) for sampling in samplings], 3)
    drawn = draw_tokens(logits, jnp.zeros((3, 1), jnp.int32), choices, jnp.asarray(seen), mode=Mode.of(samplings))
    assert np.asarray(drawn.tokens)[:, 0].tolist() == [1, 0, 0]
    exact = logits[0, 0].astype(np.float64) - np.log(np.exp(logits[0, 0].astype(np.float64)).sum())
    np.testing.assert_allclose(np.asarray(drawn.logprobs)[:, 0], exact[[1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.asarray(drawn.top_logprobs)[2, 0], exact[:2], atol=1e-6)


def test_a_temperature_near_nothing_is_greedy():
    for temperature in (1e-30, 1e-38, 1e-6):
        assert (draws(np.array([1.0, 5.0, 9.0, 2.0]), Sampling(temperature=temperature), 50) == 2).all()


def test_shared_noise_accepts_a_draft_models_tokens_as_often_as_the_theory_says():
    """Two models, distributions p and q at total variation d: equal tokens with probability at least (1 - d) / (1 + d)
    (arXiv 2408.07978), at most 1 - d, which is the rejection rule's (arXiv 2211.17192)."""
    rng = np.random.default_rng(3)
    for spread in (0.2, 0.7, 1.5):
        logits = rng.normal(0, 1, VOCAB)
        other = logits + rng.normal(0, spread, VOCAB)
        p, q = (np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in (logits, other))
        distance = 0.5 * np.abs(p - q).sum()
        sampling = Sampling(temperature=1.0)
        rate = (draws(logits, sampling, 20_000) == draws(other, sampling, 20_000)).mean()
        assert (1 - distance) / (1 + distance) - 0.01 <= rate <= 1 - distance + 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, r"temperature = -1: must be a finite number in \[0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"min_p": 1.5}, "min_p = 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"num_samples": 0}, "num_samples = 0"),
        ({"beam_width": 1}, "beam_width = 1"),
        ({"beam_width": 2, "temperature": 1.0}, "beam_width = 2: must be null beside temperature"),
        ({"beam_width": 2, "stop": ["x"]}, "beam_width = 2: must be null beside"),
        ({"num_logprobs": 1000}, "num_logprobs = 1000"),
        ({"stop_tokens": [-1]}, "stop_tokens"),
        ({"stop": [""]}, "stop"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**31}, "seed = 2147483648"),
    ],
)
def test_wrong_sampling_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling.build(fields)


def test_a_row_without_filters_draws_from_the_whole_vocabulary_beside_one_that_has_them():
    """Sums of 50,000 rounded weights reach 1 long before the last token."""
    scores = jnp.linspace(0.0, -30.0, 50_000, dtype=jnp.float32)[None, None, :].repeat(2, axis=0)
    samplings = [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=5)]
    choices = Choices.of([(sampling, 0, 0) for sampling in samplings], 2)
    kept = (scores >= filter_threshold(scores, choices)[:, :, None]).sum(axis=-1)
    assert kept[:, 0].tolist() == [50_000, 5]
