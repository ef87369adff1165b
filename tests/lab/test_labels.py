"""Names of runs and points: what a memory drops, rounds and passes over is always said, what else differs beside it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvlab.capacity.config import ServingMemory
from kvlab.compose import compose
from kvlab.engine.config import Stats
from kvlab.lab import launch
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.labels import deployment_labels, point_labels, run_labels
from kvlab.lab.live import summary
from kvlab.lab.plan import Plan
from kvlab.lab.record import Unfinished
from kvlab.lab.report import render_page
from kvlab.lab.results import points
from kvlab.lab.tables import print_plans, print_records
from kvlab.memory.naming import words_of
from kvlab.schema import to_plain
from kvlab.units import counted
from tests.lab.test_results import QUEST, SNAPKV, held, record

PYRAMID = {"type": "knorm", "recent": 8, "layers": "pyramid"}


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({}, []),
        ({"compression": None, "budget": None, "format": "model", "selection": None}, []),
        ({"compression": "none", "format": "model", "selection": {"type": "all"}}, []),
        ({"compression": SNAPKV, "budget": 0.25, "format": "kivi4"}, ["snapkv 0.25", "kivi4"]),
        ({"compression": SNAPKV, "budget": 96, "selection": QUEST}, ["snapkv 96", "quest"]),
        ({"format": "int8", "selection": QUEST}, ["int8", "quest"]),
    ],
)
def test_a_memory_in_words(memory, words):
    assert words_of(memory) == words


def test_a_compressed_run_that_has_no_equal_is_named_all_the_same():
    """One hybrid run beside full ones of another variant, one run alone, and a filter that leaves one budget."""
    full = [record("gqa", seed, **held()) for seed in (0, 1)]
    assert [point.name for point in points([*full, record("hybrid", **held(PYRAMID, 0.5))])] == [
        "gqa",
        "hybrid knorm 0.5",
    ]
    assert [point.name for point in points([record("gqa", **held(SNAPKV, 0.5, format="kivi4"))])] == [
        "gqa snapkv 0.5 kivi4"
    ]
    budgets = [record("mha", **held(SNAPKV, budget)) for budget in (0.25, 0.5)]
    assert sorted(point.name for point in points(budgets)) == ["mha snapkv 0.25", "mha snapkv 0.5"]


def test_fields_are_named_as_far_as_they_tell():
    """A field of another method needs no section; one that compression and selection both have does."""
    other = {"type": "h2o", "window": 1}
    named = point_labels([record(**held(method, 64)).config for method in (SNAPKV, {**SNAPKV, "window": 8}, other)])
    assert named == ["mha snapkv 64 window=32", "mha snapkv 64 window=8", "mha h2o 64"]
    chosen = {"type": "recency", "window": 3}
    both = [record(**held({**SNAPKV, "window": size}, 64, selection=chosen)).config for size in (8, 16)]
    assert point_labels(both) == [f"mha snapkv 64 recency snapkv.window={size}" for size in (8, 16)]


def test_runs_of_a_sweep_are_told_apart(capsys):
    """In a plan, on the line that each ends with, and one alone by its own label."""
    swept = ["selection=all", "selection=quest", "selection=recency", "format=int8", "memory.page_size=8"]
    configs = [compose(["task=text", word]) for word in swept]
    labels = run_labels([config.as_dict() for config in configs])
    head = "mha/text/seed0"
    assert labels == [
        *(f"{head}{words} page_size=16" for words in ("", " quest", " recency", " int8")),
        f"{head} page_size=8",
    ]
    assert [config.label for config in configs] == [head, f"{head} quest", f"{head} recency", f"{head} int8", head]
    plan = Plan(7, 1, 1, 1, 1, 1, 2.0, "h100", 80, {}, 1, 1.0, 1, skipped={"0.ssm": "it is recurrent"})
    print_plans([(config, plan) for config in configs])
    out = capsys.readouterr().out
    assert "5 runs of 1 training, " in out
    for config, label in zip(configs, labels, strict=True):
        assert [label in line for line in out.splitlines() if line.startswith(config.run_id)] == [True]
        assert f"{label} [{config.run_id}]: 0.ssm left as computed" in out


def test_a_run_of_a_sweep_ends_with_its_name(capsys, monkeypatch, tmp_path):
    configs = [compose([f"memory.page_size={size}", f"results_dir={tmp_path}"]) for size in (8, 16)]
    monkeypatch.setattr(launch, "execute", lambda config, beside, trains: "done")
    monkeypatch.setattr(launch, "_LABELS", {})
    monkeypatch.setattr(launch, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(launch, "through_hydra", lambda words: [launch.execute_one(config) for config in configs])
    launch.run_sweep(configs, [])
    said = capsys.readouterr().err
    for config, size in zip(configs, (8, 16), strict=True):
        assert f"mha/mqar/seed0 page_size={size} [{config.run_id}] done, in {config.run_dir}" in said
    compressed = compose(["compression=snapkv", "budget=48", f"results_dir={tmp_path}"])
    launch.execute_one(compressed)
    assert f"mha/mqar/seed0 snapkv 48 [{compressed.run_id}] done" in capsys.readouterr().err


def test_unfinished_runs_provenance_and_curves_are_named(capsys, tmp_path):
    done = replace(record("gqa", **held(SNAPKV, 0.5)), run_id="one", directory=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"learning_rate": 0.01, "step": 4, "loss": 2.0}\n')
    fields = {"experiment": "made", "seed": 1, "reason": "never finished", "provenance": done.provenance}
    config = record("gqa", 1, **held(SNAPKV, 0.25, format="int8")).config
    cut = Unfinished(run_id="two", config=config, status="cut", **fields)
    print_records([done, cut])
    assert "cut: gqa/mqar/seed1 snapkv 0.25 int8 [two] never finished" in capsys.readouterr().out
    page = render_page("made", [done, cut], points([done, cut]), [{}])
    assert "2 runs, 1 done, 1 not; 1 point." in page
    assert page.count("<td data-value='gqa snapkv 0.25 int8'>") == 2  # of what failed, and of where runs come from
    assert page.count("<td data-value='gqa snapkv 0.5'>") == 2  # of points, and of where runs come from
    assert '"name": "gqa", "seed": 0' in page  # a curve is of a training, whatever its runs drop


def test_a_deployment_says_how_it_stores():
    assert ServingMemory().label == "paged"
    assert ServingMemory(kv_dtype="fp8").label == "paged fp8"
    assert ServingMemory(format="int8").label == ServingMemory(kv_dtype="int8").label == "paged int8"
    method = compose(["compression=snapkv", "budget=48"]).memory.compression
    assert ServingMemory(compression=method, budget=0.5, format="kivi4").label == "paged snapkv 0.5 kivi4"


def test_deployments_of_one_label_are_told_apart():
    swept = [ServingMemory(policy=policy) for policy in ("lru", "s3fifo")]
    swept += [ServingMemory(policy="s3fifo", format="int8"), ServingMemory(name="max")]
    names = deployment_labels([memory.label for memory in swept], [to_plain(memory) for memory in swept])
    assert names == ["paged policy=lru", "paged policy=s3fifo", "paged int8", "max"]


def test_nouns_are_counted():
    assert [counted(count, "page") for count in (0, 1, 2, 1024)] == ["0 pages", "1 page", "2 pages", "1,024 pages"]
    assert [counted(count, "batch", "batches") for count in (1, 2)] == ["1 batch", "2 batches"]


def test_one_of_each_is_singular(capsys):
    """In the footer of `kvlab generate`, and below the claims of an experiment."""
    stats = Stats(told_tokens=1, decoded_tokens=1, compacted=1, sealed_pages=1, drafted_tokens=1)
    counters = SimpleNamespace(hit_tokens=0, found_again_tokens=0, preempted=0)
    dropped = SimpleNamespace(counters=SimpleNamespace(dropped_slots=1))
    engine: Any = SimpleNamespace(stats=stats, scheduler=SimpleNamespace(counters=counters), ledger=dropped)
    said = summary(engine, 1.0)
    assert said.startswith("1 token generated, 0 prefilled, ")
    assert said.endswith("1 compaction, 1 slot dropped, 1 page sealed, 0% of 1 draft accepted")
    stats.compacted = stats.sealed_pages = 2
    assert "2 compactions, 1 slot dropped, 2 pages sealed" in summary(engine, 1.0)
    verdict([Claim.exact("one", 1, 1)])
    assert "1 of 1 claim passes" in capsys.readouterr().out
    verdict([Claim.exact("one", 1, 1)] * 2)
    assert "2 of 2 claims pass" in capsys.readouterr().out
