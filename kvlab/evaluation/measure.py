"""What a model really holds and how fast it decodes: bytes from the ledger, the arrays and the compiler; never a
formula."""

import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import jax
import numpy as np

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.ledger.accounting import Account
from kvlab.ledger.ledger import Ledger
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.pools import num_bytes
from kvlab.schema import Schema, integer
from kvlab.typing import Params
from kvlab.units import UNTIMED, Spread


@dataclass(frozen=True)
class MeasureConfig(Schema):
    """Where memory is measured: `context_len` tokens (null: the task's), `batch_size` sequences at once.

    The last `decode_steps` tokens are decoded one by one and timed. Where prompts are compressed, all tokens behind the
    prompt of the test slice of that length are.
    """

    context_len: int | None = integer(None, 2, 1 << 24, optional=True)
    batch_size: int = integer(32, 1, 65536)
    decode_steps: int = integer(16, 1, 65536)


@dataclass(frozen=True)
class Observed:
    """What was seen while every sequence was filled: the ledger's accounts, the compiled decode step, seconds of one
    decode step, and milliseconds of a training step, which was timed before: medians with their quartiles."""

    layout: MemoryLayout
    accounts: tuple[Account, ...]
    compiled: Any
    decode_s: Spread
    train_step_ms: Spread
    ledger: Ledger
    compaction_s: float | None
    """Of one compaction; None: there was none."""


@dataclass(frozen=True)
class Measure:
    """How one number is read off; with `axis`, how people call it where figures and reports have it as bytes a
    sequence: a share of the batch's bytes, or, not `of_batch`, a sequence's own already; with `column`, its heading in
    tables."""

    take: Callable[[Observed], Any]
    axis: str = ""
    column: str = ""
    of_batch: bool = True


def measured(
    take: Callable[[Observed], Any],
    *,
    axis: str = "",
    column: str = "",
    of_batch: bool = True,
    default: Any = MISSING,
) -> Any:
    """A field of a report, with the measure that fills it: adding a measure is adding one such row, with a default
    where records that were written before are to be read."""
    return field(default=default, metadata={"measure": Measure(take, axis, column, of_batch)})


def measures(report: type) -> dict[str, Measure]:
    """The rows of a report by name."""
    return {item.name: item.metadata["measure"] for item in fields(report)}


def take_all[Report](report: type[Report], seen: Observed) -> Report:
    """A report with every measure taken."""
    return report(**{name: measure.take(seen) for name, measure in measures(report).items()})


def _temp_bytes(seen: Observed) -> int:
    return seen.compiled.memory_analysis().temp_size_in_bytes


def _peak_bytes(seen: Observed) -> int:
    analysis = seen.compiled.memory_analysis()
    resident = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return resident + analysis.temp_size_in_bytes


def _device_peak_bytes(seen: Observed) -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def read_bytes_per_token(seen: Observed) -> int:
    """What is live of a sequence, by the ledger, less what its states select away."""
    total, stored = 0, seen.ledger.stored(seen.ledger.sequences[0])
    for state, account in zip(seen.layout.classes, seen.accounts, strict=True):
        spec, page_size, num_stored = state.spec, state.page_size, stored[state.name]
        left_out = spec.logical_bytes(num_stored, page_size) - spec.read_bytes(num_stored, page_size)
        total += account.logical // seen.layout.max_sequences - left_out * state.num_layers
    return total + sum(_weighed_bytes(seen, layer) for layer in range(len(seen.layout.states)))


def _weighed_bytes(seen: Observed, layer: int) -> int:
    """Keys that are read once more in a layer, by methods that weigh every slot in every step that notes something."""
    total, states, sequence = 0, seen.layout.states[layer], seen.ledger.sequences[0]
    for name, joined in seen.layout.joined[layer].items():
        noted = dict(joined.names).get("noted")
        if joined.method is None or not joined.method.weighs or noted is None:
            continue
        if seen.ledger.pages(sequence, states[noted]):
            state = seen.layout.classes[states[name]]
            keys = state.spec.arrays[0].num_bytes * state.spec.num_readers
            total += keys * seen.ledger.stored(sequence)[state.name]
    return total


