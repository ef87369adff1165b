"""Which test runs when.

* `fast`: `make test`, meant to take 4 minutes on two cores. No child processes, no sweeps in simulators; of every
  kernel and backend one case.
* `ci`: `.ci/run` after `make test`. Child processes, what the simulators must prove, runs that train.
* `slow`: only `make test-all`, which runs all three.
* `generated`: the generated cases of the kernels' proofs. `make test-generated`, about an hour.

A test that is named, `pytest tests/test_cli.py::test_tab_completion`, runs whatever its tier.

What a test takes decides. `tests/seconds.json` has the seconds of every test that takes some; `make seconds` writes
those of the processor, null where a test was too dear or never measured, which makes it `slow`. The cases of one test
function share `SHARES`, the cheapest first: what they leave of a tier's share is for the next case, and what does not
fit goes a tier down. So a function with many cases takes no more than one with few, and the first case of each is as
early as it can be. A test that the file does not name is taken to cost nothing.

What starts processes is `ci` for that, whatever it takes: `CHILDREN`. A row there stands for every test whose id begins
with it; of several rows the longest counts, and a marker beside the test itself before any row. A row that stands for
no test any more, or an id of the file that is no test's, fails `tests/test_tiers.py`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

MARKERS = ("ci", "slow", "generated")
UNUSED_ROWS = pytest.StashKey[list[str]]()
"""Where `tests/conftest.py` leaves the rows and ids that stand for no test, once the whole suite is collected."""

SHARES = {"fast": 0.5, "ci": 0.7}
"""Processor seconds of all cases of a function in a tier, and of its first case where that alone takes more: of tests
that cannot be cut, `ci` takes those of up to `LONGEST`."""
LONGEST = 2.5

SECONDS = Path(__file__).parent / "seconds.json"
"""Of each test, by id."""

KERNELS = "tests/pallas_kernels"

CHILDREN: dict[str, str] = {
    "tests/test_walls.py": "ci",
    "tests/test_tiers.py::test_what_tests_take_is_written_down": "ci",
    "tests/test_wheel.py": "ci",
    "tests/test_on_gpu.py::test_a_window_leaves_lines_and_goes_on_where_it_stopped": "ci",
    "tests/test_outside.py::test_a_package_is_run_from_the_command_line_and_its_results_say_so": "ci",
    "tests/test_outside.py::test_completion_imports_neither_a_package_nor_jax": "ci",
    "tests/test_wrong_config.py::test_the_command_line_answers_in_one_line": "ci",
    "tests/ledger/test_ledger.py::test_the_ledger_imports_no_jax": "ci",
    "tests/test_cli.py::test_hydra_options_still_work": "ci",
    "tests/test_cli.py::test_tab_completion": "ci",
    "tests/test_cli.py::test_readmes_words_on_a_tiny_run_are_answered_with_what_fits": "ci",
    "tests/test_cli.py::test_help_imports_nothing_heavy": "ci",
    "tests/test_cli.py::test_showing_results_imports_nothing_that_trains_or_draws": "ci",
    "tests/test_cli.py::test_nothing_takes_scipys_distributions": "ci",
    "tests/test_cli.py::test_fields_that_were_completed_before_take_neither_hydra_nor_jax": "ci",
    "tests/lab/test_report.py::test_drawing_leaves_the_backend_alone": "ci",
    "tests/test_cli.py::test_sweeps_through_every_local_launcher": "ci",
    "tests/test_cli.py::test_sweeps_through_every_local_launcher[submitit": "slow",
    "tests/test_cli.py::test_sweeps_through_every_local_launcher[joblib": "slow",  # the demo of .ci/run goes by joblib
    "tests/test_cli.py::test_a_corpus_that_is_too_short_is_answered_before_anything_is_written": "ci",
    "tests/test_cli.py::test_a_sweep_goes_on_after_a_failure_and_says_so": "ci",
    "tests/test_cli.py::test_a_killed_worker_leaves_no_run_untried": "slow",
    "tests/test_cli.py::test_sigterm_to_a_sweep_stops_its_workers_and_saves": "ci",
    "tests/test_cli.py::test_runs_need_none_of_what_only_pages_and_development_need": "ci",
    "tests/lab/test_execute.py::test_kill_9_and_resume_is_bit_for_bit[1]": "ci",
    "tests/lab/test_execute.py::test_kill_9_and_resume_is_bit_for_bit[5]": "slow",
    "tests/lab/test_execute.py::test_a_polite_stop_saves_and_resumes": "ci",
    "tests/lab/test_execute.py::test_a_polite_stop_saves_and_resumes[10]": "slow",
    "tests/lab/test_requeue.py": "slow",
    "tests/lab/test_cards.py::test_real_workers_take_each_their_share": "ci",
    "tests/lab/test_cards.py::test_a_sweep_gives_its_workers_cards_before_jax_opens_one": "ci",
    "tests/lab/test_cards.py::test_a_worker_has_no_device_before_its_first_job": "ci",
    "tests/lab/test_following.py::test_wandb_goes_on_with_the_same_run": "ci",
    "tests/lab/test_following.py::test_trackio_goes_on_with_the_same_run": "ci",
    "tests/lab/test_generation.py::test_the_command_works_as_installed": "ci",
    "tests/lab/test_processes.py::test_six_reports_at_once_leave_the_files_of_one": "slow",
    "tests/lab/test_processes.py::test_four_equal_sweeps_at_once_do_each_run_once": "slow",
    "tests/lab/test_report.py::test_the_page_in_chromium": "ci",
    "tests/lab/test_pictures.py::test_every_picture_is_drawn_from_the_tables_beside_it": "ci",
    "tests/lab/test_report.py::test_byte_axes_have_round_ticks_and_narrow_pages_scroll_tables_alone": "ci",
    "tests/weights/test_weights.py::test_loading_holds_little_more_than_the_model": "ci",
    "tests/weights/test_gguf_llama.py::test_converting_holds_a_tensor_at_a_time": "ci",
    "tests/tasks/test_library.py::test_pips_own_reason_is_told": "ci",
    f"{KERNELS}/test_alone.py": "ci",
    f"{KERNELS}/test_bench_run.py": "ci",
    f"{KERNELS}/test_bench_run.py::test_wrong_options_name_the_limit": "fast",
    f"{KERNELS}/test_bench_run.py::test_pieces_share_a_cache_and_the_device": "fast",
    f"{KERNELS}/test_runner.py": "ci",
    f"{KERNELS}/test_runner.py::test_signals_are_given_back_and_ignored_ones_stay_so": "fast",
    f"{KERNELS}/test_runner.py::test_what_knows_less_does_not_count": "fast",
    f"{KERNELS}/test_runner.py::test_a_record_has_no_nan": "fast",
    f"{KERNELS}/test_runner.py::test_the_digest_is_of_the_code": "fast",
    "tests/weights/test_published.py::test_the_real_": "slow",
}
"""Tests that start processes, or fetch a published model of 100 MB."""


def seconds_of_tests() -> dict[str, float]:
    """What each test takes, as far as it is known; endless where that was never measured."""
    known: dict[str, float | None] = json.loads(SECONDS.read_text())
    return {name: math.inf if seconds is None else seconds for name, seconds in known.items()}


def mark(items: Iterable[Any], tier_of: Mapping[str, str], seconds: Mapping[str, float]) -> list[str]:
    """Marks collected tests with their tiers; returns the rows of `tier_of` that stand for none of them, and the ids of
    `seconds` that are none's."""
    rows, used = sorted(tier_of, key=len, reverse=True), set[str]()
    functions = defaultdict[str, list[Any]](list)
    for item in items:
        matching = [row for row in rows if item.nodeid.startswith(row)]
        used.update(matching)
        if any(map(item.get_closest_marker, MARKERS)):
            continue
        if matching:
            _add(item, tier_of[matching[0]])
        else:
            functions[item.nodeid.partition("[")[0]].append(item)
    for cases in functions.values():
        _share_out(sorted(cases, key=lambda case: seconds.get(case.nodeid, 0.0)), seconds)
    return sorted({*tier_of, *seconds} - used - {item.nodeid for item in items})


def _share_out(cases: Iterable[Any], seconds: Mapping[str, float]) -> None:
    """Marks the cases of one function, the cheapest first."""
    left, is_first = dict(SHARES), True
    for case in cases:
        cost = seconds.get(case.nodeid, 0.0)
        tier = next((tier for tier, share in left.items() if cost <= share), "slow")
        if tier == "slow" and is_first and cost <= LONGEST:
            tier = "ci"
        if tier in left:
            left[tier] -= cost
        is_first = False
        _add(case, tier)


def _add(item: Any, tier: str) -> None:
    if tier != "fast":
        item.add_marker(tier)
