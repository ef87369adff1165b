# %% [markdown]
# # Architectures and cache methods
# Bytes that a sequence of 128 tokens holds, from the ledger alone: nothing is trained here.

# %%
from kvlab.compose import compose
from kvlab.lab.experiments import load_figure
from kvlab.units import human_bytes

frontier, eviction = load_figure("frontier_memory"), load_figure("eviction_mqar")
print(f"{len(frontier.RUNS)} sweeps over {', '.join(frontier.ARCHITECTURES)}")
for mixer in ("mha", "mqa", "hybrid"):
    for words in ([], ["memory.format=int4"], ["compression=expected", "memory.budget=0.5"]):
        config = compose(["experiment=frontier_memory", "task.test=['128:32']", f"mixer={mixer}", *words])
        size = human_bytes(eviction.held_bytes(config, 128, 64))
        print(f"{mixer} {' '.join(words) or 'as computed'}: {size}")
