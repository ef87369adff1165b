"""Tables to be pasted: Markdown, and LaTeX with booktabs' rules. Every cell reads as it does in a terminal."""

import re
from collections.abc import Collection, Iterable, Sequence

from kvlab.lab.narrow import UNKNOWN, Row, parted

FORMS = ("markdown", "latex")
_MARKDOWN = re.compile(r"([\\`*_<>|~$&]|\](?=[\[(:]))")
"""What Markdown, GitHub's with formulas, may take for a sign of its own. Brackets alone are none."""
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "'": "{'}"}
LATEX |= {mark: rf"\{mark}" for mark in "&%$#_{}"}
_NEGATIVE = re.compile(r"(?<![\w.])-(?=\d)")
_MINUS = "\N{MINUS SIGN}"


def written(
    form: str, title: str, rows: Sequence[Row], *, kept: Collection[str] = (), below: Sequence[str] = ()
) -> str:
    """Rows by heading as "markdown" or "latex", with what all of them have in common, unless it is `kept`, and the
    title above, and other lines below: paragraphs and a list in Markdown, comments in LaTeX."""
    names, said = parted(rows, kept) if rows else ([], "")
    lines = [[row[name] for name in names] for row in rows]
    how = {"markdown": _markdown, "latex": _latex}[form]
    return how([line for line in (title, said) if line], names, lines, below)


def _markdown(above: Sequence[str], names: Sequence[str], lines: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    numbers = [_is_number([line[place] for line in lines]) for place in range(len(names))]
    rule = ["---:" if is_number and place else "---" for place, is_number in enumerate(numbers)]
    table = (
        [_row(map(in_markdown, names)), _row(rule), *(_row(map(in_markdown, line)) for line in lines)] if names else []
    )
    parts = [*map(in_markdown, above), "\n".join(table), "\n".join(f"* {in_markdown(line)}" for line in below)]
    return "\n\n".join(filter(None, parts))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def in_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return _MARKDOWN.sub(r"\\\1", _one_line(text))


def _latex(above: Sequence[str], names: Sequence[str], lines: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    """A tabular; what is said above and below are comments."""
    parts = [f"% {_one_line(line)}" for line in above]
    if names:
        numbers = [_is_number([line[place] for line in lines]) for place in range(len(names))]
        columns = "".join("r" if is_number and place else "l" for place, is_number in enumerate(numbers))
        head, *body = [" & ".join(map(in_latex, line)) + r" \\" for line in (names, *lines)]
        parts += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        parts.append(r"\end{tabular}")
    return "\n".join([*parts, *(f"% {_one_line(line)}" for line in below)])


def in_latex(text: str) -> str:
    """Text that LaTeX prints as it is; a minus before a number is one, and what is not known is a dash."""
    if text == UNKNOWN:
        return "--"
    marked = _NEGATIVE.sub(_MINUS, _one_line(text))
    guard = "{}" if marked.startswith("[") else ""  # behind the end of a row it would be an option of that
    return guard + "".join("$-$" if mark == _MINUS else LATEX.get(mark, mark) for mark in marked)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_number(cells: Sequence[str]) -> bool:
    """Whether a column is of numbers, which stand to the right."""
    return all(cell == UNKNOWN or cell[:1].isdigit() or cell[:1] in "+-[" for cell in cells)
