"""Whole runs: their records say what was held and dropped. And heads are ranked by what the model loses when each alone
streams, the same as through pages in which it does."""

import json

import jax
import pytest

from kvlab.compression.duo import Duo
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.heads import rank_heads, write_ranking
from kvlab.evaluation.score import Scorer
from kvlab.lab.execute import execute
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.runs import Run
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.random import named_key
from tests.lab.test_execute import small

NOTHING_PROTECTED = ["memory.compression.sinks=0", "memory.compression.recent=0"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["compression=streaming", "memory.budget=5", "memory.compression.sinks=1"],
        ["compression=duo", "memory.budget=4", "memory.compression.sinks=0", "memory.compression.streaming=[[1,2]]"],
        ["compression=kvzip", "memory.budget=2", *NOTHING_PROTECTED],
        ["compression=oracle", "memory.budget=0.5", *NOTHING_PROTECTED],
        ["compression=h2o", "memory.budget=4", "memory.compression.heads=ada", *NOTHING_PROTECTED],
    ],
)
def test_a_run_is_verified_and_recorded(tmp_path, overrides):
    config = small(tmp_path, *overrides)
    assert execute(config) == "done"
    record = Run(config).record
    assert record.lossy.logit_error < 1e-5
    assert record.lossy.num_logits > 0
    assert max(record.lossy.evicted_fraction.values()) > 0
    assert record.memory.held_peak_bytes >= record.memory.allocated_bytes


def test_a_rank_is_what_is_lost_through_pages(tmp_path):
    """Budget 5: 2 sinks and 3 newest are held, and a query sees its own token beside them."""
    lab = Laboratory.of(small(tmp_path, "task.test=[16:2]"))
    params = jax.tree.map(lambda leaf: 3 * leaf, lab.model.params)
    scorer = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 4)
    losses = rank_heads(scorer, params, window=4, sinks=2)
    assert sorted((each.layer, each.head) for each in losses) == [(0, head) for head in range(4)]
    assert [each.lost for each in losses] == sorted(each.lost for each in losses)
    digest = write_ranking(tmp_path / "heads.json", losses)
    assert json.loads((tmp_path / "heads.json").read_text())["ranking"][0]["head"] == losses[0].head
    worst = max(losses, key=lambda each: abs(each.nats))
    assert abs(worst.nats) > 1e-3, "something is lost, or the test says nothing"

    def nats(compression):
        memory = MemoryConfig(page_size=4, chunk_len=3, compression=compression, budget=5 if compression else None)
        layout = MemoryLayout.of(lab.model.states, memory, max_sequences=4, max_len=lab.task.context_len)
        assert MemoryStep.of(lab.model.structure, layout)
        (part,) = scorer.through_memory(params, "validation", layout)
        return part.nll / part.weight

    full = nats(None)
    duo = {"type": "duo", "sinks": 2, "streaming": [[worst.head]]}
    assert nats(duo) - full == pytest.approx(worst.nats, abs=1e-5)
    ranked = Duo(ranking=str(tmp_path / "heads.json"), share=0.25, sha256=digest)
    assert ranked.streaming_heads(0, 1, 4) == (losses[0].head,)
