"""The six token tasks of MAD (arXiv 2403.17844), whose scores rank architectures as their losses at scale do.

* `in_context_recall`: pairs of a key and a value, the same value for a key all through a sequence and another one in
  the next. Asked are the values of all keys that were shown before; the last pair is always one of those.
* `fuzzy_recall`: keys and values are of one to three tokens, none twice in one of them. Tested with the longest keys.
* `noisy_recall`: some pairs are two tokens of a vocabulary of their own instead, which mean nothing.
* `selective_copying`: tokens strewn among blanks are repeated, in their order, behind a copy token.
* `compression`: an aggregation token ends a random sequence, and every token of it must be told from there. The paper
  decodes the output at that token, and each place, by an MLP. A language model has none: here questions follow, one for
  each place, each a token of its own. No answer is ever read, so every question is answered from what was stored.
* `memorisation`: keys whose values are the same in all sequences, behind a token that asks. No value is ever shown: the
  model's weights must hold them.

The loss is that of the asked labels alone. MAD's own code trains recall on all next tokens, on a fixed number of
sequences; here every batch is new.
"""

import abc
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.programs import program
from kvlab.schema import ConfigError, Schema, choice, integer, real
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.metrics import ACCURACY
from kvlab.typing import PyTree
from kvlab.units import counted


class Sizes(NamedTuple):
    """What a pattern is made of: `vocab_size` counts its special and its noise tokens. A pattern that does not say
    something does not have it."""

    vocab_size: int
    seq_len: int
    noise_share: float = 0.0
    num_noise_tokens: int = 0
    max_key_len: int = 1
    max_value_len: int = 1
    num_copied: int = 0


class Pattern(abc.ABC):
    """How sequences of some sizes are drawn. Tokens [0, vocab_size); the first `prompt_len` of `num_tokens` are the
    prompt; labels are uniform among `num_choices` tokens."""

    vocab_size: int
    num_tokens: int
    prompt_len: int
    num_choices: int

    def __init__(self, sizes: Sizes):
        """Raises ConfigError, naming the field, where there is no such sequence."""
        self.sizes = sizes
        self.vocab_size, self.num_tokens, self.prompt_len = sizes.vocab_size, sizes.seq_len, sizes.seq_len // 2

    @abc.abstractmethod
    def draw(self, key: Array, tested: bool) -> Batch:
        """One sequence: tokens [num_tokens], and its labels [M]. In `tested` ones keys have their longest form."""

    def _at_least(self, name: str, least: int, why: str) -> None:
        if (value := getattr(self.sizes, name)) < least:
            raise ConfigError(name, value, f"must be at least {least}: {why}")

    def _even(self) -> None:
        if self.sizes.seq_len % 2:
            raise ConfigError("seq_len", self.sizes.seq_len, "must be even: a sequence is made of pairs")


class Slots(NamedTuple):
    """Pairs of a sequence in their order: keys [pairs, longest], -1 behind their end, values [pairs, longest], lengths,
    which are noise, what stands there then [pairs, longest key and value], and which show their key first."""

    keys: Array
    values: Array
    key_lens: Array
    value_lens: Array
    noise: Array
    noise_tokens: Array
    fresh: Array


