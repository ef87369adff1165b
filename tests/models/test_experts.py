"""Experts beside their definition in float64, a loop over tokens; and the product of groups that they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.models.experts import Experts, ExpertsConfig
from kvlab.models.grouped import MAX_BLOCK, block_len_of, by_blocks, grouped_product
from kvlab.models.transformer import Block, LayerConfig, ModelConfig
from kvlab.schema import ConfigError
from kvlab.sections import MixerConfig
from tests.models.test_transformer import LAYER

DIM = 24
PLAIN = ExpertsConfig(num_experts=5, experts_per_token=2, expert_dim=16)
CLAMPED = ExpertsConfig(num_experts=6, experts_per_token=3, expert_dim=10, limit=1.5, gain=1.702, bias=True)
QWEN = ExpertsConfig(
    num_experts=6, experts_per_token=3, expert_dim=10, normalised=False, shared_dim=12, shared_gate=True
)
DEEPSEEK = ExpertsConfig(
    num_experts=12,
    experts_per_token=3,
    expert_dim=10,
    scores="sigmoid",
    share_scale=2.5,
    choice_bias=True,
    num_groups=4,
    groups_per_token=2,
    shared_dim=12,
)
MANY = ExpertsConfig(num_experts=40, experts_per_token=1, expert_dim=8)


def experts_of(config: ExpertsConfig, dtype: str = "float32") -> Experts:
    """With parameters of which the clamps are used and biases are seen."""
    experts = Experts(config, DIM, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for layer in (experts.router, experts.gate_up, experts.down):
        layer.kernel[...] = jnp.asarray(0.4 * rng.standard_normal(layer.kernel.shape), jnp.float32)
        if config.bias:
            layer.bias[...] = jnp.asarray(0.5 * rng.standard_normal(layer.bias.shape), jnp.float32)
    if config.choice_bias:
        experts.choice_bias[...] = jnp.asarray(0.5 * rng.standard_normal(config.num_experts), jnp.float32)
    return experts


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((1, count, DIM)).astype(np.float32)


def defined(experts: Experts, token: np.ndarray) -> np.ndarray:
    """One token through its experts, in float64."""
    config, token = experts.config, token.astype(np.float64)

    def product(layer, x, *place):
        y = x @ np.asarray(layer.kernel[...], np.float64)[place]
        return y + np.asarray(layer.bias[...], np.float64)[place] if config.bias else y

    chosen, shares = chosen_by_definition(experts, product(experts.router, token, ...))
    out = np.zeros(DIM)
    for expert, share in zip(chosen, shares, strict=True):
        both = product(experts.gate_up, token, expert)
        gate, up = both[0::2], both[1::2]
        if config.limit is not None:
            gate, up = np.minimum(gate, config.limit), np.clip(up, -config.limit, config.limit) + 1
        gain = 1.0 if config.limit is None else config.gain
        out += share * product(experts.down, gate / (1 + np.exp(-gain * gate)) * up, expert)
    if config.shared_dim:
        gate, up = np.split(product(experts.shared.gate_up, token, ...), 2)
        shared = product(experts.shared.down, gate / (1 + np.exp(-gate)) * up, ...)
        scale = 1 / (1 + np.exp(-product(experts.shared_gate, token, ...))) if config.shared_gate else 1.0
        out += scale * shared
    return out


def chosen_by_definition(experts: Experts, logits: np.ndarray) -> tuple[list[int], np.ndarray]:
    config, numbers = experts.config, range(experts.config.num_experts)
    scores = 1 / (1 + np.exp(-logits)) if config.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    compared = scores + np.asarray(experts.choice_bias[...], np.float64) if config.choice_bias else scores
    size = config.num_experts // config.num_groups
    sums = [sum(sorted(compared[group * size : (group + 1) * size])[-2:]) for group in range(config.num_groups)]
    best = sorted(range(config.num_groups), key=lambda group: (-sums[group], group))[: config.groups_per_token]
    among = [number for number in numbers if number // size in best]
    chosen = sorted(among, key=lambda number: (-compared[number], number))[: config.experts_per_token]
    shares = scores[chosen] / (scores[chosen].sum() if config.normalised else 1.0)
    return chosen, shares * config.share_scale


@pytest.mark.parametrize("count", [1, 3, 70])
@pytest.mark.parametrize(
    "config", [PLAIN, CLAMPED, MANY, QWEN, DEEPSEEK], ids=["plain", "clamped", "many", "qwen", "deepseek"]
)
def test_experts_are_what_their_definition_says(config, count):
    experts, tokens = experts_of(config), tokens_of(count)
    expected = [defined(experts, token) for token in tokens[0]]
    np.testing.assert_allclose(experts(jnp.asarray(tokens))[0], expected, atol=2e-5)


def test_in_bfloat16_it_is_so_as_far_as_that_goes():
    """The router computes in float32: of the same tokens it chooses the same experts."""
    experts = experts_of(CLAMPED, "bfloat16")
    tokens = jnp.asarray(tokens_of(20)).astype(jnp.bfloat16)
    found = experts(tokens)
    assert found.dtype == jnp.bfloat16
    expected = [defined(experts, token) for token in np.asarray(tokens[0].astype(jnp.float32))]
    np.testing.assert_allclose(found[0].astype(jnp.float32), expected, atol=0.15)


def test_of_equal_logits_the_lower_number_wins():
    experts = experts_of(CLAMPED)
    experts.router.kernel[...] = jnp.zeros_like(experts.router.kernel[...])
    experts.router.bias[...] = jnp.asarray([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    chosen, shares = experts.choose(jnp.asarray(tokens_of(2))[0])
    assert chosen.tolist() == [[1, 3, 0]] * 2
    np.testing.assert_allclose(shares.sum(axis=-1), 1.0, atol=1e-6)
    assert float(shares[0, 0]) == float(shares[0, 1])
    tokens = tokens_of(4)
    np.testing.assert_allclose(experts(jnp.asarray(tokens))[0], [defined(experts, t) for t in tokens[0]], atol=2e-5)


def test_a_tokens_answer_does_not_depend_on_its_neighbours():
    """Others in its place of the batch, more of them, and some that hold NaN."""
    experts, tokens = experts_of(CLAMPED), tokens_of(9)
    alone = experts(jnp.asarray(tokens[:, :1]))[0, 0]
    others = tokens.copy()
    others[0, 1:4] = np.nan
    for batch in (tokens, tokens[:, [0, 0, 0, 0]], others):
        np.testing.assert_allclose(experts(jnp.asarray(batch))[0, 0], alone, atol=1e-6)
    order = np.random.default_rng(3).permutation(9)
    np.testing.assert_allclose(
        experts(jnp.asarray(tokens[:, order]))[0], np.asarray(experts(jnp.asarray(tokens)))[0][order], atol=1e-6
    )


SIZES = ([4, 0, 3, 1], [0, 0, 8, 0], [8, 0, 0, 0], [0, 0, 0, 8], [2, 2, 2, 2], [70, 1, 0, 40], [1, 0, 0, 0])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_blocks_are_the_product_of_groups(sizes):
    """Its value, and its gradients, beside JAX's own."""
    rng = np.random.default_rng(0)
    rows, matrices = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((sum(sizes), 6), (4, 6, 5)))
    weigh = jnp.asarray(rng.standard_normal((sum(sizes), 5)), jnp.float32)
    sizes = jnp.asarray(sizes, jnp.int32)
    np.testing.assert_allclose(by_blocks(rows, matrices, sizes), jax.lax.ragged_dot(rows, matrices, sizes), atol=1e-5)
    found, expected = (
        jax.jit(jax.grad(lambda r, m: jnp.sum(weigh * product(r, m, sizes)), argnums=(0, 1)))(rows, matrices)  # noqa: B023
        for product in (by_blocks, jax.lax.ragged_dot)
    )
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_nothing_is_held_for_every_expert():
    """Beside its inputs and outputs a product holds less than rows for all groups."""
    rows, matrices, sizes = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((256, 64), jnp.float32), ((32, 64, 64), jnp.float32), ((32,), jnp.int32))
    )
    held = jax.jit(grouped_product).lower(rows, matrices, sizes).compile().memory_analysis().temp_size_in_bytes
    assert held < 256 * 64 * 4 * 32 / 4


