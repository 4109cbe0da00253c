import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import LAYERS, apply, drift, init, normalize, path, started, train, variance
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_vjp

import cbn_jax as cbn

SOME = ["dense", "conv-strided", "conv-grouped"]
layers = pytest.mark.parametrize("name", LAYERS)
some_layers = pytest.mark.parametrize("name", SOME)
EPSILON = 1e-5
batch_moments = jax.jit(cbn.batch_moments)


def size_of(state):
    """The weights of the values in each feature's window, summed."""
    return cbn.Window(*state.window).size


def start(name, window=4):
    """A training call, compiled once for all tests, and the state before the first."""
    return started(cbn.streaming_batch_norm(window, samples=None, momentum=0.9), name)


def at_step(state, step):
    """The state as if after so many steps, which choose the positions looked at."""
    steps = jnp.broadcast_to(step, state.running.steps.shape).astype(jnp.float32)
    return state._replace(running=state.running._replace(steps=steps))


# Computed values.


@pytest.mark.parametrize(
    ("name", "examples"), [*((name, (2, 3)) for name in LAYERS), ("dense", (1,))]
)
def test_equals_the_oracle(name, examples, key):
    """Statistics and derivatives over twelve steps of moving weights and two sizes."""
    layer = LAYERS[name]
    step, state = start(name)
    oracle, groups = reference.Streaming(4, layer.groups), layer.groups
    averages = reference.Averages(0.9)
    for params, z in path(layer, key, 12, examples=examples):
        _, statistics, state = step(state, params, z)
        kernel = reference.layer_kernel(params["kernel"], groups)
        bias = params.get("bias", np.zeros(layer.features))
        mean, var = oracle.step(reference.layer_patches(name, z), kernel, bias)
        if (oracle.size <= 1).all():  # a single value has no variance: as before training
            mean, var = np.zeros(layer.features), np.ones(layer.features)
        else:
            size = np.repeat(oracle.size, layer.features // groups)
            positions = len(reference.layer_patches(name, z)) / len(z)
            averages.step(mean, var, size / positions**0.5, oracle.shift, oracle.ratio)
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance(statistics), var, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.running.mean, averages.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.running.var, averages.var, rtol=1e-4, atol=1e-5)
    window = cbn.Window(*state.window)
    np.testing.assert_allclose(window.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(window.var, var, rtol=1e-4)
    size = np.repeat(oracle.size, layer.features // groups)
    np.testing.assert_allclose(window.size, size, rtol=1e-4)
    d_mean = np.reshape(state.d_mean["kernel"], (-1, groups)).T.ravel()
    np.testing.assert_allclose(d_mean, oracle.p[:-1], rtol=1e-4, atol=1e-5)
    own = reference.layer_kernel(np.ones(layer.kernel), groups)  # each group has its rows
    d_var = reference.layer_kernel(state.d_var["kernel"], groups)
    np.testing.assert_allclose(d_var, own * oracle.d_var[:-1], rtol=1e-4, atol=1e-4)
    if layer.bias:
        np.testing.assert_allclose(state.d_mean["bias"], 1.0, rtol=1e-6)
        np.testing.assert_allclose(state.d_var["bias"], 0.0, atol=1e-4)


@layers
def test_window_one_is_batch_norm(name, key):
    layer = LAYERS[name]
    estimator = cbn.streaming_batch_norm(window=1, momentum=0.9)
    baseline = cbn.batch_norm(momentum=0.9)

    @functools.partial(jax.jit, static_argnums=0)
    def step(estimator, state, params, z):
        def loss(params, z):
            x, statistics, new = train(estimator, state, layer, params, z)
            return jnp.sin(cbn.normalize(x, statistics)).sum(), (statistics, new)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, z)

    state, other = init(estimator, layer, layer.params(key)), baseline.init(layer.features)
    for params, z in path(layer, key, 4):
        (mine, (statistics, state)), gradient = step(estimator, state, params, z)
        (theirs, (expected, other)), right = step(baseline, other, params, z)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            (mine, gradient, statistics, state.running),
            (theirs, right, expected, other),
        )


@some_layers
def test_frozen_weights_make_an_exponential_average(name, key):
    """Of raw moments, batch s steps ago with weight (1 − 1/k)ˢ and its number of values."""
    layer = LAYERS[name]
    step, state = start(name)
    params, weights, raw = layer.params(key), np.zeros(0), []
    for i, n in enumerate([3, 2, 2, 3, 3]):
        z = layer.data(jax.random.fold_in(key, i), examples=n)
        x, statistics, state = step(state, params, z)
        x = np.float64(x).reshape(-1, layer.features)
        raw.append([x.mean(0), np.square(x).mean(0)])
        weights = np.append(weights * 0.75, len(x))
        mean, square = np.average(raw, 0, weights)
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(variance(statistics), square - mean**2, rtol=1e-4)


