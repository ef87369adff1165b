"""One quantity is one figure, wherever it is printed: of a few tiny runs every bytes, quality and count is read off
every place that shows it, and the places must agree."""

import csv
import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from kvlab.cli import main
from kvlab.compose import compose
from kvlab.evaluation.measure import AXES
from kvlab.lab.ceilings import Ceilings
from kvlab.lab.choose import Runs
from kvlab.lab.compare import MEAN
from kvlab.lab.comparison_tables import compare_points
from kvlab.lab.evaluations import evaluations_of
from kvlab.lab.execute import execute
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.page import _heading
from kvlab.lab.plan import predict
from kvlab.lab.report import csv_name, write_report
from kvlab.lab.results import load, points, read_metrics, read_records
from kvlab.lab.tables import SIZES, as_cell
from kvlab.schema import ConfigError
from kvlab.units import human_bytes, readable

pytestmark = pytest.mark.slow
"""Of the runs, which all of these read."""

WORDS = ["debug=tiny", "model.model_dim=16", "task.vocab_size=32", "task.train=[16:2]", "task.train_weights=[1]",
         "task.test=[16:2,24:3]", "memory.page_size=4", "memory.chunk_len=4"]  # fmt: skip
SNAPKV = "memory.compression={type:snapkv,sinks:1,recent:2,window:2}"
RUNS = {
    "mha": [],
    "mha, seed 1": ["seed=1"],
    "swa16": ["mixer=swa16"],
    "mamba2_n16": ["mixer=mamba2_n16"],
    "hybrid": ["mixer=hybrid"],
    "mha int8": ["format=int8"],
    "mha snapkv 0.75": [SNAPKV, "budget=0.75"],
}


class Tables(HTMLParser):
    """Tables of a page by their id: a row is its cells by heading, each as (exact value, what is shown)."""

    def __init__(self, page):
        super().__init__()
        self.found, self._rows, self._heads, self._cell = {}, None, [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "table":
            self._rows = self.found.setdefault(given.get("id"), [])
            self._heads = []
        elif tag == "tr":
            self._row = []
        elif tag in ("th", "td"):
            self._cell = (given.get("data-value"), [])

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[1].append(data)

    def handle_endtag(self, tag):
        if tag in ("th", "td") and self._cell is not None:
            value, shown = self._cell
            (self._heads if tag == "th" else self._row).append(
                "".join(shown) if tag == "th" else (value, "".join(shown))
            )
            self._cell = None
        elif tag == "tr" and self._row:
            self._rows.append(dict(zip(self._heads, self._row, strict=True)))


@pytest.fixture(scope="module")
def folder(made_once):
    def make(folder):
        for words in RUNS.values():
            assert execute(compose([*WORDS, *words, f"results_dir={folder}"])) == "done"

    return made_once("figures", make) / "tiny"


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """What each place says, by point or run."""
    records = read_records(folder)
    output = tmp_path_factory.mktemp("report")
    write_report(folder, output)
    page = (output / "report.html").read_text()
    return {
        "records": {record.run_id: record for record in records},
        "points": {point.name: point for point in points(records)},
        "frame": load(folder).set_index("run_id"),
        "csv": {row["variant"]: row for row in table(output / "frontier.csv")},
        "page": {row["variant"][0]: row for row in Tables(page).found["points"]},
        "panels": {
            each["name"]: each
            for panel in json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])["tasks"]
            for each in panel["points"]
        },
    }


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def runs_of(found, point):
    return [found["records"][run_id] for run_id in point.run_ids]


def configs(folder):
    return [compose([*WORDS, *words, f"results_dir={folder.parent}"]) for words in RUNS.values()]


def test_bytes_of_a_sequence_agree(found):
    assert len(found["points"]) == len(RUNS) - 1
    for name, point in found["points"].items():
        first, *others = runs_of(found, point)
        row = found["frame"].loc[first.run_id]
        for axis in AXES:
            size, memory = point.bytes_per_sequence[axis], first.memory
            of_batch = 1 if axis == "read_bytes_per_token" else memory.batch_size
            assert size == getattr(memory, axis) / of_batch == row[f"per_sequence.{axis}"], (name, axis)
            assert getattr(memory, axis) == row[f"memory.{axis}"]
            assert size == float(found["csv"][name][csv_name(axis)]) == found["panels"][name]["bytes"][axis]
            assert found["page"][name][_heading(axis)] == (str(size), human_bytes(size))
            assert all(getattr(other.memory, axis) == getattr(memory, axis) for other in others)
        held = sum(layer["allocated_bytes"] for layer in memory.layers)
        assert held == sum(account["allocated"] for account in memory.accounts) == memory.allocated_bytes


def test_a_plan_foretells_what_records_say(folder, found):
    for config in configs(folder):
        record, plan = found["records"][config.run_id], predict(Laboratory.of(config, abstract=True))
        memory = record.memory
        assert plan.num_params == record.num_params
        assert plan.state_bytes == memory.pool_bytes
        assert plan.held_bytes * memory.batch_size == memory.allocated_bytes
        assert plan.peak_bytes * memory.batch_size == memory.held_peak_bytes
        assert plan.read_bytes_per_token == memory.read_bytes_per_token
        assert plan.temporaries_bytes == memory.temp_bytes
        assert plan.skipped == (record.lossy.skipped if record.lossy else plan.skipped)


