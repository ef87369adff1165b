# %% [markdown]
# # Keys and values that two layers share
# The committed table: means over three seeds. Bytes are of one sequence, at 128 tokens of recall and 256 bytes of text.

# %%
import pandas as pd

from kvlab.compose import compose
from kvlab.lab.experiments import EXPERIMENTS_DIR
from kvlab.lab.laboratory import Laboratory

table = pd.read_csv(EXPERIMENTS_DIR / "kv_sharing" / "sharing.csv")
print(table.groupby(["task", "variant"], sort=False).mean(numeric_only=True).drop(columns="seed").to_string())

# %% [markdown]
# Which layer holds what, before anything is trained. A layer that shares has no state of its own but its convolution's;
# the state that it reads says so.

# %%
for words in (["mixer=cla", "model.num_layers=4"], ["mixer=yoco"]):
    lab = Laboratory.of(compose(words), abstract=True)
    for layer, states in enumerate(lab.model.states):
        held = {name: f"{state.unit_bytes:,} B, read by {state.num_readers}" for name, state in states.items()}
        print(words[0], layer, held)
