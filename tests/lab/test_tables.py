"""Tables in a terminal: no row is taller than a line, whatever its width, and nothing is left out unsaid."""

from dataclasses import replace

import pytest
from rich.console import Console

from kvlab.evaluation.measure import SpeedReport
from kvlab.evaluation.verify import EXACT, in_short
from kvlab.lab import comparison_tables, tables
from kvlab.lab.narrow import print_rows
from kvlab.lab.protocol import protocol_rows
from kvlab.lab.record import Lossy, Quality
from kvlab.lab.report import frontier_frame
from kvlab.lab.results import load, points
from kvlab.lab.tables import print_records
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
