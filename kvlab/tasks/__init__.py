"""Tasks by name. A new one is a file, a line here and a YAML; or an entry point of another package."""

from kvlab.registry import Registry
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.mad import Mad
from kvlab.tasks.mqar import Mqar
from kvlab.tasks.needle import Needle
from kvlab.tasks.passkey import Passkey
from kvlab.tasks.perplexity import Perplexity
from kvlab.tasks.state_tracking import StateTracking
from kvlab.tasks.text import Text

OURS: dict[str, type[Task]] = {
    "mqar": Mqar,
    "text": Text,
    "perplexity": Perplexity,
    "needle": Needle,
    "passkey": Passkey,
    "state_tracking": StateTracking,
    "mad": Mad,
}
TASKS = Registry[type[Task]]("kvlab.tasks", Task, OURS)

__all__ = [
    "TASKS",
    "Batch",
    "EvalSlice",
    "Mad",
    "Mqar",
    "Needle",
    "Passkey",
    "Perplexity",
    "StateTracking",
    "Task",
    "Text",
]
