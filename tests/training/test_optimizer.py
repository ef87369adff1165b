"""The optimizers against references written out by hand: AdamW's schedule and masks, Muon's orthogonal momentum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvlab.lab.laboratory import Laboratory
from kvlab.schema import ConfigError
from kvlab.training.checkpoint import Checkpoints
from kvlab.training.optimizer import OptimizerConfig, decays, make_optimizer, orthogonalised


def test_weight_decay_spares_vectors_and_convolutions(config_of):
    params = Laboratory.of(config_of("mixer=mamba2")).model.params
    mask = decays(params)
    mixer = mask["blocks"][0]["mixer"]
    assert mask["embedding"]["embedding"]
    assert mixer["split"]["kernel"]
    assert mixer["out"]["kernel"]
    for spared in (mixer["dt_bias"], mixer["log_rate"], mixer["skip"], mixer["norm"]["scale"], mixer["conv"]["kernel"]):
        assert not spared
    assert not mask["blocks"][0]["short_conv"]["kernel"]
    kda = decays(Laboratory.of(config_of("mixer=kda")).model.params)["blocks"][0]["mixer"]
    assert kda["step"]["kernel"]
    assert not any((kda["dt_bias"], kda["log_rate"], kda["norm"]["scale"]))


def test_the_optimizer_is_adamw_with_warmup_and_cosine():
    """Against optax's own adamw with the schedule written out by hand."""
    config = OptimizerConfig(weight_decay=0.2, warmup_fraction=0.25, final_fraction=0.1, clip_norm=None)
    ours = make_optimizer(config, 8)
    peak = 0.03

    def schedule(step):
        if step < 2:
            return peak * step / 2
        return peak * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - 2) / 6)))

    params = mine = {"w": jnp.ones((2, 3))}
    state, reference = ours.init(params), None
    rng = np.random.default_rng(0)
    for step in range(8):
        grads = {"w": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)}
        peer = optax.adamw(schedule(step), weight_decay=0.2)
        reference = reference or peer.init(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, reference = peer.update(grads, reference, params)
        params = optax.apply_updates(params, updates)
        updates, state = ours.update(grads, state, mine)
        mine = jax.tree.map(lambda p, u: p + u * peak, mine, updates)
        np.testing.assert_allclose(mine["w"], params["w"], atol=1e-6)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five quintic steps of arXiv 2502.16982 in float64, on the side with fewer rows."""
    x = np.asarray(x, np.float64)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


def blocks_of(rng, *shape):
    """Parameters of the names that a model has: matrices of a block, two of them alike, and what is none of Muon's."""

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "blocks": {
            0: {
                "key": {"kernel": draw(*shape)},
                "mlp": {"kernel": draw(8, 4)},
                "out": {"kernel": draw(*shape)},
                "norm": {"scale": draw(8)},
                "conv": {"kernel": draw(3, 8)},
            }
        },
        "embedding": {"embedding": draw(32, 8)},
    }


def stepped(config, grads, params, num_steps):
    """Parameters after every step, at a rate of 0.03."""
    optimizer, after = make_optimizer(config, num_steps), []
    state = optimizer.init(params)
    for each in grads:
        updates, state = optimizer.update(each, state, params)
        params = jax.tree.map(lambda p, u: p + 0.03 * u, params, updates)
        after.append(params)
    return after


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_muon_orthogonalises_the_momentum_of_matrices(shape):
    """Three steps at a constant rate against float64: Nesterov's momentum, and a root mean square of 0.2."""
    rng = np.random.default_rng(0)
    config = OptimizerConfig(
        name="muon", muon_momentum=0.9, weight_decay=0.2, warmup_fraction=0.0, final_fraction=1.0, clip_norm=None
    )
    params, *grads = (blocks_of(rng, *shape) for _ in range(4))
    after = stepped(config, grads, params, 3)
    for name in ("key", "mlp", "out"):
        weight, *gradients = (np.asarray(tree["blocks"][0][name]["kernel"], np.float64) for tree in (params, *grads))
        momentum = np.zeros(weight.shape)
        for count, (gradient, tree) in enumerate(zip(gradients, after, strict=True), start=1):
            momentum = 0.9 * momentum + 0.1 * gradient
            ahead = 0.9 * momentum / (1 - 0.9 ** (count + 1)) + 0.1 * gradient / (1 - 0.9**count)
            update = 0.2 * max(weight.shape) ** 0.5 * newton_schulz(ahead)
            assert 0.13 < np.sqrt((update**2).mean()) < 0.25
            weight = weight - 0.03 * (update + 0.2 * weight)
            np.testing.assert_allclose(tree["blocks"][0][name]["kernel"], weight, atol=2e-5)


