import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import LAYERS, apply, drift, infer, init, normalize, train, variance
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import cbn_jax as cbn

layers = pytest.mark.parametrize("name", LAYERS)
EPSILON = 1e-5
batch_moments = jax.jit(cbn.batch_moments)


def path(layer, key, steps, size=0.05, examples=None):
    """(params, inputs) of a run with moving weights."""
    params = layer.params(key)
    for step in range(steps):
        yield params, layer.data(jax.random.fold_in(key, step), examples=examples)
        params = drift(params, jax.random.fold_in(key, 100 + step), size)


def start(layer, key, **options):
    estimator = cbn.cross_iteration_batch_norm(**options)
    return estimator, init(estimator, layer, layer.params(key))


def patches(layer, z):
    if z.ndim == 2:
        return np.float64(z)
    options = {LAYERS["conv-strided"]: (2, 0, 1), LAYERS["conv-dilated"]: (1, 2, 2)}
    cut = reference.conv_patches(z, layer.kernel[0], *options[layer])
    return cut.reshape(-1, np.prod(cut.shape[3:]))


@pytest.mark.parametrize("burn_in", [0, 3])
@pytest.mark.parametrize("name", ["dense", "dense-no_bias", "conv-strided", "conv-dilated"])
def test_equals_the_oracle(name, burn_in, key):
    """Statistics over twelve steps of moving weights, window 4, then the averages."""
    layer = LAYERS[name]
    estimator, state = start(layer, key, window=4, burn_in=burn_in, momentum=0.9)
    oracle = reference.CrossIteration(4, burn_in)
    for params, z in path(layer, key, 12, examples=2):
        _, statistics, state = train(estimator, state, layer, params, z)
        kernel = np.asarray(params["kernel"]).reshape(-1, layer.features)
        bias = params.get("bias", np.zeros(layer.features))
        mean, var = oracle.step(patches(layer, z), kernel, bias)
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance(statistics), var, rtol=1e-4, atol=1e-5)
    weights = reference.exponential_weights(12, 0.9)
    np.testing.assert_allclose(
        state.running.mean, weights @ oracle.means, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(state.running.var, weights @ oracle.variances, rtol=1e-4)
    newest = (int(state.slot) - 1) % 4
    entry = jax.tree.map(lambda leaf: np.asarray(leaf[newest]), state.history)
    last = oracle.past[0]
    shape = layer.kernel
    np.testing.assert_allclose(
        np.broadcast_to(entry.d_mean["kernel"], shape),
        last["dmu_dW"].reshape(shape),
        rtol=1e-4,
        atol=1e-5,
    )
    central = last["dnu_dW"] - 2 * last["mu"] * last["dmu_dW"]
    np.testing.assert_allclose(
        entry.d_var["kernel"], central.reshape(shape), rtol=1e-4, atol=1e-4
    )


@layers
def test_window_one_is_batch_norm(name, key):
    layer = LAYERS[name]
    estimator, state = start(layer, key, window=1)
    baseline = cbn.batch_norm()
    other = baseline.init(layer.features)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def loss(params, estimator, state, z):
        x, statistics, _ = train(estimator, state, layer, params, z)
        return jnp.sin(cbn.normalize(x, statistics)).sum()

    for params, z in path(layer, key, 4):
        mine = loss(params, estimator, state, z)
        theirs = loss(params, baseline, other, z)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            mine,
            theirs,
        )
        _, statistics, state = train(estimator, state, layer, params, z)
        _, expected, other = train(baseline, other, layer, params, z)
        for a, b in zip(statistics, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.running, other)


@layers
def test_frozen_weights_pool_the_window(name, key):
    """Batches of unequal size through standing weights: one big batch."""
    layer = LAYERS[name]
    estimator, state = start(layer, key, window=3)
    params = layer.params(key)
    batches = [
        layer.data(jax.random.fold_in(key, i), examples=n)
        for i, n in enumerate([5, 2, 2, 5])
    ]
    for step, z in enumerate(batches):
        _, statistics, state = train(estimator, state, layer, params, z)
        window = jnp.concatenate(batches[max(0, step - 2) : step + 1])
        expected = batch_moments(apply(layer, params, window))
        np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(variance(statistics), expected.var, rtol=2e-5)


