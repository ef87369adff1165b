"""The host driver of a step, for evaluation: prefills in chunks and decodes, a fixed batch at a time."""

import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.engine.listener import Listener, Slots
from kvlab.engine.step import IsRead, MemoryStep, Pools
from kvlab.evaluation.lossy import Compacted, SealedTogether
from kvlab.ledger.answers import Ready, Wait
from kvlab.ledger.classes import Lengths
from kvlab.ledger.plan import Plan
from kvlab.memory.pools import padded_pages
from kvlab.memory.reading_back import Given
from kvlab.typing import Params


class ReadStep(NamedTuple):
    """A step as the host planned it, a row of the plan for each of its sequences, and what it read, still on the
    device."""

    sequences: tuple[Hashable, ...]
    plan: Plan
    is_read: IsRead


class WrittenStep(NamedTuple):
    """What a step wrote, as it is read: a row for each of its sequences, which had `starts` tokens before it and have
    `counts` more behind it."""

    sequences: tuple[Hashable, ...]
    starts: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    given: Given


class Events(NamedTuple):
    """What was done to the sequences of a memory, for its check: compactions, what steps read, sealings, and what was
    read back of the tokens written and of the pages sealed."""

    compacted: Sequence[Compacted] = ()
    steps: Sequence[ReadStep] = ()
    sealed: Sequence[SealedTogether] = ()
    written: Sequence[WrittenStep] = ()
    given: Sequence[Given] = ()


