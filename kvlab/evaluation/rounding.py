"""Perplexity of a model whose keys and values are rounded in the parallel form, in any scheme of the kernels: what a
format would cost before a memory has it (after KIVI's Table 1, arXiv 2402.02750). No memory takes part in it."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.evaluation.layerwise import Blockwise, layers_of, nats
from kvlab.ledger.states import State, TokenState
from kvlab.memory.views.dense import weights_beside_sinks
from kvlab.schema import ConfigError
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.formats import Scheme, quantised
from pallas_kernels.masking import soft_capped


@dataclass(frozen=True)
class Rounding:
    """How keys and values are rounded; None: they are not. By channel, `page_size` tokens that follow one another share
    a scale. A query reads its own token and the `residual` - 1 before it as they are. With `rotates` keys and values
    are turned by a Hadamard matrix with random signs first (QuaRot, arXiv 2404.00456), and values back."""

    keys: Scheme | None
    values: Scheme | None
    page_size: int = 32
    residual: int = 0
    rotates: bool = False


@dataclass(frozen=True)
class Rounded:
    """What a rounding costs: nats of each scored token, and the relative errors of keys and of values by layer."""

    nats: npt.NDArray[np.float64]
    """[B, M]"""
    key_errors: npt.NDArray[np.float64]
    """[L]"""
    value_errors: npt.NDArray[np.float64]
    """[L]"""

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return float(np.exp(self.nats.mean()))


def rounded(model: Blockwise, tokens: npt.NDArray[np.int32], num_scored: int, rounding: Rounding) -> Rounded:
    """Scores the last `num_scored` tokens of sequences [B, T], each predicted from those before it. Every layer that
    holds keys and values rounds them. Raises ConfigError for `num_scored` outside [1, T - 1]."""
    if not 1 <= num_scored < tokens.shape[1]:
        raise ConfigError("num_scored", num_scored, f"must be in [1, {tokens.shape[1] - 1}]")

    def wrap(layer: int, state: State, whole: Any) -> Any:
        return _RoundedTokens(whole, rounding) if isinstance(state, TokenState) else whole

    hidden, after = layers_of(model, tokens[:, :-1], wrap)
    views = [view for layer in after for view in layer.values() if isinstance(view, _RoundedTokens)]
    errors = np.array([[float(error) for error in view.errors] for view in views]).reshape(-1, 2)
    return Rounded(nats(model, hidden, tokens[:, -num_scored:]), errors[:, 0], errors[:, 1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _RoundedTokens:
    """A complete sequence of which queries read older tokens rounded."""

    whole: Any
    rounding: Rounding = field(metadata={"static": True})
    errors: Any = None

    def append(self, **tokens: Array) -> Self:
        return replace(self, whole=self.whole.append(**tokens))

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        keys, values = (self.whole.pool[name].astype(jnp.float32).swapaxes(1, 2) for name in ("keys", "values"))
        turn = turning(keys.shape[3]) if self.rounding.rotates else None
        near_keys = far_keys = as_rounded(keys, self.rounding.keys, self.rounding.page_size, turn)
        near_values = far_values = as_rounded(values, self.rounding.values, self.rounding.page_size, turn)
        if self.rounding.residual:
            near_keys, near_values = keys, values
        num_kv_heads, num_tokens, dim = keys.shape[1:]
        grouped = queries.astype(jnp.float32).reshape(*queries.shape[:2], num_kv_heads, -1, dim)
        grouped = grouped * self.whole.state.scale(dim)
        places = jnp.arange(num_tokens, dtype=jnp.int32)
        age = places[:, None] - places[None, :]
        is_near = age < self.rounding.residual
        near, far = (jnp.einsum("btkgd,bksd->bkgts", grouped, each) for each in (near_keys, far_keys))
        scores = jnp.where(is_near, near, far)
        scores = soft_capped(scores, self.whole.state.soft_cap)
        seen = self.whole.state.visible.sees(places[:, None], places[None, :])
        weights = weights_beside_sinks(scores, seen, sink_logits)
        outputs = jnp.einsum("bkgts,bksd->btkgd", jnp.where(is_near, 0, weights), far_values)
        outputs = outputs + jnp.einsum("bkgts,bksd->btkgd", jnp.where(is_near, weights, 0), near_values)
        errors = tuple(
            jnp.linalg.norm(far - exact) / jnp.linalg.norm(exact)
            for far, exact in ((far_keys, keys), (far_values, values))
        )
        outputs = outputs.reshape(*outputs.shape[:2], -1, values.shape[-1]).astype(queries.dtype)
        return outputs, replace(self, errors=errors)


def as_rounded(tokens: Array, scheme: Scheme | None, page_size: int, turn: Array | None = None) -> Array:
    """Tokens [B, K, T, D] as a scheme gives them back, pages of `page_size` tokens at a time; the last may be partly
    filled. With `turn` [D, D] they are turned before, and back behind it."""
    if scheme is None:
        return tokens
    num_tokens, dim = tokens.shape[2:]
    turned = tokens if turn is None else tokens @ turn
    padded = jnp.pad(turned, ((0, 0), (0, 0), (0, -num_tokens % page_size), (0, 0)))
    tiles = padded.reshape(*padded.shape[:2], -1, page_size, dim)
    is_token = jnp.arange(padded.shape[2]).reshape(-1, page_size) < num_tokens
    given = quantised(tiles, scheme, valid=jnp.broadcast_to(is_token, tiles.shape[:-1])).values()
    given = given.reshape(padded.shape)[:, :, :num_tokens]
    return given if turn is None else given @ turn.T


def turning(dim: int, seed: int = 0) -> Array:
    """An orthogonal matrix [dim, dim]: random signs, then Hadamard. Raises ConfigError unless `dim` is a power of
    two."""
    if dim < 1 or dim & (dim - 1):
        raise ConfigError("head_dim", dim, "must be a power of two for a Hadamard rotation")
    hadamard = np.ones((1, 1))
    while len(hadamard) < dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], dim)
    return jnp.asarray(signs[:, None] * hadamard / np.sqrt(dim), jnp.float32)
