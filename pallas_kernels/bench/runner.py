"""Runs pieces of work, each a process of its own with a time limit, so that neither a hang, an abort nor a short window
loses what is known.

    piece = Piece("case", "lengths 0, 1", (sys.executable, "-m", "my.piece", "0"), limit_s=60)
    with Runner(Path("results.jsonl"), {"device": "H200", "code": digest(folder)}, budget_s=540) as runner:
        lines = runner.run([piece], workers=10, share=0.3)

A piece prints JSON objects, a line each: the last one is its answer. One that is killed, or aborts, has answered what
it printed last: so a long piece prints after every step what it knows. The runner imports no jax and touches no device.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.bench.record import SETTLED, Line, Record, latest

TICK_S = 0.02
"""Between two looks at the processes."""
DEATH_S = 5.0
"""That a killed process has to be gone: one that waits for a broken driver may stay, and nobody waits for it."""
LEAST_S = 0.5
"""Nothing is begun with less time."""
STDERR_BYTES = 2000
STDOUT_BYTES = 4_000_000
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GUARD = Path(__file__).with_name("guard.py")


@dataclass(frozen=True)
class Piece:
    """One process. `kind` and `name` are its key in the record, `command` starts it, and it is killed with all its
    children after `limit_s` seconds. It is not begun where less than `least_s` seconds are left."""

    kind: str
    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float = LEAST_S

    def __post_init__(self):
        if not 0 < self.limit_s < math.inf:
            raise ValueError(f"limit_s = {self.limit_s}: must be positive and finite")

    @property
    def key(self) -> tuple[str, str]:
        """In the record."""
        return self.kind, self.name


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came while pieces ran: they are killed, and their lines are written."""


class Runner:
    """Runs pieces and keeps a line of each in the record at `path`, as `record.Record` says.

    `budget_s` counts from `began`, a time of `time.monotonic()`, by default now; no piece lives longer. `env` is added
    to the environment of every piece. `tell` gets every line, also those that a resumed record has already.

    To `resume` is to leave out the pieces that the record has as "done" or "failed"; those that were killed, cut,
    skipped or interrupted, and those that it lacks, are run. Raises ValueError as `Record` does, and for a budget that
    is not positive."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        about: Mapping[str, Any] | None = None,
        budget_s: float = math.inf,
        began: float | None = None,
        resume: bool = False,
        env: Mapping[str, str] | None = None,
        tell: Callable[[Line], None] = lambda line: None,
    ):
        if not budget_s > 0:
            raise ValueError(f"budget_s = {budget_s}: must be positive")
        self.began = time.monotonic() if began is None else began
        self.budget_s, self.env, self.tell = budget_s, dict(env or {}), tell
        self.record = Record(path, identity, about, resume=resume)
        known = latest(self.record.lines)
        self.known = {key: line for key, line in known.items() if line.get("outcome") in SETTLED}
        """Lines of pieces that are left out, by kind and name."""
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Runner":
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup wants
        self._former = {number: signal.signal(number, self._interrupt) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self.record.close()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def run(self, pieces: Sequence[Piece], *, workers: int = 1, share: float = 1.0) -> list[Line]:
        """The lines of the pieces, in their order. They are begun in their order, `workers` at once, and end before
        `share` of the budget is used up. Raises ValueError for two pieces of one kind and name, and Interrupted."""
        if workers < 1:
            raise ValueError(f"workers = {workers}: must be at least 1")
        if not 0 < share <= 1:
            raise ValueError(f"share = {share}: must be in (0, 1]")
        if len({piece.key for piece in pieces}) < len(pieces):
            raise ValueError("pieces: two of them have one kind and name")
        lines, running, waiting = dict[tuple[str, str], Line](), list[_Child](), deque(pieces)
        end_s = share * self.budget_s
        try:
            while waiting or running:
                if self.signal:
                    raise Interrupted(self.signal.name)
                while waiting and len(running) < workers:
                    begun = self._begin(waiting.popleft(), end_s - self.seconds)
                    if isinstance(begun, _Child):
                        running.append(begun)
                    else:
                        lines[begun["kind"], begun["name"]] = begun
                ended = [child for child in running if child.has_ended]
                for child in ended:
                    child.kill()
                for child in ended:
                    running.remove(child)
                    lines[child.piece.key] = self._keep(child.piece, child.line())
                if running:
                    time.sleep(TICK_S)
        finally:
            for child in running:
                child.kill()
            for child in running:
                self._keep(child.piece, child.line("interrupted", "the run was interrupted"))
        return [lines[piece.key] for piece in pieces]

    def _begin(self, piece: Piece, left_s: float) -> "_Child | Line":
        """Its process, or the line of one that is known or has too little time."""
        if piece.key in self.known:
            self.tell(self.known[piece.key])
            return self.known[piece.key]
        if left_s < max(piece.least_s, LEAST_S):
            reason = f"{max(left_s, 0):.1f} s were left, it needs {piece.least_s:.1f}"
            return self._keep(piece, {"outcome": "skipped", "reason": reason})
        return _Child(piece, self.env, left_s, self.seconds)

    def _keep(self, piece: Piece, line: Line) -> Line:
        line = {"kind": piece.kind, "name": piece.name, "at_s": round(self.seconds, 1), **line}
        self.record.keep(line)
        self.tell(self.record.lines[-1])
        return self.record.lines[-1]

    def _interrupt(self, number: int, frame: object) -> None:
        del frame
        self.signal = signal.Signals(number)


def ask(piece: Piece, env: Mapping[str, str] | None = None) -> Line:
    """The line of one piece that is run at once, and kept nowhere: what must be known before a record is opened."""
    child = _Child(piece, env or {}, math.inf, 0.0)
    try:
        while not child.has_ended:
            time.sleep(TICK_S)
    finally:
        child.kill()
        line = {"kind": piece.kind, "name": piece.name, "at_s": 0.0, **child.line()}
    return line


def digest(*folders: Path) -> str:
    """What the Python files below folders hold, in 12 letters: the state of the code, whether or not it is
    committed."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


