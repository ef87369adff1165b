"""Each worker of a sweep has a card, or a share of one, before JAX opens it; what the user has set stays."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from kvlab.compose import compose
from kvlab.lab import cards, provenance
from kvlab.lab.cards import Share, shares, take_share, variables, visible
from kvlab.lab.sweeps import has_workers
from tests.lab.small import SMALL


@pytest.fixture
def listing(tmp_path, monkeypatch):
    """A function that has this machine list so many cards, and no more."""

    def list_cards(number):
        lines = "\n".join(f"GPU {each}: NVIDIA H100 (UUID: GPU-{each})\n  MIG 1g Device 0:" for each in range(number))
        command = tmp_path / "bin" / "nvidia-smi"
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
        for name in ("JAX_PLATFORMS", cards.VISIBLE, *cards.OF_MEMORY):
            monkeypatch.delenv(name, raising=False)

    return list_cards


@pytest.mark.parametrize(
    ("names", "num_workers", "expected"),
    [
        ("01", 1, [Share("0")]),
        ("01", 2, [Share("0"), Share("1")]),
        ("01", 4, [Share("0", 0.45), Share("1", 0.45), Share("0", 0.45), Share("1", 0.45)]),
        ("01", 3, [Share("0", 0.45), Share("1"), Share("0", 0.45)]),
        ("7", 3, [Share("7", 0.3)] * 3),
        ("", 3, []),
    ],
)
def test_workers_have_cards_in_turn_and_those_of_a_card_as_much_of_it(names, num_workers, expected):
    assert shares(list(names), num_workers) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "2, 5"}, ["2", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1f,MIG-2e"}, ["GPU-1f", "MIG-2e"]),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ({"JAX_PLATFORMS": "cpu"}, []),
        ({"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "3"}, ["3"]),
    ],
)
def test_the_cards_are_those_that_the_user_leaves(environment, expected, tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    monkeypatch.setattr(cards, "PROC", tmp_path)
    assert visible({"PATH": "/nowhere", **environment}) == expected


def test_a_machine_without_a_driver_has_no_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "PROC", tmp_path / "nowhere")
    assert visible({"PATH": "/nowhere"}) == []


def test_what_the_user_says_of_memory_stays():
    share = Share("1", 0.45)
    assert variables(share, {}) == {"CUDA_VISIBLE_DEVICES": "1", "XLA_CLIENT_MEM_FRACTION": "0.45"}
    assert variables(Share("1"), {}) == {"CUDA_VISIBLE_DEVICES": "1"}
    for name in cards.OF_MEMORY:
        assert variables(share, {name: "x"}) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_process_that_is_no_worker_takes_nothing(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv(cards.VISIBLE, "0,1")
    assert take_share(2) is None
    assert os.environ[cards.VISIBLE] == "0,1"


def test_who_leads_workers_holds_nothing_beforehand(monkeypatch):
    for name in ("JAX_PLATFORMS", *cards.OF_MEMORY):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    for names in ("", "0"):
        monkeypatch.setenv(cards.VISIBLE, names)
        cards.leave_memory_to_workers()
        found = {name: os.environ[name] for name in (cards.PREALLOCATE, cards.LEADS) if name in os.environ}
        assert found == ({cards.PREALLOCATE: "false", cards.LEADS: "1"} if names else {})
    for name in {cards.PREALLOCATE, cards.LEADS} - before.keys():
        del os.environ[name]
    monkeypatch.setenv(cards.FRACTION, "0.3")
    cards.leave_memory_to_workers()
    assert cards.PREALLOCATE not in os.environ


@pytest.mark.parametrize(("platform", "said"), [("gpu", {"cards": "1", "memory_fraction": "0.45"}), ("cpu", {})])
def test_a_record_says_which_card_it_was(platform, said, monkeypatch):
    config = compose(SMALL)
    device = SimpleNamespace(platform=platform, device_kind="a kind")
    monkeypatch.setattr(provenance, "jax", SimpleNamespace(devices=lambda: [device], device_count=lambda: 1))
    monkeypatch.setattr(os, "environ", {**os.environ, **variables(Share("1", 0.45), {})})
    found = provenance.provenance(config).device
    assert {name: found[name] for name in ("cards", "memory_fraction") if name in found} == said


@pytest.mark.parametrize(
    ("words", "multirun", "expected"),
    [
        ("launcher=joblib", True, True),
        ("launcher=joblib", False, False),
        ("+experiment=demo", False, True),
        ("experiment=demo launcher=basic", True, False),
        ("experiment=paged_waste,demo", True, True),
        ("mixer=mha", True, False),
        ("launcher=submitit_local", True, False),
    ],
)
def test_words_and_experiments_say_whether_there_are_workers(words, multirun, expected):
    assert has_workers(words.split(), multirun) is expected


def _as_worker(num_jobs):
    """What a worker has after `take_share`, while others have theirs."""
    share = take_share(num_jobs)
    time.sleep(1)
    names = (cards.VISIBLE, cards.FRACTION, cards.PREALLOCATE, cards.LEADS)
    return os.getpid(), share, {name: os.environ[name] for name in names if name in os.environ}


def test_real_workers_take_each_their_share(listing, monkeypatch):
    """Three workers on two cards: two share the first. One that is killed leaves its place to the next."""
    joblib = pytest.importorskip("joblib")
    listing(2)
    monkeypatch.setenv(cards.NUM_RUNS, "9")
    monkeypatch.setenv(cards.PREALLOCATE, "false")  # of the process that leads, as `leave_memory_to_workers` has it
    monkeypatch.setenv(cards.LEADS, "1")
    expected = {("0", "0.45"): 2, ("1", None): 1}
    for _ in range(2):
        with joblib.Parallel(n_jobs=3, backend="loky") as parallel:
            found = parallel(joblib.delayed(_as_worker)(3) for _ in range(3))
        assert Counter((each[cards.VISIBLE], each.get(cards.FRACTION)) for _, _, each in found) == expected
        assert not any({cards.PREALLOCATE, cards.LEADS} & each.keys() for _, _, each in found)
        os.kill(found[0][0], signal.SIGKILL)
        time.sleep(1)


def test_a_sweep_gives_its_workers_cards_before_jax_opens_one(listing, tmp_path):
    """Two runs of three jobs side by side: each has a card of its own, since there are no more runs."""
    listing(2)
    words = [*SMALL, "launcher=joblib", "hydra.launcher.n_jobs=3", "seed=0,1", f"results_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "kvlab", "run", "-m", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line.split(" has ")[1] for line in done.stderr.splitlines() if line.startswith("kvlab: worker ")]
    assert said  # one, where it was done with both before the other had begun
    assert set(said) <= {"card 0", "card 1"}
    assert len(set(said)) == len(said)


def test_a_worker_has_no_device_before_its_first_job():
    code = "import kvlab.lab.launch; from jax._src import xla_bridge; assert not xla_bridge._backends"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
