"""The experiments' folder: one folder a figure. `main(output, results)` in its `figure.py` draws and checks it."""

import importlib.util
from types import ModuleType

from kvlab.files import shipped_folder

EXPERIMENTS_DIR = shipped_folder("experiments")


def names() -> list[str]:
    """Every experiment that can be reproduced."""
    return sorted(path.parent.name for path in EXPERIMENTS_DIR.glob("*/figure.py"))


def load_figure(name: str) -> ModuleType:
    """An experiment's module: `main(output, results) -> exit status`, and `RUNS` where sweeps of the configuration of
    its name come first: the words of each, beside what that configuration sweeps over."""
    return load_part(name, "figure")


def load_part(name: str, part: str) -> ModuleType:
    """A module of an experiment's folder: its figure, or a half of it."""
    spec = importlib.util.spec_from_file_location(f"experiments.{name}.{part}", EXPERIMENTS_DIR / name / f"{part}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