class _Child:
    """A piece that runs, in a session of its own. What it prints goes to files: a pipe would wait for its
    grandchildren."""

    def __init__(self, piece: Piece, env: Mapping[str, str], left_s: float, at_s: float):
        self.piece, self.at_s, self.began = piece, at_s, time.monotonic()
        self.limit_s, self.is_cut = min(piece.limit_s, left_s), left_s < piece.limit_s
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by `line`
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *piece.command],
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | dict(env),
        )

    @property
    def has_ended(self) -> bool:
        """By itself, or as its time is up."""
        return self._is_over or time.monotonic() - self.began > self.limit_s

    @property
    def _is_over(self) -> bool:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT  # its number stays taken until the group is killed
        return os.waitid(os.P_PID, self.process.pid, flags) is not None

    def kill(self) -> None:
        """Ends it if it runs, and every child that it left. A process that holds a GPU takes a second to go: so all are
        killed before any is waited for."""
        self.seconds, self.was_over = time.monotonic() - self.began, self._is_over
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def line(self, outcome: str = "", reason: str = "") -> Line:
        """What became of it, and what it said, once it was killed."""
        stays = ""
        try:
            status = self.process.wait(DEATH_S)
        except subprocess.TimeoutExpired:
            status, stays = 0, ", and does not die"
        answer = self._answer()
        if self.was_over:
            outcome = "done" if status == 0 and answer is not None else "failed"
            reason = _said(status) if status else "it printed no JSON object"
        elif not outcome:
            outcome = "cut" if self.is_cut else "timeout"
            reason = f"killed after {self.limit_s:.0f} s{', as the time for it was up' * self.is_cut}{stays}"
        line: Line = {"at_s": round(self.at_s, 1), "seconds": round(self.seconds, 2), "outcome": outcome}
        if answer is not None:
            line["answer"] = answer
        if outcome != "done":
            line |= {"reason": reason, "stderr": _tail(self.err, STDERR_BYTES)}
        self.out.close()
        self.err.close()
        return line

    def _answer(self) -> Line | None:
        for text in reversed(_tail(self.out, STDOUT_BYTES).splitlines()):
            if text.startswith("{"):
                with suppress(ValueError):
                    return json.loads(text)
        return None


def _said(status: int) -> str:
    """A status in words: the guard ends with 128 + the number of a signal."""
    number = -status if status < 0 else status - 128
    try:
        return f"status {status} ({signal.Signals(number).name})"
    except ValueError:
        return f"status {status}"


def _tail(file: Any, most: int) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - most))
    return file.read().decode(errors="replace")
