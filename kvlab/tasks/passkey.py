"""Two pass keys in a long text, and two questions about them, each asked of the text alone: the second finds what a
memory kept for the first alone (SCBench, arXiv 2412.10319)."""

from collections import Counter
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.schema import ConfigError, added, choice
from kvlab.tasks.base import Batch, EvalSlice
from kvlab.tasks.haystack import Haystack, HaystackConfig

NAMES = ("Alice", "Carol", "David", "Henry", "Laura", "Peter", "Susan", "James", "Helen", "Roger")
"""Whose pass keys they are: names of five letters, so that their questions have equally many bytes."""
NUM_DIGITS = 5
STATED = ("\nThe pass key of {name} is ", ". Remember it: ", " is the pass key of {name}.\n")
"""What stands around a key, which is stated twice."""
FIRST_QUESTION = "\nThe pass key of {name} is "
SECOND_QUESTION = "\nWhich number was {name} told to remember? It was "
"""In another form: a question like the first would find what the first one's words made a method keep."""

LEFT_OPEN = 2
"""Tokens of the first question's end (its verb and a space) that do not stand before the second one."""


@dataclass(frozen=True)
class PasskeyConfig(HaystackConfig):
    """As `HaystackConfig`: `num_test` examples for each length of `contexts`. The keys lie in [10%, 80%) of the text.
    No memory has seen the second question when it compresses, which is of another form; with `query_aware` it has seen
    the first one, whose words are then part of the context, but for the last two tokens. `second_form` "same" asks as
    the first question does: small published models understand no other."""

    second_form: str = added(choice("other", ("other", "same")))

    def cross_check(self) -> None:
        super().cross_check()
        least = Passkey(self).least_context
        if min(self.contexts) < least:
            legal = f"must be at least {least}: two pass keys, two questions and some text"
            raise ConfigError("contexts", min(self.contexts), legal)


