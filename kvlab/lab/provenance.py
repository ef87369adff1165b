"""Where a number comes from: code, versions, device and flags."""

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from kvlab.compression import COMPRESSIONS
from kvlab.config import Config
from kvlab.lab.cards import FRACTION, VISIBLE
from kvlab.lab.record import Provenance
from kvlab.mixers import MIXERS
from kvlab.registry import Registry
from kvlab.schema import ConfigError
from kvlab.selection import SELECTIONS
from kvlab.tasks import TASKS
from kvlab.tasks.metrics import METRICS
from kvlab.weights.families import FAMILIES

PACKAGES = ("kvlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "hydra-core")


def provenance(config: Config) -> Provenance:
    """Everything but the config itself and the implementations that a run takes, as of now."""
    commit, dirty = _git()
    device = jax.devices()[0]
    return Provenance(
        git_commit=commit,
        git_dirty=dirty,
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        device={
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "host": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            **(_cards() if device.platform == "gpu" else {}),
        },
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        outside=outside(config),
    )


def _cards() -> dict[str, str]:
    """Which cards the process sees, and the fraction of their memory that JAX may take, where the environment says."""
    named = {"cards": VISIBLE, "memory_fraction": FRACTION}
    return {name: os.environ[variable] for name, variable in named.items() if variable in os.environ}


def outside(config: Config) -> dict[str, str]:
    """What a run takes of packages outside, by the group and name of its entry point: their names and versions."""
    used: list[tuple[Registry[Any], str]] = [(MIXERS, layer.mixer) for layer in config.layers()]
    used += [(TASKS, config.task_name), (METRICS, config.make_task().metric.name)]
    if config.trained_on is not None:
        used.append((TASKS, config.trained_on.task_name))
    if config.memory.compression is not None:
        used.append((COMPRESSIONS, config.memory.compression.name))
    if config.memory.selection is not None:
        used.append((SELECTIONS, config.memory.selection.name))
    if config.weights.path is not None:
        with suppress(ConfigError):  # a folder that is gone by now is the run's to tell
            used.append((FAMILIES, config.weights.architecture().family))
    found = {f"{registry.group}: {name}": registry.package(name) for registry, name in used}
    return {name: package for name, package in found.items() if package is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that the code runs from; (None, None) for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
