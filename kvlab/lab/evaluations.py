"""`kvlab eval`: a finished run's parameters scored anew, through another memory, at other lengths or on another task.

What is trained once is evaluated by runs of the same training, beside the run and like any other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from kvlab import blueprint
from kvlab.compose import (
    EVALUATE,
    RUN,
    check_choices,
    composed_of,
    jobs_of,
    refuse_sweeps,
    spelled_out,
    swept_methods,
)
from kvlab.config import Config
from kvlab.lab.execute import load_params
from kvlab.lab.record import Unfinished, first_error, read_record
from kvlab.lab.source import config_of
from kvlab.lab.sweeps import idle_lines
from kvlab.lab.trained import Trained, Training, training_directory
from kvlab.methods import METHODS, fields_for_some, fitting
from kvlab.schema import ConfigError
from kvlab.sections import TrainedOn
from kvlab.tasks import TASKS
from kvlab.units import counted
from kvlab.weights.section import difference

SCORED = ("task", "memory", "measure", "hardware")
"""Sections that say how parameters are scored, and where; all others have made them what they are."""
LEGAL = "an evaluation changes task, memory, format, compression, selection, budget and measure"


@dataclass(frozen=True)
class Evaluations:
    """A finished run, its training, and the runs that score the same parameters otherwise."""

    base: Config
    trained: Trained
    configs: list[Config]
    idle: list[str]
    """What was asked of them and changes nothing."""

    @property
    def said(self) -> str:
        """Which parameters are scored, in a sentence."""
        report = self.trained.report
        tried = len(report.trials) + len(report.diverged)
        which = f"the best of {tried} learning rates on validation, {report.learning_rate:g}" if tried > 1 else ""
        how = ", ".join(filter(None, [f"after {counted(report.num_steps, 'step')}", which]))
        where = Training(self.base).directory / "params"
        return f"parameters of {self.base.label} {how}: {where} (sha256 {report.params_sha256[:10]}...)"


def evaluations_of(run: Path, overrides: Sequence[str], multirun: bool = False) -> Evaluations:
    """The runs that score a run's parameters as the overrides say, each beside it. Raises ConfigError for a field that
    its training has determined, and as `base_of` does; nothing is written."""
    base, trained = base_of(run)
    words = spelled_out(overrides, EVALUATE)
    _refuse_groups(words)
    check_choices(words, EVALUATE)
    configs = [_config(base, values, job) for job, values in _composed(base, words, multirun)]
    for config in configs:
        _ = config.run_dir  # reads the task's data: a missing or short corpus is answered here
    blueprint.check(configs)
    different = list({config.run_dir: config for config in configs}.values())
    return Evaluations(base, trained, different, idle_lines(configs))


def base_of(run: Path) -> tuple[Config, Trained]:
    """The configuration of a finished run, where it lies now, and its training. Raises FileNotFoundError for a folder
    that is none, ConfigError for a run that has not finished or whose training is not at hand, and `CheckpointError`
    for damaged parameters."""
    _check_finished(run)
    place, config = run.absolute(), config_of(run)
    name = place.parent.name if place.parent.name != config.folder else config.name
    config = replace(config, results_dir=str(run.parent.parent), name=name)
    config = config if config.run_id == place.name else blueprint.resolved(config)
    directory = training_directory(run)
    if directory == run:
        raise ConfigError("run", str(run), "has its parameters in its own folder, from before trainings were shared")
    if directory.name != config.training_id:
        legal = f"its data, or what reads them, have changed since: its training is {directory.name}, and would now be"
        raise ConfigError("run", str(run), f"{legal} {config.training_id}")
    if directory.absolute() != config.training_dir.absolute():
        legal = f"its training lies in {directory}, not beside it: results are moved as a whole, with trained/"
        raise ConfigError("run", str(run), legal)
    load_params(config, run)  # as they were trained, to the bit
    trained = Training(config).done
    assert trained is not None
    return config, trained


def _check_finished(run: Path) -> None:
    if (run / "training.yaml").exists():
        raise FileNotFoundError(f"{run}: this is a training; give a run's folder, beside trained/")
    if not (run / "config.yaml").exists():
        runs = sorted(path.parent for path in run.glob("*/record.json"))
        hint = f"; it holds runs, such as {runs[0]}" if runs else ""
        raise FileNotFoundError(f"{run}: not a run's folder (no config.yaml){hint}")
    if not (run / "record.json").exists():
        raise ConfigError("run", str(run), "has not finished; the `kvlab run` that began it goes on with it")
    try:
        record = read_record(run / "record.json")
    except (ValueError, OSError) as error:
        raise ConfigError("run", str(run), f"its record.json is damaged: {first_error(error)}") from None
    if isinstance(record, Unfinished):
        raise ConfigError("run", str(run), f"has {record.status}: {record.reason[:500]}")


def _refuse_groups(words: Sequence[str]) -> None:
    """Raises ConfigError for a choice of `kvlab run` that is none here."""
    for word in words:
        name, _, value = word.lstrip("+~").partition("=")
        if name in RUN.groups and name not in EVALUATE.groups:
            raise ConfigError(name, value, f"was chosen before the run was trained; {LEGAL}")


def _composed(base: Config, words: list[str], multirun: bool) -> list[tuple[list[str], dict[str, Any]]]:
    """The words of every job, and what they make of the run's configuration."""
    try:
        given = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError("overrides", words, str(error).splitlines()[0]) from None
    if not multirun:
        refuse_sweeps(given)
    for_some = fields_for_some(words, swept_methods(words))
    words = [for_some.get(word, word) for word in words]
    added = [word.split("=")[0].lstrip("+") for word in for_some]
    _register(base, [])
    jobs = jobs_of(words, EVALUATE) if multirun else [words]
    found = []
    for job in jobs:
        _register(base, job)
        found.append((job, fitting(composed_of(job, EVALUATE), added)))
    return found


