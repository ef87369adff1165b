"""The experiments' pictures: one palette, no backend of their own, and each drawn from the tables beside it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from kvlab.lab.experiments import EXPERIMENTS_DIR, names
from kvlab.lab.plots import MARK_POINTS, sheet, unhide
from kvlab.lab.styles import COLOURS, INK, OTHERS, PALETTE

SOURCES = [path for path in EXPERIMENTS_DIR.glob("*/*.py") if path.name != "notebook.py"]
NOT_COMMITTED = ("demo",)
"""Experiments of which no table is committed."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_figures_leave_the_backend_to_their_caller_and_have_one_palette(path):
    text = path.read_text()
    assert not re.search(r"pyplot|matplotlib\.use|mpl\.use|tab10|tab20|[\"']tab:", text)
    known = {to_hex(each) for each in (*PALETTE, *OTHERS, *COLOURS.values(), INK)}
    assert set(re.findall(r"\"(#[0-9a-fA-F]{6})\"", text)) <= known


REDRAW = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("svg")
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure, load_part, names
for name in names():
    for part in ("figure", "smollm2"):
        if name in {left_out} or not (EXPERIMENTS_DIR / name / f"{{part}}.py").exists():
            continue
        if part == "smollm2" and name != "kivi_axes":
            continue
        folder = Path(name)
        folder.mkdir(exist_ok=True)
        load_part(name, part).redraw(folder)
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.get_backend() == "svg"
"""


def test_every_picture_is_drawn_from_the_tables_beside_it(tmp_path):
    code = REDRAW.format(left_out=NOT_COMMITTED)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    committed = {path.relative_to(EXPERIMENTS_DIR) for path in EXPERIMENTS_DIR.rglob("*.png")}
    assert made == committed
    assert {path.parent.name for path in made} == set(names()) - set(NOT_COMMITTED)


def test_marks_that_lie_on_each_other_are_all_seen():
    """Three at one place, each smaller than the one below and drawn later; whoever lies apart keeps its size."""
    figure, panel = sheet(size=(5, 4))
    panel.set(xlim=(1, 100), ylim=(0, 1), xscale="log")
    places = [(10, 0.5), (10, 0.5), (10.1, 0.502), (50, 0.5), (10, 0.9)]
    marks = [panel.errorbar(x, y, fmt="o", ms=MARK_POINTS).lines[0] for x, y in places]
    unhide(panel, marks)
    assert [mark.get_markersize() for mark in marks] == [8, 5, 2, 8, 8]
    assert marks[0].get_zorder() < marks[1].get_zorder() < marks[2].get_zorder()
    assert figure
