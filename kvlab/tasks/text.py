"""Byte-level language modelling. Default corpus: the source of Python's own standard library, present on every
machine."""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.schema import ConfigError, Schema, integer, text
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.metrics import BITS_PER_BYTE
from kvlab.typing import PyTree

SPLITS = {"validation": (0, 8), "test": (8, 16), "train": (16, 256)}
"""Which files go where: the first byte of the SHA-256 of a file's relative name lies in this half-open interval."""


@dataclass(frozen=True)
class TextConfig(Schema):
    """`path` is a file (split by position) or a folder (split by file); null is the standard library's source.

    `decode_len` tokens at the end of each evaluation window are decoded one by one; the rest is prefilled in chunks.
    """

    path: str | None = text(None, legal="a file or folder", optional=True)
    pattern: str = text("*.py")
    seq_len: int = integer(256, 2, 1 << 20)
    decode_len: int = integer(32, 1, 1 << 20)
    num_validation: int = integer(64, 1, 1 << 20)
    num_test: int = integer(128, 1, 1 << 20)

    def cross_check(self) -> None:
        if self.decode_len >= self.seq_len:
            raise ConfigError("decode_len", self.decode_len, f"must be in [1, {self.seq_len - 1}], below seq_len")
        if self.path is not None and not Path(self.path).expanduser().exists():
            raise ConfigError("path", self.path, "must be an existing file or folder, or null for the standard library")


class Text(Task):
    """Bits per byte over evenly spaced windows of held-out files."""

    Config = TextConfig
    metric = BITS_PER_BYTE
    evaluation_fields = ("decode_len", "num_test")
    vocab_size = 256

    def __init__(self, config: TextConfig):
        self.config = config

    @property
    def context_len(self) -> int:
        return self.config.seq_len

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
        return (EvalSlice("text", config.seq_len, config.seq_len - config.decode_len, num, 0),)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        corpus = self.corpus[split]
        starts = np.linspace(0, len(corpus) - part.seq_len - 1, part.num_examples).astype(np.int32)
        rows = starts[np.arange(index, index + batch_size) % part.num_examples]
        return self._windows(jnp.asarray(corpus), jnp.asarray(rows)[:, None], part.seq_len)

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
                where = f"the {name} split of {self.config.path or 'the standard library'} has {len(data)} tokens"
                raise ConfigError("task.seq_len", self.config.seq_len, f"{where}, which must exceed seq_len + 1")
        return parts


@lru_cache(maxsize=8)
def read_splits(path: str | None, pattern: str) -> tuple[dict[str, np.ndarray], str]:
    """The splits of a corpus and their SHA-256, read once a process."""
    root = Path(path).expanduser() if path else Path(sysconfig.get_paths()["stdlib"])
    parts = _split_file(root) if root.is_file() else _split_folder(root, pattern)
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(parts[name].tobytes())
    return parts, digest.hexdigest()


def _split_file(path: Path) -> dict[str, np.ndarray]:
    """One file by position: 90% train, then validation, then test."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    first, second = int(len(data) * 0.9), int(len(data) * 0.95)
    return {"train": data[:first], "validation": data[first:second], "test": data[second:]}


def _split_folder(root: Path, pattern: str) -> dict[str, np.ndarray]:
    """Files in sorted order, each wholly in one split by the hash of its relative name; tests and installed packages
    are left out, so that the standard library means the library."""
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(
            name.split("/")
        ):
            continue
        place = hashlib.sha256(name.encode()).digest()[0]
        owner = next(split for split, (low, high) in SPLITS.items() if low <= place < high)
        parts[owner].append(path.read_bytes())
    return {name: np.frombuffer(b"\n".join(files), np.uint8) for name, files in parts.items()}
