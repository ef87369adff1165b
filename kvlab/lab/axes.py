"""Axes of pictures: round ticks of bytes, and what numbers are called with their units."""

import math

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, Locator

from kvlab.evaluation.measure import AXES
from kvlab.tasks.metrics import metric_label

WORDS = {
    "num_params": "parameters",
    "learning_rate": "learning rate",
    "optimizer.learning_rate": "learning rate",
    "dropped": "share of tokens dropped",
    "wall_s": "wall time, s",
    "memory.context_len": "context, tokens",
    "measure.context_len": "context, tokens",
    "memory.batch_size": "sequences in the batch",
    "measure.batch_size": "sequences in the batch",
    "memory.read_bytes_per_token": AXES["read_bytes_per_token"],
    "speed.train_step_ms": "training step, ms (median)",
    "speed.train_step_low_ms": "training step, ms (lower quartile)",
    "speed.train_step_high_ms": "training step, ms (upper quartile)",
    "speed.decode_tokens_per_s": "decoded tokens a second (median)",
    "speed.decode_low_tokens_per_s": "decoded tokens a second (lower quartile)",
    "speed.decode_high_tokens_per_s": "decoded tokens a second (upper quartile)",
    "speed.compaction_ms": "one compaction, ms",
}
"""Columns of `kvlab.load` that have words of their own."""
UNITS = {
    "tokens": ("_len", ".window", ".page_size", ".num_sinks", ".sinks", ".recent", ".residual"),
    "bytes": ("_bytes",),
    "ms": ("_ms",),
    "s": ("_s",),
    "steps": (".num_steps",),
}
"""Of other columns, by how their names end."""
QUALITIES = {
    "value": "{metric}",
    "parallel_value": "{metric}, parallel form",
    "lost": "{metric} lost to the memory",
}


def axis_label(column: str, metric: str) -> str:
    """What stands beside an axis: a column of `kvlab.load` in words with its unit, or by its name; what is measured in
    a task's `metric`, as records name it, by the metric."""
    section, _, field = column.partition(".")
    if section == "quality":
        share = " share"
        if field.endswith(share):
            return f"share of the labels, {field.removesuffix(share)}"
        return QUALITIES.get(field, "{metric}, " + field).format(metric=metric_label(metric))
    if section == "per_sequence" and field in AXES:
        return AXES[field]
    if column in WORDS:
        return WORDS[column]
    if section == "memory" and field.endswith("_bytes"):
        return f"{field.removesuffix('_bytes').replace('_', ' ')} bytes, whole batch"
    found = [unit for unit, endings in UNITS.items() if f".{column}".endswith(endings)]
    return f"{column}, {found[0]}" if found else column


def bytes_in_words(size: float) -> str:
    """1536 as "1.5 KiB", 65536 as "64 KiB": as many digits as a tick needs, four at most."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError


class ByteLocator(Locator):
    """Powers of two, or where these are too few, multiples of one; on a linear axis always multiples."""

    def __init__(self, most: int = 7, *, is_log: bool = True):
        self.most, self.is_log = most, is_log

    def __call__(self) -> list[float]:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Ticks between two sizes."""
        low, high = sorted((float(vmin), float(vmax)))
        if self.is_log and low > 0 and high >= 4 * low:
            step = math.ceil(math.log2(high / low) / self.most)
            first, last = math.ceil(math.log2(low) / step), math.floor(math.log2(high) / step)
            return [2.0 ** (step * power) for power in range(first, last + 1)]
        step = 2.0 ** max(0, math.ceil(math.log2(max(high - low, 1) / self.most)))
        return [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def byte_axis(panel: Axes, which: str = "x", *, is_log: bool = True, most: int = 7) -> None:
    """Makes an axis of a panel one of bytes, logarithmic or not, with at most about `most` ticks."""
    axis = panel.xaxis if which == "x" else panel.yaxis
    if is_log:
        (panel.set_xscale if which == "x" else panel.set_yscale)("log", base=2)
    axis.set_major_locator(ByteLocator(most, is_log=is_log))
    axis.set_major_formatter(FuncFormatter(lambda size, _: bytes_in_words(size)))
