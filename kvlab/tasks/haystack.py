"""Numbers hidden in a long text and asked for at its end: what the tasks of this kind have in common."""

import abc
import hashlib
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.programs import program
from kvlab.schema import ConfigError, Schema, added, flag, integer, integers, text
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.corpus import SPLITS, check_path, check_pattern, path_field
from kvlab.tasks.metrics import ACCURACY
from kvlab.tasks.perplexity import check_tokenizer, file_digest, token_splits, tokenizer_of, vocabulary_of
from kvlab.tokenizers import ByteTokenizer, Tokenizer
from kvlab.typing import PyTree
from kvlab.units import counted


@dataclass(frozen=True)
class HaystackConfig(Schema):
    """`contexts` are lengths of whole sequences, questions and answers included; the text around what is hidden is as
    in task=text. A memory that compresses does so before the question, with `query_aware` behind it, when only its last
    token is still to come."""

    contexts: tuple[int, ...] = integers((512,), 16, 1 << 24, min_len=1)
    path: str | None = path_field()
    pattern: str = text("*.py")
    tokenizer: str | None = text(None, legal="a tokenizer.json", optional=True)
    num_validation: int = integer(8, 1, 1 << 20)
    num_test: int = integer(16, 1, 1 << 20)
    query_aware: bool = added(flag(False))

    def cross_check(self) -> None:
        check_path(self.path)
        check_pattern(self.pattern)
        check_tokenizer(self.tokenizer)
        if len(set(self.contexts)) < len(self.contexts):
            raise ConfigError("contexts", list(self.contexts), "must not name a value twice")


class Haystack[C: HaystackConfig](Task):
    """Accuracy of digits; every example is a pure function of its key, so that it is the same in any batch."""

    metric = ACCURACY
    evaluation_fields = ("num_test", "query_aware")

    def __init__(self, config: C):
        """Raises ConfigError for a tokenizer without a token for each digit."""
        self.config = config
        self.tokenizer: Tokenizer = tokenizer_of(config.tokenizer) if config.tokenizer else ByteTokenizer()
        self.vocab_size = tokenizer_of(config.tokenizer).vocab_size if config.tokenizer else 256
        digits = [self.tokenizer.encode(str(digit), special=False) for digit in range(10)]
        if not all(digits) or len({digit[-1] for digit in digits}) < 10:
            raise ConfigError("tokenizer", config.tokenizer, "must have a token of its own for every digit")
        self.digits = np.array([digit[-1] for digit in digits], np.int32)

    @abc.abstractmethod
    def example(self, haystack: Array, key: Array, seq_len: int, knob: Array) -> Batch:
        """One row: traced, of the text that it is hidden in."""

    @abc.abstractmethod
    def knobs(self, key: Array, batch_size: int) -> Array:
        """The knobs of a training batch."""

    @property
    @abc.abstractmethod
    def fixed_parts(self) -> tuple[np.ndarray, ...]:
        """The tokens of what stands in every example beside text and digits."""

    @property
    def vocabulary(self) -> str:
        return vocabulary_of(self.config.tokenizer)

    def highest_token(self) -> int:
        parts = [self.digits, *self.fixed_parts, *self.haystack.values()]
        return max(int(part.max()) for part in parts if part.size)

    def ids(self, words: str) -> np.ndarray:
        """The tokens of a part of an example."""
        return np.array(self.tokenizer.encode(words, special=False), np.int32)

    @property
    def context_len(self) -> int:
        return max(self.config.contexts)

    @property
    def num_choices(self) -> int:
        return len(self.digits)

    def train_shapes(self) -> tuple[int, ...]:
        return self.config.contexts

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        return self.config.contexts[call % len(self.config.contexts)], [0] * num_steps

    def train_data(self) -> PyTree:
        return jnp.asarray(self.haystack["train"])

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        keys, knobs = jax.random.split(key, batch_size), self.knobs(key, batch_size)
        return jax.vmap(lambda example_key, knob: self.example(data, example_key, seq_len, knob))(keys, knobs)

    def num_examples(self, split: str) -> int:
        """Examples of each slice."""
        return {"validation": self.config.num_validation, "test": self.config.num_test}[split]

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        key = jax.random.fold_in(jax.random.fold_in(key, part.seq_len), part.knob)
        examples = jnp.arange(index, index + batch_size, dtype=jnp.int32)
        knob = jnp.asarray(part.knob, jnp.int32)
        return self._examples(self._on_device[split], key, examples, part.seq_len, knob)

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
                where = f"the {name} split of {self.config.path or 'the standard library'} has "
                where += counted(len(data), "token")
                raise ConfigError("task.contexts", self.context_len, f"{where}, which must exceed every context")
        return {name: data.astype(np.int32) for name, data in parts.items()}

    @cached_property
    def _on_device(self) -> dict[str, Array]:
        return {name: jnp.asarray(data) for name, data in self.haystack.items()}

    @program(static_argnums=3)
    def _examples(self, haystack: Array, key: Array, examples: Array, seq_len: int, knob: Array) -> Batch:
        """Each example from its own number."""
        return jax.vmap(lambda example: self.example(haystack, jax.random.fold_in(key, example), seq_len, knob))(
            examples
        )
