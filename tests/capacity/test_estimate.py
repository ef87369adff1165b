"""`kvlab capacity`: the published byte tables exactly, users against a closed form, rooflines by hand, and its
errors."""

import io
import math
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from kvlab.capacity.estimate import estimate
from kvlab.capacity.presets import LayerGroup, Preset
from kvlab.capacity.report import one_answer
from kvlab.capacity.roofline import decode_roofline
from kvlab.capacity.room import make_ledger, users_that_fit
from kvlab.capacity.serving import Serving
from kvlab.compose import CAPACITY, compose_capacity, expand_capacity
from kvlab.hardware import CHIPS
from kvlab.lab.deployments import KEPT, SPARE, answer_each, rows_of
from kvlab.lab.experiments import load_figure
from kvlab.lab.narrow import print_rows
from kvlab.ledger.classes import Lengths
from kvlab.memory.budgets import Context
from kvlab.schema import ConfigError

PRESETS = CAPACITY.options("model")


def test_every_figure_of_the_byte_tables():
    """FIGURES' tables, both readings of the formula, the chips: the claims of the experiment, one by one."""
    failed = [claim for claim in load_figure("kv_arithmetic").claims() if not claim.passed]
    assert not failed


def test_no_chip_has_a_sparse_figure():
    """Datasheets print 1,979 (H100, H200) and 2,615 (MI300X) with 2:4 sparsity."""
    assert not {chip.bf16_tflops for chip in CHIPS.values()} & {1_979, 2_615, 4_500, 624}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_answers(name):
    answer = estimate(
        compose_capacity(
            [f"model={name}", "hardware=h200x16", "simulate=false", "context_len=8192", "workload=azure_conv"]
        )
    )
    assert answer.users > 0
    assert answer.weight_share + answer.state_share + answer.compute_share == pytest.approx(1)
    assert "arXiv" in compose_capacity([f"model={name}"]).model.source


@pytest.mark.parametrize("name", ["llama3-8b", "gpt-oss-20b", "gemma3-4b", "mamba2-2.7b", "jamba"])
@pytest.mark.parametrize("memory", ["paged", "pow2"])
def test_users_are_those_that_a_ledger_really_holds(name, memory):
    config = compose_capacity([f"model={name}", "hardware=h200x2", f"memory={memory}"])
    budget = 5_000_000_000
    users = users_that_fit(make_ledger(config, budget, 1500, 2048), 1500, 500)
    ledger = make_ledger(config, budget, 1500, 2048)
    assert sum(state.pool_bytes for state in ledger.classes) <= budget
    held = 0
    while all(_advance(ledger, held, count, first) for count, first in ((512, True), (512, False), (476, False))):
        held += 1
    assert users == held > 3


def _advance(ledger, name, count, first):
    if ready := ledger.reserve(name, count, lengths=Lengths(500, 1500) if first else None).ready:
        ledger.commit(name, count)
    return ready


def test_the_roofline_by_hand():
    """Llama-3-70B on two H100: 141.1 GB of weights and 17 states over 6.7 TB/s."""
    config = compose_capacity(["model=llama3-70b", "hardware=h100x2"])
    roof = decode_roofline(config, [1000] * 17)
    assert roof["weights"] == pytest.approx(141.107e9 / 6.7e12, rel=1e-4)
    assert roof["state"] == pytest.approx(17 * 1000 * 327_680 / 6.7e12, rel=1e-4)
    assert roof["compute"] == 0
    assert roof["seconds"] == pytest.approx(roof["weights"] + roof["state"])
    many = decode_roofline(config, [1] * 4096)
    assert many["weights"] == 0
    assert many["compute"] == pytest.approx(2 * 70.553706496e9 * 4096 / (2 * 989e12), rel=1e-3)


def test_experts_are_read_when_some_token_chooses_them():
    model = compose_capacity(["model=mixtral-8x7b"]).model
    assert model.read_weight_bytes(1) == pytest.approx(2 * model.num_active_params)
    assert model.read_weight_bytes(10_000) == pytest.approx(model.weight_bytes)


