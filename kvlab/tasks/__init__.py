"""Tasks by name."""

from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.mqar import Mqar
from kvlab.tasks.needle import Needle
from kvlab.tasks.perplexity import Perplexity
from kvlab.tasks.text import Text

TASKS: dict[str, type[Task]] = {
    "mqar": Mqar,
    "text": Text,
    "perplexity": Perplexity,
    "needle": Needle,
}

__all__ = ["TASKS", "Batch", "EvalSlice", "Mqar", "Needle", "Perplexity", "Task", "Text"]
