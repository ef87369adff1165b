"""Reads a GPU kernel's machine code as nvdisasm prints it with ptxas' control words (`MOSAIC_GPU_DUMP_SASS_CTRL=1`).

Every instruction says for how many cycles its warp stalls after it. Where one warp has a scheduler to itself, the sum
over a loop is the time that issuing one turn takes; waiting for memory, barriers and tensor cores comes on top
(`pallas_kernels.predict`)."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINE = re.compile(
    r"^\s*([\d&\-]+):([\d\-]):([\d\-]):([Y\-]):(\d+)\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?PT?\d*)\s+)?(\S.*?)\s*$"
)
"""Barriers waited for, released when read, released when written, yield, stall cycles; address; predicate;
instruction."""
PRODUCT = re.compile(r"\wGMMA\.(\d+)x(\d+)x\d+(?:\.\w+)* R\d+, (R\d+|gdesc)")
CYCLES_PER_COLUMN = 0.5
"""Tensor cycles of one HGMMA of 64 rows and 32 bytes of depth, for each column: 4,096 16-bit operations a cycle."""
SHARED_BYTES_PER_CYCLE = 128


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. `predicate` is "" where it always runs; `stall` is in cycles."""

    address: int
    predicate: str
    text: str
    stall: int

    @property
    def name(self) -> str:
        """The operation with its modifiers: "BAR.SYNC.DEFER_BLOCKING"."""
        return self.text.split(" ", 1)[0]

    @property
    def target(self) -> str:
        """The label that a branch goes to; "" of others."""
        found = re.match(r"BRA\S*\s.*`\(([\w.]+)\)", self.text)
        return found[1] if found else ""

    @property
    def tensor_cycles(self) -> float:
        """Cycles that a warpgroup's product takes the tensor cores, or reading its factors from shared memory, if that
        is longer."""
        if not (found := PRODUCT.match(self.text)):
            return 0.0
        rows, columns, left = int(found[1]), int(found[2]), found[3]
        num_bytes = 32 * (columns + (rows if left == "gdesc" else 0))
        return max(CYCLES_PER_COLUMN * columns, num_bytes / SHARED_BYTES_PER_CYCLE)


@dataclass(frozen=True)
class Turn:
    """One turn of a loop by its shortest way: branches around work that an inner block does not need are
    taken, those around products and copies are not."""

    address: int
    instructions: tuple[Instruction, ...]
    num_inner_loops: int
    """Loops inside it, of which one turn is counted."""

    @property
    def stall_cycles(self) -> int:
        """Cycles to issue it."""
        return sum(instruction.stall for instruction in self.instructions)

    @property
    def tensor_cycles(self) -> float:
        """Of its products."""
        return sum(instruction.tensor_cycles for instruction in self.instructions)

    @property
    def counts(self) -> Counter[str]:
        """How often each operation occurs, by the name before its first dot."""
        return Counter(instruction.name.split(".")[0] for instruction in self.instructions)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index of each label's. Raises ValueError for text without control words."""
    found, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"^(\.?\w+):\s*$", line):
            labels[label[1]] = len(found)
        elif parts := LINE.match(line):
            *_, stall, address, predicate, said = parts.groups()
            found.append(Instruction(int(address, 16), predicate or "", said, int(stall)))
    if not found:
        raise ValueError("text has no instructions with control words: must be what MOSAIC_GPU_DUMP_SASS_CTRL=1 writes")
    return found, labels


def loops(text: str) -> list[Turn]:
    """A turn of every loop of a kernel, in order of address.

    A loop goes back to an instruction that every way to its end has passed; code behind the kernel's end in which a
    wait is repeated, and which then goes on where the wait was, is none."""
    code = _Blocks(*parse(text))
    bodies = {head: set() for _, head in code.back_edges}
    for end, head in code.back_edges:
        bodies[head] |= code.between(head, end)
    found = []
    for head, body in bodies.items():
        ends = [end for end, to in code.back_edges if to == head]
        way = min((code.shortest(head, end, body) for end in ends), key=code.weight)
        inner = sum(other in way and other != head for other in bodies)
        instructions = [instruction for block in way for instruction in code.blocks[block]]
        found.append(Turn(instructions[0].address, tuple(instructions), inner))
    return sorted(found, key=lambda turn: turn.address)


