"""What the device does before a step, in tags: swaps, compactions and sealings hand pages on to each other, so that
their order decides what is read."""

import random

import pytest

from kvlab.engine.entries import Entry, Move
from kvlab.engine.scheduler import Schedule, Scheduler
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.memory_states import SealedState
from kvlab.ledger.plan import Compaction, Seals
from kvlab.ledger.retention import Retention, Sealing
from kvlab.ledger.states import TokenState
from pallas_kernels.visible import NOWHERE

PAGE, CHUNK, MAX_LEN = 4, 6, 40


def ledger_of(kind: str, num_pages: int) -> Ledger:
    rule = {"retention": Retention(slots=6, every=5)} if kind == "compacted" else {}
    if kind == "sealed":
        rule = {"sealing": Sealing(3, PAGE, CHUNK, after_prompt=False), "sealed_name": "sealed"}
    full = StateClass("kv", TokenState(1, 4, 4), PAGE, num_pages, 10, num_host_pages=30, **rule)
    sealed = StateClass("sealed", SealedState(1, 4, 4, group=4), PAGE, 14, 10, num_host_pages=30)
    return Ledger([full, sealed] if kind == "sealed" else [full], MAX_LEN, CHUNK)


class TaggedMemory:
    """Slots that hold (sequence, position), by class and page."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.pages: list[dict[int, list]] = [{} for _ in ledger.classes]
        self.host: list[dict[int, list]] = [{} for _ in ledger.classes]
        self.stored: dict[str, list[int]] = {}
        self.counts = dict.fromkeys(("out", "in", "packed", "sealed"), 0)

    def prepare(self, before) -> None:
        """Does what a step says, in its order."""
        for each in before:
            if isinstance(each, Move):
                self._carry(each)
            elif isinstance(each, Seals):
                for page, sealed in each.classes[0].tolist():
                    self.pages[1][sealed] = list(self.pages[0][page])
                    self.counts["sealed"] += 1
            else:
                self._pack(each)

    def _carry(self, move: Move) -> None:
        for number, moves in enumerate(move.swap.classes):
            for page, there in moves.tolist():
                if move.direction == "out":
                    self.host[number][there] = list(self.pages[number][page])
                else:
                    self.pages[number][page] = list(self.host[number][there])
        self.counts[move.direction] += 1

    def _pack(self, compaction: Compaction) -> None:
        """Keeps the first slots of each."""
        (mine,) = compaction.classes
        taken = [[self.pages[0][page] for page in row if page] for row in mine.pages.tolist()]
        for row, tiles in enumerate(taken):
            keep = int(mine.keep[row])
            slots = [tag for tile in tiles for tag in tile][:keep]
            for place, page in enumerate(mine.destinations[row].tolist()):
                if keep and page < self.ledger.classes[0].num_pages:
                    part = slots[place * PAGE : (place + 1) * PAGE]
                    self.pages[0][page] = part + [None] * (PAGE - len(part))
        self.counts["packed"] += 1

    def run(self, name: str, count: int) -> None:
        """A step of one sequence: it reads what it wrote, each token once, and nothing else."""
        plan = self.ledger.plan([name], 1, CHUNK)
        first = int(plan.starts[0])
        for position, slot in enumerate(plan.classes[0].write_slots[0, :count].tolist(), first):
            self.pages[0].setdefault(slot // PAGE, [None] * PAGE)[slot % PAGE] = (name, position)
        seen = []
        for number, mine in enumerate(plan.classes):
            num_slots = int(mine.starts[0]) + (count if number == 0 else 0)
            for page, start in zip(mine.pages[0].tolist(), mine.page_starts[0].tolist(), strict=True):
                if start != NOWHERE:
                    seen += self.pages[number][page][: max(0, num_slots - start)]
        positions = [tag[1] for tag in seen if tag and tag[0] == name]
        assert len(positions) == len(seen), f"{name} reads {seen}"
        assert len(set(positions)) == len(positions), "a token is read twice"
        if self.ledger.classes[0].sealing:
            assert sorted(positions) == list(range(first + count)), f"{name} reads {positions}"


@pytest.mark.parametrize("kind", ["sealed", "compacted"])
def test_pages_that_change_hands_are_read_before_they_are_written(kind):
    total = dict.fromkeys(("out", "in", "packed", "sealed", "together"), 0)
    for seed in range(12):
        rng = random.Random(seed)
        ledger = ledger_of(kind, num_pages=11 + rng.randrange(5))
        scheduler = Scheduler(ledger, Schedule(max_batch=4, token_budget=14, preemption="swap"))
        memory = TaggedMemory(ledger)
        for number in range(6):
            scheduler.submit(Entry(f"{number}", 1 + rng.randrange(22), 30 + rng.randrange(8)))
        for _ in range(400):
            if not scheduler.num_unfinished:
                break
            step = scheduler.schedule()
            assert not step.rejected
            memory.prepare(step.before)
            total["together"] += len({type(each) for each in step.before}) > 1
            for entry, count, _ in step.work:
                memory.run(entry.name, count)
                ledger.commit(entry.name, count)
                entry.num_computed += count
                entry.num_known = max(entry.num_known, min(entry.final_len, entry.num_computed + 1))
                if entry.num_computed == entry.final_len:
                    scheduler.remove(entry)
            ledger.check()
        assert not scheduler.num_unfinished
        for name, count in memory.counts.items():
            total[name] += count
    assert total["in"] > 5, total
    assert total["together"] > 3, total
    assert total["sealed" if kind == "sealed" else "packed"] > 20, total
