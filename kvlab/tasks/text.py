"""Byte-level language modelling, of all of a window or of its end, behind a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.schema import ConfigError, Schema, added, flag, integer, text
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.bigrams import BigramCounts, repeats
from kvlab.tasks.corpus import check_path, check_pattern, path_field, read_splits
from kvlab.tasks.metrics import BITS_PER_BYTE
from kvlab.typing import PyTree
from kvlab.units import counted


@dataclass(frozen=True)
class TextConfig(Schema):
    """`path` is a file (split by position), a folder (split by file), or works of the library; null is the standard
    library's source.

    Every token of an evaluation window is scored; `decode_len` tokens at its end are decoded one by one, the rest is
    prefilled in chunks. With `num_scored` a test window is a prompt and that many tokens behind it: these alone are
    scored, all decoded one by one whatever `decode_len`. A memory that compresses does so at the prompt's end.

    With `scored_in_chunks` the scored tokens are prefilled in chunks of `memory.chunk_len` too, but for `decode_len`.
    That is many times as fast, and the same for any mask (windows, sinks), for formats by token, and for a compression
    of the prompt alone. A method that also acts later then acts after a chunk where it would have acted inside it.

    Tests score labels apart that complete a bigram which their window had before (`recall`), and the others (`rest`).
    With `max_bigram_count`, of those only bigrams that the training split has at most so often are `recall`.
    """

    path: str | None = path_field()
    pattern: str = text("*.py")
    seq_len: int = integer(256, 2, 1 << 20)
    decode_len: int = integer(32, 1, 1 << 20)
    num_validation: int = integer(64, 1, 1 << 20)
    num_test: int = integer(128, 1, 1 << 20)
    num_scored: int | None = added(integer(None, 1, 1 << 20, optional=True))
    scored_in_chunks: bool = added(flag(False))
    max_bigram_count: int | None = added(integer(None, 0, 1 << 40, optional=True))

    def cross_check(self) -> None:
        if self.decode_len >= self.seq_len:
            raise ConfigError("decode_len", self.decode_len, f"must be in [1, {self.seq_len - 1}], below seq_len")
        check_path(self.path)
        check_pattern(self.pattern)
        if self.num_scored is None:
            if self.scored_in_chunks:
                raise ConfigError("scored_in_chunks", True, "must be false without num_scored")
            return
        if self.num_scored >= self.seq_len:
            legal = f"must be in [1, {self.seq_len - 1}], below seq_len, or null: the prompt is the rest"
            raise ConfigError("num_scored", self.num_scored, legal)
        if self.scored_in_chunks and self.decode_len > self.num_scored:
            legal = f"must be in [1, {self.num_scored}], of the num_scored tokens, with scored_in_chunks"
            raise ConfigError("decode_len", self.decode_len, legal)


class Text(Task):
    """Bits per byte over evenly spaced windows of held-out files."""

    Config = TextConfig
    metric = BITS_PER_BYTE
    evaluation_fields = ("decode_len", "num_test", "num_scored", "scored_in_chunks", "max_bigram_count")
    vocab_size = 256

    def __init__(self, config: TextConfig):
        self.config = config

    @property
    def context_len(self) -> int:
        return self.config.seq_len

    @property
    def vocabulary(self) -> str:
        return "bytes"

    @property
    def num_choices(self) -> int:
        return self.vocab_size

    def train_shapes(self) -> tuple[int, ...]:
        return (self.config.seq_len,)

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        return self.config.seq_len, [0] * num_steps

    def train_data(self) -> PyTree:
        return jnp.asarray(self.corpus["train"])

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        starts = jax.random.randint(key, (batch_size, 1), 0, data.shape[0] - seq_len, jnp.int32)
        return self._windows(data, starts, seq_len)

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        config = self.config
        num = {"validation": config.num_validation, "test": config.num_test}[split]
        decoded, compress_at = config.decode_len, None
        if config.num_scored is not None:
            decoded = config.decode_len if config.scored_in_chunks else config.num_scored
            compress_at = config.seq_len - config.num_scored
        return (EvalSlice("text", config.seq_len, config.seq_len - decoded, num, 0, compress_at),)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        corpus = self.corpus[split]
        starts = np.linspace(0, len(corpus) - part.seq_len - 1, part.num_examples).astype(np.int32)
        rows = starts[np.arange(index, index + batch_size) % part.num_examples]
        return self.scored(self._windows(jnp.asarray(corpus), jnp.asarray(rows)[:, None], part.seq_len), split)

    def scored(self, batch: Batch, split: str) -> Batch:
        """The batch with the labels that are scored: in the test those behind the prompt, in validation all."""
        num = self.config.num_scored
        if split != "test" or num is None:
            return batch
        return replace(
            batch,
            label_positions=batch.label_positions[:, -num:],
            labels=batch.labels[:, -num:],
            weights=batch.weights[:, -num:],
        )

    def label_parts(self, batch: Batch) -> Mapping[str, npt.NDArray[np.bool_]]:
        tokens, positions, labels = map(np.asarray, (batch.tokens, batch.label_positions, batch.labels))
        recall = repeats(tokens, positions, labels)
        if (most := self.config.max_bigram_count) is not None:
            recall &= self._trained_on(np.take_along_axis(tokens, positions, axis=1), labels) <= most
        return {"recall": recall, "rest": ~recall}

    @cached_property
    def _trained_on(self) -> BigramCounts:
        """How often the training split has a bigram."""
        return BigramCounts.of(self.corpus["train"], self.vocab_size)

    def fingerprint(self) -> str | None:
        """SHA-256 over all splits."""
        return self.corpus_digest

    @property
    def corpus_digest(self) -> str:
        """SHA-256 over all splits. Raises ConfigError as `corpus` does."""
        _ = self.corpus
        return read_splits(self.config.path, self.config.pattern)[1]

    def _windows(self, corpus: Array, starts: Array, seq_len: int) -> Batch:
        """Windows [starts, starts + seq_len) and their next bytes; every position is labelled."""
        places = jnp.arange(seq_len, dtype=jnp.int32)[None, :]
        tokens = corpus[starts + places].astype(jnp.int32)
        labels = corpus[starts + places + 1].astype(jnp.int32)
        everywhere = jnp.broadcast_to(places, tokens.shape)
        return Batch(tokens, everywhere, labels, jnp.ones(tokens.shape, jnp.float32))

    @property
    def corpus(self) -> dict[str, np.ndarray]:
        """Bytes of each split as uint8. Raises ConfigError when a split is shorter than one window."""
        return self.long_enough(read_splits(self.config.path, self.config.pattern)[0])

    def long_enough(self, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same splits. Raises ConfigError when one is shorter than a window."""
        for name, data in parts.items():
            if len(data) < self.config.seq_len + 2:
                where = f"the {name} split of {self.config.path or 'the standard library'} has "
                where += counted(len(data), "token")
                raise ConfigError("task.seq_len", self.config.seq_len, f"{where}, which must exceed seq_len + 1")
        return parts