@layers
def test_means_are_exact_on_any_path(name, key):
    """The mean is linear in the weights: recompute it for every past batch."""
    layer = LAYERS[name]
    step, state = start(name)
    seen, kept = [], []
    for params, z in path(layer, key, 9, size=1.0):
        before = size_of(state)
        x, statistics, state = step(state, params, z)
        seen.append(z)
        kept.append((size_of(state) - x.size / layer.features) / (before + 1e-9))
    today = np.float64(apply(layer, params, jnp.concatenate(seen)))
    means = today.reshape(len(seen), -1, layer.features).mean(1)
    weights = np.cumprod([np.ones(layer.features), *kept[:0:-1]], 0)[::-1]
    expected = (weights * means).sum(0) / weights.sum(0)
    np.testing.assert_allclose(statistics.mean, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "dense-no_bias"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
def test_variances_are_exact_for_the_same_inputs(name, size, key):
    """However far the weights went: the past rows are these inputs."""
    layer = LAYERS[name]
    step, state = start(name)
    params, z = layer.params(key), layer.data(key, examples=2)
    _, _, state = step(state, params, z)
    x, statistics, state = step(state, drift(params, key, size), z)
    exact = batch_moments(x)
    np.testing.assert_allclose(statistics.mean, exact.mean, rtol=1e-4, atol=1e-4 * size)
    np.testing.assert_allclose(variance(statistics), exact.var, rtol=1e-4)


@some_layers
def test_the_transported_variance_is_unbiased(name, key):
    """A population, then a batch of two: on average over the past rows nothing is lost.

    To first order alone E[⟨P, Δ⟩²] is lost, whatever the batch.
    """
    layer = LAYERS[name]
    old, population = layer.params(key), layer.data(key, examples=24)
    new, pair = drift(old, key, 0.2), layer.data(key, examples=2)
    before, today = apply(layer, old, population), apply(layer, new, population)
    exact = np.float64(batch_moments(today).var)
    estimator = cbn.streaming_batch_norm(window=1000, samples=8)
    state = init(estimator, layer, old)

    @jax.jit
    @jax.vmap
    def run(step):
        """The first step chooses the rows."""
        _, _, seen = train(estimator, at_step(state, step), layer, old, population)
        x, pooled, after = train(estimator, seen, layer, new, pair)
        return x.reshape(-1, layer.features), pooled, size_of(after)

    x, pooled, size = jax.tree.map(np.float64, run(jnp.arange(2000)))
    a = x.shape[1] / size
    mean = (pooled.mean - a * x.mean(1)) / (1 - a)
    between = a * (1 - a) * np.square(mean - x.mean(1))
    past = (variance(pooled) - a * x.var(1) - between) / (1 - a)
    error = past.std(0) / 2000**0.5
    assert (np.abs(past.mean(0) - exact) < 4.5 * error + 1e-3 * exact).all()
    lost = np.square(today - before).mean(tuple(range(today.ndim - 1)))
    assert (lost > 0.01 * exact).all()


@settings(max_examples=25, deadline=None)
@given(
    size=st.floats(0.0, 30.0),
    seed=st.integers(0, 1000),
    name=st.sampled_from(SOME),
    examples=st.sampled_from([1, 2]),
)
def test_outputs_are_bounded(size, seed, name, examples):
    """|y| ≤ √(Nk − 1), N values of k iterations: a value counts 1 / Nk or more itself.

    With weight w and the rest at its best, all in one point, the distance to the mean is
    1 − w and the variance w (1 − w).
    """
    layer, key = LAYERS[name], jax.random.key(seed)
    step, state = start(name)
    for params, z in path(layer, key, 5, size=size, examples=(examples,)):
        x, statistics, state = step(state, params, z)
        y = normalize(x, statistics)
        assert np.isfinite(y).all()
        bound = (4 * x.size / layer.features - 1) ** 0.5
        if size_of(state).min() > 1:  # else nothing is known, and x passes
            assert np.abs(y).max() <= 1.0001 * bound


def test_a_batch_without_values_sees_the_window_at_todays_weights(key):
    layer = LAYERS["dense"]
    estimator = cbn.streaming_batch_norm(window=4)
    step, state = start("dense")
    (params, z), (moved, other) = path(layer, key, 2)
    _, _, state = step(state, params, z)
    nothing = jnp.zeros((1, 1), bool)
    _, statistics, after = train(estimator, state, layer, moved, other, mask=nothing)
    expected = batch_moments(apply(layer, moved, z)).mean
    np.testing.assert_allclose(statistics.mean, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, state)


# Gradients with respect to the parameters.


@some_layers
@pytest.mark.parametrize("size", [0.0, 0.3])
def test_gradient_is_that_of_a_window_that_moves_to_first_order(name, size, key, x64):
    """Along p and along today's G, with the weights of past and batch held constant."""
    layer = LAYERS[name]
    estimator = cbn.streaming_batch_norm(window=4, samples=None)
    step, state = start(name)
    with jax.enable_x64(False):
        for params, z in path(layer, key, 3):
            _, _, state = step(state, params, z)
    params, z = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, z))
    params = drift(params, key, size)
    x, statistics, after = train(estimator, state, layer, params, z)
    a = x.size / layer.features / np.float64(size_of(after))

    def inner(derivative, params):
        def one(d, p):
            d = jnp.repeat(d.astype(jnp.float64), p.shape[-1] // d.shape[-1], -1)
            return (d * p).sum(range(p.ndim - 1))

        return sum(jax.tree.leaves(jax.tree.map(one, derivative, params)))

    def moments(moved, past):
        """Mean and variance of past and batch together, the past to first order."""
        delta = jax.tree.map(jnp.subtract, moved, params)
        rows = layer.fn(moved, z).reshape(-1, layer.features)
        mean = past[0] + inner(state.d_mean, delta)
        var = past[1] + inner(after.d_var, delta)
        between = a * (1 - a) * jnp.square(rows.mean(0) - mean)
        return (1 - a) * mean + a * rows.mean(0), (1 - a) * var + a * rows.var(0) + between

    mean = (statistics.mean - moments(params, (0.0, 0.0))[0]) / (1 - a)
    _, rest = moments(params, (mean, 0.0))
    past = mean, (variance(statistics) - rest) / (1 - a)

    def surrogate(moved):
        mean, var = moments(moved, past)
        scale = jax.lax.rsqrt(var + EPSILON)
        return jnp.sin(cbn.normalize(layer.fn(moved, z), cbn.Statistics(mean, scale)))

    def own(params):
        x, statistics, _ = train(estimator, state, layer, params, z)
        return jnp.sin(cbn.normalize(x, statistics))

    chex.assert_trees_all_close(own(params), surrogate(params), rtol=1e-6, atol=1e-8)
    check_vjp(
        surrogate, functools.partial(jax.vjp, jax.jit(own)), (params,), rtol=5e-4, atol=1e-6
    )


def test_gradient_goes_through_the_compensation(key):
    """A bias of all batches shifts all means: nothing is left of it."""
    layer = LAYERS["dense"]
    step, state = start("dense")
    for params, z in path(layer, key, 3):
        _, _, state = step(state, params, z)

    def loss(bias):
        x, statistics, _ = step(state, {**params, "bias": bias}, z)
        return jnp.sin(cbn.normalize(x, statistics)).sum()

    gradient = jax.jit(jax.grad(loss))(params["bias"])
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "conv-grouped"])
def test_a_sample_is_right_on_average(name, key):
    """State and variance, linear in the sample, over many choices of positions."""
    layer = LAYERS[name]
    (old, z), (params, new) = path(layer, key, 2)
    whole, state = start(name)
    _, _, state = whole(state, old, z)
    expected = whole(state, params, new)[2]
    estimator = cbn.streaming_batch_norm(window=4, samples=6)  # 3 of 25 positions

    def draw(step):
        return train(estimator, at_step(state, step), layer, params, new)[2]

    draws = jax.jit(jax.vmap(draw))(jnp.arange(3000))
    np.testing.assert_allclose(draws.window[0, 0], expected.window[0], atol=1e-5)
    for field in (lambda s: s.window[..., (1, 4), :], lambda s: s.d_var):
        for leaf, right in zip(
            jax.tree.leaves(field(draws)), jax.tree.leaves(field(expected)), strict=True
        ):
            error = np.std(leaf, axis=0) / 3000**0.5
            assert (np.abs(np.mean(leaf, axis=0) - right) < 4.5 * error + 1e-5).all()


