"""How points look: a colour and a marker by what a sweep goes over. A mixer has the same colour in every picture."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from colorsys import hsv_to_rgb
from itertools import chain, count
from typing import Any, NamedTuple

from matplotlib.colors import to_hex

from kvlab.lab.choose import differences, fields_of

COLOURS = {
    "mha": "#0072b2",
    "gqa": "#56b4e9",
    "mqa": "#009e73",
    "mla": "#9bc53d",
    "swa": "#e69f00",
    "swa16": "#f5c26b",
    "swa32": "#e69f00",
    "swa64": "#a86f00",
    "gated_deltanet": "#5b3a8c",
    "deltanet": "#8a6fb8",
    "deltaproduct": "#b9a3d9",
    "kda": "#2f6b4f",
    "linear_attention": "#7f7f7f",
    "retnet": "#b0b0b0",
    "gla": "#9c755f",
    "mamba2": "#cc79a7",
    "mamba2_n16": "#e0a9c8",
    "mamba2_n64": "#a8487c",
    "mamba3": "#7a2f5c",
    "based": "#86bcb6",
    "rglru": "#b07aa1",
    "griffin": "#d37295",
    "hybrid": "#d55e00",
    "indexed": "#1b6e8c",
}
OTHERS = ("#332288", "#117733", "#882255", "#44aa99", "#999933", "#aa4499", "#661100", "#6699cc")
BLUE, ORANGE, GREEN, RED, PINK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
SKY, INDIGO, OLIVE, BROWN, GREY = "#56b4e9", "#332288", "#999933", "#661100", "#7f7f7f"
INK = "#333333"
"""Of what is compared with: the full memory, an optimum, a bound."""
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, INDIGO, OLIVE, BROWN, GREY)
"""Of fields whose values have no colour of their own; told apart by colour-blind eyes."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d")
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "*": "star",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
    "h": "hexagon",
    "d": "diamond-tall",
}
"""The same in plotly."""
DASHES: dict[str, str] = dict(
    zip(MARKERS, ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot") * 3, strict=False)
)
"""How plotly joins the marks of a line."""
CHOICES = ("mixer", "memory.compression", "memory.selection", "memory.format", "memory.name")
"""What is coloured first, where it differs."""
ELSEWHERE = ("task", "measure", "experiment", "equal_budget", "results_dir", "seed")
"""Of a configuration what is said by panels, or changes no result."""


class Style(NamedTuple):
    """How a point is drawn."""

    colour: str
    marker: str


def colour(variant: str) -> str:
    """A mixer's colour; unknown names get one of a second palette, always the same."""
    if variant in COLOURS:
        return COLOURS[variant]
    return OTHERS[hashlib.sha256(variant.encode()).digest()[0] % len(OTHERS)]


def colours(values: Iterable[str], *, of_mixers: bool = False) -> dict[str, str]:
    """Another colour for each value, of mixers their own where no other of these has it."""
    found: dict[str, str] = {}
    for value in dict.fromkeys(values):
        wanted = [colour(value)] if of_mixers else []
        found[value] = next(each for each in chain(wanted, PALETTE, OTHERS, _more()) if each not in found.values())
    return found


def _more() -> Iterator[str]:
    """Hues without end, neighbours far apart."""
    for number in count():
        yield to_hex(hsv_to_rgb(number * 0.618 % 1, 0.7, 0.75))


def swept(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields in which configurations of points differ, by dotted names: choices first, then what has words for
    values, then numbers; of these the ones with fewer values first, and fields of other choices last. What panels say
    is left out."""
    found = differences([_drawn(config) for config in configs])
    choices = [name for name in CHOICES if name in found]

    def order(name: str) -> tuple[bool, bool, int, str]:
        is_within = any(name.startswith(f"{choice}.") for choice in choices)
        return is_within, all(map(_is_number, found[name])), len(found[name]), name

    return choices + sorted((name for name in found if name not in choices), key=order)


def _drawn(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ELSEWHERE}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word == "None"
    return True


def styles(configs: Sequence[Mapping[str, Any]]) -> list[Style]:
    """A style for the configuration of each point: the colour by the first field of `swept`, the marker by the next
    that is no field of the first and no recipe that follows from it, else by the first as well, in the order of its
    values' names. Where these two leave
    points of a panel alike, markers tell the points of a colour apart."""
    keys = [json.dumps(_drawn(config), sort_keys=True, default=str) for config in configs]
    different = dict(zip(keys, configs, strict=True))
    names, fields = swept(list(different.values())), [fields_of(config) for config in different.values()]

    def values(name: str) -> list[str]:
        return [str(each.get(name)) for each in fields]

    leading, *others = names or ["mixer"]
    first = values(leading)
    palette = colours(first, of_mixers=leading == "mixer")

    def follows(name: str) -> bool:
        return len(set(zip(first, values(name), strict=True))) == len(set(first))

    second = next((name for name in others if not name.startswith(f"{leading}.") and not follows(name)), None)
    ranks = _ranks(values(second)) if second else [sorted(set(first)).index(value) for value in first]
    if max(ranks, default=0) >= len(MARKERS) or len(set(zip(first, ranks, strict=True))) < len(first):
        ranks = [first[:place].count(value) for place, value in enumerate(first)]
    looks = [Style(palette[value], MARKERS[rank % len(MARKERS)]) for value, rank in zip(first, ranks, strict=True)]
    by_key = dict(zip(different, looks, strict=True))
    return [by_key[key] for key in keys]


def _ranks(values: Sequence[str]) -> list[int]:
    """The place of each value among those that are different, in order of appearance."""
    order = list(dict.fromkeys(values))
    return [order.index(value) for value in values]
