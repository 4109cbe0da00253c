"""Micro-batches of one optimizer step are one batch; the window is over steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import cbn_jax as cbn
from cbn_jax.linen import Norm

F, C, EVERY = 3, 4, 4
ALL = 10**6  # positions: no sampling


@functools.partial(jax.jit, static_argnames="estimator")
def train(estimator, state, kernel, z):
    x, source = cbn.run_layer(cbn.dense, kernel, z)
    return estimator.train(state, x, source)


def data(steps, key):
    z = 0.5 + jax.random.normal(key, (steps, EVERY, 2, F))
    kernels = jnp.cumsum(0.1 * jax.random.normal(key, (steps, F, C)), 0) + 1.0
    return z, kernels


def test_a_window_of_one_step_is_the_whole_batch(key):
    """The last micro-batch has the statistics of all, whatever came before."""
    estimator = cbn.streaming_batch_norm(1, micro_batches=EVERY, samples=None)
    z, kernels = data(3, key)
    state = estimator.init(C, cbn.dense, kernels[0])
    for micro, kernel in zip(z, kernels, strict=True):
        for i, each in enumerate(micro):
            statistics, state = train(estimator, state, kernel, each)
            so_far = np.float64(micro[: i + 1]).reshape(-1, F) @ np.float64(kernel)
            np.testing.assert_allclose(statistics.mean, so_far.mean(0), rtol=1e-4)
            expected = (so_far.var(0) + 1e-5) ** -0.5
            np.testing.assert_allclose(statistics.inv_std, expected, rtol=1e-3)


def test_the_last_micro_batch_is_a_step_with_all(key):
    """The window over steps is that without accumulation, at the weights of each step."""
    micro = cbn.streaming_batch_norm(3, micro_batches=EVERY, samples=None)
    whole = cbn.streaming_batch_norm(3, samples=None)
    z, kernels = data(4, key)
    kernels = jnp.broadcast_to(kernels[:1], kernels.shape)
    a, b = (e.init(C, cbn.dense, kernels[0]) for e in (micro, whole))
    for step, kernel in zip(z, kernels, strict=True):
        for each in step:
            got, a = train(micro, a, kernel, each)
        expected, b = train(whole, b, kernel, step.reshape(-1, F))
        np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-4)
        np.testing.assert_allclose(got.inv_std, expected.inv_std, rtol=1e-3)


def test_one_micro_batch_is_no_accumulation():
    assert cbn.small_batch_norm(2, micro_batches=1) == cbn.small_batch_norm(2)
    for count, window in ((4, 4), (16, 1), (20, 1)):
        estimator = cbn.small_batch_norm(2, micro_batches=count)
        same = cbn.streaming_batch_norm(window, micro_batches=count)
        states = (e.init(C, cbn.dense, jnp.ones((F, C))) for e in (estimator, same))
        x = jnp.ones((F, C)), jnp.arange(6.0).reshape(2, F)
        outputs = [
            train(e, s, *x)[0] for e, s in zip((estimator, same), states, strict=True)
        ]
        jax.tree.map(np.testing.assert_array_equal, *outputs)


@pytest.mark.usefixtures("loose")
def test_with_multi_steps(key):
    """The gradients of the micro-batches with the whole window equal one step's."""

    class Net(nn.Module):
        estimator: cbn.Estimator

        @nn.compact
        def __call__(self, z):
            norm = Norm(self.estimator, nn.Dense(C), use_running_average=False)
            return nn.Dense(1)(jnp.tanh(norm(z)))

    model = Net(cbn.small_batch_norm(2, micro_batches=EVERY))
    z, _ = data(3, key)
    variables = jax.jit(model.init)(key, z[0, 0])
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=EVERY)
    opt_state = optimizer.init(params)

    @jax.jit
    def micro_step(params, opt_state, stats, z):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, z, mutable=["batch_stats"])
            return jnp.square(y).mean(), updates["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, stats

    for step in z:
        for each in step:
            before = params
            params, opt_state, stats = micro_step(params, opt_state, stats, each)
    kernel = before["Dense_0"]
    last = z[-1].reshape(-1, F) @ kernel["kernel"] + kernel["bias"][None]
    window = cbn.Window(*stats["Norm_0"]["window"])
    # Three steps of eight examples: most of the window is the last.
    assert np.abs(window.mean - last.mean(0)).max() < 3 * last.std() / np.sqrt(8)
    np.testing.assert_allclose(window.size, 8 * (1 + 0.75 + 0.75**2), rtol=1e-5)


def test_arguments():
    with pytest.raises(ValueError, match="micro_batches is 0"):
        cbn.small_batch_norm(2, micro_batches=0)
