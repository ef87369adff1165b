"""Deployments as a picture: what a sequence holds, how many fit, how fast they could be decoded."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.capacity.serving import Serving
from kvlab.files import write_atomic
from kvlab.lab.deployments import Deployment, frame_of
from kvlab.lab.styles import colours
from kvlab.memory.budgets import Context

LENGTHS = [2**power for power in range(7, 21)]


def write(folder: Path, found: Sequence[Deployment]) -> list[Path]:
    """capacity.csv and capacity.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "capacity.csv", folder / "capacity.png"]
    write_atomic(paths[0], frame_of(found).to_csv(index=False, float_format="%.6g"))
    draw(found).savefig(paths[1], dpi=130)
    return paths


def draw(found: Sequence[Deployment]) -> Figure:
    """One colour a deployment. Equal curves are one line that bears all their names; counts are dots with their number,
    since a bar would begin at nothing, which a log axis does not have."""
    figure = Figure(figsize=(15, 2.6 + max(2.0, 0.34 * len(found))), layout="constrained")
    grows, fits, speed = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    palette = colours(each.name for each in found)
    _draw_curves(grows, found, palette)
    contexts = sorted({each.answer.context_len for each in found if each.answer})
    at = f"{contexts[0]:,} tokens" if len(contexts) == 1 else "the context of each"
    _draw_dots(fits, found, [each.answer.users if each.answer else 0 for each in found], palette)
    fits.set(xlabel=f"sequences of {at} that fit", title="Users")
    _draw_dots(speed, found, [each.answer.decode_tokens_per_s if each.answer else 0 for each in found], palette)
    speed.set(xlabel="tokens/s, roofline", title="Decode")
    speed.set_yticklabels([])
    return figure


def _draw_curves(panel: Axes, found: Sequence[Deployment], palette: dict[str, str]) -> None:
    curves: dict[tuple[int, ...], list[str]] = {}
    for each in found:
        if sizes := _sizes(each):
            curves.setdefault(tuple(sizes), []).append(each.name)
    for sizes, members in curves.items():
        panel.loglog(LENGTHS, sizes, color=palette[members[0]], label="\n".join(members), linewidth=2)
    panel.set(xlabel="context, tokens", ylabel="state of one sequence, bytes", title="What is live of a sequence")
    panel.grid(alpha=0.3)
    if curves:
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def _sizes(each: Deployment) -> list[int]:
    """What stays of one sequence at each length, whose prompt has its share of the tokens; nothing where it does not
    fit."""
    answer = each.answer
    if answer is None:
        return []
    counted = Context(answer.context_len, answer.prompt_len)
    found = []
    for num_tokens in LENGTHS:
        context = Context(num_tokens, max(1, round(num_tokens * answer.prompt_len / answer.context_len)))
        serving = Serving.of(each.config, max(num_tokens, answer.context_len), counted)
        found.append(serving.logical_bytes(context))
    return found


def _draw_dots(panel: Axes, found: Sequence[Deployment], values: Sequence[float], palette: dict[str, str]) -> None:
    """A dot a deployment, with its number; in words where there is none."""
    panel.set_xscale("log")
    least = min((value for value in values if value), default=1.0)
    for row, (each, value) in enumerate(zip(found, values, strict=True)):
        panel.plot([value or least], [row], "o" if value else "", color=palette[each.name], markersize=8)
        words = f"{value:,.0f}" if value else f"does not fit: needs {each.needed_chips or 'too many'} chips"
        panel.annotate(words, (value or least, row), (7, 4), textcoords="offset points", fontsize=8)
    panel.set_yticks(range(len(found)), [each.name for each in found], fontsize=9)
    panel.set_ylim(len(found) - 0.5, -0.7)
    panel.margins(x=0.25)
    panel.grid(axis="x", alpha=0.3)
