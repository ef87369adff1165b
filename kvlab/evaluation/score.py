"""Scoring through the memory: prompts prefilled in chunks, answers decoded from pages. The parallel form beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.views import LayerStates
from kvlab.models.transformer import Transformer, merge
from kvlab.tasks import Batch, EvalSlice, Task
from kvlab.tasks.metrics import Sums
from kvlab.training.step import score, weighted_nll
from kvlab.typing import Params


@dataclass(frozen=True, kw_only=True)
class SliceScore(Sums):
    """The sums of one slice."""

    name: str


class Scorer:
    """Scores one model on a task's slices. Data depend on `key` and the split only."""

    def __init__(self, structure: nnx.GraphDef[Transformer], task: Task, key: Array, batch_size: int):
        self.structure, self.task, self.key, self.batch_size = structure, task, key, batch_size
        self._parallel = jax.jit(lambda params, batch: weighted_nll(merge(structure, params), batch))
        self._score = jax.jit(score)
        self._batches: dict[tuple[str, str, int], Batch] = {}

    def parallel(
        self, params: Params, split: str, states: Sequence[LayerStates] | None = None
    ) -> tuple[SliceScore, ...]:
        """Every slice in the parallel form; `states` as in `Transformer.parallel`."""
        forward = self._parallel
        if states is not None:
            forward = jax.jit(lambda params, batch: weighted_nll(merge(self.structure, params), batch, states))
        scores = []
        for part in self.task.slices(split):
            total = np.zeros(3)
            for index in range(0, part.num_examples, self.batch_size):
                batch = self._batch(split, part, index)
                nll, correct = forward(params, batch)
                total += [float(nll.sum()), float(correct.sum()), float(batch.weights.sum())]
            scores.append(_slice_score(part, total))
        return tuple(scores)

    def through_memory(self, params: Params, split: str, layout: MemoryLayout) -> tuple[SliceScore, ...]:
        """Every slice through pages: the prompt in chunks of `layout.chunk_len`, then token by token."""
        session = Session(MemoryStep.of(self.structure, layout), params)
        scores = []
        for eval_slice in self.task.slices(split):
            total = np.zeros(3)
            for index in range(0, eval_slice.num_examples, self.batch_size):
                total += self._score_batch(session, self._batch(split, eval_slice, index), eval_slice)
                session.release_all()
            scores.append(_slice_score(eval_slice, total))
        return tuple(scores)

    def _score_batch(self, session: Session, batch: Batch, eval_slice: EvalSlice) -> np.ndarray:
        real_rows = np.asarray(batch.weights).any(axis=1)
        batch = jax.tree.map(lambda x: np.asarray(x)[real_rows], batch)
        tokens, places = batch.tokens, batch.label_positions
        labels, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        for row in range(len(tokens)):  # scattered labels as dense rows, aligned with the tokens
            real = batch.weights[row] > 0
            labels[row, places[row, real]] = batch.labels[row, real]
            weights[row, places[row, real]] = batch.weights[row, real]
        total, width = np.zeros(3), session.layout.chunk_len
        starts = [*range(0, eval_slice.prompt_len, width), *range(eval_slice.prompt_len, eval_slice.seq_len)]
        for start in starts:
            end = min(start + width, eval_slice.prompt_len) if start < eval_slice.prompt_len else start + 1
            logits = session.advance(
                {row: tokens[row, start:end] for row in range(len(tokens))},
                width if start < eval_slice.prompt_len else 1,
            )
            if not weights[:, start:end].any():
                continue
            shape = (session.layout.max_sequences, logits.shape[1])
            padded_labels, padded_weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
            padded_labels[: len(tokens), : end - start] = labels[:, start:end]
            padded_weights[: len(tokens), : end - start] = weights[:, start:end]
            nll, correct = self._score(logits, padded_labels, padded_weights)
            total += [float(nll.sum()), float(correct.sum()), float(padded_weights.sum())]
        return total

    def _batch(self, split: str, eval_slice: EvalSlice, index: int) -> Batch:
        """Examples [index, index + batch_size) of a slice, generated once; past its end the weights are zero."""
        place = (split, eval_slice.name, index)
        if place not in self._batches:
            key = jax.random.fold_in(self.key, {"validation": 0, "test": 1}[split])
            batch = self.task.eval_batch(key, split, eval_slice, index, self.batch_size)
            real = jnp.arange(index, index + self.batch_size) < eval_slice.num_examples
            self._batches[place] = replace(batch, weights=jnp.where(real[:, None], batch.weights, 0))
        return self._batches[place]


def _slice_score(eval_slice: EvalSlice, total: np.ndarray) -> SliceScore:
    nll, correct, weight = total.tolist()
    return SliceScore(name=eval_slice.name, nll=nll, correct=correct, weight=weight)
