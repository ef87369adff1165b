"""What fits, how full it is and how fast it could be read: the questions that decide a deployment, answered by the
ledger."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.fit import DoesNotFit, fewest_chips
from kvlab.capacity.roofline import decode_roofline
from kvlab.capacity.room import room_for, users_that_fit
from kvlab.capacity.serving import Serving
from kvlab.capacity.simulator import Outcome, Simulator
from kvlab.capacity.traces import Request
from kvlab.capacity.workload import requests
from kvlab.engine.scheduler import Schedule
from kvlab.ledger.growth import bytes_at
from kvlab.ledger.ledger import Ledger
from kvlab.memory.budgets import Context


@dataclass(frozen=True)
class Answer:
    """Everything that `kvlab capacity` prints; bytes are bytes, `ms` milliseconds, fractions of one."""

    model: str
    variant: str
    hardware: str
    memory: str
    workload: str
    workload_len: float
    """Tokens of a request of the workload on average, prompt and answer: what is simulated."""
    weight_bytes: int
    budget_bytes: int
    bytes_per_token: int
    context_len: int
    sequence_bytes: int
    index_bytes: int
    """Of one sequence: what is noted of its pages, to choose which are read. Held beside them."""
    read_bytes: int
    """Of one sequence's state, to decode its next token; `selecting_layers` read some pages of theirs."""
    selecting_layers: int
    users: int
    """Sequences of `context_len` tokens that fit at once."""
    decode_ms: float
    decode_tokens_per_s: float
    """Of `users` (at most max_batch) sequences at `context_len`: the roofline, reached by nothing real."""
    bound: str
    weight_share: float
    state_share: float
    compute_share: float
    intensity: float
    """FLOPs of mixing for each byte of state moved, at `context_len`."""
    moved_bytes_per_token: float
    cost_per_million: float | None
    simulated: dict[str, float]
    prompt_len: int
    """Tokens of the prompt among `context_len`; below, pages that such a sequence holds at rest, and at most."""
    held_bytes: int
    peak_bytes: int
    solved: str
    """What a budget of bytes was solved for; empty: it was not."""
    skipped: str
    """States that the memory leaves as they are, and why."""

    def as_dict(self) -> dict[str, Any]:
        """One row of a frame."""
        fields = {name: value for name, value in vars(self).items() if name != "simulated"}
        return {**fields, **self.simulated}


def estimate(config: CapacityConfig) -> Answer:
    """Answers for one config. Raises `DoesNotFit`, with the number of chips that would do, when the weights, or one
    sequence beside them, do not fit."""
    model, memory = config.model, config.memory
    asked = requests(config.workload)
    try:
        room = _room(config, asked)
    except DoesNotFit as error:
        chips = fewest_chips(config, lambda larger: _room(larger, asked))
        raise error.answered(chips, config.hardware.with_chips(chips or 1).label) from None
    serving, batch, context = room.serving, min(room.users, config.max_batch), room.context
    roof = decode_roofline(config, [context] * batch, serving)
    tokens_per_s = batch / roof["seconds"]
    chips, classes, solved = config.hardware.total_chips, serving.classes, serving.budget
    return Answer(
        model=model.name,
        variant=model.variant,
        hardware=config.hardware.label,
        memory=memory.label,
        workload=config.workload.name,
        workload_len=_mean_len(asked),
        weight_bytes=model.weight_bytes,
        budget_bytes=room.budget,
        bytes_per_token=serving.token_bytes,
        context_len=context.context_len,
        sequence_bytes=serving.logical_bytes(context),
        index_bytes=serving.index_bytes(context),
        read_bytes=serving.read_bytes(context),
        selecting_layers=serving.num_selecting,
        users=room.users,
        decode_ms=roof["seconds"] * 1e3,
        decode_tokens_per_s=tokens_per_s,
        bound=max(("weights", "state", "compute"), key=lambda name: roof[name]),
        weight_share=roof["weights"] / roof["seconds"],
        state_share=roof["state"] / roof["seconds"],
        compute_share=roof["compute"] / roof["seconds"],
        intensity=serving.intensity(context),
        moved_bytes_per_token=roof["bytes"] / batch,
        cost_per_million=None if config.price is None else config.price * chips / 3600 / tokens_per_s * 1e6,
        prompt_len=context.prompt_len,
        held_bytes=room.peak_bytes if memory.reservation else bytes_at(classes, *context[::-1]),
        peak_bytes=room.peak_bytes,
        solved=f"{solved.asked}: {solved.knob} = {solved.solved}" if solved else "",
        skipped="; ".join(f"{name}: {reason}" for name, reason in serving.skipped.items()),
        simulated=_simulate(config, room.ledger, asked, serving) if config.simulate else {},
    )


