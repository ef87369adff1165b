"""Perplexity of a model over a text in windows, or of what follows a prompt: what language modelling papers report,
through any memory."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.files import home_expanded
from kvlab.schema import ConfigError, flag, text
from kvlab.tasks.base import Batch, EvalSlice
from kvlab.tasks.corpus import read_splits, read_whole
from kvlab.tasks.metrics import PERPLEXITY
from kvlab.tasks.text import Text, TextConfig
from kvlab.tokenizers import FileTokenizer


@dataclass(frozen=True)
class PerplexityConfig(TextConfig):
    """As `TextConfig`; tokens come from `tokenizer`, a tokenizer.json (null: bytes). With `whole` the text is not
    split: windows follow each other from its beginning, at most `num_test` of them; training needs whole=false."""

    tokenizer: str | None = text(None, legal="a tokenizer.json", optional=True)
    whole: bool = flag(True)

    def cross_check(self) -> None:
        super().cross_check()
        check_tokenizer(self.tokenizer)
        if self.whole and self.max_bigram_count is not None:
            raise ConfigError("max_bigram_count", self.max_bigram_count, "must be null with whole=true: nothing trains")


class Perplexity(Text):
    """exp of the mean negative log-likelihood of a token, over windows of `seq_len` tokens that know nothing of each
    other."""

    Config = PerplexityConfig
    metric = PERPLEXITY

    def __init__(self, config: PerplexityConfig):
        super().__init__(config)
        self.whole, self.tokenizer = config.whole, config.tokenizer
        self.vocab_size = tokenizer_of(config.tokenizer).vocab_size if config.tokenizer else 256

    @property
    def vocabulary(self) -> str:
        return vocabulary_of(self.tokenizer)

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        (eval_slice,) = super().slices(split)
        if not self.whole:
            return (eval_slice,)
        num_windows = (len(self.corpus[split]) - 1) // eval_slice.seq_len
        return (replace(eval_slice, num_examples=min(eval_slice.num_examples, num_windows)),)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        if not self.whole:
            return super().eval_batch(key, split, part, index, batch_size)
        rows = np.arange(index, index + batch_size, dtype=np.int32) % part.num_examples
        starts = jnp.asarray(rows * part.seq_len)[:, None]
        return self.scored(self._windows(self._on_device, starts, part.seq_len), split)

    @cached_property
    def _on_device(self) -> Array:
        """The whole text."""
        return jnp.asarray(self.corpus["test"])

    def highest_token(self) -> int:
        return max(int(part.max()) for part in self.corpus.values())

    def fingerprint(self) -> str | None:
        return hashlib.sha256(
            repr([self.corpus_digest, self.tokenizer and file_digest(self.tokenizer)]).encode()
        ).hexdigest()

    @property
    def corpus(self) -> dict[str, npt.NDArray[np.integer]]:
        if self.whole:
            everything = whole_tokens(self.config.path, self.config.pattern, self.tokenizer)
            return self.long_enough({"train": everything, "validation": everything, "test": everything})
        return self.long_enough(token_splits(self.config.path, self.config.pattern, self.tokenizer))


@lru_cache(maxsize=8)
def tokenizer_of(path: str) -> FileTokenizer:
    """The tokenizer of a file, read once a process."""
    return FileTokenizer(home_expanded(path))


def check_tokenizer(path: str | None) -> None:
    """Raises ConfigError for a file that is not there or no tokenizer."""
    if path is None:
        return
    if not os.path.isfile(home_expanded(path)):
        raise ConfigError("tokenizer", path, "must be an existing tokenizer.json, or null for bytes")
    try:
        tokenizer_of(path)
    except ValueError as error:
        raise ConfigError("tokenizer", path, str(error)) from None


def file_digest(path: str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(home_expanded(path).read_bytes()).hexdigest()


def vocabulary_of(tokenizer: str | None) -> str:
    """What the tokens of a text are, in words: those of a tokenizer.json, which its digest tells, or bytes (null)."""
    return "bytes" if tokenizer is None else f"the tokenizer with SHA-256 {file_digest(tokenizer)[:10]}..."


@lru_cache(maxsize=8)
def token_splits(path: str | None, pattern: str, tokenizer: str | None) -> dict[str, npt.NDArray[np.integer]]:
    """The splits of a corpus as token ids: bytes, or the tokenizer's."""
    parts, _ = read_splits(path, pattern)
    return {name: _tokens(data, tokenizer) for name, data in parts.items()}


@lru_cache(maxsize=8)
def whole_tokens(path: str | None, pattern: str, tokenizer: str | None) -> npt.NDArray[np.integer]:
    """A corpus as token ids, tokenised in one piece: no word is cut where a split would be."""
    return _tokens(read_whole(path, pattern), tokenizer)


def _tokens(data: npt.NDArray[np.uint8], tokenizer: str | None) -> npt.NDArray[np.integer]:
    if tokenizer is None:
        return data
    return np.array(tokenizer_of(tokenizer).encode(data.tobytes().decode(errors="replace"), special=False), np.int32)
