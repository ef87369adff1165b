"""Who holds which page. Integers on the host, no JAX; the only way to the device is a `Plan`.

    hit = ledger.lookup(prompt, namespace)               # what the index knows of the prompt, pinned
    ledger.reserve("r7", 16, hit=hit)                    # Ready | Wait | Never; nothing changed unless Ready
    plan = ledger.plan(["r7", ...], batch_size, width)   # one step's arrays, for all sequences that are ready
    ... the device step runs with the plan ...
    ledger.commit("r7", 16)                              # tokens count; full pages are published, forgotten ones free
    ledger.release("r7")

A sequence's state of each class is a map from logical page (slots [i * page_size, (i + 1) * page_size)) to the physical
page of the pool that holds it; a recurrent state is one page without slots. A token's slot is its position, until
compaction drops some: then a class stores fewer slots than the sequence has tokens. All that a step needs is taken in
`reserve`, all that it proved is settled in `commit`; in between nobody else sees it.
"""

import bisect
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence

from kvlab.ledger import committing, compaction, due, invariants, planning, sealing, sharing, swapping
from kvlab.ledger.accounting import Account
from kvlab.ledger.answers import READY, Never, Ready, Wait
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import Lengths, StateClass, checked
from kvlab.ledger.compaction import Stored
from kvlab.ledger.plan import Compaction, Plan, Seals, Swap
from kvlab.ledger.prefix import PrefixIndex
from kvlab.ledger.publisher import Publisher
from kvlab.ledger.replacement import LRU, Policy
from kvlab.ledger.sealing import Sealed
from kvlab.ledger.stores import Stores
from kvlab.ledger.tokens import TokenIds, encode, sha256
from kvlab.ledger.tracked import Tracked
from kvlab.units import counted