def test_what_is_known_beforehand_decides_how_many_fit():
    """Dense reserves the maximum, an oracle what is used: users between them are in that order."""
    users = []
    for memory in ("dense", "pow2", "oracle", "paged"):
        overrides = ["model=opt-13b", "hardware=h200", f"memory={memory}", "simulate=false"]
        users.append(estimate(compose_capacity(overrides)).users)
    assert users == sorted(users)
    assert users[0] * 2 < users[2] <= users[3]


def test_cost_and_units():
    answer = estimate(compose_capacity(["model=llama3-70b", "hardware=h100x4", "price=2.5", "simulate=false"]))
    assert answer.cost_per_million == pytest.approx(2.5 * 4 / 3600 / answer.decode_tokens_per_s * 1e6)
    from kvlab.capacity.report import both_units

    assert both_units(70_272) == "70.27 kB (68.62 KiB)"
    assert both_units(40 * 2**30) == "42.95 GB (40.00 GiB)"
    assert both_units(3) == "3 B (3 B)"


def test_quantised_pages_count_their_scales():
    half = estimate(compose_capacity(["model=llama3-8b", "hardware=h200", "memory.kv_dtype=int8", "simulate=false"]))
    assert half.bytes_per_token == 32 * (2 * 8 * 128 + 2 * 8 * 4)


def test_a_simulation_reports_waste_hits_and_typed_pools():
    shared = ["model=gpt-oss-20b", "hardware=h100", "workload=shared_prefix", "workload.num_requests=60"]
    found = estimate(compose_capacity(shared)).simulated
    assert found["finished"] == 60
    assert 0.5 < found["prefix_hits"] < 0.9
    assert 0 < found["tail"] < 0.05
    assert found["shared"] > 0.5
    assert 0 <= found["unified_saving"] < 0.5
    without = estimate(compose_capacity([*shared, "memory.prefix_cache=false"])).simulated
    assert without["prefix_hits"] == 0
    for memory in ("max", "pow2", "oracle"):
        name = {"max": "dense"}.get(memory, memory)
        answer = estimate(
            compose_capacity(["model=opt-13b", "hardware=a100", f"memory={name}", "workload.num_requests=60"])
        )
        assert answer.simulated["live"] < 0.75


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=lama3-8b"], "model = 'lama3-8b': did you mean llama3-8b"),
        (["model=mqar"], "model = .mqar.: is for kvlab run and kvlab plan only"),
        (["hardware=h101x2"], "hardware = 'h101x2': did you mean h100"),
        (["hardware=host"], "hardware.name = 'host'"),
        (
            ["model=llama3-70b", "hardware=h100"],
            "model = 'llama3-70b': 141.1 GB of weights do not fit in 72.0 GB of h100",
        ),
        (
            ["model=llama3-8b", "hardware=h100", "context_len=1000000", "workload.max_total=2000000"],
            "context_len = 1000000: one sequence does not fit",
        ),
        (["memory=pagd"], "memory = 'pagd': did you mean paged"),
        (["memory.kv_dtype=float7"], "memory.kv_dtype = 'float7'"),
        (["memory.page_size=0"], r"memory.page_size = 0: must be an integer in \[1"),
        (["memory.policy=lra"], "memory.policy = 'lra'"),
        (["workload=sharegtp"], "workload = 'sharegtp': did you mean sharegpt"),
        (["workload=trace"], "workload.path = None: must name a trace"),
        (["model.variant=mla2"], "model.variant = 'mla2'"),
        (
            ["model.layers.attention.num_kv_heads=3"],
            "model.layers.attention.num_kv_heads = 3: must divide num_heads = 32",
        ),
        (["model.layers.attention.kind=window"], "model.layers.attention.window = None: must be given for kind window"),
        (["nothing=1"], "nothing = 1: no such field"),
        (["price=-1"], "price = -1"),
        (
            [
                "memory.kv_dtype=int4",
                "model.layers.attention.num_heads=3",
                "model.layers.attention.num_kv_heads=3",
                "model.layers.attention.head_dim=3",
            ],
            "memory.kv_dtype = 'int4': .* does not fill whole bytes",
        ),
    ],
)
def test_bad_questions_are_answered_with_the_field(overrides, message):
    with pytest.raises(ConfigError, match=message):
        estimate(compose_capacity(overrides))


