"""Who holds which page. Integers on the host, no JAX; the only way to the device is a `Plan`.

    hit = ledger.lookup(prompt, namespace)               # what the index knows of the prompt, pinned
    ledger.reserve("r7", 16, hit=hit)                    # Ready | Wait | Never; nothing changed unless Ready
    plan = ledger.plan(["r7", ...], batch_size, width)   # one step's arrays, for all sequences that are ready
    ... the device step runs with the plan ...
    ledger.commit("r7", 16)                              # tokens count; full pages are published, forgotten ones free
    ledger.release("r7")

A sequence's state of each class is a map from logical page (tokens [i * page_size, (i + 1) * page_size)) to the physical page of
the pool that holds it; a recurrent state is one page without positions. All that a step needs is taken in `reserve`, all
that it proved is settled in `commit`; in between nobody else sees it.
"""

import bisect
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvlab.ledger import swapping
from kvlab.ledger.accounting import Account, Held, account
from kvlab.ledger.answers import READY, Never, Ready, Wait
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.contiguous import BlockStore
from kvlab.ledger.plan import Plan, Swap
from kvlab.ledger.prefix import PrefixIndex
from kvlab.ledger.replacement import LRU, Policy
from kvlab.ledger.stores import NEVER_WAKES, Holding, PageStore, StateStore, Store
from kvlab.ledger.tokens import ITEM, TokenIds, encode, sha256
from kvlab.ledger.trie import CachedPage, Node


