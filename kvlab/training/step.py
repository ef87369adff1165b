"""One device call of training: several optimizer steps, batches generated on device, everything donated."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from kvlab.memory.views import LayerStates
from kvlab.models.transformer import Transformer, logits_at, merge, path_name
from kvlab.placement import Placement
from kvlab.programs import program
from kvlab.tasks import Batch, Task
from kvlab.typing import Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must hold. `learning_rate` is the peak; `step` counts finished optimizer steps."""

    params: Any
    opt_state: Any
    step: Any
    learning_rate: Any


def init_state(params: Params, optimizer: optax.GradientTransformation, learning_rate: float) -> TrainState:
    """A fresh state at step 0."""
    rate = jnp.asarray(learning_rate, jnp.float32)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), rate)


def weighted_nll(model: Transformer, batch: Batch, states: Sequence[LayerStates] | None = None) -> tuple[Array, Array]:
    """Negative log-likelihood in nats and correctness, both [B, M] and zero where the weight is; `states` as in
    `Transformer.parallel`."""
    logits = logits_at(model, model.parallel(batch.tokens, states), batch.label_positions)
    return score(logits, batch.labels, batch.weights)


def training_nll(model: Transformer, batch: Batch, progress: Array) -> tuple[Array, Array]:
    """The sum of what `weighted_nll` gives when `progress`, a share, of the training's steps is done; and the sum of
    what layers ask for beside it, means over tokens (the `loss` of a view)."""
    hidden, memory = model.in_parallel(batch.tokens, progress=progress)
    nll, _ = score(logits_at(model, hidden, batch.label_positions), batch.labels, batch.weights)
    asked = [getattr(view, "loss", None) for layer in memory for view in layer.values()]
    return nll.sum(), sum((loss for loss in asked if loss is not None), jnp.zeros(()))


def score(logits: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted negative log-likelihood (nats) and correctness of labels [B, M] under logits [B, M, V]."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(axis=-1).astype(jnp.int32) == labels).astype(jnp.float32)
    return nll * weights, correct * weights


class Losses(NamedTuple):
    """Of a batch: the mean over labels in nats, and what layers ask for beside it."""

    labels: Array
    beside: Array


def _gradients(
    structure: nnx.GraphDef[Transformer], params: Params, batch: Batch, progress: Array, accumulation: int
) -> tuple[Losses, Params]:
    """Mean losses and the gradients of their sum; the batch is cut into `accumulation` parts that are summed before
    dividing."""
    total_weight = batch.weights.sum()

    def total_loss(params: Params, part: Batch) -> tuple[Array, Losses]:
        nll, beside = training_nll(merge(structure, params), part, progress)
        beside = beside * (total_weight / accumulation)  # a mean over tokens, of which each part has as many
        return nll + beside, Losses(nll, beside)

    def of_part(part: Batch) -> tuple[Losses, Params]:
        (_, losses), grads = jax.value_and_grad(total_loss, has_aux=True)(params, part)
        return losses, grads

    if accumulation == 1:
        sums = of_part(batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, of_part(part)), None

        zeros = (Losses(jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
        sums, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda total: total / total_weight, sums)


@dataclass(frozen=True, eq=False)
class TrainStep:
    """The compiled training call of one (model, task, optimizer), one of `num_steps`; `__call__` runs `len(knobs)` of
    them. Programs go with it. Batches lie where `placement` says; on a mesh that divides "B", each device computes its
    rows."""

    structure: nnx.GraphDef[Transformer]
    task: Task
    optimizer: optax.GradientTransformation
    batch_size: int
    accumulation: int
    num_steps: int
    placement: Placement = field(default_factory=Placement)

    @program(static_argnums=4, donate_argnums=0)
    def __call__(
        self, state: TrainState, data: PyTree, key: Array, knobs: Array, seq_len: int
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after the call, and per-step metrics `loss` (nats over labels), `beside` (what layers ask for
        beside it) and `grad_norm`; `data` is the task's
        `train_data()`.

        A step whose loss or gradients are not finite changes nothing, nor do the steps after it: `ok` is then False and
        `state.step` is the step to blame.
        """
        return self._steps(state, data, key, knobs, seq_len, jnp.asarray(True))

    @program(static_argnums=4, donate_argnums=0)
    def together(
        self, states: TrainState, data: PyTree, keys: Array, knobs: Array, seq_len: int, moves: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """The same call of several trainings: states, keys, `moves` [M] and metrics have an axis of trainings in front.
        One that does not move stays as it is, and its metrics, `ok` among them, mean nothing."""

        def of_one(state: TrainState, key: Array, moves: Array) -> tuple[TrainState, dict[str, Array]]:
            return self._steps(state, data, key, knobs, seq_len, moves)

        return jax.vmap(of_one)(states, keys, moves)

    def _steps(
        self, state: TrainState, data: PyTree, key: Array, knobs: Array, seq_len: int, moves: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """See `__call__`; nothing changes unless it `moves`."""

        def one_step(carry: tuple[TrainState, Array], knob: Array):
            state, ok = carry
            losses, grads = self.gradients(state, data, key, knob, seq_len)
            grad_norm = optax.tree.norm(grads)
            ok = ok & jnp.isfinite(sum(losses)) & jnp.isfinite(grad_norm)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p + u * state.learning_rate, state.params, updates)
            after = replace(state, params=params, opt_state=opt_state, step=state.step + 1)
            state = jax.tree.map(partial(jnp.where, ok), after, state)
            return (state, ok), {"loss": losses.labels, "beside": losses.beside, "grad_norm": grad_norm}

        (state, ok), metrics = jax.lax.scan(one_step, (state, moves), knobs)
        return state, {**metrics, "ok": ok}

    def gradients(
        self, state: TrainState, data: PyTree, key: Array, knob: Array, seq_len: int
    ) -> tuple[Losses, Params]:
        """Losses and gradients of the batch that belongs to `state.step`."""
        batch = self.task.train_batch(data, jax.random.fold_in(key, state.step), self.batch_size, seq_len, knob)
        batch = jax.tree.map(lambda rows: self.placement.constrain(rows, "B"), batch)
        progress = state.step.astype(jnp.float32) / max(1, self.num_steps)
        return _gradients(self.structure, state.params, batch, progress, self.accumulation)

    def first_bad_leaf(self, state: TrainState, data: PyTree, key: Array, knob: Array, seq_len: int) -> str:
        """Names what was not finite at `state.step`: a parameter, else a gradient, else the loss."""
        losses, grads = jax.jit(self.gradients, static_argnums=4)(state, data, key, knob, seq_len)
        for kind, tree in (("parameter", state.params), ("gradient of", grads)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                if not bool(jnp.isfinite(leaf).all()):
                    return f"{kind} {path_name(path)}"
        return f"loss ({float(sum(losses))})"
