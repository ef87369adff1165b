"""A window's pieces, rehearsed: what they say, how it is put beside the peer, and vmapped training beside one
member."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_training, on_gpu
from benchmarks.gpu_peer import leading_share
from benchmarks.gpu_profile import told
from kvlab.random import named_key
from kvlab.training.step import init_state
from pallas_kernels.bench.record import read

ROOT = Path(__file__).resolve().parents[1]


def line(kind, name, **answer):
    return {"kind": kind, "name": name, "outcome": "done", "answer": answer}


def test_ours_stands_beside_the_best_of_the_peers():
    lines = [
        line("decode", "1b", batches={"1": {"tokens_per_s": 300.0, "of_floor": 0.5}, "8": {"tokens_per_s": 2000.0}}),
        line("peer decode", "1b", batches={"1": {"tokens_per_s": 100.0, "share_of_tokens_equal_to_ours": 0.75}}),
        line("requests", "1b", tokens_per_s=600.0, of_floor=0.25),
        line("peer requests", "1b", ways={"manager": {"tokens_per_s": 300.0}, "grouped": {"tokens_per_s": 200.0}}),
        line("requests", "31m", tokens_per_s=50.0),
        line("peer requests", "31m", missing="not installed: torch"),
        {"kind": "decode", "name": "31m", "outcome": "timeout"},
    ]
    rows = {row.pop("what"): row for row in on_gpu.summary(lines)}
    same_tokens = {name: row.pop("same_tokens") for name, row in rows.items() if name.startswith("decode")}
    assert same_tokens == {"decode 1b B1": 0.75, "decode 1b B8": None}
    assert rows == {
        "decode 1b B1": {"tokens_per_s": 300.0, "peer_tokens_per_s": 100.0, "ratio": 3.0, "of_floor": 0.5},
        "decode 1b B8": {"tokens_per_s": 2000.0, "peer_tokens_per_s": None, "ratio": None, "of_floor": None},
        "requests 1b": {"tokens_per_s": 600.0, "peer_tokens_per_s": 300.0, "ratio": 2.0, "of_floor": 0.25},
        "requests 31m": {"tokens_per_s": 50.0, "peer_tokens_per_s": None, "ratio": None, "of_floor": None},
    }  # fmt: skip


def test_answers_are_compared_up_to_their_first_difference():
    assert leading_share([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert leading_share([[1, 2], [5, 6]], [[1, 2], [7, 6]]) == 0.5
    assert leading_share([[1, 2]], [[1, 2]]) == 1.0


def test_every_peer_follows_what_it_is_compared_with():
    labels = [(task.label, task.model) for task in on_gpu.TASKS]
    assert len(set(labels)) == len(labels)
    for place, (kind, model) in enumerate(labels):
        if kind.startswith("peer "):
            assert (kind.removeprefix("peer "), model) in labels[:place]


def run_window(tmp_path, *options):
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--size", "tiny", "--output", str(tmp_path / "out.jsonl")]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    return done, read(tmp_path / "out.jsonl")


def test_a_window_leaves_lines_and_goes_on_where_it_stopped(tmp_path):
    done, lines = run_window(tmp_path, "--only", "ceilings")
    assert done.returncode == 0, done.stderr
    assert [line["kind"] for line in lines] == ["header", "ceilings", "summary"]
    assert {"device", "platform", "versions", "size", "code", "date", "budget_s"} <= set(lines[0])
    assert lines[1]["answer"]["read_bytes_per_s"] > 0
    done, lines = run_window(tmp_path, "--only", "ceilings", "--resume")
    assert [line["kind"] for line in lines[3:]] == ["resumed", "summary"], "what is known is not measured again"


@pytest.mark.slow
def test_a_rehearsal_of_decoding_and_requests(tmp_path):
    done, lines = run_window(tmp_path, "--only", "31m", "--scratch", str(tmp_path / "scratch"))
    assert done.returncode == 0, done.stderr
    answers = {(line["kind"], line["name"]): line["answer"] for line in lines if "answer" in line}
    agreed = answers["agree", "31m"]
    assert agreed["error_through_pages"] < 1.2 * agreed["error_of_parallel_form"] < 0.02
    assert answers["decode", "31m"]["batches"]["2"]["implementations"]["paged_attention"] == "blocked"
    assert answers["requests", "31m"]["tokens_per_s"] > 0
    peer = answers["peer decode", "31m-float32"]
    assert "missing" in peer or peer["batches"]["1"]["share_of_tokens_equal_to_ours"] == 1.0
    tokens = json.loads((tmp_path / "scratch" / "tokens-31m-1.json").read_text())
    assert len(tokens) == 1


@pytest.mark.slow
def test_members_trained_together_are_what_each_is_alone():
    amount = gpu_training.AMOUNTS["tiny"]
    labs = [gpu_training.laboratory("tiny", seed) for seed in (0, 1)]
    step_fn, data = labs[0].train_step(), labs[0].task.train_data()
    knobs = jnp.full(amount.num_steps, amount.pairs, jnp.int32)
    members = [(lab, rate) for lab in labs for rate in amount.rates]
    keys = [named_key(lab.config.seed, "train") for lab, _ in members]

    def fresh(lab, rate):
        return init_state(jax.tree.map(jnp.copy, lab.model.params), step_fn.optimizer, rate)

    given = data, jnp.stack(keys), knobs, amount.length, jnp.ones(len(members), jnp.bool_)
    states, metrics = step_fn.together(gpu_training.stacked([fresh(*member) for member in members]), *given)
    assert metrics["loss"].shape == (len(members), amount.num_steps)
    for index, member in enumerate(members):
        alone, own = step_fn(fresh(*member), data, keys[index], knobs, amount.length)
        np.testing.assert_allclose(metrics["loss"][index], own["loss"], rtol=1e-5)
        mine = jax.tree.map(lambda leaf, index=index: leaf[index], states.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine, alone.params)


def test_a_profile_says_of_a_step_what_was_busy_and_what_waited():
    events = [(0.0, 10.0, "a"), (10.5, 4.0, "b"), (24.5, 10.0, "a"), (30.0, 2.0, "c"), (34.6, 1.0, "b")]
    found = told(events, 2)
    assert (found["busy_us"], found["launches"], found["waits"], found["waited_us"]) == (12.5, 2.5, 0.5, 5.0)
    assert set(told([], 2)) == {"missing"}
    assert found["kernels"] == [
        {"name": "a", "launches": 1.0, "us": 10.0},
        {"name": "b", "launches": 1.0, "us": 2.5},
        {"name": "c", "launches": 0.5, "us": 1.0},
    ]
