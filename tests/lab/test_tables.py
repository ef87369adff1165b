"""Tables in a terminal: no row is taller than a line, whatever its width, and nothing is left out unsaid."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from kvlab import cli
from kvlab.evaluation.measure import SpeedReport
from kvlab.evaluation.verify import EXACT, in_short
from kvlab.lab import comparison_tables, tables
from kvlab.lab.narrow import print_rows
from kvlab.lab.protocol import protocol_rows
from kvlab.lab.record import Lossy, Quality, Unfinished
from kvlab.lab.report import frontier_frame
from kvlab.lab.results import load, points
from kvlab.lab.tables import print_records
from kvlab.lab.written_tables import in_latex, written
from tests.lab.test_results import H2O, QUEST, SNAPKV, held, record, write

MASK = f"{EXACT} under the mask of what it kept and read"
BOTH = f"{EXACT} with what is stored rounded to kivi4 under the mask of what it kept"


LOSSY = Lossy(logit_error=0.0, num_logits=1, num_compactions=1, evicted_fraction={}, skipped={})


def a_study():
    """Seven points of a task with two turns, most of them lossy."""
    compressed = [{**method, "at": at} for method in (SNAPKV, H2O) for at in ("end", "chunks")]
    choices = [
        (held(selection=None), EXACT),
        *((held(method, 0.25, selection=None), BOTH) for method in compressed),
        (held(selection=QUEST), MASK),
        (held(SNAPKV, 0.5, selection=QUEST), MASK),
    ]
    made = []
    for number, (choice, verified_by) in enumerate(choices):
        for seed in range(2):
            run = record(seed=seed, value=0.9 - number / 100 - seed / 1000, size=300_000 + 10_000 * number, **choice)
            turns = {"all": [0.9, 0.5 + number / 100]}
            quality = replace(run.quality, verified_by=verified_by, turns=turns, parallel_value=0.9)
            memory = replace(run.memory, read_bytes_per_token=70_000 + number)
            speed = SpeedReport(10.0 + number, 10_000.0 * number)
            dropped = {"one": 0.5 + number / 100, "two": 0.25} if number < 6 else {"one": 0.0, "two": 0.0}
            lossy = replace(LOSSY, evicted_fraction=dropped) if verified_by != EXACT else None
            run = replace(run, run_id=f"{number}.{seed}", lossy=lossy)
            made.append(replace(run, quality=quality, memory=memory, speed=speed))
    return made


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_row_is_a_line_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setattr(tables, "wide_console", lambda: Console(highlight=False, width=width))
    print_records(a_study())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    rule = next(number for number, line in enumerate(lines) if line.startswith("───"))
    assert all(line.startswith("mha") for line in lines[rule + 1 : rule + 8])
    assert not any("…" in line for line in lines)
    above, heading = " ".join(lines[: rule - 1]), lines[rule - 1]
    assert "task: mqar, metric: accuracy" in above
    assert "seeds: 2" in above
    below = lines[rule + 8 :]
    for name in (
        "value",
        "held/seq",
        "read/tok",
        "lost",
        "dropped",
        "turn 2",
        "ceiling",
        "tells",
        "checked",
        "step ms",
        "tok/s",
    ):
        assert sum(name in part for part in (above, heading, *below)) == 1, name
    assert (below == []) == (width == 120), below
    assert below == [] or below[0].startswith(f"no room at {width} columns: step ms")


def test_equal_columns_stand_above_and_what_is_unknown_nowhere(capsys):
    rows = [{"name": name, "value": "1", "same": "x", "none": "-", "size": size} for name, size in ("a1", "b2")]
    print_rows(Console(width=60), rows, kept=("name", "value"))
    said, heading, _, first, _ = capsys.readouterr().out.splitlines()
    assert said == "same: x"
    assert heading.split() == ["name", "value", "size"]
    assert first.split() == ["a", "1", "1"]
    rows = [row | {"value": "1" * 30} for row in rows]
    print_rows(Console(width=40), rows, kept=("name", "value"), spare=("size", "value"), title="[a] title")
    title, _, heading, *_, below = capsys.readouterr().out.splitlines()
    assert (title, heading.split(), below) == ("[a] title", ["name", "value"], "no room at 40 columns: size")


@pytest.mark.parametrize(
    ("said", "word"),
    [(EXACT, "exact"), (MASK, "mask"), (BOTH, "kivi4 mask"), (f"{EXACT} with what is stored rounded to fp8", "fp8")],
)
def test_what_logits_were_checked_against_is_a_word(said, word):
    assert in_short(said) == word
    quality = Quality(metric="a", higher_is_better=True, value=1, slices={}, parallel_value=1, validation=1)
    assert in_short(quality.verified_by) == "exact"


def test_flips_of_a_comparison_are_two_columns():
    row = dict.fromkeys(("right to wrong", "wrong to right", "examples lost", "examples won"), "3")
    short = comparison_tables.in_short({"A": "1", **row, "labels": "40", "examples": "9"})
    assert short == {"A": "1", "flips": "-3 +3 of 40", "examples": "-3 +3 of 9"}


def test_nothing_has_no_sign():
    assert [tables.as_cell(value) for value in (-0.00001, -0.0001, None, True)] == ["0.0000", "-0.0001", "-", "yes"]


def test_what_a_compression_dropped_is_a_column(capsys, tmp_path):
    """Where there is one, in records, for machines too; nothing is said of a window or a selection."""
    made = a_study()
    print_records(made)
    cells = {line[:30].strip(): line.split() for line in capsys.readouterr().out.splitlines() if "mha" in line[:4]}
    assert sum("38.0%" in words for words in cells.values()) == 1  # the mean of 0.51 and 0.25
    (idle,) = (words for words in cells.values() if "nothing" in words)
    assert idle[:4] == ["mha", "snapkv", "0.5", "quest"]
    assert [point.dropped for point in points(made)] == [
        None, *(pytest.approx((0.75 + number / 100) / 2) for number in (1, 2, 3, 4)), None, 0.0
    ]  # fmt: skip
    assert frontier_frame(points(made), protocol_rows(points(made), made)).dropped.max() == pytest.approx(0.395)
    assert sorted(set(load(write(tmp_path, *made)).dropped.dropna()))[:2] == [0.0, pytest.approx(0.38)]
    print_records([run for run in made if run.run_id[0] in "05"])
    assert "dropped" not in capsys.readouterr().out


NASTY = r"a_b 50% of $x$ & {y} #1 ~^ \n | <b> [c](d) *e* `f` 'g' \"h\""


def table_of(markdown):
    """The cells of the table that a reader of Markdown sees, by an independent one."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    shown = [
        "".join(child.content for child in token.children)
        for before, token in pairwise(tokens)
        if before.type in ("th_open", "td_open")
    ]
    assert all(child.type in ("text", "text_special") for token in tokens for child in token.children or ())
    return shown


