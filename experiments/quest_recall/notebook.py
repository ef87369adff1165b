# %% [markdown]
# # Which pages hold the attention
# The committed table of SmolLM2, and the measure itself on a small model with random weights.

# %%
import numpy as np
import pandas as pd

from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure

quest_recall = load_figure("quest_recall")
found = pd.read_csv(EXPERIMENTS_DIR / "quest_recall" / "recall.csv")
table = found.pivot(index="method", columns=["fraction", "first_page_forced"], values="share")
print(table.loc[list(quest_recall.NAMES)].round(3))

# %%
from kvlab.compose import compose
from kvlab.evaluation.page_recall import page_recall
from kvlab.lab.laboratory import Laboratory

model = Laboratory.of(compose(["mixer=gqa"])).model
tokens = np.random.default_rng(0).integers(0, 64, (1, 128)).astype(np.int32)
shares = page_recall(
    model.structure, model.params, tokens, quest_recall.methods(0.25), page_size=8, positions=(100, 120)
)
for name, recall in shares.items():
    print(f"{name}: {recall.share.mean():.3f}")
