"""What fits: a ledger over the bytes that the weights leave, and how many sequences it holds at once."""

import math

from kvlab.capacity.config import CapacityConfig, ServingMemory
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.states import State, max_pages_for_step
from kvlab.schema import ConfigError


def make_ledger(config: CapacityConfig, budget: int, context_len: int, max_len: int) -> Ledger:
    """The ledger over `budget` bytes, split among state classes in the proportion in which one sequence of
    `context_len` tokens needs them: typed arrays cannot lend each other pages (`Account.stranded` shows what that
    costs)."""
    memory = config.memory
    specs = config.model.specs(memory.kv_dtype)
    chunk_len = min(memory.chunk_len, max_len)
    needs = {spec: _sequence_bytes(spec, count, context_len, chunk_len, memory) for spec, count in specs.items()}
    total = sum(needs.values())
    host = memory.host_gb * 1e9 / (budget or 1)
    classes = []
    for number, (spec, count) in enumerate(specs.items()):
        paged = spec.per_token and memory.reservation is None
        page_size = memory.page_size if paged else 1
        page_bytes = spec.page_bytes(page_size) * count
        num_pages = math.floor(budget * needs[spec] / total / page_bytes)
        table_len = max_pages_for_step(spec, max_len, chunk_len, page_size) if paged else 1
        name = f"{number}.{_kind(spec)}" if len(specs) > 1 else _kind(spec)
        reservation = memory.reservation if spec.per_token else None
        if num_pages < 1 + paged:
            raise ConfigError("hardware", config.hardware.label, f"leaves no page of {page_bytes:,} bytes for {name}")
        state = StateClass(name, spec, page_size, num_pages, table_len, count, reservation, int(num_pages * host))
        classes.append(state)
    checkpoints = Checkpoints(memory.checkpoints, memory.checkpoint_interval)
    return Ledger(
        classes,
        max_len,
        chunk_len,
        policy=POLICIES[memory.policy],
        checkpoints=checkpoints,
        page_size=memory.page_size,
    )


def _kind(spec: State) -> str:
    if not spec.per_token:
        return "recurrent"
    return "full" if spec.span is None else f"local{spec.span + 1}"


def _sequence_bytes(spec: State, count: int, context_len: int, chunk_len: int, memory: ServingMemory) -> int:
    if not spec.per_token:
        return spec.unit_bytes * count
    if memory.reservation is not None:
        return spec.page_bytes(context_len) * count
    pages = max_pages_for_step(spec, context_len, chunk_len, memory.page_size)
    return pages * spec.page_bytes(memory.page_size) * count


def users_that_fit(ledger: Ledger, context_len: int, prompt_len: int) -> int:
    """Sequences of `context_len` tokens, `prompt_len` of them a prompt, that an empty ledger holds at once, grown one
    after the other in chunks.

    Paged classes: one sequence is really run; of all others each holds what it holds at rest, and the last one must
    still find the most that it needed on the way. Contiguous blocks are given out until none is left.
    """
    if any(state.contiguous for state in ledger.classes):
        users = 0
        while _grow(ledger, users, Lengths(prompt_len, context_len)):
            users += 1
    else:
        if not _grow(ledger, 0, Lengths(prompt_len, context_len)):
            return 0
        at_rest = [len(holding.pages) for holding in ledger.running[0].holdings]
        needs = zip(ledger.classes, ledger.counters.peak_pages, at_rest, strict=True)
        users = min((state.num_usable - peak) // held + 1 for state, peak, held in needs if held)
    for name in ledger.sequences:
        ledger.release(name)
    return users


def _grow(ledger: Ledger, name: int, lengths: Lengths) -> bool:
    """One sequence up to its final length; False when pages run out."""
    done = 0
    while done < lengths.final_len:
        count = min(ledger.chunk_len, lengths.final_len - done)
        if not ledger.reserve(name, count, lengths=None if done else lengths).ready:
            return False
        ledger.commit(name, count)
        done += count
    return True
