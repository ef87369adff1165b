# %% [markdown]
# # What does not hold at this scale
# The committed findings: a published claim, where it was asked here, and whether it holds there.

# %%
import numpy as np
import pandas as pd

from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure

scale = load_figure("not_at_this_scale")
folder = EXPERIMENTS_DIR / "not_at_this_scale"
found = pd.read_csv(folder / "findings.csv")
found["here"] = found.holds.map(scale.WORDS).fillna(scale.WORDS[None])
print(found[["arxiv", "where", "claim", "here"]].to_string(index=False))

# %% [markdown]
# Recall of sequences that are longer than those of the training, by rule and by how the decay is initialised: means of
# the seeds.

# %%
longer = pd.read_csv(folder / "lengths.csv")
print(longer.pivot_table(index="method", columns="length", values="value").round(3).to_string())

# %% [markdown]
# A task after RULER, and how an answer is scored: by its first candidates, as many as are asked for.

# %%
made = scale.ruler.common_words(np.random.default_rng(0), 20)
print(made.prompt.split("\n\n")[1])
print(made.answer, made.chance, made.right(", ".join(made.candidates)), made.right(", ".join(made.answer)))

# %% [markdown]
# Outliers without another function: two channels of every head, a rotary pair, are larger in keys and smaller in
# queries. What the model says stays the same to the last bit.

# %%
import jax
import jax.numpy as jnp

from kvlab.compose import compose
from kvlab.evaluation.layerwise import Blockwise
from kvlab.lab.laboratory import Laboratory

model = Laboratory.of(compose(["experiment=not_at_this_scale", *scale.runs.TEXT, "seed=0"])).model
tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 64), 0, 256, np.int32))
said = None
for by in scale.toys.SCALES:
    scaled = scale.toys.scaled_pairs(model, by)
    hidden = np.asarray(scaled.merge().parallel(jnp.asarray(tokens)))
    said = hidden if said is None else said
    ratio = scale.toys.channel_ratios(Blockwise(scaled), tokens).mean()
    print(f"keys x {by}: largest to median channel {ratio:.1f}, the same to the last bit: {(hidden == said).all()}")
