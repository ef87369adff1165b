"""Multi-query associative recall (Zoology, arXiv 2312.04927): key-value pairs first, then every key once more as a
query.

A sequence holds `num_pairs` pairs in [0, 2 * num_pairs), then random tokens among which each key reappears once; its
label is the key's value. Query places follow a power law over even offsets, drawn without replacement, near ones more
likely.

With `writes` = 2 the later half of the pairs has the keys of the earlier half, with other values: only those are asked
for. A memory must then replace what a key held, which a sum of outer products cannot (arXiv 2412.06464).
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.programs import program
from kvlab.schema import ConfigError, Schema, added, flag, integer, integers, real, texts
from kvlab.tasks.base import Batch, EvalSlice, Task, round_robin
from kvlab.tasks.metrics import ACCURACY
from kvlab.typing import PyTree


@dataclass(frozen=True)
class MqarConfig(Schema):
    """Slices are "length:pairs". `train` is a mixture with `train_weights`; test slices are drawn apart from
    validation.

    The pairs are the prompt: a memory that compresses does so at their end. With `num_turns` = 2 the queries in the
    later half of the places are a second turn. With `query_aware` compression waits for that turn: it has then seen
    the first one's queries, which a full memory answered, and only the second tells what it lost.
    """

    vocab_size: int = integer(512, 8, 1 << 20)
    train: tuple[str, ...] = texts(("64:4", "64:8", "64:16", "128:32"), min_len=1)
    train_weights: tuple[int, ...] = integers((4, 2, 2, 1), 1, 1000, min_len=1)
    test: tuple[str, ...] = texts(("64:4", "64:8", "64:16", "128:32"), min_len=1)
    power: float = real(0.01, 0.0, 10.0, open_low=True)
    num_validation: int = integer(256, 1, 1 << 20)
    num_test: int = integer(500, 1, 1 << 20)
    num_turns: int = added(integer(1, 1, 2))
    query_aware: bool = added(flag(False))
    writes: int = added(integer(1, 1, 2))

    def cross_check(self) -> None:
        if self.query_aware and self.num_turns == 1:
            legal = "must be false with num_turns = 1: no question would come after the compression"
            raise ConfigError("query_aware", True, legal)
        for name, slices in (("train", self.train), ("test", self.test)):
            if len(set(slices)) < len(slices):
                raise ConfigError(name, list(slices), "must not name a slice twice")
            for text in slices:
                length, pairs = parse_slice(name, text)
                if length > 1 << 20:
                    raise ConfigError(name, text, f"length must be at most {1 << 20}")
                if pairs > self.vocab_size // 2 - 1:
                    limit = self.vocab_size // 2 - 1
                    raise ConfigError(name, text, f"vocab_size = {self.vocab_size} has keys for at most {limit} pairs")
                if pairs % self.writes:
                    raise ConfigError(name, text, f"must have an even number of pairs with writes = {self.writes}")
                if 4 * pairs > length:
                    raise ConfigError(name, text, f"length {length} has room for at most {length // 4} pairs")
                if name == "test" and self.num_turns == 2 and second_turn(length, pairs) >= length:
                    raise ConfigError(name, text, "has no places for the queries of a second turn")
        if len(self.train_weights) != len(self.train):
            raise ConfigError(
                "train_weights", list(self.train_weights), f"must have {len(self.train)} entries, as train"
            )


def parse_slice(field: str, text: str) -> tuple[int, int]:
    """ "128:32" as (length, pairs). Raises ConfigError."""
    length, _, pairs = text.partition(":")
    if not (length.isdigit() and pairs.isdigit() and int(pairs) >= 1):
        raise ConfigError(field, text, "must be length:pairs with positive integers, such as 64:4")
    return int(length), int(pairs)


def second_turn(length: int, pairs: int) -> int:
    """Where the later half of the places of queries begins, which are the even ones of [2 * pairs, length)."""
    num_places = (length - 2 * pairs) // 2
    return length - length % 2 - 2 * (num_places // 2)


class Mqar(Task):
    """Accuracy of the recalled values, averaged over test slices. Knob: the number of pairs."""

    Config = MqarConfig
    metric = ACCURACY
    evaluation_fields = ("num_test", "num_turns", "query_aware")
    training_fields = ("train", "train_weights", "num_validation")

    def __init__(self, config: MqarConfig):
        self.config = config
        self.vocab_size = config.vocab_size
        self._mixture = [(*parse_slice("train", s), w) for s, w in zip(config.train, config.train_weights, strict=True)]

    @property
    def context_len(self) -> int:
        return max(eval_slice.seq_len for eval_slice in self.slices("test"))

    @property
    def num_choices(self) -> int:
        return self.vocab_size - self.vocab_size // 2

    def train_shapes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(length for length, _, _ in self._mixture))

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """One period of sequence lengths, call by call."""
        shapes = self.train_shapes()
        weights = tuple(sum(w for n, _, w in self._mixture if n == length) for length in shapes)
        return tuple(shapes[i] for i in round_robin(weights))

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        lengths = self._lengths
        periods, place = divmod(call, len(lengths))
        length = lengths[place]
        earlier = periods * lengths.count(length) + lengths[:place].count(length)
        pairs = [(p, w) for n, p, w in self._mixture if n == length]
        order = round_robin(tuple(w for _, w in pairs))
        return length, [pairs[order[(earlier * num_steps + i) % len(order)]][0] for i in range(num_steps)]

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        most = max(p for n, p, _ in self._mixture if n == seq_len)
        return self._generate(key, batch_size, seq_len, most, knob)

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        num = {"validation": self.config.num_validation, "test": self.config.num_test}[split]
        parsed = [(text, *parse_slice("test", text)) for text in self.config.test]
        found = []
        for text, length, pairs in parsed:
            second = second_turn(length, pairs)
            prompt_len = second if self.config.query_aware else 2 * pairs
            turns = (second,) if self.config.num_turns == 2 else ()
            found.append(EvalSlice(text, length, prompt_len, num, pairs, prompt_len, turns))
        return tuple(found)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        key = jax.random.fold_in(jax.random.fold_in(key, part.seq_len), part.knob)
        slices = (parse_slice("test", each) for each in self.config.test)
        most = max(
            pairs for length, pairs in slices if length == part.seq_len
        )  # one program for all slices of a length
        examples = jnp.arange(index, index + batch_size, dtype=jnp.int32)
        return self._examples(key, examples, part.seq_len, most, jnp.asarray(part.knob, jnp.int32))

    @program(static_argnums=(2, 3))
    def _examples(self, key: Array, examples: Array, seq_len: int, most_pairs: int, num_pairs: Array) -> Batch:
        """Each example from its own number, so that it is the same whatever batch it comes in. One after the other:
        draws side by side take a CPU twice as long to compile. Accelerators were not measured."""

        def example_of(example: Array) -> Batch:
            batch = self._generate(jax.random.fold_in(key, example), 1, seq_len, most_pairs, num_pairs)
            return jax.tree.map(lambda x: x[0], batch)

        return jax.lax.map(example_of, examples)

    @program(static_argnums=(1, 2, 3))
    def _generate(self, key: Array, batch_size: int, seq_len: int, most_pairs: int, num_pairs: Array) -> Batch:
        """A batch with `num_pairs` <= most_pairs (traced) pairs a sequence; shapes depend on most_pairs only."""
        key_keys, key_values, key_places, key_noise = jax.random.split(key, 4)
        half = self.vocab_size // 2
        rows = jnp.arange(batch_size, dtype=jnp.int32)[:, None]
        pair = jnp.arange(most_pairs, dtype=jnp.int32)[None, :]
        real_pair = jnp.broadcast_to(pair < num_pairs, (batch_size, most_pairs))

        def draw(key: Array, low: int, high: int) -> Array:  # most_pairs of [low, high) without replacement
            scores = jax.random.uniform(key, (batch_size, high - low))
            return jax.lax.top_k(scores, most_pairs)[1].astype(jnp.int32) + low

        keys, values = draw(key_keys, 1, half), draw(key_values, half, self.vocab_size)
        asked = real_pair
        if self.config.writes == 2:
            keys = jnp.take_along_axis(keys, jnp.broadcast_to(pair % (num_pairs // 2), keys.shape), axis=1)
            asked = asked & (pair >= num_pairs // 2)
        # Gumbel top-k: a draw without replacement with probabilities proportional to gap ** (power - 1).
        num_gaps = max((seq_len - 2 * pairs) // 2 for pairs in range(1, most_pairs + 1))
        gap = jnp.arange(num_gaps, dtype=jnp.int32)[None, :]
        weight = (self.config.power - 1) * jnp.log(gap.astype(jnp.float32) + 1)
        scores = weight + jax.random.gumbel(key_places, (batch_size, num_gaps))
        scores = jnp.where(gap < (seq_len - 2 * num_pairs) // 2, scores, -jnp.inf)
        gaps = jax.lax.top_k(scores, most_pairs)[1].astype(jnp.int32)
        places = 2 * num_pairs + 2 * gaps

        tokens = jax.random.randint(key_noise, (batch_size, seq_len), 0, self.vocab_size, jnp.int32)
        for index, drawn, mine in (
            (2 * pair, keys, real_pair),
            (2 * pair + 1, values, real_pair),
            (places, keys, asked),
        ):
            index = jnp.where(mine, index, seq_len)  # padding pairs are written out of range, that is nowhere
            tokens = tokens.at[rows, index].set(drawn, mode="drop")
        return Batch(tokens, jnp.where(asked, places, 0), values, asked.astype(jnp.float32))


def _written_once(config: MqarConfig) -> None:
    if config.writes != 1:
        raise ValueError(f"writes = {config.writes}: must be 1, the closed form knows no older value")


def window_accuracy(config: MqarConfig, name: str, window: int, num_examples: int = 4000, seed: int = 0) -> float:
    """Closed form for one windowed attention layer behind a short convolution (Based, arXiv 2402.18668, Fig. 2): a pair
    is recoverable iff its value lies among the `window` tokens visible from the query. The mean over random examples
    (drawn with numpy, apart from the task's own sampler), with a blind guess among the values elsewhere. Raises
    ValueError where keys are written twice."""
    _written_once(config)
    length, pairs = parse_slice("test", name)
    gaps = np.arange((length - 2 * pairs) // 2)
    noise = np.random.default_rng(seed).gumbel(size=(num_examples, len(gaps)))
    drawn = np.argsort(-((config.power - 1) * np.log(gaps + 1) + noise), axis=1)[:, :pairs]
    distance = 2 * pairs + 2 * drawn - (2 * np.arange(pairs)[None, :] + 1)
    seen = float((distance < window).mean())
    return seen + (1 - seen) / (config.vocab_size - config.vocab_size // 2)


def kept_accuracy(config: MqarConfig, name: str, keep: int, sinks: int, recent: int, *, by: str = "recency") -> float:
    """Closed form for one attention layer behind a short convolution whose prompt, the pairs, is compacted to `keep`
    slots that all heads share: the first `sinks`, and the newest ("recency"), or `recent` of these and a random set of
    the others ("random"). A pair is recalled iff the slot of its value stays, and guessed among the values elsewhere.
    Raises ValueError for any other rule, and where keys are written twice."""
    _written_once(config)
    num_slots = 2 * parse_slice("test", name)[1]
    keep, sinks = min(keep, num_slots), min(sinks, keep, num_slots)
    recent = keep - sinks if by == "recency" else min(recent, keep - sinks)
    places = np.arange(1, num_slots, 2)
    stays = (places < sinks) | (places >= num_slots - recent)
    if by not in ("recency", "random"):
        raise ValueError(f"by = {by!r}: must be recency or random")
    drawn_from = num_slots - sinks - recent
    share = (keep - sinks - recent) / drawn_from if drawn_from else 0.0
    seen = float(np.where(stays, 1.0, share).mean())
    return seen + (1 - seen) / (config.vocab_size - config.vocab_size // 2)
