"""One device call of training: several optimizer steps, batches generated on device, everything donated."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from kvlab.memory.views import LayerStates
from kvlab.models.transformer import Transformer, logits_at, merge, path_name
from kvlab.placement import Placement
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


def score(logits: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted negative log-likelihood (nats) and correctness of labels [B, M] under logits [B, M, V]."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(axis=-1).astype(jnp.int32) == labels).astype(jnp.float32)
    return nll * weights, correct * weights


def _gradients(structure: nnx.GraphDef[Transformer], params: Params, batch: Batch, accumulation: int):
    """Mean loss and its gradients; the batch is cut into `accumulation` parts that are summed before dividing."""

    def total_loss(params: Params, part: Batch) -> Array:
        return weighted_nll(merge(structure, params), part)[0].sum()

    total_weight = batch.weights.sum()
    if accumulation == 1:
        loss, grads = jax.value_and_grad(total_loss)(params, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(total_loss)(params, part)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), _ = jax.lax.scan(add, zeros, parts)
    return loss / total_weight, jax.tree.map(lambda g: g / total_weight, grads)


@dataclass(frozen=True, eq=False)
class TrainStep:
    """The compiled training call of one (model, task, optimizer); `__call__` runs `len(knobs)` steps. Batches lie where
    `placement` says; on a mesh that divides "B", each device computes its rows."""

    structure: nnx.GraphDef[Transformer]
    task: Task
    optimizer: optax.GradientTransformation
    batch_size: int
    accumulation: int
    placement: Placement = field(default_factory=Placement)

    @partial(jax.jit, static_argnums=(0, 5), donate_argnums=1)
    def __call__(
        self, state: TrainState, data: PyTree, key: Array, knobs: Array, seq_len: int
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after the call, and per-step metrics `loss` (nats) and `grad_norm`; `data` is the task's
        `train_data()`.

        A step whose loss or gradients are not finite changes nothing, nor do the steps after it: `ok` is then False and
        `state.step` is the step to blame.
        """

        def one_step(carry: tuple[TrainState, Array], knob: Array):
            state, ok = carry
            loss, grads = self.gradients(state, data, key, knob, seq_len)
            grad_norm = optax.tree.norm(grads)
            ok = ok & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p + u * state.learning_rate, state.params, updates)
            after = replace(state, params=params, opt_state=opt_state, step=state.step + 1)
            state = jax.tree.map(partial(jnp.where, ok), after, state)
            return (state, ok), {"loss": loss, "grad_norm": grad_norm}

        (state, ok), metrics = jax.lax.scan(one_step, (state, jnp.asarray(True)), knobs)
        return state, {**metrics, "ok": ok}

    def gradients(self, state: TrainState, data: PyTree, key: Array, knob: Array, seq_len: int) -> tuple[Array, Params]:
        """Loss and gradients of the batch that belongs to `state.step`."""
        batch = self.task.train_batch(data, jax.random.fold_in(key, state.step), self.batch_size, seq_len, knob)
        batch = jax.tree.map(lambda rows: self.placement.constrain(rows, "B"), batch)
        return _gradients(self.structure, state.params, batch, self.accumulation)

    def first_bad_leaf(self, state: TrainState, data: PyTree, key: Array, knob: Array, seq_len: int) -> str:
        """Names what was not finite at `state.step`: a parameter, else a gradient, else the loss."""
        loss, grads = jax.jit(self.gradients, static_argnums=4)(state, data, key, knob, seq_len)
        for kind, tree in (("parameter", state.params), ("gradient of", grads)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                if not bool(jnp.isfinite(leaf).all()):
                    return f"{kind} {path_name(path)}"
        return f"loss ({float(loss)})"
