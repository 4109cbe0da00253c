"""Sizes that are unknown, or zero; buffers that are given away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FACTORIES, GROUPS, KINDS, LAYERS, init, make, train
from flax import linen as nn
from jax import export

import cbn_jax as cbn
from cbn_jax.core.named import find_running
from cbn_jax.linen import Norm
from cbn_jax.population import recompute

estimators = pytest.mark.parametrize("name", KINDS)


def exported(run, leaves, sizes):
    shape = export.symbolic_shape(sizes, constraints=["b <= 16"])
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    return export.export(jax.jit(run))(leaves, inputs)


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [(nn.Dense(4), "b, t, 3"), (nn.Conv(4, (3, 3)), "b, h, w, 3")],
    ids=["dense", "conv"],
)
@pytest.mark.parametrize("running", [True, False], ids=["predict", "train"])
@pytest.mark.parametrize("name", sorted(set(KINDS) - {"ghost_batch_norm"}))  # counts them
def test_every_size_but_the_features_may_be_unknown(name, running, layer, sizes, key):
    options = {"num_groups": 2} if name in GROUPS else {}
    norm = Norm(FACTORIES[name](**options), layer)
    shape = (4, 6, 3) if "t" in sizes else (2, 6, 4, 3)
    z = jax.random.normal(key, shape)
    leaves, form = jax.tree.flatten(norm.init(key, z, True))

    def run(leaves, z):
        variables = jax.tree.unflatten(form, leaves)
        y, updates = norm.apply(variables, z, running, mutable=["batch_stats"])
        return y, jax.tree.leaves(updates)

    actual = exported(run, leaves, sizes).call(leaves, z)
    for a, e in zip(*map(jax.tree.leaves, (actual, jax.jit(run)(leaves, z))), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_replay_asks_for_a_bound_on_the_examples(key):
    estimator, layer = cbn.replay_batch_norm(samples=8), LAYERS["dense"]
    params = layer.params(key)
    state = init(estimator, layer, params)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 5"), jnp.float32)
    with pytest.raises(ValueError, match=r"got b examples, .*constraints=\['b <= 8'\]"):
        export.export(jax.jit(lambda z: train(estimator, state, layer, params, z)))(shape)


@pytest.mark.parametrize("layer", ["dense", "conv"])
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (0, 5, 5, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("name", FACTORIES)
def test_nothing_is_predicted_for_nothing(name, shape, layer, key):
    estimator, layer = make(name), LAYERS[layer]
    state, x = init(estimator, layer, layer.params(key)), jnp.zeros(shape)
    statistics = jax.eval_shape(estimator.infer, state, x)
    assert jnp.broadcast_shapes(statistics.mean.shape, shape) == shape
    y = cbn.normalize(x, estimator.infer(state, x)) if shape == (0, 3, 4) else x
    assert y.shape == shape


@estimators
def test_training_on_nothing_is_an_error(name, key):
    estimator, layer = make(name), LAYERS["dense"]
    params = layer.params(key)
    state = init(estimator, layer, params)
    with pytest.raises(ValueError, match=r"no value per feature .*skip an empty batch"):
        train(estimator, state, layer, params, layer.data(key, examples=0))


def test_one_device_with_one_example_is_one_example():
    """An axis name does not hide how many values there are."""
    estimator = cbn.batch_norm()

    def step(x):
        return estimator.train(estimator.init(3), x, axis_name="data")

    with pytest.raises(ValueError, match="one value per feature in training"):
        jax.vmap(step, axis_name="data")(jnp.ones((1, 1, 3)))
    jax.vmap(step, axis_name="data")(jnp.ones((2, 1, 3)))


# JAX cannot donate a state that holds the same buffer twice. A buffer shared with a
# parameter would be deleted.


@pytest.mark.parametrize("name", FACTORIES)
def test_a_state_is_donated_and_nothing_else_with_it(name, key):
    estimator, layer = make(name), LAYERS["dense"]
    params, z = layer.params(key), layer.data(key)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params, z):
        return train(estimator, state, layer, params, z)[2]

    state = init(estimator, layer, params)
    for _ in range(3):
        state = step(state, params, z)
    assert np.isfinite(layer.fn(params, z)).all()


@pytest.mark.parametrize("name", ["batch_norm", "small_batch_norm", "adaptive_batch_norm"])
def test_statistics_are_recomputed_with_donated_states(name, key):
    estimator, layer = make(name), LAYERS["dense"]
    params = layer.params(key)
    batches = [layer.data(jax.random.fold_in(key, i)) for i in range(3)]

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, z):
        return train(estimator, state, layer, params, z)[2]

    state = recompute(update, init(estimator, layer, params), batches)
    running = next(iter(find_running(state).values()))
    if name != "small_batch_norm":
        x = np.float64(layer.fn(params, jnp.concatenate(batches)))
        np.testing.assert_allclose(running.mean, x.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(running.var, x.var(0), rtol=1e-4)
    update(state, batches[0])  # every leaf is a buffer of its own


def test_averages_from_elsewhere_are_copies():
    mean = jnp.ones(3)
    state = cbn.from_batch_stats(mean, mean)
    jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(state)
    np.testing.assert_array_equal(mean, 1.0)


@pytest.mark.parametrize(
    "batch",
    [
        (jnp.ones((4, 2)), jnp.ones(3)),
        {"step": jnp.array(7), "images": jnp.ones((4, 2))},
    ],
    ids=["two lengths", "a scalar"],
)
def test_the_weight_of_a_batch_is_not_guessed(batch):
    estimator = cbn.batch_norm()
    with pytest.raises(ValueError, match=r"recompute got a batch .*write size=lambda"):
        recompute(lambda state, _: state, estimator.init(2), [batch])
    recompute(lambda state, _: state, estimator.init(2), [batch], size=lambda _: 4)
