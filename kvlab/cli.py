"""The command line: kvlab run | plan | show | report | track | capacity | generate | reproduce."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from kvlab.schema import ConfigError, nearest

if TYPE_CHECKING:
    from kvlab.config import Config

USAGE = """usage: kvlab <command> [...]

  run [-m] [group=choice] [field=value]   train, evaluate and record; -m sweeps over comma lists
  plan [-m] [group=choice] [field=value]  the dry run: identity, state, bytes, FLOPs, fits or not
  show RESULTS                            a table in the terminal
  report RESULTS [--output FOLDER]        report.html, frontier.png, frontier.pdf, frontier.csv
  track RESULTS [--output FOLDER]         TensorBoard event files
  capacity [-m] [group=choice] [field=value] [--output FOLDER]
                                          what a published model's memory holds, for whom, how fast; -m compares
  generate FOLDER [--prompt TEXT] [--input FILE] [--jsonl] [--output FILE] [field=value]
                                          a run's directory or a published checkpoint answers prompts
  reproduce EXPERIMENT                    makes an experiment's figures and checks them against published values
  kernels [TARGET ...]                    simulates the kernels, and compiles them for H100, H200, B200, v4, v5e, v5p, v6e, 7x

Groups: mixer model memory task optimizer train hardware launcher experiment debug; of capacity: model hardware memory workload;
sections of generate: sampling engine memory.
`kvlab run --cfg job` prints the composed config, `kvlab run --help` Hydra's own options."""


