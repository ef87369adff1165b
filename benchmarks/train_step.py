"""Our training step beside the same model in PyTorch, eager and compiled: MQAR shapes, in turns, medians and ratios.

    make peers && .venv/bin/python benchmarks/train_step.py

Model: 2 layers of [short convolution, attention], width 64, 4 heads of 16, vocabulary 512, with and without a gated MLP
of 128; batch 64 x 128 tokens, 32 labelled positions; AdamW with clipping. Each peer runs in its own process and
environment (.peers), and all take turns, a round each. "compiled" is `torch.compile` of the model, both ways;
clipping and the optimizer are PyTorch's own. The floor is the FLOPs of a step over this machine's measured matrix
product.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, PAIRS, STEPS = 64, 128, 32, 10
PEERS = ("eager", "compiled")


def ours(with_mlp: bool):
    """A function that runs STEPS steps and returns milliseconds a step; and the FLOPs of one step."""
    import jax
    import jax.numpy as jnp

    from kvlab.compose import compose
    from kvlab.host import keep_freed_memory
    from kvlab.lab.flops import flops_of
    from kvlab.lab.laboratory import Laboratory
    from kvlab.random import named_key
    from kvlab.training.step import init_state

    keep_freed_memory()
    lab = Laboratory.of(
        compose(
            [
                "model.num_layers=2",
                f"model.mlp_dim={128 if with_mlp else 0}",
                "mixer.A.rope=false",
                f"task.train=[{LENGTH}:{PAIRS}]",
                "task.train_weights=[1]",
                f"train.batch_size={BATCH}",
                "optimizer.name=adamw",  # as the peers; the task's own recipe is Muon
            ]
        )
    )
    step_fn = lab.train_step()
    state = init_state(jax.tree.map(jnp.copy, lab.model.params), step_fn.optimizer, 1e-3)
    key, knobs = named_key(0, "train"), jnp.full(STEPS, PAIRS, jnp.int32)
    flops = flops_of(type(step_fn).__call__.trace(step_fn, state, (), key, knobs, LENGTH).jaxpr) / STEPS

    def round_ms() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step_fn(state, (), key, knobs, LENGTH)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) * 1e3 / STEPS

    return round_ms, flops, lab.model.num_params


def matmul_gflops() -> float:
    """This machine's float32 matrix product, 1024 cubed, through the same XLA."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1024, 1024))
    product = jax.jit(lambda a: a @ a)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * 1024**3 / statistics.median(times[2:]) / 1e9


PEER = r"""
import sys, time
import torch
from torch import nn
import torch.nn.functional as F

BATCH, LENGTH, PAIRS, STEPS, MLP, THREADS = (int(x) for x in sys.argv[1:7])
torch.set_num_threads(THREADS)
torch.manual_seed(0)
VOCAB, WIDTH, HEADS = 512, 64, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        if MLP:
            self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-6)
            self.gate_up = nn.Linear(WIDTH, 2 * MLP, bias=False)
            self.down = nn.Linear(MLP, WIDTH, bias=False)

    def forward(self, x):
        h = self.norm(x)
        h = h + self.conv(h.transpose(1, 2))[..., :LENGTH].transpose(1, 2)
        q, k, v = (t.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH))
        if MLP:
            gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
            x = x + self.down(F.silu(gate) * up)
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, tokens, places):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).gather(1, places[..., None].expand(-1, -1, WIDTH))
        return x @ self.embedding.weight.T


model = Model()
forward = torch.compile(model) if sys.argv[7] == "compiled" else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
print(sum(p.numel() for p in model.parameters()), torch.__version__, flush=True)


def step():
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    places = torch.rand(BATCH, LENGTH).topk(PAIRS, -1).indices
    labels = torch.randint(VOCAB, (BATCH, PAIRS))
    loss = F.cross_entropy(forward(tokens, places).flatten(0, 1), labels.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


for line in sys.stdin:  # one round a line
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    print((time.perf_counter() - began) * 1e3 / STEPS, flush=True)
"""


class Peer:
    """A process of PyTorch, one round at a time."""

    def __init__(self, with_mlp: bool, threads: int, kind: str):
        python = ROOT / ".peers" / "bin" / "python"
        if not python.exists():
            sys.exit("benchmarks/train_step.py: PyTorch's environment is missing; run `make peers` first")
        arguments = [str(x) for x in (BATCH, LENGTH, PAIRS, STEPS, 128 if with_mlp else 0, threads)]
        arguments.append(kind)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([str(python), "-c", PEER, *arguments], **pipes)
        num_params, self.version = self._read().split()
        self.num_params = int(num_params)

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def round_ms(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        return float(self._read())


def main() -> None:
    """Prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "train_step.json")
    options = parser.parse_args()
    import jax

    threads = len(os.sched_getaffinity(0))
    ceiling = matmul_gflops()
    rows = []
    for with_mlp in (False, True):
        run, flops, num_params = ours(with_mlp)
        peers = [Peer(with_mlp, threads, kind) for kind in PEERS]
        rounds = [(run(), *(peer.round_ms() for peer in peers)) for _ in range(options.rounds + 2)][2:]
        mine, *theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = [statistics.median(row[place] / row[0] for row in rounds) for place in range(1, 1 + len(peers))]
        for peer in peers:
            peer.process.terminate()
        achieved = flops / mine / 1e6
        row = {
            "model": "2 layers with MLP" if with_mlp else "2 layers without MLP",
            "num_params": num_params,
            "peer_num_params": peers[0].num_params,
            "kvlab_ms": mine,
            "torch_ms": dict(zip(PEERS, theirs, strict=True)),
            "speedup": dict(zip(PEERS, ratios, strict=True)),
            "rounds": rounds,
            "flops": flops,
            "gflops_per_s": achieved,
            "floor_ms": flops / ceiling / 1e6,
            "torch": peers[0].version,
        }
        rows.append(row)
        beside = "  ".join(
            f"torch {kind} {ms:6.1f} ms, speedup {ratio:4.2f}x"
            for kind, ms, ratio in zip(PEERS, theirs, ratios, strict=True)
        )
        print(
            f"{row['model']:<22} kvlab {mine:6.1f} ms  {beside}  {flops / 1e9:.2f} GFLOP a step at "
            f"{achieved:.0f} GFLOP/s; floor {row['floor_ms']:.1f} ms at this machine's {ceiling:.0f} GFLOP/s",
            flush=True,
        )
    result = {
        "benchmark": "train_step",
        "date": date.today().isoformat(),
        "machine": {"processor": platform.machine(), "threads": threads, "matmul_gflops_per_s": ceiling},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
