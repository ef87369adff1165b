"""Runs started from the command line: one in this process, or a sweep through Hydra's launchers."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvlab import blueprint
from kvlab.compose import RUN, Root, register
from kvlab.config import Config
from kvlab.files import cache_folder, home_expanded
from kvlab.interrupt import StopRequest, hand_over, stop_sweep, sweep_stops_together
from kvlab.lab.cards import led, take_share
from kvlab.lab.execute import execute
from kvlab.lab.labels import run_labels
from kvlab.lab.runs import Run, RunLocked
from kvlab.lab.tables import sweep_summary
from kvlab.methods import fitting
from kvlab.schema import ConfigError
from kvlab.units import counted
from kvlab.weights.section import without_determined

POLL_S = 0.5
"""Seconds between two looks at a run that another process works on."""
_BEGUN: set[Path] = set()
"""Runs that jobs of a sweep in this process have begun."""
_SWEEP: list[Config] = []
"""Runs of a sweep whose jobs come one after the other in this process."""
_ENDED: list[str] = []
"""How the jobs of an invocation in this process ended."""
_LABELS: dict[Path, str] = {}
"""How the runs of sweeps in this process are called among each other; elsewhere they have their own label."""


def run_sweep(configs: list[Config], handed: list[str]) -> list[str]:
    """All of them, by Hydra's launcher. Returns how each stands: done, failed, locked by another process, or, where
    somebody asked to stop, interrupted.

    Where a launcher on this machine gives up, as joblib's does when one worker is killed, what it left goes on in this
    process, one run after the other. At the end the sweep waits for runs that other processes work on.
    """
    print(sweep_summary(configs), file=sys.stderr)
    _BEGUN.clear()
    labels = run_labels([config.as_dict() for config in configs])
    _LABELS.update(zip((config.run_dir for config in configs), labels, strict=True))
    with led(len(configs)), sweep_stops_together(home_expanded(configs[0].results_dir)) as stop:
        _SWEEP.extend(configs)
        try:
            through_hydra(["--multirun", *handed])
        except (SystemExit, Exception) as error:  # whatever a launcher raises, or Hydra has printed and made an exit of
            _go_on(configs, error, stop, is_here=not any("slurm" in word or "submitit" in word for word in handed))
        finally:
            _SWEEP.clear()
        for config in configs:
            _wait_for_another(config, stop)
        return [_status(Run(config), stop) for config in configs]


def _status(run: Run, stop: StopRequest) -> str:
    """How a run of a sweep stands after it. One that nobody asked to stop and that is not done has failed."""
    state = run.state
    if state == "done":
        return state
    if run.held_elsewhere:
        return "locked"
    return "interrupted" if stop.reason and state in ("new", "cut") else "failed"


def _go_on(configs: list[Config], error: BaseException, stop: StopRequest, *, is_here: bool) -> None:
    """Executes here what a launcher on this machine has left: what was not begun first, then what was cut."""
    states = {config.run_dir: Run(config).state for config in configs if not Run(config).held_elsewhere}
    left = [config for state in ("new", "cut") for config in configs if states.get(config.run_dir) == state]
    if stop.reason or not left:
        return
    gave_up = f"kvlab: the launcher gave up: {first_line(error)}"
    if not is_here:
        print(f"{gave_up}; the same command tries again", file=sys.stderr)
        return
    print(f"{gave_up}; {counted(len(left), 'run')} that it left: here, one after the other", file=sys.stderr)
    for config in left:
        if stop.reason:
            break
        if execute_one(config) == "interrupted":
            stop_sweep()


def _wait_for_another(config: Config, stop: StopRequest) -> None:
    """Where another process, such as an equal sweep, works on a run: waits for it, and goes on with what it leaves."""
    run = Run(config)
    if not run.held_elsewhere:
        return
    label = _LABELS.get(config.run_dir, config.label)
    print(f"{label} [{config.run_id}] is another process' work, in {config.run_dir}: waits for it", file=sys.stderr)
    while not stop.reason:
        if run.held_elsewhere:
            time.sleep(POLL_S)
        elif run.state in ("done", "failed") or (ended := execute_one(config)) not in ("locked", "interrupted"):
            return
        elif ended == "interrupted":
            stop_sweep()


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def evaluate_here(configs: Sequence[Config]) -> list[str]:
    """Scores parameters that are there, run by run, in this process; nothing is trained. Returns how each stands, as
    far as nobody asked to stop."""
    labels = run_labels([config.as_dict() for config in configs])
    _LABELS.update(zip((config.run_dir for config in configs), labels, strict=True))
    statuses = list[str]()
    for config in configs:
        statuses.append(execute_one(config, trains=False))
        if statuses[-1] == "interrupted":
            break
    return statuses


def execute_one(config: Config, *, trains: bool = True) -> str:
    """Executes a run here and says in one line how it ended; returns its status, "locked" when another process has
    it. One that never `trains` has its parameters already, or fails."""
    use_compilation_cache()
    try:
        status = execute(config, [other for other in _SWEEP if other.run_dir not in _BEGUN], trains=trains)
    except RunLocked as error:
        print(f"kvlab: {error}", file=sys.stderr)
        return "locked"
    except Exception as error:  # such as a full disk: there is no record, and the others are tried all the same
        Run(config).give_up(first_line(error))
        status, reason = "failed", f": {first_line(error)}; there is no room for its record, or no right to write it"
        reason = reason if isinstance(error, OSError) else f": {first_line(error)}"
    else:
        reason = f": {getattr(Run(config).record, 'reason', None)}" if status == "failed" else ""
    label = _LABELS.get(config.run_dir, config.label)
    print(f"{label} [{config.run_id}] {status}{reason}, in {config.run_dir}", file=sys.stderr, flush=True)
    return status


def exit_status(statuses: Sequence[str]) -> int:
    """What a command ends with: 0 where all runs are done, 130 where somebody interrupted, 1 otherwise."""
    if "interrupted" in statuses:
        return 130
    return 0 if all(status in ("done", "skipped") for status in statuses) else 1


def by_hydra_alone(arguments: Sequence[str]) -> int:
    """`through_hydra` for whoever gives Hydra's own flags: the exit status, by the runs of this process. Those that a
    launcher has elsewhere say theirs in their records."""
    _ENDED.clear()
    through_hydra(arguments)
    return exit_status(_ENDED)


def through_hydra(arguments: Sequence[str], root: Root = RUN) -> None:
    """Hands over to Hydra: sweeps, launchers, --cfg. Each job comes back to `_job`, here or in another process. What it
    or a launcher raises comes out, where Hydra alone would print it and end the process; of what cannot be composed it
    is a ConfigError."""
    register()
    sys.argv = ["kvlab", *arguments]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(version_base="1.3", config_path=str(root.path), config_name=root.file)(_job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("config", list(arguments), " ".join(str(error).split())) from None


def _job(composed: Any) -> None:
    launcher = HydraConfig.get().launcher
    if "n_jobs" in launcher and (share := take_share(launcher.n_jobs)) is not None:
        of_memory = "" if share.fraction is None else f", {share.fraction:g} of its memory"
        print(f"kvlab: worker {os.getpid()} has card {share.card}{of_memory}", file=sys.stderr, flush=True)
    values: Any = OmegaConf.to_container(composed, resolve=True)
    config = blueprint.resolved(Config.build(without_determined(fitting(values))))
    if config.run_dir in _BEGUN:  # another job of this sweep that came out equal, whatever became of it
        return
    _BEGUN.add(config.run_dir)
    _ENDED.append(execute_one(config))
    if _ENDED[-1] == "interrupted" and not hand_over():  # a job that submitit requeues stops no other
        stop_sweep()


def use_compilation_cache() -> None:
    """JAX's persistent compilation cache, under the user's cache folder unless JAX_COMPILATION_CACHE_DIR says
    otherwise. Programs of any size: a run has some thirty small ones, most of them those of the run before."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
