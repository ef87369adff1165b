# %% [markdown]
# # A task of one's own, in a notebook
# Say again the token of some places ago. The answer never depends on what the tokens are, only on how far back a memory
# reaches: a window must hold so many tokens and the current one, a state must have room for them. The task is defined,
# looked at, registered, trained with four memories, and drawn. Nothing of kvlab is changed;
# [adding a task](../../docs/adding-a-task.md) says where its parts go if it is to stay.
#
# `KVLAB_WORDS` in the environment adds words to every run: `train.num_steps=4 train.eval_every=4
# train.checkpoint_every=4` shows that it runs, in place of some minutes. `KVLAB_TASK` does the same for fields of the
# task, such as `seq_len=16 num_test=4`, and `KVLAB_LAGS=2` takes one distance. Results lie in `results/default`.

# %%
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array

from kvlab.compose import compose
from kvlab.config import Config
from kvlab.lab.execute import execute
from kvlab.lab.results import read_records
from kvlab.random import named_key
from kvlab.schema import ConfigError, Schema, integer
from kvlab.tasks import TASKS
from kvlab.tasks.base import Batch, EvalSlice, Task
from kvlab.tasks.metrics import ACCURACY
from kvlab.typing import PyTree

WORDS = os.environ.get("KVLAB_WORDS", "").split()
FIELDS = {name: int(value) for name, value in (word.split("=") for word in os.environ.get("KVLAB_TASK", "").split())}

# %% [markdown]
# ## The task
# The config says what may be asked, each field with its legal range. The task makes batches from a key: tokens, the
# places of the labels, and the labels. It names the slices of its evaluation: how many examples, how long they are, and
# how much of each is a prompt. What stands behind the prompt is decoded token by token from the memory.


# %%
@dataclass(frozen=True)
class EchoConfig(Schema):
    """Sequences of `seq_len` tokens out of `vocab_size`; asked is the token of `lag` places ago."""

    lag: int = integer(4, 1, 1 << 20)
    seq_len: int = integer(64, 2, 1 << 20)
    vocab_size: int = integer(16, 2, 1 << 16)
    num_validation: int = integer(64, 1, 1 << 20)
    num_test: int = integer(128, 1, 1 << 20)

    def cross_check(self) -> None:
        if self.lag >= self.seq_len:
            raise ConfigError("lag", self.lag, f"must be in [1, {self.seq_len - 1}], below seq_len")


