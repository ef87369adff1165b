# %% [markdown]
# # What eviction costs in recall
# The committed table, the slice 128:32: 32 pairs, then 32 questions. `found_before` is an earlier study's number.

# %%
import pandas as pd

from kvlab.compose import compose
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure

table = pd.read_csv(EXPERIMENTS_DIR / "eviction_mqar" / "eviction.csv")
half = table[(table.slice == "128:32") & (table.budget == 0.5)]
columns = ["method", "accuracy", "found_before", "num_seeds", "held_bytes", "right_to_wrong"]
print(half.filter(columns).to_string(index=False))

# %% [markdown]
# What a method holds is the ledger's to say, before anything is trained. The state that a method notes is counted.

# %%
eviction = load_figure("eviction_mqar")
for name in ("recency", "SnapKV, window 8", "H2O, by readers", "KVzip"):
    section = eviction.methods.NAMED[name].words
    config = compose(["experiment=eviction_mqar", f"memory.compression={section}", "memory.budget=0.25"])
    print(f"{name}: {eviction.held_bytes(config, 128, 64):,} bytes at 128 tokens, a quarter of 64 kept")
full = compose(["experiment=eviction_mqar"])
print(f"full: {eviction.held_bytes(full, 128, 64):,} bytes")
