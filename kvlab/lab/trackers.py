"""Where a run is watched while it runs, `track=tensorboard`, `wandb` or `trackio`: one small class each.

The local files are the truth. A tracker is told their rows as they are written (`kvlab/lab/following.py`); whatever it
raises costs the rest of its rows, and no run.
"""

import importlib
import importlib.util
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvlab.config import Config
from kvlab.evaluation.measure import per_sequence
from kvlab.lab.labels import flatten
from kvlab.lab.record import Done

MODULES = {"tensorboard": ("tensorboardX", "track"), "wandb": ("wandb", "wandb"), "trackio": ("trackio", "trackio")}
"""The module that each tracker needs, and the extra that brings it."""
SUFFIX = ".kvlab"
"""How names of event files for TensorBoard end: what ends so is a copy, and may be written again."""


@dataclass(frozen=True)
class Watched:
    """What a tracker is told of a run before anything else. `name` has the run's id in it and `label` is how people
    call it; `folder` is that of the results. `is_resumed`: the tracker had rows of it before."""

    run_id: str
    name: str
    label: str
    project: str
    config: dict[str, Any]
    folder: Path
    is_resumed: bool


class Tracker(Protocol):
    """A run as a tracker has it."""

    def log(self, values: Mapping[str, float], step_name: str, step: int, number: int) -> None:
        """One row, of a step that has this name; `number` counts the rows of a run, over all of its trials."""
        ...

    def finish(self, summary: Mapping[str, float], step: int, *, is_done: bool) -> None:
        """The end of this process' part; a run that is done has a summary, which is of its last step."""
        ...


class TensorBoard:
    """Event files in results/<experiment>/tensorboard/<name>, where `kvlab track` puts those of finished runs."""

    def __init__(self, watched: Watched):
        self.writer = event_writer(watched.folder / "tensorboard" / watched.name)
        if not watched.is_resumed:
            self.writer.add_text("config", json.dumps(watched.config, indent=2))

    def log(self, values: Mapping[str, float], step_name: str, step: int, number: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, summary: Mapping[str, float], step: int, *, is_done: bool) -> None:
        for name, value in summary.items():
            self.writer.add_scalar(name, value, step)
        self.writer.close()


class Wandb:
    """A run of Weights & Biases with the run's own id. Its files are in results/<experiment>/wandb unless WANDB_DIR
    says otherwise; WANDB_MODE=offline keeps them there, for `wandb sync`. WANDB_PROJECT goes before the sweep's
    name."""

    def __init__(self, watched: Watched):
        wandb: Any = importlib.import_module("wandb")  # no dependency: pyright has no types of it
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or watched.project,
            id=watched.run_id,
            name=watched.label,
            config=watched.config,
            dir=os.environ.get("WANDB_DIR") or str(watched.folder),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self._axes = set[str]()

    def log(self, values: Mapping[str, float], step_name: str, step: int, number: int) -> None:
        for name in values.keys() - self._axes:
            self.run.define_metric(name, step_metric=step_name)
        self._axes |= values.keys()
        self.run.log({**values, step_name: step}, step=number, commit=True)

    def finish(self, summary: Mapping[str, float], step: int, *, is_done: bool) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if is_done else 1)


class Trackio:
    """A run of trackio, on this machine unless its own variables say otherwise. It has no summaries: the run's is its
    last row."""

    def __init__(self, watched: Watched):
        trackio: Any = importlib.import_module("trackio")
        self.run = trackio.init(
            project=watched.project,
            name=watched.name,
            config=watched.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,  # threads beside a run whose speed is measured
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step_name: str, step: int, number: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, summary: Mapping[str, float], step: int, *, is_done: bool) -> None:
        if summary:
            self.run.log(dict(summary), step=step)
        self.run.finish()


OPENERS: dict[str, Callable[[Watched], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def check_installed(configs: Iterable[Config]) -> None:
    """Raises ImportError, which names the extra, for a tracker that cannot be imported: before anything is run."""
    for track in dict.fromkeys(config.track for config in configs):
        if track in MODULES:
            module, extra = MODULES[track]
            if importlib.util.find_spec(module) is None:
                raise ImportError(f"track={track} needs the extra: pip install 'kvlab[{extra}]'")


def event_writer(folder: Path) -> Any:
    """Of TensorBoard's event files. Raises ImportError naming the extra when tensorboardX is missing, and OSError for a
    link in the place of the folder."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError("TensorBoard needs the extra: pip install 'kvlab[track]'") from None
    if folder.is_symlink():
        raise OSError(f"{folder}: is a link, which might lead out of {folder.parent}")
    own = f".{os.getpid()}-{secrets.token_hex(4)}"  # names have whole seconds: another file may be of the same one
    return SummaryWriter(str(folder), flush_secs=1, filename_suffix=f"{own}{SUFFIX}")


def name_of(config: Mapping[str, Any], run_id: str) -> str:
    """The name of a run among others, which is that of a folder too."""
    return re.sub(r"[^\w.\-]", "_", f"{config['mixer']['name']}-{run_id}")[:200]


def is_tuned(config: Mapping[str, Any]) -> bool:
    """Whether a run, by its configuration as plain data, has several trials."""
    tune = config.get("tune")
    rates = tune.get("learning_rate") if isinstance(tune, Mapping) else None
    return isinstance(rates, list | tuple) and len(rates) > 1


def values_of(row: Mapping[str, Any], *, tuned: bool) -> tuple[dict[str, float], str]:
    """A row of metrics as trackers name it, and the name of its step: those of a run with several trials say which."""
    head = f"lr_{row['learning_rate']:g}/" if tuned else ""
    values = {
        f"{head}{name}": float(value)
        for name, value in row.items()
        if name not in ("learning_rate", "step") and isinstance(value, int | float) and abs(value) <= sys.float_info.max
    }
    return values, f"{head}step"


def summary_of(record: Done) -> dict[str, float]:
    """What a finished run has come to: its quality, and the bytes of a sequence's memory."""
    sizes = {f"per_sequence/{axis}": size for axis, size in per_sequence(record.memory).items()}
    return {f"quality/{record.quality.metric}": record.quality.value, **sizes}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by dotted names."""
    return {name.removeprefix("."): value for name, value in flatten(dict(config), "").items()}
