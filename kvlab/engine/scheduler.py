"""Who takes part in the next step. One counter idea: a sequence has tokens known and tokens computed, and every step computes
some of the difference, be it a prompt's chunk, one decoded token, or what a preemption or a rejected speculation threw away.

    sequence.num_known - sequence.num_computed      what is left to compute; 1 while decoding
    scheduler.schedule() -> [Work(sequence, num_new, lookahead), ...]    reserved in the ledger, within the token budget

Pure host code: the engine runs it with a device, the capacity simulator with a clock.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.classes import Lengths
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Swap
from kvlab.schema import Schema, choice, flag, integer

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Schedule(Schema):
    """How steps are made: at most `max_batch` sequences and `token_budget` tokens, decoded ones first.

    With `mixed` prompts and decodes share steps (chunked prefill, arXiv 2403.02310); without, a step that computes prompts
    decodes nothing. Whoever must make room is computed again, or goes to the host and back.
    """

    max_batch: int = integer(UNLIMITED, 1)
    token_budget: int = integer(UNLIMITED, 1)
    mixed: bool = flag(True)
    preemption: str = choice("recompute", ("recompute", "swap"))


@dataclass(eq=False, slots=True)
class Entry:
    """One sequence as the scheduler sees it. `final_len` bounds the tokens that it will ever store."""

    name: Hashable
    num_known: int
    final_len: int
    priority: int = 0
    prompt: Sequence[int] | None = None
    """Ids of all known tokens, for the prefix index; None: nothing is looked up nor published."""
    namespace: str = ""
    num_computed: int = 0
    prefill_len: int = 0
    """Tokens known when it was admitted: below, it computes a prompt; above, it decodes."""
    drafts: int = 0
    """Speculative tokens that may follow the known ones in the next step."""
    hold: int | None = None
    """It computes up to here and then waits for the caller to branch it and to lift this; beyond, it has no effect."""
    paused: bool = False
    """Takes part in nothing: it waits for others of its group."""
    arrival: int = -1
    state: Literal["new", "waiting", "running", "away", "gone"] = "new"
    decoding: "Work" = field(init=False, repr=False)
    """Its part of a step that computes its last known token behind its prompt: made once, to be told apart at a glance."""

    def __post_init__(self) -> None:
        self.decoding = Work(self, 1, 0)

    @property
    def target(self) -> int:
        """Tokens to compute for now."""
        held = self.hold is not None and self.num_computed < self.hold
        return self.hold if held else self.num_known  # type: ignore[return-value]

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the higher priority, then the older."""
        return (-self.priority, self.arrival)


class Work(NamedTuple):
    """One sequence's part of a step: `num_new` known tokens from `num_computed` on, then `lookahead` drafts."""

    entry: Entry
    num_new: int
    lookahead: int


class Move(NamedTuple):
    """Pages to carry to the host ("out") or back ("in") before the step."""

    direction: Literal["out", "in"]
    swap: Swap


@dataclass
class Counters:
    """What scheduling did so far."""

    preempted: int = 0
    recomputed_tokens: int = 0
    hit_tokens: int = 0


