"""What a model really holds and how fast it decodes: bytes from the ledger, the arrays and the compiler; never a formula."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.ledger.accounting import Account
from kvlab.memory.pools import num_bytes
from kvlab.schema import Schema, integer
from kvlab.typing import Params


@dataclass(frozen=True)
class MeasureConfig(Schema):
    """Where memory is measured: `context_len` tokens (null: the task's), `batch_size` sequences at once.

    The last `decode_steps` tokens are decoded one by one and timed.
    """

    context_len: int | None = integer(None, 2, 1 << 24, optional=True)
    batch_size: int = integer(32, 1, 65536)
    decode_steps: int = integer(16, 1, 65536)


@dataclass(frozen=True)
class MemoryReport:
    """Four numbers, never one, for `batch_size` sequences of `context_len` tokens, in bytes.

    logical: live tokens and states; allocated: pages held; temp: the compiler's temporaries of a decode step; peak: all that
    a decode step needs at once (weights, pools, plan, outputs, temporaries). `device_peak_bytes` is the device's own
    high-water mark of this process, training included, where it reports one. `pool_bytes` is the arrays' size, which
    includes free pages and the null page.
    """

    logical_bytes: int
    allocated_bytes: int
    temp_bytes: int
    peak_bytes: int
    device_peak_bytes: int | None
    pool_bytes: int
    context_len: int
    batch_size: int
    layers: list[dict[str, Any]]
    accounts: list[dict[str, int | str]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return asdict(self)


def measure(step: MemoryStep, params: Params, vocab_size: int, decode_steps: int) -> tuple[MemoryReport, float]:
    """Fills every sequence up to layout.max_len, decoding the last `decode_steps` tokens; returns the report and tokens/s.

    Raises AssertionError if the arrays' bytes differ from the stated ones: a wrong axis must not be plotted.
    """
    layout = step.layout
    session = Session(step, params)
    if num_bytes(session.pools) != layout.pool_bytes:
        raise AssertionError(f"pools hold {num_bytes(session.pools)} bytes, the layout states {layout.pool_bytes}")
    compiled = step.compiled(params, session.pools, 1)
    rows, num_tokens, width = range(layout.max_sequences), layout.max_len, layout.chunk_len
    tokens = np.random.default_rng(0).integers(0, vocab_size, (len(rows), num_tokens)).astype(np.int32)
    prompt_len = max(1, num_tokens - decode_steps)
    for start in range(0, prompt_len, width):
        session.advance({row: tokens[row, start : min(start + width, prompt_len)] for row in rows}, width)
    times = []
    for place in range(prompt_len, num_tokens):
        began = time.perf_counter()
        jax.block_until_ready(session.advance({row: tokens[row, place : place + 1] for row in rows}, 1))
        times.append(time.perf_counter() - began)
    session.ledger.check()
    accounts = session.ledger.audit()
    analysis = compiled.memory_analysis()
    stats = jax.local_devices()[0].memory_stats() or {}
    resident = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    report = MemoryReport(
        logical_bytes=sum(one.live for one in accounts),
        allocated_bytes=sum(one.allocated for one in accounts),
        temp_bytes=analysis.temp_size_in_bytes,
        peak_bytes=resident + analysis.temp_size_in_bytes,
        device_peak_bytes=stats.get("peak_bytes_in_use"),
        pool_bytes=layout.pool_bytes,
        context_len=num_tokens,
        batch_size=layout.max_sequences,
        layers=_layers(step, accounts),
        accounts=[one.as_dict() for one in accounts],
    )
    # The first timed step may have compiled.
    seconds = float(np.median(times[1:] or times))
    return report, len(rows) / seconds


def _layers(step: MemoryStep, accounts: tuple[Account, ...]) -> list[dict[str, Any]]:
    """Bytes of every (layer, state): a class's account is shared equally by its layers, whose arrays are alike."""
    rows = []
    for layer, states in enumerate(step.layout.states):
        for name, index in states.items():
            share = step.layout.classes[index].num_layers
            account = accounts[index]
            rows.append(
                {
                    "layer": layer,
                    "state": name,
                    "logical_bytes": account.live // share,
                    "allocated_bytes": account.allocated // share,
                    "pool_bytes": account.pool // share,
                }
            )
    return rows
