"""What eviction_mqar runs: methods with their settings, and what an earlier study found of each."""

from dataclasses import dataclass
from typing import Any

from kvlab.lab.styles import BLUE, BROWN, GREEN, GREY, INDIGO, INK, OLIVE, ORANGE, OTHERS, PINK, RED, SKY

BUDGETS = (0.75, 0.5, 0.25)
"""Of the prompt, a head."""
SECOND_TURN = ("KVzip", "Expected Attention", "H2O, by readers", "SnapKV, window 8")
"""Methods that are also asked a second turn, at `SECOND_SLOTS` slots of the 64 of a prompt of 32 pairs."""
SECOND_SLOTS = 32


@dataclass(frozen=True)
class Method:
    """A method by the name that the figure has, its section of a configuration, and how it is drawn. `before` are
    accuracies on 128:32 at each budget, the mean of two seeds, in the parallel form under a mask (methods B.1)."""

    name: str
    section: dict[str, Any]
    colour: str
    marker: str
    before: tuple[float, ...] | None = None
    budgets: tuple[float, ...] = BUDGETS

    @property
    def words(self) -> str:
        """As Hydra reads it."""
        return "{" + ",".join(f"{key}:{str(value).lower()}" for key, value in self.section.items()) + "}"

    def is_of(self, section: dict[str, Any] | None) -> bool:
        """Whether the section of a record is this method's."""
        return section is not None and all(section.get(key) == value for key, value in self.section.items())


def _method(
    name: str, colour: str, marker: str, before: tuple[float, ...] | None, kind: str, sinks: int = 0, **fields: Any
) -> Method:
    """Nothing is protected, so that a method is its scores alone."""
    section = {"type": kind, "sinks": sinks, **({} if kind == "streaming" else {"recent": 0}), **fields}
    budgets = (48, 32, 16) if kind == "streaming" else BUDGETS
    return Method(name, section, colour, marker, before, budgets)


METHODS = (
    _method("oracle", INK, "*", (0.994, 0.994, 0.667), "oracle", share="head"),
    _method("oracle, heads share", GREY, "*", (0.994, 0.994, 0.500), "oracle", share="layer"),
    _method("KVzip", BLUE, "o", (0.994, 0.992, 0.663), "kvzip", share="head"),
    _method("Expected Attention", SKY, "o", (0.994, 0.994, 0.651), "expected"),
    _method("Knorm, long keys", GREEN, "s", (0.994, 0.993, 0.651), "knorm", keep="long"),
    _method("KeyDiff", OTHERS[5], "s", (0.984, 0.897, 0.564), "keydiff"),
    _method("H2O, by readers", RED, "^", (0.938, 0.863, 0.570), "h2o", by_readers=True),
    _method("H2O, raw sums", ORANGE, "^", (0.882, 0.755, 0.479), "h2o", by_readers=False),
    _method("SnapKV, window 8", PINK, "^", (0.905, 0.828, 0.589), "snapkv", recent=8, window=8, pool=1),
    _method("random, each head", OLIVE, "x", (0.921, 0.708, 0.381), "random", share="head"),
    _method("random, heads share", OTHERS[3], "x", None, "random", share="layer"),
    _method("LagKV, lag 8", INDIGO, "D", None, "lagkv", lag=8),
    _method("TOVA", OTHERS[2], "^", (0.666, 0.523, 0.364), "tova"),
    _method("recency", OTHERS[7], "v", (0.745, 0.499, 0.251), "recency"),
    _method("Knorm, short keys", BROWN, "s", (0.649, 0.007, 0.006), "knorm", keep="short"),
    _method("streaming, 4 sinks", OTHERS[1], "v", None, "streaming", sinks=4),
)
NAMED = {method.name: method for method in METHODS}


def runs() -> tuple[tuple[str, ...], ...]:
    """The sweeps: the full memory, which trains; all methods at all budgets; two turns, seen and not seen before."""
    fractions = [method for method in METHODS if method.budgets == BUDGETS]
    (streaming,) = [method for method in METHODS if method.budgets != BUDGETS]
    second = [NAMED[name] for name in SECOND_TURN]
    return (
        (),
        (f"memory.compression={_swept(fractions)}", f"memory.budget={','.join(map(str, BUDGETS))}"),
        (f"memory.compression={streaming.words}", f"memory.budget={','.join(map(str, streaming.budgets))}"),
        ("task.num_turns=2",),
        (
            "task.num_turns=2",
            "task.query_aware=true,false",
            f"memory.compression={_swept(second)}",
            f"memory.budget={SECOND_SLOTS}",
        ),
    )


def _swept(methods: list[Method]) -> str:
    return ",".join(method.words for method in methods)