class Recall(Pattern):
    """Keys are of tokens [0, num_keys), values of [num_keys, num_own), noise of those behind."""

    num_pads = 0

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self.num_own = sizes.vocab_size - sizes.num_noise_tokens - self.num_pads
        self.num_keys = self.num_own // 2
        self.num_choices = self.num_own - self.num_keys
        self.longest = sizes.max_key_len + sizes.max_value_len
        longest = max(sizes.max_key_len, sizes.max_value_len)
        special = sizes.vocab_size - self.num_own
        why = f"keys and values need {counted(longest, 'token')} each"
        why += f", and {special} are others" if special else ""
        # Of an odd number of tokens the values have one more.
        least = max(2, sizes.max_key_len * 2, sizes.max_value_len * 2 - 1) + special
        self._at_least("vocab_size", least, why)
        pair = counted(self.longest, "token")
        self._at_least("seq_len", 2 * self.longest, f"a pair is of up to {pair}, and one is there twice")
        if not self.num_pads:
            self._even()

    def draw(self, key: Array, tested: bool) -> Batch:
        """Pairs one after the other, as many as surely fit before the last one, which repeats one of them and ends the
        sequence. What is free lies before the first."""
        of_pairs, of_last = jax.random.split(key)
        slots = self._slots(of_pairs, tested)
        ends = jnp.cumsum(slots.key_lens + slots.value_lens)
        kept = ends <= self.sizes.seq_len - self.longest
        last = jnp.where(kept & slots.fresh, jax.random.uniform(of_last, kept.shape), -1.0).argmax()
        total, last_len = jnp.where(kept, ends, 0).max(), slots.key_lens[last] + slots.value_lens[last]
        starts = jnp.append(ends - slots.key_lens - slots.value_lens, total) + self.sizes.seq_len - total - last_len
        asked = jnp.append(kept & ~slots.fresh & ~slots.noise, True)
        slots = jax.tree.map(lambda rows: jnp.concatenate([rows, rows[last][None]]), slots)
        return self._laid_out(slots, starts[:, None], jnp.append(kept, True)[:, None], asked[:, None])

    def _slots(self, key: Array, tested: bool) -> Slots:
        """As many pairs as could fit if all were the shortest."""
        of_keys, of_values, of_key_lens, of_value_lens, of_noise = jax.random.split(key, 5)
        shortest, longest = self.sizes.max_key_len if tested else 1, self.sizes.max_key_len
        num = (self.sizes.seq_len - self.longest) // (shortest + 1)
        key_lens = jax.random.randint(of_key_lens, (num,), shortest, longest + 1, jnp.int32)
        value_lens = jax.random.randint(of_value_lens, (num,), 1, self.sizes.max_value_len + 1, jnp.int32)
        keys = _motifs(of_keys, num, 0, self.num_keys, longest)
        keys = jnp.where(jnp.arange(longest)[None] < key_lens[:, None], keys, -1)
        values = _motifs(of_values, num, self.num_keys, self.num_own, self.sizes.max_value_len)
        noise, noise_tokens = self._noise(of_noise, num)
        same = (keys[:, None] == keys[None]).all(axis=-1) & ~noise[None]
        slots = jnp.arange(num)
        first = jnp.where(noise, slots, same.argmax(axis=1))  # the pair that showed this key first
        fresh = (first == slots) & ~noise
        return Slots(keys, values[first], key_lens, value_lens[first], noise, noise_tokens, fresh)

    def _laid_out(self, slots: Slots, starts: Array, kept: Array, asked: Array) -> Batch:
        """A sequence with the pairs that are `kept` at `starts`, and the values of those that are `asked`: all
        [pairs, 1]."""
        key_lens, value_lens, noise = (each[:, None] for each in (slots.key_lens, slots.value_lens, slots.noise))
        place = jnp.arange(self.longest, dtype=jnp.int32)[None]
        of_value = place - key_lens + self.sizes.max_key_len  # behind the longest key
        pairs = jnp.concatenate([slots.keys, slots.values], axis=1)
        pairs = jnp.take_along_axis(pairs, jnp.where(place < key_lens, place, of_value), axis=1)
        pairs = jnp.where(noise, slots.noise_tokens, pairs)
        seq_len = self.sizes.seq_len
        index = jnp.where(kept & (place < key_lens + value_lens), starts + place, seq_len)
        tokens = jnp.full(seq_len, self.vocab_size - 1, jnp.int32).at[index].set(pairs, mode="drop")
        place = place[:, : self.sizes.max_value_len]
        real = asked & (place < value_lens)
        positions = jnp.where(real, starts + key_lens + place - 1, 0)
        return Batch(tokens, positions.ravel(), slots.values.ravel(), real.ravel().astype(jnp.float32))

    def _noise(self, key: Array, num_slots: int) -> tuple[Array, Array]:
        """Which slots are noise, all but one at least, and what stands there [num_slots, longest]."""
        of_place, of_share, of_tokens = jax.random.split(key, 3)
        spared = jnp.arange(num_slots) == jax.random.randint(of_place, (), 0, num_slots)
        noise = (jax.random.uniform(of_share, (num_slots,)) < self.sizes.noise_share) & ~spared
        high = max(self.num_own + 1, self.num_own + self.sizes.num_noise_tokens)
        return noise, jax.random.randint(of_tokens, (num_slots, self.longest), self.num_own, high, jnp.int32)


