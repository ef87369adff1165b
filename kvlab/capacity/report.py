"""One answer for people, a line each."""

from collections.abc import Sequence

from rich.table import Table

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.estimate import Answer
from kvlab.terminal import as_is
from kvlab.units import counted

DECIMAL = ("B", "kB", "MB", "GB", "TB")
HELD = ("live", "scales", "statistics", "tail", "dead", "reserved")
"""Parts of the bytes that simulated sequences held."""
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def both_units(num_bytes: float) -> str:
    """Bytes in powers of 1,000 and of 1,024: the two that published figures confuse."""
    return f"{scaled(num_bytes, 1000, DECIMAL)} ({scaled(num_bytes, 1024, BINARY)})"


def scaled(value: float, base: int, units: Sequence[str]) -> str:
    """A number in the largest unit of which there is one."""
    unit = 0
    while value >= base and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    return f"{value:,.0f} {units[unit]}" if unit == 0 else f"{value:,.2f} {units[unit]}"


def one_answer(config: CapacityConfig, answer: Answer) -> Table:
    """Everything about one deployment, one line each."""
    title = f"{title_of(answer)} on {answer.hardware}, {answer.memory}, {answer.workload}"
    table = Table(
        title=as_is(title), title_justify="left", show_header=False, box=None, padding=(0, 1, 0, 0), pad_edge=False
    )
    one_token = both_units(answer.bytes_per_token) if answer.bytes_per_token else "none: it does not grow"
    decoded = f"{answer.decode_tokens_per_s:,.0f} tokens/s: {answer.decode_ms:.2f} ms for"
    shares = (("weights", answer.weight_share), ("state", answer.state_share), ("compute", answer.compute_share))
    rows = [
        ("weights", both_units(answer.weight_bytes)),
        ("left for the cache", f"{both_units(answer.budget_bytes)} at {config.memory.utilization:.0%} utilization"),
        ("state of one token", one_token),
        (f"state of {counted(answer.context_len, 'token')}", both_units(answer.sequence_bytes)),
        *_shortened(config, answer),
        *_selected(config, answer),
        *_shared(config, answer),
        *([("left as they are", answer.skipped)] if answer.skipped else []),
        (f"users of {counted(answer.context_len, 'token')}", f"{answer.users:,} fit at once"),
        ("decode roofline", f"{decoded} {_batch(config, answer)}"),
        ("of which", ", ".join(f"{name} {share:.0%}" for name, share in shares)),
        ("bound by", _bound(answer)),
        ("intensity of mixing", _intensity(config, answer)),
        ("moved for one token", both_units(answer.moved_bytes_per_token)),
    ]
    if answer.cost_per_million is not None:
        rows.append(("cost of a million tokens", f"${answer.cost_per_million:,.3f} at the roofline"))
    if found := answer.simulated:
        ended = f"{found['finished']:,.0f} done, {found['rejected']:,.0f} can never fit"
        again = f"{found['recomputed_tokens']:,.0f} tokens computed again, {found['found_again_tokens']:,.0f} found"
        preempted = counted(found["preempted"], "time") + (f": {again}" if found["preempted"] else "")
        hits, shared = f"{found['prefix_hits']:.1%} of prompt tokens", f"{found['shared']:.1%} of held bytes"
        saving = f"one pool for all needs {found['unified_saving']:.1%} less"
        rows += [
            ("simulated requests", f"{counted(round(answer.workload_len), 'token')} on average; {ended}"),
            ("preempted", preempted),
            ("simulated batch", f"{found['batch']:,.1f} on average, {found['tokens_per_s']:,.0f} tokens/s decoded"),
            ("of held bytes", _held(found)),
            ("prefix hits", f"{hits}, sharing saves {shared}"),
            *_shortened_on_the_way(found),
            ("typed pools", f"{found['stranded']:.1%} stranded; {saving}"),
        ]
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*map(as_is, row))
    return table


def _held(found: dict[str, float]) -> str:
    """What sequences held, in parts; without those that round to nothing."""
    parts = [(name, f"{found[name]:.1%}") for name in HELD]
    return ", ".join(f"{name} {share}" for name, share in parts if share != "0.0%" or name == "live")


def _shortened(config: CapacityConfig, answer: Answer) -> list[tuple[str, str]]:
    """What there is to say of a memory that drops tokens or seals pages."""
    if not config.memory.shortens:
        return []
    rows = [("budget", answer.solved)] if answer.solved else []
    rows.append(("in pages, at rest", f"{both_units(answer.held_bytes)} with a prompt of {answer.prompt_len:,}"))
    return [*rows, ("at most on the way", both_units(answer.peak_bytes))]


def _selected(config: CapacityConfig, answer: Answer) -> list[tuple[str, str]]:
    """What there is to say of a memory of which a step reads a part: less is read, and no more users fit."""
    if config.memory.selection is None:
        return []
    layers = f"{answer.selecting_layers} of {config.model.num_layers} layers select"
    index = both_units(answer.index_bytes) if answer.index_bytes else "none"
    return [
        ("read for one token", f"{both_units(answer.read_bytes)}; {layers}"),
        ("held for its index", f"{index}; less is read, not held"),
    ]


def _shared(config: CapacityConfig, answer: Answer) -> list[tuple[str, str]]:
    """What there is to say of layers that hold nothing of their own."""
    count = sum(source is not None for _, source in config.model.sources())
    if not count:
        return []
    said = f"{count} of {config.model.num_layers} layers read the keys and values of others, and hold nothing"
    return [
        ("shared", said),
        *([] if config.memory.selection else [("read for one token", both_units(answer.read_bytes))]),
    ]


def _shortened_on_the_way(found: dict[str, float]) -> list[tuple[str, str]]:
    """What a simulation compacted and sealed."""
    rows = []
    if found["compacted"]:
        words = f"{counted(found['compacted'], 'compaction')} dropped {counted(found['dropped_slots'], 'slot')}"
        rows.append(("compressed", words))
    return rows + ([("sealed", counted(found["sealed_pages"], "page"))] if found["sealed_pages"] else [])


def title_of(answer: Answer) -> str:
    """The model, and its variant where it is not as published."""
    return answer.model + (f", {answer.variant}" if answer.variant != "published" else "")


def _batch(config: CapacityConfig, answer: Answer) -> str:
    batch = min(answer.users, config.max_batch)
    return counted(batch, "sequence") + (" (max_batch)" if batch < answer.users else "")


def _bound(answer: Answer) -> str:
    return {"weights": "reading the weights", "state": "reading the state", "compute": "compute"}[answer.bound]


def _intensity(config: CapacityConfig, answer: Answer) -> str:
    ridge = config.hardware.chip.ridge
    side = "below" if answer.intensity < ridge else "above"
    return f"{answer.intensity:,.1f} FLOP for each byte, {side} the chip's ridge of {ridge:,.0f}"
