"""What the pieces of `on_gpu.py` say, and the floors beside it."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvlab.lab.kernels import summary


def say(**known: Any) -> None:
    """All that is known until now, as this piece's answer."""
    print(json.dumps(known), flush=True)


def spread(samples: list[float], scale: float = 1.0) -> dict[str, Any]:
    """Median, tenth and ninetieth percentile, and the number of samples."""
    low, middle, high = np.percentile(np.asarray(samples) * scale, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high), "samples": len(samples)}


def about(**more: Any) -> dict[str, Any]:
    """What every answer begins with."""
    return {"device": jax.devices()[0].device_kind, "versions": {"jax": jax.__version__}, "by": "kvlab", **more}


def kernels(taken: Any) -> dict[str, Any]:
    """The implementations that ran, and why others did not."""
    found = summary(taken)
    passed_over = {op: choice.reason for op, choice in found.items() if choice.reason}
    return {"implementations": {op: choice.taken for op, choice in found.items()}, "passed_over": passed_over}


def limits_of(scratch: Path) -> dict[str, float]:
    """What the device can do, as piece "ceilings" found it; empty where it did not."""
    path = scratch / "ceilings.json"
    return json.loads(path.read_text()) if path.exists() else {}


def against_floor(read_bytes: float, scratch: Path, seconds: float) -> dict[str, float | None]:
    """Milliseconds to read so many bytes, and how much of the measured time that is."""
    bandwidth = limits_of(scratch).get("read_bytes_per_s")
    floor = read_bytes / bandwidth if bandwidth else None
    return {"floor_ms": floor and floor * 1e3, "of_floor": floor and floor / seconds}
