"""Hydra, and nothing else: composing configurations, expanding sweeps, and answering typos with the nearest legal names."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvlab.capacity.estimate import CapacityConfig
from kvlab.capacity.presets import Preset
from kvlab.config import Config, defaults
from kvlab.mixers import MIXERS
from kvlab.models.transformer import ModelConfig
from kvlab.schema import ConfigError, nearest
from kvlab.tasks import TASKS


def configs_dir() -> Path:
    """The YAML groups: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def register() -> None:
    """Puts the dataclasses' defaults into Hydra's ConfigStore, as plain values: YAML groups say what differs."""
    store = ConfigStore.instance()
    store.store(name="defaults", node=defaults())
    store.store(name="capacity_defaults", node=capacity_defaults())
    for group, registry in (("mixer", MIXERS), ("task", TASKS)):
        for name, kind in registry.items():
            store.store(group=f"{group}/type", name=name, node={"type": name, **kind.Config.defaults()})


def capacity_defaults() -> dict[str, Any]:
    """The defaults of `kvlab capacity`; a model's name, size and layers come from its file alone."""
    of_its_own = ("name", "source", "num_params", "layers")
    model = {name: value for name, value in Preset.defaults().items() if name not in of_its_own}
    return CapacityConfig.defaults() | {"model": model}


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    register()
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        yield


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that `kvlab run <overrides>` would run; for notebooks and tests. Raises ConfigError."""
    return Config.build(_composed(overrides))


def compose_capacity(overrides: Sequence[str] = ()) -> CapacityConfig:
    """The config that `kvlab capacity <overrides>` would answer. Raises ConfigError."""
    return CapacityConfig.build(_composed(_named_chips(overrides), "capacity"))


def expand_capacity(overrides: Sequence[str]) -> list[CapacityConfig]:
    """Every config of `kvlab capacity -m <overrides>`: comma lists are swept. Raises ConfigError."""
    with _hydra():
        try:
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(_named_chips(overrides)), None)
        except HydraException as error:
            raise ConfigError("overrides", list(overrides), " ".join(str(error).split())) from None
    return [compose_capacity(job) for job in jobs]


def _named_chips(overrides: Sequence[str]) -> list[str]:
    """hardware=h100x2 as hardware.name=h100x2: every number of chips is legal, not only those with a file."""
    counted = re.compile(r"\+?hardware=(?=.*\w+x\d)")
    return [counted.sub("hardware.name=", one) if counted.match(one) else one for one in overrides]


def _composed(overrides: Sequence[str], primary: str = "config") -> dict[str, Any]:
    with _hydra():
        try:
            composed = hydra_compose(primary, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(list(overrides), error, primary) from None
        plain: Any = OmegaConf.to_container(composed, resolve=True)
    return plain


def expand(overrides: Sequence[str], multirun: bool) -> tuple[list[Config], list[str]]:
    """Every config of an invocation, and the overrides to hand to Hydra.

    An experiment may bring its own sweep; a value given on the command line replaces the sweep's axis of that name. All
    configs are checked here, before any is run. Raises ConfigError.
    """
    overrides = _named_chips(overrides)
    groups = {path.name for path in configs_dir().iterdir() if path.is_dir()}
    # Hydra's habit +group=choice is for groups without a default; ours all have one, so both spellings are accepted.
    overrides = [one[1:] if one.startswith("+") and one[1:].split("=")[0] in groups else one for one in overrides]
    with _hydra():
        try:
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            given = parser.parse_overrides(overrides)
            fixed = [str(one.input_line) for one in given if not one.is_sweep_override()]
            hydra_config = hydra_compose("config", overrides=fixed, return_hydra_config=True).hydra
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(overrides, error) from None
    sweeping = multirun or str(hydra_config.mode or "").endswith("MULTIRUN")
    if not sweeping:
        if swept := [str(one.input_line) for one in given if one.is_sweep_override()]:
            raise ConfigError(swept[0].split("=")[0], swept[0].split("=", 1)[1], "sweeps over values need -m")
        config = compose(overrides)
        _ = config.run_dir
        return [config], overrides
    axes = dict(hydra_config.sweeper.params or {})
    replaced = [name for name in axes if name in {one.key_or_group for one in given}]
    kept = [f"{name}={value}" for name, value in axes.items() if name not in replaced]
    with _hydra():
        try:
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([*kept, *overrides]), None)
        except HydraException as error:
            raise ConfigError("overrides", overrides, " ".join(str(error).split())) from None
    plain = [[one for one in job if not one.startswith(("hydra.", "hydra/"))] for job in jobs]
    composed = [_composed(job) for job in plain]
    configs = [Config.build(one) for one in composed]
    for config in configs:
        _ = config.run_dir  # reads the task's data: a missing or short corpus is answered here
    handed = [*overrides, *(f"~hydra.sweeper.params.{name}" for name in replaced)]
    if all(one["model"]["dtype"] == "auto" for one in composed):  # another machine might choose another: another run
        handed.append(f"model.dtype={ModelConfig(dtype='auto').dtype}")
    return configs, handed


def _explained(overrides: list[str], error: Exception, primary: str = "config") -> Exception:
    """The composition error as a ConfigError that names the nearest legal group, choice or field; itself when unknown."""
    try:
        given = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return ConfigError("overrides", overrides, str(error).splitlines()[0])
    groups = {path.name for path in configs_dir().iterdir() if path.is_dir()}
    choices: list[str] = []
    for one in given:
        if one.key_or_group in groups:
            options = [path.stem for path in (configs_dir() / one.key_or_group).glob("*.yaml")]
            for value in _values(one):
                if value not in options:
                    return ConfigError(one.key_or_group, value, nearest(str(value), options))
            choices.append(f"{one.key_or_group}={_values(one)[0]}")
    for one in given:
        if one.key_or_group in groups or one.key_or_group.startswith("hydra"):
            continue
        node: Any = OmegaConf.to_container(hydra_compose(primary, overrides=choices), resolve=True)
        place: list[str] = []
        for part in one.key_or_group.split("."):
            if not isinstance(node, dict) or part not in node:
                legal = [*node, *(groups if not place else ())] if isinstance(node, dict) else []
                return ConfigError(".".join([*place, part]), one.value(), f"no such field; {nearest(part, legal)}")
            node = node[part]
            place.append(part)
    if "launcher" in str(error) and not any("joblib" in plugin.__name__.lower() for plugin in _launchers()):
        return ConfigError("launcher", None, "this launcher needs the extra: pip install 'kvlab[slurm]'")
    return ConfigError("config", overrides, " ".join(str(error).split()))


def _values(override: Override) -> list[Any]:
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def _launchers() -> list[type]:
    from hydra.plugins.launcher import Launcher

    return list(Plugins.instance().discover(Launcher))
