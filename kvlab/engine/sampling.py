"""From logits to tokens: what a request may ask for, and the sampler, whose noise depends on seed and position alone.

The noise of a token is Gumbel noise keyed by (seed, sample, position), and the token is the argmax of logits plus
noise. So a request's answer does not depend on who shares its batch, on chunks, on preemption, nor on speculation: a
draft is accepted where it equals the token that would have been drawn anyway (a coupling after arXiv 2408.07978)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from kvlab.schema import ConfigError, Schema, integer, integers, real, texts
from kvlab.units import power_of_two

COLD = 1e-5
"""A temperature below this is greedy."""


@dataclass(frozen=True)
class Sampling(Schema):
    """How a request is answered. `temperature` 0 is greedy; filters apply in the order repetition penalty, temperature,
    top_k, top_p (arXiv 1904.09751), min_p (arXiv 2407.01082).

    `max_tokens` bounds the answer; it ends earlier after a token of `stop_tokens` (kept in the answer) or where its
    text contains one of `stop` (cut off before it). `num_samples` answers are drawn from one prompt, sharing its
    memory; with `beam_width` the answer is the best of a beam search instead, its score divided by length **
    `length_penalty`. `num_logprobs` most likely alternatives are reported for each token. `seed` null: the engine
    chooses one."""

    max_tokens: int = integer(64, 1, 1 << 30)
    temperature: float = real(0.0, 0.0, 100.0)
    top_k: int = integer(0, 0)
    top_p: float = real(1.0, 0.0, 1.0, open_low=True)
    min_p: float = real(0.0, 0.0, 1.0)
    repetition_penalty: float = real(1.0, 0.0, 100.0, open_low=True)
    num_samples: int = integer(1, 1, 4096)
    beam_width: int | None = integer(None, 2, 64, optional=True)
    length_penalty: float = real(1.0, -10.0, 10.0)
    num_logprobs: int = integer(0, 0, 64)
    stop_tokens: tuple[int, ...] = integers((), 0)
    stop: tuple[str, ...] = texts(())
    seed: int | None = integer(None, 0, optional=True)

    def cross_check(self) -> None:
        sampled = self.num_samples > 1 or self.temperature > 0 or self.repetition_penalty != 1
        if self.beam_width and (sampled or self.stop or self.num_logprobs):
            legal = "must be null beside temperature, repetition_penalty, num_samples, stop and num_logprobs"
            raise ConfigError("beam_width", self.beam_width, legal)

    @property
    def reports_more(self) -> bool:
        """Whether more than each token and its log-probability is wanted."""
        return self.num_logprobs > 0 or self.beam_width is not None

    @property
    def num_candidates(self) -> int:
        """Continuations of a beam to look at: enough for `beam_width` to go on, whatever stops."""
        return (self.beam_width or 0) * max(2, 1 + len(self.stop_tokens))

    @property
    def filters(self) -> bool:
        """Whether any filter needs the sorted distribution."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Choices(NamedTuple):
    """Each row's sampling, as arrays [B]."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    penalty: Any
    seeds: Any
    """[B, 2]: the request's seed, and which of its samples."""

    @classmethod
    def of(cls, rows: Sequence[tuple[Sampling, int, int]], batch_size: int) -> "Choices":
        """From (sampling, seed, sample) of every row; padding is greedy."""
        real_rows = np.zeros((4, batch_size), np.float32)
        real_rows[1:] = 1
        whole_rows = np.zeros((3, batch_size), np.int32)
        for row, (sampling, seed, sample) in enumerate(rows):
            # Divided by less than COLD, scores would overflow.
            warm = sampling.temperature if sampling.temperature >= COLD else 0.0
            real_rows[:, row] = warm, sampling.top_p, sampling.min_p, sampling.repetition_penalty
            whole_rows[:, row] = sampling.top_k, seed, sample
        return cls(real_rows[0], whole_rows[0], real_rows[1], real_rows[2], real_rows[3], whole_rows[1:].T)


