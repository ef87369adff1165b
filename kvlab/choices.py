"""What completes at once, read off parsers and folders: commands, options, and the choices of groups. Fields that
were not composed before take Hydra, and seconds (`kvlab.lab.completion`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvlab.arguments import Parser
from kvlab.files import shipped_folder
from kvlab.known_fields import names_below
from kvlab.outside import config_folders

COMPOSING = {"run": ".", "plan": ".", "eval": ".", "generate": ".", "capacity": "capacity"}
"""Commands that take choices, and where in the folder of configurations their groups are."""
TRAINING = ("mixer", "model", "optimizer", "train", "tuned", "launcher", "experiment", "debug")
"""Groups that `kvlab eval` does not have."""
ASKING = ("compare", "best")
"""Commands that take conditions on fields."""


def at_once(line: str, commands: Mapping[str, Parser]) -> list[str] | None:
    """Words that complete the last one of a command line; None: that takes Hydra."""
    words = line.split()
    typed = "" if line.endswith(" ") or not words else words[-1]
    if len(words) < 2 or (len(words) == 2 and typed):
        return [command for command in commands if command.startswith(typed if len(words) == 2 else "")]
    command = words[1]
    if command not in commands:
        return None
    if typed.startswith("-"):
        return sorted(option for option in commands[command].options() if option.startswith(typed))
    if command == "eval" and typed.partition("=")[0].partition(".")[0] in TRAINING:
        return []
    if command in COMPOSING:
        folders = [shipped_folder("configs"), *(folder for _, folder in config_folders())]
        found = _choices([folder / COMPOSING[command] for folder in folders], typed)
        return names_below(command, words[2:-1], typed) if found is None and typed else found
    if command == "reproduce":
        names = sorted(path.parent.name for path in shipped_folder("experiments").glob("*/figure.py"))
        return [name for name in names if name.startswith(typed)]
    if command == "weights":
        return ["smollm2"] if "smollm2".startswith(typed) else []
    return None if command in ASKING else []


def _choices(roots: Sequence[Path], typed: str) -> list[str] | None:
    """The choices of the group that is being typed, without those before it; None for anything but a group, of which
    the first root has all."""
    name, equals, value = typed.partition("=")
    if not equals or not name.isidentifier() or not (roots[0] / name).is_dir():
        return None
    before, comma, last = value.rpartition(",")
    names = {path.stem for root in roots for path in (root / name).glob("*.yaml") if path.stem.startswith(last)}
    return [f"{name}={before}{comma}{each}" for each in sorted(names) if each not in before.split(",")]