def _register(base: Config, job: Sequence[str]) -> None:
    """Puts the run's configuration where Hydra composes upon it, without what the job chooses anew: a task, and
    methods, whose fields are their own."""
    chosen = [word.split("=")[0] for word in job]
    values = base.as_dict()
    values.pop("equal_budget", None)
    for name in METHODS:
        if name in chosen or f"memory.{name}" in chosen:
            values["memory"][name] = None
    if "task" in chosen:
        values["task"] = {}
    ConfigStore.instance().store(name="evaluated", node=values)


def _config(base: Config, values: Mapping[str, Any], job: Sequence[str]) -> Config:
    """The run that composed values describe, of the training of the base. Raises ConfigError."""
    kept = base.as_dict()
    kept.pop("equal_budget", None)
    for name in (name for name in values if name not in SCORED):
        if (found := difference(values[name], kept.get(name), name)) is not None:
            field, value, trained = found
            raise ConfigError(field, value, f"the run was trained with {trained!r:.200}; {LEGAL}")
    trained_on = base.trained_on or TrainedOn(base.task_name, base.task, base.measure.batch_size)
    task = _task(values["task"], trained_on, job)
    scored = {name: values[name] for name in SCORED} | {"task": task}
    built = Config.build(kept | scored | {"trained_on": trained_on.as_dict()})
    config = blueprint.resolved(built)
    if config.mixer != base.mixer:
        legal = (
            "without a compression bytes are solved for a field of the mixer, which is trained; give compression=..."
        )
        raise ConfigError("memory.budget", built.memory.budget, legal)
    return config


def _task(values: Any, trained_on: TrainedOn, job: Sequence[str]) -> Any:
    """The task of an evaluation: a text is read with the tokenizer of the training. Raises ConfigError for fields that
    only train."""
    kind = TASKS.get(str(values.get("type"))) if isinstance(values, Mapping) else None
    if kind is None:
        return values
    trained = trained_on.as_dict()["task"]
    for word in job:
        section, _, field = word.partition("=")[0].lstrip("+").partition(".")
        if section != "task" or field not in kind.training_fields or values.get(field) == trained.get(field):
            continue
        legal = f"the run was trained with {trained.get(field)!r:.200}, and no test depends on it; {LEGAL}"
        raise ConfigError(f"task.{field}", values.get(field), legal)
    tokenizer = trained.get("tokenizer")
    if tokenizer is not None and "tokenizer" in kind.Config.defaults() and values.get("tokenizer") is None:
        return {**values, "tokenizer": tokenizer}
    return values
