"""Who takes part in the next step. One counter idea: a sequence has tokens known and tokens computed, and every step
computes some of the difference, be it a prompt's chunk, one decoded token, or what a preemption or a rejected
speculation threw away.

    sequence.num_known - sequence.num_computed      what is left to compute; 1 while decoding
    scheduler.schedule() -> Step(work, before, rejected)    work: (sequence, num_new, lookahead), reserved in the ledger

Pure host code: the engine runs it with a device, the capacity simulator with a clock."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from kvlab.engine.entries import Before, Counters, Entry, Move, Planned, Rejection, Step, Work
from kvlab.engine.shortening import is_due, shorten
from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.classes import Lengths
from kvlab.ledger.ledger import Ledger
from kvlab.schema import Schema, choice, flag, integer

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Schedule(Schema):
    """How steps are made: at most `max_batch` sequences and `token_budget` tokens, decoded ones first.

    With `mixed` prompts and decodes share steps (chunked prefill, arXiv 2403.02310); without, a step that computes
    prompts decodes nothing. Whoever must make room is computed again, or goes to the host and back."""

    max_batch: int = integer(UNLIMITED, 1)
    token_budget: int = integer(UNLIMITED, 1)
    mixed: bool = flag(True)
    preemption: str = choice("recompute", ("recompute", "swap"))


@dataclass
class _Unfinished:
    """A step while it is made: its work by sequence, in any order."""

    work: dict[Entry, Work] = field(default_factory=dict)
    before: list[Before] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


@dataclass
class Scheduler:
    """Chooses each step's sequences, reserves their pages, and makes room. Deterministic.

    Invariants: the scheduled tokens stay within the budget; every step schedules something or raises RuntimeError; the
    first in order is never preempted for another and has a token in every step once it runs. Order is by priority, then
    age; it says who is admitted first and who makes room last, but nobody is interrupted only because somebody more
    urgent came."""

    ledger: Ledger
    schedule_config: Schedule = field(default_factory=Schedule)
    counters: Counters = field(default_factory=Counters)
    running: list[Entry] = field(default_factory=list)
    waiting: list[Entry] = field(default_factory=list)
    swapped: list[Entry] = field(default_factory=list)
    """Who was swapped out: their pages are on the host."""
    listen: Callable[[Entry], Planned | Wait] | None = None
    """Plans a sequence's second pass, of a memory that needs one."""
    _arrived: int = 0

    def submit(self, entry: Entry) -> None:
        """A new sequence waits for its turn."""
        entry.arrival, entry.prompt_len = self._arrived, entry.prompt_len or entry.num_known
        self._arrived += 1
        self._queue(entry)

    def branch(self, parent: Entry, child: Entry) -> None:
        """`child` continues from where `parent` is: forked in memory where that leaves it something to compute and
        there is room, otherwise computed when its turn comes (and found in the index)."""
        child.arrival = parent.arrival
        has_room = parent.state == "running" and len(self.running) < self.schedule_config.max_batch
        if has_room and 0 < parent.num_computed < child.num_known:
            self.ledger.fork(parent.name, child.name)
            child.num_computed = parent.num_computed
            child.prefill_len, child.told_len = parent.prefill_len, parent.told_len
            self._run(child)
        else:
            child.once_computed = parent.num_computed
            self._queue(child)

    def remove(self, entry: Entry, *, keep: bool = True) -> None:
        """A sequence ended; what it published stays in the index, unless not `keep`."""
        if entry.state in ("running", "swapped"):
            self.ledger.release(entry.name, keep=keep)
        {"running": self.running, "waiting": self.waiting, "swapped": self.swapped}[entry.state].remove(entry)
        entry.state = "gone"

    def forget(self, entries: Collection[Entry]) -> None:
        """None of these has begun, and none of them waits any more."""
        self.waiting = [entry for entry in self.waiting if entry not in entries]

    def start_over(self, ledger: Ledger, waiting: list[Entry]) -> None:
        """Only these are left, and none of them has begun in this ledger, which is a new one."""
        self.ledger, self.waiting = ledger, waiting
        self.running, self.swapped = [], []

    @property
    def num_unfinished(self) -> int:
        """Sequences that have not been removed."""
        return len(self.running) + len(self.waiting) + len(self.swapped)

    def schedule(self) -> Step:
        """The next step, reserved. Without work only when every sequence is paused, has just come back or was just
        rejected, or there is none. Raises RuntimeError when sequences could go on and none does."""
        if self._closed and not is_due(self.ledger, self.running):
            steady = self._steady(self.running)
            if steady is not None:
                return Step(steady)
        config, preempted, step = self.schedule_config, self.counters.preempted, _Unfinished()
        num_swapped = len(self.swapped)
        shorten(self.ledger, self.running, step.before, lambda: self._preempt(self.running[-1], step), self.listen)
        if config.mixed:
            self._decode(step, self._decode_budget())
        budget = config.token_budget - sum(part.num_new + part.lookahead for part in step.work.values())
        if len(step.work) < len(self.running):
            budget = self._continue(step, budget)
        if self.counters.preempted == preempted:  # whoever made room is not let in again at once
            budget = self._admit(step, budget)
        if config.mixed and budget > 0 and len(step.work) < len(self.running):
            self._decode(step, budget)  # what was kept for a prompt that found no room
        if not config.mixed and not step.work:
            self._decode(step, config.token_budget)
        if not step.work and not step.rejected and len(self.swapped) == num_swapped:
            self._unblock(step)
        work = [step.work[entry] for entry in self.running if entry in step.work]
        for entry, num_new, _ in work:
            again = min(entry.once_computed, entry.num_computed + num_new) - entry.num_computed
            self.counters.recomputed_tokens += max(0, again)
        return Step(work, step.before, step.rejected)

    def schedule_ahead(self) -> list[Work] | None:
        """The work of the step behind the one that the device works on, whose tokens the counters have already,
        reserved: where everybody decodes on but those at their end, and nobody can come in. None where that does not
        hold; nothing is reserved then.

        Publishes nothing: what the device works on may come out wrong. Evicts, but not for what ends now anyway."""
        going = [entry for entry in self.running if entry.num_computed < entry.final_len]
        all_go_on = len(going) == len(self.running)
        if not going or not self._closed or not (all_go_on or self._nobody_waits):
            return None
        return self._steady(going, evicts=all_go_on)

    # Who takes part.

    @property
    def _closed(self) -> bool:
        """Whether nobody can come in: nobody waits, or every place is taken."""
        return self._nobody_waits or len(self.running) >= self.schedule_config.max_batch

    @property
    def _nobody_waits(self) -> bool:
        return not (self.waiting or self.swapped)

    def _steady(self, entries: list[Entry], *, evicts: bool = True) -> list[Work] | None:
        """The step in which each of these decodes one token and no page is short: nearly all steps, quickly. None where
        that does not hold, or would evict though it should not; nothing is reserved then."""
        if len(entries) > self.schedule_config.token_budget:
            return None
        if not all([entry.decodes for entry in entries]) or any([entry.paused for entry in entries]):  # noqa: C419
            return None
        names = [entry.name for entry in entries]
        done = self.ledger.reserve_each(names)
        short = [name for name, had in zip(names, done, strict=True) if not had]
        # Where pages are short, `reserve` might publish to find some.
        stores = self.ledger.stores
        enough = all((store.num_available if evicts else len(store.free)) >= len(short) for store in stores)
        if not enough or not all(self.ledger.reserve(name, 1).ready for name in short):
            for name in names:
                if self.ledger.running[name].num_new:
                    self.ledger.cancel(name)
            return None
        return [Work(entry, 1, 0) for entry in entries]

    def _decode_budget(self) -> int:
        """The tokens that decoding may take: all, but for one where somebody who computes a prompt, or could begin one,
        goes before the last of those decoding."""
        budget = self.schedule_config.token_budget
        prompts = [entry for entry in self.running if entry.num_computed < entry.prefill_len and not entry.paused]
        if len(self.running) < self.schedule_config.max_batch:
            prompts += [entry for entry in self.waiting if not entry.paused][:1]
        if not prompts:
            return budget
        first = min(entry.order for entry in prompts)
        ready = [entry for entry in self.running if entry.num_computed >= entry.prefill_len and not entry.paused]
        ahead = sum(entry.order < first for entry in ready)
        return budget if ahead >= budget else max(ahead, budget - 1)

    def _decode(self, step: _Unfinished, budget: int) -> None:
        """One token and the drafts of every sequence whose prompt is computed and that has no part yet; drafts are the
        first to go when short."""
        work, had = step.work, len(step.work)
        active = [entry for entry in self.running if not entry.paused and entry not in work]
        ready = [entry for entry in active if entry.prefill_len <= entry.num_computed < entry.num_known]
        plain = [entry for entry in ready[:budget] if entry.decodes]
        for entry, done in zip(plain, self.ledger.reserve_each([entry.name for entry in plain]), strict=True):
            if done:  # nearly always: the token falls into a page that the sequence has
                work[entry] = Work(entry, 1, 0)
        budget -= len(work) - had
        if len(work) - had == len(ready):
            return
        for entry in ready:
            count = entry.num_known - entry.num_computed
            if budget <= 0 or entry.state != "running" or entry in work:
                continue
            count = self._chunk(entry, count, budget)
            lookahead = 0
            if entry.num_computed + count == entry.num_known:
                most = min(budget, self.ledger.chunk_len, self.ledger.room_ahead(entry.name))
                lookahead = max(0, min(entry.drafts, most - count))
            if lookahead and not self.ledger.reserve(entry.name, count, lookahead).ready:
                lookahead = 0
            if lookahead or self._reserve(entry, count, step):
                work[entry] = Work(entry, count, lookahead)
                budget -= count + lookahead

    def _continue(self, step: _Unfinished, budget: int) -> int:
        """The next chunks of prompts that are partly computed; returns what is left of the budget."""
        for entry in self.running[:]:
            left = min(entry.target, entry.prefill_len) - entry.num_computed
            if left > 0 and budget > 0 and not entry.paused and entry.state == "running":
                count = self._chunk(entry, left, budget)
                if self._reserve(entry, count, step):
                    step.work[entry] = Work(entry, count, 0)
                    budget -= count
        return budget

    def _chunk(self, entry: Entry, left: int, budget: int) -> int:
        return self.ledger.clip(entry.name, min(left, budget, self.ledger.chunk_len))

    def _admit(self, step: _Unfinished, budget: int) -> int:
        """Brings sequences back from the host and begins those waiting, in order; who must wait lets nobody past.
        Returns what is left of the budget."""
        candidates = [entry for entry in (*self.swapped, *self.waiting) if not entry.paused]
        if self.swapped:
            candidates.sort(key=lambda entry: entry.order)
        for entry in candidates:
            if len(self.running) >= self.schedule_config.max_batch:
                return budget
            if entry.state == "swapped":
                swap = self.ledger.swap_in(entry.name)
                if isinstance(swap, Wait):
                    return budget
                step.before.append(Move("in", swap))
                self.swapped.remove(entry)
                self._run(entry)
                continue
            if budget <= 0:
                return budget
            count = self._begin(entry, step, budget)
            if count is None:
                return budget
            if count:
                self.waiting.remove(entry)
                self._run(entry)
                step.work[entry] = Work(entry, count, 0)
                budget -= count
        return budget

    def _begin(self, entry: Entry, step: _Unfinished, budget: int) -> int | None:
        """Reserves a sequence's first chunk and returns its size; 0 if it can never fit, None if it must wait."""
        hit = self.ledger.lookup(entry.ids, entry.namespace, entry.prompt_len) if entry.indexed else None
        start = entry.num_computed = hit.length if hit else 0
        count = min(entry.target - start, budget, self.ledger.chunk_len)
        prompt_len = entry.prompt_len if self.ledger.stores.compresses else entry.num_known
        count = self.ledger.clip(hit, count) if hit else self.ledger.clip_first(prompt_len, count)
        answer = self.ledger.reserve(entry.name, count, hit=hit, lengths=Lengths(prompt_len, entry.final_len))
        if isinstance(answer, Ready):
            entry.prefill_len = prompt_len  # what was decoded before is decoded again, where it was compacted
            if hit:
                self._count_hit(entry, start)
            entry.told_len = hit.prompt_len if hit else entry.num_known
            return count
        if hit:
            self.ledger.unpin(hit)
        entry.num_computed = 0
        if isinstance(answer, Wait):
            return None
        self.waiting.remove(entry)
        entry.state = "gone"
        step.rejected.append(Rejection(entry, answer.reason))
        return 0

    def _count_hit(self, entry: Entry, found: int) -> None:
        """An admission found this many tokens in the index; those that the sequence had computed itself are no hit."""
        if not entry.told_len:
            self.counters.looked_up_tokens += max(0, entry.num_known - entry.once_computed)
        self.counters.found_again_tokens += min(found, entry.once_computed)
        self.counters.hit_tokens += max(0, found - entry.once_computed)

    # Making room.

    def _reserve(self, entry: Entry, count: int, step: _Unfinished) -> bool:
        """Reserves, preempting the last in order, in the end the sequence itself; False: it was preempted."""
        while not isinstance(answer := self.ledger.reserve(entry.name, count), Ready):
            if isinstance(answer, Never):
                raise RuntimeError(f"admitted and then refused: {answer.reason}")
            # Who pauses has nothing to do now, and goes before who could: unless that would let somebody past.
            pausing = [other for other in self.running if other.paused and other.order >= entry.order]
            victim = (pausing or self.running)[-1]
            self._preempt(victim, step)
            if victim is entry:
                return False
        return True

    def _preempt(self, entry: Entry, step: _Unfinished) -> None:
        self.running.remove(entry)
        self.counters.preempted += 1
        if step.work.pop(entry, None):
            self.ledger.cancel(entry.name)
        if entry.name in self.ledger.running:  # otherwise it had only begun
            if self.schedule_config.preemption == "swap":
                swap = self.ledger.swap_out(entry.name)
                if not isinstance(swap, Wait):
                    step.before.append(Move("out", swap))
                    self._insert(self.swapped, entry)
                    entry.state = "swapped"
                    return
            self.ledger.release(entry.name)
        entry.once_computed = max(entry.once_computed, entry.num_computed)
        entry.num_computed = 0
        self._queue(entry)

    def _unblock(self, step: _Unfinished) -> None:
        """Nobody was scheduled although somebody could go on: those who pause hold the pages, so the last of them
        goes."""
        ready = [entry for entry in (*self.running, *self.swapped, *self.waiting) if not entry.paused]
        if not ready:
            return
        paused = [entry for entry in self.running if entry.paused]
        if not paused:
            sizes = f"{len(self.running)} running, {len(self.waiting)} waiting, {len(self.swapped)} swapped out"
            raise RuntimeError(f"no progress: {sizes}, first {ready[0].name!r}")
        self._preempt(paused[-1], step)

    # Lists in order.

    def _run(self, entry: Entry) -> None:
        entry.state = "running"
        self._insert(self.running, entry)

    def _queue(self, entry: Entry) -> None:
        entry.state = "waiting"
        self._insert(self.waiting, entry)

    @staticmethod
    def _insert(entries: list[Entry], entry: Entry) -> None:
        """Behind everybody who goes before it; nearly always at the end."""
        place = len(entries)
        while place and entry.order < entries[place - 1].order:
            place -= 1
        entries.insert(place, entry)