def test_the_command_line_prints_and_draws(tmp_path, monkeypatch, capsys):
    from kvlab.cli import main

    def kvlab(*arguments):
        monkeypatch.setattr("sys.argv", ["kvlab", "capacity", *arguments])
        return main(), capsys.readouterr()

    status, printed = kvlab("model=llama3-70b", "hardware=h100x2", "workload.num_requests=30", "price=2")
    assert status == 0
    for words in (
        "141.11 GB (131.42 GiB)",
        "327.68 kB (320.00 KiB)",
        "cost of a million tokens",
        "prefix hits",
        "ridge of 295",
    ):
        assert words in printed.out
    status, printed = kvlab(
        "-m", "model.variant=mha,mla,recurrent", "hardware=h200x8", "simulate=false", f"--output={tmp_path}"
    )
    assert status == 0
    frame = pd.read_csv(tmp_path / "capacity.csv")
    assert frame.variant.tolist() == ["mha", "mla", "recurrent"]
    assert frame.users[0] < frame.users[2] < frame.users[1], "at 500 tokens a recurrent state is the larger one"
    assert (tmp_path / "capacity.png").stat().st_size > 10_000
    assert kvlab("hardware=h100", "--output")[0] == 2
    assert kvlab("--fast")[0] == 2
    status, printed = kvlab("model=lama")
    assert status == 2
    assert "did you mean" in printed.err


@pytest.mark.parametrize(
    "swept", ["model.variant=mha,window hardware=h200x4,h200x8", "compression=snapkv,h2o selection=quest"]
)
def test_tables_fit_a_terminal(swept):
    """A deployment a line, whatever finds no room named below, and nothing cut."""
    words = ["model=llama3-70b", "hardware=h200x4", "price=3", "budget=0.5", "simulate=false"]
    words = [word for word in words if word.split("=")[0] + "=" not in swept] + swept.split()
    configs = expand_capacity(words)
    found = answer_each(configs)
    answers, rows = [each.answer for each in found], rows_of(found)
    for width in (80, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        print_rows(console, rows, kept=KEPT, spare=SPARE)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)
        for answer in answers:
            (line,) = [line for line in lines if f"{answer.users:,} " in line]
            assert f"{answer.decode_tokens_per_s:,.0f}" in line
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(one_answer(configs[0], answers[0]))
    assert max(map(len, map(str.rstrip, console.export_text().splitlines()))) <= 88


def test_math_is_sane_at_the_edges():
    model = compose_capacity(["model=gemma3-27b"]).model
    sizes = [model.logical_bytes(n, "bfloat16") for n in (0, 1, 1024, 10_000)]
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert math.isclose(sizes[1], 62 * 2 * 16 * 128 * 2)


HALF_SHARED = {
    "full": {"kind": "full", "count": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 256},
    "local": {"kind": "window", "count": 3, "num_heads": 8, "num_kv_heads": 2, "head_dim": 256, "window": 512},
}


def sharing(num_full, num_local):
    """A model of 2 full layers and 3 windows, and so many more of each that read theirs."""
    more = {"full": num_full, "local": num_local}
    shared = {f"shared_{name}": {**HALF_SHARED[name], "count": n, "shares_kv": True} for name, n in more.items() if n}
    return Preset.build({"name": "shared", "num_params": 10**9, "layers": HALF_SHARED | shared})


