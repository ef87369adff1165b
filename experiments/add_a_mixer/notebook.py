# %% [markdown]
# # A mixer of one's own, in a notebook
# A memory of a few slots: a token is written into slots that its key chooses, and pushes out what was there. It is
# defined, registered, held to the contract, trained, and drawn beside others. Nothing of kvlab is changed;
# [adding a mixer](../../docs/adding-a-mixer.md) says where its parts go if it is to stay.
#
# `KVLAB_WORDS` in the environment adds words to every run: `train.num_steps=4 train.eval_every=4
# train.checkpoint_every=4` shows that it runs, in place of some minutes. Results lie in `results/default`.

# %%
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from kvlab.compose import compose
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.lab.execute import execute
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.results import read_records
from kvlab.ledger.states import ArraySpec, RecurrentState, State
from kvlab.mixers import MIXERS
from kvlab.mixers.base import LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear
from kvlab.schema import integer
from kvlab.typing import Hidden, Positions

WORDS = os.environ.get("KVLAB_WORDS", "").split()

# %% [markdown]
# ## The mixer
# With w_t = softmax(W_k x_t) and r_t = softmax(W_q x_t) over the slots, much as in attention with bounded memory
# (arXiv 2110.02488):
#
#     S_t = (1 - w_t) * S_{t-1} + w_t v_t^T,   y_t = W_o S_t^T r_t
#
# A field of its config knows its legal range, `states` says what a sequence holds, and `__call__` reads the state,
# writes the state, and leaves it alone where tokens are padding.


# %%
@dataclass(frozen=True)
class SlotsConfig(MixerConfig):
    """`num_slots` slots of `value_dim` numbers."""

    num_slots: int = integer(16, 1, 4096)
    value_dim: int = integer(32, 1, 4096)


class Slots(Mixer):
    """What a token writes takes the place of what its slots held. State: num_slots * value_dim float32 numbers."""

    Config = SlotsConfig

    def __init__(self, config: SlotsConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        def projection(inner: int, outer: int) -> Linear:
            return Linear(inner, outer, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)

        self.config = config
        self.key, self.query = projection(model_dim, config.num_slots), projection(model_dim, config.num_slots)
        self.value, self.out = projection(model_dim, config.value_dim), projection(config.value_dim, model_dim)

    def states(self) -> dict[str, State]:
        shape = self.config.num_slots, self.config.value_dim
        return {"slots": RecurrentState((ArraySpec("slots", shape, "float32"),))}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        slots = memory["slots"]
        is_real = slots.valid(x.shape[1])[..., None]
        write = jnp.where(is_real, jax.nn.softmax(self.key(x).astype(jnp.float32)), 0)  # padding writes nothing
        read = jax.nn.softmax(self.query(x).astype(jnp.float32))
        keeps = (1 - write)[..., None]
        written = write[..., None] * self.value(x).astype(jnp.float32)[:, :, None]  # [B, T, slots, P]
        written = written.at[:, 0].add(keeps[:, 0] * slots.read()["slots"])

        def then(first, second):
            return first[0] * second[0], second[0] * first[1] + second[1]

        _, held = jax.lax.associative_scan(then, (keeps, written), axis=1)
        y = self.out((read[..., None] * held).sum(axis=2).astype(x.dtype))
        return y, {"slots": slots.write({"slots": held[:, -1]})}


MIXERS["slots"] = Slots

# %% [markdown]
# ## A run of it
# The name of the registry is a choice of `mixer/type`. What stands below is what a file in `configs/mixer` would say,
# in words. Values out of range are refused before anything is compiled.


# %%
def words_of(num_slots: int) -> list[str]:
    """What chooses the mixer, with as many slots."""
    return [
        "task=mqar",
        "+mixer/type@mixer.S=slots",
        "mixer.name=slots",
        "mixer.pattern=S",
        f"mixer.S.num_slots={num_slots}",
        "mixer.S.short_conv=3",
    ]


def asked(words: list[str]):
    """The task and the training of this notebook."""
    small = ["task.train=['64:4']", "task.train_weights=[1]", "task.test=['64:4']", "task.vocab_size=128"]
    steps = ["task.num_test=128", "train.num_steps=400", "train.eval_every=400", "train.checkpoint_every=400"]
    return compose([*words, *small, *steps, *WORDS])


try:
    asked(words_of(0))
except ValueError as error:
    print(error)
config = asked(words_of(16))
lab = Laboratory.of(config)
print(lab.model)

# %% [markdown]
# ## The contract
# Tokens one by one through the memory give the logits of the parallel form. The pool is full of NaN where nothing was
# written: whoever reads there is found out. Sequences begin one after the other, so that rows are padded in between.

# %%
layout = lab.layout(max_len=24, max_sequences=3)
session = Session(MemoryStep.of(lab.model.structure, layout), lab.model.params, layout.allocate(float("nan")))
tokens = np.random.default_rng(0).integers(0, lab.task.vocab_size, (3, 24)).astype(np.int32)
complete = lab.model.merge()
expected = np.asarray(complete.logits(complete.parallel(jnp.asarray(tokens))))
done = [0, 0, 0]
worst = 0.0
for chunk in (5, 1, 3, 4, 2, 7, 9, 1, 9):
    starts = {row: done[row] for row in range(3) if done[row] + chunk + row <= 24}
    fed = {row: tokens[row, start : start + chunk + row] for row, start in starts.items()}
    if not fed:
        continue
    logits = np.asarray(session.advance(fed, 12))
    for place, (row, start) in enumerate(starts.items()):
        done[row] = start + len(fed[row])
        worst = max(worst, float(np.abs(logits[place, : len(fed[row])] - expected[row, start : done[row]]).max()))
print(f"{sum(done)} tokens through the memory, largest difference {worst:.1e} of {np.abs(expected).max():.2f}")
assert worst < 1e-4 * np.abs(expected).max(), "the memory and the parallel form differ"
(state,) = [each for name, each in lab.model.states[0].items() if name == "slots"]
print(f"a sequence holds {state.unit_bytes:,} bytes of slots")

# %% [markdown]
# ## Runs, and a picture
# Each is a run as of `kvlab run`: trained once, scored through pages, verified against the parallel form, skipped when
# it is done.

# %%
RUNS = {f"{slots} slots": words_of(slots) for slots in (8, 32)} | {"MQA": ["task=mqar", "mixer=mqa"]}
found = {}
for name, words in RUNS.items():
    config = asked(words)
    assert execute(config) in ("done", "skipped")
    (found[name],) = read_records(config.run_dir)

figure, panel = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
for name, record in found.items():
    held = record.memory.allocated_bytes / record.memory.batch_size / 1024
    panel.plot(held, record.quality.value, "o", ms=8, label=name)
    print(f"{name}: {record.quality.value:.3f} at {held:.1f} KiB, verified by {record.quality.verified_by}")
panel.set(xlabel="KiB held by a sequence of 64 tokens", ylabel="accuracy of recall", ylim=(-0.03, 1.03))
panel.set_title("Slots beside attention (MQAR 64:4)")
panel.set_xlim(left=0)
panel.grid(alpha=0.25)
panel.legend()
picture = Path(config.results_dir) / "add_a_mixer.png"
figure.savefig(picture, dpi=130)
print(picture)
