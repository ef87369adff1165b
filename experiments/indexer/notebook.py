# %% [markdown]
# # What an indexer costs and saves
# Bytes of one layer at 128 tokens, from its states alone: more are held, fewer are read. Nothing is trained here.

# %%
from kvlab.compose import compose
from kvlab.lab.experiments import load_figure
from kvlab.lab.laboratory import Laboratory

figure = load_figure("indexer")
for arm in figure.ARMS:
    lab = Laboratory.of(compose(["experiment=indexer", *arm.words]), abstract=True)
    (state,) = [state for layer in lab.model.states for state in layer.values() if state.per_token]
    print(f"{arm.name}: {state.logical_bytes(128):,} bytes held, {state.read_bytes(128):,} read")

# %% [markdown]
# Reading 16 tokens at random finds the pair of this share of the questions:

# %%
for name in ("64:16", "128:32"):
    print(f"{name}: {figure.at_random(name):.3f}")
