"""Random operations on a ledger beside a naive shadow that tags memory: who wrote each slot, after which tokens.

The shadow knows the definitions and nothing of the ledger's bookkeeping: a slot's tag is the whole history of token ids
that its content depends on. So whatever the ledger shares, copies, evicts, swaps or rolls back, a step must read
exactly the history it would have computed itself. Every choice comes from `draw(n)`, an integer in [0, n): Hypothesis',
or a random generator's in the soak.
"""

import numpy as np
import pytest

from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.classes import Lengths
from kvlab.ledger.tracked import Tracked
from tests.ledger.checks import CheckedLedger
from tests.ledger.shadows import CHUNK_LEN, MAX_LEN, Shadow


class Exerciser(CheckedLedger):
    """One ledger under random operations. `step()` does one and checks everything."""

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
            self.seal,
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
            shadow = Shadow(self.pick(["x", "y"]), self._prompt(), sealed=self.sealed)
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
            shadow = Shadow(self.pick(["x", "x", "y", None]), self._prompt(), sealed=self.sealed)
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
        lengths = None
        if name in self.ledger.running:
            if not self._seal([name]):
                return False
            num_new = self.ledger.clip(name, num_new)
            lookahead = min(lookahead, self.ledger.room_ahead(name) - num_new)
        elif self.sealed is not None:
            lengths = Lengths(len(shadow.prompt), len(shadow.prompt))
            num_new = self.ledger.clip(hit, num_new) if hit else self.ledger.clip_first(len(shadow.prompt), num_new)
        if all_published := name % 2 == 0:
            self.ledger.publish()
        before = self.state()
        answer = self.ledger.reserve(name, num_new, lookahead, hit=hit, lengths=lengths)
        if not isinstance(answer, Ready):
            assert not all_published or self.state() == before, "a refusal changed something"
            self._refusal_is_right(shadow, num_new + lookahead, answer, lengths is not None)
            return False
        following = shadow.prompt[len(shadow.ids) :][: num_new + lookahead]
        shadow.drafts = following + [self.draw(2) for _ in range(num_new + lookahead - len(following))]
        shadow.lookahead = lookahead
        return True

    def _refusal_is_right(self, shadow: Shadow, count: int, answer: Wait | Never, lengths_known: bool) -> None:
        end = len(shadow.ids) + count
        if isinstance(answer, Never):
            begins = self.sealed is not None and lengths_known
            ends = [len(shadow.slots(number)) + count for number in range(len(self.ledger.classes))]
            alone = [
                state.stored_pages(min(end_slot, MAX_LEN), CHUNK_LEN) > state.num_usable
                or (begins and state.max_pages(len(shadow.prompt), CHUNK_LEN, len(shadow.prompt)) > state.num_usable)
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
        for number, positions in shadow.kept.items():
            if number != self.sealed:
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
            if state.compactable and count and self.draw(4):
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

    def seal(self) -> None:
        """Between steps: some sequences have their oldest full pages rounded, and stored elsewhere."""
        idle = self._idle()
        self._seal(sorted({self.pick(idle) for _ in range(1 + self.draw(3))}) if idle else [])

    def _seal(self, names: list[int]) -> bool:
        """Whether nothing of these is left to be sealed; False: pages are short."""
        self.ledger.publish()
        before = self.state()
        counts = {name: self._num_due(name) for name in names}
        answer = self.ledger.seal(names)
        if isinstance(answer, Wait):
            assert self.state() == before
            assert len(self.live) + len(self.hits) > 1
            return False
        assert (answer is None) == (not any(counts.values()))
        if answer is None:
            return True
        assert self.sealed is not None
        seals, said = answer
        moves = iter(seals.classes[0].tolist())
        assert not any(len(each) for each in seals.classes[1:])
        content = {page: self._page_tags(self.tags[0], page) for page, _ in seals.classes[0].tolist()}
        for name, events in zip(names, said, strict=True):
            shadow, count = self.live[name], counts[name]
            assert [(each.state_class, each.length, each.num_pages) for each in events] == (
                [(0, len(shadow.ids), count)] if count else []
            )
            positions, num_slots = shadow.slots(0), count * self.page_size
            for first in range(0, num_slots, self.page_size):
                page, sealed = next(moves)
                assert self.ledger.stores[self.sealed].refs[sealed] == 1, "a sealed page that others hold is written"
                mine = [content[page][offset] for offset in range(self.page_size)]
                assert mine == [shadow.tag(position) for position in positions[first : first + self.page_size]]
                rounded = {offset: ("rounded", tag) for offset, tag in enumerate(mine)}
                self._write_page(self.ledger.classes[self.sealed], self.tags[self.sealed], sealed, rounded)
            if count:
                shadow.kept[self.sealed] = [*shadow.slots(self.sealed), *positions[:num_slots]]
                shadow.kept[0] = positions[num_slots:]
                shadow.losses.append((len(shadow.ids), next(self.losses)))
                self.num_sealed += count
        assert next(moves, None) is None
        return True

    def _num_due(self, name: int) -> int:
        """Pages to seal, by definition: those that are full and have `residual` newer slots behind them."""
        rule, shadow = self.ledger.classes[0].sealing, self.live[name]
        if rule is None or (
            len(shadow.ids) < len(shadow.prompt) and (rule.after_prompt or len(shadow.ids) % CHUNK_LEN)
        ):
            return 0
        num_open = len(shadow.slots(0))
        return sum(
            num_open - (page + 1) * self.page_size >= rule.residual for page in range(num_open // self.page_size)
        )

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