@dataclass(frozen=True)
class _Room:
    """The bytes that the weights leave, the ledger over them, the context at which users are counted, the users, and
    the most bytes that one of them held."""

    budget: int
    ledger: Ledger
    serving: Serving
    context: Context
    users: int
    peak_bytes: int


def _budget(config: CapacityConfig) -> int:
    """Bytes that the weights leave. Raises ConfigError for the host, and `DoesNotFit` when nothing is left."""
    model, hardware = config.model, config.hardware
    _ = hardware.chip  # of the host no datasheet is known: that is the first error to make
    usable = hardware.memory_bytes() * config.memory.utilization
    budget = int(usable) - model.weight_bytes
    if budget <= 0:
        legal = (
            f"{model.weight_bytes / 1e9:,.1f} GB of weights do not fit in {usable / 1e9:,.1f} GB of {hardware.label}"
        )
        raise DoesNotFit("model", model.name, legal)
    return budget


def _mean_len(asked: list[Request]) -> float:
    return sum(request.prompt_len + request.output_len for request in asked) / len(asked)


def _room(config: CapacityConfig, asked: list[Request]) -> _Room:
    """Raises `DoesNotFit` when not one sequence fits."""
    budget, mean_total = _budget(config), _mean_len(asked)
    context_len = config.context_len or max(1, round(mean_total))
    longest = max(request.prompt_len + request.output_len for request in asked)
    max_len = max(context_len, longest if config.workload.path else config.workload.max_total)
    prompt_share = sum(request.prompt_len for request in asked) / (mean_total * len(asked))
    context = Context(context_len, max(1, round(context_len * prompt_share)))
    serving = Serving.of(config, max_len, context)
    ledger = room_for(config, serving, budget, context, max_len)
    users = users_that_fit(ledger, *context)
    if users < 1:
        model = config.model
        state = f"{serving.logical_bytes(context) / 1e9:,.2f} GB"
        sizes = f"{state} beside {model.weight_bytes / 1e9:,.1f} GB of weights"
        legal = f"one sequence does not fit: {sizes} on {config.hardware.label}"
        raise DoesNotFit("context_len", context_len, legal)
    peak_bytes = ledger.counters.peak_bytes
    if config.memory.reservation is not None:  # users' blocks were all given out, and a block never changes
        peak_bytes //= users
    return _Room(budget, ledger, serving, context, users, peak_bytes)


def _simulate(config: CapacityConfig, ledger: Ledger, asked: list[Request], serving: Serving) -> dict[str, float]:
    """The workload through the ledger, timed by the roofline."""
    hardware, model = config.hardware, config.model

    def step_time(contexts: Sequence[Context], chunks: Sequence[int]) -> float:
        roof = decode_roofline(config, contexts, serving) if contexts else None
        decode = roof["seconds"] if roof else model.weight_bytes / hardware.bandwidth
        return decode + 2.0 * (model.num_active_params or model.num_params) * sum(chunks) / hardware.peak_flops

    memory = config.memory
    schedule = Schedule(max_batch=config.max_batch, token_budget=memory.chunk_len, preemption=memory.preemption)
    caches = memory.prefix_cache and memory.reservation is None
    outcome = Simulator(ledger, step_time, schedule, caches=caches).run(asked)
    return summary(ledger, outcome)


def summary(ledger: Ledger, outcome: Outcome) -> dict[str, float]:
    """What a finished simulation says, as numbers: shares are of bytes that sequences held."""
    held = max(1.0, outcome.mean("allocated"))
    counters = ledger.counters
    split = sum(pages * state.page_bytes for pages, state in zip(counters.peak_pages, ledger.classes, strict=True))
    return {
        "batch": outcome.mean("batch"),
        "live": outcome.mean("live") / held,
        "scales": outcome.mean("scale") / held,
        "statistics": outcome.mean("statistics") / held,
        "tail": (outcome.mean("tail") + outcome.mean("lookahead")) / held,
        "dead": outcome.mean("dead") / held,
        "reserved": (outcome.mean("reserved") + outcome.mean("padding")) / held,
        "stranded": outcome.mean("stranded") / outcome.mean("pool"),
        "shared": outcome.mean("shared") / held,
        "prefix_hits": outcome.hit_tokens / max(1, outcome.looked_up_tokens),
        "unified_saving": 1 - counters.peak_bytes / max(1, split),
        "preempted": float(outcome.preempted),
        "recomputed_tokens": float(outcome.recomputed_tokens),
        "found_again_tokens": float(outcome.found_again_tokens),
        "compacted": float(outcome.compacted),
        "sealed_pages": float(outcome.sealed_pages),
        "dropped_slots": float(outcome.dropped_slots),
        "rejected": float(len(outcome.rejected)),
        "finished": float(outcome.finished),
        "tokens_per_s": outcome.decoded_tokens / max(outcome.seconds, 1e-12),
    }
