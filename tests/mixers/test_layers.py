"""What mixers and blocks are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.mixers.layers import Linear
from pallas_kernels.selection import Device, as_if_on

H200 = Device("gpu", "NVIDIA H200", "9.0")


@pytest.mark.parametrize(("shape", "rows_on_gpu"), [((1, 1, 8), 2), ((2, 1, 8), 2), ((1, 3, 8), 3), ((8,), 2)])
def test_a_gpu_multiplies_two_rows_at_least(shape, rows_on_gpu):
    """And the answer is that of the rows there are, on either device."""
    layer = Linear(8, 5, use_bias=True, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(5.0)
    inputs = jax.random.normal(jax.random.key(0), shape)
    wanted = np.float64(inputs) @ np.float64(layer.kernel[...]) + np.arange(5.0)

    def rows() -> list[int]:
        found = jax.make_jaxpr(lambda x: layer(x))(inputs)
        multiplied = [each.invars[0].aval.shape[0] for each in found.eqns if each.primitive.name == "dot_general"]
        assert found.out_avals[0].shape == wanted.shape
        return multiplied

    assert rows() == [max(1, inputs.size // 8)]
    with as_if_on(H200):
        assert rows() == [rows_on_gpu]
        np.testing.assert_allclose(layer(inputs), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer(inputs), wanted, rtol=1e-5, atol=1e-5)
