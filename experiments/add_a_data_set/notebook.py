# %% [markdown]
# # A data set of one's own, in a notebook
# Any file of text is a data set: `task.path=FILE`. The first nine tenths are trained on, the rest is half validation
# and half test; a folder is split by file instead. Here the file is made on the spot, of the English that is on every
# machine: the docstrings of Python's standard library. A model reads it by the byte, another by tokens of a vocabulary
# made for it, and both are compared by bits per byte: how well, and in how many bytes of memory.
#
# `KVLAB_WORDS` in the environment adds words to every run: `train.num_steps=4 train.eval_every=4
# train.checkpoint_every=4` shows that it runs, in place of some minutes. Results lie in `results/default`. Making a
# vocabulary needs the extra `hf` (`pip install 'kvlab[hf]'`).

# %%
import ast
import math
import os
import sysconfig
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvlab.compose import compose
from kvlab.lab.execute import execute
from kvlab.lab.results import read_records
from kvlab.tasks.corpus import read_splits

WORDS = os.environ.get("KVLAB_WORDS", "").split()
FOLDER = Path(os.environ.get("KVLAB_DATA", "results/docstrings"))
VOCAB_SIZE = 1024

# %% [markdown]
# ## The text
# The file is part of a run's identity, by its contents: change a letter, and it is another run. Modules are taken in
# order of their names, so that the file is the same wherever the library is.


# %%
def docstrings(source: str) -> list[str]:
    """Every docstring of a module, those of its functions and classes included."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        text for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and (text := ast.get_docstring(node))
    ]


FOLDER.mkdir(parents=True, exist_ok=True)
path = FOLDER / "docstrings.txt"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the library's own, when it is parsed
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for module in modules for text in docstrings(module.read_text(errors="replace"))]
path.write_text("\n\n".join(texts))
splits, digest = read_splits(str(path), "*.py")
print(f"{len(texts):,} docstrings of {len(modules)} modules, SHA-256 {digest[:10]}:")
print({name: f"{len(part):,} bytes" for name, part in splits.items()})

# %% [markdown]
# ## The vocabulary
# Byte-pair encoding, learned from the training split alone: what the test says must not choose its tokens. Any
# `tokenizer.json` of the Hugging Face hub does in its place.

# %%
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()  # every byte has a token: nothing is unknown
trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator([splits["train"].tobytes().decode()], trainer)
vocabulary = FOLDER / "tokenizer.json"
tokenizer.save(str(vocabulary))
test = splits["test"].tobytes().decode()
ids = tokenizer.encode(test).ids
bytes_per_token = len(test.encode()) / len(ids)
print(f"{tokenizer.get_vocab_size()} tokens; the test split is {len(ids):,}, of {bytes_per_token:.2f} bytes each:")
print([tokenizer.decode([token]) for token in ids[:12]])

# %% [markdown]
# ## The runs
# `task=text` reads bytes, `task=perplexity` what its tokenizer says; `task.whole=false` leaves the test split out of
# training. Windows are about as much text in both: 256 bytes, and as many tokens as that is.


# %%
def asked(name: str):
    """One model, by the byte or by tokens."""
    window = [f"task.path={path}", "task.num_test=64", "task.num_validation=32"]
    if name == "bytes":
        task = ["task=text", *window, "task.seq_len=256"]
    else:
        num_tokens = 8 * round(256 / bytes_per_token / 8)
        task = ["task=perplexity", "task.whole=false", *window, f"task.tokenizer={vocabulary}", "task.decode_len=16"]
        task += [f"task.seq_len={num_tokens}", "model=text", "optimizer=text", "train=text"]
    steps = ["train.num_steps=400", "train.eval_every=400", "train.checkpoint_every=400"]
    return compose([*task, "mixer=mqa", *steps, *WORDS])


found = {}
for name in ("bytes", "tokens"):
    config = asked(name)
    assert execute(config) in ("done", "skipped")
    (found[name],) = read_records(config.run_dir)

# %% [markdown]
# ## The comparison
# A perplexity per token says nothing beside bits per byte. Its logarithm is the bits of a token; over the bytes that a
# token of the test split stands for, they are comparable. So is memory: what a sequence holds, over the bytes of text
# that it has read.

# %%
rows = {}
for name, record in found.items():
    value, seq_len = record.quality.value, record.config["task"]["seq_len"]
    per_token = 1.0 if name == "bytes" else bytes_per_token
    bits = value if record.quality.metric == "bits_per_byte" else math.log2(value) / per_token
    held = record.memory.logical_bytes / record.memory.batch_size / (seq_len * per_token)
    rows[name] = bits, held
    print(
        f"by {name}: {record.quality.metric} {value:.3f}, {bits:.3f} bits per byte; "
        f"{held:.0f} bytes held for a byte of text; {record.num_params:,} parameters"
    )

figure, panel = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
for name, (bits, held) in rows.items():
    panel.plot(held, bits, "o", ms=9, label=f"by {name}")
panel.set(xlabel="bytes held for a byte of text", ylabel="bits per byte (less is better)")
panel.set_title("Docstrings of the standard library, read in two ways")
panel.set_xlim(left=0)
panel.margins(y=0.4)
panel.grid(alpha=0.25)
panel.legend()
picture = Path(config.results_dir) / "add_a_data_set.png"
figure.savefig(picture, dpi=130)
print(picture)