class Session:
    """Sequences that live in one memory. The batch is `layout.max_sequences` rows; fewer leave rows padded.

    A memory that compresses does so where its retentions say, counting from `prompt_len`, the tokens of every
    sequence's prompt (None: they are not compressed). `compacted` are the compactions so far. `known` are the complete
    tokens of sequences, for a method that must know what follows. With `poisons`, pages that a compaction or a window
    frees are filled with what must not be read.

    A memory that selects may have prompts read all of it: tokens from `decode_from` on are no prompt's. With
    `observes`, `steps` has what each step so far read; `written` what each stored, if in a format, and `given` the same
    for each of `sealed`.
    """

    def __init__(
        self,
        step: MemoryStep,
        params: Params,
        pools: Pools | None = None,
        *,
        poisons: bool = False,
        observes: bool = False,
    ):
        self.step, self.params, self.poisons = step, params, poisons
        self.observes = observes and step.layout.selects
        self.reads_back = observes and step.layout.is_quantised
        self.layout = step.layout
        self.ledger = self.layout.ledger()
        self.pools: Pools = self.layout.allocate() if pools is None else pools
        self.listener = Listener(self.layout)
        self.forgets = any(state.paged and state.spec.span is not None for state in self.layout.classes)
        self.known: Mapping[Any, Sequence[int] | npt.NDArray[np.int32]] = {}
        self.fed: dict[Hashable, list[int]] = {}
        self.prompt_len: int | None = None
        self.compacted: list[Compacted] = []
        self.sealed: list[SealedTogether] = []
        self.written: list[WrittenStep] = []
        self.given: list[Given] = []
        self.decode_from = 0
        self.steps: list[ReadStep] = []
        self.times = False
        """Whether compactions, second passes included, are waited for and timed."""
        self.compaction_s: list[float] = []

    @property
    def events(self) -> Events:
        """All that happened since sequences were last released."""
        return Events(self.compacted, self.steps, self.sealed, self.written, self.given)

    def advance(
        self,
        chunks: Mapping[Hashable, Sequence[int] | npt.NDArray[np.int32]],
        width: int,
        num_rows: int | None = None,
    ) -> Array:
        """Feeds each sequence its next tokens (1 to `width` of them) in one step; returns logits [rows, width, V].
        `num_rows` is the program's batch where that is not the layout's.

        Row i belongs to the i-th sequence of `chunks`. Raises MemoryError with the ledger's reason when they do not
        fit; no sequence has then changed.
        """
        names, num_rows = list(chunks), num_rows or self.layout.max_sequences
        tokens = np.zeros((num_rows, width), np.int32)
        for row, name in enumerate(names):
            answer = self.ledger.reserve(name, len(chunks[name]), lengths=self._lengths(name, len(chunks[name])))
            if not isinstance(answer, Ready):
                for reserved in names[:row]:
                    self.ledger.cancel(reserved)
                raise MemoryError(f"sequence {name!r}: {answer.reason}")
            tokens[row, : len(chunks[name])] = chunks[name]
        plan = self.ledger.plan(names, num_rows, width)
        plan = plan.with_prompts(self.decode_from)
        if self.observes:
            logits, self.pools, is_read = self.step.run_observed(self.params, self.pools, plan, tokens)
            self.steps.append(ReadStep(tuple(names), plan, is_read))
        else:
            logits, self.pools = self.step.run(self.params, self.pools, plan, tokens)
        if self.reads_back:
            given = self.step.read_back(self.pools, plan.without_copies())
            self.written.append(WrittenStep(tuple(names), plan.starts, plan.counts, given))
        free = self._free() if self.poisons and self.forgets else []
        for name in names:
            self.ledger.commit(name, len(chunks[name]))
            if self.listener:
                self.fed.setdefault(name, []).extend(np.asarray(chunks[name]).tolist())
        if free:
            self._poison(free)
        if self.layout.compresses:
            if due := self.ledger.due(names):
                self._compact(due)
            self._seal(names)
        return logits

    def _lengths(self, name: Hashable, num_new: int) -> Lengths | None:
        """What is known of a sequence when it begins."""
        if self.prompt_len is None or name in self.ledger.running:
            return None
        return Lengths(self.prompt_len, max(self.prompt_len, num_new))

    def _compact(self, due: Mapping[Hashable, Mapping[str | int, int]]) -> None:
        """Compacts who is due: together, or each behind its second pass."""
        seeds = {name: row for row, name in enumerate(self.ledger.sequences)}
        for together in [[name] for name in due] if self.listener else [list(due)]:
            began = time.perf_counter()
            slots, free = self._listen(together[0]) if self.listener else {}, self._free()
            plan = self.ledger.compact({name: due[name] for name in together}, seeds)
            if isinstance(plan, Wait):
                raise MemoryError(f"compaction: {plan.reason}")
            self.pools, kept = self.step.compact(self.pools, plan, slots)
            if self.times:
                jax.block_until_ready(self.pools)
                self.compaction_s.append(time.perf_counter() - began)
            self.compacted.append(Compacted(tuple(together), plan, kept))
            if self.poisons:
                self._poison(free)

    def _seal(self, names: Sequence[Hashable]) -> None:
        """Seals the pages that are due."""
        free = self._free()
        done = self.ledger.seal(names)
        if done is None:
            return
        if isinstance(done, Wait):
            raise MemoryError(f"sealing: {done.reason}")
        seals, sealed = done
        self.pools = self.step.seal(self.pools, seals)
        self.sealed.append(SealedTogether(tuple(names), sealed))
        if self.reads_back:
            self.given.append(self.step.read_sealed(self.pools, seals))
        if self.poisons:
            self._poison(free)

    def _listen(self, name: Hashable) -> Slots:
        """Reads on behind a sequence's prompt; where the statistics of that lie."""
        prompt = self.fed[name]
        future = list(self.known[name][len(prompt) :]) if name in self.known else None
        found = self.listener.plan(self.ledger, name, prompt, future)
        if isinstance(found, Wait):
            raise MemoryError(found.reason)
        self.pools = self.step.read_on(self.params, self.pools, found.steps)
        return found.slots

    def _free(self) -> list[set[int]]:
        return [set(store.free) for store in self.ledger.stores]

    def _poison(self, before: Sequence[set[int]]) -> None:
        """Spoils pages that have become free, which nobody may read any more."""
        freed = [now - then for now, then in zip(self._free(), before, strict=True)]
        if not any(freed):
            return
        classes = zip(self.layout.classes, freed, strict=True)
        pages = (padded_pages(np.array(sorted(mine), np.int32), state.num_pages) for state, mine in classes)
        self.pools = self.step.poison(self.pools, tuple(map(jnp.asarray, pages)))

    def release_all(self) -> None:
        """Ends every sequence; their pages are free, their contents stay until overwritten."""
        for name in self.ledger.sequences:
            self.ledger.release(name)
        self.compacted.clear()
        self.sealed.clear()
        self.written.clear()
        self.given.clear()
        self.steps.clear()
        self.fed.clear()
