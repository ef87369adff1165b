"""Where a number comes from: code, versions, device, flags and kernel implementations."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax

from kvlab.lab.cards import FRACTION, VISIBLE
from kvlab.lab.record import Provenance

PACKAGES = ("kvlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "hydra-core")


def provenance() -> Provenance:
    """Everything but the config and the implementations that a run takes, as of now."""
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
    )


def _cards() -> dict[str, str]:
    """Which cards the process sees, and the fraction of their memory that JAX may take, where the environment says."""
    named = {"cards": VISIBLE, "memory_fraction": FRACTION}
    return {name: os.environ[variable] for name, variable in named.items() if variable in os.environ}


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
