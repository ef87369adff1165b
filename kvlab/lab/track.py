"""Finished runs for other viewers: the local files are the truth, this only copies them."""

import json
import re
from pathlib import Path

from kvlab.evaluation.measure import per_sequence
from kvlab.lab.labels import flatten
from kvlab.lab.record import Done
from kvlab.lab.results import read_metrics, read_records


def to_tensorboard(results: Path, output: Path) -> list[Path]:
    """Every run's metrics and final quality as TensorBoard event files, one folder a run; returns the folders.

    Raises ImportError naming the extra when tensorboardX is missing, FileNotFoundError for a folder without runs, and
    OSError for a link in the place of a folder.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError("kvlab track needs the extra: pip install 'kvlab[track]'") from None
    written = []
    for record in read_records(results):
        folder = output / re.sub(r"[^\w.\-]", "_", f"{record.config['mixer']['name']}-{record.run_id}")[:200]
        if folder.is_symlink():
            raise OSError(f"{folder}: is a link, which might lead out of {output}")
        with SummaryWriter(str(folder)) as writer:
            writer.add_text("config", json.dumps(flatten(record.config, ""), indent=2))
            for row in read_metrics(record):
                for name in ("loss", "grad_norm", "validation"):
                    if name in row:
                        writer.add_scalar(f"lr_{row['learning_rate']:g}/{name}", row[name], row["step"])
            if isinstance(record, Done):
                steps = record.training.num_steps
                writer.add_scalar(f"quality/{record.quality.metric}", record.quality.value, steps)
                for axis, size in per_sequence(record.memory).items():
                    writer.add_scalar(f"per_sequence/{axis}", size, steps)
        written.append(folder)
    return written
