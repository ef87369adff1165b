"""What a run says while it trains: one live line on a terminal, plain lines in a log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kvlab import terminal
from kvlab.units import human_bytes

PLAIN_EVERY_S = 15.0


class TrainingProgress:
    """Step, loss, tokens/s, ETA and bytes held. Lines name the run, so that parallel runs can be told apart."""

    def __init__(self, label: str, num_steps: int, held_bytes: int, console: Console | None = None):
        self.console = console or terminal.console(stderr=True)
        self.label, self.num_steps, self.held_bytes = label, num_steps, held_bytes
        self._began, self._last, self._first_step = time.monotonic(), time.monotonic(), 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "TrainingProgress":
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.num_steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def resumed(self, step: int) -> None:
        """Starts counting at a resumed step."""
        self._first_step = step
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=self.num_steps, completed=step)
        if step:
            self.say(f"{self.label}: resumed at step {step}")

    def update(self, step: int, loss: float, num_tokens: int) -> None:
        """After a device call; `num_tokens` since this process began."""
        now = time.monotonic()
        rate = num_tokens / max(now - self._began, 1e-9)
        held = human_bytes(self.held_bytes)
        line = f"{self.label}  step {step}/{self.num_steps}  loss {loss:.4f}  {rate:,.0f} tok/s  {held} held"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=line)
        elif now - self._last >= PLAIN_EVERY_S:
            self._last = now
            done = max(step - self._first_step, 1)
            left = (now - self._began) / done * (self.num_steps - step)
            self.say(f"{line}  ETA {left:.0f} s")

    def say(self, line: str) -> None:
        """One permanent line."""
        self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
