"""Hydra, and nothing else: composing configurations, expanding sweeps, and answering typos with the nearest legal
names."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvlab import blueprint
from kvlab.capacity.config import CapacityConfig
from kvlab.config import Config, GenerateConfig
from kvlab.files import shipped_folder
from kvlab.hardware import HardwareConfig
from kvlab.hydra_groups import files_twice, refuse_files_twice, register
from kvlab.methods import METHODS, fields_for_some, fitting, for_their_methods
from kvlab.models.config import ModelConfig, dtype_for
from kvlab.outside import config_folders
from kvlab.schema import ConfigError, nearest
from kvlab.spelling import elsewhere
from kvlab.sweep_order import trainings_first
from kvlab.weights.section import DETERMINED, refuse_beside, without_determined


def configs_dir() -> Path:
    """The YAML groups."""
    return shipped_folder("configs")


@dataclass(frozen=True)
class Root:
    """A file that a command composes from, and the folder in which its groups are; `commands` are those that read
    it."""

    file: str
    folder: str
    commands: str
    more_short: tuple[str, ...] = ()
    """Fields of the memory that have a group elsewhere: they are chosen by their name alone here, too."""

    sections: tuple[tuple[str, str], ...] = ()  # of which a word is one field

    @property
    def short(self) -> dict[str, str]:
        """Short names of fields, and what they stand for."""
        return SHORT | {name: f"memory.{name}" for name in self.more_short} | dict(self.sections)

    @property
    def path(self) -> Path:
        """The folder, whose sub-folders are groups."""
        return configs_dir() / self.folder

    @property
    def groups(self) -> list[str]:
        """Names of the groups: what the file's defaults list chooses from."""
        listed = yaml.safe_load((self.path / f"{self.file}.yaml").read_text())["defaults"]
        return [
            name.removeprefix("optional ")
            for entry in listed
            if isinstance(entry, dict)
            for name in entry
            if not name.startswith("override")
        ]

    @property
    def folders(self) -> list[Path]:
        """Where groups have their files: here, and in packages outside."""
        return [self.path, *(folder / self.folder for _, folder in config_folders())]

    def options(self, group: str) -> list[str]:
        """Names of a group's choices."""
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def file_of(self, group: str, choice: str) -> Path:
        """The file of a choice; kvlab's own where there is none."""
        paths = [folder / group / f"{choice}.yaml" for folder in self.folders]
        return next((path for path in paths if path.is_file()), paths[0])


SHORT = {"budget": "memory.budget", "format": "memory.format"}
"""Fields with a name of their own on the command line, beside the groups."""


def spelled_out(words: Sequence[str], root: Root) -> list[str]:
    """Overrides in which short names of fields are whole: budget=0.25 is memory.budget=0.25. Raises ConfigError for a
    number that Python would not read."""
    names = root.short
    heads = [word.split("=", 1)[0] for word in words]
    for head, word in zip(heads, words, strict=True):
        if re.search(r"\d{4000}", word):
            raise ConfigError(head, word[len(head) + 1 :], "must be a number of less than 4,000 digits")
    return [
        names[head] + word[len(head) :] if f"{head}=" in word and head in names and f"{head}={{" not in word else word
        for head, word in zip(heads, words, strict=True)
    ]


RUN = Root("config", ".", "kvlab run and kvlab plan", sections=(("weights", "weights.path"),))
CAPACITY = Root("capacity", "capacity", "kvlab capacity", ("compression", "selection"))
GENERATE = Root("generate", ".", "kvlab generate")
EVALUATE = Root("eval", ".", "kvlab eval")
ROOTS = (RUN, CAPACITY, GENERATE)


