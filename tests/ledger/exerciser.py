"""Random operations on a ledger beside a naive shadow that tags memory: who wrote each slot, after which tokens.

The shadow knows the definitions and nothing of the ledger's bookkeeping: a slot's tag is the whole history of token ids
that its content depends on. So whatever the ledger shares, copies, evicts, swaps or rolls back, a step must read
exactly the history it would have computed itself. Every choice comes from `draw(n)`, an integer in [0, n): Hypothesis',
or a random generator's in the soak.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvlab.ledger.accounting import PARTS
from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Compaction, Plan
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.states import ArraySpec, LatentState, RecurrentState, TokenState
from kvlab.ledger.tracked import Tracked
from pallas_kernels.visible import NOWHERE, Visible
from tests.ledger.test_states import visible_by_mask

FULL = TokenState(2, 4, 4)
WINDOWED = TokenState(1, 4, 4, visible=Visible(window=5, num_sinks=2))
CHUNKED = TokenState(1, 2, 2, "float16", visible=Visible(chunk=6), scale_dtype="float16").stored("int8")
LATENT = LatentState(4, 2)
STATE = RecurrentState((ArraySpec("ssm", (3, 3), "float32"),))
MODELS = {
    "full": (FULL,),
    "window": (WINDOWED,),
    "recurrent": (STATE,),
    "full_window": (FULL, WINDOWED),
    "latent_chunked": (LATENT, CHUNKED),
    "hybrid": (FULL, WINDOWED, STATE),
    "two_states": (CHUNKED, STATE, RecurrentState((ArraySpec("conv", (5,), "float32"),))),
}
MAX_LEN, CHUNK_LEN = 26, 6
HOST_PAGES = 9


def make_ledger(model: str, page_size: int, num_pages: int, num_slots: int, **options) -> Ledger:
    """A small ledger over the states of one of MODELS."""
    classes = []
    for number, spec in enumerate(MODELS[model]):
        name = f"{number}.{type(spec).__name__}"
        if spec.per_token:
            whole = StateClass(name, spec, page_size, num_pages, 99, 1 + number, num_host_pages=HOST_PAGES)
            classes.append(
                StateClass(
                    name,
                    spec,
                    page_size,
                    num_pages,
                    whole.max_pages(MAX_LEN, CHUNK_LEN),
                    1 + number,
                    num_host_pages=HOST_PAGES,
                )
            )
        else:
            classes.append(StateClass(name, spec, 1, num_slots, 1, 2, num_host_pages=3))
    return Ledger(classes, MAX_LEN, CHUNK_LEN, page_size=page_size, **options)


@dataclass
class Shadow:
    """What a sequence must remember: `ids` committed, `drafts` in flight, all of it, in plain lists.

    `kept` are the positions of the tokens that compaction left of a class, in the order of their slots. `losses` says
    at which length something was dropped, and in which compaction: from there on, what is computed is not what it would
    have been.
    """

    space: str | None
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    lookahead: int = 0
    kept: dict[int, list[int]] = field(default_factory=dict)
    losses: list[tuple[int, int]] = field(default_factory=list)

    def tag(self, position: int) -> tuple:
        """What the content of a token's slot depends on; of a recurrent state, that of the last token it has seen."""
        history = (self.ids + self.drafts)[: position + 1]
        return (*history, *(("lossy", loss) for length, loss in self.losses if length <= position))

    def slots(self, number: int) -> list[int]:
        """The positions of the tokens that a class stores, in the order of their slots."""
        return self.kept.get(number, list(range(len(self.ids))))

    def twin(self) -> "Shadow":
        """The same, in lists of its own."""
        kept = {number: list(positions) for number, positions in self.kept.items()}
        return Shadow(self.space, list(self.prompt), list(self.ids), kept=kept, losses=list(self.losses))


