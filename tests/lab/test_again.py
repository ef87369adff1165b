"""The command that makes a point again composes the same point."""

import shlex

import pytest

from kvlab.compose import compose, expand
from kvlab.lab.again import command, words_of
from tests.lab.test_results import record

POINTS = (
    ("mixer=mha",),
    ("mixer=swa", "mixer.W.window=24", "task=text", "debug=tiny"),
    ("mixer=mamba2_n64", "optimizer.learning_rate=3e-5", "tune.learning_rate=[0.01,0.003]"),
    ("mixer=gqa", "compression=snapkv", "budget=0.75", "memory.compression.window=4", "format=kivi2"),
    ("mixer=mha", "selection=quest", "memory.page_size=8", "format=int8"),
    ("mixer=mha", "task=needle", "model.num_layers=2", "model.dtype=bfloat16"),
    ("experiment=hybrid_ratio", "mixer.pattern=L A L A"),
    ("experiment=demo", "mixer=swa16", "task=text"),
    ("experiment=eviction_mqar", "mixer=mha", "compression=h2o", "budget=0.5", "task.num_turns=2"),
)


@pytest.mark.parametrize("words", POINTS, ids=" ".join)
def test_the_words_compose_the_same_run(words):
    config = compose([*words, "seed=3"])
    again = words_of(config.as_dict())
    assert compose([*again, "seed=3"]).run_id == config.run_id
    assert len(again) <= len(words) + 5, "only what differs from the choices"


def test_the_command_is_one_point_of_its_seeds(tmp_path):
    """Axes that its experiment sweeps over are said, so that it makes no other point."""
    config = compose(["experiment=mqar_frontier", "mixer=mqa", f"results_dir={tmp_path / 'a b'}"])
    said = command(config.as_dict(), [0, 2])
    assert said is not None
    program, run, *words = shlex.split(said)
    assert (program, run, words[0]) == ("kvlab", "run", "-m")
    made, _ = expand(words[1:], multirun=True)
    assert [each.run_dir for each in made] == [
        compose(["experiment=mqar_frontier", "mixer=mqa", f"seed={seed}", f"results_dir={tmp_path / 'a b'}"]).run_dir
        for seed in (0, 2)
    ]


def test_a_variant_of_no_group_has_no_command():
    assert command(record("$(reboot)").config, [0]) is None
    odd = {**compose(["mixer=mha"]).as_dict(), "results_dir": "a; reboot '${x}"}
    assert command(odd, [0]) is None, "an interpolation would be read in its place"
    said = command({**odd, "results_dir": "a; reboot '"}, [0])
    assert said is not None
    assert "results_dir='a; reboot \\''" in shlex.split(said)
