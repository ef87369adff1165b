"""What a configuration is: its identity, its hash, and the resolved forms that were reviewed."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from kvlab.compose import GENERATE, RUN, compose, compose_generate
from kvlab.config import Config
from kvlab.ledger.states import QUANTISED, ROTATED
from kvlab.memory.config import SEALED
from tests.lab.small import FIRST_RECIPE


def test_round_trip_and_identity():
    config = compose(["mixer=hybrid", "seed=3"])
    again = Config.build(yaml.safe_load(yaml.safe_dump(config.as_dict())))
    assert again == config
    assert again.run_id == config.run_id
    assert compose(["mixer=hybrid", "seed=4"]).run_id != config.run_id
    elsewhere = compose(["mixer=hybrid", "seed=3", "results_dir=/tmp/x", "hardware=h100", "launcher=joblib"])
    assert elsewhere.run_id == config.run_id


def test_a_format_is_a_group_and_a_field_and_the_same_run():
    """Every choice of the group is the field's value of that name; without one, a run is what it was."""
    legal = sorted({"model", *QUANTISED, *ROTATED, *SEALED})
    assert RUN.options("format") == GENERATE.options("format") == legal
    for name in legal:
        by_group, by_field = (compose([word]) for word in (f"format={name}", f"memory.format={name}"))
        assert by_group == by_field
        assert by_group.memory.format == name
        assert by_group.run_id == by_field.run_id
    assert compose(["format=model"]).run_id == compose([]).run_id
    assert compose(["format=int8", "memory.format=int4"]).memory.format == "int4"
    assert compose_generate(["format=kivi4"]).memory.format == "kivi4"


ADDED = {
    "memory": {"format", "residual", "quantised_prefill", "compression", "budget", "selection", "allow_underfill"},
    "task": {"num_turns", "writes", "num_scored", "scored_in_chunks", "query_aware", "max_bigram_count"},
    "optimizer": {"name", "muon_momentum"},
    "train": {"vmap"},
    "weights": {"window", "num_sinks"},
    "model": {"activation", "embed_scale", "residual_scale", "logit_divisor", "logit_cap", "mlp_bias"}
    | {"num_streams", "active_stream", "layer_embed_dim", "layer_embed_vocab", "laurel_rank"},
}
"""Fields that are younger than the first runs, by section; `passkey` is younger as a whole."""
ADDED_TO_ATTENTION = (
    "output_gate",
    "sink_logits",
    "shares_kv",
    "local_start",
    "scale",
    "norms",
    "out_bias",
    "qkv_bias",
    "qk_norm_over",
    "value_norm",
)


@pytest.mark.parametrize(
    ("task", "change"),
    [("mqar", "task.num_turns=2"), ("text", "task.num_scored=9"), ("perplexity", "task.num_scored=9"),
     ("text", "task.max_bigram_count=9"), ("needle", "task.query_aware=true"), ("mqar", "memory.format=fp8")],
)  # fmt: skip
def test_what_was_added_later_leaves_the_hashes_of_older_runs(task, change, tmp_path):
    """Against the rule as it was before there were such fields, written out here."""
    (tmp_path / "book.txt").write_bytes(bytes(range(97, 123)) * 3000)
    words = [f"task={task}", *([f"task.path={tmp_path}/book.txt"] if task != "mqar" else []), "optimizer.name=adamw"]
    words += ["mixer.A.local_start=0"]

    def hashed(parts, data):
        known = {"schema": 1, **parts, **({"data": data} if data else {})}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:10]

    config, changed = compose(words), compose([*words, change])
    data, sections = config.make_task().fingerprint(), config.as_dict()
    for section, names in ADDED.items():
        sections[section] = {name: value for name, value in sections[section].items() if name not in names}
    for name in ADDED_TO_ATTENTION:
        sections["mixer"]["A"].pop(name)
    for name in ("hardware", "results_dir"):
        del sections[name]
    assert config.run_id == hashed(sections, data)
    halves = ("task", "mixer", "model", "optimizer", "train", "tune", "seed", "weights")
    half = {name: dict(sections[name]) if name == "task" else sections[name] for name in halves}
    for name in ("num_test", "decode_len"):
        half["task"].pop(name, None)
    assert config.training_id == hashed({**half, "validation_batch_size": config.measure.batch_size}, data)
    assert changed.run_id != config.run_id
    assert changed.training_id == config.training_id
    assert Config.build(changed.as_dict()).run_id == changed.run_id


def test_the_exact_format_is_no_part_of_a_runs_identity():
    """Runs keep the hashes that they had before formats could be chosen; another format is another run."""
    exact, held = (compose([*FIRST_RECIPE, f"memory.format={format}"]) for format in ("model", "int8"))
    assert exact.run_id == "539e25bf8c" != held.run_id


GOLDEN = Path(__file__).parent / "golden"

RESOLVED = {
    "default": [],
    "mqar_frontier": ["experiment=mqar_frontier"],
    "demo": ["experiment=demo"],
    "demo_text": ["experiment=demo", "task=text"],
    "mad": ["task=mad"],
    **{name: [f"mixer={name}"] for name in ("gqa", "mqa", "swa", "swa16", "mamba2", "mamba2_n64", "hybrid")},
    **{
        name: [f"mixer={name}"]
        for name in ("based", "mla", "deltaproduct", "mamba3", "rglru", "griffin", "cla", "yoco", "indexed")
    },
    **{
        name: [f"mixer={name}"]
        for name in ("gated_deltanet", "deltanet", "kda", "retnet", "lightning", "gla", "linear_attention")
    },
    "indexed_text": ["mixer=indexed", "task=text"],
}


@pytest.mark.parametrize("name", RESOLVED)
def test_resolved_configs_are_as_reviewed(name, request):
    """A refactor that changes an experiment shows here. To accept, in every tier:
    KVLAB_ACCEPT_GOLDEN=1 pytest -m "" tests/test_config.py."""
    import os

    path = GOLDEN / f"{name}.yaml"
    resolved = yaml.safe_dump(compose(RESOLVED[name]).as_dict(), sort_keys=False)
    if os.environ.get("KVLAB_ACCEPT_GOLDEN"):
        path.write_text(resolved)
    assert path.read_text() == resolved
