"""Mamba-2 against a float64 rewrite of its recurrence, and its published bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.engine.shapes import Buckets
from kvlab.engine.step import MemoryStep
from kvlab.lab.laboratory import Laboratory
from kvlab.memory.views import whole
from kvlab.mixers import MIXERS, Mixer
from kvlab.mixers.mamba2 import Mamba2, Mamba2Config


def silu(x):
    return x / (1 + np.exp(-x))


def test_equals_the_recurrence():
    config = Mamba2Config(state_dim=5, num_heads=4, head_dim=6, num_groups=2, conv_len=3, chunk_len=4)
    layer = Mamba2(config, 16, dtype="float32", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, 13, 16))
    positions = jnp.arange(13, dtype=jnp.int32)[None]
    (memory,) = whole([layer.states()], 1, 13)
    y, _ = jax.jit(lambda x: layer(x, positions, memory))(jnp.asarray(x, jnp.float32))

    def param(variable):
        return np.asarray(variable[...], np.float64)

    projected = x[0] @ param(layer.split.kernel)
    gate, channels, dt = np.split(projected, [24, 24 + 44], axis=-1)
    padded = np.concatenate([np.zeros((2, 44)), channels])
    kernel = param(layer.conv.kernel)
    channels = silu(sum(kernel[lag] * padded[2 - lag : 15 - lag] for lag in range(3)) + param(layer.conv.bias))
    inputs, b, c = np.split(channels, [24, 34], axis=-1)
    inputs, b, c = inputs.reshape(13, 4, 6), b.reshape(13, 2, 5), c.reshape(13, 2, 5)
    dt = np.log1p(np.exp(dt + param(layer.dt_bias)))
    rate = -np.exp(param(layer.log_rate))
    state, outputs = np.zeros((4, 6, 5)), np.zeros((13, 4, 6))
    for t in range(13):
        for head in range(4):
            added = dt[t, head] * np.outer(inputs[t, head], b[t, head // 2])
            state[head] = np.exp(rate[head] * dt[t, head]) * state[head] + added
            outputs[t, head] = state[head] @ c[t, head // 2] + param(layer.skip)[head] * inputs[t, head]
    gated = (outputs.reshape(13, 24) * silu(gate)).reshape(13, 2, 12)  # the norm is each group's own
    normed = (gated / np.sqrt((gated**2).mean(-1, keepdims=True) + 1e-6)).reshape(13, 24) * param(layer.norm.scale)
    np.testing.assert_allclose(y[0], normed @ param(layer.out.kernel), atol=2e-5)


def test_state_bytes_of_mamba2_2_7b():
    """FIGURES: 86,638,592 bytes a sequence in bf16 with a convolution history of 4 columns; exactness needs only 3."""
    layers, inner, state, heads = 64, 5120, 128, 80
    ssm, columns = layers * inner * state * 2, layers * (inner + 2 * state) * 2
    assert ssm + 4 * columns == 86_638_592
    config = Mamba2Config(state_dim=state, num_heads=heads, head_dim=64)
    layer = nnx.eval_shape(lambda: Mamba2(config, 2560, dtype="bfloat16", rngs=nnx.Rngs(0)))
    stated = {name: layers * spec.unit_bytes for name, spec in layer.states().items()}
    assert stated == {"ssm": 2 * ssm, "conv": 3 * columns}  # ours keeps the recurrence in float32


def test_every_registered_mixer_states_its_bytes():
    for name, kind in MIXERS.items():
        layer = kind(kind.Config(), 32, dtype="float32", rngs=nnx.Rngs(0))
        assert sum(spec.unit_bytes for spec in layer.states().values()) > 0, name


def test_a_mixer_without_bytes_cannot_be_constructed():
    class Forgetful(Mixer):
        def __call__(self, x, positions, memory):
            return x, memory

    import pytest

    with pytest.raises(TypeError, match="abstract"):
        Forgetful()


@pytest.mark.parametrize("mixer", ["mamba2", "hybrid"])
def test_programs_are_as_large_whatever_the_chunks(mixer, config_of):
    """Chunks of the mixer and of the memory, prime, 1, or longer than a prompt, are shapes of one program: its
    operations are as many, but for the padding of a rest. Steps of up to 3 tokens have three widths."""
    found = set()
    for chunk_len, width in ((7, 3), (3, 64), (1, 3), (97, 64), (64, 97)):
        words = [f"mixer={mixer}", "model.model_dim=16", "mixer.M.num_heads=2", "mixer.M.head_dim=8"]
        words += [f"mixer.M.chunk_len={chunk_len}", f"memory.chunk_len={width}"]
        lab = Laboratory.of(config_of(*words), abstract=True)
        layout = lab.layout(128, 2)
        plan, tokens = layout.ledger().plan([], 2, width), jax.ShapeDtypeStruct((2, width), jnp.int32)
        pools = jax.eval_shape(layout.allocate)
        lowered = MemoryStep.next_logits.lower(
            MemoryStep(lab.model.structure, layout), lab.model.params, pools, plan, tokens
        )
        found.add(lowered.as_text().count("stablehlo."))
    assert max(found) < 1.1 * min(found), found
    assert max(found) < 1500
    assert {Buckets().width_for(num_tokens, 3) for num_tokens in (1, 2, 3)} == {1, 2, 3}
