"""How long a GPU kernel takes on a chip that is not here, by its machine code: a list of assumptions, and list
scheduling.

Nothing here was measured on a chip. What to expect of it is 15% either way (`Assumed`).
"""

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pallas_kernels import machine_code
from pallas_kernels.compilers import resources
from pallas_kernels.machine_code import Turn


@dataclass(frozen=True)
class Assumed:
    """What the model takes for granted of Hopper. Besides: every product is waited for at once, and a multiprocessor
    has its even share of the bandwidth. Start and four stores make the 4.7 us that a block which stages 64 rows takes
    beside its loop."""

    multiprocessors: int = 132
    registers: int = 65536
    """Of a multiprocessor, as are the following."""
    shared_bytes: int = 233472
    threads: int = 2048
    start_us: float = 1.7
    """Of a thread block."""
    store_us: float = 0.75
    """Of each store that is waited for at its end."""
    empty_us: float = 1.0
    """Of a thread block without work."""
    graph_launch_us: float = 1.4
    """Of a small kernel that depends on the one before it, in a graph; launched by itself:"""
    own_launch_us: float = 2.2
    cache_bytes_per_s: float = 5.4e12
    """Of the second-level cache."""
    uncertainty: float = 0.15
    """Of the times that come of all this, either way."""


ASSUMED = Assumed()
WAITS = {"BAR": 20, "MEMBAR": 40, "SHFL": 10, "LDG": 30, "SYNCS.PHASECHK": 20}
"""Cycles of latency that each operation of the inner loop leaves exposed: 350 for a decode kernel with 64 rows of
queries."""


@dataclass(frozen=True)
class Gpu:
    """A chip as it would run: `bytes_per_s` is what it is expected to read, of which the data sheet says more."""

    name: str
    clock_ghz: float
    bytes_per_s: float


