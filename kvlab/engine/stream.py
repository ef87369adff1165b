"""Events of some requests, as they happen."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from kvlab.engine.requests import Answer, Event, Request


class Served(Protocol):
    """What a stream needs of its engine."""

    @property
    def requests(self) -> Mapping[str, Request]:
        """Requests that have not ended."""
        ...

    @property
    def answers(self) -> Mapping[str, Answer]:
        """Of those that have."""
        ...

    def step(self) -> object:
        """Goes on."""
        ...

    def abandon(self, names: Iterable[str], *, later: bool = False) -> None:
        """Ends requests and forgets their answers."""
        ...


class Stream(Iterator[Event]):
    """What `Engine.stream` returns. Others may step the engine meanwhile: this stream misses nothing. Closing it, or
    letting it go, cancels what is left of its requests."""

    def __init__(self, engine: Served):
        self._engine = engine
        self.names: dict[str, None] = {}
        """Requests that are this stream's to end."""
        self._ends: dict[str, set[str]] = {}
        """How the samples of each request ended, as far as that was heard."""
        self._pending: deque[Event] = deque()

    def take(self, events: Iterable[Event]) -> None:
        """Keeps the events that are its own."""
        for event in events:
            if event.name in self.names:
                self._pending.append(event)
                if event.finish_reason is not None:
                    self._ends.setdefault(event.name, set()).add(event.finish_reason)

    def __next__(self) -> Event:
        try:
            while not self._pending:
                if any(name in self._engine.requests for name in self.names):
                    self._engine.step()
                else:
                    self.take(self._unheard())
                    if not self._pending:
                        raise StopIteration
            return self._pending.popleft()
        except BaseException:
            self.close()
            raise

    def _unheard(self) -> list[Event]:
        """Ends of requests that an interrupt kept from being told."""
        events = []
        for name in self.names:
            answer, ends = self._engine.answers.get(name), self._ends.get(name, set())
            if answer is not None and (not ends or (answer.error and "error" not in ends)):
                reason = answer.error or "an interrupt kept its last events from being told"
                events.append(Event(name, 0, None, math.nan, "", "error", reason))
        return events

    def close(self) -> None:
        """Nobody listens any more."""
        self._engine.abandon(self.names)
        self.names.clear()
        self._pending.clear()

    def __del__(self) -> None:
        if getattr(self, "names", None):  # an interrupt may leave it half made
            self._engine.abandon(self.names, later=True)
