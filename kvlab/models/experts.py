"""A mixture of experts in an MLP's place: each token goes through the few of many that a router chooses for it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from kvlab.mixers.layers import Linear
from kvlab.models.grouped import Rows, Sizes, grouped_product
from kvlab.schema import ConfigError, Schema, flag, integer, real
from kvlab.typing import Hidden


@dataclass(frozen=True)
class ExpertsConfig(Schema):
    """Hyper-parameters of the experts of one layer: how many there are, how many a token goes through, and the width of
    each.

    An expert is a gated MLP with silu. With a `limit` it is that of gpt-oss (arXiv 2508.10925): gate and up are kept
    from exceeding it (up on both sides), and y = W_down (gate * sigmoid(`gain` * gate) * (up + 1)). With `bias` router
    and experts have biases in each product.
    """

    num_experts: int = integer(8, 1, 65536)
    experts_per_token: int = integer(2, 1, 65536)
    expert_dim: int = integer(64, 1, 262144)
    limit: float | None = real(None, 0.0, 1e6, open_low=True, optional=True)
    gain: float = real(1.702, 0.0, 1e3, open_low=True)
    bias: bool = flag(False)

    def cross_check(self) -> None:
        if self.experts_per_token > self.num_experts:
            legal = f"must be at most num_experts = {self.num_experts}"
            raise ConfigError("experts_per_token", self.experts_per_token, legal)


class ExpertLinear(nnx.Module):
    """The linear layers of all experts: kernel [X, inputs, outputs], bias [X, outputs]."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, *, bias: bool, dtype: str, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.kernel = nnx.Param(init(rngs.params(), (num_experts, inputs, outputs), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros((num_experts, outputs), jnp.float32))
        self.has_bias, self.dtype = bias, jnp.dtype(dtype)

    def __call__(self, rows: Rows, experts: Int32[Array, "N"], sizes: Sizes) -> Float[Array, "N O"]:
        """Rows [N, inputs] that are sorted by their `experts` [N], of which each has `sizes` [X] rows."""
        outputs = grouped_product(rows.astype(self.dtype), self.kernel[...].astype(self.dtype), sizes)
        return outputs + self.bias[...].astype(self.dtype)[experts] if self.has_bias else outputs


class Experts(nnx.Module):
    """y = sum of p_e W_down,e (act(W_gate,e x) * W_up,e x) over the `experts_per_token` experts e whose router logits
    W_router x are highest; p is the softmax of these logits (arXiv 1701.06538). Of equal logits the lower number wins.

    The router computes in float32: a choice is no number that may be a little off. Gates and ups are the even and the
    odd outputs of `gate_up`, as gpt-oss stores them. Tokens are sorted by expert, so that beside its parameters the
    layer holds numbers for the chosen experts alone; a token's answer depends on no other token. Nothing balances the
    load in training.
    """

    def __init__(self, config: ExpertsConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> ExpertLinear:
            return ExpertLinear(config.num_experts, inputs, outputs, bias=config.bias, dtype=dtype, rngs=rngs)

        self.router = Linear(
            model_dim,
            config.num_experts,
            use_bias=config.bias,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )
        self.gate_up = linear(model_dim, 2 * config.expert_dim)
        self.down = linear(config.expert_dim, model_dim)
        self.config = config

    def __call__(self, x: Hidden) -> Hidden:
        tokens = x.reshape(-1, x.shape[-1])
        num_chosen = self.config.experts_per_token
        chosen, shares = self.choose(tokens)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        experts = chosen.reshape(-1)[order]
        sizes = jnp.bincount(experts, length=self.config.num_experts).astype(jnp.int32)
        hidden = self._activated(self.gate_up(tokens[order // num_chosen], experts, sizes))
        outputs = self.down(hidden, experts, sizes)
        outputs = jnp.zeros_like(outputs).at[order].set(outputs).reshape(*chosen.shape, -1)
        mixed = jnp.sum(outputs.astype(jnp.float32) * shares[:, :, None], axis=1)
        return mixed.astype(x.dtype).reshape(x.shape)

    def choose(self, tokens: Rows) -> tuple[Int32[Array, "N k"], Float[Array, "N k"]]:
        """The experts of each token, the likeliest first, and their shares, which sum to 1."""
        logits, chosen = jax.lax.top_k(self.router(tokens), self.config.experts_per_token)
        return chosen, jax.nn.softmax(logits, axis=-1)

    def _activated(self, gate_up: Float[Array, "N O"]) -> Rows:
        """[N, 2 * expert_dim] as [N, expert_dim]."""
        both = gate_up.reshape(len(gate_up), -1, 2)
        gate, up = both[:, :, 0], both[:, :, 1]
        if (limit := self.config.limit) is None:
            return jax.nn.silu(gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(gate * self.config.gain) * (up + 1)
