"""Scoring through the memory: prompts prefilled in chunks, answers decoded from pages. The parallel form beside it.

Scores are kept for every example and turn: what two memories do to the same example can be compared.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.views import LayerStates
from kvlab.models.transformer import Transformer, merge
from kvlab.tasks import Batch, EvalSlice, Task
from kvlab.tasks.metrics import NO_EXAMPLES, ExampleScores, Sums
from kvlab.training.step import score, weighted_nll
from kvlab.typing import Params


@dataclass(frozen=True, kw_only=True)
class SliceScore(Sums):
    """The sums of one slice, and what they are sums of. `data_sha256` is of the examples themselves, as far as they
    were scored through a memory: tokens, labels and weights, whatever batches they came in. So are `parts`, the sums of
    the task's `label_parts`."""

    name: str
    examples: ExampleScores = field(default=NO_EXAMPLES, compare=False)
    data_sha256: str = ""
    parts: Mapping[str, Sums] = field(default_factory=dict)


def nothing() -> None:
    """What is done between batches by default."""


class Scorer:
    """Scores one model on a task's slices. Data depend on `key` and the split only."""

    def __init__(self, structure: nnx.GraphDef[Transformer], task: Task, key: Array, batch_size: int):
        self.structure, self.task, self.key, self.batch_size = structure, task, key, batch_size
        self._parallel = jax.jit(lambda params, batch: weighted_nll(merge(structure, params), batch))
        self._score = jax.jit(score)
        self._batches: dict[tuple[str, str, int], Batch] = {}

    def with_key(self, key: Array) -> "Scorer":
        """The same programs on other data."""
        other = copy.copy(self)
        other.key, other._batches = key, {}
        return other

    def parallel(
        self,
        params: Params,
        split: str,
        states: Sequence[LayerStates] | None = None,
        *,
        forward: Callable[[Params, Batch], tuple[Array, Array]] | None = None,
        between: Callable[[], None] = nothing,
    ) -> tuple[SliceScore, ...]:
        """Every slice in the parallel form; `states` as in `Transformer.parallel`. Another form is given by `forward`:
        the negative log-likelihood and correctness of a batch's labels. Before every batch comes what is to be done
        `between` them; it may raise."""
        forward = forward or self._parallel
        if states is not None:
            forward = jax.jit(lambda params, batch: weighted_nll(merge(self.structure, params), batch, states))
        scores = []
        for part in self.task.slices(split):
            tally = _Tally(part)
            for index in range(0, part.num_examples, self.batch_size):
                between()
                batch = self._batch(split, part, index)
                nll, correct = forward(params, batch)
                tally.add(*(_by_position(batch, values) for values in (nll, correct, batch.weights)))
            scores.append(tally.score())
        return tuple(scores)

    def through_memory(
        self,
        params: Params,
        split: str,
        layout: MemoryLayout,
        check: MaskCheck | None = None,
        *,
        step: MemoryStep | None = None,
        between: Callable[[], None] = nothing,
    ) -> tuple[SliceScore, ...]:
        """Every slice through pages: the prompt in chunks of `layout.chunk_len`, then token by token. With a `check`
        every logit that is scored is compared, and freed pages are spoiled. Another `step` of that layout may run.
        `between` is as in `parallel`."""
        is_checked = check is not None
        step = step or MemoryStep.of(self.structure, layout)
        session = Session(step, params, poisons=is_checked, observes=is_checked)
        scores = []
        for eval_slice in self.task.slices(split):
            tally = _Tally(eval_slice)
            for index in range(0, eval_slice.num_examples, self.batch_size):
                between()
                batch = self._batch(split, eval_slice, index)
                nll, correct, weights = self._score_batch(session, batch, eval_slice, check)
                tally.add(nll, correct, weights, parts=self._parts(batch))
                tally.identify(batch)
                session.release_all()
            scores.append(tally.score())
        return tuple(scores)

    def _score_batch(
        self, session: Session, batch: Batch, eval_slice: EvalSlice, check: MaskCheck | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Negative log-likelihood, correctness and weight of every position [B, T]: zero where there is no label."""
        all_labels, all_weights = (_by_position(batch, values) for values in (batch.labels, batch.weights))
        all_scored = np.zeros((2, *all_weights.shape), np.float32)
        real_rows = all_weights.any(axis=1)
        tokens, labels, weights = (np.asarray(rows)[real_rows] for rows in (batch.tokens, all_labels, all_weights))
        scored, seen = np.zeros((2, *tokens.shape), np.float32), dict[int, np.ndarray]()
        session.prompt_len, session.known = eval_slice.compress_at or eval_slice.prompt_len, dict(enumerate(tokens))
        session.decode_from = eval_slice.prompt_len
        for start, end, width in steps(eval_slice, session.layout.chunk_len):
            logits = session.advance({row: tokens[row, start:end] for row in range(len(tokens))}, width)
            if not weights[:, start:end].any():
                continue
            shape = (session.layout.max_sequences, width)
            padded_labels, padded_weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
            padded_labels[: len(tokens), : end - start] = labels[:, start:end]
            padded_weights[: len(tokens), : end - start] = weights[:, start:end]
            for kind, values in enumerate(self._score(logits, padded_labels, padded_weights)):
                scored[kind, :, start:end] = np.asarray(values)[: len(tokens), : end - start]
            if check is not None:
                labelled = [position for position in range(start, end) if weights[:, position].any()]
                seen |= {position: np.asarray(logits[: len(tokens), position - start]) for position in labelled}
        if check is not None:
            check.compare(tokens, seen, session.events, eval_slice.name)
        all_scored[:, real_rows] = scored
        return all_scored[0], all_scored[1], all_weights

    def _parts(self, batch: Batch) -> dict[str, np.ndarray]:
        """Where the labels of each of the task's parts are [B, T]."""
        return {name: _by_position(batch, chosen) for name, chosen in self.task.label_parts(batch).items()}

    def _batch(self, split: str, eval_slice: EvalSlice, index: int) -> Batch:
        """Examples [index, index + batch_size) of a slice, generated once; past its end the weights are zero."""
        place = (split, eval_slice.name, index)
        if place not in self._batches:
            key = jax.random.fold_in(self.key, {"validation": 0, "test": 1}[split])
            batch = self.task.eval_batch(key, split, eval_slice, index, self.batch_size)
            real = jnp.arange(index, index + self.batch_size) < eval_slice.num_examples
            self._batches[place] = replace(batch, weights=jnp.where(real[:, None], batch.weights, 0))
        return self._batches[place]


def steps(eval_slice: EvalSlice, chunk_len: int) -> Iterator[tuple[int, int, int]]:
    """The steps of a slice as (start, end, width): tokens [start, end) in a program of `width` tokens. The prompt comes
    in chunks, none of which straddles the place where a memory may compress; what follows comes token by token."""
    compress_at = eval_slice.compress_at or eval_slice.prompt_len
    for low, high in ((0, compress_at), (compress_at, eval_slice.prompt_len)):
        for start in range(low, high, chunk_len):
            yield start, min(start + chunk_len, high), chunk_len
    for start in range(eval_slice.prompt_len, eval_slice.seq_len):
        yield start, start + 1, 1


def _by_position(batch: Batch, values: Array | np.ndarray) -> np.ndarray:
    """Values of labels [B, M] where the labels are [B, T], zero elsewhere."""
    values, places, real = (np.asarray(each) for each in (values, batch.label_positions, batch.weights > 0))
    rows, labels = np.nonzero(real)
    dense = np.zeros(np.shape(batch.tokens), values.dtype)
    dense[rows, places[rows, labels]] = values[rows, labels]
    return dense


class _Tally:
    """Scores of a slice, collected batch by batch; what lies past its end is left out."""

    def __init__(self, eval_slice: EvalSlice):
        self.eval_slice = eval_slice
        self._starts = [0, *eval_slice.turns]
        self._columns: list[tuple[np.ndarray, ...]] = []
        self._parts: dict[str, np.ndarray] = {}
        self._num_examples = self._num_identified = 0
        self._digests = [hashlib.sha256() for _ in range(3)]

    def add(
        self,
        nll: np.ndarray,
        correct: np.ndarray,
        weights: np.ndarray,
        *,
        parts: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """The next examples, each [B, T], with where the labels of their parts are."""
        num_real = min(len(weights), self.eval_slice.num_examples - self._num_examples)
        nll, correct, weights = nll[:num_real], correct[:num_real], weights[:num_real]
        sums = (np.add.reduceat(each.astype(np.float64), self._starts, axis=1) for each in (nll, correct, weights))
        num_labels = np.add.reduceat((weights > 0).astype(np.int32), self._starts, axis=1)
        self._columns.append((*sums, num_labels, correct[weights > 0] > 0))
        for name, chosen in (parts or {}).items():
            of_part = [each[chosen[:num_real]].sum(dtype=np.float64) for each in (nll, correct, weights)]
            self._parts[name] = self._parts.get(name, 0) + np.array(of_part)
        self._num_examples += num_real

    def identify(self, batch: Batch) -> None:
        """Takes the next examples themselves into the digest of the slice's data."""
        num_real = min(len(batch.tokens), self.eval_slice.num_examples - self._num_identified)
        labels, weights = (_by_position(batch, values) for values in (batch.labels, batch.weights))
        for digest, rows in zip(self._digests, (np.asarray(batch.tokens), labels, weights), strict=True):
            digest.update(np.ascontiguousarray(rows[:num_real]).tobytes())
        self._num_identified += num_real

    def score(self) -> SliceScore:
        """The slice's sums, with the scores of its examples."""
        nll, correct, weight, num_labels, right = map(np.concatenate, zip(*self._columns, strict=True))
        examples = ExampleScores(nll=nll, correct=correct, weight=weight, num_labels=num_labels, right=right)
        sums = examples.sums()
        data_sha256 = ""
        if self._num_identified:
            data_sha256 = hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()
        return SliceScore(
            name=self.eval_slice.name,
            nll=sums.nll,
            correct=sums.correct,
            weight=sums.weight,
            examples=examples,
            data_sha256=data_sha256,
            parts={name: Sums(nll=nll, correct=right, weight=n) for name, (nll, right, n) in self._parts.items()},
        )