def main() -> int:
    """Entry point; returns the exit status: 0 fine, 1 something failed, 2 a wrong command or config, 130 interrupted."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": run,
        "plan": plan,
        "show": show,
        "report": report,
        "track": track,
        "capacity": capacity,
        "generate": generate,
        "reproduce": reproduce,
        "kernels": kernels,
    }
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"kvlab {version('kvlab')}")
        return 0
    name, *rest = arguments
    if name in ("-sc", "--shell-completion"):
        return complete(rest, list(commands))
    if name not in commands:
        print(f"kvlab: no command {name!r}; {nearest(name, commands)}", file=sys.stderr)
        return 2
    try:
        return commands[name](rest)
    except (ConfigError, OSError, ImportError, MemoryError) as error:
        print(f"kvlab: {error or type(error).__name__}", file=sys.stderr)
        return 2


def run(arguments: list[str]) -> int:
    """Runs one config or a sweep; finished runs are skipped, failed ones retried, cut ones resumed."""
    overrides, flags = _sorted_arguments(arguments)
    if set(flags) - {"-m", "--multirun"}:  # Hydra's own: --cfg, --info, --help, --shell-completion
        _through_hydra(arguments)
        return 0
    from kvlab.compose import expand
    from kvlab.lab.runs import Run

    configs, handed = expand(overrides, bool(flags))
    configs = list({config.run_dir: config for config in configs}.values())
    if len(configs) == 1:
        statuses = [_execute(configs[0])]
    else:
        Console(stderr=True, highlight=False).print(_sweep_summary(configs), markup=False)
        from kvlab.interrupt import sweep_stops_together

        stop_file = Path(configs[0].results_dir) / f".stop-{os.getpid()}"
        with sweep_stops_together(stop_file), contextlib.suppress(SystemExit):  # the runs' states tell what happened
            _through_hydra(["--multirun", *handed])
        statuses = ["locked" if Run(config).held_elsewhere else Run(config).state for config in configs]
    _print_runs(configs)
    if {"interrupted", "cut", "new"} & set(statuses):
        return 130
    return 0 if all(status in ("done", "skipped") for status in statuses) else 1


def _execute(config: "Config") -> str:
    from kvlab.lab.execute import execute
    from kvlab.lab.runs import RunLocked

    use_compilation_cache()
    try:
        status = execute(config)
    except RunLocked as error:
        print(f"kvlab: {error}", file=sys.stderr)
        return "locked"
    reason = ""
    if status == "failed":
        from kvlab.lab.runs import Run

        record = Run(config).record or {}
        reason = f": {record.get('reason')}"
    print(f"{config.label} [{config.run_id}] {status}{reason}", file=sys.stderr, flush=True)
    return status


def _through_hydra(arguments: Sequence[str]) -> None:
    """Hands over to Hydra: sweeps, launchers, --cfg. Each job comes back to `_job`, here or in another process."""
    import hydra

    from kvlab.compose import configs_dir, register

    register()
    sys.argv = ["kvlab", *arguments]
    hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name="config")(_job)()


def _job(composed: Any) -> None:
    from omegaconf import OmegaConf

    from kvlab.config import Config
    from kvlab.interrupt import stop_sweep

    if _execute(Config.build(OmegaConf.to_container(composed, resolve=True))) == "interrupted":
        stop_sweep()


def use_compilation_cache() -> None:
    """JAX's persistent compilation cache, under the user's cache folder unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "kvlab" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def plan(arguments: list[str]) -> int:
    """Prints every run of an invocation with what it would hold and cost; trains nothing, writes nothing."""
    overrides, flags = _sorted_arguments(arguments)
    if unknown := set(flags) - {"-m", "--multirun"}:
        raise ConfigError("option", sorted(unknown)[0], "kvlab plan takes -m, groups and fields only")
    from kvlab.compose import expand
    from kvlab.lab.laboratory import Laboratory
    from kvlab.lab.plan import predict
    from kvlab.lab.runs import Run
    from kvlab.units import human_bytes

    use_compilation_cache()
    configs, _ = expand(overrides, bool(flags))
    names = ("run", "label", "state", "params", "weights", "optimizer", "activations", "memory", "temporaries", "FLOPs")
    table = Table(*names, "fits", title=f"{len(configs)} runs", title_justify="left")
    alike: dict[str, Any] = {}
    for config in configs:
        key = str({name: value for name, value in config.as_dict().items() if name not in ("seed", "results_dir")})
        if key not in alike:
            alike[key] = predict(Laboratory.of(config, abstract=True))
        found = alike[key]
        sizes = (found.weights_bytes, found.optimizer_bytes, found.activations_bytes)
        sizes = (*sizes, found.state_bytes, found.temporaries_bytes)
        fits = f"{'yes' if found.fits else 'NO'}: {human_bytes(max(found.train_bytes, found.decode_bytes))}"
        fits += f" of {human_bytes(found.hardware_bytes)} ({found.hardware})"
        cells = [config.run_id, config.label, Run(config).state, f"{found.num_params:,}"]
        table.add_row(*cells, *(human_bytes(size) for size in sizes), f"{found.train_flops:.2e}", fits)
    _console().print(table)
    for kernels in dict.fromkeys(_kernels_line(found) for found in alike.values()):
        _console().print(kernels, markup=False)
    return 0 if all(found.fits for found in alike.values()) else 1


def _kernels_line(plan: Any) -> str:
    """The implementations that a run would take, and why it would not take the kernels of such a device."""
    said = (f"{op} {one.taken}" + (f" ({one.reason})" if one.reason else "") for op, one in plan.kernels.items())
    return f"on {plan.hardware}: {', '.join(said)}"


def show(arguments: list[str]) -> int:
    """A folder of results as a table, one row a point; failed and cut runs below with their reasons."""
    parser = argparse.ArgumentParser("kvlab show", description=show.__doc__)
    parser.add_argument("results", type=Path)
    from kvlab.lab.results import read_records

    _print_records(read_records(parser.parse_args(arguments).results))
    return 0


def report(arguments: list[str]) -> int:
    """Writes the page, the pictures and the data of a folder of results."""
    parser = argparse.ArgumentParser("kvlab report", description=report.__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, help="where to write; default: the results folder itself")
    options = parser.parse_args(arguments)
    from kvlab.lab.report import write_report

    for path in write_report(options.results, options.output or options.results):
        print(path)
    return 0


