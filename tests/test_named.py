"""States as nested dicts of arrays, and lookup by name in them."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FACTORIES
from flax import nnx
from flax.traverse_util import flatten_dict

import cbn_jax as cbn
from cbn_jax.core.named import find_running, from_dict, put_running, to_dict
from cbn_jax.linen import Norm
from cbn_jax.wrappers.adaptive import find_gates

methods = pytest.mark.parametrize("name", FACTORIES)


def state_of(name):
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    return FACTORIES[name]().init(4, cbn.dense, params)


@methods
def test_there_and_back(name):
    state = state_of(name)
    stored = to_dict(state)
    assert all(isinstance(leaf, jax.Array) for leaf in flatten_dict(stored).values())
    assert len(jax.tree.leaves(stored)) == len(jax.tree.leaves(state))
    chex.assert_trees_all_equal(from_dict(stored, state), state)


@methods
def test_running_moments_are_found_in_every_form(name):
    state = state_of(name)
    in_state, in_dict = find_running(state), find_running({"bn": to_dict(state)})
    assert len(in_state) == len(in_dict) <= 1
    for found in (*in_state.values(), *in_dict.values()):
        assert isinstance(found, cbn.RunningMoments)
    for place, running in in_dict.items():
        assert place == ("bn",)
        new = running._replace(mean=running.mean + 2.0)
        changed = put_running({"bn": to_dict(state)}, {place: new})
        np.testing.assert_array_equal(changed["bn"]["mean"], 2.0)


def test_mean_and_var_stand_under_flaxs_names(key):
    """As ``nn.BatchNorm`` has them; code that reads them goes on working."""
    x = jax.random.normal(key, (8, 3)) * 2.0 + 1.0
    theirs = nn.BatchNorm(momentum=0.9, use_running_average=False)
    ours = Norm(cbn.batch_norm(momentum=0.9), use_running_average=False)
    variables = ours.init(key, x)
    assert list(variables["batch_stats"]) == ["mean", "var", "steps"]
    chex.assert_trees_all_equal_shapes_and_dtypes(
        {name: variables["batch_stats"][name] for name in ("mean", "var")},
        dict(theirs.init(key, x)["batch_stats"]),
    )
    _, updates = ours.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], x.var(0), rtol=1e-5)
    for method in (cbn.small_batch_norm(2), cbn.replay_batch_norm(4, samples=8)):
        norm = Norm(method, nn.Dense(4), use_running_average=False)
        assert {"mean", "var", "steps"} <= set(norm.init(key, x)["batch_stats"])


def test_nnx_has_one_variable_for_each_array():
    rngs = nnx.Rngs(0)
    norm = cbn.nnx.Norm(
        cbn.small_batch_norm(2), layer=nnx.Linear(3, 4, rngs=rngs), rngs=rngs
    )
    assert isinstance(norm.mean, nnx.BatchStat)
    assert isinstance(norm.d_var["kernel"], nnx.BatchStat)
    norm(jnp.arange(6.0).reshape(2, 3))
    stored = nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))
    chex.assert_trees_all_equal(stored, to_dict(norm.state))


def test_gates_are_found_by_name():
    gated = cbn.adaptive_batch_norm(cbn.batch_norm()).init(4)
    stats = {"a": to_dict(gated), "b": to_dict(cbn.batch_norm().init(4))}
    assert find_gates(stats) == {("a", "gate")}
    assert float(cbn.set_gate(stats, False)["a"]["gate"]) == 0.0


AVERAGED = sorted(set(FACTORIES) - {"replay_batch_norm", "fitted_inference-replay"})


@pytest.mark.parametrize("name", AVERAGED)
def test_states_averaged_over_replicas_are_usable(name, key):
    """As Flax's ImageNet example does, by ``lax.pmean`` of ``batch_stats``."""
    estimator, kernel = FACTORIES[name](), jax.random.normal(key, (6, 4))
    if hasattr(estimator, "init_backward"):
        estimator = estimator.at(estimator.init_backward(4))
    state = jax.tree.map(lambda s: jnp.stack([s] * 4), estimator.init(4, cbn.dense, kernel))

    @jax.jit
    @jax.vmap
    def step(state, z):
        x, source = cbn.run_layer(cbn.dense, kernel, z)
        return estimator.train(state, x, source)[1]

    @jax.jit
    def outputs(state, z):
        mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), state)
        x, source = cbn.run_layer(cbn.dense, kernel, z)
        statistics, after = estimator.train(mean, x, source)
        inferred = estimator.infer(mean, x)
        return after, cbn.normalize(x, statistics), cbn.normalize(x, inferred)

    for i in range(12):
        state = step(state, jax.random.normal(jax.random.key(i), (4, 2, 6)) + 1.0)
    after, trained, inferred = outputs(state, jax.random.normal(key, (16, 6)) + 1.0)
    chex.assert_tree_all_finite(after)
    assert float(jnp.abs(trained).max()) < 10.0
    assert float(jnp.abs(inferred).max()) < 20.0
