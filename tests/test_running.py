import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn

import cbn_jax as cbn
from cbn_jax.core.moments import Moments
from cbn_jax.core.running import init_running, restarted, update_running


def batches(steps):
    """Moments of one feature that change from step to step."""
    values = np.float32(np.random.default_rng(0).gamma(2.0, size=(steps, 1)))
    return values, [cbn.Moments(v, 2 * v, jnp.full(1, 2.0)) for v in jnp.asarray(values)]


def weights(rule, steps):
    if rule == cbn.cumulative():
        return np.full(steps, 1 / steps)
    return reference.exponential_weights(steps, 0.9)


@pytest.mark.parametrize("steps", [0, 1, 2, 10, 100])
@pytest.mark.parametrize("rule", [cbn.exponential(0.9), cbn.cumulative()])
def test_weights_in_closed_form(rule, steps):
    values, moments = batches(steps)
    update = jax.jit(functools.partial(update_running, average=rule))
    running = init_running(1)
    for m in moments:
        running = update(running, m)
    expected = weights(rule, steps) @ values if steps else np.zeros(1)
    np.testing.assert_allclose(running.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(running.var, 2 * expected if steps else 1.0, rtol=1e-5)
    np.testing.assert_array_equal(running.steps, [steps])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999])
def test_one_step_equals_that_step(momentum):
    _, (moments,) = batches(1)
    running = update_running(init_running(1), moments, cbn.exponential(momentum))
    np.testing.assert_array_equal(running.mean, moments.mean)
    np.testing.assert_array_equal(running.var, moments.var)


def test_no_momentum_keeps_the_last_batch():
    _, moments = batches(3)
    running = init_running(1)
    for m in moments:
        running = update_running(running, m, cbn.exponential(0.0))
    np.testing.assert_array_equal(running.mean, moments[-1].mean)


def test_a_very_long_run_keeps_averaging():
    """After 2²⁴ steps a float32 count no longer grows; the averages still change."""
    old = cbn.RunningMoments(jnp.zeros(1), jnp.ones(1), jnp.full(1, 2.0**24))
    one = cbn.Moments(jnp.ones(1), jnp.ones(1), jnp.full(1, 2.0))
    running = update_running(old, one, cbn.exponential(0.9))
    np.testing.assert_allclose(running.mean, [0.1], rtol=1e-6)


@pytest.mark.parametrize("too_few", [0.0, 1.0])
def test_a_feature_without_a_variance_waits(too_few):
    """Its own first batch still counts in full."""
    rule = cbn.exponential(0.9)
    half = cbn.Moments(jnp.array([5.0, 0.0]), jnp.ones(2), jnp.array([4.0, too_few]))
    full = cbn.Moments(jnp.array([5.0, 7.0]), jnp.ones(2), jnp.full(2, 4.0))
    running = update_running(update_running(init_running(2), half, rule), full, rule)
    np.testing.assert_allclose(running.mean, [5.0, 7.0])
    np.testing.assert_array_equal(running.steps, [2, 1])


def shares(rule, steps=6):
    """The weight of each batch in the end: batch m is the m-th unit vector."""
    running = init_running(steps)
    update = jax.jit(functools.partial(update_running, average=rule))
    for unit in jnp.eye(steps):
        moments = cbn.Moments(unit, unit, jnp.full(steps, 2.0))
        running = update(running, moments)
    return running.mean


@pytest.mark.parametrize("power", [0, 0.5, 1.0, 2.0, 3])
def test_diminishing_weights_in_closed_form(power):
    """α_m of the m-th batch, less what the later ones took."""
    rule, m = cbn.diminishing(power), np.arange(1.0, 7.0)
    np.testing.assert_allclose(rule(jnp.asarray(m)), 1 / m**power, rtol=1e-6)
    left = np.cumprod(1 - 1 / m[:0:-1] ** power)[::-1]
    expected = 1 / m**power * np.append(left, 1.0)
    np.testing.assert_allclose(shares(rule), expected, rtol=1e-5, atol=1e-7)


def test_power_one_counts_all_batches_alike():
    """Below it late ones count more, above it early ones."""
    late, alike, early = (np.diff(shares(cbn.diminishing(p))) for p in (0.5, 1.0, 2.0))
    np.testing.assert_allclose(alike, 0.0, atol=1e-7)
    assert (late > 1e-3).all()
    assert (early < -1e-3).all()
    np.testing.assert_allclose(
        shares(cbn.diminishing()), shares(cbn.cumulative()), rtol=1e-6
    )


@pytest.mark.parametrize("bad", [-0.5, float("nan")])
def test_a_power_is_not_negative(bad):
    with pytest.raises(ValueError, match=r"power is .*expected a number p of at least 0"):
        cbn.diminishing(bad)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9999])
def test_moments_from_elsewhere_go_on_at_their_own_pace(momentum):
    """From the first batch on, as if there had been a very long run before."""
    running = cbn.from_batch_stats(np.array([2.0, -1.0]), np.array([4.0, 0.5]))
    batch = cbn.Moments(jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0]), jnp.full(2, 2.0))
    mean, var = np.array([2.0, -1.0]), np.array([4.0, 0.5])
    update = jax.jit(functools.partial(update_running, average=cbn.exponential(momentum)))
    for _ in range(3):
        running = update(running, batch)
        mean = momentum * mean + (1 - momentum) * batch.mean
        var = momentum * var + (1 - momentum) * batch.var
        np.testing.assert_allclose(running.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(running.var, var, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16, np.int32])
