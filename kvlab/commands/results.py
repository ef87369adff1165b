"""Commands that read results: show, report, plot, compare, best, track."""

import argparse

from kvlab.arguments import UsageError


def show(options: argparse.Namespace) -> int:
    """A folder of results as a table, one row a point; failed and cut runs below with their reasons. --markdown and
    --latex print it to be pasted."""
    from kvlab.lab.results import read_records
    from kvlab.lab.tables import print_records, written_records

    records = read_records(options.results)
    if options.form is None:
        print_records(records)
    else:
        print(written_records(records, options.form))
    return 0


def report(options: argparse.Namespace) -> int:
    """Writes the page, the pictures and the data of a folder of results."""
    from kvlab.lab.report import write_report

    for path in write_report(options.results, options.output or options.results):
        print(path)
    return 0


def plot(options: argparse.Namespace) -> int:
    """Draws any column of results against any other; runs of other tasks, contexts or batches have a panel each."""
    from kvlab.lab.own_plots import write

    for path in write(options):
        print(path)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Paired differences between points of one task, by slice and turn: each with the first. 95% intervals are drawn
    over seeds and examples; flips are of labels; ceilings are found among the runs at hand."""
    from kvlab.lab.choose import Runs
    from kvlab.lab.comparison_tables import compare_points, printed

    if len(options.runs) < 2:
        raise UsageError("kvlab compare: give at least two runs; see kvlab compare --help")
    runs = Runs(options.results)
    print(printed(compare_points(runs, options.runs, floor=options.floor), options.form))
    return 0


def best(options: argparse.Namespace) -> int:
    """The best quality whose held bytes a sequence fit a budget, and the least bytes that reach a quality, of results
    at hand; 1 if nothing does."""
    import json

    from kvlab.lab.best import as_data, as_text, ask

    said = ask(options.words)
    print(json.dumps(as_data(said), indent=2) if options.form == "json" else as_text(said))
    return 0 if said.is_found else 1


def track(options: argparse.Namespace) -> int:
    """Copies a folder of results for TensorBoard."""
    from kvlab.lab.track import to_tensorboard

    for folder in to_tensorboard(options.results, options.output or options.results / "tensorboard"):
        print(folder)
    return 0
