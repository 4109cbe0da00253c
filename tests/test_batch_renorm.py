import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normalize
from flax import linen as nn
from reference import batch_norm, batch_renorm, batch_renorm_gradient, exponential_weights

import cbn_jax as cbn
from cbn_jax.linen import Norm

C = 3
SHAPE = (8, 5, C)


@functools.partial(jax.jit, static_argnames="estimator")
def step(estimator, state, x, g):
    """Output, gradient for ``g`` at the output, and the next state."""

    def loss(x):
        statistics, after = estimator.train(state, x)
        y = cbn.normalize(x, statistics)
        return (g * y).sum(), (y, after)

    dx, (y, after) = jax.grad(loss, has_aux=True)(x)
    return y, dx, after


def batches(count):
    """Their means and deviations drift, so that r and d reach their limits."""
    rng = np.random.default_rng(0)
    for i in range(count):
        x = rng.normal(0.2 * i**2, 1.0 + i % 3, SHAPE).astype(np.float32)
        yield x, rng.normal(size=SHAPE).astype(np.float32)


def test_equals_the_oracle_while_the_limits_grow():
    estimator = cbn.batch_renorm(
        0.8, r_max=1.5, d_max=2.0, warmup_steps=2, r_steps=6, d_steps=4
    )
    state = estimator.init(C)
    means, variances, clipped = [], [], 0
    for t, (x, g) in enumerate(batches(9)):
        weights = exponential_weights(t, 0.8)
        mean = np.tensordot(weights, means, 1) if t else np.zeros(C)
        var = np.tensordot(weights, variances, 1) if t else np.ones(C)
        r_max = 1.0 + 0.5 * np.clip((t - 2) / 4, 0, 1)
        d_max = 2.0 * np.clip((t - 2) / 2, 0, 1)
        y, dx, state = step(estimator, state, x, g)
        x, g = np.float64(x), np.float64(g)
        np.testing.assert_allclose(
            y, batch_renorm(x, mean, var, r_max, d_max), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            dx, batch_renorm_gradient(x, g, mean, var, r_max), rtol=1e-3, atol=1e-5
        )
        free = batch_renorm(x, mean, var, 1e9, 1e9)
        clipped += not np.allclose(y, free, rtol=1e-3)
        means.append(x.mean((0, 1)))
        variances.append(x.var((0, 1)))
    assert clipped > 3
    np.testing.assert_allclose(
        state.mean, np.tensordot(exponential_weights(9, 0.8), means, 1), rtol=1e-5
    )


def test_warm_up_is_batch_norm():
    estimator, state = cbn.batch_renorm(warmup_steps=3), cbn.batch_renorm().init(C)
    for x, g in batches(3):
        y, _, state = step(estimator, state, x, g)
        np.testing.assert_allclose(y, batch_norm(x), rtol=1e-4, atol=1e-4)


def test_without_limits_training_is_inference():
    estimator = cbn.batch_renorm(r_max=1e6, d_max=1e6, warmup_steps=0)
    state = cbn.from_batch_stats(jnp.array([0.5, -1.0, 3.0]), jnp.array([0.1, 2.0, 9.0]))
    x, g = next(batches(1))
    y, _, _ = step(estimator, state, x, g)
    expected = normalize(x, estimator.infer(state, x))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_the_limits_of_converted_statistics_are_the_last():
    """Fine-tuning begins with averages of very many batches."""
    x, g = next(batches(1))
    state = cbn.from_batch_stats(jnp.zeros(C), jnp.ones(C))
    late = cbn.batch_renorm(warmup_steps=5_000)
    now = cbn.batch_renorm(warmup_steps=0)
    for got, expected in zip(step(late, state, x, g), step(now, state, x, g), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_first_batch_is_batch_norm_without_a_warm_up():
    """There is no average yet that r and d could follow."""
    x, g = next(batches(1))
    y, _, _ = step(cbn.batch_renorm(warmup_steps=0), cbn.batch_renorm().init(C), x, g)
    np.testing.assert_allclose(y, batch_norm(x), rtol=1e-4, atol=1e-4)


def test_a_jump_of_the_limits():
    """As in the classes that reinforcement learning copies."""
    estimator = cbn.batch_renorm(warmup_steps=2, r_steps=2, d_steps=2)
    state, outputs = estimator.init(C), []
    for x, g in batches(3):
        y, _, after = step(estimator, state, x, g)
        outputs.append((np.float64(x), y, state))
        state = after
    x, y, before = outputs[1]
    np.testing.assert_allclose(y, batch_norm(x), rtol=1e-4, atol=1e-4)
    x, y, before = outputs[2]
    expected = batch_renorm(x, np.float64(before.mean), np.float64(before.var), 3.0, 5.0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_a_small_variance_is_scaled_to_one():
    """Two values of ε would not."""
    x = 1e-3 * np.random.default_rng(0).normal(size=(64, C)).astype(np.float32)
    estimator = cbn.batch_renorm(warmup_steps=0, epsilon=1e-12)
    state = cbn.from_batch_stats(jnp.zeros(C), jnp.full(C, 1e-6))
    statistics, _ = estimator.train(state, x)
    np.testing.assert_allclose(normalize(x, statistics).std(0), x.std(0) / 1e-3, rtol=1e-3)


class Critic(nn.Module):
    @nn.compact
    def __call__(self, z, train):
        norm = Norm(
            cbn.batch_renorm(warmup_steps=0), nn.Dense(8), use_running_average=not train
        )
        return nn.Dense(1)(nn.relu(norm(z)))


def test_two_batches_as_one(key):
    """The joint batch of off-policy critics, in an ensemble with statistics of its own."""
    ensemble = nn.vmap(
        Critic,
        in_axes=None,
        out_axes=0,
        axis_size=2,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )()
    now, later = jax.random.normal(key, (2, 16, 4)) + jnp.array([0.0, 2.0])[:, None, None]
    variables = ensemble.init(key, now, False)

    @jax.jit
    def apply(z):
        return ensemble.apply(variables, z, True, mutable=["batch_stats"])

    joint, updates = apply(jnp.concatenate([now, later]))
    q_now, q_later = jnp.split(joint, 2, axis=1)
    assert q_now.shape == q_later.shape == (2, 16, 1)
    apart, _ = apply(now)
    assert not np.allclose(q_now, apart, atol=1e-2)
    state = jax.tree.leaves(updates)[0]
    assert state.shape == (2, 8)
    assert not np.allclose(state[0], state[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r_max": 0.5}, ValueError, "r_max is 0.5, expected a limit of at least 1"),
        ({"d_max": -1.0}, ValueError, "d_max is -1.0"),
        ({"warmup_steps": 1.5}, ValueError, "warmup_steps is 1.5"),
        ({"warmup_steps": 10, "r_steps": 5}, ValueError, "r_steps is 5.* at least 10"),
        ({"epsilon": 0.0}, ValueError, "epsilon is 0.0"),
        ({"r_max": jnp.ones(())}, TypeError, "r_max is an array"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        cbn.batch_renorm(**options)
