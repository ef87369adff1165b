"""Commands that run: run, eval, plan, reproduce."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kvlab.arguments import UsageError
from kvlab.commands.tools import print_yaml


def run(options: argparse.Namespace) -> int:
    """Runs one config or a sweep; finished runs are skipped, failed ones retried, cut ones resumed."""
    return _run(options.overrides, options.multirun)


def _run(overrides: list[str], multirun: bool) -> int:
    from kvlab.lab.cards import leave_memory_to_workers
    from kvlab.lab.launch import execute_one, exit_status, run_sweep
    from kvlab.lab.sweeps import has_workers, sweeps_of
    from kvlab.lab.tables import print_runs
    from kvlab.lab.trackers import check_installed

    if has_workers(overrides, multirun):
        leave_memory_to_workers()
    sweeps, statuses = sweeps_of(overrides, multirun), list[str]()
    check_installed(config for sweep in sweeps for config in sweep.configs)
    for line in dict.fromkeys(line for sweep in sweeps for line in sweep.said):
        print(f"kvlab: {line}", file=sys.stderr)
    for configs, handed, _ in sweeps:
        is_one = len(configs) == 1 and len(sweeps) == 1
        statuses += [execute_one(configs[0])] if is_one else run_sweep(configs, handed)
        if "interrupted" in statuses:
            break
    configs = [config for sweep in sweeps for config in sweep.configs]
    print_runs(configs)
    for folder in dict.fromkeys(config.run_dir.parent for config in configs):
        print(f"next: kvlab report {shlex.quote(str(folder))}", file=sys.stderr)
    return exit_status(statuses)


def evaluate(options: argparse.Namespace) -> int:
    """Scores a finished run's parameters otherwise, without training: memory=..., compression=..., other test lengths
    (task.test=[256:16]), another task of the same vocabulary. The result is a run of its own beside the first."""
    from kvlab.lab.evaluations import evaluations_of
    from kvlab.lab.launch import evaluate_here, exit_status
    from kvlab.lab.tables import print_runs

    if not options.words or "=" in options.words[0]:
        raise UsageError("kvlab eval: give a finished run's folder first; see kvlab eval --help")
    found = evaluations_of(Path(options.words[0]), options.words[1:], options.multirun)
    if options.cfg:
        return print_yaml(found.configs)
    print("\n".join([found.said, *(f"kvlab: {line}" for line in found.idle)]), file=sys.stderr)
    statuses = evaluate_here(found.configs)
    print_runs(list({config.run_dir: config for config in (found.base, *found.configs)}.values()))
    folder = shlex.quote(str(found.base.run_dir.parent))
    print(f"next: kvlab show {folder}, or kvlab report {folder}", file=sys.stderr)
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
    print_plans(plans, [line for sweep in sweeps for line in sweep.said])
    return 0 if all(found.fits for found in alike.values()) else 1


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


def hydras_own(arguments: Sequence[str]) -> int | None:
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
            return print_yaml([config.as_dict()])
    return by_hydra_alone(arguments)
