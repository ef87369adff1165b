"""Which points may share an axis: those of one task, context and batch. All others have a panel of their own, whose
name says what tells it apart."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvlab.lab.choose import differences
from kvlab.lab.labels import point_labels
from kvlab.lab.results import Point
from kvlab.lab.styles import Style, styles


def by_panel(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Points that ask the same of the same memory, by the panel's name: "mqar", or where a task has several panels also
    the fields in which they differ, "mqar, 512 tokens, batch 8, writes=2". Tasks are in order of appearance, their
    panels by context and batch."""
    groups: dict[str, list[Point]] = {}
    tasks = list(dict.fromkeys(point.task for point in found))
    for point in sorted(found, key=lambda point: (tasks.index(point.task), point.context_len, point.batch_size)):
        alike = [point.task, point.config["task"], point.context_len, point.batch_size]
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(point)
    firsts = [members[0] for members in groups.values()]
    names = [_name(first, [other for other in firsts if other.task == first.task]) for first in firsts]
    return dict(zip(names, groups.values(), strict=True))


def styles_of(found: Sequence[Point]) -> dict[int, Style]:
    """How points look, by their `id`: by what is swept among those of their task."""
    looks: dict[int, Style] = {}
    for task in dict.fromkeys(point.task for point in found):
        members = [point for point in found if point.task == task]
        looks |= zip(map(id, members), styles([point.config for point in members]), strict=True)
    return looks


def names_within(members: Sequence[Point]) -> list[str]:
    """How the points of one panel are called among each other: what the panel's name says is left out."""
    return point_labels([point.config for point in members])


def where(point: Point) -> str:
    """Where the bytes of a panel's points were measured."""
    return f"at {point.context_len:,} tokens, batch of {point.batch_size}"


def _name(first: Point, alike: Sequence[Point]) -> str:
    """The name of a panel among those of its task, by the first point of each."""
    words = [first.task]
    if len({other.context_len for other in alike}) > 1:
        words.append(f"{first.context_len:,} tokens")
    if len({other.batch_size for other in alike}) > 1:
        words.append(f"batch {first.batch_size}")
    return ", ".join([*words, *_told(first.config["task"], [other.config["task"] for other in alike])])


def task_names(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the configurations of tasks are called among each other: "mqar", or where a type has several also the fields
    in which they differ, "text, seq_len=256"."""
    alike = [[other for other in tasks if other["type"] == task["type"]] for task in tasks]
    return [", ".join([task["type"], *_told(task, others)]) for task, others in zip(tasks, alike, strict=True)]


def _told(task: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{name}={task.get(name)}" for name in differences(alike)]
