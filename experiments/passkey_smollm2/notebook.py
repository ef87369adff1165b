# %% [markdown]
# # Pass keys through compressed memories
# What a row of the task is, and when a memory compresses it.

# %%
import tempfile
from pathlib import Path

import jax
import numpy as np

from kvlab.lab.experiments import load_figure
from kvlab.tasks.passkey import Passkey, PasskeyConfig

passkey_smollm2 = load_figure("passkey_smollm2")
print("methods:", ", ".join(passkey_smollm2.METHODS), "at budgets", passkey_smollm2.BUDGETS)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "text.txt"
    path.write_text("of man's first disobedience and the fruit " * 800)
    for aware in (False, True):
        task = Passkey(PasskeyConfig(contexts=(400,), path=str(path), query_aware=aware))
        for part in task.slices("test"):
            batch = task.eval_batch(jax.random.key(0), "test", part, 0, 1)
            row = bytes(np.asarray(batch.tokens[0]).astype(np.uint8)).decode()
            place = part.compress_at or part.prompt_len
            print(f"query_aware={aware}, {part.name}: ...{row[place - 12 : place]!r}", end=" ")
            print(f"| compressed here | {row[place:]!r}")
