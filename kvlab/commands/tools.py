"""Commands for who works on kvlab and its configurations: kernels, schema; and completion by tab."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from kvlab.arguments import Parser


def schema(options: argparse.Namespace) -> int:
    """Writes the JSON schemas of every command's config and of every group, for editors that complete YAML."""
    from kvlab.lab.schemas import write_schemas

    for path in write_schemas(options.out):
        print(path)
    return 0


def kernels(options: argparse.Namespace) -> int:
    """What runs here, what the simulators say, and what each kernel takes on chips that are not here."""
    from rich.table import Table

    from kvlab.lab.tables import wide_console
    from kvlab.schema import ConfigError
    from pallas_kernels import simulators, targets
    from pallas_kernels.ops import OPS

    if unknown := [name for name in options.targets if name not in targets.TARGETS]:
        raise ConfigError("target", unknown[0], f"must be some of {', '.join(targets.TARGETS)}")
    console, chosen = wide_console(), [targets.TARGETS[name] for name in options.targets or targets.TARGETS]
    for op in OPS.values():
        console.print(f"{op.name}: here {', then '.join(op.available())}")
    status = 0
    for backend in dict.fromkeys(target.backend for target in chosen):
        for op, said in simulators.simulate(backend).items():
            status |= said.startswith("FAILED")
            console.print(f"{op} for {backend}s, simulated with race detection: {said}")
    table = Table(*targets.HEADER)
    for target in chosen:
        if reason := targets.missing(target):
            console.print(f"{target.name}: {reason}")
            continue
        compiled = targets.compile_for(target)
        status |= bool(targets.failures(compiled))
        for case in compiled:
            table.add_row(*targets.row(case))
    if table.rows:
        console.print(table)
    return int(status)


def complete(arguments: list[str], commands: dict[str, Parser]) -> int:
    """Tab completion: commands, options and choices at once, fields by Hydra. Installed by
    `eval "$(kvlab -sc install=bash)"`."""
    from kvlab.choices import at_once

    line = os.environ.get("COMP_LINE", "")
    if arguments[:1] == ["query=bash"] and (found := at_once(line, commands)) is not None:
        print(*found)
        return 0
    from kvlab.lab.completion import complete_by_hydra

    complete_by_hydra(arguments, line.split(), is_new_word=line.endswith(" "))
    return 0


def print_yaml(configs: Sequence[Any]) -> int:
    """What --cfg job prints: every field of the composed configs."""
    import yaml

    from kvlab.schema import to_plain

    print(yaml.safe_dump_all([to_plain(config) for config in configs], sort_keys=False), end="")
    return 0
