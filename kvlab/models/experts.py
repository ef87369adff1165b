"""A mixture of experts in an MLP's place: each token goes through the few of many that a router chooses for it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from kvlab.mixers.layers import Linear
from kvlab.models.grouped import Rows, Sizes, grouped_product
from kvlab.models.mlp import GatedMLP
from kvlab.schema import ConfigError, Schema, choice, flag, integer, real
from kvlab.typing import Hidden


@dataclass(frozen=True)
class ExpertsConfig(Schema):
    """Hyper-parameters of the experts of one layer: how many there are, how many a token goes through, and the width of
    each.

    A token's logits become `scores`: their softmax over all experts, or the sigmoid of each. The experts of the highest
    scores are chosen, and weighed by these, `normalised` so that they sum to 1 or as they are, times `share_scale`.
    With a `choice_bias` a number an expert is added to the scores that are compared, not to those that weigh; no
    gradient reaches it (DeepSeek-V3 moves it to balance the load, arXiv 2412.19437; training here leaves it). Of
    several `num_groups` of experts only `groups_per_token` are chosen from, those with the highest sums of their best
    two.

    An expert is a gated MLP with silu. With a `limit` it is that of gpt-oss (arXiv 2508.10925): gate and up are kept
    from exceeding it (up on both sides), and y = W_down (gate * sigmoid(`gain` * gate) * (up + 1)). With `bias` router
    and experts have biases in each product. A shared expert of width `shared_dim` (0: none) sees every token; with a
    `shared_gate` its output is multiplied with the sigmoid of one more product of the token (Qwen3-Next).
    """

    num_experts: int = integer(8, 1, 65536)
    experts_per_token: int = integer(2, 1, 65536)
    expert_dim: int = integer(64, 1, 262144)
    limit: float | None = real(None, 0.0, 1e6, open_low=True, optional=True)
    gain: float = real(1.702, 0.0, 1e3, open_low=True)
    bias: bool = flag(False)
    scores: str = choice("softmax", ("softmax", "sigmoid"))
    normalised: bool = flag(True)
    share_scale: float = real(1.0, 0.0, 1e6, open_low=True)
    choice_bias: bool = flag(False)
    num_groups: int = integer(1, 1, 65536)
    groups_per_token: int = integer(1, 1, 65536)
    shared_dim: int = integer(0, 0, 262144)
    shared_gate: bool = flag(False)

    def cross_check(self) -> None:
        if self.num_groups > 1 and (self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups):
            legal = f"must divide num_experts = {self.num_experts} into groups of two or more"
            raise ConfigError("num_groups", self.num_groups, legal)
        if self.groups_per_token > self.num_groups:
            legal = f"must be at most num_groups = {self.num_groups}"
            raise ConfigError("groups_per_token", self.groups_per_token, legal)
        num_open = self.num_experts // self.num_groups * self.groups_per_token
        if self.experts_per_token > num_open:
            where = "" if self.groups_per_token == self.num_groups else f" in {self.groups_per_token} of its groups"
            legal = f"must be at most num_experts{where} = {num_open}"
            raise ConfigError("experts_per_token", self.experts_per_token, legal)
        if self.limit is None and self.gain != 1.702:
            raise ConfigError("gain", self.gain, "must be 1.702, its default, without a limit: silu has no gain")
        if self.shared_gate and not self.shared_dim:
            raise ConfigError("shared_gate", True, "must be false without a shared expert, shared_dim = 0")


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
    """y = sum of p_e W_down,e (act(W_gate,e x) * W_up,e x) over the `experts_per_token` experts e that score highest
    (arXiv 1701.06538), and of a shared expert where there is one. Of equal scores the lower number wins.

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
        if config.choice_bias:
            self.choice_bias = nnx.Param(jnp.zeros(config.num_experts, jnp.float32))
        if config.shared_dim:
            self.shared = GatedMLP(
                model_dim, config.shared_dim, activation="silu", bias=config.bias, dtype=dtype, rngs=rngs
            )
        if config.shared_gate:
            self.shared_gate = Linear(model_dim, 1, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)
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
        mixed = jnp.sum(outputs.astype(jnp.float32) * shares[:, :, None], axis=1).astype(x.dtype).reshape(x.shape)
        if not self.config.shared_dim:
            return mixed
        shared = self.shared(x)
        return mixed + (shared * jax.nn.sigmoid(self.shared_gate(x)) if self.config.shared_gate else shared)

    def choose(self, tokens: Rows) -> tuple[Int32[Array, "N k"], Float[Array, "N k"]]:
        """The experts of each token, the best first, and their shares. Logits are compared where that says the same:
        they lose no bits."""
        config, logits = self.config, self.router(tokens)
        scores = jax.nn.softmax(logits, axis=-1) if config.scores == "softmax" else jax.nn.sigmoid(logits)
        compared = scores if config.choice_bias or config.num_groups > 1 else logits
        if config.choice_bias:
            compared = compared + self.choice_bias[...][None, :]
        _, chosen = jax.lax.top_k(self._of_best_groups(compared), config.experts_per_token)
        shares = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.normalised:
            shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + 1e-20)
        return chosen, shares * config.share_scale

    def _of_best_groups(self, compared: Float[Array, "N X"]) -> Float[Array, "N X"]:
        """The scores, of groups that are not chosen from -inf."""
        config = self.config
        if config.num_groups == config.groups_per_token:
            return compared
        groups = compared.reshape(len(compared), config.num_groups, -1)
        _, best = jax.lax.top_k(jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1), config.groups_per_token)
        is_open = jnp.any(best[:, :, None] == jnp.arange(config.num_groups)[None, None, :], axis=1)
        return jnp.where(is_open[:, :, None], groups, -jnp.inf).reshape(compared.shape)

    def _activated(self, gate_up: Float[Array, "N O"]) -> Rows:
        """[N, 2 * expert_dim] as [N, expert_dim]."""
        both = gate_up.reshape(len(gate_up), -1, 2)
        gate, up = both[:, :, 0], both[:, :, 1]
        if (limit := self.config.limit) is None:
            return jax.nn.silu(gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(gate * self.config.gain) * (up + 1)
