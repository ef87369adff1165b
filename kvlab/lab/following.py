"""A tracker kept up with a run's own files: every row once, whatever was killed in between.

Rows that a resumed training writes again are equal to the bit to those that were told before. So it is enough to know
the last step of each trial that the tracker was told, which stands in the run's folder, in tracked-<tracker>.json.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from kvlab import terminal
from kvlab.config import Config
from kvlab.lab.record import AnyRecord, Done
from kvlab.lab.trackers import OPENERS, Tracker, Watched, flat, is_tuned, name_of, summary_of, values_of


@dataclass
class Told:
    """What a tracker was told: the last step of each learning rate, and how many rows in all."""

    steps: dict[str, int] = field(default_factory=dict)
    num_rows: int = 0


class Follower:
    """Tells a tracker what a run writes. The first thing that goes wrong is said in one line, and is the last."""

    record: AnyRecord | None = None
    """The run's record, once it is written."""
    _tracker: Tracker | None = None

    def __init__(self, config: Config, opener: Callable[[Watched], Tracker]):
        self.config = config
        plain = config.as_dict()
        self._tuned, self._note = is_tuned(plain), config.run_dir / f"tracked-{config.track}.json"
        self._told = _read(self._note)
        watched = Watched(
            run_id=config.run_id,
            name=name_of(plain, config.run_id),
            label=config.label,
            project=config.folder,
            config=flat(plain),
            folder=config.run_dir.parent,
            is_resumed=bool(self._told.num_rows),
        )
        with self._said():
            self._tracker = opener(watched)

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            line = f"{self.config.label}: track={self.config.track} ends here: {why}; the run goes on without it"
            terminal.console(stderr=True).print(line, soft_wrap=True)

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics, once it stands in its file; one that the tracker has is passed over."""
        rate, step = str(row["learning_rate"]), int(row["step"])
        if self._tracker is None or step <= self._told.steps.get(rate, 0):
            return
        with self._said():
            values, step_name = values_of(row, tuned=self._tuned)
            self._told.steps[rate] = step
            self._told.num_rows += 1
            _write(self._note, self._told)  # first: a process that dies here costs the tracker a row, and doubles none
            self._tracker.log(values, step_name, step, self._told.num_rows)

    def catch_up(self) -> None:
        """The rows of a training that was there, or that another process did; nothing where all are told."""
        if self._tracker is None:
            return
        from kvlab.lab.results import metrics_of

        for row in metrics_of(self.config.run_dir):
            self.row(row)

    def end(self) -> None:
        """The end of this process' part; with the record of a run that is done, what it has come to."""
        if self._tracker is None:
            return
        with self._said():
            if isinstance(self.record, Done):
                self._tracker.finish(summary_of(self.record), self.record.training.num_steps, is_done=True)
            else:
                self._tracker.finish({}, max(self._told.steps.values(), default=0), is_done=False)


class NoFollower:
    """What follows a run that nobody tracks."""

    record: AnyRecord | None = None

    def row(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def catch_up(self) -> None:
        """Nothing."""


@contextmanager
def followed(config: Config) -> Iterator[Follower | NoFollower]:
    """Follows a run from its folder on with the tracker that it names, until it ends in any way."""
    if config.track == "none":
        yield NoFollower()
        return
    follower = Follower(config, OPENERS[config.track])
    try:
        yield follower
    finally:
        follower.end()


def _read(path: Path) -> Told:
    """What a tracker was told; nothing where no file says so, or one that cannot be read."""
    try:
        return TypeAdapter(Told).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return Told()


def _write(path: Path, told: Told) -> None:
    """Whole or not at all for this process' death; not synced, which would take longer than a call of the device."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(asdict(told)))
    temporary.replace(path)
