# %% [markdown]
# # Which way to quantise keys
# A page of keys is sealed, and read back: by channel, outlier channels cost nothing.

# %%
import jax.numpy as jnp
import numpy as np

from kvlab.lab.experiments import load_figure
from pallas_kernels.formats import quantised

kivi = load_figure("kivi_axes")
queries, keys, rotation = kivi.draw(ratio=30, num_draws=1)
page = keys[0, :32].astype(np.float32)
for name in ("channel, page 32", "token, groups of 32", "token"):
    axis = kivi.NAMED[name]
    held = quantised(jnp.asarray(page), axis.scheme(4))
    off = np.abs(np.asarray(held.values()) - page).mean()
    print(f"{name}: a number is off by {off:.3f} on average, in {axis.bits_held(4):.3g} bits")

# %% [markdown]
# The rows of attention over 256 such keys, from sealed pages, against the exact ones.

# %%
exact = kivi.exact_rows(queries, keys)
for axis in kivi.AXES:
    rows = kivi.sealed_rows(queries, keys, rotation, axis, axis.scheme(4))
    print(f"{axis.name}: {np.abs(rows - exact).sum(axis=2).mean() / 2:.3f} of the attention lies elsewhere")
