"""A run is a directory named by its configuration: what is in it says whether it is new, cut, failed or done.

results/<experiment>/<run id>/
  lock  config.yaml  provenance.json     written first
  status.json  metrics.jsonl  trials/    while it runs
  params/                                the final parameters
  record.json                            last, by atomic rename: the run is done (or failed, with a reason)
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from kvlab.config import Config
from kvlab.files import write_atomic, write_json


class RunLocked(RuntimeError):
    """Another process is working on this run."""


class Run:
    """One run's directory."""

    def __init__(self, config: Config):
        self.config = config
        self.directory = config.run_dir

    @property
    def record(self) -> dict[str, Any] | None:
        """The finished record, done or failed; None while there is none."""
        path = self.directory / "record.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def state(self) -> str:
        """new, cut (begun, not finished), failed or done."""
        record = self.record
        if record is not None:
            return record["status"]
        return "cut" if (self.directory / "config.yaml").exists() else "new"

    @property
    def held_elsewhere(self) -> bool:
        """Whether another process is working on this run now."""
        if not (self.directory / "lock").exists():
            return False
        with (self.directory / "lock").open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run against other processes; the kernel lets go when this one dies, however it dies.

        Raises `RunLocked` at once if another process holds it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise RunLocked(f"{self.directory}: another process (pid {owner}) is working on this run") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def begin(self, provenance: dict[str, Any]) -> None:
        """Config and provenance first. A failed run is tried again from its last checkpoint; only unreadable checkpoints
        are thrown away, since nothing can be resumed from them."""
        record = self.record
        if record is not None and record["status"] == "failed":
            if record["reason"].startswith("CheckpointError"):
                (self.directory / "metrics.jsonl").unlink(missing_ok=True)
                shutil.rmtree(self.directory / "trials", ignore_errors=True)
            for name in ("traceback.txt", "record.json"):
                (self.directory / name).unlink(missing_ok=True)
        write_atomic(self.directory / "config.yaml", yaml.safe_dump(self.config.as_dict(), sort_keys=False))
        write_json(self.directory / "provenance.json", provenance)

    def say(self, status: str, **details: Any) -> None:
        """Where the run is, for people and schedulers that look from outside."""
        write_json(self.directory / "status.json", {"status": status, "pid": os.getpid(), **details})

    def finish(self, record: dict[str, Any]) -> None:
        """The record, last."""
        self.say(record["status"])
        write_json(self.directory / "record.json", record)
