# %% [markdown]
# # A window needs its sinks
# What was found before of SmolLM2, and the measure of attention on a small model with random weights.

# %%
import numpy as np

from kvlab.lab.experiments import load_figure

sinks_smollm2 = load_figure("sinks_smollm2")
for sinks, perplexity in sinks_smollm2.FOUND_BEFORE.items():
    print(f"{sinks} sinks: perplexity {perplexity}, in another implementation")

# %% [markdown]
# What a streaming memory sees: the first tokens, and a window that ends with the query's own.

# %%
from kvlab.compression import Budget, Streaming

for sinks in sinks_smollm2.SINKS:
    visible = Streaming(sinks=sinks).visible(Budget.of(12))
    queries, keys = np.arange(24)[:, None], np.arange(24)[None, :]
    print(f"{sinks} sinks: query 23 sees", np.flatnonzero(visible.sees(queries, keys)[23]))

# %%
from kvlab.compose import compose
from kvlab.evaluation.layerwise import Blockwise
from kvlab.evaluation.sinks import sink_shares
from kvlab.lab.laboratory import Laboratory

model = Laboratory.of(compose(["mixer=gqa"])).model
tokens = np.random.default_rng(0).integers(0, 64, (1, 128)).astype(np.int32)
print("random weights, share of token 0 by head:", sink_shares(Blockwise(model), tokens).round(4))
