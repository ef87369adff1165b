# %% [markdown]
# # A state behind the training length
# The committed table: means over seeds of what is within the training length and behind it.

# %%
import jax.numpy as jnp
import numpy as np
import pandas as pd

from kvlab.lab.experiments import EXPERIMENTS_DIR
from pallas_kernels.linear_scan import linear_scan_step

table = pd.read_csv(EXPERIMENTS_DIR / "state_tracking" / "tracking.csv")
print(table.groupby(["study", "mixer"], sort=False)[["within", "behind"]].mean().round(4).to_string())

# %% [markdown]
# Why a beta above 1 is needed, by hand: with beta = 2 a step of the delta rule without a value is I - 2 k k^T, which
# turns the sign along its key. A token 1 turns it, a token 0 leaves it alone, and the sign is the parity. With beta
# at most 1 the state can only be wiped out.

# %%
key = jnp.zeros((1, 1, 2)).at[..., 0].set(1.0)
nothing = jnp.zeros((1, 1, 1))
bits = np.random.default_rng(0).integers(0, 2, 12)
for most in (2.0, 1.0):
    state, signs = key[..., None], []
    for bit in bits:
        read, state = linear_scan_step(key, key, nothing, jnp.full((1, 1), most * bit), None, state)
        signs.append(int(np.sign(read.item())))
    print(f"beta {most:g}:", *(f"{sign:+d}" if sign else " 0" for sign in signs))
print("parity:", *(f"{1 - 2 * (bits[: n + 1].sum() % 2):+d}" for n in range(len(bits))))

# %% [markdown]
# Two such steps with other keys are a rotation: keys that are 60 degrees apart turn the state by 120, which is the
# element of order three in S3. Three times is the identity.

# %%
angle = jnp.pi / 3
second = jnp.array([jnp.cos(angle), jnp.sin(angle)]).reshape(1, 1, 2)
state = key[..., None]
for turn in range(1, 4):
    for each in (key, second):
        _, state = linear_scan_step(each, each, nothing, jnp.full((1, 1), 2.0), None, state)
    print(f"after {turn} of 3 turns:", np.round(np.asarray(state).ravel(), 3))
