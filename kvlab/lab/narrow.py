"""Tables that fit a terminal: what all rows have in common stands above, what finds no room is named below."""

from collections.abc import Collection, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from kvlab.terminal import as_is

GAP = 2
"""Blanks between two columns."""
UNKNOWN = "-"
"""A cell of which nothing is known."""

type Row = Mapping[str, str]


def print_rows(
    console: Console, rows: Sequence[Row], *, kept: Collection[str], spare: Sequence[str] = (), title: str = ""
) -> None:
    """Rows by heading, a line each. Columns that are not `kept` and are equal in all rows are said above, or left out
    where nothing is known. Where the console is too narrow, columns of `spare` are left out, the first ones first, and
    named below."""
    names, said = parted(rows, kept)
    left_out: list[str] = []
    for name in spare:
        if _width(rows, names) <= console.width:
            break
        if name in names:
            names.remove(name)
            left_out.append(name)
    for line in (title, said):
        if line:
            console.print(as_is(line))
    console.print(_table(rows, names))
    if left_out:
        console.print(as_is(f"no room at {console.width} columns: {', '.join(left_out)}"))


def parted(rows: Sequence[Row], kept: Collection[str]) -> tuple[list[str], str]:
    """The columns that tell rows apart or are `kept`, and in words what is equal in all of them and known."""
    common = {name: text for name, text in rows[0].items() if all(row[name] == text for row in rows)}
    names = [name for name in rows[0] if name in kept or name not in common]
    return names, ", ".join(f"{n}: {text}" for n, text in common.items() if n not in kept and text != UNKNOWN)


def _widths(rows: Sequence[Row], names: Sequence[str]) -> list[int]:
    return [max(cell_len(text) for text in (name, *(row[name] for row in rows))) for name in names]


def _width(rows: Sequence[Row], names: Sequence[str]) -> int:
    """Columns of the terminal that a table takes."""
    return sum(_widths(rows, names)) + GAP * (len(names) - 1)


def _table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Words to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for name in names:
        is_number = all(row[name][:1] in "+-[" or row[name][:1].isdigit() for row in rows)
        table.add_column(as_is(name), justify="right" if is_number and name != names[0] else "left")
    for row in rows:
        table.add_row(*(as_is(row[name]) for name in names))
    return table


def flips_of(row: Row, lost: str, won: str, count: str) -> str:
    """Three columns as one: "-3 +1 of 256"."""
    return UNKNOWN if UNKNOWN in (row[lost], row[count]) else f"-{row[lost]} +{row[won]} of {row[count]}"
