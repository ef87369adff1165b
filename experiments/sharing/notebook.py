# %% [markdown]
# # What sharing saves
# Forks share every page; the first to write a shared one copies it.

# %%
from kvlab.lab.experiments import load_figure
from kvlab.ledger.accounting import as_table

sharing = load_figure("sharing")
ledger = sharing.make_ledger()
ledger.reserve("parent", 40)
ledger.commit("parent", 40)
for branch in "abc":
    ledger.fork("parent", branch)
(before,) = ledger.audit()
sharing.write_one(ledger, ["a", "b", "c"])
(after,) = ledger.audit()
print(as_table([before, after]))
copied = ledger.stores[0].copied
print(f"saved: {before.shared:,} bytes before the branches write, {after.shared:,} after; {copied} pages copied")

# %% [markdown]
# Over whole requests.

# %%
import numpy as np

from kvlab.capacity.traces import Request

request = Request(0.0, prompt_len=50, output_len=60)
for width in sharing.WIDTHS:
    sampled, beams = sharing.Tally(sharing.make_ledger()), sharing.Tally(sharing.make_ledger())
    sharing.parallel(sampled.ledger, request, width, sampled)
    sharing.beam(beams.ledger, request, width, beams, np.random.default_rng(0))
    print(f"{width} branches: sampling saves {sampled.saved:.1f}% of pages, beam search {beams.saved:.1f}%")
