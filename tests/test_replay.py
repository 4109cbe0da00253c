import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import ALL, LAYERS, apply, drift, init, normalize, path, started, train, variance
from jax.test_util import check_grads

import cbn_jax as cbn

layers = pytest.mark.parametrize("name", LAYERS)
some_layers = pytest.mark.parametrize("name", ["dense", "conv-strided", "conv-grouped"])


def start(name, window=4):
    """A training call, compiled once for all tests, and the state before the first."""
    return started(cbn.replay_batch_norm(window, samples=ALL, momentum=0.9), name)


def moments(layer, params, batches):
    """Of all their values together."""
    x = [np.float64(apply(layer, params, z)).reshape(-1, layer.features) for z in batches]
    x = np.concatenate(x)
    return x.mean(0), x.var(0)


def at_step(state, step):
    """The state as if after so many steps, which choose the positions remembered."""
    steps = jnp.broadcast_to(step, state.running.steps.shape).astype(jnp.float32)
    return state._replace(running=state.running._replace(steps=steps))


# Computed values.


@layers
def test_equals_the_oracle(name, key):
    """Over seven steps of moving weights and two sizes, then the averages."""
    layer = LAYERS[name]
    step, state = start(name)
    oracle, averages = reference.Replay(4), reference.Averages(0.9)
    for params, z in path(layer, key, 7, examples=(2, 3)):
        _, statistics, state = step(state, params, z)
        kernel = reference.layer_kernel(params["kernel"], layer.groups)
        bias = params.get("bias", np.zeros(layer.features))
        mean, var = oracle.step(reference.layer_patches(name, z), kernel, bias)
        positions = len(oracle.seen[-1]) / len(z)
        averages.step(mean, var, sum(map(len, oracle.seen)) / positions**0.5)
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance(statistics), var, rtol=1e-4)
    np.testing.assert_allclose(state.running.mean, averages.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.running.var, averages.var, rtol=1e-4, atol=1e-5)


@layers
def test_is_batch_norm_of_all_that_is_remembered(name, key):
    """Whatever the weights did in between; a batch leaves after ``window − 1`` steps."""
    layer = LAYERS[name]
    step, state = start(name)
    seen = []
    for params, z in path(layer, key, 9, size=1.0, examples=(2, 2, 3)):
        _, statistics, state = step(state, params, z)
        seen = [*seen, z][-4:]
        mean, var = moments(layer, params, seen)
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance(statistics), var, rtol=1e-4)


@layers
def test_frozen_weights_pool_the_window(name, key):
    layer = LAYERS[name]
    step, state = start(name)
    params = layer.params(key)
    batches = [layer.data(jax.random.fold_in(key, i), examples=2) for i in range(6)]
    for z in batches:
        _, statistics, state = step(state, params, z)
    mean, var = moments(layer, params, batches[-4:])
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance(statistics), var, rtol=2e-5)


def test_an_outlier_leaves_with_its_iteration(key):
    layer = LAYERS["dense"]
    step, state = start("dense")
    other = state
    for i, (params, z) in enumerate(path(layer, key, 7)):
        outlier = 100.0 if i == 1 else 1.0
        _, with_it, state = step(state, params, z * outlier)
        _, without, other = step(other, params, z)
        far = np.abs(np.float64(with_it.mean) - without.mean).max()
        assert far > 1.0 if 1 <= i < 5 else far == 0.0


@some_layers
def test_window_one_is_batch_norm(name, key):
    layer = LAYERS[name]
    estimator = cbn.replay_batch_norm(window=1, samples=ALL, momentum=0.9)
    baseline = cbn.batch_norm(momentum=0.9)

    @functools.partial(jax.jit, static_argnums=0)
    def step(estimator, state, params, z):
        def loss(params, z):
            x, statistics, new = train(estimator, state, layer, params, z)
            return jnp.sin(cbn.normalize(x, statistics)).sum(), (statistics, new)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, z)

    state, other = init(estimator, layer, layer.params(key)), baseline.init(layer.features)
    for params, z in path(layer, key, 3):
        (mine, (statistics, state)), gradient = step(estimator, state, params, z)
        (theirs, (expected, other)), right = step(baseline, other, params, z)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            (mine, gradient, statistics, state.running),
            (theirs, right, expected, other),
        )


