"""Tab completion of what Hydra's own does not know: short names of fields, chips, and the choices of a sweep."""

import contextlib
import io
import os
from collections.abc import Sequence

from kvlab.capacity.config import ServingMemory
from kvlab.choices import COMPOSING
from kvlab.compose import CAPACITY, EVALUATE, GENERATE, RUN, SHORT, Root, composed_of, spelled_out
from kvlab.evaluation.measure import AXES, AXIS_WORDS
from kvlab.hardware import CHIPS
from kvlab.known_fields import keep
from kvlab.lab.evaluations import SCORED
from kvlab.lab.launch import through_hydra
from kvlab.schema import ConfigError, json_schema


def complete_by_hydra(arguments: list[str], words: list[str], *, is_new_word: bool) -> None:
    """Prints what completes the last of `words`, those of the command line so far, or a new one; or does what else
    Hydra is asked for, such as install=bash."""
    root = {"capacity": CAPACITY, "generate": GENERATE}.get(words[1] if len(words) > 1 else "run", RUN)
    if len(words) < 2 or not arguments[0].startswith("query="):
        through_hydra(["--shell-completion", *arguments], root)
        return
    typed = "" if is_new_word else words[-1]
    finished = words[2:] if is_new_word else words[2:-1]
    is_eval = words[1] == "eval"
    found = set(offers(typed, EVALUATE if is_eval else root))
    if words[1] == "best":
        found |= {each for each in _asked_of_results(typed) if each.startswith(typed)}
        finished = [word for word in finished if not word.startswith(("axis=", "floor="))]
    if not ("=" in typed and found):
        os.environ["COMP_LINE"] = " ".join([words[0], *for_hydra(finished, root), typed])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            through_hydra(["--shell-completion", *arguments], root)
        # Hydra has a group that has groups of its own, such as the types of a method, without its equals sign.
        found |= {word for word in printed.getvalue().split() if word not in root.groups and not word.endswith("/")}
    if is_eval:
        found = {
            word for word in found if word.partition("=")[0].partition(".")[0] in (*SCORED, *EVALUATE.groups, *SHORT)
        }
    print(*sorted(found), flush=True)
    if "." in typed and words[1] in COMPOSING:
        _keep(words[1], finished, root)


def _keep(command: str, finished: Sequence[str], root: Root) -> None:
    """Keeps the names of fields for the next time, where the words before can be composed."""
    with contextlib.suppress(ConfigError):
        keep(command, finished, composed_of(for_hydra(finished, root), root))


def offers(word: str, root: Root) -> list[str]:
    """Words that complete one that is being typed."""
    name, equals, value = word.partition("=")
    chips = () if root is GENERATE else ("hardware",)
    if not equals:
        return [f"{each}=" for each in (*root.groups, *root.short, *chips) if each.startswith(word)]
    before, comma, last = value.rpartition(",")
    if name in root.groups:
        choices = root.options(name)
    elif name in chips:
        choices = ["host", *CHIPS]
    else:  # of `kvlab capacity` only: a field of the memory, by its short name
        node = json_schema(ServingMemory)["properties"].get(name, {}) if name in root.short else {}
        choices = next((option["enum"] for option in (node, *node.get("anyOf", ())) if "enum" in option), [])
    chosen = before.split(",")
    return [f"{name}={before}{comma}{each}" for each in choices if each.startswith(last) and each not in chosen]


def _asked_of_results(word: str) -> list[str]:
    """What `kvlab best` takes beside conditions."""
    return [f"axis={axis}" for axis in (*AXIS_WORDS, *AXES)] if word.startswith("axis=") else ["axis=", "floor="]


def for_hydra(words: Sequence[str], root: Root) -> list[str]:
    """Finished words as Hydra composes them: overrides alone, short names spelled out, and of a swept group the last
    choice, whose fields may follow."""
    words = [word for word in words if "=" in word and not word.startswith("-")]
    swept = [word.split("=", 1)[0] in root.groups and "," in word for word in words]
    single = [
        f"{word.split('=', 1)[0]}={word.rpartition(',')[2]}" if is_swept else word
        for word, is_swept in zip(words, swept, strict=True)
    ]
    return spelled_out(single, root)