def track(arguments: list[str]) -> int:
    """Copies a folder of results for TensorBoard."""
    parser = argparse.ArgumentParser("kvlab track", description=track.__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, help="where to write; default: RESULTS/tensorboard")
    options = parser.parse_args(arguments)
    from kvlab.lab.track import to_tensorboard

    for folder in to_tensorboard(options.results, options.output or options.results / "tensorboard"):
        print(folder)
    return 0


def capacity(arguments: list[str]) -> int:
    """Answers for one deployment, or with -m for each of a comma list, side by side with a picture."""
    overrides, flags = _sorted_arguments([one for one in arguments if not one.startswith("--output")])
    output = next((one.removeprefix("--output=") for one in arguments if one.startswith("--output=")), None)
    if "--output" in arguments:
        place = arguments.index("--output")
        output = arguments[place + 1] if place + 1 < len(arguments) else None
        overrides = [one for one in overrides if one != output]
        if output is None:
            raise ConfigError("--output", None, "must name a folder")
    if flags and set(flags) <= {"-h", "--help"}:
        print(USAGE)
        return 0
    if unknown := set(flags) - {"-m", "--multirun"}:
        raise ConfigError("option", sorted(unknown)[0], "kvlab capacity takes -m, --output, groups and fields only")
    from kvlab.capacity.estimate import estimate
    from kvlab.capacity.report import many_answers, one_answer, write
    from kvlab.compose import compose_capacity, expand_capacity

    configs = expand_capacity(overrides) if flags else [compose_capacity(overrides)]
    answers = [estimate(config) for config in configs]
    _console().print(one_answer(configs[0], answers[0]) if len(answers) == 1 else many_answers(answers))
    if output is not None or len(answers) > 1:
        for path in write(Path(output or "results/capacity"), configs, answers):
            print(path)
    return 0


def generate(arguments: list[str]) -> int:
    """Answers prompts from a run's directory or a published checkpoint; fields such as sampling.temperature=0.7,
    engine.max_batch=16, memory.page_size=32, draft=FOLDER."""
    parser = argparse.ArgumentParser("kvlab generate", description=generate.__doc__)
    parser.add_argument("folder", type=Path, help="a run's directory, or a folder with config.json and safetensors")
    parser.add_argument("--prompt", action="append", default=[], help="text, or token ids 1,2,3; may be given again")
    parser.add_argument("--input", type=Path, help='JSONL of {"prompt": ..., "sampling": {...}}; - is standard input')
    parser.add_argument("--output", type=Path, help="write the answers as JSONL")
    parser.add_argument(
        "--jsonl", action="store_true", help="JSONL on standard input and output; answers come as they are done"
    )
    parser.add_argument("fields", nargs="*", metavar="field=value")
    options = parser.parse_intermixed_args(arguments)
    from kvlab.lab.generation import GenerateConfig
    from kvlab.lab.generation import generate as run_requests

    config = GenerateConfig.parse(options.fields)
    use_compilation_cache()
    try:
        return run_requests(options.folder, config, options.prompt, options.input, options.output, options.jsonl)
    except ValueError as error:  # a bad request, line or checkpoint: nothing was computed
        print(f"kvlab: {error}", file=sys.stderr)
        return 2


def reproduce(arguments: list[str]) -> int:
    """Runs an experiment's sweep if it has one, draws its figures and prints its claims; 1 if a claim fails."""
    from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure, names

    parser = argparse.ArgumentParser("kvlab reproduce", description=reproduce.__doc__)
    parser.add_argument("experiment", help=", ".join(names()))
    parser.add_argument("--output", type=Path, help="where figures are written; default: the experiment's own folder")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs are kept; default: results")
    options = parser.parse_args(arguments)
    if options.experiment not in names():
        raise ConfigError("experiment", options.experiment, nearest(options.experiment, names()))
    figure = load_figure(options.experiment)
    if hasattr(figure, "RUNS"):
        status = run(["-m", f"experiment={options.experiment}", f"results_dir={options.results}"])
        if status:
            return status
    output = options.output or EXPERIMENTS_DIR / options.experiment
    output.mkdir(parents=True, exist_ok=True)
    return figure.main(output, options.results / options.experiment)


