"""Which tensors make an MLP, or the experts in its place."""

import numpy as np

from kvlab.models.experts import ExpertsConfig
from kvlab.weights.tables import END_TO_END, SIDE_BY_SIDE, TRANSPOSED, Entry, Table, Tensor, Transform, linear


def mlp_table(ours: str, theirs: str, *, bias: bool = False) -> Table:
    """The gated MLP."""
    both = (f"{theirs}.gate_proj", f"{theirs}.up_proj")
    table: Table = {f"{ours}.gate_up.kernel": Entry(tuple(f"{name}.weight" for name in both), SIDE_BY_SIDE)}
    if bias:
        table[f"{ours}.gate_up.bias"] = Entry(tuple(f"{name}.bias" for name in both), END_TO_END)
    return table | linear(f"{ours}.down", f"{theirs}.down_proj", bias=bias)


def experts_table(ours: str, theirs: str, config: ExpertsConfig, *, shared: str = "shared_experts") -> Table:
    """Experts whose file has three matrices for each, as Qwen's and DeepSeek's do; `shared` is what it calls the one of
    all tokens."""
    experts = [f"{theirs}.experts.{number}" for number in range(config.num_experts)]
    pairs = tuple(f"{expert}.{name}_proj.weight" for expert in experts for name in ("gate", "up"))
    table = linear(f"{ours}.router", f"{theirs}.gate")
    table[f"{ours}.gate_up.kernel"] = Entry(pairs, INTERLEAVED)
    table[f"{ours}.down.kernel"] = Entry(tuple(f"{expert}.down_proj.weight" for expert in experts), STACKED)
    if config.choice_bias:
        table[f"{ours}.choice_bias"] = Entry((f"{theirs}.gate.e_score_correction_bias",))
    if config.shared_dim:
        table |= mlp_table(f"{ours}.shared", f"{theirs}.{shared}")
    if config.shared_gate:
        table |= linear(f"{ours}.shared_gate", f"{theirs}.{shared}_gate")
    return table


def _interleaved(parts: list[Tensor]) -> Tensor:
    outputs, inputs = parts[0].shape
    whole = np.empty((len(parts) // 2, inputs, 2 * outputs), parts[0].dtype)
    for number, part in enumerate(parts):
        whole[number // 2, :, number % 2 :: 2] = part.T
    return whole


INTERLEAVED = Transform(
    lambda parts: _interleaved(list(parts)),
    lambda whole: [expert[:, first::2].T for expert in whole for first in (0, 1)],
)
"""Gate and up of every expert, [out, in] each in the file, as the even and odd columns of [experts, in, 2 out]."""
STACKED = Transform(
    lambda parts: np.stack([TRANSPOSED.load([part]) for part in parts]),
    lambda whole: [expert.T for expert in whole],
)
"""A matrix of every expert, [out, in] in the file, as [experts, in, out]."""
