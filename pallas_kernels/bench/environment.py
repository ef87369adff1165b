"""What every piece of work finds in its environment, and where compiled programs are kept."""

import os
import tempfile
from pathlib import Path


def default_cache() -> Path:
    """The folder of compiled programs: jax's own, where the environment names one; else in the user's cache, or a
    temporary one where that cannot be written. What a window compiled, the next need not."""
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(named)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "pallas_kernels" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="pallas_kernels_compiled_"))
    return folder


def child_env(cache: Path) -> dict[str, str]:
    """Variables of pieces that run side by side: one compilation cache for all programs, however small, and no process
    takes three quarters of a GPU's memory for itself."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
