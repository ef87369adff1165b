"""Deployments side by side: every row and every mark can be told from the others, and none ends the table."""

from dataclasses import replace

import pandas as pd
import pytest

from kvlab.capacity.estimate import estimate
from kvlab.capacity.fit import DoesNotFit
from kvlab.compose import compose_capacity, expand_capacity
from kvlab.lab.deployment_picture import draw
from kvlab.lab.deployments import answer_each, frame_of, rows_of
from kvlab.schema import ConfigError

QUICK = ["hardware=h100", "simulate=false"]


@pytest.mark.parametrize(
    ("swept", "said"),
    [
        (["workload.rate=1,2"], ["rate=1.0", "rate=2.0"]),
        (["context_len=1000,2000"], ["context_len=1000", "context_len=2000"]),
        (["max_batch=8,16"], ["max_batch=8", "max_batch=16"]),
        (["model.layers.attention.num_kv_heads=1,8"], ["num_kv_heads=1", "num_kv_heads=8"]),
        (["memory.utilization=0.5,0.9"], ["paged utilization=0.5", "paged utilization=0.9"]),
        (["model.variant=mha,mqa", "model.weight_dtype=bfloat16,int8"], [
            "llama3-8b, mha weight_dtype=bfloat16", "llama3-8b, mha weight_dtype=int8",
            "llama3-8b, mqa weight_dtype=bfloat16", "llama3-8b, mqa weight_dtype=int8"]),
    ],
)  # fmt: skip
def test_rows_bars_and_lines_of_any_swept_field_can_be_told_apart(swept, said):
    configs = expand_capacity([*QUICK, *swept])
    answers = answer_each(configs)
    assert [answer.name for answer in answers] == said
    rows = rows_of(answers)
    assert len({tuple(row.values()) for row in rows}) == len(configs)
    assert [row["deployment"] for row in rows] == said
    assert frame_of(answers).deployment.tolist() == said
    grows, users, speed = draw(answers).axes
    for axes in (users, speed):
        assert axes.get_xscale() == "log"
        assert not axes.patches, "no bars, which would begin at nothing, on an axis that has none"
        assert len(axes.lines) == len(configs)
    assert [label.get_text() for label in users.get_yticklabels()] == said
    curves = [tuple(line.get_ydata()) for line in grows.lines]
    assert len(set(curves)) == len(curves), "no line is drawn on top of another"
    named = [name for line in grows.lines for name in line.get_label().splitlines()]
    assert sorted(named) == sorted(said)


def test_a_deployment_that_does_not_fit_is_a_row_that_says_how_many_chips_would_do():
    """141.1 GB in 72 GB of an H100: two hold 144 GB, in which the weights leave room; 811.7 GB need twelve."""
    configs = expand_capacity(["model=llama3-8b,llama3-70b,llama31-405b", *QUICK])
    answers = answer_each(configs)
    rows = rows_of(answers)
    assert [row["users"] == "0" for row in rows] == [False, True, True]
    assert [row["needs"] for row in rows] == ["-", "h100x2", "h100x12"]
    frame = frame_of(answers)
    assert frame.users.tolist()[1:] == [0, 0]
    assert frame.needed_chips.tolist() == [1, 2, 12]
    assert pd.isna(frame.decode_tokens_per_s[1])
    for config, chips in zip(configs[1:], (2, 12), strict=True):
        fits = config.hardware.with_chips(chips)
        assert answer_each([replace(config, hardware=fits)])[0].answer
        with pytest.raises(DoesNotFit, match=f"hardware=h100x{chips} would do") as raised:
            estimate(config)
        assert isinstance(raised.value, ConfigError)
        assert answer_each([replace(config, hardware=config.hardware.with_chips(chips - 1))])[0].answer is None
    assert "llama3-70b" in [label.get_text() for label in draw(answers).axes[1].get_yticklabels()]


def test_one_sequence_that_does_not_fit_is_answered_in_chips_too():
    config = compose_capacity(["model=llama3-8b", "context_len=1000000", *QUICK])
    with pytest.raises(DoesNotFit, match=r"one sequence does not fit.*hardware=h100x3 would do"):
        estimate(config)  # 131.07 GB beside 16.06 GB: two chips leave 144 - 16.06, three 216 - 16.06


def test_users_are_counted_at_the_context_that_is_asked_for_and_the_simulation_says_its_own():
    """131,072 tokens of Llama-3-8B are 16 GiB (FIGURES): three times in 72 - 16.06 GB."""
    answer = estimate(
        compose_capacity(["model=llama3-8b", "hardware=h100", "context_len=131072", "workload.num_requests=20"])
    )
    assert answer.context_len == 131_072
    assert answer.sequence_bytes == 16 * 2**30
    assert answer.users == 3
    assert 300 < answer.workload_len < 700
    assert answer.simulated["finished"] == 20


@pytest.mark.parametrize(
    ("name", "published", "embedding"),
    [
        ("gpt-oss-120b", 60.8 * 2**30, 201_088 * 2880),
        ("gpt-oss-20b", 12.8 * 2**30, 201_088 * 2880),
        ("deepseek-v3", 673e9, 129_280 * 7168),
    ],
)
def test_weights_have_the_type_in_which_they_are_published(name, published, embedding):
    """gpt-oss: checkpoints of 60.8 and 12.8 GiB (arXiv 2508.10925, table 1), experts in MXFP4 of 4.25 bits;
    DeepSeek-V3: 671 B parameters in fp8, embeddings, head and routers in bfloat16. A large batch reads all but the
    embedding, of which each token takes a row."""
    model = compose_capacity([f"model={name}"]).model
    assert model.weight_bytes == pytest.approx(published, rel=0.003)
    assert model.weight_bytes - 2 * embedding <= model.read_weight_bytes(100_000) <= model.weight_bytes + 1
    wide = compose_capacity([f"model={name}", "model.weight_dtype=bfloat16"]).model
    assert wide.weight_bytes == 2 * wide.num_params


def test_deepseek_v3_fits_eight_h200():
    assert estimate(compose_capacity(["model=deepseek-v3", "hardware=h200x8", "simulate=false"])).users > 0


def test_deployments_that_come_out_equal_are_one():
    configs = expand_capacity([*QUICK, "compression=none,snapkv", "budget=0.5,0.25"])
    assert [each.name for each in answer_each(configs)] == ["paged", "paged snapkv 0.5", "paged snapkv 0.25"]
