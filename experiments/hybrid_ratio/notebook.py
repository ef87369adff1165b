# %% [markdown]
# # How many layers of attention recall needs
# The table that a run leaves here: means over seeds, at 128 tokens.

# %%
import pandas as pd

from kvlab.compose import compose
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure
from kvlab.lab.laboratory import Laboratory

path = EXPERIMENTS_DIR / "hybrid_ratio" / "hybrid.csv"
if path.exists():  # once the experiment was run
    table = pd.read_csv(path)
    print(table.groupby(["attention", "pattern"]).mean(numeric_only=True).drop(columns="seed").to_string())

# %% [markdown]
# What a sequence holds, from its states alone, as it grows: layers of Gated DeltaNet hold what they hold, whatever its
# length.

# %%
for pattern in load_figure("hybrid_ratio").PATTERNS:
    lab = Laboratory.of(compose(["experiment=hybrid_ratio", f"mixer.pattern='{pattern}'"]), abstract=True)
    states = [state for layer in lab.model.states for state in layer.values()]
    held = {length: sum(state.logical_bytes(length) for state in states) for length in (128, 4096)}
    print(pattern, *(f"{size:,} B at {length:,} tokens" for length, size in held.items()), sep="  ")