def kernels(arguments: list[str]) -> int:
    """What runs here, what the simulators say, and what each kernel takes on chips that are not here."""
    from rich.table import Table

    from pallas_kernels import simulators, targets
    from pallas_kernels.ops import OPS

    if set(arguments) & {"-h", "--help"}:
        print(USAGE)
        return 0
    if unknown := [one for one in arguments if one not in targets.TARGETS]:
        raise ConfigError("target", unknown[0], f"must be some of {', '.join(targets.TARGETS)}")
    console, chosen = _console(), [targets.TARGETS[one] for one in arguments or targets.TARGETS]
    for op in OPS.values():
        console.print(f"{op.name}: here {', then '.join(op.available())}")
    status = 0
    for backend in dict.fromkeys(one.backend for one in chosen):
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
        for one in compiled:
            table.add_row(*targets.row(one))
    if table.rows:
        console.print(table)
    return int(status)


def complete(arguments: list[str], commands: list[str]) -> int:
    """Tab completion: commands here, groups and fields by Hydra. Installed by `eval "$(kvlab -sc install=bash)"`."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    typing_command = len(words) < 2 or (len(words) == 2 and not line.endswith(" "))
    if arguments[:1] == ["query=bash"] and typing_command:
        prefix = words[1] if len(words) == 2 else ""
        print(" ".join(command for command in commands if command.startswith(prefix)))
        return 0
    if len(words) >= 2:
        os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    _through_hydra(["--shell-completion", *arguments])
    return 0


def _sorted_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides and flags apart."""
    flags = [one for one in arguments if one.startswith("-")]
    return [one for one in arguments if not one.startswith("-")], flags


def _console() -> Console:
    """Full width where nobody is watching, so that piped tables are not cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _sweep_summary(configs: list["Config"]) -> str:
    from collections import Counter

    from kvlab.lab.runs import Run

    states = Counter(Run(config).state for config in configs)
    words = {"new": "to run", "cut": "to resume", "failed": "to retry", "done": "done already"}
    return f"{len(configs)} runs: " + ", ".join(f"{count} {words[state]}" for state, count in states.items())


def _print_runs(configs: list["Config"]) -> None:
    from kvlab.lab.runs import Run

    records = [{**record, "directory": str(config.run_dir)} for config in configs if (record := Run(config).record)]
    if records:
        _print_records(records)


def _print_records(records: list[dict[str, Any]]) -> None:
    from kvlab.lab.results import points
    from kvlab.units import human_bytes

    names = ("variant", "task", "metric", "value", "± 95%", "seeds", "logical/seq", "allocated/seq", "context")
    table = Table(*names, "step ms", "decode tok/s")
    for point in points(records):
        sizes = (point.bytes_per_sequence[axis] for axis in ("logical_bytes", "allocated_bytes"))
        interval = f"{point.high - point.value:.4f}" if point.num_seeds > 1 else "-"
        cells = (point.name, point.task, point.metric, f"{point.value:.4f}", interval, str(point.num_seeds))
        speeds = (str(point.context_len), f"{point.train_step_ms:.1f}", f"{point.decode_tokens_per_s:,.0f}")
        table.add_row(*cells, *(human_bytes(size) for size in sizes), *speeds)
    console = _console()
    if table.row_count:
        console.print(table)
    for record in records:
        if record["status"] != "done":
            name = record["config"]["mixer"]["name"]
            line = f"{record['status']}: {name} seed {record['seed']} [{record['run_id']}] {record.get('reason')}"
            console.print(line, markup=False)