GPUS = (Gpu("H200 at 1.98 GHz", 1.98, 4.3e12), Gpu("H200 at 1.755 GHz", 1.755, 4.3e12), Gpu("H100", 1.755, 3.0e12))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. `grid` is CUDA's (x, y, z), of which x runs fastest."""

    name: str
    grid: tuple[int, int, int]
    num_threads: int
    shared_bytes: int
    registers: int
    spilled_bytes: int
    num_instructions: int
    num_stores: int
    """Copies from shared memory that are waited for before the next."""
    attending: Turn | None
    fetching: Turn | None
    """Of the warpgroup that does not attend; None: those that attend fetch as well."""
    longest: Turn | None = None
    """Of a kernel without products, its loop with the longest turn."""

    @property
    def num_resident(self) -> int:
        """Thread blocks that fit on a multiprocessor at once: registers are given in 8 for each thread, and 1 KiB is
        the system's."""
        registers = math.ceil(self.registers / 8) * 8 * self.num_threads
        shared = self.shared_bytes + 2048
        most = (
            ASSUMED.registers // registers,
            ASSUMED.shared_bytes // shared,
        )
        return max(1, min(*most, ASSUMED.threads // self.num_threads))

    @property
    def num_attending(self) -> int:
        """Warpgroups that multiply: all, where they also fetch; else all but one."""
        num_warpgroups = self.num_threads // 128
        return num_warpgroups if self.attending and self.attending.counts["UTMALDG"] else max(1, num_warpgroups - 1)


def waits(turn: Turn) -> int:
    """Cycles of exposed latency in a turn."""
    return sum(
        cycles
        for instruction in turn.instructions
        for name, cycles in WAITS.items()
        if instruction.name.startswith(name)
    )


def cycles(turn: Turn) -> float:
    """Of one turn of a warpgroup that has its schedulers to itself: issue, products, exposed latency."""
    return turn.stall_cycles + turn.tensor_cycles + waits(turn)


def turn_us(kernel: Kernel, gpu: Gpu, turn_bytes: int, bytes_per_s: float, num_resident: int) -> float:
    """Microseconds of one turn of each of `num_resident` thread blocks on a multiprocessor: the slowest of its
    warpgroups, of the tensor cores and schedulers that they share, and of the memory."""
    turns = [turn for turn in (kernel.attending, kernel.fetching) if turn]
    own = max(map(cycles, turns))
    all_products = num_resident * kernel.num_attending * sum(turn.tensor_cycles for turn in turns)
    issue = num_resident * sum(
        len(turn.instructions) * (kernel.num_attending if turn is kernel.attending else 1) for turn in turns
    )
    memory = num_resident * turn_bytes / (bytes_per_s / ASSUMED.multiprocessors) * 1e6
    return max(max(own, all_products, issue) / (gpu.clock_ghz * 1e3), memory)


def scheduled_us(turns: Sequence[int], num_slots: int, one_turn_us: float, ends_us: float) -> float:
    """When the last thread block ends, each given in order to the slot that is free first; `turns` are of each block,
    and a block without any takes what an empty one does."""
    slots = [0.0] * num_slots
    for number in turns:
        taken = number * one_turn_us + ends_us if number else ASSUMED.empty_us
        heapq.heapreplace(slots, slots[0] + taken)
    return max(slots)


def kernel_us(kernel: Kernel, gpu: Gpu, turns: Sequence[int], turn_bytes: int, *, is_cached: bool = False) -> float:
    """A kernel's time, from how often each of its thread blocks turns and what a turn reads: of the second-level cache,
    if `is_cached`."""
    bytes_per_s = ASSUMED.cache_bytes_per_s if is_cached else gpu.bytes_per_s
    num_busy = sum(number > 0 for number in turns)
    num_resident = max(1, min(kernel.num_resident, -(-num_busy // ASSUMED.multiprocessors)))
    one_turn_us = turn_us(kernel, gpu, turn_bytes, bytes_per_s, num_resident)
    ends_us = ASSUMED.start_us + kernel.num_stores * ASSUMED.store_us
    return scheduled_us(turns, ASSUMED.multiprocessors * num_resident, one_turn_us, ends_us)


def read_kernels(folder: Path) -> list[Kernel]:
    """The kernels whose dumps lie in a folder (`MOSAIC_GPU_DUMP_TO`), in the order in which they were compiled."""
    found = []
    for path in sorted(folder.glob("*.sass_ctrl"), key=lambda path: int(re.findall(r"\d+", path.stem)[-1])):
        turns = machine_code.loops(code := path.read_text())
        attending = machine_code.attending(turns)
        is_shared = attending is None or bool(attending.counts["UTMALDG"])
        said = resources(path.with_suffix(".ptxas").read_text())
        x, y, z, threads, _, _, shared = launch_of(path.with_suffix(".mlir-passes.log"))
        instructions, _ = machine_code.parse(code)
        found.append(
            Kernel(
                path.stem,
                (x, y, z),
                threads,
                shared,
                said["registers"],
                said["spilled_bytes"],
                len(instructions),
                sum(instruction.name.startswith("UTMASTG") for instruction in instructions),
                attending,
                None if is_shared else machine_code.fetching(turns),
                None if attending else max(turns, key=cycles, default=None),
            )
        )
    return found


LAUNCH = re.compile(
    r"gpu\.launch .*?"
    + r", ".join([r"\S+ = %c(\d+)\S*"] * 3)
    + r"\) threads.*? in \("
    + r", ".join([r"\S+ = %c(\d+)\S*"] * 3)
    + r"\) dynamic_shared_memory_size %c(\d+)"
)


def launch_of(log: Path) -> tuple[int, ...]:
    """Grid (x, y, z), threads (x, y, z) and bytes of shared memory that a kernel is launched with, by the log of its
    passes. Raises ValueError where there are none."""
    with log.open() as lines:
        for line in lines:
            if "gpu.launch" in line and (found := LAUNCH.search(line)):
                return tuple(map(int, found.groups()))
    raise ValueError(f"{log}: has no gpu.launch of known size")