@layers
def test_means_are_exact_on_any_path(name, key):
    """The mean is linear in the weights: recompute it for every past batch."""
    layer = LAYERS[name]
    estimator, state = start(layer, key, window=4)
    seen = []
    for params, z in path(layer, key, 9, size=1.0):
        _, statistics, state = train(estimator, state, layer, params, z)
        seen.append(z)
        recomputed = apply(layer, params, jnp.concatenate(seen[-4:]))
        expected = batch_moments(recomputed).mean
        np.testing.assert_allclose(statistics.mean, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "conv-strided", "conv-grouped"])
@pytest.mark.parametrize(("rho", "order"), [(1.0, 2.0), (0.5, 1.0), (0.0, 1.0)])
def test_variances_converge_at_second_order(name, rho, order, key, x64):
    """Half the step, a quarter of the error: the Taylor term is the derivative.

    Without it, or with half of it, only half.
    """
    layer = LAYERS[name]
    params, z = layer.params(key, jnp.float64), layer.data(key, jnp.float64)
    direction = layer.params(jax.random.fold_in(key, 1), jnp.float64)
    estimator, state = start(layer, key, window=2, rho=rho)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.history)
    state = state._replace(history=wide)  # else float32 rounding hides the slope
    _, _, state = train(estimator, state, layer, params, z)

    def error(size):
        moved = jax.tree.map(lambda p, d: p + size * d, params, direction)
        x, statistics, _ = train(estimator, state, layer, moved, z)
        return np.abs(variance(statistics) - batch_moments(x).var).max()

    slope = np.log2(error(2e-3) / error(1e-3))
    assert slope == pytest.approx(order, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(
    size=st.floats(0.0, 30.0),
    seed=st.integers(0, 1000),
    name=st.sampled_from(sorted(LAYERS)),
)
def test_variance_is_never_negative(size, seed, name):
    layer, key = LAYERS[name], jax.random.key(seed)
    estimator, state = start(layer, key, window=4)
    for params, z in path(layer, key, 5, size=size, examples=2):
        x, statistics, state = train(estimator, state, layer, params, z)
        assert (statistics.inv_std <= EPSILON**-0.5 * 1.0001).all()
        assert np.isfinite(normalize(x, statistics)).all()


def test_burn_in_is_batch_norm_then_the_full_window(key):
    layer = LAYERS["conv"]
    estimator, state = start(layer, key, window=3, burn_in=4)
    full, other = start(layer, key, window=3)
    for step, (params, z) in enumerate(path(layer, key, 7)):
        x, statistics, state = train(estimator, state, layer, params, z)
        _, windowed, other = train(full, other, layer, params, z)
        plain = batch_moments(x)
        expected = (
            (plain.mean, plain.var) if step < 4 else (windowed.mean, variance(windowed))
        )
        np.testing.assert_allclose(statistics.mean, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance(statistics), expected[1], rtol=1e-5)


def test_gradient_in_closed_form(key):
    """dL/dx = (g − mean(g)/n − x̂ mean(g x̂)/n) / σ, n iterations in the window."""
    layer = LAYERS["dense"]
    estimator, state = start(layer, key, window=3)
    run = list(path(layer, key, 3))
    for params, z in run[:2]:
        _, _, state = train(estimator, state, layer, params, z)
    x, source = cbn.run_layer(layer.layer, *run[2])
    g = jax.random.normal(key, x.shape)

    def f(x):
        statistics, _ = estimator.train(state, x, source)
        return cbn.normalize(x, statistics)

    x_hat, pull = jax.vjp(jax.jit(f), x)
    inv_std = estimator.train(state, x, source)[0].inv_std
    projected = g - (g.mean(0)[None] + x_hat * (g * x_hat).mean(0)[None]) / 3
    np.testing.assert_allclose(pull(g)[0], projected * inv_std[None], rtol=1e-4, atol=1e-5)


def test_no_gradient_through_the_compensation(key):
    """As published: the weights are constant inside the Taylor term."""
    layer = LAYERS["dense"]
    estimator, state = start(layer, key, window=3)
    (old, z0), (params, z) = path(layer, key, 2)
    _, _, state = train(estimator, state, layer, old, z0)

    def whole(params):
        x, statistics, _ = train(estimator, state, layer, params, z)
        return jnp.sin(cbn.normalize(x, statistics)).sum()

    _, source = cbn.run_layer(layer.layer, params, z)

    def through_x(params):
        x = layer.fn(params, z)
        return jnp.sin(cbn.normalize(x, estimator.train(state, x, source)[0])).sum()

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.jit(jax.grad(whole))(params),
        jax.jit(jax.grad(through_x))(params),
    )


