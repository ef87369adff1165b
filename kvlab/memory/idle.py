"""Fields of a memory on which nothing depends: runs that differ in them alone are one run."""

from collections.abc import Callable

from kvlab.compression.budget import Budget
from kvlab.memory.config import SEALED, MemoryConfig


def idle_fields(memory: MemoryConfig, has_pages: Callable[[], bool] = lambda: True) -> dict[str, str]:
    """The fields that are not at their defaults and say nothing of such a memory, by name, with the reason. `has_pages`
    says whether a state of the model lies in pages; it is asked only where that matters. Of a run first have a budget
    solved: beside no compression one of bytes may be for a knob of the mixer."""
    defaults, reasons = type(memory).defaults(), dict[str, str]()
    if memory.name == "dense":
        reasons["page_size"] = "memory.name = dense holds a sequence in one piece"
    elif memory.page_size != defaults["page_size"] and not has_pages():
        reasons["page_size"] = "no state of this model lies in pages"
    if memory.format not in SEALED:
        reasons |= dict.fromkeys(("residual", "quantised_prefill"), f"memory.format = {memory.format} seals no pages")
    if memory.budget is None or Budget.of(memory.budget).num_bytes is None:
        reasons["allow_underfill"] = "only a budget of bytes can be filled too little"
    if memory.compression is None:
        reasons["budget"] = "it is of what a compression keeps"
    return {name: reason for name, reason in reasons.items() if getattr(memory, name) != defaults[name]}


def idle_words(memory: MemoryConfig, reasons: dict[str, str]) -> list[str]:
    """What is said of such fields."""
    return [f"memory.{name} = {getattr(memory, name)} changes nothing: {why}" for name, why in reasons.items()]
