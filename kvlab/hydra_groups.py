"""What Hydra finds beside the files of kvlab: the folders of packages outside, and the defaults of every class that is
chosen by name."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.presets import Preset
from kvlab.choices import COMPOSING
from kvlab.compression import COMPRESSIONS
from kvlab.config import GenerateConfig, defaults
from kvlab.mixers import MIXERS
from kvlab.outside import config_folders
from kvlab.registry import Registry
from kvlab.schema import ConfigError
from kvlab.selection import SELECTIONS
from kvlab.tasks import TASKS

REGISTRIES: dict[str, Registry[Any]] = {
    "mixer": MIXERS,
    "task": TASKS,
    "compression": COMPRESSIONS,
    "selection": SELECTIONS,
}
"""By the group whose sub-group `type` has a registry's names."""


class Sections(ConfigSource):
    """The choices of `mixer/type` and its like: the defaults of a class, as plain values. YAML groups say what
    differs. What is chosen is imported, and nothing else."""

    @staticmethod
    def scheme() -> str:
        return "kvlab"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return _registry(config_path.rstrip("/")) is not None

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        return name in (_registry(group) or ())

    def load_config(self, config_path: str) -> ConfigResult:
        """Raises ConfigError for a class that cannot be had."""
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        try:
            kind = REGISTRIES[group.removesuffix("/type")][name]
        except ConfigError as error:
            raise error.under(group.removesuffix("/type")) from None
        values = {"type": name, **getattr(kind, "Config", kind).defaults()}
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(values), {"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        place = config_path.rstrip("/")
        if place in REGISTRIES:
            return [] if results_filter is ObjectType.CONFIG else ["type"]
        return [] if results_filter is ObjectType.GROUP else sorted(_registry(place) or ())


def _registry(group: str) -> Registry[Any] | None:
    """The registry whose names are the choices of a group; None: that is another group."""
    return REGISTRIES.get(group.removesuffix("/type")) if group.endswith("/type") else None


class SearchPath(SearchPathPlugin):
    """What is searched behind kvlab's own files: the folders of packages outside, beside its groups or beside those of
    a command that has a folder of them; then `Sections`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        main = next((element.path for element in search_path.get_path() if element.provider == "main"), None)
        below = next((name for name in COMPOSING.values() if name != "." and f"{main}".endswith(f"/{name}")), ".")
        for package, folder in config_folders():
            if (folder / below).is_dir():
                search_path.append(package, str((folder / below).resolve()))
        search_path.append("kvlab", f"{Sections.scheme()}://")


def register() -> None:
    """Tells Hydra of all this, and of the defaults of every section that is not chosen by name."""
    for plugin in (Sections, SearchPath):
        Plugins.instance().register(plugin)
    _store_defaults()


@functools.cache
def _store_defaults() -> None:
    """Once: it takes as long as reading all files of a config."""
    store = ConfigStore.instance()
    store.store(name="defaults", node=defaults())
    store.store(name="capacity_defaults", node=capacity_defaults())
    store.store(name="generate_defaults", node=GenerateConfig.defaults())


def capacity_defaults() -> dict[str, Any]:
    """The defaults of `kvlab capacity`; a model's name, size and layers come from its file alone."""
    of_its_own = ("name", "source", "num_params")
    model = {name: value for name, value in Preset.defaults().items() if name not in of_its_own}
    return CapacityConfig.defaults() | {"model": model}


def files_twice(own: Path, below: str) -> dict[tuple[str, str], list[str]]:
    """Choices that two have a file of, by group and name: whose they are. `own` is kvlab's folder, whose groups lie
    `below` in a package's."""
    owners: dict[tuple[str, str], list[str]] = {}
    folders = [(package, folder / below) for package, folder in config_folders()]
    for owner, folder in [("kvlab", own), *folders] if folders else []:
        for path in folder.rglob("*.yaml"):
            place = path.relative_to(folder)
            owners.setdefault((place.parent.as_posix(), place.stem), []).append(owner)
    return {choice: names for choice, names in owners.items() if len(names) > 1}


def refuse_files_twice(choices: Mapping[str, Any], twice: Mapping[tuple[str, str], list[str]]) -> None:
    """Raises ConfigError for a choice that two have a file of; `choices` are Hydra's, by group."""
    for place, name in choices.items():
        group = place.partition("@")[0]
        if owners := twice.get((group, str(name))):
            legal = f"is a file of {' and of '.join(owners)}; uninstall one of them, or rename its own"
            raise ConfigError(group, name, legal)
