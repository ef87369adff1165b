"""The device's side of the engine: pools, programs, and what is under way.

A step is launched and not waited for. The step behind it can be launched before anything of the first is known on the
host: its tokens are then read from the array that the first one draws into."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jaxtyping import Int32

from kvlab.engine.config import EngineConfig, Stats
from kvlab.engine.entries import Before, Heard, Move, Work
from kvlab.engine.requests import Sample
from kvlab.engine.sampling import Choices, Drawn, Mode, draw_tokens
from kvlab.engine.step import MemoryStep, Pools
from kvlab.engine.swap import HostTier
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Compaction, Plan, Seals
from kvlab.memory.layout import MemoryLayout
from kvlab.models.model import Model
from kvlab.programs import make_room
from kvlab.units import power_of_two


class Group(NamedTuple):
    """Work that shares a program: its width in tokens, and whether a token is drawn at every place."""

    work: list[Work]
    width: int
    everywhere: bool


class Batch(NamedTuple):
    """What is the same for rows as long as they compute together."""

    samples: list[Sample]
    choices: Choices
    mode: Mode
    is_plain: bool
    """Whether they want tokens, log-probabilities and text only, so that the step behind needs nothing of them on the
    host."""


@dataclass(eq=False)
class Launched:
    """A program under way: its rows, and what it draws and which rows are finite, still on the device."""

    group: Group
    batch: Batch
    drawn: Drawn
    finite: Any
    is_behind: bool
    """Whether it was launched before the step in front of it was known."""
    committed: list[bool]
    """Rows that count already in ledger and scheduler, though it is not known yet whether they are finite."""

    def rows(self) -> tuple[Sequence[int], list[Sample]]:
        """The rows whose sequences have not ended meanwhile, and these."""
        samples = self.batch.samples
        if all([sample.state != "gone" for sample in samples]):  # noqa: C419  a list is faster
            return range(len(samples)), samples
        rows = [row for row, sample in enumerate(samples) if sample.state != "gone"]
        return rows, [samples[row] for row in rows]


class Fetched(NamedTuple):
    """What a program drew, on the host."""

    drawn: Drawn
    finite: npt.NDArray[np.bool_]


class Runner:
    """Owns pools and parameters, and runs planned steps."""

    def __init__(
        self,
        model: Model,
        layout: MemoryLayout,
        config: EngineConfig,
        stats: Stats,
    ):
        self.params, self.layout, self.config, self.stats = model.params, layout, config, stats
        self.step_fn = MemoryStep.of(model.structure, layout)
        self.pools: Pools = layout.allocate()
        self.host = HostTier(layout)
        self._batches: dict[tuple[int, bool], Batch] = {}
        self._called = set[Hashable]()
        """Programs that were handed over before."""
        self._read_bytes = [
            np.array([state.spec.read_bytes(n, state.page_size) * state.num_layers for n in range(config.max_len + 1)])
            for state in layout.classes
        ]
        self._weight_bytes = model.num_bytes

    def start_over(self) -> None:
        """Memory made anew: nobody knows what a torn step left in it."""
        self.pools = ()  # first, so that there is room
        self.pools, self.host = self.layout.allocate(), HostTier(self.layout)

    def prepare(self, before: Sequence[Before]) -> None:
        """Does what comes before a step, in its order: what one frees, the next may fill."""
        for each in before:
            match each:
                case Move():
                    self._carry(each)
                case Compaction():
                    self._compact(each)
                case Seals():
                    self._seal(each)
                case Heard():
                    self._compact_behind(each)

    def _carry(self, move: Move) -> None:
        """Copies pages to the host or back."""
        if move.direction == "out":
            self.host.take(self.pools, move.swap)
        else:
            self.pools = self.host.give_back(self.pools, move.swap)

    def _compact(self, compaction: Compaction) -> None:
        """Dispatches a compaction, which nobody waits for: pages that it frees are written behind it."""
        began, num_rows = time.perf_counter(), len(compaction.seeds)
        self.stats.compacted += num_rows
        self.pools, _ = self.step_fn.compact(self.pools, compaction)
        self._handed_over(("compact", power_of_two(num_rows)), began)

    def _compact_behind(self, each: Heard) -> None:
        """Dispatches a second pass and the compaction that needs it."""
        began, widths = time.perf_counter(), {tokens.shape for _, tokens in each.heard.steps}
        self.stats.compacted += 1
        self.pools = self.step_fn.read_on(self.params, self.pools, each.heard.steps)
        self.pools, _ = self.step_fn.compact(self.pools, each.compaction, each.heard.slots)
        self._handed_over(("listen", frozenset(widths)), began)

    def _seal(self, seals: Seals) -> None:
        """Dispatches a sealing of full pages, which nobody waits for."""
        began, num_pages = time.perf_counter(), sum(len(moves) for moves in seals.classes)
        self.stats.sealed_pages += num_pages
        self.pools = self.step_fn.seal(self.pools, seals)
        self._handed_over(("seal", power_of_two(num_pages)), began)

    def _handed_over(self, program: Hashable, began: float) -> float:
        """The seconds that it took; those of a first call count apart."""
        seconds = time.perf_counter() - began
        if program not in self._called:
            self._called.add(program)
            self.stats.first_calls_s += seconds
            make_room()
        return seconds

    def groups(self, work: Sequence[Work], chunk_len: int) -> list[Group]:
        """The programs of a step: parts of equal width, speculative ones apart."""
        groups: dict[tuple[int, bool], list[Work]] = {}
        for part in work:
            width = self.config.buckets.width_for(part.num_new + part.lookahead, chunk_len)
            groups.setdefault((width, part.lookahead > 0), []).append(part)
        return [Group(parts, *key) for key, parts in groups.items()]

    def launch(self, ledger: Ledger, group: Group, behind: Launched | None = None) -> Launched:
        """Plans and dispatches one program, not waited for. Its rows were drawn by `behind`, if that is given: what
        they draw is then fed from the device."""
        samples: list[Any] = [part.entry for part in group.work]
        num_rows = self.config.buckets.rows_for(len(samples), self.config.max_batch)
        plan = ledger.plan([sample.name for sample in samples], num_rows, group.width)
        tokens = _known_tokens(group, num_rows) if behind is None else _drawn_tokens(behind, samples, num_rows)
        batch = self._batch(samples, num_rows, group)
        seen = self._seen(samples, num_rows) if batch.mode.penalty else None
        shape = (num_rows, *group[1:])
        self._count(plan, len(samples), shape)
        began, program = time.perf_counter(), (shape, batch.mode, plan.has_copies)
        plan, self.pools = self.step_fn.copied(self.pools, plan)
        logits, finite, self.pools = self.step_fn.next_logits(
            self.params, self.pools, plan, tokens, everywhere=group.everywhere
        )
        first = plan.starts + 1 if group.everywhere else plan.starts + plan.counts
        positions = first[:, None] + np.arange(logits.shape[1], dtype=np.int32)
        drawn = draw_tokens(logits, positions, batch.choices, seen, mode=batch.mode)
        self.stats.dispatch_s += self._handed_over(program, began)
        return Launched(group, batch, drawn, finite, behind is not None, [False] * len(samples))

    def fetch(self, launched: Sequence[Launched]) -> list[Fetched]:
        """Waits for these programs."""
        began = time.perf_counter()
        fetched = jax.device_get([(each.drawn, each.finite) for each in launched])
        self.stats.wait_s += time.perf_counter() - began
        return [Fetched(*each) for each in fetched]

    def _count(self, plan: Plan, num_rows: int, shape: tuple[int, int, bool]) -> None:
        each = zip(self.layout.classes, plan.classes, strict=True)
        ends = ((mine.starts + plan.counts * (not state.is_sealed))[:num_rows] for state, mine in each)
        tables = zip(self._read_bytes, ends, strict=True)
        self.stats.read_bytes += self._weight_bytes + sum(int(table[mine].sum()) for table, mine in tables)
        self.stats.launches += 1
        self.stats.shapes.add(shape)

    def _batch(self, samples: list[Sample], num_rows: int, group: Group) -> Batch:
        kept = self._batches.get(group[1:])
        if kept is not None and kept.samples == samples and len(kept.choices.temperature) == num_rows:
            return kept
        asked = [(sample.request.sampling, sample.request.seed, sample.index) for sample in samples]
        choices = Choices(*(jnp.asarray(column) for column in Choices.of(asked, num_rows)))
        is_plain = all(sample.seen is None and not sample.request.sampling.reports_more for sample in samples)
        made = Batch(samples, choices, Mode.of([sampling for sampling, _, _ in asked]), is_plain)
        self._batches[group[1:]] = made
        return made

    def _seen(self, samples: Sequence[Sample], num_rows: int) -> npt.NDArray[np.bool_]:
        vocab_size = next(len(sample.seen) for sample in samples if sample.seen is not None)
        seen = np.zeros((num_rows, vocab_size), bool)
        for row, sample in enumerate(samples):
            if sample.seen is not None:
                seen[row] = sample.seen
        return seen


def _known_tokens(group: Group, num_rows: int) -> npt.NDArray[np.int32]:
    """The tokens [B, T] that a group computes."""
    tokens = np.zeros((num_rows, group.width), np.int32)
    if group.width == 1:
        tokens[: len(group.work), 0] = [part.entry.ids[part.entry.num_computed] for part in group.work]
        return tokens
    for row, (sample, count, lookahead) in enumerate(group.work):
        assert isinstance(sample, Sample)
        tokens[row, :count] = sample.ids[sample.num_computed : sample.num_computed + count]
        tokens[row, count : count + lookahead] = sample.draft_ids[:lookahead]
    return tokens


def _drawn_tokens(behind: Launched, samples: list[Sample], num_rows: int) -> Int32[Array, "B 1"]:
    """The tokens that these rows draw in the step before, on the device."""
    tokens = behind.drawn.tokens
    if samples == behind.batch.samples and num_rows == len(tokens):
        return tokens
    row_of = {sample: row for row, sample in enumerate(behind.batch.samples)}
    rows = np.zeros(num_rows, np.int32)
    rows[: len(samples)] = [row_of[sample] for sample in samples]
    return _rows(tokens, rows)


@jax.jit
def _rows(tokens: Array, rows: Array) -> Array:
    return tokens[rows]
