"""A needle in a haystack: a number hidden at some depth of a long text and asked for at its end, on a grid of contexts
and depths."""

import hashlib
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.schema import ConfigError, Schema, integer, integers, text
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.metrics import ACCURACY
from kvlab.tasks.perplexity import check_tokenizer, file_digest, token_splits, tokenizer_of
from kvlab.tasks.text import SPLITS
from kvlab.tokenizers import ByteTokenizer, Tokenizer
from kvlab.typing import PyTree


@dataclass(frozen=True)
class NeedleConfig(Schema):
    """The grid: every context length with every depth (percent of the way from the beginning to the question).

    The haystack is text as in task=text, the needle a statement with a number of `num_digits` digits. `num_test`
    examples a cell. Training draws depths at random.
    """

    contexts: tuple[int, ...] = integers((128, 256, 512), 16, 1 << 24, min_len=1)
    depths: tuple[int, ...] = integers((0, 25, 50, 75, 100), 0, 100, min_len=1)
    num_digits: int = integer(4, 1, 64)
    statement: str = text("\nThe magic number is ")
    path: str | None = text(None, legal="a file or folder", optional=True)
    pattern: str = text("*.py")
    tokenizer: str | None = text(None, legal="a tokenizer.json", optional=True)
    num_validation: int = integer(8, 1, 1 << 20)
    num_test: int = integer(16, 1, 1 << 20)

    def cross_check(self) -> None:
        check_tokenizer(self.tokenizer)
        for name in ("contexts", "depths"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(name, list(values), "must not name a value twice")
        least = Needle(self).least_context
        if min(self.contexts) < least:
            raise ConfigError("contexts", min(self.contexts), f"must be at least {least}: the needle and the question")


class Needle(Task):
    """Accuracy of the number's digits, averaged over the grid. A slice is "context@depth"."""

    Config = NeedleConfig
    metric = ACCURACY
    evaluation_fields = ("num_test",)

    def __init__(self, config: NeedleConfig):
        self.config = config
        tokenizer: Tokenizer = tokenizer_of(config.tokenizer) if config.tokenizer else ByteTokenizer()
        self.vocab_size = tokenizer_of(config.tokenizer).vocab_size if config.tokenizer else 256
        self._statement = np.array(tokenizer.encode(config.statement, special=False), np.int32)
        self._stop = np.array(tokenizer.encode(".\n", special=False), np.int32)
        digits = [tokenizer.encode(str(digit), special=False) for digit in range(10)]
        if not all(digits) or len({digit[-1] for digit in digits}) < 10:
            raise ConfigError("tokenizer", config.tokenizer, "must have a token of its own for every digit")
        self._digits = np.array([digit[-1] for digit in digits], np.int32)

    @property
    def least_context(self) -> int:
        """Tokens of needle and question."""
        return 2 * (len(self._statement) + self.config.num_digits) + len(self._stop)

    @property
    def context_len(self) -> int:
        return max(self.config.contexts)

    @property
    def num_choices(self) -> int:
        return len(self._digits)

    def train_shapes(self) -> tuple[int, ...]:
        return self.config.contexts

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        return self.config.contexts[call % len(self.config.contexts)], [0] * num_steps

    def train_data(self) -> PyTree:
        return jnp.asarray(self.haystack["train"])

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        keys = jax.random.split(key, batch_size)
        depths = jax.random.randint(jax.random.fold_in(key, 1), (batch_size,), 0, 101, jnp.int32)
        return jax.vmap(lambda example_key, depth: self._example(data, example_key, seq_len, depth))(keys, depths)

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        config = self.config
        num = {"validation": config.num_validation, "test": config.num_test}[split]
        return tuple(
            EvalSlice(f"{context}@{depth}", context, context - config.num_digits, num, depth)
            for context in config.contexts
            for depth in config.depths
        )

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        key = jax.random.fold_in(jax.random.fold_in(key, part.seq_len), part.knob)
        examples = jnp.arange(index, index + batch_size, dtype=jnp.int32)
        depth = jnp.asarray(part.knob, jnp.int32)
        return self._examples(self._on_device[split], key, examples, part.seq_len, depth)

    def fingerprint(self) -> str | None:
        """What the haystack and the tokenizer are made of."""
        digest = hashlib.sha256(b"".join(self.haystack[name].tobytes() for name in SPLITS))
        if self.config.tokenizer:
            digest.update(file_digest(self.config.tokenizer).encode())
        return digest.hexdigest()

    @cached_property
    def haystack(self) -> dict[str, np.ndarray]:
        """Token ids of each split. Raises ConfigError when one is shorter than the longest context."""
        parts = token_splits(self.config.path, self.config.pattern, self.config.tokenizer)
        for name, data in parts.items():
            if len(data) <= self.context_len:
                where = f"the {name} split of {self.config.path or 'the standard library'} has {len(data)} tokens"
                raise ConfigError("task.contexts", self.context_len, f"{where}, which must exceed every context")
        return {name: data.astype(np.int32) for name, data in parts.items()}

    @cached_property
    def _on_device(self) -> dict[str, Array]:
        return {name: jnp.asarray(data) for name, data in self.haystack.items()}

    @partial(jax.jit, static_argnums=(0, 4))
    def _examples(self, haystack: Array, key: Array, examples: Array, seq_len: int, depth: Array) -> Batch:
        """Each example from its own number, so that it is the same whatever batch it comes in."""
        return jax.vmap(lambda example: self._example(haystack, jax.random.fold_in(key, example), seq_len, depth))(
            examples
        )

    def _example(self, haystack: Array, key: Array, seq_len: int, depth: Array) -> Batch:
        """[text, needle, text, question, number]: one row, of which the number is labelled."""
        num_digits, statement = self.config.num_digits, jnp.asarray(self._statement)
        key_start, key_digits = jax.random.split(key)
        drawn = jax.random.randint(key_digits, (num_digits,), 0, 10, jnp.int32)
        number = jnp.asarray(self._digits)[drawn]
        needle = jnp.concatenate([statement, number, jnp.asarray(self._stop)])
        question = jnp.concatenate([statement, number])
        body_len = seq_len - len(question)
        start = jax.random.randint(key_start, (), 0, haystack.shape[0] - seq_len, jnp.int32)
        body = jax.lax.dynamic_slice_in_dim(haystack, start, body_len)
        place = depth * (body_len - len(needle)) // 100
        body = jax.lax.dynamic_update_slice_in_dim(body, needle, place, axis=0)
        before = jnp.arange(seq_len - num_digits - 1, seq_len - 1, dtype=jnp.int32)
        return Batch(jnp.concatenate([body, question]), before, number, jnp.ones(num_digits))
