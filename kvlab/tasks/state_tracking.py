"""State tracking: the product of all group elements so far, at every token (arXiv 2404.08819, 2411.12537).

Tokens are elements of a group, labels the running product. Parity is the group of two elements; S3 and S5 are the
permutations of three and five things, of which S5 cannot be tracked by any model of fixed depth whose states only add
up. A model that has learned lengths, and not the state, is right up to the training length and guesses behind it: so
the test has a slice that scores what lies behind it, alone.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jaxtyping import Int32

from kvlab.schema import ConfigError, Schema, choice, integer
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.metrics import ACCURACY
from kvlab.typing import PyTree, Tokens

GROUPS = {"parity": 2, "s3": 3, "s5": 5}
"""By name, how many things are permuted."""


@dataclass(frozen=True)
class StateTrackingConfig(Schema):
    """Trained on `seq_len` tokens; tested on as many, and on tokens [seq_len, test_len) of longer sequences."""

    group: str = choice("parity", GROUPS)
    seq_len: int = integer(40, 2, 1 << 16)
    test_len: int = integer(256, 3, 1 << 16)
    num_validation: int = integer(64, 1, 1 << 20)
    num_test: int = integer(256, 1, 1 << 20)

    def cross_check(self) -> None:
        if self.test_len <= self.seq_len:
            raise ConfigError("test_len", self.test_len, f"must exceed seq_len = {self.seq_len}")


class StateTracking(Task):
    """Accuracy of the running product, averaged over the training length and what lies behind it."""

    Config = StateTrackingConfig
    metric = ACCURACY
    evaluation_fields = ("num_test", "test_len")

    def __init__(self, config: StateTrackingConfig):
        self.config = config
        self.vocab_size = len(self.products)

    @cached_property
    def products(self) -> npt.NDArray[np.int32]:
        """[elements, elements]: the number of a, then b."""
        elements = list(permutations(range(GROUPS[self.config.group])))
        number = {element: place for place, element in enumerate(elements)}
        return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements], np.int32)

    @property
    def context_len(self) -> int:
        return self.config.test_len

    @property
    def num_choices(self) -> int:
        return self.vocab_size

    def train_shapes(self) -> tuple[int, ...]:
        return (self.config.seq_len,)

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        return self.config.seq_len, [0] * num_steps

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        tokens = jax.random.randint(key, (batch_size, seq_len), 0, self.vocab_size, jnp.int32)
        return self._scored(tokens, 0)

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        num = {"validation": self.config.num_validation, "test": self.config.num_test}[split]
        near, far = self.config.seq_len, self.config.test_len
        beyond = EvalSlice(f"{near} to {far}", far, near, num, near)
        return (EvalSlice(f"0 to {near}", near, near // 2, num, 0), *([beyond] if split == "test" else []))

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(index, index + batch_size))
        draw = jax.vmap(lambda key: jax.random.randint(key, (part.seq_len,), 0, self.vocab_size, jnp.int32))
        return self._scored(draw(keys), part.knob)

    def _scored(self, tokens: Array, first: int) -> Batch:
        """Tokens [B, T] with their running products, of which those from `first` on count."""
        labels = running_products(tokens, jnp.asarray(self.products))
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
        return Batch(tokens, places, labels, (places >= first).astype(jnp.float32))


@jax.jit
def running_products(tokens: Tokens, products: Int32[Array, "V V"]) -> Tokens:
    """[B, T] the product of each row's tokens up to each place."""
    return jax.lax.associative_scan(lambda a, b: products[a, b], tokens, axis=1)
