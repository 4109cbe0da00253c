"""States go to disk and come back; what does not fit is refused in one sentence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import FACTORIES, LAYERS, infer, init, train
from flax import serialization

import cbn_jax as cbn

LAYER = LAYERS["dense"]


def trained(estimator, key):
    params = LAYER.params(key)
    state = init(estimator, LAYER, params)
    return train(estimator, state, LAYER, params, LAYER.data(key))[2]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    chex.assert_trees_all_equal(actual, expected)


def test_orbax_round_trip(key, tmp_path):
    """Every method's state in one tree, as the normalizers of one model."""
    blank = {name: init(f(), LAYER, LAYER.params(key)) for name, f in FACTORIES.items()}
    rng = np.random.default_rng(0)
    states = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), blank)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "states", blank), states)


def test_orbax_manager_keeps_the_last(key, tmp_path):
    estimator = cbn.small_batch_norm(batch_size=8)
    states = [trained(estimator, jax.random.fold_in(key, i)) for i in range(3)]
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step, state in enumerate(states):
            manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        assert manager.all_steps() == [2]
        blank = init(estimator, LAYER, LAYER.params(key))
        restored = manager.restore(2, args=ocp.args.StandardRestore(blank))
    assert_same(restored, states[-1])


OTHERS = {
    "cross_iteration_batch_norm": (
        functools.partial(cbn.cross_iteration_batch_norm, window=3),
        functools.partial(cbn.cross_iteration_batch_norm, window=5),
        r"^cross_iteration_batch_norm got .*of shape \(5, 3, 4\), expected \(5, 5, 4\)",
    ),
    "replay_batch_norm": (
        functools.partial(cbn.replay_batch_norm, window=3, samples=8),
        functools.partial(cbn.replay_batch_norm, window=5, samples=8),
        r"^replay_batch_norm got .*of shape \(16, .*expected \(32, .*for this layer",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_window(name, key):
    """Also where the format does not look at shapes; inference needs no window."""
    make, other, message = OTHERS[name]
    state, params = trained(make(), key), LAYER.params(key)
    template = init(other(), LAYER, params)
    restored = serialization.from_bytes(template, serialization.to_bytes(state))
    x, source = cbn.run_layer(LAYER.layer, params, LAYER.data(key))
    with pytest.raises(ValueError, match=message):
        other().train(restored, x, source)
    assert_same(infer(other(), restored, x), infer(make(), state, x))


@pytest.mark.parametrize("name", FACTORIES)
def test_a_state_of_another_width(name, key):
    estimator = FACTORIES[name]()
    state = init(estimator, LAYER, LAYER.params(key))
    wider = {"kernel": np.zeros((5, 8)), "bias": np.zeros(8)}
    template = estimator.init(8, LAYER.layer, wider)
    restored = serialization.from_bytes(template, serialization.to_bytes(state))
    with pytest.raises(ValueError, match="expected 4 features last as in its state"):
        estimator.infer(restored, np.ones((2, 8), np.float32))


def test_a_state_of_another_layer(key):
    """As many features, but of a layer with more inputs."""
    estimator = cbn.small_batch_norm(batch_size=8)
    state = trained(estimator, key)
    x, source = cbn.run_layer(cbn.dense, jnp.ones((7, 4)), jnp.ones((8, 7)))
    message = r"got a state with .*expected \(7, 1\) for this layer"
    with pytest.raises(ValueError, match=message):
        estimator.train(state, x, source)


def test_a_tree_without_names_is_not_a_state(key):
    """What orbax gives without a template."""
    state = trained(cbn.batch_norm(), key)
    with pytest.raises(TypeError, match="as the template when you restore"):
        cbn.batch_norm().infer(state._asdict(), jnp.ones((2, 4)))
