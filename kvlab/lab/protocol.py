"""What tables and the report add to the points of a compression study: the ceiling, what is lost, turns and flips.

Each column exists because somebody was fooled without it: a score without its ceiling, a mean that hides what flipped,
a first question that every memory answers.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from kvlab.lab.ceilings import Ceilings
from kvlab.lab.compare import MEAN, Flips, Scored, flips, paired
from kvlab.lab.examples import ExamplesError
from kvlab.lab.record import AnyRecord, Done
from kvlab.lab.results import Point
from kvlab.schema import ConfigError

SHARE = " share"
"""Ends the heading of a part's share of the labels."""


def protocol_rows(found: Sequence[Point], records: Sequence[AnyRecord]) -> list[dict[str, Any]]:
    """What tables add to each point, by heading: its turns where some point has several, the parts of its labels and
    their shares where a task scores such apart, and where some memory is lossy the ceiling, whether that tells
    something, flips against it, and what else `Quality` shows; where some compression acted or might have, the share of
    tokens that it dropped. None: not known."""
    num_turns = max((len(point.turns) for point in found), default=0)
    is_lossy = any(point.is_lossy for point in found)
    done, ceilings = {record.run_id: record for record in records if isinstance(record, Done)}, Ceilings(records)
    compresses, rows = any(point.dropped is not None for point in found), []
    parts = list(dict.fromkeys(name for point in found for name in point.parts))
    for point in found:
        turns = [*point.turns, *[None] * (num_turns - len(point.turns))]
        row: dict[str, Any] = {f"turn {index}": value for index, value in enumerate(turns, 1)}
        for name in parts:
            part = point.parts.get(name)
            row |= {name: part and part.value, f"{name}{SHARE}": part and part.share}
        if is_lossy:
            row |= {"ceiling": point.ceiling, "tells": point.is_discriminative}
            row |= {name.replace("_", " "): value for name, value in point.fidelity.items()}
            flipped = point_flips([done[run_id] for run_id in point.run_ids], ceilings) if point.is_lossy else None
            row |= {"dropped": point.dropped} if compresses else {}
            row |= {
                "right to wrong": flipped.lost if flipped else None,
                "wrong to right": flipped.won if flipped else None,
                "labels": flipped.num_labels if flipped else None,
            }
        rows.append(row)
    return rows


def point_flips(runs: Sequence[Done], ceilings: Ceilings) -> Flips | None:
    """Labels that the full memory had right and these runs, the seeds of a point, have wrong, and the other way; over
    all slices and seeds.

    None where a ceiling or scores by example are not at hand: older runs have none, and a missing or damaged file is
    warned of.
    """
    full = [ceiling for run in runs if run.examples and (ceiling := ceilings.of(run)) and ceiling.examples]
    if len(full) < len(runs):
        return None
    try:
        pairs, _ = paired([Scored.of(ceiling) for ceiling in full], [Scored.of(run) for run in runs])
    except (ExamplesError, ConfigError) as error:
        warnings.warn(f"{error}; its flips are left out", RuntimeWarning, stacklevel=2)
        return None
    if len(pairs[0][0].examples) > 1:
        return flips(pairs, (MEAN, None))
    return flips(pairs, (next(iter(pairs[0][0].examples)), None))