@contextlib.contextmanager
def _hydra(root: Root) -> Iterator[None]:
    register()
    with initialize_config_dir(str(root.path.resolve()), version_base="1.3"):
        yield


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that `kvlab run <overrides>` would run; for notebooks and tests. Raises ConfigError."""
    return blueprint.resolved(Config.build(composed_of(overrides, RUN)))


def compose_generate(overrides: Sequence[str] = ()) -> GenerateConfig:
    """The config that `kvlab generate FOLDER <overrides>` would answer with. Raises ConfigError."""
    return GenerateConfig.build(composed_of(overrides, GENERATE))


def compose_capacity(overrides: Sequence[str] = ()) -> CapacityConfig:
    """The config that `kvlab capacity <overrides>` would answer. Raises ConfigError."""
    return CapacityConfig.build(composed_of(overrides, CAPACITY))


def expand_capacity(overrides: Sequence[str]) -> list[CapacityConfig]:
    """Every config of `kvlab capacity -m <overrides>`: comma lists are swept. Raises ConfigError."""
    jobs = [spelled_out(job, CAPACITY) for job in jobs_of(overrides, CAPACITY)]
    return [compose_capacity(job) for job in for_their_methods(jobs, CAPACITY.more_short)]


def composed_of(overrides: Sequence[str], root: Root) -> dict[str, Any]:
    """The values that a command composes, as plain data. Raises ConfigError."""
    overrides = _with_fields(spelled_out(overrides, root), root)
    check_choices(overrides, root)
    with _hydra(root):
        try:
            if twice := files_twice(root.path, root.folder):
                refuse_files_twice(_chosen(overrides, root), twice)
            plain: Any = OmegaConf.to_container(hydra_compose(root.file, overrides=list(overrides)), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(list(overrides), error, root) from None
        modelled = without_determined(plain) if root is RUN else plain
        if modelled.keys() != plain.keys():
            _refuse_beside_weights(overrides, plain)
    return modelled


def _refuse_beside_weights(overrides: Sequence[str], composed: dict[str, Any]) -> None:
    """Raises ConfigError where words, or an experiment, say something of the model that published weights determine:
    where a section is not what the task alone brings."""
    given = [word for word in overrides if word.lstrip("+~").split("=")[0].split(".")[0] in DETERMINED]
    task = _chosen(overrides, RUN)["task"]
    plain: Any = OmegaConf.to_container(hydra_compose(RUN.file, overrides=[f"task={task}"]), resolve=True)
    refuse_beside(given, composed, plain)


def _chosen(overrides: Sequence[str], root: Root) -> dict[str, Any]:
    """The choice of every group that is composed."""
    return dict(hydra_compose(root.file, overrides=list(overrides), return_hydra_config=True).hydra.runtime.choices)


def _with_fields(overrides: Sequence[str], root: Root) -> list[str]:
    """The fields of a method beside its name, where that stands for a whole section: `memory.compression=snapkv
    memory.compression.every=16` is `memory.compression={type:snapkv,every:16}`."""
    words = list(overrides)
    for name in root.more_short:
        section = f"memory.{name}"
        fields = [word for word in words if word.startswith(f"{section}.") and "=" in word]
        chosen = [word for word in words if word.startswith(f"{section}=")]
        method = chosen[-1].partition("=")[2] if chosen else ""
        if fields and method.isidentifier():
            given = [word.removeprefix(f"{section}.").replace("=", ":", 1) for word in fields]
            words = [word for word in words if word not in (*fields, *chosen)]
            words.append(f"{section}={{{','.join([f'type:{method}', *given])}}}")
    return words


def jobs_of(overrides: Sequence[str], root: Root) -> list[list[str]]:
    """The overrides of every job of a sweep. Raises ConfigError for what cannot be swept."""
    overrides = spelled_out(overrides, root)
    with _hydra(root):
        try:
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(list(overrides)), None)
        except HydraException as error:
            raise ConfigError("overrides", list(overrides), " ".join(str(error).split())) from None
    return [[word for word in job if not word.startswith(("hydra.", "hydra/"))] for job in jobs]


def expand(overrides: Sequence[str], multirun: bool, *, planned: bool = False) -> tuple[list[Config], list[str]]:
    """Every config of an invocation, and the overrides to hand to Hydra.

    An experiment may bring its own sweep; a value given on the command line replaces the sweep's axis of that name. All
    configs are checked here, before any is run: data that are missing, and states that a memory cannot hold. What is
    `planned` has the type that "auto" is on the hardware that it names. Raises ConfigError.
    """
    # Hydra's habit +group=choice is for groups without a default; ours all have one, so both spellings are accepted.
    groups = [*RUN.groups, "hardware"]
    overrides = [word[1:] if word.startswith("+") and word[1:].split("=")[0] in groups else word for word in overrides]
    overrides = spelled_out(overrides, RUN)
    check_choices(overrides)
    given, axes = _sweep(overrides)
    if axes is None and not multirun:
        refuse_sweeps(given)
        return _checked([composed_of(overrides, RUN)], planned), overrides
    replaced = [name for name in axes or {} if name in {override.key_or_group for override in given}]
    kept = [f"{name}={value}" for name, value in (axes or {}).items() if name not in replaced]
    for_some = fields_for_some([*kept, *overrides], swept_methods([*kept, *overrides]))
    overrides = [for_some.get(word, word) for word in overrides]
    words = [*kept, *overrides]
    jobs = jobs_of(words, RUN)
    composed = [fitting(composed_of(job, RUN), [word.split("=")[0].lstrip("+") for word in for_some]) for job in jobs]
    configs = _checked(composed, planned)
    ordered = trainings_first(words, jobs, [config.training_id for config in configs], RUN.groups)
    if ordered == words or any("." in name for name in axes or {}):
        handed = [*overrides, *(f"~hydra.sweeper.params.{name}" for name in replaced)]
    else:  # the axes of the experiment stand among the words
        handed = [*ordered, *(f"~hydra.sweeper.params.{name}" for name in axes or {})]
    # Another machine might choose another type: another run.
    if all(values["model"]["dtype"] == "auto" for values in composed if "model" in values):
        handed.append(f"model.dtype={ModelConfig(dtype='auto').dtype}")
    return configs, handed


def refuse_sweeps(given: Sequence[Override]) -> None:
    """Raises ConfigError for a sweep without -m."""
    if swept := [str(override.input_line) for override in given if override.is_sweep_override()]:
        raise ConfigError(swept[0].split("=")[0], swept[0].split("=", 1)[1], "sweeps over values need -m")


def swept_methods(words: Sequence[str]) -> dict[str, list[str]]:
    """The choices of every group of methods that a sweep goes over."""
    swept: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(list(words)):
        if override.key_or_group in METHODS and override.is_sweep_override():
            is_glob = override.value_type is ValueType.GLOB_CHOICE_SWEEP
            group = override.key_or_group
            swept[group] = RUN.options(group) if is_glob else [str(value) for value in _values(override)]
    return swept


def _checked(composed: Sequence[dict[str, Any]], planned: bool) -> list[Config]:
    """The configs of composed values, with whatever could be found wrong before a run begins."""
    configs = [blueprint.resolved(Config.build(_for_hardware(values) if planned else values)) for values in composed]
    for config in configs:
        _ = config.run_dir  # reads the task's data: a missing or short corpus is answered here
    blueprint.check(configs)
    return configs


def _for_hardware(values: dict[str, Any]) -> dict[str, Any]:
    """Composed values in which "auto" is the type of the hardware that they name, not this machine's."""
    device = HardwareConfig.build(values.get("hardware", {}), "hardware").device
    if device is None or "model" not in values or values["model"]["dtype"] != "auto":
        return values
    return {**values, "model": {**values["model"], "dtype": dtype_for(device.platform)}}