class FuzzyRecall(Recall):
    """The last token of the vocabulary is padding, before the first pair."""

    num_pads = 1


class SelectiveCopying(Pattern):
    """Tokens [0, vocab_size - 2) are copied; the last two are the blank and the copy token. Behind the latter are as
    many blanks as tokens are told."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self._at_least("vocab_size", 3, "the last two tokens are the blank and the copy token")
        self._at_least("seq_len", 2 * sizes.num_copied + 2, f"{sizes.num_copied} tokens stand there, and are told")
        self.num_choices = sizes.vocab_size - 2
        self.prompt_len = sizes.seq_len - sizes.num_copied

    def draw(self, key: Array, tested: bool) -> Batch:
        of_tokens, of_places = jax.random.split(key)
        blank, copy = self.sizes.vocab_size - 2, self.sizes.vocab_size - 1
        copied = jax.random.randint(of_tokens, (self.sizes.num_copied,), 0, blank, jnp.int32)
        scores = jax.random.uniform(of_places, (self.prompt_len - 1,))
        places = jnp.sort(jax.lax.top_k(scores, self.sizes.num_copied)[1])
        tokens = jnp.full(self.num_tokens, blank, jnp.int32).at[places].set(copied).at[self.prompt_len - 1].set(copy)
        positions = jnp.arange(self.prompt_len, self.num_tokens, dtype=jnp.int32)
        return Batch(tokens, positions, copied, jnp.ones(copied.shape, jnp.float32))


class Compression(Pattern):
    """`seq_len` tokens, of which the last is the aggregation token; then a question for each of the others, whose
    tokens are [vocab_size, vocab_size + seq_len - 1)."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self._at_least("vocab_size", 2, "the last token is the aggregation token")
        self.num_choices, self.prompt_len = sizes.vocab_size - 1, sizes.seq_len
        self.num_tokens, self.vocab_size = 2 * sizes.seq_len - 1, sizes.vocab_size + sizes.seq_len - 1

    def draw(self, key: Array, tested: bool) -> Batch:
        told = jax.random.randint(key, (self.sizes.seq_len - 1,), 0, self.num_choices, jnp.int32)
        places = jnp.arange(self.sizes.seq_len - 1, dtype=jnp.int32)
        aggregation = jnp.array([self.sizes.vocab_size - 1], jnp.int32)
        tokens = jnp.concatenate([told, aggregation, self.sizes.vocab_size + places])
        return Batch(tokens, self.prompt_len + places, told, jnp.ones(told.shape, jnp.float32))