def test_gradient_accumulation_pools_the_micro_batches(key):
    """k micro-batches at fixed weights: the last one sees the whole batch."""
    layer = LAYERS["conv"]
    estimator, state = start(layer, key, window=4)
    for params, z in path(layer, key, 3):
        for micro in jnp.split(z, 4):
            _, statistics, state = train(estimator, state, layer, params, micro)
        whole = batch_moments(apply(layer, params, z))
        np.testing.assert_allclose(statistics.mean, whole.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance(statistics), whole.var, rtol=1e-4)


def test_one_example_per_iteration(key):
    """Variance across iterations alone, where each has a single value per feature."""
    layer = LAYERS["dense"]
    estimator, state = start(layer, key, window=5, running="window")
    params = layer.params(key)
    data = layer.data(key)
    for step in range(8):
        _, statistics, state = train(estimator, state, layer, params, data[step : step + 1])
    expected = batch_moments(apply(layer, params, data[3:]))
    np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance(statistics), expected.var, rtol=1e-4)


@pytest.mark.parametrize(("ratio", "tolerance"), [(1e3, 1e-3), (1e4, 1e-2)])
def test_large_means_do_not_cancel(ratio, tolerance, key):
    """The raw form E[x²] − E[x]² has lost every digit at 1e4."""
    layer = LAYERS["dense"]
    estimator, state = start(layer, key, window=4)
    params = layer.params(key)
    params["bias"] = jnp.full(4, ratio)
    seen = []
    for step in range(6):
        z = layer.data(jax.random.fold_in(key, step))
        x, statistics, state = train(estimator, state, layer, params, z)
        seen.append(np.float64(x))
        exact = np.concatenate(seen[-4:]).var(0)
        np.testing.assert_allclose(variance(statistics), exact, rtol=tolerance)
        params = {**params, "kernel": params["kernel"] + 1e-6}


@pytest.mark.program
def test_costs_four_thirds_of_batch_norm():
    """FLOPs of a training step on a chain of 3x3 convolutions, by XLA's count."""
    width, depth = 64, 8
    layer = cbn.convolution()
    kernels = [
        {"kernel": jnp.ones((3, 3, 3 if i == 0 else width, width))} for i in range(depth)
    ]

    def flops(estimator, shape):
        states = [estimator.init(width, layer, kernel) for kernel in kernels]

        def loss(kernels, states, z):
            new = []
            for kernel, state in zip(kernels, states, strict=True):
                x, source = cbn.run_layer(layer, kernel, z)
                statistics, state = estimator.train(state, x, source)
                z = jax.nn.relu(cbn.normalize(x, statistics))
                new.append(state)
            return z.mean(), new

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        compiled = step.lower(kernels, states, jnp.ones(shape)).compile()
        return compiled.cost_analysis()["flops"]

    for shape in [(2, 32, 32, 3), (1, 32, 32, 3), (8, 16, 16, 3)]:
        ratio = flops(cbn.cross_iteration_batch_norm(8), shape) / flops(
            cbn.batch_norm(), shape
        )
        assert 4 / 3 - 0.02 < ratio <= 1.36


@pytest.mark.program
@pytest.mark.parametrize("gradient", ["current", "window"])
def test_the_history_is_never_copied(gradient):
    """The donated ring is written in place, and read where it lies."""
    kernel, window = jnp.ones((3, 3, 8, 16)), 5
    estimator = cbn.cross_iteration_batch_norm(window, gradient=gradient)

    def step(kernel, state, z):
        def loss(kernel):
            x, source = cbn.run_layer(cbn.convolution(), kernel, z)
            statistics, after = estimator.train(state, x, source)
            return jax.nn.relu(cbn.normalize(x, statistics)).mean(), after

        gradient, after = jax.grad(loss, has_aux=True)(kernel)
        return kernel - gradient, after

    jitted = jax.jit(step, donate_argnums=(0, 1))
    arguments = (
        kernel,
        estimator.init(16, cbn.convolution(), kernel),
        jnp.ones((2, 8, 8, 8)),
    )
    program = jitted.lower(*arguments).compile().as_text()
    ring = r"= f32\[5,3,3,8,16\]\S* "
    assert re.search(ring + "(fusion|dynamic-update-slice)", program)
    assert not re.search(ring + "copy", program)