def _layers(seen: Observed) -> tuple[dict[str, Any], ...]:
    """Bytes of every (layer, state): a class's account is shared equally by its layers, whose arrays are alike."""
    rows = []
    for layer, states in enumerate(seen.layout.states):
        for name, index in states.items():
            share, account = seen.layout.classes[index].num_layers, seen.accounts[index]
            sizes = {"logical": account.logical, "allocated": account.allocated, "pool": account.pool}
            row = {"layer": layer, "state": name} | {f"{key}_bytes": n // share for key, n in sizes.items()}
            rows.append(row | _how_it_is_read(seen.layout, layer, name))
    return tuple(rows)


def _how_it_is_read(layout: MemoryLayout, layer: int, name: str) -> dict[str, str]:
    """Under a selection, what a layer's state is read by, or why all of it is read."""
    if layout.selection is None:
        return {}
    state = layout.classes[layout.states[layer][name]].spec
    reason = layout.selection.skips(state) or "one of the dense layers"
    return {"read_by": f"all: {reason}" if state.reading is None else layout.selection.name}


@dataclass(frozen=True)
class MemoryReport:
    """Four numbers, never one, for `batch_size` sequences of `context_len` tokens, in bytes; and what is read of them.

    logical: live tokens and states, their scales included; allocated: pages held; temp: the compiler's temporaries of a
    decode step; peak: all that a decode step needs at once (weights, pools, plan, outputs, temporaries).
    `device_peak_bytes` is the device's own high-water mark of this process, a training in it included, where the device
    reports one. `pool_bytes` is the arrays' size, which includes free pages and the null page. `read_bytes_per_token`
    is what decoding one more token of one sequence reads of its memory, and `held_peak_bytes` the most that was held
    on the way: of a memory that compresses prompts, one whole prompt beside what is left of the others. `stored` are
    slots of a sequence, by class, where tokens were dropped. Records from before these were measured have none.
    """

    logical_bytes: int = measured(
        lambda seen: sum(account.logical for account in seen.accounts),
        axis="logical bytes per sequence (live tokens and states)",
    )
    allocated_bytes: int = measured(
        lambda seen: sum(account.allocated for account in seen.accounts),
        axis="allocated bytes per sequence (pages held)",
    )
    temp_bytes: int = measured(_temp_bytes, axis="temporary bytes of a decode step, per sequence")
    peak_bytes: int = measured(
        _peak_bytes, axis="peak bytes of a decode step, weights included, divided by its sequences"
    )
    device_peak_bytes: int | None = measured(_device_peak_bytes)
    pool_bytes: int = measured(lambda seen: seen.layout.pool_bytes)
    context_len: int = measured(lambda seen: seen.layout.max_len)
    batch_size: int = measured(lambda seen: seen.layout.max_sequences)
    layers: tuple[dict[str, Any], ...] = measured(_layers)
    accounts: tuple[dict[str, int | str], ...] = measured(
        lambda seen: tuple(account.as_dict() for account in seen.accounts)
    )
    read_bytes_per_token: int | None = measured(
        read_bytes_per_token, axis="bytes of memory read for a decoded token", of_batch=False, default=None
    )
    held_peak_bytes: int | None = measured(
        lambda seen: seen.ledger.counters.peak_bytes,
        axis="most bytes of pages held at any moment, prompts included, per sequence",
        default=None,
    )
    stored: dict[str, int] | None = measured(  # noqa: RUF009
        lambda seen: seen.ledger.stored(seen.ledger.sequences[0]) if seen.layout.compresses else None, default=None
    )


@dataclass(frozen=True)
class SpeedReport:
    """How fast: one training step, and tokens a second that the whole batch decodes. Each is a median over samples, of
    calls or decoded tokens, the compiling ones left out; `low` and `high` are the quartiles of several samples. Another
    run on another day differs by more. Records from before these were kept have none."""

    train_step_ms: float = measured(lambda seen: seen.train_step_ms.median, column="step ms (median)")
    decode_tokens_per_s: float = measured(
        lambda seen: seen.layout.max_sequences / seen.decode_s.median, column="decode tok/s (median)"
    )
    compaction_ms: float | None = measured(lambda seen: seen.compaction_s and seen.compaction_s * 1e3, default=None)
    train_step_low_ms: float | None = measured(
        lambda seen: seen.train_step_ms.low if seen.train_step_ms.num_samples > 1 else None, default=None
    )
    train_step_high_ms: float | None = measured(
        lambda seen: seen.train_step_ms.high if seen.train_step_ms.num_samples > 1 else None, default=None
    )
    num_train_samples: int | None = measured(lambda seen: seen.train_step_ms.num_samples or None, default=None)
    decode_low_tokens_per_s: float | None = measured(
        lambda seen: seen.layout.max_sequences / seen.decode_s.high, default=None
    )
    decode_high_tokens_per_s: float | None = measured(
        lambda seen: seen.layout.max_sequences / seen.decode_s.low, default=None
    )
    num_decode_samples: int | None = measured(lambda seen: seen.decode_s.num_samples, default=None)


AXES = {name: measure.axis for name, measure in measures(MemoryReport).items() if measure.axis}
"""The memory that figures may have as their axis: every number of a record, and how people call it."""
AXIS_WORDS = {
    "held": "allocated_bytes",
    "allocated": "allocated_bytes",
    "live": "logical_bytes",
    "read": "read_bytes_per_token",
}
"""Short words for some axes, as tables have them in their headings."""


def per_sequence(report: MemoryReport) -> dict[str, float]:
    """Every axis of a report as bytes of one sequence; what an older record does not have is left out."""
    found = {}
    for name, row in measures(MemoryReport).items():
        value = getattr(report, name)
        if row.axis and value is not None:
            found[name] = value / report.batch_size if row.of_batch else float(value)
    return found


def measure(
    step: MemoryStep,
    params: Params,
    vocab_size: int,
    *,
    prompt_len: int,
    decode_steps: int,
    train_step_ms: Spread = UNTIMED,
) -> tuple[MemoryReport, SpeedReport]:
    """Fills every sequence up to layout.max_len, decoding what is behind a prompt of `prompt_len` tokens and timing the
    last `decode_steps` of it, and takes all measures.

    Raises AssertionError if the arrays' bytes differ from the stated ones: a wrong axis must not be plotted.
    """
    layout = step.layout
    session = Session(step, params)
    if num_bytes(session.pools) != layout.pool_bytes:
        raise AssertionError(f"pools hold {num_bytes(session.pools)} bytes, the layout states {layout.pool_bytes}")
    compiled = step.compiled(params, session.pools, 1)
    rows, num_tokens, width = range(layout.max_sequences), layout.max_len, layout.chunk_len
    tokens = np.random.default_rng(0).integers(0, vocab_size, (len(rows), num_tokens)).astype(np.int32)
    session.prompt_len, session.known, session.times = prompt_len, dict(enumerate(tokens)), True
    session.decode_from = prompt_len
    # Where prompts are compressed they come one after the other: while one is whole, the others are what is left.
    groups = [[row] for row in rows] if layout.compresses else [list(rows)]
    for group in groups:
        for start in range(0, prompt_len, width):
            end = min(start + width, prompt_len)
            session.advance({row: tokens[row, start:end] for row in group}, width, len(group))
    times = []
    for place in range(prompt_len, num_tokens):
        began = time.perf_counter()
        jax.block_until_ready(session.advance({row: tokens[row, place : place + 1] for row in rows}, 1))
        times.append(time.perf_counter() - began)
    session.ledger.check()
    # The first step may have compiled.
    decode_s = Spread.of(times[1:][-decode_steps:] or times)
    session_s = float(np.median(session.compaction_s[1:] or session.compaction_s)) if session.compaction_s else None
    seen = Observed(layout, session.ledger.audit(), compiled, decode_s, train_step_ms, session.ledger, session_s)
    return take_all(MemoryReport, seen), take_all(SpeedReport, seen)
