# %% [markdown]
# # What the demo's recipes train well
# The table that a run leaves here: mean, least and most over seeds, and the bytes that a sequence holds.

# %%
import pandas as pd

from kvlab.compose import compose
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure
from kvlab.lab.laboratory import Laboratory

path = EXPERIMENTS_DIR / "recipes" / "recipes.csv"
if path.exists():  # once the experiment was run
    groups = pd.read_csv(path).groupby(["task", "variant"], sort=False)
    table = groups.agg(
        mean=("value", "mean"), least=("value", "min"), most=("value", "max"), held=("held_bytes", "first")
    )
    print(table.to_string())

# %% [markdown]
# Bytes that a sequence of text holds at 64 and at 128 tokens, from its states alone: a window stops growing.

# %%
for name in load_figure("recipes").TEXT:
    lab = Laboratory.of(compose(["experiment=recipes", "task=text", f"mixer={name}"]), abstract=True)
    sizes = [
        sum(state.logical_bytes(length) for layer in lab.model.states for state in layer.values())
        for length in (64, 128)
    ]
    print(f"{name}: {sizes[0]:,} B at 64 tokens, {sizes[1]:,} B at 128")
