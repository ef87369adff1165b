"""The scalar-decay state-space recurrence of Mamba-2 (arXiv 2405.21060), in parallel over tokens or one token at a
time.

    h_t = exp(decay_rate * dt_t) * h_{t-1} + dt_t * x_t (outer) b_t          y_t = h_t c_t

per head, with h in R^{P x N}. A token with dt = 0 leaves the state untouched: that is how padding is expressed.
"""

from jax import Array

from pallas_kernels.selection import select
from pallas_kernels.ssd import reference
from pallas_kernels.typing import Float

IMPLEMENTATIONS = {"reference": reference.ssd}
STEP_IMPLEMENTATIONS = {"reference": reference.ssd_step}


def ssd(
    inputs: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    decay_rate: Float[Array, "H"],
    b: Float[Array, "B T groups N"],
    c: Float[Array, "B T groups N"],
    initial_state: Float[Array, "B H P N"] | None = None,
    *,
    chunk_len: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """All T tokens at once, in chunks: quadratic inside a chunk, recurrent between chunks. Returns outputs and last
    state.

    `decay_rate` is negative; `dt` is not; head h reads group h // (H / groups) of b and c. Everything is float32.
    Raises ValueError when shapes do not fit together, the groups do not divide the heads, chunk_len < 1 or
    `implementation` is not available."""
    if inputs.shape[2] % b.shape[2]:
        raise ValueError(f"groups = {b.shape[2]}: must divide the number of heads {inputs.shape[2]}")
    if chunk_len < 1:
        raise ValueError(f"chunk_len = {chunk_len}: must be at least 1")
    _check(inputs, dt, decay_rate, b, c, initial_state)
    _, run = select("ssd", implementation, IMPLEMENTATIONS)
    return run(inputs, dt, decay_rate, b, c, initial_state, chunk_len=chunk_len)


def ssd_step(
    inputs: Float[Array, "B H P"],
    dt: Float[Array, "B H"],
    decay_rate: Float[Array, "H"],
    b: Float[Array, "B groups N"],
    c: Float[Array, "B groups N"],
    state: Float[Array, "B H P N"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H P"], Float[Array, "B H P N"]]:
    """One token of the recurrence, exactly; shapes and errors as `ssd` without T."""
    if inputs.shape[1] % b.shape[1]:
        raise ValueError(f"groups = {b.shape[1]}: must divide the number of heads {inputs.shape[1]}")
    _check(inputs, dt, decay_rate, b, c, state)
    _, run = select("ssd_step", implementation, STEP_IMPLEMENTATIONS)
    return run(inputs, dt, decay_rate, b, c, state)


def _check(inputs: Array, dt: Array, decay_rate: Array, b: Array, c: Array, state: Array | None) -> None:
    """Raises ValueError for shapes that do not fit the inputs' [B, (T,) H, P]."""
    *leading, num_heads, head_dim = inputs.shape
    wanted = {
        "dt": (dt, (*leading, num_heads)),
        "decay_rate": (decay_rate, (num_heads,)),
        "b": (b, (*leading, *b.shape[-2:])),
        "c": (c, b.shape),
    }
    if state is not None:
        wanted["state"] = state, (leading[0], num_heads, head_dim, b.shape[-1])
    for name, (array, shape) in wanted.items():
        if array.shape != tuple(shape):
            raise ValueError(f"{name} = {array.shape}: must be {tuple(shape)}, as inputs {inputs.shape} and b say")