# The published method's options.


def compiled(estimator, layer):
    return lambda state, params, z: train(estimator, state, layer, params, z)


@pytest.mark.parametrize("name", ["dense", "conv-strided"])
@pytest.mark.parametrize(
    ("rho", "guard"), [(0.0, "max"), (0.4, "max"), (0.4, "drop"), (1.0, "drop")]
)
def test_compensation_and_guard_equal_the_oracle(name, rho, guard, key):
    """With steps so large that some variances come out negative."""
    layer = LAYERS[name]
    estimator, state = start(layer, key, window=4, rho=rho, guard=guard)
    step = compiled(estimator, layer)
    oracle = reference.CrossIteration(4, rho=rho, drop=guard == "drop")
    other = reference.CrossIteration(4, rho=rho, drop=guard == "max")
    guarded = False
    for params, z in path(layer, key, 8, size=1.0, examples=2):
        _, statistics, state = step(state, params, z)
        kernel = np.asarray(params["kernel"]).reshape(-1, layer.features)
        mean, var = oracle.step(patches(layer, z), kernel, params["bias"])
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(variance(statistics), var, rtol=1e-4, atol=1e-4)
        _, unguarded = other.step(patches(layer, z), kernel, params["bias"])
        guarded |= not np.allclose(var, unguarded, rtol=1e-2)
    assert guarded == (rho > 0)


def test_without_compensation_old_values_are_pooled_as_they_were(key):
    layer = LAYERS["conv"]
    estimator, state = start(layer, key, window=3, rho=0.0)
    seen = []
    for params, z in path(layer, key, 5, size=1.0):
        z = z[: 2 + len(seen) % 3]
        x, statistics, state = train(estimator, state, layer, params, z)
        seen.append(np.float64(x).reshape(-1, layer.features))
        values = np.concatenate(seen[-3:])
        np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance(statistics), values.var(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "conv-strided", "conv-grouped"])
@pytest.mark.parametrize("guard", ["max", "drop"])
def test_gradient_of_the_whole_window(name, guard, key, x64):
    """With respect to the parameters that of the function computed, in float64."""
    layer = LAYERS[name]
    options = {"window": 3, "guard": guard, "gradient": "window"}
    estimator, state = start(layer, key, **options)
    step = compiled(estimator, layer)
    with jax.enable_x64(False):
        for params, z in path(layer, key, 3, size=0.2, examples=3):
            _, _, state = step(state, params, z)
    params, z = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, z))

    @jax.jit
    def f(params, z):
        x, statistics, _ = train(estimator, state, layer, params, z)
        return cbn.normalize(x, statistics)

    moved = drift(params, key, 0.2)
    check_grads(f, (moved, z), order=1, modes=["rev"], rtol=1e-6, atol=1e-7)


