"""Shapes in signatures: jaxtyping's where it is installed, and else only words, since kernels are to need nothing but
jax."""

import importlib.util
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING or importlib.util.find_spec("jaxtyping"):
    from jaxtyping import Bool, Float, Int32, Shaped
else:

    class _Words:
        """`Float[Array, "B T"]` is an array."""

        def __class_getitem__(cls, said: Any) -> Any:
            return jax.Array

    Bool = Float = Int32 = Shaped = _Words

__all__ = ["Bool", "Float", "Int32", "Shaped"]
