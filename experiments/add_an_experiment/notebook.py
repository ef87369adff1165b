# %% [markdown]
# # An experiment with claims, in a notebook
# From a question to a verdict: runs, a table of them, claims that pass or fail, and a figure drawn from the table. The
# question here: **how much of its past must a layer of attention see to recall from it?** What is expected is written
# down before anything is run.
#
# `KVLAB_WORDS` in the environment adds words to every run: `train.num_steps=4 train.eval_every=4
# train.checkpoint_every=4` shows that it runs, in place of some minutes; the claims fail then, as they must.
# `KVLAB_SEEDS=0` takes one seed, `KVLAB_WINDOWS=8` one window. Results lie in `results/default`.

# %%
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kvlab.compose import expand
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.execute import execute
from kvlab.lab.plots import save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records

WORDS = os.environ.get("KVLAB_WORDS", "").split()
SEEDS = os.environ.get("KVLAB_SEEDS", "0 1 2").split()

# %% [markdown]
# ## The runs
# Words as on the command line: `kvlab run -m mixer=swa mixer.W.window=8,16,32 seed=0,1,2 ...`. Every config of a sweep
# is checked before the first is run. What is done is skipped, so that this cell may be run again at any time.

# %%
LEN, WINDOWS = 64, tuple(map(int, os.environ.get("KVLAB_WINDOWS", "8 16 32").split()))
TASK = [
    "task=mqar",
    f"task.train=['{LEN}:4']",
    "task.train_weights=[1]",
    f"task.test=['{LEN}:4']",
    "task.vocab_size=128",
    "task.num_test=128",
    "train.num_steps=400",
    "train.eval_every=400",
    "train.checkpoint_every=400",
    "memory.page_size=4",
]
ARMS = (["mixer=mha"], ["mixer=swa", f"mixer.W.window={','.join(map(str, WINDOWS))}"])

records: list[Done] = []
for arm in ARMS:
    configs, _ = expand([*TASK, *arm, f"seed={','.join(SEEDS)}", *WORDS], multirun=True)
    for config in configs:
        assert execute(config) in ("done", "skipped")
        records += read_records(config.run_dir)

# %% [markdown]
# ## The table
# A row a run. Everything below is made from it alone: kept as a CSV file beside the figure, it is what others check.
# Bytes are those of keys and values of one sequence that must stay, at its end.


# %%
def table(records: Sequence[Done]) -> pd.DataFrame:
    """What is asked about of every run."""
    rows = []
    for record in records:
        layers = [layer for layer in record.memory.layers if layer["state"] == "kv"]
        mixer = record.config["mixer"]
        rows.append(
            {
                "sees": LEN if mixer["name"] == "mha" else mixer["W"]["window"],
                "seed": record.seed,
                "accuracy": record.quality.value,
                "kv_bytes": sum(layer["logical_bytes"] for layer in layers) // record.memory.batch_size,
            }
        )
    return pd.DataFrame(rows).sort_values(["sees", "seed"], ignore_index=True)


frame = table(records)
print(frame.to_string(index=False, float_format="%.3f"))

# %% [markdown]
# ## The claims
# Each says what is expected and what was found. Bytes follow from a formula: they must be equal. A window counts the
# token that looks, so that for the next one a token less has to stay. Accuracies are means over seeds and are held
# against bounds, which were chosen before the runs. `verdict` prints them and returns the exit status of a program: 1
# if one fails.


# %%
def claims(frame: pd.DataFrame) -> list[Claim]:
    """Bytes by the formula; recall of all tokens, and of the narrowest window."""
    means = frame.groupby("sees").mean()
    token_bytes = 2 * 4 * 16 * 4  # keys and values, of 4 heads of 16 numbers in float32
    rows = []
    for sees in means.index:
        stay = LEN if sees == LEN else sees - 1
        rows.append(Claim.exact(f"keys, values: sees {sees}", stay * token_bytes, int(means.kv_bytes[sees]), " B"))
    whole, narrow = means.accuracy[LEN], means.accuracy[min(WINDOWS)]
    rows.append(Claim("recall where all is seen", "at least 0.95", f"{whole:.3f}", whole >= 0.95))
    half = f"at most half of that, {whole / 2:.3f}"
    rows.append(Claim(f"recall where {min(WINDOWS)} are seen", half, f"{narrow:.3f}", narrow <= whole / 2))
    return rows


status = verdict(claims(frame), "How much of its past a layer must see")

# %% [markdown]
# ## The figure
# Every seed, their mean, and its 95% interval.


# %%
def draw(frame: pd.DataFrame, path: Path) -> None:
    """Recall against the bytes of keys and values, of the table alone."""
    figure, panel = sheet(size=(6.4, 4.0))
    for sees, rows in frame.groupby("sees"):
        held = rows.kv_bytes.iloc[0] / 1024
        half_width = interval_half_width(list(rows.accuracy)) if len(rows) > 1 else 0.0
        panel.plot([held] * len(rows), rows.accuracy, "o", color="tab:blue", alpha=0.4)
        panel.errorbar(held, rows.accuracy.mean(), half_width, color="tab:blue", marker="_", ms=16, capsize=4)
        panel.annotate(f"  last {sees}", (held, rows.accuracy.mean()), va="center")
    panel.set(xlabel="KiB of keys and values that a sequence needs", ylabel="accuracy of recall", ylim=(-0.03, 1.06))
    panel.set(xlim=(0, frame.kv_bytes.max() / 1024 * 1.15), title=f"Recall of 4 pairs in {LEN} tokens, by what is seen")
    panel.grid(alpha=0.25)
    save(figure, [path])


folder = Path(config.results_dir)
frame.to_csv(folder / "add_an_experiment.csv", index=False, float_format="%.6g")
draw(frame, folder / "add_an_experiment.png")
print(folder / "add_an_experiment.png")

# %% [markdown]
# ## If it is to stay
# A folder of `experiments/` with these functions in `figure.py`, a `main(output, results)` that writes table and figure
# and returns the verdict, and `RUNS`, the words of each sweep; and `configs/experiment/NAME.yaml` with what they share.
# `kvlab reproduce NAME` then does all of the above. [kv_sharing](../kv_sharing/figure.py) is a short one.
