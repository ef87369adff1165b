"""FLOPs of a program, counted in what was traced: XLA's `cost_analysis` counts the body of a loop once, however often
it runs (128 steps of a scan cost as much as one there)."""

import math
from collections.abc import Collection, Iterator
from typing import Any

import jax.numpy as jnp

MOVING = """
reshape broadcast_in_dim transpose squeeze slice dynamic_slice dynamic_update_slice concatenate pad gather rev split
expand_dims copy copy_p iota select_n sort argmax argmin get swap program_id device_put sharding_constraint
optimization_barrier stop_gradient
"""
COMPARING = "eq ne lt le gt ge and or xor not is_finite population_count clz"
CONVERTING = """
convert_element_type bitcast_convert_type shift_left shift_right_logical shift_right_arithmetic random_bits random_seed
random_wrap random_unwrap random_fold_in random_split threefry2x32
"""
FREE = frozenset(f"{MOVING} {COMPARING} {CONVERTING}".split())
"""What moves, compares or draws numbers and computes none."""
REDUCING = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cumprod", "cummax", "cumlogsumexp")
"""One operation for each number that goes in."""


def flops_of(program: Any, *, only: Collection[str] = ()) -> float:
    """Floating-point operations of a traced program (`jitted.trace(...).jaxpr`): two for each multiplication and sum of
    a product of matrices, one for each element of what else computes. A scan counts every step, a kernel every cell of
    its grid, a branch as the dearest of its kind (so empty blocks of experts count as full ones), and a loop whose
    steps are decided at run time one step. With `only` nothing but these primitives counts."""
    return sum(_of_equation(equation, only) for equation in getattr(program, "jaxpr", program).eqns)


def _of_equation(equation: Any, only: Collection[str]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        return max(flops_of(branch, only=only) for branch in params["branches"])
    inside = sum(flops_of(program, only=only) for program in _programs(params))
    if name == "scan":
        return params["length"] * inside
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int)) * inside
    if inside or (only and name not in only) or name in FREE:
        return inside
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * _size(equation.outvars) * math.prod(shape[axis] for axis in contracted)
    if name == "ragged_dot_general":  # every row with the matrix of its group
        return 2.0 * _size(equation.invars[:1]) * equation.outvars[0].aval.shape[-1]
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * _size(equation.outvars) * math.prod(kernel) / outputs
    if name in REDUCING:
        return float(_size(equation.invars))
    return float(_size(equation.outvars))


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation runs; of a custom derivative its own, which is the one that is traced."""
    for name, value in params.items():
        if name.startswith(("fwd", "bwd", "jvp")) or name in ("cond_jaxpr", "transpose_jaxpr", "vjp"):
            continue
        if hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value


def _size(variables: Any) -> int:
    """Floating-point numbers of these."""
    return sum(
        math.prod(variable.aval.shape)
        for variable in variables
        if hasattr(variable.aval, "dtype") and _is_float(variable.aval.dtype)
    )


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.complexfloating)
