import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import LAYERS, apply, drift, init, path, started, train, variance
from jax.test_util import check_vjp

import cbn_jax as cbn

SOME = ["dense", "conv-strided", "conv-grouped"]
layers = pytest.mark.parametrize("name", LAYERS)
some_layers = pytest.mark.parametrize("name", SOME)
batch_moments = jax.jit(cbn.batch_moments)


def start(name, window=4):
    """A training call, compiled once for all tests, and the state before the first."""
    return started(cbn.carried_batch_norm(window, momentum=0.9), name)


def scaled(params, factor):
    """The weights times a factor, with the bias as it is."""
    return params | {"kernel": factor * params["kernel"]}


# Computed values.


@pytest.mark.parametrize(
    ("name", "examples"), [*((name, (2, 3)) for name in LAYERS), ("dense", (1,))]
)
def test_equals_the_oracle(name, examples, key):
    """Statistics and mean patch over twelve steps of moving weights and two sizes."""
    layer = LAYERS[name]
    step, state = start(name)
    oracle, groups = reference.Carried(4, layer.groups), layer.groups
    averages = reference.Averages(0.9)
    for params, z in path(layer, key, 12, examples=examples):
        _, statistics, state = step(state, params, z)
        kernel = reference.layer_kernel(params["kernel"], groups)
        bias = params.get("bias", np.zeros(layer.features))
        patches = reference.layer_patches(name, z)
        mean, var = oracle.step(patches, kernel, bias)
        if (oracle.size <= 1).all():  # a single value has no variance: as before training
            mean, var = np.zeros(layer.features), np.ones(layer.features)
        else:
            size = np.repeat(oracle.size, layer.features // groups)
            values = size / (len(patches) / len(z)) ** 0.5
            averages.step(mean, var, values, oracle.shift, oracle.ratio)
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance(statistics), var, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.running.mean, averages.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.running.var, averages.var, rtol=1e-4, atol=1e-5)
    window = cbn.Window(*state.window)
    size = np.repeat(oracle.size, layer.features // groups)
    np.testing.assert_allclose(window.size, size, rtol=1e-4)
    d_mean = np.reshape(state.d_mean["kernel"], (-1, groups)).T.ravel()
    np.testing.assert_allclose(d_mean, oracle.p[:-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(window.var_at, oracle.square, rtol=1e-4)
    if layer.bias:
        np.testing.assert_allclose(state.d_mean["bias"], 1.0, rtol=1e-6)


@some_layers
def test_window_one_is_batch_norm(name, key):
    layer = LAYERS[name]
    estimator = cbn.carried_batch_norm(window=1, momentum=0.9)
    baseline = cbn.batch_norm(momentum=0.9)
    state, other = init(estimator, layer, layer.params(key)), baseline.init(layer.features)
    for params, z in path(layer, key, 4):
        _, mine, state = train(estimator, state, layer, params, z)
        _, theirs, other = train(baseline, other, layer, params, z)
        chex.assert_trees_all_close(
            (mine, state.running), (theirs, other), rtol=1e-5, atol=1e-5
        )


@layers
def test_means_are_those_of_all_inputs_at_todays_weights(name, key):
    """Recomputed for every past batch, however far the weights went."""
    layer = LAYERS[name]
    step, state = start(name)
    seen = []
    for params, z in path(layer, key, 9, size=1.0):
        _, statistics, state = step(state, params, z)
        seen.append(z)
    today = np.float64(apply(layer, params, jnp.concatenate(seen)))
    means = today.reshape(len(seen), -1, layer.features).mean(1)
    expected = np.average(means, 0, 0.75 ** np.arange(len(seen))[::-1])
    np.testing.assert_allclose(statistics.mean, expected, rtol=1e-4, atol=2e-5)


@some_layers
def test_variances_are_exact_for_scaled_weights(name, key):
    layer = LAYERS[name]
    step, state = start(name)
    params, first, then = layer.params(key), layer.data(key), layer.data(key) + 1
    _, _, state = step(state, params, first)
    _, statistics, _ = step(state, scaled(params, -3.0), then)
    x = apply(layer, scaled(params, -3.0), jnp.concatenate([first, then]))
    weights = np.repeat([3 / 4, 1], x[: len(first), ..., 0].size)
    x = np.float64(x).reshape(-1, layer.features)
    mean = np.average(x, 0, weights)
    expected = np.average((x - mean) ** 2, 0, weights)
    np.testing.assert_allclose(variance(statistics), expected, rtol=1e-4)


def test_a_variance_is_exact_on_average_where_inputs_are_white(key):
    """The radial part is all there is: Σ is a multiple of the identity."""
    layer, step_size = LAYERS["dense-no_bias"], 0.4
    step, state = start("dense-no_bias", 1000)
    params = layer.params(key)
    z = jax.random.normal(key, (4000, 5))
    z = z - z.mean(0, keepdims=True)
    z = z @ jnp.linalg.inv(jnp.linalg.cholesky(jnp.cov(z.T, bias=True))).T
    _, _, state = step(state, params, z)
    moved = drift(params, key, step_size)
    _, statistics, _ = step(state, moved, z[:2])
    exact = batch_moments(apply(layer, moved, z)).var
    np.testing.assert_allclose(variance(statistics), exact, rtol=0.01)


def test_a_layer_without_weights_yet_keeps_its_variance(key):
    """Weights that start at zero: the first steps have no ratio of norms."""
    layer = LAYERS["dense"]
    step, state = start("dense")
    params, z = layer.params(key), layer.data(key)
    for factor in (0.0, 0.0, 1.0, 0.0, 1.0):
        _, statistics, state = step(state, scaled(params, factor), z)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(statistics))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_weights_of_one_number_per_feature_are_no_biases(key):
    """A layer that only scales has no others."""
    layer = cbn.Layer(lambda scale, z: z * scale[None], groups=4)
    estimator = cbn.carried_batch_norm(window=4)
    scale, z = jnp.arange(1.0, 5.0), jax.random.normal(key, (6, 4))
    state = estimator.init(4, layer, scale)
    x, source = cbn.run_layer(layer, scale, z)
    _, state = estimator.train(state, x, source)
    np.testing.assert_allclose(cbn.Window(*state.window).var_at, scale**2)


def test_averages_of_a_layer_in_half_precision_do_not_drift(key):
    """A layer rounds its weights, and its mean is another than that of p and θ.

    Weights that move a little in every step would add up the difference.
    """
    layer = LAYERS["dense"]
    _, state = start("dense", 16)
    z = layer.data(key, jnp.bfloat16, examples=64) + 3
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), layer.params(key))
    rounded = layer.layer._replace(
        apply=lambda params, z: layer.fn(
            jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), z
        )
    )

    @jax.jit
    def one(state, params):
        x, source = cbn.run_layer(rounded, params, z)
        _, state = cbn.carried_batch_norm(16).train(state, x, source)
        return state

    exact = jax.tree.map(lambda p: 1.003 * p.astype(jnp.float32), half)
    for i in range(100):
        moved = jax.tree.map(lambda p, i=i: p + 1e-6 * (i % 2), exact)
        state = one(state, moved)
    x = np.float64(rounded.apply(exact, z))
    np.testing.assert_allclose(state.running.mean, x.mean(0), atol=0.02 * x.std(0).min())