class Exerciser:
    """One ledger under random operations. `step()` does one and checks everything."""

    def __init__(self, draw: Callable[[int], int], thorough: bool = True):
        self.draw, self.thorough = draw, thorough
        self.model = self.pick(list(MODELS))
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
        )
        self.options = (self.model, self.page_size, self.policy, checkpoints, collide)
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

    # Operations.

    def step(self) -> str:
        """One random operation and all checks; returns its name."""
        actions = [
            self.submit,
            self.submit,
            self.advance,
            self.advance,
            self.advance,
            self.settle,
            self.settle,
            self.settle,
        ]
        actions += [
            self.speculate,
            self.cancel,
            self.fork,
            self.abort,
            self.swap_out,
            self.swap_in,
            self.evict,
            self.look,
            self.compact,
        ]
        action = self.pick(actions)
        action()
        self.verify()
        return action.__name__

    def _idle(self) -> list[int]:
        return [name for name, shadow in self.live.items() if not shadow.drafts]

    def _flying(self) -> list[int]:
        return [name for name, shadow in self.live.items() if shadow.drafts]

    def _prompt(self) -> list[int]:
        """Few ids and few lengths, so that prompts often share a prefix, or repeat one."""
        known = [shadow.prompt + shadow.ids[len(shadow.prompt) :] for shadow in self.live.values()]
        prompt = list(self.pick(known)) if known and self.draw(2) else []
        prompt = prompt[: self.draw(len(prompt) + 1)]
        return (prompt + [self.draw(2) for _ in range(1 + self.draw(12))])[: MAX_LEN - 2]

    def look(self) -> None:
        """Pins a hit, or lets one go."""
        if self.hits and self.draw(2):
            hit, _ = self.hits.pop(self.draw(len(self.hits)))
            self.ledger.unpin(hit)
        else:
            shadow = Shadow(self.pick(["x", "y"]), self._prompt())
            self.hits.append((self._lookup(shadow), shadow))

    def _lookup(self, shadow: Shadow) -> Tracked:
        hit = self.ledger.lookup(shadow.prompt, shadow.space)
        expected = self.longest_hit(shadow)
        assert hit.length == expected, f"hit {hit.length}, by brute force {expected}"
        assert hit.length <= len(shadow.prompt) - 1
        assert not hit.length or (shadow.space, tuple(shadow.prompt[: hit.length])) in self.published
        return hit

    def submit(self) -> None:
        """A new sequence: from a pinned hit, from a fresh lookup, or without one."""
        name, hit = next(self.names), None
        if self.hits and self.draw(2):
            hit, shadow = self.hits.pop(self.draw(len(self.hits)))
        else:
            shadow = Shadow(self.pick(["x", "x", "y", None]), self._prompt())
            hit = self._lookup(shadow) if shadow.space else None
        shadow.ids = shadow.prompt[: hit.length] if hit else []
        self.live[name] = shadow
        if not self._reserve(name, hit=hit):
            del self.live[name]
            if hit:
                self.ledger.unpin(hit)

    def advance(self) -> None:
        """The next chunk of a prompt, or one decoded token."""
        if idle := self._idle():
            self._reserve(self.pick(idle))

    def speculate(self) -> None:
        """One token and a few speculative ones."""
        if idle := self._idle():
            self._reserve(self.pick(idle), lookahead=1 + self.draw(CHUNK_LEN - 1))

    def _reserve(self, name: int, lookahead: int = 0, hit: Tracked | None = None) -> bool:
        shadow = self.live[name]
        known = len(shadow.prompt) - len(shadow.ids)
        num_new = 1 if lookahead or known <= 0 else 1 + self.draw(min(known, CHUNK_LEN))
        if hit is None and name in self.ledger.running:
            num_new = self.ledger.clip(name, num_new)
        if all_published := name % 2 == 0:
            self.ledger.publish()
        before = self.state()
        answer = self.ledger.reserve(name, num_new, lookahead, hit=hit)
        if not isinstance(answer, Ready):
            assert not all_published or self.state() == before, "a refusal changed something"
            self._refusal_is_right(shadow, num_new + lookahead, answer)
            return False
        following = shadow.prompt[len(shadow.ids) :][: num_new + lookahead]
        shadow.drafts = following + [self.draw(2) for _ in range(num_new + lookahead - len(following))]
        shadow.lookahead = lookahead
        return True

    def _refusal_is_right(self, shadow: Shadow, count: int, answer: Wait | Never) -> None:
        end = len(shadow.ids) + count
        if isinstance(answer, Never):
            ends = [len(shadow.slots(number)) + count for number in range(len(self.ledger.classes))]
            alone = [
                state.max_pages(min(end_slot, MAX_LEN), CHUNK_LEN) > state.num_usable
                for state, end_slot in zip(self.ledger.classes, ends, strict=True)
            ]
            slots = [state.num_usable < 2 for state in self.ledger.classes if not state.spec.per_token]
            assert end > MAX_LEN or any(alone) or any(slots)
        else:
            # Somebody or something else holds pages: alone, it would not wait.
            assert len(self.live) + len(self.hits) > 1

    def settle(self) -> None:
        """The device runs the step of one sequence, and what it proved counts."""
        if not (flying := self._flying()):
            return
        name = self.pick(flying)
        shadow = self.live[name]
        self._run(name)
        accepted = len(shadow.drafts)
        recurrent = any(not state.spec.per_token for state in self.ledger.classes)
        if (shadow.lookahead and recurrent) or (not shadow.ids and recurrent):
            accepted = self.pick([0, accepted])
        elif shadow.lookahead or not recurrent:
            accepted = self.draw(accepted + 1)
        start = len(shadow.ids)
        new = shadow.drafts[:accepted]
        shadow.ids += new
        for positions in shadow.kept.values():
            positions += range(start, start + accepted)
        unknown = (
            shadow.ids[max(len(shadow.prompt), start) :] if len(shadow.ids) > max(len(shadow.prompt), start) else []
        )
        # Drafts that contradict the prompt never occur: the prompt's own ids come first.
        shadow.drafts, lookahead, shadow.lookahead = [], shadow.lookahead, 0
        if self.draw(6) == 0 and self._compacted_by_its_step(name, accepted, unknown if shadow.space else ()):
            return
        decoded = accepted == 1 and not lookahead and (unknown or not shadow.space)
        if not (decoded and name % 3 and self.ledger.commit_each([name], new) == [True]):
            self.ledger.commit(name, accepted, unknown if shadow.space else ())
        if shadow.space and not shadow.losses:
            for end in range(self.page_size, len(shadow.ids) + 1, self.page_size):
                self.published.add((shadow.space, tuple(shadow.ids[:end])))

    def cancel(self) -> None:
        """A reserved step never runs."""
        if flying := self._flying():
            name = self.pick(flying)
            self.ledger.cancel(name)
            self.live[name].drafts = []
            if not self.live[name].ids:
                del self.live[name]
                assert name not in self.ledger.sequences

    def fork(self) -> None:
        """A copy of a sequence that shares everything."""
        if idle := self._idle():
            parent, child = self.pick(idle), next(self.names)
            self.ledger.fork(parent, child)
            self.live[child] = self.live[parent].twin()

    def abort(self) -> None:
        """A sequence ends, perhaps in flight, perhaps on the host, perhaps leaving nothing behind."""
        if everyone := [*self.live, *self.away]:
            name = self.pick(everyone)
            self.ledger.release(name, keep=self.draw(3) > 0)
            self.live.pop(name, None)
            self.away.pop(name, None)

    def swap_out(self) -> None:
        """To the host."""
        if idle := self._idle():
            self.ledger.publish()
            name, before = self.pick(idle), self.state()
            answer = self.ledger.swap_out(name)
            if isinstance(answer, Wait):
                assert self.state() == before
                return
            for moves, tags, host in zip(answer.classes, self.tags, self.host, strict=True):
                for page, there in moves.tolist():
                    host[there] = self._page_tags(tags, page)
            self.away[name] = self.live.pop(name)

    def swap_in(self) -> None:
        """And back."""
        if self.away:
            name, before = self.pick(list(self.away)), self.state()
            answer = self.ledger.swap_in(name)
            if isinstance(answer, Wait):
                assert self.state() == before
                return
            for state, moves, tags, host in zip(self.ledger.classes, answer.classes, self.tags, self.host, strict=True):
                for page, there in moves.tolist():
                    self._write_page(state, tags, page, host[there])
            self.live[name] = self.away.pop(name)

    def evict(self) -> None:
        """Frees some cached pages of a class, or all."""
        state = self.pick(list(self.ledger.classes))
        self.ledger.evict(state.name, self.pick([1, 2, 999]))

    def _choose(self, shadow: Shadow) -> dict[int, list[int]]:
        """Of some classes, which slots stay: never none, rarely all."""
        chosen = {}
        for number, state in enumerate(self.ledger.classes):
            count = len(shadow.slots(number))
            if state.spec.per_token and state.spec.span is None and count and self.draw(4):
                keep = 1 + self.draw(max(1, count // 2) if self.draw(2) else count)
                first = self.draw(count - keep + 1)
                chosen[number] = sorted((first + place * (1 + self.draw(2))) % count for place in range(keep))
                chosen[number] = sorted(set(chosen[number]))
        return chosen

    def _lose(self, shadow: Shadow, chosen: dict[int, list[int]], loss: int) -> None:
        """The shadow forgets what was not chosen."""
        for number, slots in chosen.items():
            positions = shadow.slots(number)
            if len(slots) < len(positions):
                shadow.kept[number] = [positions[slot] for slot in slots]
                if (len(shadow.ids), loss) not in shadow.losses:
                    shadow.losses.append((len(shadow.ids), loss))

    def _compacted_by_its_step(self, name: int, accepted: int, tokens) -> bool:
        """The step that just ran packs what it leaves into the sequence's own pages; refused where they are shared."""
        shadow = self.live[name]
        chosen = self._choose(shadow)
        stored = {number: len(slots) for number, slots in chosen.items()}
        shared = []
        for number, slots in chosen.items():
            refs, page_size = self.ledger.stores[number].refs, self.page_size
            if len(slots) < len(shadow.slots(number)):
                pages = {self.readable[number][slot] // page_size for slot in range(len(slots))}
                shared += [page for page in pages if refs[page] > 1]
        if shared:
            before = self.state()
            with pytest.raises(ValueError, match="must be left out while others share these pages"):
                self.ledger.commit(name, accepted, tokens, stored)
            assert self.state() == before
            return False
        for number, slots in chosen.items():
            tags, readable = self.tags[number], self.readable[number]
            content = [tags[readable[slot]] for slot in slots]
            for slot in readable.values():
                tags.pop(slot, None)
            tags.update({readable[slot]: tag for slot, tag in enumerate(content)})
        by_name = {self.ledger.classes[number].name: keep for number, keep in stored.items()}
        self.ledger.commit(name, accepted, tokens, by_name if self.draw(2) else stored)
        self._lose(shadow, chosen, next(self.losses))
        if shadow.space and not shadow.losses:
            for end in range(self.page_size, len(shadow.ids) + 1, self.page_size):
                self.published.add((shadow.space, tuple(shadow.ids[:end])))
        return True

    def compact(self) -> None:
        """Between steps: some sequences keep some of their slots, in pages that nobody else reads."""
        idle = self._idle()
        idle = [name for name in idle if len(self.live[name].ids) > self.page_size] or idle
        names = sorted({self.pick(idle) for _ in range(1 + self.draw(3))}) if idle else []
        self.ledger.publish()
        chosen = {name: self._choose(self.live[name]) for name in names}
        before, held = self.state(), [dict(store.index.cached[store.number]) for store in self.ledger.stores]
        pages = {
            name: [list(holding.pages.values()) for holding in self.ledger.running[name].holdings] for name in names
        }
        stored = {name: {number: len(slots) for number, slots in mine.items()} for name, mine in chosen.items()}
        answer = self.ledger.compact(stored)
        if isinstance(answer, Wait):
            assert self.state() == before
            assert len(self.live) + len(self.hits) > 1
            return
        self.compactions.append(answer)
        for number, (state, step) in enumerate(zip(self.ledger.classes, answer.classes, strict=True)):
            assert all(array.dtype == np.int32 for array in step)
            read = {}
            for row, name in enumerate(names):
                slots, shadow = chosen[name].get(number, []), self.live[name]
                if not len(slots) < len(shadow.slots(number)) or not slots:
                    assert step.keep[row] == step.stored[row] == 0
                    assert set(step.destinations[row].tolist()) <= {state.num_pages}
                    continue
                assert (step.stored[row], step.keep[row]) == (len(shadow.slots(number)), len(slots))
                mine = [page for page in step.pages[row].tolist() if page]
                assert mine == pages[name][number]
                flat = [mine[slot // self.page_size] * self.page_size + slot % self.page_size for slot in slots]
                read[row] = [self.tags[number][slot] for slot in flat]
            for row, content in read.items():
                destinations = [page for page in step.destinations[row].tolist() if page < state.num_pages]
                assert len(destinations) == -(-len(content) // self.page_size)
                cached = set(held[number]) & set(self.ledger.index.cached[number])
                for page in destinations:
                    assert page not in cached, "a page that the index keeps is written"
                    assert self.ledger.stores[number].refs[page] == 1, "a page that others hold is written"
                    self._write_page(state, self.tags[number], page, {})
                for slot, tag in enumerate(content):
                    page, offset = destinations[slot // self.page_size], slot % self.page_size
                    self.tags[number][page * self.page_size + offset] = tag
        loss = next(self.losses)
        for name in names:
            self._lose(self.live[name], chosen[name], loss)

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
            assert all(array.dtype == np.int32 for array in step[:-1])
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
        sizes["scale"] = len(held) * state.page_size * scale
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
        for length in range((len(shadow.prompt) - 1) // self.page_size * self.page_size, 0, -self.page_size):
            ends = {p // self.page_size * self.page_size + self.page_size for p in range(length)}
            whole = True
            for state, known in zip(self.ledger.classes, tries, strict=True):
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

    def _watch_evictions(self) -> None:
        """Every victim is the first of a sort of all pages that may go: held by the index alone, with nothing built on
        them."""
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
                before = set(index.cached[number])
                evict()
                (gone,) = before - set(index.cached[number])
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