def test_layers_that_share_hold_nothing_and_read_as_much():
    """2 KV heads of 256 numbers in bfloat16: 2,048 bytes a token and layer."""
    config = compose_capacity(
        ["model=gemma3-4b", "hardware=h100", "simulate=false", "workload=azure_conv", "context_len=4000"]
    )
    plain, shared = (
        estimate(replace(config, model=replace(sharing(*counts), source="arXiv"))) for counts in ((0, 0), (1, 6))
    )
    token = 2 * 2 * 256 * 2
    assert plain.bytes_per_token == shared.bytes_per_token == 5 * token
    assert plain.sequence_bytes == shared.sequence_bytes == 2 * 4000 * token + 3 * 511 * token
    assert plain.users == shared.users
    assert plain.read_bytes == plain.sequence_bytes
    assert shared.read_bytes == 3 * 4000 * token + 9 * 511 * token
    flops = [4 * 8 * 256 * seen for seen in (4001, 512)]
    context = Context(4000, 3000)
    serving = Serving.of(replace(config, model=sharing(1, 6)), 4096, context)
    assert serving.mixing_flops(context) == 3 * flops[0] + 9 * flops[1]
    assert sharing(1, 6).moved_bytes(4000, "bfloat16") == shared.read_bytes
    assert sharing(1, 6).num_layers == 12
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(one_answer(replace(config, model=sharing(1, 6)), shared))
    assert "7 of 12 layers read the keys and values of others" in console.export_text()


def test_layers_that_share_read_what_stays_and_what_is_selected():
    """Two more full layers: H2O weighs, which reads keys of 1,024 bytes a token once more; Quest reads some pages."""
    words = ["model=gemma3-4b", "hardware=h100", "simulate=false", "workload=azure_conv", "context_len=4000"]
    config = compose_capacity([*words, "compression=h2o", "memory.budget=1024", "memory.compression.every=512"])
    plain, shared = _pair(config)
    config = replace(config, model=sharing(2, 0))
    context = Context(4000, plain.prompt_len)
    kept = next(state for state in Serving.of(config, 4096, context).classes if state.retention)
    assert shared.read_bytes - plain.read_bytes == 2 * kept.retention.stored(plain.prompt_len, 4000) * (2048 + 1024)
    plain, shared = _pair(compose_capacity([*words, "selection=quest", "memory.selection.dense_layers=0"]))
    windows = 3 * 511 * 2048
    assert shared.read_bytes - windows == 2 * (plain.read_bytes - windows) < 2 * 2 * 4000 * 2048
    assert (plain.selecting_layers, shared.selecting_layers) == (2, 4)


def _pair(config):
    """Answers for the model as it is, and with two more full layers that share; both hold the same."""
    plain, shared = (estimate(replace(config, model=sharing(*counts))) for counts in ((0, 0), (2, 0)))
    assert (plain.sequence_bytes, plain.users) == (shared.sequence_bytes, shared.users)
    return plain, shared


def test_a_group_that_finds_no_source_is_refused():
    with pytest.raises(ConfigError, match=r"layers\.other\.shares_kv = True: must be false: no group before other"):
        Preset.build(
            {
                "name": "wrong",
                "num_params": 1,
                "layers": {"local": HALF_SHARED["local"], "other": {**HALF_SHARED["full"], "shares_kv": True}},
            }
        )
    with pytest.raises(ConfigError, match="must be false for kind recurrent"):
        LayerGroup.build({"kind": "recurrent", "state_shape": [4, 4], "shares_kv": True})
    assert all(state is not None for state in replace(sharing(1, 1), variant="recurrent").states("bfloat16"))


def test_capacity_reads_a_state_once_as_records_do():
    """Decoding a token of Mamba-2 reads the state and writes it back: what is read is what is held, what is moved twice
    that."""
    answer = estimate(compose_capacity(["model=mamba2-2.7b", "hardware=h100", "simulate=false"]))
    assert answer.read_bytes == answer.sequence_bytes == answer.held_bytes