def test_what_is_no_matrix_of_a_block_stays_with_adamw():
    rng = np.random.default_rng(1)
    params, *grads = (blocks_of(rng, 8, 24) for _ in range(4))
    muon = stepped(OptimizerConfig(name="muon", clip_norm=None), grads, params, 3)[-1]
    adamw = stepped(OptimizerConfig(clip_norm=None), grads, params, 3)[-1]
    assert not np.allclose(muon["blocks"][0]["out"]["kernel"], adamw["blocks"][0]["out"]["kernel"], atol=1e-3)
    for name in ("key", "mlp", "out"):
        muon["blocks"][0].pop(name), adamw["blocks"][0].pop(name)
    jax.tree.map(np.testing.assert_array_equal, muon, adamw)


def test_muon_takes_the_matrices_of_blocks_alone(config_of):
    is_muon = orthogonalised(Laboratory.of(config_of("mixer=hybrid", "model.mlp_dim=32")).model.params)
    recurrent, exact = is_muon["blocks"][0], is_muon["blocks"][1]
    assert all((recurrent["mixer"]["split"]["kernel"], recurrent["mlp"]["gate_up"]["kernel"]))
    assert all(exact["mixer"][name]["kernel"] for name in ("query", "key", "value", "out"))
    assert not any((recurrent["mixer"]["conv"]["kernel"], recurrent["mixer"]["dt_bias"], exact["mixer_norm"]["scale"]))
    assert not any((exact["short_conv"]["kernel"], exact["short_conv"]["bias"], is_muon["embedding"]["embedding"]))


def test_the_state_of_muon_survives_a_checkpoint(tmp_path, config_of):
    lab = Laboratory.of(config_of("optimizer.name=muon"))
    params = lab.model.params
    optimizer = make_optimizer(lab.config.optimizer, 8)
    _, state = optimizer.update(params, optimizer.init(params), params)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored[1], state)


def test_an_unknown_optimizer_is_refused_by_name():
    with pytest.raises(ConfigError, match="one of adamw, muon"):
        OptimizerConfig(name="sgd")


def test_each_expert_is_a_matrix_of_its_own_and_biases_are_vectors(config_of):
    """Muon of stacked experts is that of each by itself; biases [experts, outputs] are neither made orthogonal nor
    decayed."""
    lab = Laboratory.of(config_of("+mixer.A.mlp={num_experts: 3, experts_per_token: 2, expert_dim: 8, bias: true}"))
    is_muon, is_decayed = (chosen(lab.model.params)["blocks"][0]["mlp"] for chosen in (orthogonalised, decays))
    for name in ("gate_up", "down", "router"):
        assert (is_muon[name]["kernel"], is_decayed[name]["kernel"]) == (True, True)
        assert (is_muon[name]["bias"], is_decayed[name]["bias"]) == (False, False)

    rng = np.random.default_rng(2)
    config = OptimizerConfig(name="muon", clip_norm=None)
    stacks = [jnp.asarray(rng.standard_normal((3, 8, 24)), jnp.float32) for _ in range(4)]

    def trained(part):
        """The last kernel of a block that has that part of the stacks, and a matrix of their shape beside."""
        params, *grads = ({"blocks": {0: {"a": {"kernel": x[0]}, "mlp": {"kernel": x[part]}}}} for x in stacks)
        return stepped(config, grads, params, 3)[-1]["blocks"][0]["mlp"]["kernel"]

    together = trained(slice(None))
    assert not np.allclose(together, stacks[0], atol=1e-3)
    for expert in range(3):
        np.testing.assert_allclose(together[expert], trained(expert), atol=1e-6)
