# %% [markdown]
# # What paging recovers
# The same requests under four allocators, on the ledger that also plans kvlab's device steps. Run the cells, then
# change one.

# %%
from kvlab.capacity.workload import requests
from kvlab.lab.experiments import load_figure
from kvlab.ledger.accounting import as_table

paged_waste = load_figure("paged_waste")
asked = requests(paged_waste.WORKLOADS["ShareGPT"])[:300]
print(f"{len(asked)} requests; a pool of {paged_waste.NUM_SLOTS:,} slots")

# %% [markdown]
# Every byte of a moment: one sequence of 700 tokens under each allocator. Reserved is what it will still use, tail what
# it never will, padding what the buddy allocator rounds up.

# %%
from kvlab.ledger.classes import Lengths

accounts = []
for reservation in paged_waste.SYSTEMS.values():
    ledger = paged_waste.ledger(reservation)
    ledger.reserve("one", 700, lengths=Lengths(500, 900))
    ledger.commit("one", 700)
    accounts.append(ledger.audit()[0])
print(as_table(accounts))

# %% [markdown]
# Under load, on average after the first fifth: token states, reservation, internal, external.

# %%
for system, reservation in paged_waste.SYSTEMS.items():
    outcome = paged_waste.serve(reservation, "ShareGPT", asked)
    parts = paged_waste.shares(outcome, reservation is None)
    print(
        f"{system:14}", [f"{part:5.1f}%" for part in parts], f"batch {outcome.mean('batch', outcome.seconds / 5):.1f}"
    )

# %% [markdown]
# Larger pages waste more of their last one.

# %%
print({size: round(share, 1) for size, share in paged_waste.ablation(asked).items()})
