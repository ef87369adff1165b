"""What fits: a ledger over the bytes that the weights leave, and how many sequences it holds at once."""

import math
from collections.abc import Sequence
from dataclasses import replace

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.fit import DoesNotFit
from kvlab.capacity.serving import Serving, most_pages
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.growth import grow, pages_at
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.replacement import POLICIES
from kvlab.memory.budgets import Context


def make_ledger(
    config: CapacityConfig, budget: int, context_len: int, max_len: int, prompt_len: int | None = None
) -> Ledger:
    """The ledger over `budget` bytes, split among state classes in the proportion in which one sequence of
    `context_len` tokens, of which `prompt_len` (None: all) are its prompt, needs them: typed arrays cannot lend each
    other pages (`Account.stranded` shows what that costs). Where sequences are compacted or sealed that is what they
    hold at rest, beside the peak of one prompt at a time."""
    context = Context(context_len, context_len if prompt_len is None else prompt_len)
    return room_for(config, Serving.of(config, max_len, context), budget, context, max_len)


def room_for(config: CapacityConfig, serving: Serving, budget: int, context: Context, max_len: int) -> Ledger:
    """`make_ledger` for classes that are known."""
    memory, classes = config.memory, serving.classes
    chunk_len = min(memory.chunk_len, max_len)
    peaks = [most_pages(state, context, chunk_len) for state in classes]
    kept, extra = peaks, [0] * len(classes)
    if memory.shortens:
        kept = pages_at(classes, context.prompt_len, context.context_len)
        extra = [
            state.has_null_page + max(0, peak - rest) for state, peak, rest in zip(classes, peaks, kept, strict=True)
        ]
    needs = [count * state.page_bytes for state, count in zip(classes, kept, strict=True)]
    shared = budget - sum(count * state.page_bytes for state, count in zip(classes, extra, strict=True))
    host, sized = memory.host_gb * 1e9 / (budget or 1), list[StateClass]()
    for state, need, more in zip(classes, needs, extra, strict=True):
        num_pages = more + math.floor(shared * need / sum(needs) / state.page_bytes)
        if num_pages < 1 + state.has_null_page:
            legal = f"leaves no page of {state.page_bytes:,} bytes for {state.name}"
            raise DoesNotFit("hardware", config.hardware.label, legal)
        sized.append(replace(state, num_pages=num_pages, num_host_pages=int(num_pages * host)))
    checkpoints = Checkpoints(memory.checkpoints, memory.checkpoint_interval)
    return Ledger(
        sized,
        max_len,
        chunk_len,
        policy=POLICIES[memory.policy],
        checkpoints=checkpoints,
        page_size=memory.page_size,
    )


def users_that_fit(ledger: Ledger, context_len: int, prompt_len: int) -> int:
    """Sequences of `context_len` tokens, `prompt_len` of them a prompt, that an empty ledger holds at once, grown one
    after the other in chunks, compacted and sealed on the way.

    Paged classes: one sequence is really run; of all others each holds what it holds at rest, and the last one must
    still find the most that it needed on the way. Contiguous blocks are given out until none is left.
    """
    lengths = Lengths(prompt_len, context_len)
    if any(state.contiguous for state in ledger.classes):
        users = 0
        while grow(ledger, users, lengths):
            users += 1
    else:
        growth = grow(ledger, 0, lengths)
        if growth is None:
            for name in ledger.sequences:
                ledger.release(name)
            return 0
        users = _users(ledger, growth.at_rest)
    for name in ledger.sequences:
        ledger.release(name)
    return users


def _users(ledger: Ledger, at_rest: Sequence[int]) -> int:
    needs = zip(ledger.classes, ledger.counters.peak_pages, at_rest, strict=True)
    return min((state.num_usable - peak) // held + 1 for state, peak, held in needs if held)
