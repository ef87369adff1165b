"""Packages outside kvlab, installed as pip would install them, but into a folder of a test: what makes them known is a
`.dist-info` beside the modules."""

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

EXAMPLE = Path(__file__).parent / "plugin_package"


def install_example(folder: Path) -> Path:
    """The package of tests/plugin_package, by its own pyproject.toml; returns the folder to put on the path."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copytree(EXAMPLE / "kvlab_example", folder / "kvlab_example", ignore=shutil.ignore_patterns("__pycache__"))
    return declare(folder, project["name"], project["entry-points"], project["version"])


def declare(folder: Path, name: str, entries: Mapping[str, Mapping[str, str]], version: str = "1.0") -> Path:
    """A package of that name with these entry points, by group; returns the folder."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in of.items()) for group, of in entries.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    return folder
