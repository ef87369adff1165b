# %% [markdown]
# # Which pages to keep
# A trace, a pool, a policy: how much of every prompt is found instead of computed? How far is that from the optimum?

# %%
from kvlab.lab.experiments import load_figure
from kvlab.ledger.replacement import POLICIES, belady

reuse = load_figure("prefix_reuse")
turns = reuse.shared_prefix(seed=1, count=120)
optimum, _ = reuse.serve(reuse.make_ledger((reuse.ATTENTION,), 192, belady(reuse.future(turns))), turns)
for name, policy in POLICIES.items():
    hits, evicted = reuse.serve(reuse.make_ledger((reuse.ATTENTION,), 192, policy), turns)
    print(f"{name:10} {hits:.3f} of prompt tokens found, {hits / optimum:.2f} of the optimum, {evicted} pages evicted")

# %% [markdown]
# A policy of your own is one function.

# %%
from kvlab.ledger.replacement import Policy


class DeepFirst(Policy):
    """Evicts the page deepest in its sequence."""

    def order(self, page):
        return (-page.end,)


hits, _ = reuse.serve(reuse.make_ledger((reuse.ATTENTION,), 192, DeepFirst), turns)
print(f"deep first {hits:.3f} of prompt tokens found, {hits / optimum:.2f} of the optimum")

# %% [markdown]
# A hybrid finds nothing without kept states: a recurrent layer can only continue from a state at exactly the hit's end.

# %%
for checkpoints in ("none", "junctions", "all"):
    ledger = reuse.make_ledger((reuse.ATTENTION, reuse.WINDOW, reuse.STATE), 4096, POLICIES["lru"], checkpoints)
    hits, _ = reuse.serve(ledger, turns)
    print(f"{checkpoints:10} {hits:.3f} found, {len(ledger.index.cached[2])} states kept")
