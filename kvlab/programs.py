"""Compiled programs, and the room that they take in the process.

XLA on CPU maps the code of each program in pieces of its own: of a small model some hundred mappings. Linux allows a
process 65,530 of them (`vm.max_map_count`); beyond, LLVM ends it without a word."""

import gc
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any, Self

import jax

LET_GO: list[Callable[[], object]] = []
"""Empties caches that keep programs, whose owners are used again or not."""
_floor = 0
"""Mappings that were left when programs were let go of last: no programs' that nobody uses."""


class Program:
    """A method that is compiled for each instance and let go of with it. `jax.jit` with a static self keeps every
    instance, and all that it compiled, for as long as the process lives. On the class, `lower` and `trace` take the
    instance first."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        self.__wrapped__, self.options = function, options

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def of(self, instance: Any) -> Any:
        """The instance's own, made when it is first asked for."""
        made = instance.__dict__.get(self.name)
        if made is None:
            made = instance.__dict__[self.name] = jax.jit(MethodType(self.__wrapped__, instance), **self.options)
        return made

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.of(instance)

    def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        return self.of(instance)(*args, **kwargs)

    def lower(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(...).lower`."""
        return self.of(instance).lower(*args, **kwargs)

    def trace(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(...).trace`."""
        return self.of(instance).trace(*args, **kwargs)


def program(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes a method a `Program`; arguments are counted behind self."""
    return lambda function: Program(function, **options)


class Programs:
    """What several callers compile alike: a subclass for each kind."""

    @classmethod
    @cache
    def shared(cls) -> Self:
        """The same for all of them, until it is let go of for want of room."""
        return cls()


LET_GO.append(Programs.shared.cache_clear)


def num_mappings() -> int:
    """Mappings of this process; 0 where the system does not say."""
    try:
        with Path("/proc/self/maps").open("rb") as lines:
            return sum(1 for _ in lines)
    except OSError:
        return 0


def most_mappings() -> int | None:
    """How many a process may have; None where the system does not say."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return None


def make_room() -> None:
    """Lets go of programs once half of the mappings that were free are taken: first of those that nobody uses, then of
    all, with a warning, since those in use are then compiled again. Call it beside a compilation."""
    global _floor
    most = most_mappings()
    if most is None or num_mappings() <= (_floor + most) // 2:
        return
    for let_go in LET_GO:
        let_go()
    gc.collect()
    if (taken := num_mappings()) > (_floor + most) // 2:
        legal = f"{taken} of {most} mappings (vm.max_map_count) are taken"
        warnings.warn(f"programs: {legal}; all are let go of, and those in use compiled again", stacklevel=2)
        jax.clear_caches()
        gc.collect()
        _floor = min(num_mappings(), most)
