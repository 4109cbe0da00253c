import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import cbn_jax as cbn
from cbn_jax._running import init_running, update_running


def batches(steps):
    """Moments of one feature that change from step to step."""
    values = np.float32(np.random.default_rng(0).gamma(2.0, size=(steps, 1)))
    return values, [cbn.Moments(v, 2 * v, jnp.ones(1)) for v in jnp.asarray(values)]


def weights(rule, steps):
    if rule is cbn.cumulative:
        return np.full(steps, 1 / steps)
    return reference.exponential_weights(steps, 0.9)


@pytest.mark.parametrize("steps", [0, 1, 2, 10, 100])
@pytest.mark.parametrize("rule", [cbn.exponential(0.9), cbn.cumulative])
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
    """Past 2²⁴ steps a float32 count stands still; the averages go on."""
    old = cbn.RunningMoments(jnp.zeros(1), jnp.ones(1), jnp.full(1, 2.0**24))
    one = cbn.Moments(jnp.ones(1), jnp.ones(1), jnp.ones(1))
    running = update_running(old, one, cbn.exponential(0.9))
    np.testing.assert_allclose(running.mean, [0.1], rtol=1e-6)


def test_a_feature_without_values_waits():
    """Its own first batch still counts in full."""
    rule = cbn.exponential(0.9)
    half = cbn.Moments(jnp.array([5.0, 0.0]), jnp.ones(2), jnp.array([4.0, 0.0]))
    full = cbn.Moments(jnp.array([5.0, 7.0]), jnp.ones(2), jnp.full(2, 4.0))
    running = update_running(update_running(init_running(2), half, rule), full, rule)
    np.testing.assert_allclose(running.mean, [5.0, 7.0])
    np.testing.assert_array_equal(running.steps, [2, 1])
