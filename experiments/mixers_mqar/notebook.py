# %% [markdown]
# # Recall at constant state
# The table that a run leaves here: means over seeds, and the rates that were better on validation.

# %%
import pandas as pd

from kvlab.compose import compose
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure
from kvlab.lab.laboratory import Laboratory

path = EXPERIMENTS_DIR / "mixers_mqar" / "mixers.csv"
if path.exists():  # once the experiment was run
    table = pd.read_csv(path)
    print(table.pivot_table(index="mixer", columns="task", values="accuracy", sort=False).round(3).to_string())
    print(table.groupby("mixer", sort=False).learning_rate.agg(lambda rates: " ".join(map(str, rates))).to_string())

# %% [markdown]
# What their states are, before anything is trained: a matrix, or numbers a channel, and the columns of convolutions.

# %%
figure = load_figure("mixers_mqar")
for arm in figure.EQUAL:
    lab = Laboratory.of(compose(["experiment=mixers_mqar", *arm.sweep]), abstract=True)
    (layer,) = lab.model.states
    print(f"{arm.name}:", ", ".join(f"{name} {state.unit_bytes:,} B" for name, state in layer.items()))
