"""GPUs for the workers of a sweep on one machine: a card for each, or a share of one's memory.

JAX takes three quarters of every card that it sees. Of G cards and N workers that run side by side, worker n sees card
n mod G alone; where several share a card, each takes as much of its memory as the others. Both are variables of the
environment, set in the worker before JAX opens a device. What the user has set stays: CUDA_VISIBLE_DEVICES says which
cards are shared out, and of the memory nothing is said where the user says something. Cards are counted without CUDA.
"""

import errno
import itertools
import multiprocessing
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
FRACTION = "XLA_CLIENT_MEM_FRACTION"
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
OF_MEMORY = (FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION", PREALLOCATE, "XLA_PYTHON_CLIENT_ALLOCATOR")
"""Environment variables by which a user says how JAX takes a card's memory."""
NUM_RUNS = "KVLAB_SWEEP_RUNS"
"""Environment variable: how many runs the sweep has; no more workers have something to do."""
LEADS = "KVLAB_LEADS_WORKERS"
"""Environment variable: `PREALLOCATE` is that of the process that leads workers, and not the user's."""
SHARED = 0.9
"""What the workers of a card take of its memory together; the rest is for what CUDA itself holds in each."""
PROC = Path("/proc/driver/nvidia/gpus")
_HELD: list[socket.socket] = []
"""The number of this worker: a name that no other process can have while this one lives."""


@dataclass(frozen=True)
class Share:
    """What a worker has: a card, as CUDA names it, and a fraction of its memory; None: it has the card for itself."""

    card: str
    fraction: float | None = None


def shares(cards: Sequence[str], num_workers: int) -> list[Share]:
    """Of each worker, round robin; nothing where there are no cards."""
    found = []
    for worker in range(num_workers if cards else 0):
        place = worker % len(cards)
        num_beside = len(range(place, num_workers, len(cards)))
        fraction = None if num_beside == 1 else int(1000 * SHARED / num_beside) / 1000
        found.append(Share(cards[place], fraction))
    return found


def visible(environment: Mapping[str, str]) -> list[str]:
    """The cards that JAX would see with these variables, as CUDA names them; none where it is told to use others."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if (chosen := environment.get(VISIBLE)) is None:
        return [str(number) for number in range(num_cards(environment))]
    names = [name.strip() for name in chosen.split(",")]
    # CUDA itself sees those before the first that is none, such as -1.
    return list(itertools.takewhile(lambda name: name.isdigit() or name.startswith(("GPU-", "MIG-")), names))


def num_cards(environment: Mapping[str, str]) -> int:
    """Cards of this machine: those that `nvidia-smi -L` lists, else those that the driver does."""
    if (command := shutil.which("nvidia-smi", path=environment.get("PATH"))) is not None:
        try:
            done = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            pass
        else:
            if done.returncode == 0:
                return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return len(list(PROC.iterdir())) if PROC.is_dir() else 0


def variables(share: Share, environment: Mapping[str, str]) -> dict[str, str]:
    """What a share sets beside the variables of an environment."""
    found = {VISIBLE: share.card}
    if share.fraction is not None and not any(environment.get(name) for name in OF_MEMORY):
        found[FRACTION] = f"{share.fraction:g}"
    return found


@contextmanager
def led(num_runs: int) -> Iterator[None]:
    """For the process that leads a sweep: its workers know how many runs there are."""
    os.environ[NUM_RUNS] = str(num_runs)
    try:
        yield
    finally:
        del os.environ[NUM_RUNS]


def leave_memory_to_workers() -> None:
    """For a process that will lead workers, before JAX opens a device in it: it asks only what is there, and is to hold
    nothing of the cards beforehand. Nothing where there are none, or where the user says how memory is taken."""
    if visible(os.environ) and not any(os.environ.get(name) for name in OF_MEMORY):
        os.environ |= {PREALLOCATE: "false", LEADS: "1"}


def take_share(num_jobs: int) -> Share | None:
    """In a worker that another process has started, one of `num_jobs` side by side (negative: of that many below the
    number of cores), before JAX opens a device: takes the worker's share, once, and returns what it took. Nothing in
    any other process, and nothing where there are no cards."""
    if _HELD or multiprocessing.current_process().name == "MainProcess":
        return None
    if os.environ.pop(LEADS, None):
        os.environ.pop(PREALLOCATE, None)
    cards = visible(os.environ)
    if not cards:
        return None
    num_workers = num_jobs if num_jobs > 0 else max(1, _num_cores() + 1 + num_jobs)
    num_workers = min(num_workers, int(os.environ.get(NUM_RUNS, num_workers)))
    share = shares(cards, num_workers)[_number() % num_workers]
    os.environ |= variables(share, os.environ)
    return share


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number() -> int:
    """The lowest number that no other worker of the same parent has. The kernel gives it back when this one dies."""
    for number in itertools.count():
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            name.bind(f"\0kvlab-worker-{os.getppid()}-{number}")  # of Linux: a name that is no file
        except OSError as error:
            name.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            _HELD.append(name)
            return number
    raise AssertionError("there are more numbers than processes")