def test_quality_and_counts_agree(found):
    for name, point in found["points"].items():
        runs, row, cells = runs_of(found, point), found["csv"][name], found["page"][name]
        value = sum(run.quality.value for run in runs) / len(runs)
        assert point.value == value == float(row["value"]) == found["panels"][name]["value"]
        assert cells["value"] == (str(value), readable(value))
        assert str(point.num_params) == row["num_params"] == cells["parameters"][0]
        assert str(point.num_seeds) == row["num_seeds"] == cells["seeds"][0]
        assert str(point.context_len) == row["context_len"] == cells["context"][0]
        assert str(point.batch_size) == row["batch_size"] == cells["batch"][0]
        for each, slices in point.slices.items():
            assert str(slices) == row[f"slice {each}"]
        for label in ("ceiling", "lost", "dropped"):
            assert cells[label][0] == row[label], label
        for run in runs:
            frame = found["frame"].loc[run.run_id]
            assert run.quality.value == frame["quality.value"]
            assert run.quality.value == sum(run.quality.slices.values()) / len(run.quality.slices)
            assert run.num_params == frame["num_params"] == point.num_params
            for speed, number in asdict(run.speed).items():
                assert frame[f"speed.{speed}"] == number or number is None
            config = run.config
            assert run.training.num_tokens == config["train"]["num_steps"] * config["train"]["batch_size"] * 16
            assert [each["step"] for each in read_metrics(run)][-1] == run.training.num_steps


def test_show_prints_what_records_say(folder, found, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kvlab", "show", str(folder), "--markdown"])
    assert main() == 0
    head, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    heads = [cell.strip() for cell in head.strip("|").split("|")]
    cells = [[cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in lines]
    rows = [dict(zip(heads, each, strict=True)) for each in cells]
    assert {row["variant"] for row in rows} == set(found["points"])
    for row in rows:
        point = found["points"][row["variant"]]
        value = as_cell(point.value) + ("" if point.half_width is None else f" ± {as_cell(point.half_width)}")
        assert row["value ± 95%"] == value
        for axis, heading in SIZES.items():
            assert row[heading] == human_bytes(point.bytes_per_sequence[axis])


def test_comparisons_and_ceilings_are_of_the_same_values(folder, found):
    words = ["mixer=mha,format=model,compression=none", "format=int8", "compression=snapkv"]
    ceilings = Ceilings(found["records"].values())
    for comparison in compare_points(Runs(folder), words):
        (cell,) = [each for each in comparison.cells if each.slice == MEAN]
        for value, run_ids in zip((cell.first, cell.second), comparison.run_ids, strict=True):
            (record,) = [found["records"][run_id] for run_id in run_ids]
            assert value == pytest.approx(record.quality.value, abs=1e-12)
            assert ceilings.of(record).quality.value == cell.ceilings[0]
        point = found["points"][comparison.names[1]]
        flips = [found["csv"][point.name][name] for name in ("right_to_wrong", "wrong_to_right", "labels")]
        assert list(map(float, flips)) == [cell.flips.lost, cell.flips.won, cell.flips.num_labels]


def test_best_and_plot_have_the_same_numbers(folder, found, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["kvlab", "best", "budget=1MiB", str(folder), "--json"])
    assert main() == 0
    best = json.loads(capsys.readouterr().out)["best"]
    point = found["points"][best["name"]]
    assert (best["value"], best["allocated_bytes"]) == (point.value, point.bytes_per_sequence["allocated_bytes"])
    words = ["--x", "per_sequence.allocated_bytes", "--y", "quality.value", "--save", str(tmp_path / "own.png")]
    monkeypatch.setattr("sys.argv", ["kvlab", "plot", str(folder), *words])
    assert main() == 0
    for row in table(tmp_path / "own.csv"):
        point = found["points"][row["point"]]
        assert float(row["per_sequence.allocated_bytes"]) == point.bytes_per_sequence["allocated_bytes"]
        assert float(row["quality.value"]) == found["records"][row["run_id"]].quality.value


def test_tensorboard_has_bytes_of_a_sequence(folder, found, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    from kvlab.lab.track import to_tensorboard

    for board in to_tensorboard(folder, tmp_path):
        (path,) = board.iterdir()
        said, content = {}, io.BytesIO(path.read_bytes())
        while header := content.read(12):
            event = Event.FromString(content.read(int.from_bytes(header[:8], "little")))
            content.read(4)
            said |= {value.tag: value.simple_value for value in event.summary.value}
        point = next(each for each in found["points"].values() if board.name[-10:] in each.run_ids)
        for axis, size in point.bytes_per_sequence.items():
            assert said[f"per_sequence/{axis}"] == size


def test_a_format_is_refused_for_a_finished_run_without_tokens(folder, found):
    (run,) = [record for record in found["records"].values() if record.config["mixer"]["name"] == "mamba2_n16"]
    with pytest.raises(ConfigError, match=r"memory\.format = 'int8': serves no layer of this model: it is of stored"):
        evaluations_of(folder / run.run_id, ["format=int8"])
    again = evaluations_of(folder / run.run_id, ["memory.page_size=8"])
    assert [config.run_id for config in again.configs] == [run.run_id]
    assert again.idle == ["mamba2_n16: memory.page_size = 8 changes nothing: no state of this model lies in pages"]
