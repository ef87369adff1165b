"""A ledger beside its shadows: the device in tags, and what must hold between them."""

import itertools
from collections.abc import Callable

import numpy as np

from kvlab.ledger.accounting import PARTS
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import Compaction, Plan
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.tracked import Tracked
from pallas_kernels.visible import NOWHERE
from tests.ledger import shadows
from tests.ledger.shadows import Shadow, make_ledger
from tests.ledger.test_states import visible_by_mask


class CheckedLedger:
    """One ledger, the shadows of its sequences, and what is in memory."""

    def __init__(self, draw: Callable[[int], int], thorough: bool = True):
        self.draw, self.thorough = draw, thorough
        self.model = self.pick(list(shadows.MODELS))
        self.page_size = self.pick([1, 2, 3, 4])
        self.policy = self.pick(list(POLICIES))
        checkpoints = self.pick(
            [Checkpoints("none"), Checkpoints("every", 2), Checkpoints("junctions"), Checkpoints("all")]
        )
        collide = draw(4) == 0
        digest = {"digest": lambda data: b"same"} if collide else {}
        self.ledger = make_ledger(
            self.model,
            self.page_size,
            2 + draw(24) + 12 // self.page_size,
            1 + draw(6),
            policy=POLICIES[self.policy],
            checkpoints=checkpoints,
            **digest,
            **({"sealing": (draw(4), draw(2) == 0)} if shadows.SEALED in shadows.MODELS[self.model] else {}),
        )
        self.options = (self.model, self.page_size, self.policy, checkpoints, collide)
        self.sealed = next((i for i, state in enumerate(self.ledger.classes) if state.is_sealed), None)
        self.num_sealed = 0
        self.live: dict[int, Shadow] = {}
        self.away: dict[int, Shadow] = {}
        self.hits: list[tuple[Tracked, Shadow]] = []
        self.tags: list[dict[int, tuple]] = [{} for _ in self.ledger.classes]
        self.host: list[dict[int, tuple]] = [{} for _ in self.ledger.classes]
        self.published: set[tuple] = set()
        self.losses = itertools.count()
        self.readable: list[dict[int, int]] = [{} for _ in self.ledger.classes]
        self.names = itertools.count()
        self.plans: list[Plan] = []
        self.compactions: list[Compaction] = []
        self._watch_evictions()

    def pick(self, options: list):
        """One of several."""
        return options[self.draw(len(options))]

    # The device, in tags.

    def _page_tags(self, tags: dict[int, tuple], page: int) -> dict[int, tuple]:
        return {o: tags[page * self.page_size + o] for o in range(self.page_size) if page * self.page_size + o in tags}

    def _write_page(self, state: StateClass, tags: dict[int, tuple], page: int, content: dict[int, tuple]) -> None:
        for offset in range(self.page_size):
            tags.pop(page * self.page_size + offset, None)
        tags.update({page * self.page_size + o: tag for o, tag in content.items()})

    def _run(self, name: int) -> None:
        """What a step reads must be its history; what it writes nobody else may hold."""
        shadow = self.live[name]
        width = len(shadow.drafts)
        plan = self.ledger.plan([name], 2, width)
        self.plans.append(plan)
        start = len(shadow.ids)
        assert plan.starts.tolist() == [start, 0]
        assert plan.counts.tolist() == [width, 0]
        for number, (state, step) in enumerate(zip(self.ledger.classes, plan.classes, strict=True)):
            tags, refs = self.tags[number], self.ledger.stores[number].refs
            assert step.valid is None
            assert all(array is None or array.dtype == np.int32 for array in step)
            positions = shadow.slots(number)
            assert step.starts.tolist() == [len(positions), 0]
            if not state.spec.per_token:
                read, write = int(step.pages[0, 0]), int(step.write_slots[0, 0])
                assert step.pages[1, 0] == step.write_slots[1, 0] == state.num_pages
                if start:
                    assert tags[read * self.page_size] == shadow.tag(start - 1), "a recurrent state of another history"
                assert refs[write] == 1, "a slot that others hold is written"
                tags[write * self.page_size] = shadow.tag(start + width - 1)
                continue
            contents = [(dst, self._page_tags(tags, src)) for src, dst in step.copies.tolist()]
            for page, content in contents:
                self._write_page(state, tags, page, content)
            readable = {}
            for page, first in zip(step.pages[0].tolist(), step.page_starts[0].tolist(), strict=True):
                assert (first == NOWHERE) == (page == 0), "the null page is never listed"
                if page:
                    readable |= {first + o: page * state.page_size + o for o in range(state.page_size)}
            assert set(step.write_slots[1].tolist()) == {state.num_pages * state.page_size}
            if number == self.sealed:
                assert set(step.write_slots[0].tolist()) == {state.num_pages * state.page_size}, "sealed, and written"
                found = [tags[readable[place]] for place in range(len(positions))]
                assert found == [("rounded", shadow.tag(position)) for position in positions]
                assert len(readable) == len(positions), "a sealed page is full"
                continue
            self.readable[number], first = readable, len(positions)
            positions = positions + list(range(start, start + width))
            for n in range(width):
                slot = int(step.write_slots[0, n])
                assert readable[first + n] == slot, "a token is written where the table says it is read"
                assert refs[slot // state.page_size] == 1, "a page that others hold is written"
                tags[slot] = shadow.tag(start + n)
            for n in range(first, first + width):
                for place in visible_by_mask(state.spec, n):
                    assert tags[readable[place]] == shadow.tag(positions[place]), "another history is read"

    # Checks.

    def state(self) -> tuple:
        """All that a refused request must leave as it was."""
        ledger = self.ledger
        return (
            [(list(store.refs), sorted(store.free), sorted(store.host_free)) for store in ledger.stores],
            {name: (held.length, held.num_new, held.holdings[0].row) for name, held in ledger.running.items()},
            [sorted(ledger.index.cached[number]) for number in range(len(ledger.classes))],
            ledger.audit(),
        )

    def verify(self) -> None:
        """Every invariant, and every account against sets of slots."""
        self.ledger.check()
        assert set(self.ledger.sequences) == set(self.live)
        for name, shadow in [*self.live.items(), *self.away.items()]:
            assert self.ledger.length(name) == len(shadow.ids)
            stored = [len(shadow.slots(number)) for number in range(len(self.ledger.classes))]
            assert list(self.ledger.stored(name).values()) == stored
        if self.thorough:
            for number, account in enumerate(self.ledger.audit()):
                assert {part: getattr(account, part) for part in PARTS} == self.account(number)

    def account(self, number: int) -> dict[str, int]:
        """Where every slot of a class is, by going through them."""
        state, store = self.ledger.classes[number], self.ledger.stores[number]
        slots = dict.fromkeys(PARTS, 0)
        kind: dict[tuple[int, int], str] = {}
        ranks = ["tail", "dead", "lookahead", "live"]
        for name, shadow in self.live.items():
            holding = self.ledger.running[name].holdings[number]
            num_stored = len(shadow.slots(number))
            seen = visible_by_mask(state.spec, num_stored) if state.paged else set()
            first_draft = num_stored + len(shadow.drafts) - shadow.lookahead
            pages = [*holding.pages.items(), *([(1, holding.writing)] if holding.writing is not None else [])]
            for logical, page in pages:
                for offset in range(state.page_size):
                    position = logical * state.page_size + offset
                    if not state.paged:
                        what = "live" if logical == 0 else "lookahead" if shadow.lookahead else "tail"
                    elif position < num_stored:
                        what = "live" if position in seen else "dead"
                    else:
                        speculative = shadow.lookahead and first_draft <= position < first_draft + shadow.lookahead
                        what = "lookahead" if speculative else "tail"
                    kind[page, offset] = max(kind.get((page, offset), what), what, key=ranks.index)
        in_tables = {page for page, _ in kind}
        cached = set(self.ledger.index.cached[number]) - in_tables
        for tracked in self.ledger.running.values():
            for _, source in tracked.holdings[number].copies:
                if source not in in_tables | cached:
                    kind |= {(source, offset): "dead" for offset in range(state.page_size)}
        for what in kind.values():
            slots[what] += 1
        held = {page for page, _ in kind}
        scale = state.spec.scale_bytes * state.num_layers
        sizes = {part: count * (state.spec.unit_bytes * state.num_layers - scale) for part, count in slots.items()}
        sizes["scale"] = len(held) * (state.page_size * scale + state.spec.per_page_bytes * state.num_layers)
        sizes["cached"] = len(cached) * state.page_bytes
        sizes["null"] = state.has_null_page * state.page_bytes
        sizes["free"] = sum(refs == 0 for refs in store.refs[int(state.has_null_page) :]) * state.page_bytes
        return sizes

    def longest_hit(self, shadow: Shadow) -> int:
        """The joint hit by definition: the longest page boundary of which every class holds all of live(p)."""
        tries: list[dict[tuple, int]] = [{} for _ in self.ledger.classes]
        for node in self.ledger.index.nodes():
            ids, above = [], node
            while above.parent is not None:
                ids = np.frombuffer(above.tokens, "<i4").tolist() + ids
                above = above.parent
            root = next(name for name, root_node in self.ledger.index.roots.items() if root_node is above)
            if root == shadow.space:
                for number, cached in enumerate(node.pages):
                    if cached is not None:
                        tries[number][tuple(ids)] = cached.page
        most = min(len(shadow.prompt), self._first_sealing(len(shadow.prompt))) - 1
        for length in range(most // self.page_size * self.page_size, 0, -self.page_size):
            ends = {p // self.page_size * self.page_size + self.page_size for p in range(length)}
            whole = True
            for state, known in zip(self.ledger.classes, tries, strict=True):
                if state.is_sealed:
                    continue
                if state.spec.per_token:
                    ends = {
                        p // self.page_size * self.page_size + self.page_size
                        for p in visible_by_mask(state.spec, length)
                    }
                    whole &= all(tuple(shadow.prompt[:end]) in known for end in ends)
                else:
                    whole &= tuple(shadow.prompt[:length]) in known
            if whole:
                return length
        return 0

    def _first_sealing(self, prompt_len: int) -> int:
        """The first length at which pages of a sequence with such a prompt are sealed, by trying them all."""
        rule = self.ledger.classes[0].sealing
        if rule is None:
            return 10**6
        return next(n for n in range(1, 10**6) if rule.due(prompt_len, n, n))

    def _watch_evictions(self) -> None:
        """Every victim is the first of a sort of all pages that may go: held by the index alone, with nothing built on
        them. Where only such pages are left behind which sequences hold some, having sealed the first, those leave the
        index as well."""
        for store in self.ledger.stores:
            policy, evict = self.ledger.index.policies[store.number], store.evict
            plain = self.policy not in ("slru", "s3fifo")

            def watched(store=store, policy=policy, evict=evict, plain=plain) -> None:
                index, number = self.ledger.index, store.number
                eligible = [
                    cached
                    for cached in index.cached[number].values()
                    if store.refs[cached.page] == 1
                    and not (
                        index.whole_prefix[number]
                        and any(n.parent is cached.node and n.pages[number] for n in index.nodes())
                    )
                ]
                order = sorted(eligible, key=lambda cached: (policy.order(cached), -cached.node.depth, cached.page))
                before, loose = set(index.cached[number]), {p for p in index.cached[number] if store.refs[p] == 1}
                evict()
                withdrawn = before - set(index.cached[number])
                (gone,) = [page for page in withdrawn if store.refs[page] == 0]
                if not eligible:
                    assert number == 0, "only pages that are sealed are given up from the front"
                    assert self.sealed is not None
                    assert gone in loose
                    assert withdrawn & loose == {gone}
                    return
                assert withdrawn == {gone}
                assert gone in {cached.page for cached in eligible}, "a pinned page was evicted"
                assert not plain or gone == order[0].page, "not the policy's first"

            store.evict = watched

    def drain(self) -> None:
        """Everything ends: the initial state, and nothing remembers anybody."""
        for hit, _ in self.hits:
            self.ledger.unpin(hit)
        for name in [*self.live, *self.away]:
            self.ledger.release(name)
        for state in self.ledger.classes:
            self.ledger.evict(state.name, 10**6)
        self.ledger.check()
        for account, store in zip(self.ledger.audit(), self.ledger.stores, strict=True):
            assert account.free + account.null == account.pool
            assert not any(store.refs)
        assert not list(self.ledger.index.nodes())
        assert not list(self.ledger.index.roots)
        assert len(self.ledger.stores.free_rows) == len(self.ledger.stores[0].table)