# Gradients with respect to the parameters.


@some_layers
def test_gradient_is_the_derivative(name, key, x64):
    """It is the full derivative of the computed values, so finite differences agree."""
    layer = LAYERS[name]
    estimator = cbn.carried_batch_norm(window=4)
    step, state = start(name)
    with jax.enable_x64(False):
        for params, z in path(layer, key, 3):
            _, _, state = step(state, params, z)
    params, z = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, z))

    @jax.jit
    def f(params, z):
        x, statistics, _ = train(estimator, state, layer, params, z)
        return jnp.sin(cbn.normalize(x, statistics))

    params = drift(params, key, 0.3)
    check_vjp(f, functools.partial(jax.vjp, f), (params, z), rtol=1e-5, atol=1e-6)


def test_gradient_has_no_part_along_the_weights(key):
    """Scaled weights change nothing but ε's share."""
    layer = LAYERS["dense-no_bias"]
    step, state = start("dense-no_bias")
    for params, z in path(layer, key, 5):
        _, _, state = step(state, params, z)

    @jax.jit
    @jax.grad
    def gradient(params):
        x, statistics, _ = step(state, params, z)
        return jnp.sin(cbn.normalize(x, statistics)).sum()

    kernel, along = params["kernel"], gradient(params)["kernel"]
    cosine = (kernel * along).sum(0) / jnp.sqrt(
        jnp.square(kernel).sum(0) * jnp.square(along).sum(0)
    )
    np.testing.assert_allclose(cosine, 0.0, atol=1e-3)


# Costs.


def test_state_is_a_patch_and_a_few_numbers():
    kernel = jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32)
    estimator = cbn.carried_batch_norm(16)
    state = jax.eval_shape(lambda k: estimator.init(512, cbn.convolution(), k), kernel)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert size == 3 * 3 * 512 + 8 * 512 < 0.01 * kernel.size


# Wrong arguments: the message names the value, the expected one and the line to write.


@pytest.mark.parametrize("option", ["window", "micro_batches"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_counts_must_be_whole_numbers(option, value):
    with pytest.raises(ValueError, match=rf"{option} is .*int of at least 1"):
        cbn.carried_batch_norm(**{option: value})


def test_a_source_is_needed(key):
    layer = LAYERS["conv"]
    estimator = cbn.carried_batch_norm()
    state = init(estimator, layer, layer.params(key))
    x = layer.fn(layer.params(key), layer.data(key))
    with pytest.raises(ValueError, match=r"source=None, .*run_layer\(layer, "):
        estimator.train(state, x)


def test_a_plain_function_does_as_a_layer(key):
    """JAX differentiates it: two steps are those of the layer that knows its patches."""
    layer = LAYERS["conv"]
    estimator = cbn.carried_batch_norm(window=3)
    plain = expected = init(estimator, layer, layer.params(key))
    for params, z in path(layer, key, 2):
        x, source = cbn.run_layer(layer.fn, params, z)
        statistics, plain = estimator.train(plain, x, source)
        _, known, expected = train(estimator, expected, layer, params, z)
        chex.assert_trees_all_close(
            (statistics, plain), (known, expected), rtol=1e-4, atol=1e-5
        )
