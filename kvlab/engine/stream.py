"""Events of some requests, as they happen."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from kvlab.engine.requests import Event


class Stream(Iterator[Event]):
    """What `Engine.stream` returns. Others may step the engine meanwhile: this stream misses nothing. Closing it, or
    letting it go, cancels what is left of its requests."""

    def __init__(
        self,
        names: Collection[str],
        step: Callable[[], object],
        is_running: Callable[[str], bool],
        abandon: Callable[[Collection[str]], None],
    ):
        self._names = names
        self._step, self._is_running, self._abandon = step, is_running, abandon
        self._pending: deque[Event] = deque()

    def take(self, events: Iterable[Event]) -> None:
        """Keeps the events that are its own."""
        self._pending.extend(event for event in events if event.name in self._names)

    def __next__(self) -> Event:
        try:
            while not self._pending:
                if not any(map(self._is_running, self._names)):
                    raise StopIteration
                self._step()
            return self._pending.popleft()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Nobody listens any more."""
        names, self._names = self._names, ()
        self._pending.clear()
        self._abandon(names)

    def __del__(self) -> None:
        self.close()