def test_ramp_lengthens_the_window_bit_by_bit(key):
    """A third of the way, a third of the past: windows 1, 1, 2, 2, 3, 3 and then 4."""
    layer = LAYERS["dense"]
    run = list(path(layer, key, 9))

    def statistics(**options):
        estimator, state = start(layer, key, **options)
        step = compiled(estimator, layer)
        for params, z in run:
            _, statistics, state = step(state, params, z)
            yield statistics

    fixed = [list(statistics(window=window)) for window in range(1, 5)]
    ramped = statistics(window=4, burn_in=cbn.ramp(6))
    for i, mine in enumerate(ramped):
        expected = fixed[min(i // 2, 3)][i]
        np.testing.assert_allclose(mine.mean, expected.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine.inv_std, expected.inv_std, rtol=1e-5)


@pytest.mark.parametrize("steps", [41, 47, 82])
def test_a_ramp_ends_in_time(steps, key):
    """Under ``jit`` steps/steps may be a rounding error below one."""
    layer = LAYERS["dense"]
    estimator, state = start(layer, key, window=2, burn_in=cbn.ramp(steps))
    whole, _ = start(layer, key, window=2)
    (old, z0), (params, z) = path(layer, key, 2)
    _, _, state = train(whole, state, layer, old, z0)
    seen = jnp.full(layer.features, steps, jnp.float32)
    state = state._replace(running=state.running._replace(steps=seen))
    _, statistics, _ = train(estimator, state, layer, params, z)
    _, expected, _ = train(whole, state, layer, params, z)
    np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-5)


@pytest.mark.parametrize("running", ["batch", "window"])
def test_inference_averages_batches_or_windows(running, key):
    layer = LAYERS["conv-strided"]
    options = {"window": 3, "running": running, "momentum": 0.8}
    estimator, state = start(layer, key, **options)
    step = compiled(estimator, layer)
    seen = []
    for params, z in path(layer, key, 5, examples=2):
        x, statistics, state = step(state, params, z)
        values = np.float64(x).reshape(-1, layer.features)
        batch = values.mean(0), values.var(0)
        window = statistics.mean, variance(statistics)
        seen.append(batch if running == "batch" else window)
    expected = np.tensordot(reference.exponential_weights(5, 0.8), np.array(seen), 1)
    inferred = infer(estimator, state, x)
    np.testing.assert_allclose(inferred.mean, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance(inferred), expected[1], rtol=1e-4)


# Wrong arguments: the message names the value, the expected one and the line to write.


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_window_must_be_a_whole_number(window):
    with pytest.raises(ValueError, match=r"window is .*int of at least 1"):
        cbn.cross_iteration_batch_norm(window)


def test_burn_in_must_not_be_negative():
    with pytest.raises(ValueError, match=r"burn_in is -1, .*at least 0"):
        cbn.cross_iteration_batch_norm(8, burn_in=-1)


@pytest.mark.parametrize("option", ["guard", "gradient", "running"])
def test_choices_are_a_few_words(option):
    message = rf"{option} is 'other', expected '\w+' or '\w+'"
    with pytest.raises(ValueError, match=message):
        cbn.cross_iteration_batch_norm(**{option: "other"})


def test_a_ramp_takes_steps():
    with pytest.raises(ValueError, match=r"steps is 0, .*at least 1"):
        cbn.ramp(0)


def test_a_source_is_needed(key):
    layer = LAYERS["dense"]
    estimator, state = start(layer, key)
    with pytest.raises(
        ValueError, match=r"source=None, .*run_layer\(layer, .*layer=\.\.\."
    ):
        estimator.train(state, jnp.ones((8, 4)))


def test_parameters_must_have_features_last(key):
    estimator = cbn.cross_iteration_batch_norm()
    with pytest.raises(ValueError, match=r"\['kernel'\] of shape \(4, 5\), .*last \(4\)"):
        estimator.init(4, cbn.dense, {"kernel": jnp.ones((4, 5))})
    with pytest.raises(ValueError, match=r"params=None, .*init\(features, layer, params\)"):
        estimator.init(4, cbn.dense)
    for layer in (None, jnp.ones((5, 4))):
        with pytest.raises(
            TypeError, match=r"got .*layer.*init\(features, layer, params\)"
        ):
            estimator.init(4, layer, jnp.ones((5, 4)))


def test_a_state_of_another_window(key):
    layer = LAYERS["dense"]
    estimator, _ = start(layer, key, window=8)
    _, state = start(layer, key, window=4)
    x, source = cbn.run_layer(layer.layer, layer.params(key), layer.data(key))
    message = (
        r"history\.window of shape \(5, 4, 4\), expected \(5, 8, 4\) .*the same estimator"
    )
    with pytest.raises(ValueError, match=message):
        estimator.train(state, x, source)


def test_a_source_of_another_layer(key):
    layer, other = LAYERS["dense"], LAYERS["dense-no_bias"]
    estimator, state = start(other, key)
    x, source = cbn.run_layer(layer.layer, layer.params(key), layer.data(key))
    message = r"history\.d_mean\['bias'\] of shape None, expected \(8, 1\) for this layer"
    with pytest.raises(ValueError, match=message):
        estimator.train(state, x, source)


def test_one_value_per_feature_needs_a_window(key):
    layer = LAYERS["dense"]
    x, source = cbn.run_layer(layer.layer, layer.params(key), layer.data(key, examples=1))
    running = {"running": "window"}
    for options in (
        {"window": 1, **running},
        {"window": 8, "burn_in": 10, **running},
        {"window": 8, "burn_in": cbn.ramp(10), **running},
        {"window": 8, "running": "batch"},
    ):
        estimator, state = start(layer, key, **options)
        with pytest.raises(ValueError, match="one value per feature"):
            estimator.train(state, x, source)
