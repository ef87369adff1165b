"""What fits, how full it is and how fast it could be read: the questions that decide a deployment, answered by the ledger."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlab.capacity.presets import KV_DTYPES, Preset
from kvlab.capacity.simulator import Outcome, Simulator
from kvlab.capacity.workload import Request, WorkloadConfig, requests
from kvlab.engine.scheduler import Schedule
from kvlab.hardware import HardwareConfig
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.states import State, max_pages_for_step
from kvlab.schema import ConfigError, Schema, choice, flag, integer, real


@dataclass(frozen=True)
class ServingMemory(Schema):
    """How the memory of a deployment is managed. "paged", or a contiguous reservation: "max" ("dense" is its other name),
    "pow2", "oracle". `kv_dtype` is the cache's; `utilization` of the chips' memory is used, the rest is for activations."""

    name: str = choice("paged", ("paged", "dense", "max", "pow2", "oracle"))
    page_size: int = integer(16, 1, 4096)
    chunk_len: int = integer(512, 1, 1 << 24)
    kv_dtype: str = choice("bfloat16", KV_DTYPES)
    utilization: float = real(0.9, 0.0, 1.0, open_low=True)
    prefix_cache: bool = flag(True)
    policy: str = choice("lru", POLICIES)
    checkpoints: str = choice("junctions", ("none", "every", "junctions", "all"))
    checkpoint_interval: int = integer(1, 1, 65536)
    preemption: str = choice("recompute", ("recompute", "swap"))
    host_gb: float = real(0.0, 0.0, 1e6)

    @property
    def reservation(self) -> str | None:
        """The contiguous reservation, if any."""
        return {"paged": None, "dense": "max"}.get(self.name, self.name)


@dataclass(frozen=True)
class CapacityConfig(Schema):
    """`kvlab capacity`: a model on chips under a workload. `context_len` (null: the workload's mean) is where users are
    counted; `price` is dollars an hour for one chip; `max_batch` caps the sequences of a step."""

    model: Preset = field(default_factory=Preset)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    memory: ServingMemory = field(default_factory=ServingMemory)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    context_len: int | None = integer(None, 1, 1 << 24, optional=True)
    max_batch: int = integer(256, 1, 1 << 20)
    price: float | None = real(None, 0.0, 1e6, optional=True)
    simulate: bool = flag(True)

    @classmethod
    def build(cls, values: object, path: str = "") -> "CapacityConfig":
        """From the whole mapping. Raises ConfigError naming the first wrong field, its value and the legal range."""
        sections = {"model": Preset, "hardware": HardwareConfig, "memory": ServingMemory, "workload": WorkloadConfig}
        if not isinstance(values, dict):
            raise ConfigError(path or "config", values, "must be a mapping of sections")
        built = {name: kind.build(values[name], name) for name, kind in sections.items() if name in values}
        return super().build({**values, **built}, path)

    def cross_check(self) -> None:
        if self.context_len is not None and self.context_len > self.workload.max_total:
            legal = f"must be at most workload.max_total = {self.workload.max_total}"
            raise ConfigError("context_len", self.context_len, legal)


@dataclass(frozen=True)
class Answer:
    """Everything that `kvlab capacity` prints; bytes are bytes, `ms` milliseconds, fractions of one."""

    model: str
    variant: str
    hardware: str
    memory: str
    workload: str
    weight_bytes: int
    budget_bytes: int
    bytes_per_token: int
    context_len: int
    sequence_bytes: int
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
    """FLOPs of mixing for each byte of state read, at `context_len`."""
    moved_bytes_per_token: float
    cost_per_million: float | None
    simulated: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """One row of a frame."""
        fields = {name: value for name, value in vars(self).items() if name != "simulated"}
        return {**fields, **self.simulated}


def estimate(config: CapacityConfig) -> Answer:
    """Answers for one config. Raises ConfigError when the weights, or one sequence beside them, do not fit."""
    model, dtype = config.model, config.memory.kv_dtype
    _ = config.hardware.chip  # of the host no datasheet is known: that is the first error to make
    try:
        _ = model.logical_bytes(1, dtype)
    except ValueError as error:
        raise ConfigError("memory.kv_dtype", dtype, str(error)) from None
    budget = int(config.hardware.memory_bytes() * config.memory.utilization) - model.weight_bytes
    if budget <= 0:
        room = f"{config.hardware.memory_bytes() * config.memory.utilization / 1e9:,.1f} GB of {config.hardware.label}"
        raise ConfigError("model", model.name, f"{model.weight_bytes / 1e9:,.1f} GB of weights do not fit in {room}")
    asked = requests(config.workload)
    mean_total = sum(one.prompt_len + one.output_len for one in asked) / len(asked)
    context = config.context_len or max(1, round(mean_total))
    longest = max(one.prompt_len + one.output_len for one in asked)
    max_len = max(longest, context) if config.workload.path else config.workload.max_total
    ledger = make_ledger(config, budget, context, max_len)
    prompt_share = sum(one.prompt_len for one in asked) / (mean_total * len(asked))
    users = users_that_fit(ledger, context, max(1, round(context * prompt_share)))
    if users < 1:
        names = (
            f"{model.logical_bytes(context, dtype) / 1e9:,.2f} GB beside {model.weight_bytes / 1e9:,.1f} GB of weights"
        )
        raise ConfigError("context_len", context, f"one sequence does not fit: {names} on {config.hardware.label}")
    batch = min(users, config.max_batch)
    roof = decode_roofline(config, [context] * batch)
    simulated = _simulate(config, ledger, asked) if config.simulate else {}
    tokens_per_s = batch / roof["seconds"]
    chips = config.hardware.total_chips
    cost = None if config.price is None else config.price * chips / 3600 / tokens_per_s * 1e6
    specs = model.specs(dtype)
    return Answer(
        model=model.name,
        variant=model.variant,
        hardware=config.hardware.label,
        memory=config.memory.name,
        workload=config.workload.name,
        weight_bytes=model.weight_bytes,
        budget_bytes=budget,
        bytes_per_token=sum(count * spec.unit_bytes for spec, count in specs.items() if spec.per_token),
        context_len=context,
        sequence_bytes=model.logical_bytes(context, dtype),
        users=users,
        decode_ms=roof["seconds"] * 1e3,
        decode_tokens_per_s=tokens_per_s,
        bound=str(max(("weights", "state", "compute"), key=lambda name: roof[name])),
        weight_share=roof["weights"] / roof["seconds"],
        state_share=roof["state"] / roof["seconds"],
        compute_share=roof["compute"] / roof["seconds"],
        intensity=intensity(model, context, dtype),
        moved_bytes_per_token=roof["bytes"] / batch,
        cost_per_million=cost,
        simulated=simulated,
    )


def intensity(model: Preset, context_len: int, dtype: str = "bfloat16") -> float:
    """FLOPs of mixing for each byte of state that decoding at this context reads; bandwidth-bound below the chip's ridge."""
    mixing = sum(group.count * group.decode_flops(context_len) for group in model.groups())
    return mixing / max(1, model.read_bytes(context_len, dtype))


def decode_roofline(config: CapacityConfig, lengths: Sequence[int]) -> dict[str, float]:
    """The least seconds in which one token of each sequence can be decoded: parameters and states are read once at full
    bandwidth, or all FLOPs done at dense bf16 peak, whichever takes longer, for the parameters and for the states apart.

    Several chips count as one large chip: nothing is replicated, no time goes into talking. Models whose heads are fewer than
    the chips (MQA, MLA) would in truth hold their state more than once.
    """
    model, hardware = config.model, config.hardware
    bandwidth, peak = hardware.bandwidth, hardware.peak_flops
    weight_bytes = model.read_weight_bytes(len(lengths))
    state_bytes = sum(model.read_bytes(n, config.memory.kv_dtype) for n in lengths)
    dense_flops = 2.0 * (model.num_active_params or model.num_params) * len(lengths)
    mixing_flops = sum(model.decode_flops(n) for n in lengths) - dense_flops
    weights, dense = weight_bytes / bandwidth, dense_flops / peak
    state, mixing = state_bytes / bandwidth, mixing_flops / peak
    compute = (dense if dense > weights else 0.0) + (mixing if mixing > state else 0.0)
    return {
        "seconds": max(weights, dense) + max(state, mixing),
        "weights": weights if weights >= dense else 0.0,
        "state": state if state >= mixing else 0.0,
        "compute": compute,
        "bytes": weight_bytes + state_bytes,
    }


def make_ledger(config: CapacityConfig, budget: int, context_len: int, max_len: int) -> Ledger:
    """The ledger over `budget` bytes, split among state classes in the proportion in which one sequence of `context_len`
    tokens needs them: typed arrays cannot lend each other pages (`Account.stranded` shows what that costs)."""
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
        page_bytes = spec.unit_bytes * page_size * count
        num_pages = math.floor(budget * needs[spec] / total / page_bytes)
        table_len = max_pages_for_step(spec, max_len, chunk_len, page_size) if paged else 1
        name = f"{number}.{_kind(spec)}" if len(specs) > 1 else _kind(spec)
        reservation = memory.reservation if spec.per_token else None
        if num_pages < 1 + paged:
            raise ConfigError("hardware", config.hardware.label, f"leaves no page of {page_bytes:,} bytes for {name}")
        one = StateClass(name, spec, page_size, num_pages, table_len, count, reservation, int(num_pages * host))
        classes.append(one)
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
    """Sequences of `context_len` tokens, `prompt_len` of them a prompt, that an empty ledger holds at once, grown one after
    the other in chunks.

    Paged classes: one sequence is really run; of all others each holds what it holds at rest, and the last one must still
    find the most that it needed on the way. Contiguous blocks are given out until none is left.
    """
    if any(one.contiguous for one in ledger.classes):
        users = 0
        while _grow(ledger, users, Lengths(prompt_len, context_len)):
            users += 1
    else:
        if not _grow(ledger, 0, Lengths(prompt_len, context_len)):
            return 0
        at_rest = [len(holding.pages) for holding in ledger.running[0].holdings]
        needs = zip(ledger.classes, ledger.counters.peak_pages, at_rest, strict=True)
        users = min((one.num_usable - peak) // held + 1 for one, peak, held in needs if held)
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


def _simulate(config: CapacityConfig, ledger: Ledger, asked: list[Request]) -> dict[str, float]:
    """The workload through the ledger, timed by the roofline."""
    hardware, model = config.hardware, config.model

    def step_time(lengths: Sequence[int], chunks: Sequence[int]) -> float:
        decode = decode_roofline(config, lengths)["seconds"] if lengths else model.weight_bytes / hardware.bandwidth
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
    split = sum(pages * one.page_bytes for pages, one in zip(counters.peak_pages, ledger.classes, strict=True))
    return {
        "batch": outcome.mean("batch"),
        "live": outcome.mean("live") / held,
        "tail": (outcome.mean("tail") + outcome.mean("lookahead")) / held,
        "dead": outcome.mean("dead") / held,
        "reserved": (outcome.mean("reserved") + outcome.mean("padding")) / held,
        "stranded": outcome.mean("stranded") / outcome.mean("pool"),
        "shared": outcome.mean("shared") / held,
        "prefix_hits": counters.hit_tokens / max(1, counters.looked_up_tokens),
        "unified_saving": 1 - counters.peak_bytes / max(1, split),
        "preempted": float(outcome.preempted),
        "recomputed_tokens": float(outcome.recomputed_tokens),
        "rejected": float(len(outcome.rejected)),
        "finished": float(outcome.finished),
        "tokens_per_s": outcome.decoded_tokens / max(outcome.seconds, 1e-12),
    }