def test_moments_from_elsewhere_become_float32(dtype):
    running = cbn.from_batch_stats(np.array([2.0], dtype), np.array([4.0], dtype))
    for leaf, value in zip(running, (2.0, 4.0, 1e6), strict=True):
        assert (leaf.dtype, leaf.shape) == (jnp.float32, (1,))
        assert leaf == value


def test_flaxs_batch_stats_predict_as_in_flax(key):
    """Of a trained layer; exactly what its own inference gives, scale and bias too."""
    module = nn.BatchNorm(momentum=0.9)
    x = 3.0 + 2.0 * jax.random.normal(key, (8, 4))
    variables = module.init(key, x, use_running_average=True)
    _, updates = module.apply(variables, x, use_running_average=False, mutable=True)
    scale, bias = jnp.linspace(0.5, 2.0, 4), jnp.linspace(-1.0, 1.0, 4)
    variables = {**updates, "params": {"scale": scale, "bias": bias}}
    expected = module.apply(variables, x, use_running_average=True)
    state = cbn.from_batch_stats(**variables["batch_stats"])
    statistics = cbn.batch_norm().infer(state, x)
    y = cbn.normalize(x, statistics, scale, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


def test_moments_from_elsewhere_have_one_shape():
    with pytest.raises(ValueError, match=r"mean of shape \(2,\) and var of shape \(3,\)"):
        cbn.from_batch_stats(jnp.ones(2), jnp.ones(3))


@pytest.mark.parametrize("rule", [cbn.cumulative, cbn.diminishing, cbn.exponential])
def test_a_schedule_is_called(rule):
    with pytest.raises(TypeError, match=rf"momentum is the function {rule.__name__}, .*\("):
        cbn.batch_norm(momentum=rule)


def test_a_number_is_a_plain_number():
    with pytest.raises(TypeError, match=r"momentum is an array, .*float\(momentum\)"):
        cbn.batch_norm(momentum=jnp.float32(0.9))


# Averages of a window, which restart where it contradicts them.


def test_an_average_that_the_window_contradicts_restarts_with_it():
    window = Moments(*np.float32([[0.0, 0.0, 0.0, 0.0], [1.0] * 4, [32.0] * 4]))
    running = cbn.RunningMoments(
        mean=jnp.float32([0.5, 0.6, 0.0, 0.0]),
        var=jnp.float32([1.0, 1.0, 2.0, 3.0]),
        steps=jnp.full(4, 50.0, jnp.float32),
    )
    new = restarted(running, window, jnp.full(4, 32.0, jnp.float32), 1e-5)
    # Three standard errors of 32 values: 0.53 for the mean, a factor of 2.1 in variance.
    np.testing.assert_allclose(new.mean, [0.5, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(new.var, [1.0, 1.0, 2.0, 1.0])
    np.testing.assert_array_equal(new.steps, running.steps)
    far = running._replace(mean=running.mean + 5.0)
    few = restarted(far, window, jnp.full(4, 7.0, jnp.float32), 1e-5)
    jax.tree.map(np.testing.assert_array_equal, few, far)


def converted(estimator, kernel):
    """A state whose averages are those of other data, and a step of training."""
    old = cbn.from_batch_stats(jnp.full(4, 7.0), jnp.full(4, 0.1))
    state = estimator.init(4, cbn.dense, kernel)._replace(running=old)
    if hasattr(estimator, "init_backward"):
        estimator = estimator.at(estimator.init_backward(4))

    @jax.jit
    def step(state, kernel, z):
        x, source = cbn.run_layer(cbn.dense, kernel, z)
        return estimator.train(state, x, source)[1]

    return state, step


@pytest.mark.parametrize(
    "estimator",
    [
        cbn.streaming_batch_norm(16, samples=None),
        cbn.replay_batch_norm(16, samples=2),
        cbn.bidirectional_batch_norm(16),
    ],
    ids=repr,
)
def test_trained_averages_follow_the_weights_and_the_data(estimator, key):
    """Soon after a conversion inference is as good as with the moments of the window."""
    kernel = jax.random.normal(key, (6, 4)) / 2.0
    state, step = converted(estimator, kernel)

    for i in range(40):
        z = jax.random.normal(jax.random.fold_in(key, i), (2, 6)) + 1.0
        kernel = kernel * 1.01
        state = step(state, kernel, z)
    mean, var = kernel.sum(axis=0), jnp.square(kernel).sum(axis=0)
    assert (jnp.abs(state.running.mean - mean) / jnp.sqrt(var)).max() < 0.5
    assert jnp.abs(jnp.log(state.running.var / var)).max() < 1.2


@pytest.mark.parametrize(
    "estimator",
    [
        cbn.replay_batch_norm(8, samples=2, momentum=cbn.cumulative()),
        cbn.bidirectional_batch_norm(8, momentum=cbn.cumulative()),
    ],
    ids=repr,
)
def test_a_schedule_is_followed_to_the_letter(estimator, key):
    """An average of very many batches hardly moves, whatever the window says."""
    kernel = jax.random.normal(key, (6, 4)) / 2.0
    state, step = converted(estimator, kernel)

    for i in range(10):
        z = jax.random.normal(jax.random.fold_in(key, i), (2, 6))
        state = step(state, kernel, z)
    np.testing.assert_allclose(state.running.mean, 7.0, rtol=1e-3)