class Mode(NamedTuple):
    """What a step compiles for: whether any row is random, filtered or penalised, and how many alternatives are
    reported."""

    random: bool = False
    filters: bool = False
    penalty: bool = False
    num_logprobs: int = 0

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Mode":
        """The least that serves all of these."""
        most = max((max(sampling.num_logprobs, sampling.num_candidates) for sampling in samplings), default=0)
        return cls(
            any(sampling.temperature > 0 for sampling in samplings),
            any(sampling.filters for sampling in samplings),
            any(sampling.repetition_penalty != 1 for sampling in samplings),
            power_of_two(most) if most else 0,
        )


class Drawn(NamedTuple):
    """What was drawn at positions [B, M]: tokens, their log-probabilities under the model itself (before temperature
    and filters), and the most likely alternatives [B, M, N]."""

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any


def draw(
    logits: Float[Array, "B M V"],
    positions: Int32[Array, "B M"],
    choices: Choices,
    seen: Bool[Array, "B V"] | None,
    mode: Mode,
) -> Drawn:
    """Tokens for the given positions of each row. `seen` marks the tokens that a repetition penalty divides."""
    scores = logits
    if mode.penalty:
        assert seen is not None
        penalty = choices.penalty[:, None, None]
        punished = jnp.where(scores > 0, scores / penalty, scores * penalty)
        scores = jnp.where(seen[:, None, :], punished, scores)
    if mode.random:
        scores = _randomised(scores, positions, choices, mode)
    # The first of the highest, by two plain reductions: XLA's argmax on CPU is ten times slower.
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    highest = jnp.where(scores == scores.max(axis=-1, keepdims=True), places, scores.shape[-1] - 1)
    tokens = highest.min(axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, :, None], axis=-1)[:, :, 0] - total
    top, top_tokens = jax.lax.top_k(logits, min(mode.num_logprobs, logits.shape[-1]))
    return Drawn(tokens, chosen, top_tokens.astype(jnp.int32), top - total[:, :, None])


def _randomised(scores: Array, positions: Array, choices: Choices, mode: Mode) -> Array:
    """Filtered scores over temperature, plus Gumbel noise; greedy rows as they are."""
    temperature = choices.temperature[:, None, None]
    warm = scores / jnp.where(temperature > 0, temperature, 1)
    if mode.filters:
        warm = jnp.where(warm < filter_threshold(warm, choices)[:, :, None], -jnp.inf, warm)

    def noise(seed: Array, row: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
        return jax.vmap(lambda position: jax.random.gumbel(jax.random.fold_in(key, position), scores.shape[2:]))(row)

    return jnp.where(temperature > 0, warm + jax.vmap(noise)(jnp.asarray(choices.seeds), positions), scores)


def filter_threshold(scores: Float[Array, "B M V"], choices: Choices) -> Float[Array, "B M"]:
    """The least score that top_k, then top_p, then min_p leave; ties with it stay."""
    ranked = -jnp.sort(-scores, axis=-1)
    last = scores.shape[-1] - 1
    top_k = jnp.asarray(choices.top_k)[:, None, None]
    kth = jnp.take_along_axis(ranked, jnp.where(top_k > 0, jnp.minimum(top_k - 1, last), last), axis=-1)
    ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
    weights = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights
    nucleus = (before < choices.top_p[:, None, None]).sum(axis=-1, keepdims=True, dtype=jnp.int32)
    pth = jnp.take_along_axis(ranked, jnp.maximum(nucleus - 1, 0), axis=-1)
    pth = jnp.where(jnp.asarray(choices.top_p)[:, None, None] < 1, pth, -jnp.inf)  # rounded sums reach 1 before the end
    floor = ranked[:, :, :1] + jnp.log(choices.min_p)[:, None, None]
    return jnp.maximum(jnp.maximum(kth, pth), floor)[:, :, 0]


draw_tokens = partial(jax.jit, static_argnames="mode")(draw)
"""`draw` as a program of its own: what a request asks for does not compile the model anew."""
