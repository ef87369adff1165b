"""A needle in a haystack: a number hidden at some depth of a long text and asked for at its end, on a grid of contexts
and depths."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.schema import ConfigError, integer, integers, text
from kvlab.tasks.base import Batch, EvalSlice
from kvlab.tasks.haystack import Haystack, HaystackConfig


@dataclass(frozen=True)
class NeedleConfig(HaystackConfig):
    """As `HaystackConfig`. The grid: every context length with every depth (percent of the way from the beginning to
    the question). The needle is a statement with a number of `num_digits` digits, the question the statement again.
    `num_test` examples a cell. Training draws depths at random.
    """

    contexts: tuple[int, ...] = integers((128, 256, 512), 16, 1 << 24, min_len=1)
    depths: tuple[int, ...] = integers((0, 25, 50, 75, 100), 0, 100, min_len=1)
    num_digits: int = integer(4, 1, 64)
    statement: str = text("\nThe magic number is ")

    def cross_check(self) -> None:
        super().cross_check()
        if len(set(self.depths)) < len(self.depths):
            raise ConfigError("depths", list(self.depths), "must not name a value twice")
        least = Needle(self).least_context
        if min(self.contexts) < least:
            raise ConfigError("contexts", min(self.contexts), f"must be at least {least}: the needle and the question")


class Needle(Haystack[NeedleConfig]):
    """Accuracy of the number's digits, averaged over the grid. A slice is "context@depth", its knob the depth."""

    Config = NeedleConfig

    def __init__(self, config: NeedleConfig):
        super().__init__(config)
        self._statement, self._stop = self.ids(config.statement), self.ids(".\n")

    @property
    def fixed_parts(self) -> tuple[np.ndarray, ...]:
        return self._statement, self._stop

    @property
    def least_context(self) -> int:
        """Tokens of needle and question."""
        return 2 * (len(self._statement) + self.config.num_digits) + len(self._stop)

    def knobs(self, key: Array, batch_size: int) -> Array:
        return jax.random.randint(jax.random.fold_in(key, 1), (batch_size,), 0, 101, jnp.int32)

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        config, num = self.config, self.num_examples(split)
        behind = 1 if config.query_aware else len(self._statement)
        cells = [(context, depth) for context in config.contexts for depth in config.depths]
        ends = [context - config.num_digits for context, _ in cells]
        return tuple(
            EvalSlice(f"{context}@{depth}", context, end, num, depth, end - behind)
            for (context, depth), end in zip(cells, ends, strict=True)
        )

    def example(self, haystack: Array, key: Array, seq_len: int, knob: Array) -> Batch:
        """[text, needle, text, question, number]: one row, of which the number is labelled."""
        num_digits, statement = self.config.num_digits, jnp.asarray(self._statement)
        key_start, key_digits = jax.random.split(key)
        drawn = jax.random.randint(key_digits, (num_digits,), 0, 10, jnp.int32)
        number = jnp.asarray(self.digits)[drawn]
        needle = jnp.concatenate([statement, number, jnp.asarray(self._stop)])
        question = jnp.concatenate([statement, number])
        body_len = seq_len - len(question)
        start = jax.random.randint(key_start, (), 0, haystack.shape[0] - seq_len, jnp.int32)
        body = jax.lax.dynamic_slice_in_dim(haystack, start, body_len)
        place = knob * (body_len - len(needle)) // 100
        body = jax.lax.dynamic_update_slice_in_dim(body, needle, place, axis=0)
        before = jnp.arange(seq_len - num_digits - 1, seq_len - 1, dtype=jnp.int32)
        return Batch(jnp.concatenate([body, question]), before, number, jnp.ones(num_digits))