def _sweep(overrides: list[str]) -> tuple[list[Override], dict[str, Any] | None]:
    """The overrides parsed, and the axes of the sweep that the chosen experiment brings; None where it brings none."""
    with _hydra(RUN):
        try:
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            given = parser.parse_overrides(overrides)
            # Of a swept group the first choice stands in: fields of what it chooses may be given beside it.
            fixed = [
                f"{override.key_or_group}={_values(override)[0]}"
                if override.is_sweep_override()
                else str(override.input_line)
                for override in given
                if (override.key_or_group in RUN.groups or not override.is_sweep_override())
                and not override.key_or_group.startswith(tuple(f"memory.{group}." for group in METHODS))
            ]
            hydra_config = hydra_compose(RUN.file, overrides=fixed, return_hydra_config=True).hydra
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: hydra=null
            raise _explained(overrides, error, RUN) from None
    axes = dict(hydra_config.sweeper.params or {})
    return given, axes if axes or str(hydra_config.mode or "").endswith("MULTIRUN") else None


def _explained(overrides: list[str], error: Exception, root: Root) -> Exception:
    """The composition error as a ConfigError that names the nearest legal group, choice or field; itself when
    unknown."""
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            return ConfigError(word, None, "must be field=value, or group=choice")
    try:
        given = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return ConfigError("overrides", overrides, str(error).splitlines()[0])
    if wrong := _unknown_choice(overrides, root):
        return wrong
    chosen = [override for override in given if override.key_or_group in root.groups]
    choices = [f"{override.key_or_group}={_values(override)[0]}" for override in chosen]
    for override in given:
        if override not in chosen and not override.key_or_group.startswith("hydra"):
            node: Any = OmegaConf.to_container(hydra_compose(root.file, overrides=choices), resolve=True)
            if wrong := _no_such_field(override, node, root):
                return wrong
    if "launcher" in str(error) and not any("joblib" in plugin.__name__.lower() for plugin in _launchers()):
        return ConfigError("launcher", None, "this launcher needs the extra: pip install 'kvlab[slurm]'")
    return ConfigError("config", overrides, " ".join(str(error).split()))


