"""States go to disk and come back; what does not fit is refused in one sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import FACTORIES, LAYERS, init, train
from flax import serialization

import cbn_jax as cbn

LAYER = LAYERS["dense"]


def trained(estimator, key):
    params = LAYER.params(key)
    state = init(estimator, LAYER, params)
    return train(estimator, state, LAYER, params, LAYER.data(key))[2]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_orbax_round_trip(key, tmp_path):
    """Every method's state in one tree, as the normalizers of one model."""
    blank = {name: init(f(), LAYER, LAYER.params(key)) for name, f in FACTORIES.items()}
    states = {name: trained(factory(), key) for name, factory in FACTORIES.items()}
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
        r"cross_iteration_batch_norm\(window=5\) got a state with 3 iterations",
    ),
    "replay_batch_norm": (
        functools.partial(cbn.replay_batch_norm, window=3, samples=8),
        functools.partial(cbn.replay_batch_norm, window=5, samples=8),
        r"replay_batch_norm\(window=5, samples=8\) got a state with 16 rows",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_window(name, key):
    """Also where the format does not look at shapes."""
    make, other, message = OTHERS[name]
    state = trained(make(), key)
    template = init(other(), LAYER, LAYER.params(key))
    restored = serialization.from_bytes(template, serialization.to_bytes(state))
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=message):
        other().infer(restored, x)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_state_of_another_width(name, key):
    estimator = FACTORIES[name]()
    state = trained(estimator, key)
    wider = {"kernel": jnp.zeros((5, 8)), "bias": jnp.zeros(8)}
    template = estimator.init(8, wider)
    restored = serialization.from_bytes(template, serialization.to_bytes(state))
    with pytest.raises(ValueError, match="expected 4 features last as in its state"):
        estimator.infer(restored, jnp.ones((2, 8)))


def test_a_state_of_another_layer(key):
    """As many features, but of a layer with more inputs."""
    estimator = cbn.small_batch_norm(batch_size=8)
    state = trained(estimator, key)
    x, source = cbn.run_layer(cbn.dense, jnp.ones((7, 4)), jnp.ones((8, 7)))
    with pytest.raises(ValueError, match="not those of its state"):
        estimator.train(state, x, source)


def test_a_tree_without_names_is_not_a_state(key):
    """What orbax gives without a template."""
    state = trained(cbn.batch_norm(), key)
    with pytest.raises(TypeError, match="give that as the template when you restore"):
        cbn.batch_norm().infer(state._asdict(), jnp.ones((2, 4)))