@some_layers
def test_gradient_goes_through_the_whole_window(name, key, x64):
    """With respect to parameters and inputs, in float64."""
    layer = LAYERS[name]
    step, state = start(name)
    with jax.enable_x64(False):
        for params, z in path(layer, key, 3):
            _, _, state = step(state, params, z)
    params, z = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, z))
    estimator = cbn.replay_batch_norm(window=4, samples=ALL)

    @jax.jit
    def f(params, z):
        x, statistics, _ = train(estimator, state, layer, params, z)
        return cbn.normalize(x, statistics)

    moved = drift(params, key, 0.3)
    check_grads(f, (moved, z), order=1, modes=["rev"], rtol=1e-6, atol=1e-7)


# Positions remembered.

PIXELS = cbn.convolution()  # every position sees its own number alone
NUMBERS = jnp.eye(64).reshape(2, 4, 8, 64)


def remembered(steps, samples):
    """Which of 2 · 32 positions the rows of a memory hold: ``[steps, rows, 2, 32]``."""
    kernel = jnp.ones((1, 1, 64, 2))
    estimator = cbn.replay_batch_norm(window=2, samples=samples)
    state = estimator.init(2, PIXELS, kernel)
    x, source = cbn.run_layer(PIXELS, kernel, NUMBERS)

    def look(step):
        after = estimator.train(at_step(state, step), x, source)[1]
        return after.patches, after.size

    patches, size = jax.jit(jax.vmap(look))(steps)
    assert patches.shape == (len(steps), samples, 1, 1, 64, 1)
    rows = np.count_nonzero(size[0])
    np.testing.assert_array_equal(size[:, :rows], 64 / rows)  # they stand for all
    np.testing.assert_array_equal(size[:, rows:], 0.0)
    return np.asarray(patches).reshape(len(steps), samples, 2, 32)[:, :rows]


@pytest.mark.parametrize(("samples", "each"), [(2, 1), (8, 4), (9, 4)])
def test_as_many_positions_of_each_example(samples, each):
    held = remembered(jnp.arange(500), samples)
    assert held.shape[1] == 2 * each
    count = held.sum(1)
    np.testing.assert_array_equal(count.reshape(500, 2, each, -1).sum(3), 1)
    error = count.std((0, 1)) / 1000**0.5
    assert (np.abs(count.mean((0, 1)) - each / 32) < 4.5 * error).all()


def test_the_same_step_remembers_the_same_positions():
    first, other, again = remembered(jnp.array([3, 4, 3]), 8)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("samples", [64, 100])
def test_small_maps_are_remembered_whole(samples):
    assert (remembered(jnp.arange(2), samples).sum(1) == 1).all()


@pytest.mark.parametrize("name", ["conv", "conv-grouped"])
def test_a_sample_is_right_on_average(name, key):
    """E[x] and E[x²], over many choices of positions; both are linear in stored values."""
    layer = LAYERS[name]
    (old, z), (params, new) = path(layer, key, 2)
    whole, state = start(name)
    _, _, state = whole(state, old, z)
    expected = whole(state, params, new)[1]
    estimator = cbn.replay_batch_norm(window=4, samples=6)  # 3 of 25 positions
    fresh = init(estimator, layer, old)

    def draw(step):
        _, _, state = train(estimator, at_step(fresh, step), layer, old, z)
        return train(estimator, state, layer, params, new)[1]

    def raw(statistics):
        mean = np.float64(statistics.mean)
        return mean, variance(statistics) + np.square(mean)

    draws = jax.jit(jax.vmap(draw))(jnp.arange(3000))
    for each, right in zip(raw(draws), raw(expected), strict=True):
        error = each.std(0) / 3000**0.5
        assert (error > 1e-4).all()
        assert (np.abs(each.mean(0) - right) < 4.5 * error).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_in_other_dimensions(rank, key):
    """Memory of all positions: batch norm of all that was seen."""
    layer = cbn.convolution(strides=2, groups=2)
    kernel = jax.random.normal(key, (3,) * rank + (2, 4))
    estimator = cbn.replay_batch_norm(window=3, samples=100)
    state = estimator.init(4, layer, kernel)
    shape = (3, 2, *(5,) * rank, 4)
    batches = jax.random.normal(jax.random.fold_in(key, 1), shape)

    @jax.jit
    def step(state, kernel, z):
        x, source = cbn.run_layer(layer, kernel, z)
        return estimator.train(state, x, source)

    for z in batches:
        kernel = drift(kernel, key, 0.5)
        statistics, state = step(state, kernel, z)
    exact = cbn.batch_moments(layer.apply(kernel, batches.reshape(6, *shape[2:])))
    np.testing.assert_allclose(statistics.mean, exact.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance(statistics), exact.var, rtol=1e-4)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_remembered(poison, key):
    """An iteration of such inputs alone is none."""
    layer = LAYERS["dense"]
    step, state = start("dense")
    (_, z), (params, other) = path(layer, key, 2)
    _, _, state = step(state, params, z)
    x, statistics, after = step(state, params, other.at[:, 2].set(poison))
    assert np.isnan(normalize(x, statistics)).all()
    np.testing.assert_array_equal(after.size.sum(), 2.0)
    for leaf in jax.tree.leaves(after):
        assert np.isfinite(leaf).all()
    expected = step(state, params, other)[1]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        step(after, params, other)[1],
        expected,
    )


