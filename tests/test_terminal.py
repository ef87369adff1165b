"""What is printed is what was said: brackets are no styles, colons no emojis, wherever rich writes."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import TextColumn

from kvlab import cli
from kvlab.capacity.estimate import estimate
from kvlab.capacity.report import one_answer
from kvlab.compose import compose_capacity
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.narrow import print_rows
from kvlab.training.progress import TrainingProgress

ODD = "[/b] [bold]x[/] :warning: \\"
PACKAGE = Path(cli.__file__).parent


def test_claims_with_brackets(capsys):
    assert verdict([Claim(ODD, f"= {ODD}", ODD, True)], ODD) == 0
    assert capsys.readouterr().out.count(ODD) == 4


@pytest.mark.parametrize("kind", [{}, {"markup": False, "emoji": False}])
def test_tables_on_any_console(kind):
    out = io.StringIO()
    console = Console(file=out, width=200, **kind)
    rows = [{"name": ODD, ODD: ODD, "same": ODD}, {"name": "b", ODD: "c", "same": ODD}]
    print_rows(console, rows, kept=("name",), title=ODD)
    assert out.getvalue().count(ODD) == 5


def test_deployments(monkeypatch):
    config = compose_capacity(["model=llama3-8b"])
    answer = estimate(config)
    monkeypatch.setattr("kvlab.capacity.report.title_of", lambda _: ODD)
    out = io.StringIO()
    Console(file=out, width=200).print(one_answer(config, answer))
    assert ODD in out.getvalue()


def test_kernels(monkeypatch, capsys):
    from pallas_kernels import simulators, targets

    monkeypatch.setattr(simulators, "simulate", lambda _: {"op": ODD})
    monkeypatch.setattr(targets, "missing", lambda _: None)
    monkeypatch.setattr(targets, "compile_for", lambda _: ["case"])
    monkeypatch.setattr(targets, "failures", lambda _: [])
    monkeypatch.setattr(targets, "row", lambda _: [ODD] * len(targets.HEADER))
    monkeypatch.setattr("sys.argv", ["kvlab", "kernels", "H100"])
    assert cli.main() == 0
    printed = capsys.readouterr().out
    assert f"simulated with race detection: {ODD}" in printed
    assert "[/b]" in printed.splitlines()[-2] or "[/b]" in printed.splitlines()[-3]


def test_lines_and_bars_of_a_training():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    with TrainingProgress(ODD, 3, 8, console) as progress:
        bar = progress._bar
        assert bar is not None
        assert [column.markup for column in bar.columns if isinstance(column, TextColumn)] == [False]
        progress.say(ODD)
    assert ODD in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_consoles_are_made_in_one_place():
    makers = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "Console(" in path.read_text()}
    assert makers == {"terminal.py"}
    assert not [path for path in PACKAGE.rglob("*.py") if "rich.markup" in path.read_text()]
