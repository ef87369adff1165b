"""The task contract: batches made from a key, labels at known positions, named evaluation slices."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import jax
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.schema import Schema
from kvlab.tasks.metrics import Metric
from kvlab.typing import PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Sequences and where their labels are: logits are computed at labelled positions only.

    tokens [B, T]; label_positions [B, M] index into T; labels [B, M] are next tokens; weights [B, M] are 0 for padding.
    """

    tokens: Any
    label_positions: Any
    labels: Any
    weights: Any


@dataclass(frozen=True)
class EvalSlice:
    """One named part of an evaluation: `num_examples` sequences of `seq_len` tokens, the first `prompt_len` a prompt.

    The prompt is prefilled in chunks, the rest is decoded token by token from memory.

    A memory that compresses a prompt does so when `compress_at` tokens are stored (null: all of the prompt): before the
    question, or behind it. `turns` are the positions at which the second and later turns begin: labels from there on
    are scored apart.
    """

    name: str
    seq_len: int
    prompt_len: int
    num_examples: int
    knob: int
    compress_at: int | None = None
    turns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.compress_at is not None and not 0 < self.compress_at <= self.prompt_len:
            legal = f"must be in [1, {self.prompt_len}], in the prompt"
            raise ValueError(f"slice {self.name}: compress_at = {self.compress_at}: {legal}")
        borders = (0, *self.turns, self.seq_len)
        if not all(low < high for low, high in pairwise(borders)):
            legal = f"must ascend within [1, {self.seq_len - 1}]"
            raise ValueError(f"slice {self.name}: turns = {self.turns}: {legal}")


class Task(abc.ABC):
    """A supervised sequence task. `metric` is what is reported; `evaluation_fields` are the fields of its config that
    change the test alone, neither training nor validation: runs that differ in them share their parameters.
    `training_fields` change training and validation alone: a finished run cannot be scored with others."""

    Config: ClassVar[type[Schema]]
    metric: ClassVar[Metric]
    evaluation_fields: ClassVar[tuple[str, ...]] = ()
    training_fields: ClassVar[tuple[str, ...]] = ("num_validation",)
    vocab_size: int

    @property
    @abc.abstractmethod
    def context_len(self) -> int:
        """Tokens of the longest evaluation sequence: where memory is measured unless another length is asked for."""

    @property
    def vocabulary(self) -> str:
        """What its tokens are, in words: a model can do the tasks whose vocabulary is the one that it was trained
        on."""
        return f"{type(self).__name__} with {self.vocab_size} tokens"

    @property
    def num_choices(self) -> int | None:
        """How many labels a blind guess has to choose among, where that is known."""
        return None

    @property
    def chance(self) -> float | None:
        """What a blind guess scores, where that is known."""
        if self.num_choices is None or self.metric.chance is None:
            return None
        return self.metric.chance(self.num_choices)

    @abc.abstractmethod
    def train_shapes(self) -> tuple[int, ...]:
        """The sequence lengths that training compiles for."""

    @abc.abstractmethod
    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        """Sequence length of the call-th device call, and one knob (a traced integer) for each of its steps."""

    def train_data(self) -> PyTree:
        """Arrays that training batches are cut from, handed to every device call; nothing if the key determines all."""
        return ()

    @abc.abstractmethod
    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        """A training batch on device, a pure function of its arguments; `data` is `train_data()`."""

    @abc.abstractmethod
    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        """The slices of "validation" or "test"."""

    @abc.abstractmethod
    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        """Examples [index, index + batch_size) of a slice, the same for the same key."""

    def label_parts(self, batch: Batch) -> Mapping[str, npt.NDArray[np.bool_]]:
        """By name the parts of a batch's labels that tests score apart, beside the whole: [B, M] each, and every label
        is in one of them. The names are those of all batches; none: the labels are of one kind."""
        return {}

    def highest_token(self) -> int:
        """The highest token that its sequences may have. Reads the data where these say it."""
        return self.vocab_size - 1

    def fingerprint(self) -> str | None:
        """Hash of the data where it comes from outside; None where the key determines it."""
        return None


def round_robin(weights: tuple[int, ...]) -> tuple[int, ...]:
    """One period of the smooth weighted round robin: index i appears weights[i] times, as evenly spread as possible."""
    credit, order = [0] * len(weights), []
    for _ in range(sum(weights)):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        chosen = max(range(len(weights)), key=lambda i: (credit[i], -i))
        credit[chosen] -= sum(weights)
        order.append(chosen)
    return tuple(order)
