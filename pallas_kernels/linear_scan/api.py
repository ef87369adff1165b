"""The recurrence of linear attention and of delta rules, in parallel over tokens or one token at a time.

    S_t = e^{g_t} S_{t-1}                                       decay, of the whole state or of each key channel
    S_t = S_t + beta_t k_t (v_t - S_t^T k_t)^T                  "delta": what the key held is replaced
    S_t = S_t + beta_t k_t v_t^T                                "plain": it is added to
    o_t = S_t^T q_t

per head, with S in R^{N x P}: linear attention (arXiv 2006.16236), RetNet (2307.08621), GLA (2312.06635), DeltaNet
(2406.06484), Gated DeltaNet (2412.06464) and KDA (2510.26692) by their gates. A token with g = 0 and beta = 0 leaves
the state untouched: that is how padding is expressed.
"""

from typing import Literal

from jax import Array

from pallas_kernels.linear_scan import reference
from pallas_kernels.selection import select
from pallas_kernels.typing import Float

IMPLEMENTATIONS = {"reference": reference.linear_scan}
STEP_IMPLEMENTATIONS = {"reference": reference.linear_scan_step}

type Rule = Literal["plain", "delta"]
RULES = ("plain", "delta")


def linear_scan(
    queries: Float[Array, "B T H N"],
    keys: Float[Array, "B T H N"],
    values: Float[Array, "B T H P"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H G"] | None = None,
    initial_state: Float[Array, "B H N P"] | None = None,
    *,
    rule: Rule = "delta",
    chunk_len: int = 32,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H N P"]]:
    """All T tokens at once, in chunks: quadratic inside a chunk, recurrent between chunks. Returns outputs and last
    state.

    `log_decay` is never positive, and has one number a head (G = 1) or one a key channel (G = N); None: nothing decays.
    Under the delta rule keys are of length 1, or beta |k|^2 at most 2, for the recurrence to be stable. Everything is
    float32. Raises ValueError when shapes do not fit together, for another rule, for chunk_len < 1 and for an
    `implementation` that is not available."""
    if chunk_len < 1:
        raise ValueError(f"chunk_len = {chunk_len}: must be at least 1")
    _check(queries, keys, values, beta, log_decay, initial_state, rule)
    _, run = select("linear_scan", implementation, IMPLEMENTATIONS)
    return run(queries, keys, values, beta, log_decay, initial_state, rule=rule, chunk_len=chunk_len)


def linear_scan_step(
    queries: Float[Array, "B H N"],
    keys: Float[Array, "B H N"],
    values: Float[Array, "B H P"],
    beta: Float[Array, "B H"],
    log_decay: Float[Array, "B H G"] | None,
    state: Float[Array, "B H N P"],
    *,
    rule: Rule = "delta",
    implementation: str | None = None,
) -> tuple[Float[Array, "B H P"], Float[Array, "B H N P"]]:
    """One token of the recurrence, exactly; shapes and errors as `linear_scan` without T."""
    _check(queries, keys, values, beta, log_decay, state, rule)
    _, run = select("linear_scan_step", implementation, STEP_IMPLEMENTATIONS)
    return run(queries, keys, values, beta, log_decay, state, rule=rule)


def _check(
    queries: Array,
    keys: Array,
    values: Array,
    beta: Array,
    log_decay: Array | None,
    state: Array | None,
    rule: str,
) -> None:
    """Raises ValueError for shapes that do not fit the keys' [B, (T,) H, N], and for a rule that there is not."""
    if rule not in RULES:
        raise ValueError(f"rule = {rule!r}: must be one of {', '.join(RULES)}")
    *leading, num_heads, key_dim = keys.shape
    wanted = {
        "queries": (queries, keys.shape),
        "values": (values, (*leading, num_heads, values.shape[-1])),
        "beta": (beta, (*leading, num_heads)),
    }
    if state is not None:
        wanted["state"] = state, (leading[0], num_heads, key_dim, values.shape[-1])
    for name, (array, shape) in wanted.items():
        if array.shape != tuple(shape):
            raise ValueError(f"{name} = {array.shape}: must be {tuple(shape)}, as keys {keys.shape} say")
    legal = [(*leading, num_heads, count) for count in (1, key_dim)]
    if log_decay is not None and log_decay.shape not in legal:
        raise ValueError(f"log_decay = {log_decay.shape}: must be {legal[0]} or {legal[1]}, as keys {keys.shape} say")