def test_blocks_are_half_as_long_as_groups_are_on_average():
    assert [block_len_of(n, 8) for n in (1, 16, 17, 32, 60, 100, 10_000)] == [1, 1, 1, 2, 4, 8, MAX_BLOCK]


def test_several_models_at_once_are_each_as_by_itself():
    """As training does it for seeds and learning rates, whose tokens go to other experts."""
    rng = np.random.default_rng(0)
    rows, matrices = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 9, 6), (2, 3, 6, 5)))
    sizes = jnp.asarray([[4, 0, 5], [0, 8, 1]], jnp.int32)
    found = jax.vmap(jax.grad(lambda r, m, s: jnp.sum(by_blocks(r, m, s) ** 2), argnums=1))(rows, matrices, sizes)
    for each in range(2):
        mine = jax.grad(lambda m: jnp.sum(jax.lax.ragged_dot(rows[each], m, sizes[each]) ** 2))  # noqa: B023
        np.testing.assert_allclose(found[each], mine(matrices[each]), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_per_token": 9}, "experts_per_token = 9: must be at most num_experts = 8"),
        ({"num_groups": 3}, "num_groups = 3: must divide num_experts = 8 into groups of two or more"),
        ({"num_groups": 8}, "num_groups = 8: must divide num_experts = 8 into groups of two or more"),
        ({"num_groups": 2, "groups_per_token": 3}, "groups_per_token = 3: must be at most num_groups = 2"),
        (
            {"num_groups": 4, "experts_per_token": 3},
            "experts_per_token = 3: must be at most .* in 1 of .* = 2",
        ),
        ({"shared_gate": True}, "shared_gate = True: must be false without a shared expert"),
        ({"scores": "tanh"}, "scores = 'tanh': must be one of softmax, sigmoid"),
    ],
)
def test_experts_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ExpertsConfig(num_experts=8, **fields)


def test_a_layer_has_experts_where_the_model_has_no_mlp():
    block = Block(LayerConfig(LAYER.mixer, LAYER.config, mlp=PLAIN), ModelConfig(model_dim=16), rngs=nnx.Rngs(0))
    assert block.mlp.gate_up.kernel.shape == (5, 16, 32)
    assert not Block(LAYER, ModelConfig(model_dim=16), rngs=nnx.Rngs(0)).has_mlp


def test_a_section_of_a_layer_may_have_experts():
    section = {"name": "m", "pattern": "A", "A": {"type": "attention", "mlp": {"num_experts": 3}}}
    mixer = MixerConfig.build(section)
    assert mixer.layers["A"].mlp == ExpertsConfig(num_experts=3)
    assert MixerConfig.build(mixer.as_dict()) == mixer
    assert "mlp" not in MixerConfig.build(section | {"A": {"type": "attention", "mlp": None}}).as_dict()["A"]
    for wrong, message in (
        ({"num_experts": 0}, r"mixer.A.mlp.num_experts = 0: must be an integer in \[1, 65536\]"),
        ({"experts": 3}, "mixer.A.mlp.experts"),
        (3, "mixer.A.mlp = 3: must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            MixerConfig.build(section | {"A": {"type": "attention", "mlp": wrong}})
