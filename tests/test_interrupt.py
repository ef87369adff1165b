"""Signals are requests: who asks how, what happens at the second time, and whose turn it is after all is saved."""

import os
import signal
import threading

import pytest

from kvlab import interrupt
from kvlab.interrupt import Interrupted, hand_over, stop_on_signals, sweep_stops_together

HANDLED = (*interrupt.STOPS, *interrupt.WARNINGS)


@pytest.fixture(autouse=True)
def handled():
    """Handlers of the test's own, and the signals that came to them; pytest's come back behind it."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are handled in the main thread")
    before, came = {number: signal.getsignal(number) for number in HANDLED}, []
    for number in HANDLED:
        signal.signal(number, lambda number, frame: came.append(number))
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupt._OWED.clear()


@pytest.mark.parametrize("number", HANDLED)
def test_each_signal_asks_to_stop(number, handled):
    with stop_on_signals() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name}; the same command resumes"):
            stop.check()
    assert handled == []


@pytest.mark.parametrize("number", interrupt.STOPS)
def test_a_second_stop_acts_as_before(number, handled):
    with stop_on_signals():
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert handled == [number]


def test_warnings_come_as_often_as_they_like_and_a_stop_after_them_still_saves(handled):
    with stop_on_signals() as stop:
        for number in (signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.reason == "SIGUSR2"
        assert handled == []
        signal.raise_signal(signal.SIGTERM)
    assert handled == [signal.SIGTERM]


def test_a_warning_has_its_turn_once_after_all_is_saved(handled):
    with stop_on_signals():
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR2)
    assert handled == []
    assert hand_over()
    assert handled == [signal.SIGUSR2]
    assert not hand_over()


def test_a_warning_that_nobody_else_handles_is_an_end_like_any_other(handled):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # which would kill this process
    with stop_on_signals():
        signal.raise_signal(signal.SIGUSR2)
    assert not hand_over()
    with stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert not hand_over()
    assert handled == []


def test_slurms_sigterm_saves_and_goes_on(handled, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        stop.check()
        assert stop.takes_save()
        assert not stop.takes_save()
        signal.raise_signal(signal.SIGTERM)
        assert stop.takes_save()
        signal.raise_signal(signal.SIGUSR2)
        assert stop.reason == "SIGUSR2"
    assert handled == []


@pytest.mark.parametrize("number", HANDLED)
def test_a_sweep_stops_as_a_whole_and_leaves_no_file(number, handled, tmp_path):
    with sweep_stops_together(tmp_path) as stop:
        assert stop.reason is None
        signal.raise_signal(number)
        assert stop.reason == "the sweep"
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    assert interrupt.STOP_FILE not in os.environ


def test_a_warned_run_of_a_sweep_here_stops_the_sweep(handled, tmp_path):
    """The sweep's own handler is the one that has its turn."""
    with sweep_stops_together(tmp_path) as sweep:
        with stop_on_signals() as run:
            signal.raise_signal(signal.SIGUSR1)
            assert run.reason == "SIGUSR1"
            assert sweep.reason is None
        assert hand_over()
        assert sweep.reason == "the sweep"
    assert handled == []
