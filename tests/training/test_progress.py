"""What a run says: a live line on a terminal, plain lines in a log."""

import io

import pytest
from rich.console import Console

from kvlab.training import progress
from kvlab.training.progress import TrainingProgress
from kvlab.units import human_bytes


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_tells_step_loss_speed_bytes_and_eta(terminal, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160)
    with TrainingProgress("mha/mqar/seed0", 100, 3 * 2**20, console) as line:
        line.resumed(20)
        line.update(40, 1.2345, 4096)
    said = output.getvalue()
    for part in ("mha/mqar/seed0", "resumed at step 20", "step 40/100", "loss 1.2345", "tok/s", "3.0 MiB held"):
        assert part in said
    assert ("ETA" in said) != terminal  # the terminal has a bar with the remaining time


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40 * 3, "3.0 TiB")])
def test_human_bytes(count, text):
    assert human_bytes(count) == text
