# %% [markdown]
# # The arithmetic of keys and values
# Bytes from the specs that the ledger allocates by, not from a formula beside them.

# %%
from kvlab.capacity.report import both_units
from kvlab.capacity.roofline import intensity
from kvlab.hardware import CHIPS
from kvlab.lab.experiments import load_figure

arithmetic = load_figure("kv_arithmetic")
for name in ("llama3-70b", "deepseek-v3", "gemma3-27b", "mamba2-2.7b"):
    model = arithmetic.preset(name)
    context = both_units(model.logical_bytes(131_072, "bfloat16"))
    print(f"{name:12} a token {arithmetic.per_token(model):>9,} B, 131,072 tokens {context}")

# %% [markdown]
# One model, six memories.

# %%
for variant in ("mha", "gqa", "mqa", "mla", "window", "recurrent"):
    model = arithmetic.preset("llama3-70b", variant)
    print(
        f"{variant:10}", {n: f"{model.logical_bytes(n, 'bfloat16') / 2**30:.2f} GiB" for n in (1024, 32_768, 131_072)}
    )

# %% [markdown]
# Is decode bound by bandwidth? Where the mixing does more FLOPs a byte than the chip's ridge, it is not.

# %%
mla = intensity(arithmetic.preset("deepseek-v3"), 131_072)
print({name: f"{chip.ridge:.0f} {'compute' if mla > chip.ridge else 'bandwidth'}" for name, chip in CHIPS.items()})