@dataclass
class Scheduler:
    """Chooses each step's sequences, reserves their pages, and makes room. Deterministic.

    Invariants: the scheduled tokens stay within the budget; every step schedules something or raises RuntimeError; the first
    in order is never preempted for another and has a token in every step once it runs. Order is by priority, then age; it
    says who is admitted first and who makes room last, but nobody is interrupted only because somebody more urgent came.
    """

    ledger: Ledger
    schedule_config: Schedule = field(default_factory=Schedule)
    counters: Counters = field(default_factory=Counters)
    running: list[Entry] = field(default_factory=list)
    waiting: list[Entry] = field(default_factory=list)
    away: list[Entry] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    """Swaps of the step being made, in order; the caller carries them out before it and clears them."""
    rejected: list[tuple[Entry, str]] = field(default_factory=list)
    """Who can never fit, with the ledger's reason; the caller clears them."""
    _arrived: int = 0
    _ahead: list[Work] = field(default_factory=list)
    """The next step, where `look_ahead` has reserved it."""

    def submit(self, entry: Entry) -> None:
        """A new sequence waits for its turn."""
        entry.arrival = self._arrived
        self._arrived += 1
        self._queue(entry)

    def branch(self, parent: Entry, child: Entry) -> None:
        """`child` continues from where `parent` is: forked in memory where that leaves it something to compute and there is
        room, otherwise computed when its turn comes (and found in the index)."""
        self._take_back()
        child.arrival = parent.arrival
        has_room = parent.state == "running" and len(self.running) < self.schedule_config.max_batch
        if has_room and 0 < parent.num_computed < child.num_known:
            self.ledger.fork(parent.name, child.name)
            child.num_computed, child.prefill_len = parent.num_computed, parent.prefill_len
            self._run(child)
        else:
            self._queue(child)

    def remove(self, entry: Entry, *, keep: bool = True) -> None:
        """A sequence ended; what it published stays in the index, unless not `keep`."""
        if entry.state in ("running", "away"):
            self.ledger.release(entry.name, keep=keep)
        {"running": self.running, "waiting": self.waiting, "away": self.away}[entry.state].remove(entry)
        entry.state = "gone"

    def start_over(self, ledger: Ledger, waiting: list[Entry]) -> None:
        """Only these are left, and none of them has begun in this ledger, which is a new one."""
        self.ledger, self.waiting = ledger, waiting
        self.running, self.away, self.moves, self.rejected, self._ahead = [], [], [], [], []

    @property
    def num_unfinished(self) -> int:
        """Sequences that have not been removed."""
        return len(self.running) + len(self.waiting) + len(self.away)

    def schedule(self) -> list[Work]:
        """The next step's work, reserved. Empty only when every sequence is paused, has just come back or was just
        rejected, or there is none. Raises RuntimeError when sequences could go on and none does."""
        if self._ahead and self._closed:
            ahead, self._ahead = self._ahead, []
            stay = [one for one in ahead if one.entry.state == "running"]
            return ahead if len(stay) == len(ahead) else stay
        self._take_back()
        if self._closed and (steady := self._steady(self.running)) is not None:
            return steady
        config, preempted = self.schedule_config, self.counters.preempted
        work: dict[Entry, Work] = {}
        came = len(self.away), len(self.rejected)
        if config.mixed:
            self._decode(work, self._decode_budget())
        budget = config.token_budget - sum(one.num_new + one.lookahead for one in work.values())
        if len(work) < len(self.running):
            budget = self._continue(work, budget)
        if self.counters.preempted == preempted:  # whoever made room is not let in again at once
            self._admit(work, budget)
        if not config.mixed and not work:
            self._decode(work, config.token_budget)
        if not work and (len(self.away), len(self.rejected)) == came:
            self._unblock()
        return [work[one] for one in self.running if one in work]

    def look_ahead(self) -> list[Work] | None:
        """Reserves the step after the one that the device works on, whose tokens the counters have already: where everybody
        decodes on but those at their end, and nobody can come in. `schedule` then returns this very list, or what is left of
        it, or takes the reservations back. None where any of this does not hold; nothing is reserved then.

        Publishes nothing: what the device works on may come out wrong. Evicts, but not for what ends now anyway.
        """
        going = [one for one in self.running if one.num_computed < one.final_len]
        if not going or not self._closed or (len(going) < len(self.running) and (self.waiting or self.away)):
            return None
        self._ahead = self._steady(going, evicts=len(going) == len(self.running)) or []
        return self._ahead or None

    # Who takes part.

    @property
    def _closed(self) -> bool:
        """Whether nobody can come in: nobody waits, or every place is taken."""
        return not (self.waiting or self.away) or len(self.running) >= self.schedule_config.max_batch

    def _steady(self, entries: list[Entry], *, evicts: bool = True) -> list[Work] | None:
        """The step in which each of these decodes one token and no page is short: nearly all steps, quickly. None where that
        does not hold, or would evict though it should not; nothing is reserved then."""
        plain = [one.prefill_len <= one.num_computed == one.num_known - 1 and not one.drafts for one in entries]
        if not all(plain) or len(entries) > self.schedule_config.token_budget or any([one.paused for one in entries]):  # noqa: C419
            return None
        names = [one.name for one in entries]
        done = self.ledger.reserve_each(names)
        short = [name for name, had in zip(names, done, strict=True) if not had]
        # Where pages are short, `reserve` might publish to find some.
        stores = self.ledger.stores
        enough = all((store.num_available if evicts else len(store.free)) >= len(short) for store in stores)
        if not enough or not all(self.ledger.reserve(name, 1).ready for name in short):
            self._cancel(names)
            return None
        return [one.decoding for one in entries]

    def _take_back(self) -> None:
        """What `look_ahead` reserved will not run so."""
        ahead, self._ahead = self._ahead, []
        self._cancel([one.entry.name for one in ahead if one.entry.state == "running"])

    def _cancel(self, names: list[Hashable]) -> None:
        for name in names:
            if self.ledger.running[name].num_new:
                self.ledger.cancel(name)

    def _decode_budget(self) -> int:
        """The tokens that decoding may take: all, but for one where somebody who computes a prompt, or could begin one, goes
        before the last of those decoding."""
        budget = self.schedule_config.token_budget
        prompts = [one for one in self.running if one.num_computed < one.prefill_len and not one.paused]
        if len(self.running) < self.schedule_config.max_batch:
            prompts += [one for one in self.waiting if not one.paused][:1]
        if not prompts:
            return budget
        first = min(one.order for one in prompts)
        ahead = sum(one.order < first for one in self.running if one.num_computed >= one.prefill_len)
        return budget if ahead >= budget else max(ahead, budget - 1)

    def _decode(self, work: dict[Entry, Work], budget: int) -> None:
        """One token and the drafts of every sequence whose prompt is computed; drafts are the first to go when short."""
        ready = [one for one in self.running if one.prefill_len <= one.num_computed < one.num_known and not one.paused]
        plain = [one for one in ready[:budget] if one.num_known - one.num_computed == 1 and not one.drafts]
        for one, done in zip(plain, self.ledger.reserve_each([one.name for one in plain]), strict=True):
            if done:  # nearly always: the token falls into a page that the sequence has
                work[one] = one.decoding
        budget -= len(work)
        if len(work) == len(ready):
            return
        for one in ready:
            count = one.num_known - one.num_computed
            if budget <= 0 or one.state != "running" or one in work:
                continue
            count = self._chunk(one, count, budget)
            lookahead = 0
            if one.num_computed + count == one.num_known:
                lookahead = max(0, min(one.drafts, budget - count, self.ledger.chunk_len - count))
            if lookahead and not self.ledger.reserve(one.name, count, lookahead).ready:
                lookahead = 0
            if lookahead or self._reserve(one, count, work):
                last = count == 1 == one.num_known - one.num_computed and not lookahead
                work[one] = one.decoding if last else Work(one, count, lookahead)
                budget -= count + lookahead

    def _continue(self, work: dict[Entry, Work], budget: int) -> int:
        """The next chunks of prompts that are partly computed; returns what is left of the budget."""
        for one in self.running[:]:
            left = min(one.target, one.prefill_len) - one.num_computed
            if left > 0 and budget > 0 and not one.paused and one.state == "running":
                count = self._chunk(one, left, budget)
                if self._reserve(one, count, work):
                    work[one] = Work(one, count, 0)
                    budget -= count
        return budget

    def _chunk(self, one: Entry, left: int, budget: int) -> int:
        return self.ledger.clip(one.name, min(left, budget, self.ledger.chunk_len))

    def _admit(self, work: dict[Entry, Work], budget: int) -> None:
        """Brings sequences back from the host and begins those waiting, in order; who must wait lets nobody past."""
        candidates = [one for one in (*self.away, *self.waiting) if not one.paused]
        if self.away:
            candidates.sort(key=lambda one: one.order)
        for one in candidates:
            if len(self.running) >= self.schedule_config.max_batch:
                return
            if one.state == "away":
                swap = self.ledger.swap_in(one.name)
                if isinstance(swap, Wait):
                    return
                self.moves.append(Move("in", swap))
                self.away.remove(one)
                self._run(one)
                continue
            if budget <= 0:
                return
            count = self._begin(one, budget)
            if count is None:
                return
            if count:
                self.waiting.remove(one)
                self._run(one)
                work[one] = Work(one, count, 0)
                budget -= count

    def _begin(self, one: Entry, budget: int) -> int | None:
        """Reserves a sequence's first chunk and returns its size; 0 if it can never fit, None if it must wait."""
        hit = None if one.prompt is None else self.ledger.lookup(one.prompt, one.namespace)
        start = one.num_computed = hit.length if hit else 0
        count = min(one.target - start, budget, self.ledger.chunk_len)
        if hit:
            count = self.ledger.clip(hit, count)
        answer = self.ledger.reserve(one.name, count, hit=hit, lengths=Lengths(one.num_known, one.final_len))
        if isinstance(answer, Ready):
            one.prefill_len = one.num_known
            self.counters.hit_tokens += start
            return count
        if hit:
            self.ledger.unpin(hit)
        one.num_computed = 0
        if isinstance(answer, Wait):
            return None
        self.waiting.remove(one)
        one.state = "gone"
        self.rejected.append((one, answer.reason))
        return 0

    # Making room.

    def _reserve(self, one: Entry, count: int, work: dict[Entry, Work]) -> bool:
        """Reserves, preempting the last in order, in the end the sequence itself; False: it was preempted."""
        while not isinstance(answer := self.ledger.reserve(one.name, count), Ready):
            if isinstance(answer, Never):
                raise RuntimeError(f"admitted and then refused: {answer.reason}")
            # Who pauses has nothing to do now, and goes before who could: unless that would let somebody past.
            pausing = [other for other in self.running if other.paused and other.order >= one.order]
            victim = (pausing or self.running)[-1]
            self._preempt(victim, work)
            if victim is one:
                return False
        return True

    def _preempt(self, one: Entry, work: dict[Entry, Work]) -> None:
        self.running.remove(one)
        self.counters.preempted += 1
        if work.pop(one, None):
            self.ledger.cancel(one.name)
        if one.name in self.ledger.running:  # otherwise it had only begun
            if self.schedule_config.preemption == "swap":
                swap = self.ledger.swap_out(one.name)
                if not isinstance(swap, Wait):
                    self.moves.append(Move("out", swap))
                    self._insert(self.away, one)
                    one.state = "away"
                    return
            self.ledger.release(one.name)
            self.counters.recomputed_tokens += one.num_computed
        one.num_computed = 0
        self._queue(one)

    def _unblock(self) -> None:
        """Nobody was scheduled although somebody could go on: those who pause hold the pages, so the last of them goes."""
        ready = [one for one in (*self.running, *self.away, *self.waiting) if not one.paused]
        if not ready:
            return
        paused = [one for one in self.running if one.paused]
        if not paused:
            sizes = f"{len(self.running)} running, {len(self.waiting)} waiting, {len(self.away)} away"
            raise RuntimeError(f"no progress: {sizes}, first {ready[0].name!r}")
        self._preempt(paused[-1], {})

    # Lists in order.

    def _run(self, one: Entry) -> None:
        one.state = "running"
        self._insert(self.running, one)

    def _queue(self, one: Entry) -> None:
        one.state = "waiting"
        self._insert(self.waiting, one)

    @staticmethod
    def _insert(entries: list[Entry], one: Entry) -> None:
        """Behind everybody who goes before it; nearly always at the end."""
        place = len(entries)
        while place and one.order < entries[place - 1].order:
            place -= 1
        entries.insert(place, one)