class Ledger:
    """Allocates pages of several state classes side by side. Deterministic; every method is transactional."""

    def __init__(
        self,
        classes: Sequence[StateClass],
        max_len: int,
        chunk_len: int,
        *,
        policy: Callable[[int], Policy] = LRU,
        checkpoints: Checkpoints | None = None,
        page_size: int = 16,
        digest: Callable[[bytes], bytes] = sha256,
    ):
        """`max_len` bounds a sequence and `chunk_len` a step, in tokens.

        `policy` makes the eviction policy of each class from its number of pages. `page_size` is the index's where no
        class is paged, so that recurrent states alone can be found again. Raises ValueError on empty bounds, on names
        that repeat, on paged classes whose page sizes differ, and on page tables too short for max_len.
        """
        self.classes = tuple(classes)
        self.max_len, self.chunk_len = max_len, chunk_len
        self.index = PrefixIndex(self.classes, policy, checked(classes, max_len, chunk_len, page_size), digest)
        self.stores = Stores(self.classes, self.index, max_len, chunk_len)
        self.counters = self.stores.counters
        self.running: dict[Hashable, Tracked] = {}
        self.suspended: dict[Hashable, Tracked] = {}
        self.hits: set[Tracked] = set()
        self._publisher = Publisher(self.stores, checkpoints or Checkpoints())
        lengths = range(1, max_len + 1)
        self._longest_alone = bisect.bisect_left(lengths, True, key=lambda length: self.never(length) is not None)

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """Sequences that hold pages of the device, oldest first."""
        return tuple(self.running)

    def length(self, sequence: Hashable) -> int:
        """Committed tokens of a sequence. Raises KeyError if it holds nothing."""
        return (self.suspended.get(sequence) or self._get(sequence)).length

    def stored(self, sequence: Hashable) -> dict[str, int]:
        """Slots that a sequence stores, by class: its committed tokens, less what compactions took."""
        held = self.suspended.get(sequence) or self._get(sequence)
        each = zip(self.classes, held.holdings, strict=True)
        return {state.name: self.stores[i].num_stored(holding, held.length) for i, (state, holding) in enumerate(each)}

    def pages(self, sequence: Hashable, number: int) -> tuple[int, ...]:
        """The pages, or the slot, that a sequence holds of a class, in their order."""
        return tuple(self._get(sequence).holdings[number].pages.values())

    def never(self, total_len: int, prompt_len: int | None = None) -> Never | None:
        """Why a sequence of `total_len` tokens could not run alone in an empty pool; None: it could. One with a prompt
        of `prompt_len` tokens is compacted where its classes' retentions say; without, it is not."""
        return self.stores.never(total_len, prompt_len=prompt_len)

    def clip(self, sequence: Hashable | Tracked, num_new: int) -> int:
        """`num_new`, shortened so that the next step of a sequence, or the first behind a hit, ends where a recurrent
        state is to be kept for later hits, or where the sequence is to be compacted."""
        held = sequence if isinstance(sequence, Tracked) else self._get(sequence)
        return self._publisher.clip(held, due.clip(self.classes, held, num_new))

    def clip_first(self, prompt_len: int, num_new: int) -> int:
        """The same for the first step of a sequence with such a prompt and no hit."""
        return due.clip(self.classes, sharing.begun(self.stores, None, Lengths(prompt_len, prompt_len)), num_new)

    def room_ahead(self, sequence: Hashable) -> int:
        """Tokens that a sequence can grow by before it is to be compacted: a step may not pass that place, drafts
        included."""
        held = self._get(sequence)
        return due.next_due(self.classes, held) - held.length

    def audit(self) -> tuple[Account, ...]:
        """Where every byte is now, one account a class; they add up."""
        return self.stores.audit(list(self.running.values()))

    def check(self) -> None:
        """Raises AssertionError on a broken invariant; see `invariants`."""
        invariants.check(self.stores, self.running, self.suspended, self.hits)

    def due(self, sequences: Sequence[Hashable]) -> dict[Hashable, dict[str | int, int]]:
        """Which of these are to be compacted before their next step, with the slots that each class keeps: what
        `compact` takes. Sequences that began without `lengths` never are."""
        found = {name: due.due(self.classes, self.running[name]) for name in sequences}
        return {name: slots for name, slots in found.items() if slots}

    def lookup(self, tokens: TokenIds, namespace: str = "", prompt_len: int | None = None) -> Tracked:
        """The longest joint hit of a prompt, at most its length - 1 tokens, and pins it. Where sequences are compacted,
        the first `prompt_len` of these tokens are the prompt (None: all of them), and a hit ends before the place where
        the first compaction is due.

        Its sequence will publish what it computes under the same namespace. Raises ValueError for an empty prompt and
        for tokens that are no integers of [0, 2^31).
        """
        self.publish()
        ids = encode(tokens)
        if not ids:
            raise ValueError("tokens = []: a prompt has at least one token")
        hit = sharing.look_up(self.stores, ids, len(tokens), namespace, prompt_len or len(tokens))
        self.hits.add(hit)
        return hit

    def unpin(self, hit: Tracked) -> None:
        """Lets go of a hit that no sequence took. Raises ValueError if one did."""
        if hit not in self.hits:
            raise ValueError("hit: is spent already")
        self.hits.remove(hit)
        sharing.unpin(self.stores, hit)

    def reserve(
        self,
        sequence: Hashable,
        num_new: int,
        lookahead: int = 0,
        *,
        hit: Tracked | None = None,
        lengths: Lengths | None = None,
    ) -> Ready | Wait | Never:
        """Pages for the next `num_new` tokens of a sequence and `lookahead` speculative ones; a new name begins one.

        A new sequence takes a `hit` over and starts behind it; with `lengths`, what cannot fit in the end is refused at
        once, and contiguous reservations know their size. `Wait` when pages are short, `Never` when an empty pool would
        be too small: neither changes anything, and the hit stays pinned. Raises ValueError for counts out of range and
        when the sequence's last step is not settled.
        """
        held = self.running.get(sequence)
        plain = type(num_new) is int and 0 < num_new <= self.chunk_len and not (lookahead or hit or lengths)
        if held and plain and not held.num_new and held.length + num_new <= held.room:
            held.num_new = num_new
            return READY
        num_new, lookahead = operator.index(num_new), operator.index(lookahead)
        if num_new < 1 or lookahead < 0 or num_new + lookahead > self.chunk_len:
            legal = f"num_new must be at least 1, and num_new + lookahead at most {self.chunk_len}"
            raise ValueError(f"num_new = {num_new}, lookahead = {lookahead}: {legal}")
        if held is None:
            held = self._begin(sequence, hit, lengths)
        elif hit is not None or lengths is not None:
            raise ValueError(f"sequence {sequence!r}: has begun; hit and lengths belong to its first step")
        elif held.num_new:
            raise ValueError(f"sequence {sequence!r}: its step of {counted(held.num_new, 'token')} is not committed")
        end = held.length + num_new + lookahead
        final = max(end, lengths.final_len) if lengths else end
        prompt_len = lengths.prompt_len if lengths else None
        if final > self._longest_alone and (never := self.stores.never(final, held, prompt_len)):
            return never
        missing = []
        for store, holding in zip(self.stores.each, held.holdings, strict=True):
            missing.append(store.missing(holding, held.length, end, lookahead))
            if refusal := store.refusal(holding, missing[-1], end):
                if not self._publisher.waiting:
                    return refusal
                self.publish()  # which frees pages that others have published as well
                return self.reserve(sequence, num_new, lookahead, hit=hit, lengths=lengths)
        taken = self.stores.take([len(pages) for pages in missing])
        if sequence not in self.running:
            sharing.install(self.stores, held, hit)
            if hit is not None:
                self.hits.remove(hit)
            self.running[sequence] = held
        for store, holding, pages, new in zip(self.stores.each, held.holdings, missing, taken, strict=True):
            store.give(holding, pages, new)
        held.num_new, held.lookahead = num_new, lookahead
        self.stores.refresh(held)
        self.stores.note_peak()
        return READY

    def reserve_each(self, sequences: Sequence[Hashable]) -> list[bool]:
        """One more token for each sequence of which that only raises a count; False where `reserve` must be asked."""
        ready = []
        for name in sequences:
            held = self.running[name]
            if plain := held.length < held.room and not held.num_new:
                held.num_new = 1
            ready.append(plain)
        return ready

    def plan(self, sequences: Sequence[Hashable], batch_size: int, num_tokens: int) -> Plan:
        """The arrays of one step of [batch_size, num_tokens] for sequences with a reservation, in this order; the rest
        is padding that reads the null page and writes nowhere. Raises ValueError when they do not fit the shape."""
        steps = [self.running.get(sequence) or self._get(sequence) for sequence in sequences]
        return planning.plan(self.stores, sequences, steps, batch_size, num_tokens)

    def commit(
        self, sequence: Hashable, num_accepted: int, tokens: TokenIds = (), stored: Stored | None = None
    ) -> None:
        """The step ran and its first `num_accepted` tokens count; `tokens` are ids that the prompt did not hold.

        Full pages whose ids are known are published, pages outside live(n) become free.

        `stored` says how many slots of which classes the step left, packed to the front of the sequence's own pages.
        Pages behind those are free at once, and later tokens go to the slots that follow. Nothing of the sequence is
        published any more.

        Raises ValueError when no step is in flight, when more is accepted than was reserved, and for slots that cannot
        be. Also when less is accepted beside a recurrent state: that can only be rejected as a whole, and only if the
        step had lookahead. Then feed the accepted tokens again.
        """
        held = self._get(sequence)
        if num_accepted == held.num_new > 0 and not stored and held.length + held.num_new < min(held.wake, held.full):
            if len(tokens) and held.ids is not None:
                held.learn(held.length + held.num_new, tokens)
            held.length += held.num_new
            held.num_new = 0
            return
        committing.commit(self._publisher, held, operator.index(num_accepted), tokens, stored)

    def commit_each(self, sequences: Sequence[Hashable], tokens: TokenIds) -> list[bool]:
        """`commit(sequence, 1, [token])` for each of these where it only raises a count; False where `commit` must be
        asked. Pages that are full then wait for `publish`: until it is called, nobody sees what was computed."""
        return committing.commit_each(self._publisher, self.running, sequences, tokens)

    def publish(self) -> None:
        """Publishes what `commit_each` has put off. Whoever could tell the difference does so first."""
        self._publisher.publish()

    def cancel(self, sequence: Hashable) -> None:
        """The reserved step will not run: its pages are free again, and a sequence that holds nothing else is gone.

        Raises ValueError when no step is in flight.
        """
        held = self._get(sequence)
        if not held.num_new:
            raise ValueError(f"sequence {sequence!r}: no step is in flight")
        if held.length:
            committing.settle(self._publisher, held, 0, ran=False)
        else:
            self.release(sequence)

    def compact(
        self, stored: Mapping[Hashable, Stored], seeds: Mapping[Hashable, int] | None = None
    ) -> Compaction | Wait:
        """Shortens sequences to these slots of these classes, in one program to run before the next step: it packs what
        stays into the destinations, all others of their pages are free. Shared and published pages stay as they are,
        for those who read them; nothing of the sequences is published any more. `Wait`, and nothing changed, when pages
        are short. `seeds` is what random choices of each sequence are drawn from; 0 where none is given.

        Raises ValueError while a step is in flight, for a class that is never compacted, and for counts out of range.
        """
        self.publish()
        sequences = list[tuple[Tracked, dict[int, int]]]()
        for name, slots in stored.items():
            held = self._settled(name)
            sequences.append((held, compaction.kept_slots(self.classes, held, held.length, slots)))
        drawn_from = [(seeds or {}).get(name, 0) for name in stored]
        answer = compaction.compact(self.stores, sequences, drawn_from)
        for held, kept in sequences if not isinstance(answer, Wait) else ():
            if kept:
                self._publisher.close(held)
                self.stores.refresh(held)
        return answer

    def seal(self, sequences: Sequence[Hashable]) -> tuple[Seals, list[list[Sealed]]] | Wait | None:
        """Seals the pages of these that are due, in one program to run before the next step; the open pages are free
        at once. With the plan, what each sequence sealed; None: nothing is due. `Wait`, and nothing changed, when
        sealed pages are short. Nothing of a sequence that has sealed pages is published any more."""
        self.publish()
        return sealing.seal(self._publisher, [self._settled(name) for name in sequences])

    def seals(self, sequence: Hashable) -> bool:
        """Whether pages of a sequence are to be sealed before its next step."""
        held = self._get(sequence)
        return any(map(sealing.num_sealable, self.classes, [held] * len(self.classes), held.holdings))

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """`child` continues from where `parent` is and shares every page; the first to write a shared page copies it.

        Raises ValueError while a step is in flight, for a name in use, and beside contiguous reservations.
        """
        held = self._idle(parent)
        if child in self.running or child in self.suspended:
            raise ValueError(f"sequence {child!r}: the name is in use")
        self.running[child] = sharing.forked(self.stores, held)
        self.stores.refresh(held)
        self.stores.refresh(self.running[child])

    def release(self, sequence: Hashable, keep: bool = True) -> None:
        """Frees everything a sequence holds, a step in flight included; what it published stays in the index, unless
        not `keep`: then what nobody else uses of its path is freed as well. Raises KeyError if it holds nothing."""
        if (held := self.suspended.pop(sequence, None)) is not None:
            for store, holding in zip(self.stores.each, held.holdings, strict=True):
                store.host_free.extend(holding.pages.values())
        else:
            held = self._get(sequence)
            if keep:
                self.publish()
            else:
                self._publisher.forget(held)
            del self.running[sequence]
            self.stores.let_go(held)
        if not keep:
            for node in reversed(held.path[1:]):
                for store, cached in zip(self.stores, node.pages, strict=True):
                    if cached is not None and cached.queued is not None:
                        store.withdraw(cached)
        if held.path:
            self.index.unlock(held.path[-1])

    def evict(self, name: str, num_pages: int) -> int:
        """Frees up to `num_pages` cached pages of a class in the policy's order; returns how many were."""
        return self.stores.evict(name, num_pages)

    def swap_out(self, sequence: Hashable) -> Swap | Wait:
        """Moves a sequence to the host: its device pages are free once the swap has run. `Wait` when the host is full.

        Raises ValueError while a step is in flight and beside contiguous reservations.
        """
        held = self._idle(sequence)
        answer = swapping.swap_out(self.stores, held)
        if not isinstance(answer, Wait):
            self.suspended[sequence] = self.running.pop(sequence)
        return answer

    def swap_in(self, sequence: Hashable) -> Swap | Wait:
        """Brings a sequence back; pages that the index still holds are shared. `Wait` when pages are short."""
        if sequence not in self.suspended:
            raise KeyError(f"sequence {sequence!r}: is not swapped out")
        answer = swapping.swap_in(self.stores, self.suspended[sequence])
        if not isinstance(answer, Wait):
            self.running[sequence] = self.suspended.pop(sequence)
        return answer

    def _begin(self, sequence: Hashable, hit: Tracked | None, lengths: Lengths | None) -> Tracked:
        """A sequence that is not installed yet and holds what its hit pins."""
        if sequence in self.suspended:
            raise ValueError(f"sequence {sequence!r}: is swapped out")
        if hit is not None and hit not in self.hits:
            raise ValueError("hit: is spent already")
        return sharing.begun(self.stores, hit, lengths)

    def _get(self, sequence: Hashable) -> Tracked:
        held = self.running.get(sequence)
        if held is None:
            where = "is swapped out" if sequence in self.suspended else "holds nothing"
            raise KeyError(f"sequence {sequence!r}: {where}")
        return held

    def _settled(self, sequence: Hashable) -> Tracked:
        """A sequence without a step in flight."""
        held = self._get(sequence)
        if held.num_new:
            raise ValueError(f"sequence {sequence!r}: its step of {counted(held.num_new, 'token')} is not committed")
        return held

    def _idle(self, sequence: Hashable) -> Tracked:
        """A sequence that can be shared or moved: no step in flight, no contiguous block, everything published."""
        self.publish()
        held = self._settled(sequence)
        if not self.stores.can_share:
            raise ValueError(f"sequence {sequence!r}: contiguous reservations are neither shared nor swapped")
        return held
