"""The command line: kvlab run | eval | plan | show | report | plot | compare | best | track | capacity | generate |
weights | reproduce | kernels | schema."""

import argparse
import sys
from pathlib import Path
from typing import Any

from kvlab import arguments
from kvlab.arguments import Parser, UsageError
from kvlab.commands.models import capacity, generate, weights
from kvlab.commands.results import best, compare, plot, report, show, track
from kvlab.commands.runs import evaluate, hydras_own, plan, reproduce, run
from kvlab.commands.tools import complete, kernels, schema

EPILOG = """Groups: mixer model memory format compression selection task optimizer train launcher experiment debug, and
hardware=h100x2 for chips; of capacity: model memory format compression selection workload; of generate: memory format
compression selection; of eval these and task. --cfg job prints the composed config, also of eval, capacity and
generate; `kvlab run --help` prints Hydra's own options.
"""


MAX_MESSAGE = 2000
"""Characters of a message."""


def main() -> int:
    """Entry point; returns the exit status: 0 fine, 1 something failed, 2 a wrong command or config, 130
    interrupted."""
    parser, commands = make_parsers()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        from importlib.metadata import version

        print(f"kvlab {version('kvlab')}")
        return 0
    if name in ("-sc", "--shell-completion"):
        return complete(rest, commands)
    if name not in commands:
        from kvlab.schema import nearest

        print(f"kvlab: no command {name!r}; {nearest(name, commands)}", file=sys.stderr)
        return 2
    try:
        if name == "run" and (status := hydras_own(rest)) is not None:
            return status
        options = commands[name].parse_intermixed_args(rest)
        return options.command(options)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        from kvlab.schema import ConfigError
        from kvlab.training.checkpoint import CheckpointError

        if isinstance(error, ValueError | RuntimeError) and not isinstance(error, ConfigError | CheckpointError):
            raise
        print(f"kvlab: {str(error)[:MAX_MESSAGE] or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvlab: interrupted", file=sys.stderr)
        return 130


def make_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole, for its help, and that of each command."""
    parser = Parser(
        "kvlab",
        usage="kvlab <command> [...]",
        description="A laboratory for attention-memory variants.",
        epilog=EPILOG,
        add_help=False,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title="commands", prog="kvlab", metavar="<command>")

    def add(command: Any, summary: str, name: str | None = None) -> Parser:
        added = commands.add_parser(
            name or command.__name__, help=summary, description=command.__doc__, allow_abbrev=False
        )
        added.set_defaults(command=command)
        return added

    composed = "[group=choice] [field=value]"
    for command, summary in (
        (run, "train, evaluate and record; -m sweeps over comma lists"),
        (plan, "the dry run: identity, state, bytes, FLOPs, fits or not"),
    ):
        arguments.add_overrides(add(command, f"{composed}: {summary}"))
    scored = f"RUN {composed}: scores a finished run's parameters otherwise, without training"
    arguments.add_eval(add(evaluate, scored, "eval"))
    arguments.add_show(add(show, "RESULTS: a table in the terminal, in Markdown or LaTeX"))
    arguments.add_results(add(report, "RESULTS: report.html, frontier.png, frontier.pdf, frontier.csv"), "RESULTS")
    arguments.add_plot(add(plot, "RESULTS --x COLUMN --y COLUMN: a picture of what one chooses, and its data"))
    arguments.add_compare(
        add(compare, "A B ...: paired differences on the same examples; run folders, run ids or field=value,...")
    )
    arguments.add_best(
        add(best, "budget=64KiB task=mqar [RESULTS]: the best quality that fits, or with floor= the least bytes")
    )
    arguments.add_results(add(track, "RESULTS: TensorBoard event files"), "RESULTS/tensorboard")
    arguments.add_capacity(
        add(capacity, f"{composed}: what a published model's memory holds, for whom, how fast; -m compares")
    )
    arguments.add_generate(
        add(generate, f"FOLDER {composed}: a run's directory or a published checkpoint answers prompts")
    )
    arguments.add_weights(
        add(weights, "smollm2 | PATH.gguf: a published model as a folder that generate and weights.path read")
    )
    arguments.add_reproduce(add(reproduce, "EXPERIMENT: its figures, and its claims checked, where it makes some"))
    target = "[TARGET ...]: simulates the kernels, and compiles them for H100, H200, B200, v4, v5e, v5p, v6e, 7x"
    add(kernels, target).add_argument("targets", nargs="*", metavar="TARGET")
    output = add(schema, "the JSON schemas that editors complete YAML with")
    output.add_argument("--out", type=Path, default=Path("schemas"), help="where to write; default: schemas")
    return parser, dict(commands.choices)
