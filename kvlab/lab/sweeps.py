"""What a command line asks for, as sweeps: each experiment that it names brings its own axes and launcher."""

from collections.abc import Sequence
from typing import NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from kvlab.compose import RUN, expand
from kvlab.config import Config


class Sweep(NamedTuple):
    """The runs of one sweep, the words that Hydra's launcher is handed for them, and what is said of fields that were
    given and change nothing, by which runs came out equal."""

    configs: list[Config]
    handed: list[str]
    said: list[str]


def sweeps_of(overrides: Sequence[str], multirun: bool, *, planned: bool = False) -> list[Sweep]:
    """One sweep, or with `experiment=a,b` one for each of them: an experiment's own axes are composed with it alone. A
    run that several of them have is in the first. Raises ConfigError, before anything is run."""
    found, seen = list[Sweep](), set[str]()
    for words in _by_experiment(list(overrides)) if multirun else [list(overrides)]:
        configs, handed = expand(words, multirun, planned=planned)
        fresh = dict[str, Config]()
        for config in configs:
            if (place := str(config.run_dir)) not in seen:
                fresh.setdefault(place, config)
        seen |= fresh.keys()
        found.append(Sweep(list(fresh.values()), handed, idle_lines(configs)))
    return [sweep for sweep in found if sweep.configs]


def has_workers(overrides: Sequence[str], multirun: bool) -> bool:
    """Whether runs may come side by side in processes that this one starts, by joblib: the words say so, or else the
    experiment that they name. Told from words and files alone, before anything is composed."""
    said = {name.lstrip("+"): value for name, _, value in (word.partition("=") for word in overrides)}
    launcher = said.get("launcher") or said.get("hydra/launcher")
    experiments = [name for name in said.get("experiment", "").split(",") if name in RUN.options("experiment")]
    if launcher is not None:
        return launcher == "joblib" and (multirun or bool(experiments))
    read = [yaml.safe_load((RUN.path / "experiment" / f"{name}.yaml").read_text()) for name in experiments]
    return any({"override /launcher": "joblib"} in (values.get("defaults") or []) for values in read)


def idle_lines(configs: Sequence[Config]) -> list[str]:
    """What was asked of runs and changes nothing, a line for each variant that it is said of."""
    lines = list[str]()
    for config in configs:
        budget = config.equal_budget
        words = [budget.words] if budget is not None and budget.is_ceiling else []
        lines += [f"{config.mixer.name}: {each}" for each in (*words, *config.idle)]
    return list(dict.fromkeys(lines))


def _by_experiment(overrides: list[str]) -> list[list[str]]:
    """The words of a command line with each of the experiments that it sweeps over."""
    try:
        given = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return [overrides]  # `expand` says what is wrong
    for place, override in enumerate(given):
        if override.key_or_group == "experiment" and override.is_sweep_override():
            value = override.value()
            names = value.filter(RUN.options("experiment")) if isinstance(value, Glob) else override.sweep_iterator()
            return [[*overrides[:place], f"experiment={name}", *overrides[place + 1 :]] for name in names]
    return [overrides]