# Costs.


def test_state_is_one_array_of_the_size_of_the_weights():
    """And nine patches: p and the past rows."""
    kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)

    def size(window):
        estimator = cbn.streaming_batch_norm(window)
        leaves = jax.tree.leaves(
            jax.eval_shape(lambda k: estimator.init(64, cbn.convolution(), k), kernel)
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert 1.0 < size(2) / (kernel.size * 4) <= 1.17
    assert size(64) == size(2)


def residual_network(norm, z):
    """Two basic blocks at each of four widths; ``norm(z, width, size, stride)``."""
    z = jax.nn.relu(norm(z, 64, 3, 1))
    for width in (64, 128, 256, 512):
        for stride in (1 if width == 64 else 2, 1):
            y = jax.nn.relu(norm(z, width, 3, stride))
            y = norm(y, width, 3, 1)
            z = jax.nn.relu(y + (z if z.shape == y.shape else norm(z, width, 1, stride)))
    return z.mean()


def flops(estimator, images):
    """Of a training step on the residual network, by XLA's count; nothing is run."""
    kernels, states = [], []

    def plan(z, width, size, stride):
        kernels.append(jax.ShapeDtypeStruct((size, size, z.shape[-1], width), z.dtype))
        states.append(estimator.init(width, cbn.convolution(), kernels[-1]))
        return cbn.convolution(stride).apply(jnp.zeros(kernels[-1].shape), z)

    jax.eval_shape(functools.partial(residual_network, plan), images)
    layer = cbn.convolution()
    states = jax.eval_shape(
        lambda: [estimator.init(k.shape[-1], layer, k) for k in kernels]
    )

    def loss(kernels, states, images):
        todo, new = iter(zip(kernels, states, strict=True)), []

        def norm(z, width, size, stride):
            kernel, state = next(todo)
            x, source = cbn.run_layer(cbn.convolution(stride), kernel, z)
            statistics, state = estimator.train(state, x, source)
            new.append(state)
            return cbn.normalize(x, statistics)

        return residual_network(norm, images), new

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step.lower(kernels, states, images).compile().cost_analysis()["flops"]


@pytest.mark.program
def test_costs_little_more_than_batch_norm():
    """On a residual network of eighteen layers, two images of 32 by 32."""
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    ratio = flops(cbn.streaming_batch_norm(), images) / flops(cbn.batch_norm(), images)
    assert 1.0 < ratio <= 1.2


# Wrong arguments: the message names the value, the expected one and the line to write.


@pytest.mark.parametrize("option", ["window", "samples"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_counts_must_be_whole_numbers(option, value):
    with pytest.raises(ValueError, match=rf"{option} is .*int of at least 1"):
        cbn.streaming_batch_norm(**{option: value})


def test_a_plain_function_does_as_a_layer(key):
    """JAX differentiates it: two steps are those of the layer that knows its patches."""
    layer = LAYERS["conv"]
    estimator = cbn.streaming_batch_norm(window=3)
    plain = expected = init(estimator, layer, layer.params(key))
    for params, z in path(layer, key, 2):
        x, source = cbn.run_layer(layer.fn, params, z)
        statistics, plain = estimator.train(plain, x, source)
        _, known, expected = train(estimator, expected, layer, params, z)
        chex.assert_trees_all_close(
            (statistics, plain), (known, expected), rtol=1e-4, atol=1e-5
        )


def test_a_source_is_needed(key):
    layer = LAYERS["conv"]
    estimator = cbn.streaming_batch_norm()
    state = init(estimator, layer, layer.params(key))
    x = layer.fn(layer.params(key), layer.data(key))
    with pytest.raises(ValueError, match=r"source=None, .*run_layer\(layer, "):
        estimator.train(state, x)


def test_groups_must_be_those_of_the_state(key):
    layer = LAYERS["conv-grouped"]
    estimator = cbn.streaming_batch_norm()
    params = layer.params(key)
    state = estimator.init(layer.features, layer.fn, params)
    with pytest.raises(ValueError, match=r" of shape \(1,\), expected \(2,\) for"):
        train(estimator, state, layer, params, layer.data(key))


def test_a_mask_per_feature_is_refused(key):
    layer = LAYERS["dense"]
    estimator = cbn.streaming_batch_norm()
    params = layer.params(key)
    state = init(estimator, layer, params)
    mask = jnp.ones((8, 4), bool)
    with pytest.raises(ValueError, match=r"mask of shape \(8, 4\).*write mask\.all\("):
        train(estimator, state, layer, params, layer.data(key), mask=mask)


def test_one_value_per_feature_needs_a_window(key):
    layer = LAYERS["dense"]
    estimator = cbn.streaming_batch_norm(window=1)
    params = layer.params(key)
    state = init(estimator, layer, params)
    with pytest.raises(ValueError, match="one value per feature"):
        train(estimator, state, layer, params, layer.data(key, examples=1))
