"""Methods that read on behind the prompt before it is compacted, and keep what is attended to then: KVzip reads the
prompt once more, the oracle what really follows. What is read is forgotten at once."""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Attended, Compression, Noted, PassLens, Shape, Slots, as_noted, as_scored, grouped
from kvlab.ledger.states import ArraySpec, PerToken
from kvlab.schema import choice, integer, integers

SHARES = ("head", "layer")


@dataclass(frozen=True)
class SecondPass(Compression, abc.ABC):
    """Keeps the slots with the largest weight that any query of the pass gives them, over the query heads of a group.
    With `share` "layer" the heads of a layer keep the same slots, by the mean of their scores.

    A pass belongs to the prompt's end, so that `at` and `every` say nothing else. Bytes: 4 a slot and head that a
    sequence can store, and, while a prompt is compacted, the pages of the longest pass. Time: that of the pass.
    """

    uses_readers: ClassVar[bool] = True
    by_slot: ClassVar[tuple[str, ...]] = ("attention",)

    at: str = choice("end", ("end",))
    every: int = integer(0, 0, 0)
    share: str = choice("head", SHARES)

    @abc.abstractmethod
    def pieces(self, prompt: Sequence[int], future: Sequence[int] | None) -> Iterator[list[int]]:
        """What is read, piece by piece: each continues the prompt and is forgotten before the next. `future` are the
        tokens that will follow the prompt; None: nobody knows. Raises ValueError where the method must know them."""

    def statistics(self, state: PerToken, shape: Shape) -> tuple[ArraySpec, ...]:
        return (ArraySpec("attention", (shape.num_slots, state.arrays[0].shape[0]), "float32"),)

    def observe(self, noted: Noted, seen: Attended) -> Noted:
        return noted

    def listen(self, noted: Noted, seen: Attended) -> Noted:
        num_slots, num_kv_heads = noted["attention"].shape[1:]
        weights = jnp.where(seen.real[:, :, None, None], seen.weigh(), 0)
        most = as_noted(grouped(weights, num_kv_heads).max(axis=(1, 3)), num_slots)
        return {"attention": jnp.maximum(noted["attention"], most)}

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        most = as_scored(slots.noted["attention"], slots.keys.shape[2])
        return most if self.share == "head" else slots.everywhere(most.mean(axis=1))


@dataclass(frozen=True)
class KVzip(SecondPass):
    """What repeating the prompt attends to (KVzip, arXiv 2505.23416), whatever is asked later. The prompt is repeated
    `repeat_len` tokens at a time; behind the first, the last `anchor` tokens of the piece before come first. `prefix`
    are the token ids of the instruction, such as "Repeat the previous context exactly"; a model that was trained on a
    task of its own needs none. The published code weighs a piece's queries over that piece's slots alone; here they
    are weighed over all, which differs only where a prompt has several pieces. Every head keeps as many."""

    name: ClassVar[str] = "kvzip"

    recent: int = integer(0, 0, 1 << 20)
    repeat_len: int = integer(2048, 1, 1 << 20)
    anchor: int = integer(8, 0, 4096)
    prefix: tuple[int, ...] = integers((), 0)

    def second_pass(self, max_len: int, prompt_len: int | None = None) -> PassLens:
        prompt_len = max_len if prompt_len is None else prompt_len
        anchor = min(self.anchor, self.repeat_len) if prompt_len > self.repeat_len else 0
        num_read = len(self.prefix) + anchor + min(prompt_len, self.repeat_len)
        return PassLens(num_read, prompt_len + num_read)

    def pieces(self, prompt: Sequence[int], future: Sequence[int] | None) -> Iterator[list[int]]:
        anchor = min(self.anchor, self.repeat_len)
        for start in range(0, len(prompt), self.repeat_len):
            begin = max(0, start - anchor) if start else 0
            yield [*self.prefix, *prompt[begin : start + self.repeat_len]]


@dataclass(frozen=True)
class Oracle(SecondPass):
    """What the tokens that really follow attend to: what no method can know, the upper control of all that score by
    attention. For evaluation only."""

    name: ClassVar[str] = "oracle"

    def second_pass(self, max_len: int, prompt_len: int | None = None) -> PassLens:
        return PassLens(max_len - (1 if prompt_len is None else prompt_len), max_len)

    def pieces(self, prompt: Sequence[int], future: Sequence[int] | None) -> Iterator[list[int]]:
        if future is None:
            raise ValueError("compression = oracle: must know the tokens that follow, which only an evaluation does")
        if len(future):
            yield list(future)