class Echo(Task):
    """Accuracy of the token of `lag` places ago, at every place that has one."""

    Config = EchoConfig
    metric = ACCURACY
    evaluation_fields = ("num_test",)  # it changes the test alone: runs that differ in it share their parameters

    def __init__(self, config: EchoConfig):
        self.config, self.vocab_size = config, config.vocab_size

    @property
    def context_len(self) -> int:
        return self.config.seq_len

    @property
    def num_choices(self) -> int:
        return self.vocab_size

    def train_shapes(self) -> tuple[int, ...]:
        return (self.config.seq_len,)

    def train_call(self, call: int, num_steps: int) -> tuple[int, list[int]]:
        return self.config.seq_len, [0] * num_steps

    def train_batch(self, data: PyTree, key: Array, batch_size: int, seq_len: int, knob: Array) -> Batch:
        lag = self.config.lag
        tokens = jax.random.randint(key, (batch_size, seq_len), 0, self.vocab_size, jnp.int32)
        places = jnp.broadcast_to(jnp.arange(lag, seq_len, dtype=jnp.int32), (batch_size, seq_len - lag))
        return Batch(tokens, places, tokens[:, :-lag], jnp.ones(places.shape, jnp.float32))

    def slices(self, split: str) -> tuple[EvalSlice, ...]:
        num = {"validation": self.config.num_validation, "test": self.config.num_test}[split]
        return (EvalSlice(f"lag {self.config.lag}", self.config.seq_len, self.config.seq_len // 2, num, 0),)

    def eval_batch(self, key: Array, split: str, part: EvalSlice, index: int, batch_size: int) -> Batch:
        # Each example from its own number, so that it is the same whatever batch it comes in.
        keys = [jax.random.fold_in(key, index + row) for row in range(batch_size)]
        rows = [self.train_batch((), row_key, 1, part.seq_len, jnp.zeros((), jnp.int32)) for row_key in keys]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


TASKS["echo"] = Echo

# %% [markdown]
# ## A look at it
# One example, and what must hold of any task: it is the same whatever batch it comes in. A wrong field is refused
# before anything is compiled.

# %%
task = Echo(EchoConfig(lag=3, seq_len=12))
(part,) = task.slices("test")
key = named_key(0, "eval")
both = task.eval_batch(key, "test", part, 0, 2)
alone = task.eval_batch(key, "test", part, 1, 1)
assert (both.tokens[1] == alone.tokens[0]).all(), "an example depends on the batch it comes in"
print("tokens", alone.tokens[0])
print("labels", " " * (3 * task.config.lag), alone.labels[0], "from place", alone.label_positions[0, 0])
try:
    EchoConfig(lag=12, seq_len=12)
except ConfigError as error:
    print(error)

# %% [markdown]
# ## Runs of it
# A composed config is a mapping of sections. With the registry's name as its `type`, ours takes the place of the task;
# with a file in `configs/task` it would be `task=echo`. Four memories: all tokens, the last 8, the last 4, and the
# state of a Mamba-2 layer.

# %%
MEMORIES = {
    "all tokens": ["mixer=mqa"],
    "window of 8": ["mixer=swa", "mixer.W.window=8", "mixer.W.num_kv_heads=1"],
    "window of 4": ["mixer=swa", "mixer.W.window=4", "mixer.W.num_kv_heads=1"],
    "Mamba-2": ["mixer=mamba2"],
}
LAGS = tuple(map(int, os.environ.get("KVLAB_LAGS", "2 6 12").split()))


def asked(memory: str, lag: int):
    """One memory on the echo of some places ago."""
    steps = ["train.num_steps=400", "train.batch_size=32", "train.eval_every=400", "train.checkpoint_every=400"]
    sections = compose([*MEMORIES[memory], *steps, "memory.page_size=4", *WORDS]).as_dict()
    return Config.build(sections | {"task": {"type": "echo", "lag": lag, **FIELDS}})


found = {}
for memory in MEMORIES:
    for lag in LAGS:
        config = asked(memory, lag)
        assert execute(config) in ("done", "skipped")
        (found[memory, lag],) = read_records(config.run_dir)

# %% [markdown]
# ## A picture
# A window of w tokens holds the token of w - 1 places ago, and none before it; the short convolution in front of each
# layer adds two.

# %%
figure, panel = plt.subplots(figsize=(8.4, 4.0), layout="constrained")
for memory in MEMORIES:
    records = [found[memory, lag] for lag in LAGS]
    held = records[-1].memory.allocated_bytes / records[-1].memory.batch_size / 1024
    accuracy = [record.quality.value for record in records]
    panel.plot(LAGS, accuracy, "o-", label=f"{memory}: {held:.1f} KiB a sequence")
    said = [f"lag {lag} {value:.3f}" for lag, value in zip(LAGS, accuracy, strict=True)]
    print(f"{memory}, {held:.1f} KiB:", ", ".join(said))
panel.axhline(records[0].quality.chance, color="0.4", ls=":", label="a guess")
panel.set(xlabel="how many places ago", ylabel="accuracy", ylim=(-0.03, 1.03), title="Echo: how far back it reaches")
panel.set_xticks(LAGS)
panel.grid(alpha=0.25)
figure.legend(loc="outside right upper")
picture = Path(config.results_dir) / "add_a_task.png"
figure.savefig(picture, dpi=130)
print(picture)