def attending(turns: Iterable[Turn]) -> Turn | None:
    """The loop over blocks of the warpgroup that multiplies: the smallest with products of both forms, scores and
    outputs; if none has two, that with most products. None: there are no products."""
    forms = {
        turn: {
            part.text.split(" ")[0] + ("^T" if ".tnspA" in part.text else "")
            for part in turn.instructions
            if part.tensor_cycles
        }
        for turn in turns
    }
    with_products = [turn for turn in forms if forms[turn]]
    if both := [turn for turn in with_products if len(forms[turn]) > 1]:
        return min(both, key=lambda turn: (-turn.tensor_cycles, len(turn.instructions)))
    return max(with_products, key=lambda turn: (turn.tensor_cycles, -len(turn.instructions)), default=None)


def fetching(turns: Iterable[Turn]) -> Turn | None:
    """The loop over blocks of the warpgroup that asks for pages, and turns them into 16 bits if need be: the longest
    with copies to shared memory and no products. None: there is none."""
    with_copies = [turn for turn in turns if turn.counts["UTMALDG"] and not turn.tensor_cycles]
    return max(with_copies, key=lambda turn: turn.stall_cycles, default=None)


class _Blocks:
    """Instructions between labels and branches, and which follows which."""

    def __init__(self, instructions: Sequence[Instruction], labels: dict[str, int]) -> None:
        begins = {0} | {place for place in labels.values() if place < len(instructions)}
        begins |= {
            i + 1
            for i, instruction in enumerate(instructions[:-1])
            if instruction.target or instruction.name in ("EXIT", "RET")
        }
        order = sorted(begins)
        number = {place: which for which, place in enumerate(order)}
        self.blocks = [instructions[a:b] for a, b in zip(order, [*order[1:], len(instructions)], strict=True)]
        self.after: list[list[int]] = []
        for which, block in enumerate(self.blocks):
            last, after = block[-1], []
            if last.target in labels and labels[last.target] in number:
                after.append(number[labels[last.target]])
            is_end = not last.predicate and (last.target or last.name in ("EXIT", "RET"))
            if not is_end and which + 1 < len(self.blocks):
                after.append(which + 1)
            self.after.append(after)
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for which, after in enumerate(self.after):
            for successor in after:
                self.before[successor].append(which)
        passed = self._passed()
        self.back_edges = [(a, b) for a, after in enumerate(self.after) for b in after if b in passed.get(a, ())]

    def _passed(self) -> dict[int, set[int]]:
        """Of each block that can be reached, those that every way to it passes, and itself (dominators)."""
        reached, order, stack = {0}, [], [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            if (successor := next((candidate for candidate in rest if candidate not in reached), None)) is None:
                order.append(block)
                stack.pop()
            else:
                reached.add(successor)
                stack.append((successor, iter(self.after[successor])))
        order.reverse()
        passed = {block: set(order) for block in order} | {0: {0}}
        is_changed = True
        while is_changed:
            is_changed = False
            for block in order[1:]:
                known = [passed[predecessor] for predecessor in self.before[block] if predecessor in passed]
                if (mine := set.intersection(*known) | {block}) != passed[block]:
                    passed[block], is_changed = mine, True
        return passed

    def between(self, head: int, end: int) -> set[int]:
        """Blocks from which a loop's end is reached without its head."""
        found, left = {head, end}, [end]
        while left:
            if (block := left.pop()) == head:
                continue
            fresh = [predecessor for predecessor in self.before[block] if predecessor not in found]
            found.update(fresh)
            left += fresh
        return found

    def weight(self, way: Sequence[int]) -> tuple[float, int, int]:
        """Most products first, then most copies to shared memory, then fewest cycles."""
        instructions = [instruction for block in way for instruction in self.blocks[block]]
        num_copies = sum(instruction.name.startswith("UTMALDG") for instruction in instructions)
        return (
            -sum(instruction.tensor_cycles for instruction in instructions),
            -num_copies,
            sum(instruction.stall for instruction in instructions),
        )

    def shortest(self, head: int, end: int, body: set[int]) -> list[int]:
        """The way through a loop that leaves no product and no copy out and takes the fewest cycles; inner loops turn
        once."""
        inner = {edge for edge in self.back_edges if edge[0] in body}
        known: dict[int, tuple[tuple[float, int, int], list[int]]] = {}

        def from_here(block: int) -> tuple[tuple[float, int, int], list[int]] | None:
            if block in known:
                return known[block]
            mine = self.weight([block])
            if block == end:
                known[block] = mine, [block]
                return known[block]
            ways = [
                way
                for successor in self.after[block]
                if successor in body and (block, successor) not in inner and (way := from_here(successor)) is not None
            ]
            if not ways:
                return None
            weight, way = min(ways)
            known[block] = (mine[0] + weight[0], mine[1] + weight[1], mine[2] + weight[2]), [block, *way]
            return known[block]

        found = from_here(head)
        assert found is not None, "a loop's end is reached from its head"
        return found[1]
