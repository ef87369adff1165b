"""Where arrays lie: the default is one device; on a mesh of two the same program trains the same model."""

import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from kvlab.placement import Placement


def test_letters_become_axes_of_the_mesh():
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    placement = Placement(mesh, {"B": "data", "H": "model"})
    assert placement.sharding("B T H D").spec == PartitionSpec("data", None, "model", None)
    assert placement.sharding("").spec == PartitionSpec()
    assert Placement().sharding("B T") == SingleDeviceSharding(jax.devices()[0])


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"axes\['B'\] = 'data': must be an axis of the mesh; legal: rows"):
        Placement(jax.make_mesh((1,), ("rows",)), {"B": "data"})
    with pytest.raises(ValueError, match="must be an axis of the mesh"):
        Placement(axes={"B": "data"})


TRAINING = """
import sys, jax, numpy as np
from pathlib import Path
from kvlab.compose import compose
from kvlab.interrupt import StopRequest
from kvlab.lab.laboratory import Laboratory
from kvlab.placement import Placement
from kvlab.training.loop import train
from kvlab.training.step import init_state

folder = Path(sys.argv[1])
config = compose(["debug=tiny", "model.model_dim=16", "mixer=hybrid", "task.vocab_size=32", "task.train=[16:2]",
                  "task.train_weights=[1]", "task.test=[16:2]", "train.accumulation=2"])
assert len(jax.devices()) == 2
results = {}
for name, placement in (("one", None), ("two", Placement(jax.make_mesh((2,), ("data",)), {"B": "data"}))):
    lab = Laboratory.of(config, placement=placement)
    (folder / name).mkdir()
    results[name] = train(lab.train_step(), lab.model.params, config.train, learning_rate=0.01, seed=0,
                          validate=lambda params: 0.0, directory=folder / name / "trials",
                          metrics_path=folder / name / "metrics.jsonl", label=name, stop=StopRequest())
leaves = {name: jax.tree.leaves(result.params) for name, result in results.items()}
assert all(len(leaf.sharding.device_set) == 1 for leaf in leaves["one"])
assert all(len(leaf.sharding.device_set) == 2 for leaf in leaves["two"])
for one, two in zip(*leaves.values(), strict=True):
    np.testing.assert_allclose(one, two, atol=2e-4)
lab = Laboratory.of(config, placement=placement)
step_fn = lab.train_step()
state = init_state(lab.model.params, step_fn.optimizer, 1.0)
given = (state, (), jax.random.key(0), jax.numpy.asarray(2, "int32"), 16)
lowered = jax.jit(step_fn.gradients, static_argnums=4).lower(*given)
assert "all-reduce" in lowered.compile().as_text()  # each device has its rows; gradients are summed over both
print("agree")
"""


@pytest.mark.slow
def test_two_devices_train_what_one_trains(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "agree" in done.stdout
