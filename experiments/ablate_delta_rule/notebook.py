# %% [markdown]
# # What each part of Gated DeltaNet is worth
# From a composed configuration to a figure: one layer, on recall with overwritten keys, whole and without one part at a
# time. Four parts are switches of the layer; the norm is not one, so it is taken out here, by a subclass.
#
# `KVLAB_WORDS` in the environment adds words to every run: `train.num_steps=4 train.eval_every=4
# train.checkpoint_every=4` shows that it runs, in place of some minutes. Results lie in `results/default`.

# %%
import os
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from flax import nnx

from kvlab.compose import compose
from kvlab.lab.execute import execute
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.results import read_records
from kvlab.mixers import MIXERS
from kvlab.mixers.linear import LinearAttention, LinearConfig

WORDS = os.environ.get("KVLAB_WORDS", "").split()
SEEDS = tuple(int(seed) for seed in os.environ.get("KVLAB_SEEDS", "0 1 2").split())

# %% [markdown]
# ## The parts
# The decay (a gate of the state), beta (how much of a token is written), the convolution in front, the gate of the
# outputs, and the norm of the outputs. A class in the registry is a choice of `mixer.L.type`.


# %%
class Unchanged(nnx.Module):
    """In a norm's place."""

    def __call__(self, x):
        return x


class Unnormed(LinearAttention):
    """The same layer, whose outputs are not normed."""

    def __init__(self, config: LinearConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, model_dim, dtype=dtype, rngs=rngs)
        self.norm = Unchanged()


MIXERS["unnormed"] = Unnormed
WITHOUT = {
    "nothing (whole)": [],
    "the decay": ["mixer.L.decay=none"],
    "beta": ["mixer.L.write_gate=false"],
    "the convolution": ["mixer.L.conv_len=0"],
    "the output gate": ["mixer.L.gate=none"],
    "the norm": ["mixer.L.type=unnormed"],
}
PARTS = os.environ.get("KVLAB_PARTS", ",".join(WITHOUT)).split(",")

# %% [markdown]
# ## The runs
# All have the same task, seeds and schedule. A part that is taken away takes its parameters and its bytes with it:
# without the convolution a sequence holds less. Decays begin slow, as in `configs/mixer/gated_deltanet.yaml`: of the
# published ones one seed of three learns far less, and to take such a decay away would look like a gain.

# %%
TASK = [
    "task=mqar",
    "task.writes=2",
    "task.train=['64:4','64:8']",
    "task.train_weights=[1,1]",
    "task.test=['64:8']",
    "task.vocab_size=128",
    "task.num_test=128",
    "train.num_steps=800",
    "train.eval_every=400",
    "train.checkpoint_every=800",
]


def asked(part: str, seed: int):
    """The layer without a part."""
    return compose([*TASK, "mixer=gated_deltanet", *WITHOUT[part], f"seed={seed}", *WORDS])


for part in WITHOUT:
    model = Laboratory.of(asked(part, 0), abstract=True).model
    held = sum(state.unit_bytes for layer in model.states for state in layer.values())
    print(f"without {part}: {model.num_params:,} parameters, {held:,} bytes a sequence")

# %%
accuracy: dict[str, list[float]] = {}
for part in PARTS:
    for seed in SEEDS:
        config = asked(part, seed)
        assert execute(config) in ("done", "skipped")
        (record,) = read_records(config.run_dir)
        accuracy.setdefault(part, []).append(record.quality.value)

# %% [markdown]
# ## The figure
# Every seed, and the mean. What is left of the dotted line is lost without that part.

# %%
figure, panel = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
for place, (part, values) in enumerate(reversed(accuracy.items())):
    mean = statistics.fmean(values)
    panel.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
    panel.plot(mean, place, "|", color="tab:blue", ms=18, mew=2)
    print(f"without {part}: {mean:.3f} ({', '.join(f'{value:.3f}' for value in values)})")
panel.axvline(statistics.fmean(accuracy[PARTS[0]]), color="0.4", ls=":")
panel.set_yticks(range(len(accuracy)), [f"without {part}" for part in reversed(accuracy)])
panel.set(xlabel="accuracy of recall", xlim=(-0.02, 1.03), title="Gated DeltaNet, every key written twice")
panel.grid(axis="x", alpha=0.25)
picture = Path(config.results_dir) / "ablate_delta_rule.png"
figure.savefig(picture, dpi=130)
print(picture)
