"""Which of two tokens was there more often, and a metric that kvlab does not have."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.schema import Schema, integer
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.metrics import Metric
from kvlab.typing import PyTree

ERROR_RATE = Metric(
    "error_rate",
    "error rate",
    False,
    lambda sums: 1 - sums.correct / sums.weight,
    num_flips=2,
    chance=lambda num_choices: 1 - 1 / num_choices,
    floor=0.25,
)


@dataclass(frozen=True)
class MajorityConfig(Schema):
    """Sequences of `seq_len` bits."""

    seq_len: int = integer(32, 2, 1 << 20)
    num_validation: int = integer(32, 1, 1 << 20)
    num_test: int = integer(64, 1, 1 << 20)


class Majority(Task):
    """The label of every bit is whether more bits so far were ones than zeros."""

    Config = MajorityConfig
    metric = ERROR_RATE
    evaluation_fields = ("num_test",)
    vocab_size = 2

    def __init__(self, config: MajorityConfig):
        self.config = config

    @property
    def context_len(self) -> int:
        return self.config.seq_len

    @property
    def num_choices(self) -> int:
        return 2

    def train_shapes(self) -> tuple[int, ...]:
        return (self.config.seq_len,)

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        return self.config.seq_len, [0] * num_steps

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        bits = jax.random.randint(key, (batch_size, seq_len), 0, 2, jnp.int32)
        places = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32)[None], bits.shape)
        labels = (2 * jnp.cumsum(bits, axis=1) > places + 1).astype(jnp.int32)
        return Batch(bits, places, labels, jnp.ones(bits.shape, jnp.float32))

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        num = {"validation": self.config.num_validation, "test": self.config.num_test}[split]
        return (EvalSlice("bits", self.config.seq_len, self.config.seq_len // 2, num, 0),)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        keys = [jax.random.fold_in(key, index + row) for row in range(batch_size)]
        rows = [self.train_batch((), row_key, 1, part.seq_len, jnp.zeros((), jnp.int32)) for row_key in keys]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
