"""Pictures of what one chooses, and the frame that they are drawn from."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import kvlab
from kvlab.cli import main
from kvlab.lab.axes import ByteLocator, axis_label, bytes_in_words
from kvlab.lab.own_plots import plot
from kvlab.schema import ConfigError
from tests.lab.test_report import measured_at
from tests.lab.test_results import record, write


@pytest.fixture
def results(tmp_path):
    made = [measured_at(record("mha", seed, 0.9 + seed / 100, 8000), 256) for seed in range(3)]
    made += [measured_at(record("mqa", 0, 0.8, 2000), 256), measured_at(record("mqa", 0, 0.7, 4000), 512)]
    made += [measured_at(record("mha", 0, 2.5, 8000, "text", "bits_per_byte"), 256)]
    return write(tmp_path / "results", *made)


def test_the_frame_parts_configuration_from_measurement(results):
    frame = kvlab.load(results)
    varied, measured = frame.attrs["varied"], frame.attrs["measured"]
    assert varied[:3] == ["mixer.name", "task.type", "seed"]
    assert set(varied) | set(measured) | set(frame.attrs["constant"]) == set(frame)
    assert {"quality.value", "per_sequence.allocated_bytes"} <= set(measured)
    first = frame[frame.point == "mqa context_len=256"].iloc[0]
    assert first["memory.allocated_bytes"] == 4000
    assert first["per_sequence.allocated_bytes"] == 2000


def test_seeds_are_one_mark_and_other_contexts_and_tasks_have_their_panel(results):
    axes = plot(kvlab.load(results), "memory.allocated_bytes", "quality.value", color="mixer.name", figure=Figure())
    assert [axis.get_title() for axis in axes] == [
        "task=mqar, memory.context_len=256", "task=mqar, memory.context_len=512", "task=text, memory.context_len=256",
    ]  # fmt: skip
    drawn = {len(axis.containers) for axis in axes}
    assert drawn == {2, 1}
    (mha,) = [bar for bar in axes[0].containers if np.allclose(bar.lines[0].get_ydata(), 0.91)]
    assert mha.has_yerr
    assert mha.lines[0].get_xdata().tolist() == [16_000]
    assert axes[0].get_xlabel() == "allocated bytes, whole batch"
    assert [axis.get_ylabel() for axis in axes] == ["accuracy", "accuracy", "bits per byte"]


def test_what_the_picture_shows_is_no_panel(results):
    frame = kvlab.load(results)
    frame = frame[frame["task.type"] == "mqar"]
    (axis,) = plot(frame, "measure.context_len", "value", color="mixer", figure=Figure(), lines=True)
    assert axis.get_xlabel() == "context, tokens"


def test_two_metrics_never_share_an_axis(results):
    """Not even where the picture shows the tasks by colour."""
    axes = plot(kvlab.load(results), color="task", marker="memory.context_len", figure=Figure())
    assert [axis.get_ylabel() for axis in axes] == ["accuracy", "bits per byte"]
    assert {axis.get_xlabel() for axis in axes} == {"allocated bytes per sequence (pages held)"}


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("quality.value", "bits per byte"),
        ("quality.parallel_value", "bits per byte, parallel form"),
        ("quality.lost", "bits per byte lost to the memory"),
        ("quality.128:32", "bits per byte, 128:32"),
        ("quality.text recall share", "share of the labels, text recall"),
        ("per_sequence.read_bytes_per_token", "bytes of memory read for a decoded token"),
        ("memory.held_peak_bytes", "held peak bytes, whole batch"),
        ("speed.train_step_ms", "training step, ms (median)"),
        ("mixer.W.window", "mixer.W.window, tokens"),
        ("task.seq_len", "task.seq_len, tokens"),
        ("mixer.M.state_dim", "mixer.M.state_dim"),
    ],
)
def test_labels_name_metrics_and_units(column, said):
    assert axis_label(column, "bits_per_byte") == said


def test_byte_ticks_are_round_however_near_their_ends():
    at = ByteLocator()
    assert [bytes_in_words(each) for each in at.tick_values(5000, 70_000)] == ["8 KiB", "16 KiB", "32 KiB", "64 KiB"]
    assert [bytes_in_words(each) for each in at.tick_values(51.5 * 1024, 64.5 * 1024)] == [
        "52 KiB", "54 KiB", "56 KiB", "58 KiB", "60 KiB", "62 KiB", "64 KiB",
    ]  # fmt: skip
    assert len(at.tick_values(1, 2.0**60)) <= 8
    linear = ByteLocator(is_log=False)
    assert [bytes_in_words(each) for each in linear.tick_values(0, 3e6)] == [
        "0 B", "512 KiB", "1 MiB", "1.5 MiB", "2 MiB", "2.5 MiB",
    ]  # fmt: skip


def test_columns_that_are_not_there_are_answered_with_the_nearest(results):
    frame = kvlab.load(results)
    with pytest.raises(ConfigError, match=r"column = 'quality.valu': no such column; did you mean quality.value"):
        plot(frame, "num_params", "quality.valu", figure=Figure())
    with pytest.raises(ConfigError, match=r"column = 'mixer.name': must have numbers"):
        plot(frame, "mixer", "quality.value", figure=Figure())
    with pytest.raises(ConfigError, match="is ambiguous; legal: "):
        plot(frame, "allocated_bytes", "quality.value", figure=Figure())


def test_the_command_saves_a_picture_and_its_data(results, tmp_path, monkeypatch, capsys):
    backend = matplotlib.get_backend()
    words = ["plot", str(results), "--y", "value", "--color", "mixer.name", "--facet", "task", "--filter", "task=mqar"]
    monkeypatch.setattr("sys.argv", ["kvlab", *words, "--save", str(tmp_path / "made" / "own.pdf")])
    assert main() == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "made" / f"own.{kind}") for kind in ("pdf", "csv")]
    assert (tmp_path / "made" / "own.pdf").read_bytes().startswith(b"%PDF")
    data = pd.read_csv(tmp_path / "made" / "own.csv")
    assert len(data) == 5
    assert set(data["per_sequence.allocated_bytes"]) == {8000, 2000, 4000}
    assert matplotlib.get_backend() == backend
    monkeypatch.setattr("sys.argv", ["kvlab", *words, "--save", str(tmp_path / "own.gif")])
    assert main() == 2
    assert "must end in .png, .pdf or .svg" in capsys.readouterr().err
