"""Packages outside kvlab that bring names of their own, by their entry points. Standard library alone, and nothing of
theirs is imported: completion by tab reads it."""

import importlib.metadata
import importlib.util
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint
from pathlib import Path

CONFIGS = "kvlab.configs"
"""The group of entry points that name a folder of configurations: `average = "my_package.configs"`."""


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Those of a group, such as "kvlab.mixers", of all packages that are installed; by package and name."""
    return tuple(entry for entry in _ours(tuple(sys.path)) if entry.group == group)


def package_of(entry: EntryPoint) -> str:
    """Name and version of the package that an entry point is of."""
    return "a package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def config_folders() -> list[tuple[str, Path]]:
    """The folders of configurations of packages outside, each with its package. One that is not there is there, too:
    nothing is found in it."""
    return [(package_of(entry), _folder(entry)) for entry in entry_points(CONFIGS)]


def source_files() -> list[Path]:
    """Whatever of these packages may change what a configuration has: their modules and their YAML files."""
    tops = {entry.value.partition(":")[0].partition(".")[0] for entry in _ours(tuple(sys.path))}
    folders = [folder for top in sorted(tops) for folder in _places(top)]
    found = [path for folder in folders for kind in ("*.py", "*.yaml") for path in folder.rglob(kind)]
    return [path for path in found if path.is_file()]


@lru_cache(maxsize=8)
def _ours(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Every entry point of a group that is kvlab's, as modules are found now."""
    found = [entry for entry in importlib.metadata.entry_points() if entry.group.startswith("kvlab.")]
    return tuple(sorted(found, key=lambda entry: (package_of(entry), entry.group, entry.name)))


def _folder(entry: EntryPoint) -> Path:
    """The folder that "package.folder" names. Of the package only the place is looked up."""
    top, *below = entry.value.replace(":", ".").split(".")
    places = [place.joinpath(*below) for place in _places(top)]
    return next((place for place in places if place.is_dir()), Path(top, *below))


def _places(top: str) -> list[Path]:
    """Where a package lies; nowhere if there is none, or if it is a single file."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a name that is none, or a module that says nothing of itself
        return []
    return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