@dataclass
class Counters:
    """What happened so far. `peak_bytes` is the most that sequences and hits held at once, `peak_pages` the same for each
    class on its own: their difference is what pools of fixed types cost beside one pool for all."""

    looked_up_tokens: int = 0
    hit_tokens: int = 0
    deduplicated_pages: int = 0
    swapped_pages: int = 0
    peak_bytes: int = 0
    peak_pages: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Tracked:
    """One sequence: what it holds of each class. A hit is one without a name yet: the longest prefix of a prompt that can be
    read instead of computed, pinned until given to `reserve` or `unpin`."""

    holdings: list[Holding]
    path: list[Node] = field(default_factory=list)  # in the index, from the root
    ids: bytearray | None = None  # of the tokens known so far; None: began without a lookup, and publishes nothing
    prompt_len: int = 0
    junction: int = 0  # pages of the prompt that somebody computed, whether or not they are still resident
    length: int = 0
    num_new: int = 0
    lookahead: int = 0
    room: int = 0  # a step that ends here needs no page: `reserve` has nothing to do
    wake: int = 0  # below this length `commit` has nothing to free, copy or keep
    full: int = 0  # below this length it has nothing to publish
    rolling: list[CachedPage] = field(
        default_factory=list
    )  # states last published of the answer: the next replace them


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

        `policy` makes the eviction policy of each class from its number of pages. `page_size` is the index's where no class is
        paged, so that recurrent states alone can be found again. Raises ValueError on empty bounds, on names that repeat, on
        paged classes whose page sizes differ, and on page tables too short for max_len.
        """
        if not all(type(size) is int and size > 0 for size in (max_len, chunk_len, page_size)):
            sizes = f"max_len = {max_len}, chunk_len = {chunk_len}, page_size = {page_size}"
            raise ValueError(f"{sizes}: all must be integers of at least 1")
        if not classes or len({one.name for one in classes}) < len(classes):
            raise ValueError(f"classes = {[one.name for one in classes]}: must be at least one, each with its own name")
        page_sizes = {one.page_size for one in classes if one.paged} or {page_size}
        if len(page_sizes) > 1:
            raise ValueError(f"page_size = {sorted(page_sizes)}: paged classes of one ledger must share one")
        self.classes = tuple(classes)
        self.max_len, self.chunk_len = max_len, chunk_len
        self.checkpoints = checkpoints or Checkpoints()
        for one in self.classes:
            if one.paged and one.table_len < (needed := min(one.num_usable, one.max_pages(max_len, chunk_len))):
                raise ValueError(
                    f"{one.name}: table_len = {one.table_len}: must be at least {needed} for max_len = {max_len}"
                )
        (self._page_size,) = page_sizes
        self.index = PrefixIndex(self.classes, policy, self._page_size, digest)
        self.stores: tuple[Store, ...] = tuple(
            BlockStore(number, one, self.index, max_len)
            if one.contiguous
            else (PageStore if one.paged else StateStore)(number, one, self.index)
            for number, one in enumerate(self.classes)
        )
        self.counters = Counters(peak_pages=[0] * len(self.classes))
        self.running: dict[Hashable, Tracked] = {}
        self.suspended: dict[Hashable, Tracked] = {}
        self.hits: set[Tracked] = set()
        self.free_rows: list[int] = []
        self._shares = not any(one.contiguous for one in self.classes)
        self._states = [store for store in self.stores if not store.state.spec.per_token]
        self._unpublished: list[Tracked] = []
        lengths = range(1, max_len + 1)
        self._longest_alone = bisect.bisect_left(lengths, True, key=lambda length: self.never(length) is not None)

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """Sequences that hold pages of the device, oldest first."""
        return tuple(self.running)

    def length(self, sequence: Hashable) -> int:
        """Committed tokens of a sequence. Raises KeyError if it holds nothing."""
        return (self.suspended.get(sequence) or self._get(sequence)).length

    def never(self, total_len: int) -> Never | None:
        """Why a sequence of `total_len` tokens could not run alone in an empty pool; None: it could."""
        if total_len > self.max_len:
            return Never(f"{total_len} tokens exceed max_len = {self.max_len}")
        for one in self.classes:
            needed = one.max_pages(total_len, self.chunk_len)
            if needed > one.num_usable:
                sizes = f"{one.page_size} tokens a page, steps of up to {self.chunk_len}"
                return Never(
                    f"{one.name}: {total_len} tokens need {needed} pages ({sizes}), the pool has {one.num_usable}"
                )
        return None

    def clip(self, sequence: Hashable | Tracked, num_new: int) -> int:
        """`num_new`, shortened so that the next step of a sequence, or the first behind a hit, ends where a recurrent state is
        to be kept for later hits."""
        held = sequence if isinstance(sequence, Tracked) else self._get(sequence)
        if held.ids is None or not self._states:
            return num_new
        first = held.length // self._page_size + 1
        for boundary in range(first, (held.length + num_new) // self._page_size + 1):
            if self._keeps(held, boundary):
                return boundary * self._page_size - held.length
        return num_new

    def audit(self) -> tuple[Account, ...]:
        """Where every byte is now, one account a class; they add up."""
        starving = [store.num_available == 0 for store in self.stores]
        accounts = []
        for number, store in enumerate(self.stores):
            num_free = store.num_available - self.index.num_loose[number]
            others_starve = any(starving[:number] + starving[number + 1 :])
            stranded = num_free * store.state.page_bytes if others_starve else 0
            sequences = [Held(h.length, h.num_new, h.lookahead, h.holdings[number]) for h in self.running.values()]
            accounts.append(account(store.state, num_free, sequences, self.index.cached[number], stranded))
        return tuple(accounts)

    def check(self) -> None:
        """Raises AssertionError on a broken invariant; see `invariants`."""
        from kvlab.ledger.invariants import check  # which needs to know what a ledger is

        check(self)

    def lookup(self, tokens: TokenIds, namespace: str = "") -> Tracked:
        """The longest joint hit of a prompt, at most its length - 1 tokens, and pins it.

        Its sequence will publish what it computes under the same namespace. Raises ValueError for an empty prompt and for
        tokens that are no integers of [0, 2^31).
        """
        self.publish()
        ids = encode(tokens)
        if not ids:
            raise ValueError("tokens = []: a prompt has at least one token")
        path, num_pages = self.index.match(namespace, ids, len(tokens)) if self._shares else ([], 0)
        holdings = [Holding() for _ in self.classes]
        for store, holding in zip(self.stores, holdings, strict=True):
            for logical, cached in self.index.needed(path, store.number, num_pages):
                holding.pages[logical] = cached.page
                store.share(cached.page)
        hit = Tracked(
            holdings, [self.index.root(namespace), *path[:num_pages]], bytearray(ids) if self._shares else None
        )
        hit.prompt_len, hit.junction, hit.length = len(tokens), len(path), num_pages * self._page_size
        hit.path[-1].locks += 1
        self.hits.add(hit)
        self._note_peak()
        return hit

    def unpin(self, hit: Tracked) -> None:
        """Lets go of a hit that no sequence took. Raises ValueError if one did."""
        if hit not in self.hits:
            raise ValueError("hit: is spent already")
        self.hits.remove(hit)
        for store, holding in zip(self.stores, hit.holdings, strict=True):
            for page in reversed(holding.pages.values()):
                store.drop(page)
        self.index.unlock(hit.path[-1])

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

        A new sequence takes a `hit` over and starts behind it; with `lengths`, what cannot fit in the end is refused at once, and
        contiguous reservations know their size. `Wait` when pages are short, `Never` when an empty pool would be too
        small: neither changes anything, and the hit stays pinned. Raises ValueError for counts out of range and when the
        sequence's last step is not settled.
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
            raise ValueError(f"sequence {sequence!r}: its step of {held.num_new} tokens is not committed")
        end = held.length + num_new + lookahead
        final = max(end, lengths.final_len) if lengths else end
        if final > self._longest_alone and (never := self.never(final)):
            return never
        missing = []
        for store, holding in zip(self.stores, held.holdings, strict=True):
            missing.append(store.missing(holding, held.length, end, lookahead))
            if refusal := store.refusal(holding, missing[-1], end):
                if not self._unpublished:
                    return refusal
                self.publish()  # which frees pages that others have published as well
                return self.reserve(sequence, num_new, lookahead, hit=hit, lengths=lengths)
        taken = self._take([len(pages) for pages in missing])
        if sequence not in self.running:
            self._install(sequence, held, hit)
        for store, holding, pages, new in zip(self.stores, held.holdings, missing, taken, strict=True):
            store.give(holding, pages, new)
        held.num_new, held.lookahead = num_new, lookahead
        self._refresh(held)
        self._note_peak()
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
        """The arrays of one step of [batch_size, num_tokens] for sequences with a reservation, in this order; the rest is
        padding that reads the null page and writes nowhere. Raises ValueError when they do not fit the shape."""
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"sequences = {list(sequences)}: each may be in a step once")
        steps = [self.running.get(sequence) or self._get(sequence) for sequence in sequences]
        starts, counts = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
        new = [held.num_new for held in steps]
        if not all(new):
            raise ValueError(f"sequence {sequences[new.index(0)]!r}: no step is reserved")
        sizes = [held.num_new + held.lookahead for held in steps]
        if len(steps) > batch_size or max(sizes, default=0) > num_tokens:
            shape = f"{len(steps)} steps of {max(sizes, default=0)} tokens"
            raise ValueError(f"{shape} do not fit [{batch_size}, {num_tokens}]")
        starts[: len(steps)], counts[: len(steps)] = [held.length for held in steps], sizes
        by_class = ([held.holdings[number] for held in steps] for number in range(len(self.stores)))
        plans = (store.plan(one, starts, counts, num_tokens) for store, one in zip(self.stores, by_class, strict=True))
        return Plan(starts, counts, tuple(plans))

    def commit(self, sequence: Hashable, num_accepted: int, tokens: TokenIds = ()) -> None:
        """The step ran and its first `num_accepted` tokens count; `tokens` are ids that the prompt did not hold.

        Full pages whose ids are known are published, pages outside live(n) become free. Raises ValueError when no step is in
        flight, when more is accepted than was reserved, and when less is beside a recurrent state: that can only be
        rejected as a whole, and only if the step had lookahead (feed the accepted tokens again).
        """
        held = self._get(sequence)
        if num_accepted == held.num_new > 0 and held.length + held.num_new < min(held.wake, held.full):
            if len(tokens) and held.ids is not None:
                self._learn(held, held.length + held.num_new, tokens)
            held.length += held.num_new
            held.num_new = 0
            return
        num_accepted = operator.index(num_accepted)
        reserved = held.num_new + held.lookahead
        if not 0 <= num_accepted <= reserved or not reserved:
            raise ValueError(f"num_accepted = {num_accepted}: must be in [0, {reserved}] reserved tokens")
        if num_accepted < reserved and self._states and (num_accepted or (held.length and not held.lookahead)):
            legal = f"must be {'0 or ' * (held.lookahead > 0)}all {reserved} reserved tokens"
            name = self._states[0].state.name
            raise ValueError(f"num_accepted = {num_accepted}: {legal}, since {name} cannot be rolled back further")
        if held.ids is not None and len(tokens):
            self._learn(held, held.length + num_accepted, tokens)
        self._settle(held, num_accepted, ran=True)

    def commit_each(self, sequences: Sequence[Hashable], tokens: TokenIds) -> list[bool]:
        """`commit(sequence, 1, [token])` for each of these where it only raises a count; False where `commit` must be asked. Pages
        that are full then wait for `publish`: until it is called, nobody sees what was computed."""
        data, done = encode(tokens), list[bool]()
        for place, name in enumerate(sequences):
            held = self.running[name]
            ids, end = held.ids, held.length + 1
            if plain := held.num_new == 1 and end < held.wake and (ids is None or len(ids) == held.length * ITEM):
                if ids is not None:
                    ids += data[place * ITEM : (place + 1) * ITEM]
                held.length, held.num_new = end, 0
                if end >= held.full:
                    held.full = NEVER_WAKES
                    self._unpublished.append(held)
            done.append(plain)
        return done

    def publish(self) -> None:
        """Publishes what `commit_each` has put off. Whoever could tell the difference does so first."""
        while self._unpublished:
            self._seal(held := self._unpublished.pop(0))
            self._refresh(held)

    def cancel(self, sequence: Hashable) -> None:
        """The reserved step will not run: its pages are free again, and a sequence that holds nothing else is gone.

        Raises ValueError when no step is in flight.
        """
        held = self._get(sequence)
        if not held.num_new:
            raise ValueError(f"sequence {sequence!r}: no step is in flight")
        if held.length:
            self._settle(held, 0, ran=False)
        else:
            self.release(sequence)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """`child` continues from where `parent` is and shares every page; the first to write a shared page copies it.

        Raises ValueError while a step is in flight, for a name in use, and beside contiguous reservations.
        """
        held = self._idle(parent)
        if child in self.running or child in self.suspended:
            raise ValueError(f"sequence {child!r}: the name is in use")
        ids = None if held.ids is None else bytearray(held.ids)
        twin, row = Tracked([], list(held.path), ids, held.prompt_len, held.junction, held.length), self._new_row()
        for store, one in zip(self.stores, held.holdings, strict=True):
            twin.holdings.append(Holding(dict(one.pages), row=row))
            for page in one.pages.values():
                store.share(page)
            store.table[row], store.starts[row] = store.table[one.row], store.starts[one.row]
        if twin.path:
            twin.path[-1].locks += 1
        self.running[child] = twin
        self._refresh(held)
        self._refresh(twin)

    def release(self, sequence: Hashable, keep: bool = True) -> None:
        """Frees everything a sequence holds, a step in flight included; what it published stays in the index, unless not
        `keep`: then what nobody else uses of its path is freed as well. Raises KeyError if it holds nothing."""
        if (held := self.suspended.pop(sequence, None)) is not None:
            for store, holding in zip(self.stores, held.holdings, strict=True):
                store.host_free.extend(holding.pages.values())
        else:
            held = self._get(sequence)
            if keep:
                self.publish()
            elif held in self._unpublished:
                self._unpublished.remove(held)
            del self.running[sequence]
            self._let_go(held)
        if not keep:
            for node in reversed(held.path[1:]):
                for store, cached in zip(self.stores, node.pages, strict=True):
                    if cached is not None and cached.queued is not None:
                        store.withdraw(cached)
        if held.path:
            self.index.unlock(held.path[-1])

    def evict(self, name: str, num_pages: int) -> int:
        """Frees up to `num_pages` cached pages of a class in the policy's order; returns how many were."""
        store = next((store for store in self.stores if store.state.name == name), None)
        if store is None or num_pages < 0:
            legal = ", ".join(one.name for one in self.classes)
            raise ValueError(f"evict({name!r}, {num_pages}): must be at least 0 pages of one of {legal}")
        count = min(num_pages, self.index.num_loose[store.number])
        for _ in range(count):
            store.evict()
        return count

    def swap_out(self, sequence: Hashable) -> Swap | Wait:
        """Moves a sequence to the host: its device pages are free once the swap has run. `Wait` when the host is full.

        Raises ValueError while a step is in flight and beside contiguous reservations.
        """
        return swapping.swap_out(self, sequence, self._idle(sequence))

    def swap_in(self, sequence: Hashable) -> Swap | Wait:
        """Brings a sequence back; pages that the index still holds are shared instead of moved. `Wait` when pages are short."""
        if sequence not in self.suspended:
            raise KeyError(f"sequence {sequence!r}: is not swapped out")
        return swapping.swap_in(self, sequence)

    def _begin(self, sequence: Hashable, hit: Tracked | None, lengths: Lengths | None) -> Tracked:
        """A sequence that is not installed yet and holds what its hit pins."""
        if sequence in self.suspended:
            raise ValueError(f"sequence {sequence!r}: is swapped out")
        if hit is not None and hit not in self.hits:
            raise ValueError("hit: is spent already")
        lengths = lengths and Lengths(*map(operator.index, lengths))
        if lengths and not 0 <= lengths.prompt_len <= lengths.final_len:
            raise ValueError(f"lengths = {tuple(lengths)}: must be 0 <= prompt_len <= final_len")
        if hit is None:
            return Tracked([Holding(lengths=lengths) for _ in self.classes])
        holdings = [replace(holding, lengths=lengths) for holding in hit.holdings]
        return replace(hit, holdings=holdings, path=list(hit.path))

    def _install(self, sequence: Hashable, held: Tracked, hit: Tracked | None) -> None:
        """A sequence begins: a row, and a hit's pins and lock, which are its own from now on."""
        row = self._new_row()
        for store, holding in zip(self.stores, held.holdings, strict=True):
            holding.row = row
            for logical, page in holding.pages.items():
                store.assign(holding, logical, page)
        if hit is not None:
            self.hits.remove(hit)
            self.counters.looked_up_tokens += hit.prompt_len
            self.counters.hit_tokens += hit.length
            for store, holding in zip(self.stores, held.holdings, strict=True):
                self.index.policies[store.number].num_lookups += 1
                for page in holding.pages.values():
                    self.index.hit(self.index.cached[store.number][page])
        self.running[sequence] = held

    def _take(self, counts: Sequence[int]) -> list[list[int]]:
        """New pages of every class, or none at all: what was taken before a failure goes back."""
        taken: list[list[int]] = [[] for _ in self.stores]
        try:
            for store, pages, count in zip(self.stores, taken, counts, strict=True):
                for _ in range(count):
                    pages.append(store.take())
        except BaseException:
            for store, pages in zip(self.stores, taken, strict=True):
                for page in pages:
                    store.drop(page)
            raise
        return taken

    def _learn(self, held: Tracked, new_length: int, tokens: TokenIds) -> None:
        """Appends ids of accepted tokens. Raises ValueError unless every token's id is then known."""
        assert held.ids is not None
        known = len(held.ids) // ITEM + len(tokens)
        if known != max(held.prompt_len, new_length):
            raise ValueError(f"tokens: {known} ids known, for {new_length} tokens stored: must be as many")
        held.ids += encode(tokens)

    def _settle(self, held: Tracked, num_accepted: int, *, ran: bool) -> None:
        """Ends a step: the tokens count, full pages are published, and what live(n) does not need is let go."""
        held.length += num_accepted
        held.num_new = held.lookahead = 0
        for store, holding in zip(self.stores, held.holdings, strict=True):
            store.settle(holding, held.length, num_accepted, ran=ran)
        if held.ids is not None:
            self._seal(held)
        for store, holding in zip(self.stores, held.holdings, strict=True):
            store.forget(holding, held.length)
        self._refresh(held)

    def _seal(self, held: Tracked) -> None:
        """Publishes full pages whose ids are known, and the recurrent states that are to be kept."""
        assert held.ids is not None
        page_bytes, tip = self._page_size * ITEM, held.path[-1]
        num_sealed = min(held.length, len(held.ids) // ITEM) // self._page_size
        while (logical := len(held.path) - 1) < num_sealed:
            ids = bytes(held.ids[logical * page_bytes : (logical + 1) * page_bytes])
            node = self.index.find(held.path[-1], ids, grow=True)
            assert node is not None
            held.path.append(node)
            for store, holding in zip(self.stores, held.holdings, strict=True):
                if store.state.paged and logical in holding.pages:
                    self._offer(store, holding, node, logical)
        if num_sealed and held.length == num_sealed * self._page_size and self._keeps(held, num_sealed):
            self._keep_states(held, in_answer=held.length > held.prompt_len)
        if held.path[-1] is not tip:
            held.path[-1].locks += 1
            self.index.unlock(tip)

    def _offer(self, store: Store, holding: Holding, node: Node, logical: int) -> None:
        """Publishes a sequence's page, or gives it up for the identical one that the index has."""
        own, cached = holding.pages[logical], node.pages[store.number]
        if cached is None:
            store.publish(node, own)
        elif cached.page != own:
            store.share(cached.page)
            store.drop(own)
            store.assign(holding, logical, cached.page)
            self.counters.deduplicated_pages += 1

    def _keeps(self, held: Tracked, boundary: int) -> bool:
        """Whether the recurrent state after `boundary` pages is to be kept."""
        return self.checkpoints.wants(boundary, (held.prompt_len - 1) // self._page_size, held.junction)

    def _keep_states(self, held: Tracked, *, in_answer: bool) -> None:
        """Publishes the recurrent states at the end of the path; the newest of an answer replaces the one before."""
        node = held.path[-1]
        for store in self._states:
            self._offer(store, held.holdings[store.number], node, 0)
        if in_answer and self.checkpoints.name == "junctions":
            for old in held.rolling:
                if old.loose and old.uses == 1 and old.node.pages[old.state_class] is old:
                    self.stores[old.state_class].withdraw(old)
            kept = (node.pages[store.number] for store in self._states)
            held.rolling = [cached for cached in kept if cached is not None]

    def _refresh(self, held: Tracked) -> None:
        """Until when the next steps need nothing: see `Tracked.room` and `wake`."""
        room, wake, busy = self.max_len, NEVER_WAKES, held.lookahead > 0
        for store, holding in zip(self.stores, held.holdings, strict=True):
            room, wake = min(room, store.room(holding, held.length)), min(wake, store.wake(holding))
            busy = busy or bool(holding.copies) or holding.writing is not None
        held.full = NEVER_WAKES if held.ids is None else (held.length // self._page_size + 1) * self._page_size
        if self._states:  # the next step overwrites what is to be kept
            wake = min(wake, held.full)
        held.room, held.wake = room, 0 if busy else wake

    def _let_go(self, held: Tracked) -> None:
        """A sequence leaves the device."""
        for store, holding in zip(self.stores, held.holdings, strict=True):
            store.let_go(holding)
        self.free_rows.append(held.holdings[0].row)

    def _new_row(self) -> int:
        if not self.free_rows:
            num_rows = len(self.stores[0].table)
            more = max(8, num_rows)
            for store in self.stores:
                store.add_rows(more)
            self.free_rows = list(range(num_rows + more - 1, num_rows - 1, -1))
        return self.free_rows.pop()

    def _get(self, sequence: Hashable) -> Tracked:
        held = self.running.get(sequence)
        if held is None:
            where = "is swapped out" if sequence in self.suspended else "holds nothing"
            raise KeyError(f"sequence {sequence!r}: {where}")
        return held

    def _idle(self, sequence: Hashable) -> Tracked:
        """A sequence that can be shared or moved: no step in flight, no contiguous reservation, everything published."""
        self.publish()
        held = self._get(sequence)
        if held.num_new:
            raise ValueError(f"sequence {sequence!r}: its step of {held.num_new} tokens is not committed")
        if not self._shares:
            raise ValueError(f"sequence {sequence!r}: contiguous reservations are neither shared nor swapped")
        return held

    def _note_peak(self) -> None:
        total, counters = 0, self.counters
        for number, store in enumerate(self.stores):
            num_held = store.state.num_usable - store.num_available
            total += num_held * store.state.page_bytes
            counters.peak_pages[number] = max(counters.peak_pages[number], num_held)
        counters.peak_bytes = max(counters.peak_bytes, total)
