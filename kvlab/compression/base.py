"""What a compression is: which tokens of a sequence stay in memory. A method is a file of its own.

A method scores the slots that a sequence stores; the framework selects, packs what stays to the front of whole pages
and gives the rest back. A method sees what is stored, and what it noted of the queries; it cannot say how many bytes it
holds, because that is counted elsewhere.
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from kvlab.compression.budget import Budget, share_that_fits, slots_of
from kvlab.ledger.memory_states import Statistics
from kvlab.ledger.pyramid import Pyramid
from kvlab.ledger.readers import Readers
from kvlab.ledger.retention import AT, Retention, Sealing
from kvlab.ledger.states import ArraySpec, PerToken, RetrievalState, State, TokenState
from kvlab.schema import ConfigError, Schema, choice, integer, real
from kvlab.units import counted
from pallas_kernels.masking import soft_capped

HEADS = ("uniform", "ada")
"""How a layer's slots are dealt to its heads."""

LAYERS = ("uniform", "pyramid")
"""How a budget is dealt to layers."""

type Noted = dict[str, Array]
"""What a method remembers of each sequence beside its tokens: arrays [B, ...] by name."""


class Part(NamedTuple):
    """One of the states that a memory holds in the place of a mixer's, and what is kept of it; None: everything."""

    state: State
    retention: Retention | None = None
    heads: tuple[int, ...] | None = None
    """The KV heads of the mixer's state that it holds; None: all of them."""
    sealing: Sealing | None = None
    """When its full pages are sealed; None: never."""


class Shape(NamedTuple):
    """The memory that a method is to work in."""

    budget: Budget
    num_slots: int
    """The most slots that a sequence ever stores."""
    chunk_len: int
    layer: int
    """Among the layers that are compressed, and below how many there are."""
    num_layers: int
    page_size: int = 1


class PassLens(NamedTuple):
    """The most tokens that are read behind a prompt, and the longest that prompt and they are together."""

    num_read: int
    total_len: int


@dataclass(frozen=True)
class Attended:
    """One step's queries of a layer and what they attended to, before anything is dropped."""

    queries: Float[Array, "B T H D"]
    """Scaled and rotated, in float32: the score of key k is queries @ k, soft cap apart."""
    positions: Int32[Array, "B T"]
    """Token positions."""
    slots: Int32[Array, "B T"]
    """The slot of each query's own token, which is the last that it sees."""
    real: Bool[Array, "B T"]
    """Which are tokens rather than padding."""
    weigh: Any
    """() -> [B, T, H, S] softmax weights over slots, zero where nothing is seen. Costs another product with all
    keys."""
    readers: Readers | None = None
    """How these queries read the state."""