class Memorisation(Pattern):
    """Keys are tokens [0, n), values [n, 2 n); the last token of the vocabulary asks for the value of the key before
    it."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self._at_least("vocab_size", 3, "a key, a value, and the token that asks")
        self._even()
        self.num_choices = (sizes.vocab_size - 1) // 2

    @cached_property
    def facts(self) -> np.ndarray:
        """The value of each key [n]: one to one, the same whatever the run's seed."""
        return self.num_choices + np.random.default_rng(12345).permutation(self.num_choices).astype(np.int32)

    def draw(self, key: Array, tested: bool) -> Batch:
        keys = jax.random.randint(key, (self.num_tokens // 2,), 0, self.num_choices, jnp.int32)
        tokens = jnp.stack([keys, jnp.full_like(keys, self.sizes.vocab_size - 1)], axis=1).ravel()
        positions = jnp.arange(1, self.num_tokens, 2, dtype=jnp.int32)
        return Batch(tokens, positions, jnp.asarray(self.facts)[keys], jnp.ones(keys.shape, jnp.float32))


def _motifs(key: Array, num: int, low: int, high: int, length: int) -> Array:
    """[num, length] tokens of [low, high), none twice in one row."""
    if length == 1:
        return jax.random.randint(key, (num, 1), low, high, jnp.int32)
    return jax.lax.top_k(jax.random.uniform(key, (num, high - low)), length)[1].astype(jnp.int32) + low


PATTERNS: dict[str, tuple[type[Pattern], Sizes]] = {
    "in_context_recall": (Recall, Sizes(16, 64)),
    "fuzzy_recall": (FuzzyRecall, Sizes(16, 64, max_key_len=3, max_value_len=3)),
    "noisy_recall": (Recall, Sizes(32, 64, noise_share=0.2, num_noise_tokens=16)),
    "selective_copying": (SelectiveCopying, Sizes(16, 64, num_copied=8)),
    "compression": (Compression, Sizes(16, 32)),
    "memorisation": (Memorisation, Sizes(256, 32)),
}
"""By name, how it is drawn and its sizes where the config says none: vocabularies, noise and lengths of keys and values
as the paper's; sequences are half as long, a quarter in copying, which has half as many tokens to copy."""


@dataclass(frozen=True)
class MadConfig(Schema):
    """What is null is as `PATTERNS` says of the pattern; what a pattern does not have must be null."""

    pattern: str = choice("in_context_recall", PATTERNS)
    vocab_size: int | None = integer(None, 2, 1 << 16, optional=True)
    seq_len: int | None = integer(None, 2, 1 << 12, optional=True)
    noise_share: float | None = real(None, 0.0, 1.0, optional=True)
    num_noise_tokens: int | None = integer(None, 1, 1 << 16, optional=True)
    max_key_len: int | None = integer(None, 1, 16, optional=True)
    max_value_len: int | None = integer(None, 1, 16, optional=True)
    num_copied: int | None = integer(None, 1, 1 << 12, optional=True)
    num_validation: int = integer(256, 1, 1 << 20)
    num_test: int = integer(500, 1, 1 << 20)

    def cross_check(self) -> None:
        _ = self.drawn

    @property
    def drawn(self) -> Pattern:
        """The pattern in its sizes. Raises ConfigError where there is no such sequence."""
        kind, sizes = PATTERNS[self.pattern]
        given = {name: value for name in Sizes._fields if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if getattr(sizes, name) == Sizes._field_defaults.get(name):
                having = [other for other, (_, its) in PATTERNS.items() if getattr(its, name) != getattr(sizes, name)]
                legal = f"must be null with pattern = {self.pattern}: it is one of {', '.join(having)}"
                raise ConfigError(name, value, legal)
        return kind(sizes._replace(**given))


class Mad(Task):
    """Accuracy of the asked labels of one pattern, whose name the slice has."""

    Config = MadConfig
    metric = ACCURACY
    evaluation_fields = ("num_test",)

    def __init__(self, config: MadConfig):
        self.config, self.drawn = config, config.drawn
        self.vocab_size = self.drawn.vocab_size

    @property
    def context_len(self) -> int:
        return self.drawn.num_tokens

    @property
    def num_choices(self) -> int:
        return self.drawn.num_choices

    def train_shapes(self) -> tuple[int, ...]:
        return (self.drawn.num_tokens,)

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        return self.drawn.num_tokens, [0] * num_steps

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        return self._examples(jax.random.split(key, batch_size), False)

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        num = {"validation": self.config.num_validation, "test": self.config.num_test}[split]
        return (EvalSlice(self.config.pattern, self.drawn.num_tokens, self.drawn.prompt_len, num, 0),)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        numbers = jnp.arange(index, index + batch_size, dtype=jnp.int32)
        return self._examples(jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers), True)

    @program(static_argnums=1)
    def _examples(self, keys: Array, tested: bool) -> Batch:
        return jax.vmap(lambda key: self.drawn.draw(key, tested))(keys)
