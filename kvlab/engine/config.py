"""How an engine is set up, and what it says of its work."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvlab.engine.shapes import Buckets
from kvlab.ledger.checkpoints import CHECKPOINTS
from kvlab.ledger.replacement import POLICIES
from kvlab.schema import ConfigError, Schema, choice, flag, integer, integers


@dataclass(frozen=True)
class EngineConfig(Schema):
    """How requests are served. At most `max_batch` sequences run at once, each of up to `max_len` tokens, together of
    up to `pool_len` (null: max_batch * max_len, so that nobody is ever preempted).

    `token_budget`, `mixed` and `preemption` as in `Schedule`; `host_len` tokens can be swapped to the host.
    `prefix_cache` finds prompts again whose pages are resident, evicted by `policy`, recurrent states kept by
    `checkpoints`. `speculation` guesses `num_drafts` tokens a step: "ngram" looks them up in the sequence itself,
    "draft" asks the engine's draft model.

    Steps are padded to the least of `row_sizes` rows, and prompts' parts to the least of `width_sizes` tokens, that
    hold them: each pair is a program to compile. Where none does, or none is given, sizes grow by powers of two:
    padding costs a CPU more than programs do. A GPU decodes 64 rows as fast as one, and compiles for ten seconds."""

    max_batch: int = integer(8, 1, 65536)
    max_len: int = integer(2048, 2, 1 << 24)
    pool_len: int | None = integer(None, 2, 1 << 40, optional=True)
    token_budget: int = integer(512, 1, 1 << 30)
    mixed: bool = flag(True)
    preemption: str = choice("recompute", ("recompute", "swap"))
    host_len: int = integer(0, 0, 1 << 40)
    prefix_cache: bool = flag(True)
    policy: str = choice("lru", tuple(POLICIES))
    checkpoints: str = choice("junctions", CHECKPOINTS)
    speculation: str = choice("none", ("none", "ngram", "draft"))
    num_drafts: int = integer(4, 1, 64)
    row_sizes: tuple[int, ...] = integers((), 1, 65536)
    width_sizes: tuple[int, ...] = integers((), 1, 65536)
    seed: int = integer(0, 0)

    @cached_property
    def buckets(self) -> Buckets:
        """The sizes that steps are padded to."""
        return Buckets(self.row_sizes, self.width_sizes)

    def cross_check(self) -> None:
        if self.pool_len is not None and self.pool_len < self.max_len:
            raise ConfigError(
                "pool_len", self.pool_len, f"must hold one sequence of max_len = {self.max_len}, or be null"
            )
        if self.row_sizes and max(self.row_sizes) > self.max_batch:
            legal = f"must each be at most max_batch = {self.max_batch}"
            raise ConfigError("row_sizes", list(self.row_sizes), legal)
        if self.preemption == "swap" and not self.host_len:
            raise ConfigError("host_len", 0, "must be at least 1 with preemption=swap")


@dataclass
class Stats:
    """What the engine did so far. Its seconds: `host_s` planning and settling, of which `hidden_s` while a program was
    under way, `dispatch_s` handing programs over (a CPU may run them meanwhile), and `wait_s` waiting for them."""

    steps: int = 0
    launches: int = 0
    planned_ahead: int = 0
    """Launches that were made while the device worked on the step before."""
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    """Computed behind prompts; the last token of an answer never is, while the first comes of the prompt."""
    told_tokens: int = 0
    """Of answers, as whoever asked counts them."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    failed: int = 0
    compacted: int = 0
    """Compactions of a sequence."""
    sealed_pages: int = 0
    read_bytes: int = 0
    """Bytes that the launches had to read: all weights once each, and the live state of every sequence."""
    host_s: float = 0.0
    hidden_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    first_calls_s: float = 0.0
    """Handing each program over for the first time, which compiles it."""
    shapes: set[tuple[Any, ...]] = field(default_factory=set)
    """Every (rows, width, everywhere) that was launched: the model was compiled as many times."""

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts of those proposed; NaN when there were none."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else float("nan")
