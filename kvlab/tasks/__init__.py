"""Tasks by name."""

from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.mqar import Mqar
from kvlab.tasks.text import Text

TASKS: dict[str, type[Task]] = {
    "mqar": Mqar,
    "text": Text,
}

__all__ = ["TASKS", "Batch", "EvalSlice", "Mqar", "Task", "Text"]
