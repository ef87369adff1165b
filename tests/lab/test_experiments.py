"""Every experiment's claims hold, its notebook runs, and `kvlab reproduce` says so with its exit status."""

import runpy

import pandas as pd
import pytest

from kvlab.cli import main
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure, names

ON_THE_HOST = ["kv_arithmetic", "paged_waste", "prefix_reuse", "sharing"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "prefix_reuse" else ()) for name in ON_THE_HOST]
)
def test_reproduce_checks_and_draws(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kvlab", "reproduce", name, "--output", str(tmp_path)])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    assert "claims pass" in printed
    assert list(tmp_path.glob("*.png"))
    for path in tmp_path.glob("*.csv"):
        committed = pd.read_csv(EXPERIMENTS_DIR / name / path.name)
        pd.testing.assert_frame_equal(pd.read_csv(path), committed, rtol=1e-3, obj=f"{name}/{path.name}, as committed")


@pytest.mark.parametrize(
    "name",
    [
        *ON_THE_HOST,
        "kivi_axes",
        "eviction_mqar",
        "frontier_memory",
        "indexer",
        "kv_sharing",
        "state_tracking",
        "hybrid_ratio",
        "mixers_mqar",
        "recipes",
    ],
)
def test_notebooks_run(name, capsys):
    runpy.run_path(str(EXPERIMENTS_DIR / name / "notebook.py"))
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_a_failed_claim_is_an_exit_status(capsys):
    claims = [Claim.near("a", 1.0, 1.05, 0.1), Claim.exact("b", 3, 3), Claim.near("c", 2.0, 2.5, 0.1, "%")]
    assert verdict(claims[:2]) == 0
    assert verdict(claims) == 1
    printed = capsys.readouterr().out
    assert "2 of 3 claims pass" in printed
    assert "FAIL" in printed


def test_a_broken_buddy_fails_the_figure(monkeypatch):
    """The figure is no decoration: with an allocator that gives half of what was asked for, it does not come out."""
    from kvlab.capacity.workload import requests
    from kvlab.ledger.contiguous import Buddy

    figure = load_figure("paged_waste")
    monkeypatch.setattr(Buddy, "take", lambda self, count, take=Buddy.take: take(self, max(1, count // 2)))
    outcome = figure.serve("pow2", "ShareGPT", requests(figure.WORKLOADS["ShareGPT"])[:300])
    assert abs(figure.shares(outcome, paged=False)[3] - figure.FIG_2["Orca (Pow2)"][3]) > 3


def test_names_and_typos(monkeypatch, capsys):
    assert {"demo", "mqar_frontier", *ON_THE_HOST} <= set(names())
    assert all((EXPERIMENTS_DIR / name / "README.md").is_file() for name in names())
    monkeypatch.setattr("sys.argv", ["kvlab", "reproduce", "paged_wast"])
    assert main() == 2
    assert "did you mean paged_waste" in capsys.readouterr().err
    assert load_figure("mqar_frontier").RUNS