@dataclass(frozen=True)
class Slots:
    """What a sequence stores of one layer when it is compacted; slots past `stored` are zero."""

    keys: Float[Array, "B K N D"]
    values: Float[Array, "B K N Dv"]
    stored: Int32[Array, "B"]
    lengths: Int32[Array, "B"]
    """Tokens of the sequence: at least as many as slots."""
    noted: Noted
    readers: Readers | None
    seeds: Int32[Array, "B"]
    layer: int

    @property
    def valid(self) -> Bool[Array, "B N"]:
        """Which slots hold a token."""
        return jnp.arange(self.keys.shape[2], dtype=jnp.int32)[None, :] < self.stored[:, None]

    def capped(self, scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scores of queries under the soft cap of those who read the state, if there is one."""
        return soft_capped(scores, None if self.readers is None else self.readers.soft_cap)

    def everywhere(self, by_slot: Float[Array, "B N"]) -> Float[Array, "B K N"]:
        """The same score for every head."""
        return jnp.broadcast_to(by_slot[:, None, :], self.keys.shape[:3])

    def mean(self, x: Array) -> Array:
        """The mean [B, K, 1, D] of x [B, K, N, D] over the slots that hold a token."""
        total = jnp.where(self.valid[:, None, :, None], x, 0).sum(axis=2, keepdims=True)
        return total / self.num_stored[:, None, None, None]

    @property
    def num_stored(self) -> Float[Array, "B"]:
        """`stored` as a divisor: at least 1."""
        return jnp.maximum(self.stored, 1).astype(jnp.float32)


@dataclass(frozen=True)
class Compression(Schema, abc.ABC):
    """The base of every method. The first `sinks` slots and the last `recent` ones are never dropped; both count as
    part of the budget. `at` "end" compacts a prompt once it is complete, "chunks" after each chunk of it, which bounds
    the peak. Decoding sequences are compacted whenever they store `every` slots more than the budget; 0: never.

    `layers` says how the budget is dealt to layers: "uniform", or as a "pyramid" that falls linearly from the first
    layer to the last, whose slots beyond those protected are a `beta`-th of the mean's (PyramidKV, arXiv 2406.02069).
    Both hold the same slots in sum.

    `heads` says how the slots of a layer are dealt to its KV heads: "uniform", each as many; or "ada", by their scores
    (AdaKV, arXiv 2407.11550), of which each keeps at least a share of `safeguard` of the mean. Both hold the same
    pages; of "ada" counts are whole tiles, a page's slots of one head, so that a budget is rounded down to whole pages.
    """

    name: ClassVar[str] = ""
    uses_readers: ClassVar[bool] = False
    """Whether scores come from queries: the mixer must then say who reads its state (`Readers`)."""
    weighs: ClassVar[bool] = False
    """Whether `observe` asks for weights over all slots, so that every step reads the keys once more."""
    of_last_layer: ClassVar[bool] = False
    """Whether, of several layers that read the same tokens, what is noted is of the last one alone; elsewhere each adds
    to what those before it noted."""
    by_slot: ClassVar[tuple[str, ...]] = ()
    """Names of statistics whose first axis is slots: they move with them."""
    by_place: ClassVar[bool] = False
    """Whether a score depends on the place of a slot among the others, rather than on what it holds alone."""

    sinks: int = integer(4, 0, 65536)
    recent: int = integer(8, 0, 1 << 20)
    at: str = choice("end", AT)
    every: int = integer(0, 0, 1 << 20)
    layers: str = choice("uniform", LAYERS)
    beta: int = integer(20, 1, 1000)
    heads: str = choice("uniform", HEADS)
    safeguard: float = real(0.2, 0.0, 1.0)

    @abc.abstractmethod
    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        """What each slot is worth; the highest stay, the newer one where two are equal. Traced."""

    def statistics(self, state: PerToken, shape: Shape) -> tuple[ArraySpec, ...]:
        """What must be remembered of each sequence beside its tokens; nothing: scores need only what is stored."""
        return ()

    def observe(self, noted: Noted, seen: Attended) -> Noted:
        """The statistics after a step's attention. Traced; called only where there are any."""
        raise NotImplementedError

    def second_pass(self, max_len: int, prompt_len: int | None = None) -> PassLens:
        """How far is read behind a prompt before it is compacted, for what is attended to, and forgotten at once
        (`SecondPass`), in a memory of sequences of up to `max_len` tokens; None: of any prompt."""
        return PassLens(0, max_len)

    def listen(self, noted: Noted, seen: Attended) -> Noted:
        """The statistics after a step of such a pass. Traced."""
        raise NotImplementedError

    def skips(self, state: State) -> str:
        """Why a state is left as it is; empty: it is compressed."""
        if not state.per_token:
            return "one state a sequence cannot be dropped in part"
        if state.span is not None:
            return "a window forgets by itself"
        if isinstance(state, RetrievalState):
            return "a retrieval memory chooses by its own index"
        return ""

    def retention(self, state: State, shape: Shape) -> Retention | None:
        """How many slots are kept of a state, and when; None: it is never compacted. Raises ConfigError for a budget
        below what is protected."""
        budget, protected = shape.budget, self.sinks + self.recent
        if budget.num_bytes is not None:
            legal = "must be slots or a fraction here: bytes are solved before (kvlab.memory.budgets)"
            raise ConfigError("memory.compression.budget", str(budget), legal)
        unit = shape.page_size if self.heads == "ada" else 1
        if unit > 1 and budget.slots is not None and budget.slots // unit * unit < max(1, protected):
            least = max(1, -(-protected // unit)) * unit
            legal = f"must be at least {counted(least, 'slot')} with heads = ada: whole pages of {unit}"
            raise ConfigError("memory.budget", str(budget), legal)
        if budget.slots is not None and budget.slots < max(1, protected):
            legal = f"must be at least the {counted(protected, 'slot')} that sinks = {self.sinks} "
            legal += f"and recent = {self.recent} keep"
            raise ConfigError("memory.budget", str(budget), legal)
        pyramid = Pyramid(shape.layer, shape.num_layers, self.beta) if self.layers == "pyramid" else None
        return Retention(budget.slots, budget.fraction, protected, self.at, shape.chunk_len, self.every, unit, pyramid)

    def too_short(self, fraction: float, lengths: Mapping[str, int]) -> str:
        """Why a fraction leaves less of some prompt than is protected, and what would fit all of them; empty: it leaves
        enough. Lengths are by what the sentence says of their tokens, such as "of this prompt"."""
        protected = self.sinks + self.recent
        found = {name: n for name, n in lengths.items() if slots_of(fraction, n) < protected < n}
        if not found:
            return ""
        name, length = min(found.items(), key=lambda item: item[1])
        said = f"is {counted(slots_of(fraction, length), 'slot')} of the {counted(length, 'token')} {name}, fewer than"
        said += f" the {protected} that"
        said += f" memory.compression.sinks = {self.sinks} and recent = {self.recent} protect"
        said += f"; give budget={math.ceil(100 * protected / length) / 100:g}"
        if share := share_that_fits(fraction, length, lengths.values()):
            given = {"sinks": min(self.sinks, share), "recent": min(self.recent, share)}
            if getattr(self, "window", 0) > given["recent"]:
                given["window"] = given["recent"]
            said += f", or {' '.join(f'memory.compression.{field}={value}' for field, value in given.items())}"
        return said

    def parts(self, state: State, shape: Shape) -> Mapping[str, Part]:
        """What a memory holds in the place of a state: "" is the tokens themselves. Raises ConfigError for a state that
        the method cannot serve."""
        assert isinstance(state, PerToken)
        if self.uses_readers and state.readers is None:
            legal = f"{self.name} weighs tokens by queries, and this mixer does not say who reads its state (`readers`)"
            raise ConfigError("memory.compression", self.name, legal)
        arrays = self.statistics(state, shape)
        noted = {"noted": Part(Statistics(arrays, until_compacted=not self.every))} if arrays else {}
        num_kv_heads = state.arrays[0].shape[0]
        if self.heads == "ada" and num_kv_heads > 1:
            self._check_dealing(state)
            noted["dealt"] = Part(Statistics((ArraySpec("kept", (num_kv_heads,), "int32"),)))
        return {"": Part(state, self.retention(state, shape)), **noted}

    def _check_dealing(self, state: PerToken) -> None:
        """Raises ConfigError where the slots of a state cannot be dealt to its heads."""
        name = "memory.compression.heads"
        if self.at != "end" or self.every:
            raise ConfigError(
                name, "ada", f"must be uniform with at = {self.at}, every = {self.every}: tiles are dealt once"
            )
        if not isinstance(state, TokenState):
            raise ConfigError(name, "ada", f"must be uniform for a {type(state).__name__}")

    def plain(self) -> dict[str, Any]:
        """As YAML has it."""
        return {"type": self.name, **{item.name: getattr(self, item.name) for item in fields(self)}}


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x with length 1; zero stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def by_group(by_query_head: Float[Array, "B H *E"], num_kv_heads: int) -> Float[Array, "B K G *E"]:
    """What query heads have, in groups that share a KV head."""
    batch, num_heads, *rest = by_query_head.shape
    return by_query_head.reshape(batch, num_kv_heads, num_heads // num_kv_heads, *rest)


def grouped(by_query_head: Float[Array, "B *T H S"], num_kv_heads: int) -> Float[Array, "B *T K G S"]:
    """Query heads in groups that share a KV head."""
    *front, num_heads, num_slots = by_query_head.shape
    return by_query_head.reshape(*front, num_kv_heads, num_heads // num_kv_heads, num_slots)


def as_noted(by_head: Float[Array, "B K S"], num_slots: int) -> Float[Array, "B N K"]:
    """What heads have of each slot, as it is remembered: of `num_slots`, with zeros behind what there is."""
    found = by_head[:, :, :num_slots].transpose(0, 2, 1)
    return jnp.pad(found, ((0, 0), (0, num_slots - found.shape[1]), (0, 0)))


def as_scored(noted: Float[Array, "B S K"], num_slots: int) -> Float[Array, "B K N"]:
    """The reverse: what is remembered of each slot, by head."""
    found = noted[:, :num_slots].transpose(0, 2, 1)
    return jnp.pad(found, ((0, 0), (0, 0), (0, num_slots - found.shape[2])))


def weights_of(queries: Float[Array, "B T H D"], slots: Slots, seen: Bool[Array, "B #T N"]) -> Float[Array, "B T H N"]:
    """Softmax weights of scaled queries over the slots that each sees; a query that sees none has zeros."""
    num_kv_heads = slots.keys.shape[1]
    batch, num_tokens, num_heads, dim = queries.shape
    asked = queries.reshape(batch, num_tokens, num_kv_heads, -1, dim)
    scores = jnp.einsum("btkgd,bknd->btkgn", asked, slots.keys, preferred_element_type=jnp.float32)
    scores = slots.capped(scores)
    scores = jnp.where(seen[:, :, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(seen[:, :, None, None, :] & jnp.isfinite(weights), weights, 0)
    return weights.reshape(batch, num_tokens, num_heads, -1)