class Passkey(Haystack[PasskeyConfig]):
    """Accuracy of the keys' digits, each predicted behind the true ones before it, averaged over slices. A context
    has two of them, of the same examples: the second asks for the other key."""

    Config = PasskeyConfig
    evaluation_fields = ("num_test",)  # with `query_aware` validation asks in another way too

    def __init__(self, config: PasskeyConfig):
        """Raises ConfigError for a tokenizer that cuts no two names alike."""
        super().__init__(config)
        questions = FIRST_QUESTION, FIRST_QUESTION if config.second_form == "same" else SECOND_QUESTION
        cut = {}  # names that this tokenizer does not know may be the same to it
        for name in NAMES:
            parts = [self.ids(words.format(name=name)) for words in (*STATED, *questions)]
            cut[np.concatenate(parts).tobytes()] = parts
        lengths = {key: tuple(map(len, parts)) for key, parts in cut.items()}
        ((common, count),) = Counter(lengths.values()).most_common(1)
        if count < 2:
            raise ConfigError("tokenizer", config.tokenizer, f"must cut two of these names alike: {', '.join(NAMES)}")
        alike = [parts for key, parts in cut.items() if lengths[key] == common]
        self._opening, self._between, self._closing, self._first, self._second = map(np.stack, zip(*alike, strict=True))

    @property
    def fixed_parts(self) -> tuple[np.ndarray, ...]:
        return self._opening, self._between, self._closing, self._first, self._second

    @property
    def needle_len(self) -> int:
        """Tokens of a statement, in which its key is twice."""
        return self._opening.shape[1] + self._between.shape[1] + self._closing.shape[1] + 2 * NUM_DIGITS

    @property
    def _turns_len(self) -> tuple[int, int]:
        """Tokens of each question with its answer."""
        return self._first.shape[1] + NUM_DIGITS, self._second.shape[1] + NUM_DIGITS

    @property
    def least_context(self) -> int:
        """Tokens of both needles and both turns, and ten of text around them."""
        return 2 * self.needle_len + sum(self._turns_len) + 10

    def knobs(self, key: Array, batch_size: int) -> Array:
        return jnp.zeros((batch_size,), jnp.int32)

    @property
    def context_len(self) -> int:
        return max(part.seq_len for part in self.slices("test"))

    @property
    def _asked_before(self) -> int:
        """Tokens of the first question that stand before the second: none, or with `query_aware` all but the last two.
        Were it whole, a small model would answer it."""
        return self._first.shape[1] - LEFT_OPEN if self.config.query_aware else 0

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        """For each context its first turn and then its second, of the same examples."""
        found, (first, second) = [], self._turns_len
        asked, num = self._first.shape[1], self.num_examples(split)
        for context in self.config.contexts:
            text_len = context - first - second
            compress_at = text_len + (asked - 1 if self.config.query_aware else 0)
            found.append(EvalSlice(str(context), text_len + first, text_len + asked, num, 0, compress_at))
            turn = text_len + self._asked_before
            sizes = turn + second, turn + second - NUM_DIGITS
            found.append(EvalSlice(f"{context} second", *sizes, num, 1, turn, (turn,)))
        return tuple(found)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        """A turn of the examples: the other turn's answer does not stand in it."""
        first, second = self._turns_len
        left_out = first - self._asked_before if part.knob else second
        context = part.seq_len + left_out
        whole = super().eval_batch(key, split, replace(part, seq_len=context, knob=0), index, batch_size)
        labels = slice(NUM_DIGITS, None) if part.knob else slice(NUM_DIGITS)
        tokens = whole.tokens[:, :-second]
        if part.knob:
            before = context - second - left_out
            tokens = jnp.concatenate([whole.tokens[:, :before], whole.tokens[:, -second:]], axis=1)
        return Batch(
            tokens,
            whole.label_positions[:, labels] - (left_out if part.knob else 0),
            whole.labels[:, labels],
            whole.weights[:, labels],
        )

    def example(self, haystack: Array, key: Array, seq_len: int, knob: Array) -> Batch:
        """[text, key, text, other key, text, question, answer, other question, answer]: one row, answers labelled. What
        training sees; an evaluation takes one turn of it."""
        key_start, key_names, key_numbers, key_places, key_order = jax.random.split(key, 5)
        names = jax.random.permutation(key_names, len(self._opening))[:2].astype(jnp.int32)
        lowest = jnp.asarray([1, *[0] * (NUM_DIGITS - 1)], jnp.int32)  # a number has no leading zero
        drawn = jax.random.randint(key_numbers, (2, NUM_DIGITS), lowest, 10, jnp.int32)
        numbers = jnp.asarray(self.digits)[drawn]

        def of(parts: np.ndarray) -> Array:
            return jnp.asarray(parts)[names]

        stated = [of(self._opening), numbers, of(self._between), numbers, of(self._closing)]
        needles = jnp.concatenate(stated, axis=1)
        asked = jax.random.permutation(key_order, 2).astype(jnp.int32)
        first, second = of(self._first)[asked[0]], of(self._second)[asked[1]]
        turns = jnp.concatenate([first, numbers[asked[0]], second, numbers[asked[1]]])

        body_len = seq_len - needles.size - len(turns)
        start = jax.random.randint(key_start, (), 0, haystack.shape[0] - seq_len, jnp.int32)
        body = jax.lax.dynamic_slice_in_dim(haystack, start, body_len)
        places = jax.random.randint(key_places, (2,), body_len // 10, body_len * 8 // 10, jnp.int32)
        tokens = jnp.concatenate([_inserted(body, needles, jnp.sort(places)), turns])
        digit = jnp.arange(NUM_DIGITS, dtype=jnp.int32) - 1
        second_answer = seq_len - NUM_DIGITS
        first_answer = second_answer - len(second) - NUM_DIGITS
        before = jnp.concatenate([first_answer + digit, second_answer + digit])
        return Batch(tokens, before, numbers[asked].reshape(-1), jnp.ones(2 * NUM_DIGITS))


def _inserted(body: Array, needles: Array, places: Array) -> Array:
    """A text with two needles [2, N] put in before its tokens at two ascending places."""
    body_len, needle_len = len(body), needles.shape[1]
    pieces = jnp.concatenate([body, needles.reshape(-1)])
    place = jnp.arange(body_len + 2 * needle_len, dtype=jnp.int32)
    first, second = places[0], places[1] + needle_len  # where they begin in the whole
    source = jnp.where(place < first, place, place - needle_len)
    source = jnp.where(place < second, source, place - 2 * needle_len)
    source = jnp.where((place >= first) & (place < first + needle_len), body_len + place - first, source)
    is_second = (place >= second) & (place < second + needle_len)
    return pieces[jnp.where(is_second, body_len + needle_len + place - second, source)]
