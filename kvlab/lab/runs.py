"""A run is a directory named by its configuration: what is in it says whether it is new, cut, failed or done.

results/<experiment>/<run id>/
  lock  config.yaml  provenance.json     written first
  trained.json                           where its parameters and metrics are (kvlab/lab/trained.py)
  status.json                            while it runs
  examples.npz                           what every example scored (kvlab/lab/examples.py)
  record.json                            last, by atomic rename: the run is done (or failed, with a reason)
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from pydantic import TypeAdapter

from kvlab.config import Config
from kvlab.files import LockHeld, is_locked, locked, write_atomic, write_json
from kvlab.lab.record import AnyRecord, Provenance, Unfinished, as_json, damaged, read_record


class RunLocked(RuntimeError):
    """Another process is working on this run."""


@dataclass(frozen=True)
class _Known:
    """What the status of an unfinished run knows of its training."""

    known_attempt: int = 0


class Run:
    """One run's directory."""

    def __init__(self, config: Config):
        self.config = config
        self.directory = config.run_dir

    @property
    def record(self) -> AnyRecord | None:
        """The record, done or failed; None while there is none. A damaged one counts as failed."""
        path = self.directory / "record.json"
        if not path.exists():
            return None
        try:
            return read_record(path)
        except (ValueError, OSError) as error:
            return damaged(error, self.config.run_id, self.config.as_dict())

    @property
    def state(self) -> str:
        """new, cut (begun, not finished), failed or done."""
        record = self.record
        if record is not None:
            return record.status
        return "cut" if (self.directory / "config.yaml").exists() else "new"

    @property
    def held_elsewhere(self) -> bool:
        """Whether another process is working on this run now."""
        return is_locked(self.directory / "lock")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run against other processes; the kernel lets go when this one dies, however it dies.

        Raises `RunLocked` at once if another process holds it.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.directory / "lock"))
            except LockHeld as held:
                owner = f"another process (pid {held.owner})"
                raise RunLocked(f"{self.directory}: {owner} is working on this run") from None
            yield

    @property
    def known_attempt(self) -> int:
        """The failed attempt at its training that this run knew when it last ended or began; 0: none."""
        record, path = self.record, self.directory / "status.json"
        if record is not None:
            return record.training.attempt if isinstance(record, Unfinished) and record.training else 0
        try:
            return TypeAdapter(_Known).validate_json(path.read_bytes()).known_attempt if path.exists() else 0
        except ValueError:
            return 0

    def begin(self, provenance: Provenance) -> None:
        """Config and provenance first. A failed run is tried again; its status keeps what its record knew."""
        self.say("running")
        for name in ("traceback.txt", "record.json", "examples.npz"):
            (self.directory / name).unlink(missing_ok=True)
        write_atomic(self.directory / "config.yaml", yaml.safe_dump(self.config.as_dict(), sort_keys=False))
        write_json(self.directory / "provenance.json", asdict(provenance))

    def say(self, status: str, **details: Any) -> None:
        """Where the run is, for people and schedulers that look from outside."""
        known = {"known_attempt": attempt} if (attempt := self.known_attempt) else {}
        write_json(self.directory / "status.json", {"status": status, "pid": os.getpid(), **known, **details})

    def give_up(self, reason: str) -> None:
        """Says that the run has failed where not even its record could be written; no folder says that it still
        runs."""
        try:
            self.say("failed", reason=reason)
        except OSError:
            with suppress(OSError):
                (self.directory / "status.json").unlink(missing_ok=True)

    def finish(self, record: AnyRecord) -> None:
        """The record, last."""
        self.say(record.status)
        write_json(self.directory / "record.json", as_json(record))