def check_choices(overrides: Sequence[str], root: Root = RUN) -> None:
    """Raises ConfigError for a choice of a group that has no file: Hydra passes over it where the group is
    optional."""
    if wrong := _unknown_choice(overrides, root):
        raise wrong


def _unknown_choice(overrides: Sequence[str], root: Root) -> ConfigError | None:
    """The first choice of a group that has no file; None for what cannot be read, which composing explains."""
    try:
        given = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return None
    for override in given:
        is_glob = override.value_type is ValueType.GLOB_CHOICE_SWEEP  # matches what there is
        for value in _values(override) if override.key_or_group in root.groups and not is_glob else ():
            if value not in root.options(override.key_or_group):
                return _no_such_choice(override.key_or_group, value, root)
    return None


def _no_such_choice(group: str, value: Any, root: Root) -> ConfigError:
    """Unknown here, though perhaps another command's."""
    legal = nearest(str(value), root.options(group))
    for package, folder in config_folders():
        if not folder.is_dir():
            legal += f"; {package} has none: its folder {folder} is not there"
    for other in ROOTS:
        if value in other.options(group):
            return ConfigError(group, value, f"is for {other.commands} only; {legal}")
    return ConfigError(group, value, legal)


def _no_such_field(override: Override, node: Any, root: Root) -> ConfigError | None:
    """The first part of an override's name that the composed config lacks."""
    place, whole = list[str](), node
    for part in override.key_or_group.split("."):
        if not isinstance(node, dict) or part not in node:
            if not isinstance(node, dict):
                return ConfigError(override.key_or_group, override.value(), _why_no_section(place, node, root))
            legal = [*node, *(root.groups if not place else ())]
            said = nearest(part, legal)
            if not said.startswith("did") and (meant := elsewhere(override.key_or_group, whole)):
                said = f"did you mean {' or '.join(meant[:3])}? {said}"
            return ConfigError(".".join([*place, part]), override.value(), f"no such field; {said}")
        node = node[part]
        place.append(part)
    return None


def _why_no_section(place: Sequence[str], value: Any, root: Root) -> str:
    """Why there is no field below a place of a config, and what to do where a choice is missing."""
    where, group = ".".join(place), place[-1]
    if value is None and group in root.groups:
        return f"no such field: {where} is null; choose one with {group}=..., of {', '.join(root.options(group))}"
    return f"no such field: {where} is {'null' if value is None else 'a value'}, not a section"


def _values(override: Override) -> list[Any]:
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def _launchers() -> list[type]:
    from hydra.plugins.launcher import Launcher

    return list(Plugins.instance().discover(Launcher))
