"""AdamW (arXiv 1711.05101) and Muon (arXiv 2502.16982), both with warm-up, cosine decay, global-norm clipping and
decoupled weight decay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from kvlab.schema import Schema, added, choice, real
from kvlab.typing import Params, PyTree

MUON_RMS = 0.2
"""Root mean square of Muon's update at a rate of 1: about that of AdamW's, so that one learning rate serves both (arXiv
2502.16982)."""


@dataclass(frozen=True)
class OptimizerConfig(Schema):
    """`warmup_fraction` of the steps is linear warm-up; the cosine ends at `final_fraction` of the peak. A `clip_norm`
    of null clips nothing.

    With `name` "muon" the matrices of the blocks are updated by their momentum, `muon_momentum`, made orthogonal;
    embedding, head, vectors and convolution kernels stay with AdamW, which `beta1`, `beta2` and `eps` are of.
    """

    learning_rate: float = real(3e-3, 0.0, 10.0, open_low=True)
    weight_decay: float = real(0.1, 0.0, 10.0)
    beta1: float = real(0.9, 0.0, 0.9999)
    beta2: float = real(0.999, 0.0, 0.99999)
    eps: float = real(1e-8, 0.0, 1.0, open_low=True)
    clip_norm: float | None = real(1.0, 0.0, 1e6, open_low=True, optional=True)
    warmup_fraction: float = real(0.05, 0.0, 0.9)
    final_fraction: float = real(0.0, 0.0, 1.0)
    name: str = added(choice("adamw", ("adamw", "muon")))
    muon_momentum: float = added(real(0.95, 0.0, 0.9999))


def decays(params: Params) -> PyTree:
    """True where weight decay applies: matrices do, vectors (norms, biases, rates) and convolution kernels do not."""

    def is_decayed(path: Sequence[Any], leaf: jax.Array) -> bool:
        names = [str(part.key) for part in path]
        return leaf.ndim >= 2 and names[-1] != "bias" and not any("conv" in name for name in names)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def orthogonalised(params: Params) -> PyTree:
    """True where Muon updates: matrices inside blocks, those of each expert too, except convolution kernels."""

    def is_matrix(path: Sequence[Any], leaf: jax.Array) -> bool:
        names = [str(part.key) for part in path]
        is_kernel = names[-1] != "bias" and not any("conv" in name for name in names)
        return names[0] == "blocks" and is_kernel and (leaf.ndim == 2 or (leaf.ndim == 3 and "mlp" in names))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum of matrices [inputs, outputs], made nearly orthogonal by five Newton-Schulz steps, with the
    same root mean square whatever their shape: `MUON_RMS`."""

    def axes(stacks: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(1, 2), stacks)

    def scaled(stacks: Any, _: Any) -> Any:
        return jax.tree.map(lambda stack: stack * (MUON_RMS * max(stack.shape[1:]) ** 0.5), stacks)

    return _by_shape(optax.chain(scale_by_muon(beta=momentum, weight_dimension_numbers=axes), optax.stateless(scaled)))


def _by_shape(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on stacks [count, inputs, outputs] of the matrices that are alike, those of experts among them: one loop
    a shape is compiled, not one a matrix."""

    def name(leaf: jax.Array) -> str:
        return "x".join(str(size) for size in leaf.shape[-2:])

    def stacks(tree: Any) -> dict[str, jax.Array]:
        groups: dict[str, list[jax.Array]] = {}
        for leaf in jax.tree.leaves(tree):
            groups.setdefault(name(leaf), []).append(leaf.reshape(-1, *leaf.shape[-2:]))
        return {shape: jnp.concatenate(group) for shape, group in groups.items()}

    def init(params: Any) -> Any:
        return inner.init(stacks(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changed: Any
        changed, state = inner.update(stacks(updates), state)
        places = dict.fromkeys(changed, 0)

        def back(leaf: jax.Array) -> jax.Array:
            shape, count = name(leaf), 1 if leaf.ndim == 2 else len(leaf)
            places[shape] += count
            return changed[shape][places[shape] - count : places[shape]].reshape(leaf.shape)

        return jax.tree.map(back, updates), state

    return optax.GradientTransformation(init, update)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates at a rate of 1, weight decay aside."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.name == "adamw":
        return adam

    def owners(params: Any) -> Any:
        return jax.tree.map(lambda is_muon: "muon" if is_muon else "adam", orthogonalised(params))

    return optax.partition({"muon": _muon(config.muon_momentum), "adam": adam}, owners)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer with a peak learning rate of 1: the step multiplies by the real one, which stays a traced argument,
    so that tuning it compiles nothing anew."""
    warmup = round(num_steps * config.warmup_fraction)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else 1.0, 1.0, warmup, max(num_steps, warmup + 1), config.final_fraction
    )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    chain = optax.chain(
        clip,
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax mixes Python floats and integer counters; our own code does not
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)