def test_markdown_shows_every_cell_as_it_is():
    rows = [{"name": NASTY, "a|b": "-0.5", "same": "x"}, {"name": "two\nlines", "a|b": "-", "same": "x"}]
    said = written("markdown", "A *title*", rows, kept=("name",), below=[NASTY])
    assert table_of(said) == ["name", "a|b", NASTY, "-0.5", "two lines", "-"]
    title, common, table, below = said.split("\n\n")
    assert (title, common) == (r"A \*title\*", "same: x")
    assert table.splitlines()[1] == "| --- | ---: |"
    assert below.startswith("* a")


def test_latex_prints_every_cell_as_it_is():
    """Signs of LaTeX are read back by a table of its documentation's own; none is left that would mean something."""
    signs = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">",
             "textbar": "|", "textquotedbl": '"'}  # fmt: skip
    rows = [{"name": NASTY, "n": "-0.5 [-1.0, 2]", "m": "1 ± 2"}, {"name": "multi-line\ntext", "n": "-", "m": "3"}]
    lines = written("latex", "50%\n\\input{x}", rows, kept=("name",), below=["a\n\\b"]).splitlines()
    assert lines[0] == r"% 50% \input{x}"
    assert lines[1] == r"\begin{tabular}{lrr}"
    assert lines[2:4] == [r"\toprule", r"name & n & m \\"]
    assert lines[6:] == [r"multi-line text & -- & 3 \\", r"\bottomrule", r"\end{tabular}", r"% a \b"]
    name, n, m = re.split(r"(?<!\\) & ", lines[5].removesuffix(r" \\"))
    assert (n, m) == ("$-$0.5 [$-$1.0, 2]", r"1 $\pm$ 2")
    shown = re.sub(r"\\([a-z]+)\{\}", lambda found: signs[found[1]], name)
    shown = re.sub(r"\\([&%$#_{}])", r"\1", shown).replace("{'}", "'")
    assert shown == NASTY
    bare = re.sub(r"\\[a-z]+\{\}|\\[&%$#_{}]|\{'\}", "", name)
    assert in_latex("[a]") == "{}[a]", "not an option of the row before"
    assert not set(bare) & set("\\&%$#_{}~^|<>\"'")


@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_show_prints_a_table_to_be_pasted(form, tmp_path, monkeypatch, capsys):
    """The numbers are those of the terminal, an interval beside its mean; what failed is said below."""
    made = a_study()
    failed = Unfinished(run_id="bad", experiment="x", config=made[0].config, seed=9, status="failed", reason="a | b_c")
    monkeypatch.setattr("kvlab.lab.results.read_records", lambda path: [*made, failed])
    monkeypatch.setattr("sys.argv", ["kvlab", "show", str(tmp_path), f"--{form}"])
    assert cli.main() == 0
    out = capsys.readouterr().out
    first = made[0].quality.value + made[1].quality.value
    half = points(made)[0].half_width
    sign = "±" if form == "markdown" else r"$\pm$"
    assert f"{first / 2:.4f} {sign} {half:.4f}" in out
    assert out.count("h2o") == 2
    row = next(line for line in out.splitlines() if "knorm" in line or "h2o" in line)
    assert "KiB" in row
    assert ("failed: mha/mqar/seed" in out, "task: mqar" in out) == (True, True)
    assert ("a \\| b\\_c" in out) == (form == "markdown")
    if form == "markdown":
        assert len({line.count(" | ") for line in out.splitlines() if line.startswith("|")}) == 1


def test_a_folder_of_failures_alone_is_written_too():
    config = record(seed=0).config
    failed = Unfinished(run_id="bad", experiment="x", config=config, seed=0, status="failed", reason="no room")
    assert tables.written_records([failed], "markdown") == r"* failed: mha/mqar/seed0 [bad] no room"
    assert tables.written_records([failed], "latex") == "% failed: mha/mqar/seed0 [bad] no room"
