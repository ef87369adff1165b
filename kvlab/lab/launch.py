"""Runs started from the command line: one in this process, or a sweep through Hydra's launchers."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import jax
from omegaconf import OmegaConf

from kvlab import blueprint
from kvlab.compose import RUN, Root, register
from kvlab.config import Config
from kvlab.files import cache_folder
from kvlab.interrupt import stop_sweep, sweep_stops_together
from kvlab.lab.execute import execute
from kvlab.lab.labels import run_labels
from kvlab.lab.runs import Run, RunLocked
from kvlab.lab.tables import sweep_summary
from kvlab.methods import fitting

_BEGUN: set[Path] = set()
"""Runs that jobs of a sweep in this process have begun."""
_SWEEP: list[Config] = []
"""Runs of a sweep whose jobs come one after the other in this process."""
_LABELS: dict[Path, str] = {}
"""How the runs of sweeps in this process are called among each other; elsewhere they have their own label."""


def run_sweep(configs: list[Config], handed: list[str]) -> None:
    """All of them, by Hydra's launcher. The runs' states tell what happened."""
    print(sweep_summary(configs), file=sys.stderr)
    _BEGUN.clear()
    labels = run_labels([config.as_dict() for config in configs])
    _LABELS.update(zip((config.run_dir for config in configs), labels, strict=True))
    stop_file = Path(configs[0].results_dir) / f".stop-{os.getpid()}"
    with sweep_stops_together(stop_file), contextlib.suppress(SystemExit):
        try:
            _SWEEP.extend(configs)
            through_hydra(["--multirun", *handed])
        finally:
            _SWEEP.clear()


def execute_one(config: Config) -> str:
    """Executes a run here and says in one line how it ended; returns its status, "locked" when another process has
    it."""
    use_compilation_cache()
    try:
        status = execute(config, [other for other in _SWEEP if other.run_dir not in _BEGUN])
    except RunLocked as error:
        print(f"kvlab: {error}", file=sys.stderr)
        return "locked"
    reason = ""
    if status == "failed":
        reason = f": {getattr(Run(config).record, 'reason', None)}"
    label = _LABELS.get(config.run_dir, config.label)
    print(f"{label} [{config.run_id}] {status}{reason}, in {config.run_dir}", file=sys.stderr, flush=True)
    return status


def through_hydra(arguments: Sequence[str], root: Root = RUN) -> None:
    """Hands over to Hydra: sweeps, launchers, --cfg. Each job comes back to `_job`, here or in another process."""
    register()
    sys.argv = ["kvlab", *arguments]
    hydra.main(version_base="1.3", config_path=str(root.path), config_name=root.file)(_job)()


def _job(composed: Any) -> None:
    values: Any = OmegaConf.to_container(composed, resolve=True)
    config = blueprint.resolved(Config.build(fitting(values)))
    if config.run_dir in _BEGUN:  # another job of this sweep that came out equal, whatever became of it
        return
    _BEGUN.add(config.run_dir)
    if execute_one(config) == "interrupted":
        stop_sweep()


def use_compilation_cache() -> None:
    """JAX's persistent compilation cache, under the user's cache folder unless JAX_COMPILATION_CACHE_DIR says
    otherwise."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
