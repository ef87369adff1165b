"""Finished runs for TensorBoard: the local files are the truth, this only copies them."""

import json
import warnings
from pathlib import Path

from kvlab.files import is_locked
from kvlab.lab.record import Done
from kvlab.lab.results import read_metrics, read_records
from kvlab.lab.trackers import SUFFIX, event_writer, flat, is_tuned, name_of, summary_of, values_of


def to_tensorboard(results: Path, output: Path) -> list[Path]:
    """Every run's metrics and final quality as TensorBoard event files, one folder a run; returns the folders. What an
    earlier copy left there, or the run itself (`track=tensorboard`), is replaced: no row is there twice. A run that is
    being worked on, and writes there, is left to itself, with a warning.

    Raises ImportError naming the extra when tensorboardX is missing, FileNotFoundError for a folder without runs, and
    OSError for a link in the place of a folder.
    """
    written = []
    for record in read_records(results):
        folder = output / name_of(record.config, record.run_id)
        before = [] if folder.is_symlink() else list(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
        if before and is_locked(Path(record.directory) / "lock"):
            warnings.warn(f"{folder}: left alone, its run is at work there", RuntimeWarning, stacklevel=2)
            continue
        for path in before:
            path.unlink(missing_ok=True)
        with event_writer(folder) as writer:
            writer.add_text("config", json.dumps(flat(record.config), indent=2))
            for row in read_metrics(record):
                values, _ = values_of(row, tuned=is_tuned(record.config))
                for name, value in values.items():
                    writer.add_scalar(name, value, row["step"])
            if isinstance(record, Done):
                for name, value in summary_of(record).items():
                    writer.add_scalar(name, value, record.training.num_steps)
        written.append(folder)
    return written
