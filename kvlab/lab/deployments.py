"""`kvlab capacity -m`: deployments side by side, each told apart by whatever is swept; one that does not fit says what
would do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.estimate import Answer, estimate
from kvlab.capacity.fit import DoesNotFit
from kvlab.capacity.report import BINARY, DECIMAL, scaled
from kvlab.lab.labels import Plain, deployment_labels, differing_fields
from kvlab.lab.narrow import UNKNOWN
from kvlab.schema import to_plain

KEPT = ("deployment", "users", "tok/s")
"""Columns that always stand in the table."""
SPARE = (
    "B/token", "live", "hits", "weights", "workload", "hardware", "bound", "read/tok", "live/seq", "held/seq",
    "$/M tok",
)  # fmt: skip
"""What it leaves out first where there is no room."""


@dataclass(frozen=True)
class Deployment:
    """A model on chips and its answer (null: it does not fit, as `reason` says, though `needed_chips` would do, of the
    same kind). `name` tells it from the others at hand."""

    name: str
    config: CapacityConfig
    answer: Answer | None
    needed_chips: int | None
    reason: str = ""

    @property
    def memory(self) -> str:
        """How the memory is called among the others."""
        return self.answer.memory if self.answer else self.config.memory.label


def answer_each(configs: Sequence[CapacityConfig]) -> list[Deployment]:
    """Every deployment with its answer; of equal ones, such as two budgets beside no compression, the first. Raises
    ConfigError for what is wrong, and not merely too large."""
    memories = deployment_labels([config.memory.label for config in configs], [to_plain(c.memory) for c in configs])
    found: dict[str, Deployment] = {}
    for name, memory, config in zip(names(configs), memories, configs, strict=True):
        if name in found:
            continue
        try:
            answer = replace(estimate(config), memory=memory)
            found[name] = Deployment(name, config, answer, config.hardware.total_chips)
        except DoesNotFit as error:
            found[name] = Deployment(name, config, None, error.chips, str(error))
    return list(found.values())


def names(configs: Sequence[CapacityConfig]) -> list[str]:
    """What tells deployments apart: of model, chips, memory and workload those that differ, then the fields that
    none of these says, as field=value."""
    memories = deployment_labels([config.memory.label for config in configs], [to_plain(c.memory) for c in configs])
    heads = [
        (_model(config), config.hardware.label, memory, config.workload.name)
        for config, memory in zip(configs, memories, strict=True)
    ]
    varying = [place for place in range(4) if len({head[place] for head in heads}) > 1]
    kinds = [(config.model.name, config.workload.name) for config in configs]
    fields = differing_fields(kinds, [_unsaid(config) for config in configs])
    said = [
        " ".join([*(head[place] for place in varying), *(f"{name}={value}" for name, value in more.items())])
        for head, more in zip(heads, fields, strict=True)
    ]
    return [words or _model(config) for words, config in zip(said, configs, strict=True)]


def _model(config: CapacityConfig) -> str:
    variant = config.model.variant
    return config.model.name + (f", {variant}" if variant != "published" else "")


def _unsaid(config: CapacityConfig) -> Plain:
    """The fields of a deployment that no name says."""
    plain = to_plain(config)
    said = {"model": ("name", "source", "variant"), "workload": ("name", "source")}
    plain |= {part: {n: v for n, v in plain[part].items() if n not in left} for part, left in said.items()}
    return {name: value for name, value in plain.items() if name not in ("memory", "hardware")}


def rows_of(found: Sequence[Deployment]) -> list[dict[str, str]]:
    """One row a deployment, by heading. `live/seq` is what one sequence of the context keeps, `held/seq` the pages that
    it lies in, `read/tok` what decoding its next token reads, and `tok/s` the roofline; `needs`, where some do not fit,
    the fewest chips that would do."""
    rows = []
    heads = [_heads(each) for each in found]
    common = [name for name in heads[0] if len({head[name] for head in heads}) == 1]
    for each, head in zip(found, heads, strict=True):
        row = {"deployment": each.name} | {name: head[name] for name in common}
        row |= _numbers(each)
        if any(other.answer is None for other in found):
            row["needs"] = UNKNOWN if each.answer else _needs(each)
        rows.append(row)
    return rows


def _heads(each: Deployment) -> dict[str, str]:
    config = each.config
    return {"model": _model(config), "hardware": config.hardware.label, "memory": each.memory} | {
        "workload": config.workload.name
    }


def _numbers(each: Deployment) -> dict[str, str]:
    answer, model = each.answer, each.config.model
    weights = scaled(model.weight_bytes, 1000, DECIMAL)
    if answer is None:
        names = ("context", "weights", "B/token", "live/seq", "held/seq", "read/tok", "users", "tok/s")
        numbers = dict.fromkeys((*names, "bound", "live", "hits", "$/M tok"), UNKNOWN)
        return numbers | {"weights": weights, "users": "0"}
    simulated, cost = answer.simulated, answer.cost_per_million
    return {
        "context": f"{answer.context_len:,}",
        "weights": weights,
        "B/token": f"{answer.bytes_per_token:,}",
        "live/seq": scaled(answer.sequence_bytes, 1024, BINARY),
        "held/seq": scaled(answer.held_bytes, 1024, BINARY),
        "read/tok": scaled(answer.read_bytes, 1024, BINARY),
        "users": f"{answer.users:,}",
        "tok/s": f"{answer.decode_tokens_per_s:,.0f}",
        "bound": answer.bound,
        "live": f"{simulated['live']:.1%}" if simulated else UNKNOWN,
        "hits": f"{simulated['prefix_hits']:.1%}" if simulated else UNKNOWN,
        "$/M tok": UNKNOWN if cost is None else f"{cost:,.3f}",
    }


def _needs(each: Deployment) -> str:
    chips = each.needed_chips
    return each.config.hardware.with_chips(chips).label if chips else "more than there are"


def frame_of(found: Sequence[Deployment]) -> pd.DataFrame:
    """Every number of every deployment, one row each; of those that do not fit what they need."""
    rows = []
    for each in found:
        model = each.config.model
        known = {"model": model.name, "variant": model.variant, **_heads(each), "weight_bytes": model.weight_bytes}
        row = known | {"model": model.name, "users": 0} | (each.answer.as_dict() if each.answer else {})
        rows.append({"deployment": each.name, **row, "needed_chips": each.needed_chips, "reason": each.reason})
    return pd.DataFrame(rows)