# Wrong arguments: the message names the value, the expected one and the line to write.


@pytest.mark.parametrize("option", ["window", "samples"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_counts_must_be_whole_numbers(option, value):
    with pytest.raises(ValueError, match=rf"{option} is .*int of at least 1"):
        cbn.replay_batch_norm(**{option: value})


def test_more_examples_than_samples(key):
    layer = LAYERS["dense"]
    estimator = cbn.replay_batch_norm(window=2, samples=7)
    params = layer.params(key)
    state = init(estimator, layer, params)
    with pytest.raises(ValueError, match=r"samples=7\) got 8 examples, .*samples=8\."):
        train(estimator, state, layer, params, layer.data(key))


@pytest.mark.parametrize("other", [{"window": 3}, {"samples": 9}])
def test_a_state_of_another_memory(other, key):
    layer = LAYERS["dense"]
    params = layer.params(key)
    options = {"window": 4, "samples": 8}
    state = init(cbn.replay_batch_norm(**options | other), layer, params)
    estimator = cbn.replay_batch_norm(**options)
    rows = len(state.size)
    message = rf"state\.patches.* of shape \({rows}, .*expected \(24, "
    with pytest.raises(ValueError, match=message):
        train(estimator, state, layer, params, layer.data(key))


def test_a_plain_function_does_as_a_layer(key):
    """JAX differentiates it: two steps are those of the layer that knows its patches."""
    layer = LAYERS["conv"]
    estimator = cbn.replay_batch_norm(3, samples=ALL)
    plain = expected = init(estimator, layer, layer.params(key))
    for seed in range(2):
        at = jax.random.fold_in(key, seed)
        params, z = layer.params(at), layer.data(at)
        x, source = cbn.run_layer(layer.fn, params, z)
        statistics, plain = estimator.train(plain, x, source)
        _, known, expected = train(estimator, expected, layer, params, z)
        chex.assert_trees_all_close(
            (statistics, plain), (known, expected), rtol=1e-4, atol=1e-5
        )


def test_a_source_is_needed(key):
    layer = LAYERS["conv"]
    estimator = cbn.replay_batch_norm(samples=ALL)
    state = init(estimator, layer, layer.params(key))
    x = layer.fn(layer.params(key), layer.data(key))
    with pytest.raises(ValueError, match=r"source=None, .*run_layer\(layer, "):
        estimator.train(state, x)


def test_groups_must_be_those_of_the_state(key):
    layer = LAYERS["conv-grouped"]
    estimator = cbn.replay_batch_norm(samples=ALL)
    params = layer.params(key)
    state = estimator.init(layer.features, layer.fn, params)
    with pytest.raises(ValueError, match=r"\] of shape .*1,?\), expected .*2,?\) for"):
        train(estimator, state, layer, params, layer.data(key))


def test_a_mask_per_feature_is_refused(key):
    layer = LAYERS["dense"]
    estimator = cbn.replay_batch_norm()
    params = layer.params(key)
    state = init(estimator, layer, params)
    mask = jnp.ones((8, 4), bool)
    with pytest.raises(ValueError, match=r"mask of shape \(8, 4\).*write mask\.all\("):
        train(estimator, state, layer, params, layer.data(key), mask=mask)
