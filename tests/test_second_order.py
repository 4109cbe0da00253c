"""Two passes per step, and second derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FACTORIES

import cbn_jax as cbn
from cbn_jax.linen import replace_batch_norm

BACKWARD = ("bidirectional_batch_norm", "moving_average_batch_norm", "online_norm")
EXACT = (
    "batch_norm",
    "batch_renorm",
    "cross_iteration_batch_norm-from_scratch",
    "diminishing_batch_norm",
    "group_norm",
    "group_batch_norm",
    "momentum_batch_norm",
    "replay_batch_norm",
    "corrected_inference",
    "frozen",
)


def loss_of(name, dtype):
    """A function of the kernel, after three steps at other kernels."""
    estimator = FACTORIES[name]()
    kernel = jax.random.normal(jax.random.key(0), (6, 4), dtype)
    z = jax.random.normal(jax.random.key(1), (4, 6), dtype)
    target = jax.random.normal(jax.random.key(3), (4, 4), dtype)
    state = estimator.init(4, cbn.dense, kernel.astype(jnp.float32))
    if hasattr(estimator, "init_backward"):
        estimator = estimator.at(estimator.init_backward(4))

    def run(state, kernel):
        x, source = cbn.run_layer(cbn.dense, kernel, z)
        statistics, state = estimator.train(state, x, source)
        return cbn.normalize(x, statistics), state

    for i in range(3):
        _, state = jax.jit(run)(state, kernel + 0.02 * i)
    return (lambda kernel: (jnp.sin(run(state, kernel)[0]) * target).sum()), kernel


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_are_finite_differences(name, x64):
    loss, kernel = loss_of(name, jnp.float64)
    direction = jax.random.normal(jax.random.key(2), kernel.shape, jnp.float64)
    gradient = jax.jit(jax.grad(loss))

    @jax.jit
    def products(kernel):
        forward = jax.jvp(jax.grad(loss), (kernel,), (direction,))[1]
        return forward, jax.grad(lambda k: (jax.grad(loss)(k) * direction).sum())(kernel)

    step = 1e-5 * direction
    expected = (gradient(kernel + step) - gradient(kernel - step)) / 2e-5
    for product in products(kernel):
        np.testing.assert_allclose(product, expected, atol=1e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize("name", ["streaming_batch_norm", "cross_iteration_batch_norm"])
def test_what_a_gradient_holds_constant_a_second_one_does_too(name):
    """Forward over reverse and reverse over reverse agree, and are finite."""
    loss, kernel = loss_of(name, jnp.float32)

    @jax.jit
    def products(kernel):
        v = jnp.ones_like(kernel)
        forward = jax.jvp(jax.grad(loss), (kernel,), (v,))[1]
        return forward, jax.grad(lambda k: (jax.grad(loss)(k) * v).sum())(kernel)

    forward, reverse = products(kernel)
    assert np.isfinite(forward).all()
    np.testing.assert_allclose(forward, reverse, atol=2e-3)


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.filterwarnings("ignore:a method with backward statistics")
def test_backward_statistics_have_no_second_derivative(name, optimizer_in_this_process):
    loss, kernel = loss_of(name, jnp.float32)
    assert np.isfinite(jax.jit(jax.grad(loss))(kernel)).all()
    with pytest.raises(
        ValueError, match=r"got a second derivative .*expected a first derivative"
    ):
        jax.jit(jax.grad(lambda k: jnp.square(jax.grad(loss)(k)).sum()))(kernel)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (8, 8):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(features)(x))
            x = nn.relu(x)
        return nn.Dense(1)(x)


@pytest.mark.parametrize("method", [cbn.batch_norm(), cbn.small_batch_norm(2)], ids=repr)
def test_the_second_pass_of_sam_leaves_no_trace(method):
    """The state is that of a step without it, and the gradient is the one uphill."""
    model = replace_batch_norm(Net(), method)
    x, target = jax.random.normal(jax.random.key(0), (2, 5)), jnp.ones((2, 1))
    variables = model.init(jax.random.key(1), x, True)

    def loss(params, stats):
        variables = {"params": params, "batch_stats": stats}
        y, updates = model.apply(variables, x, True, mutable=["batch_stats"])
        return jnp.square(y - target).mean(), updates["batch_stats"]

    @jax.jit
    def step(params, stats):
        gradient, new = jax.grad(loss, has_aux=True)(params, stats)
        uphill = jax.tree.map(lambda p, g: p + 0.05 * g, params, gradient)
        sharp, _ = jax.grad(loss, has_aux=True)(uphill, stats)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, sharp), new

    @jax.jit
    def plain(params, stats):
        return loss(params, stats)[1]

    params, stats = variables["params"], variables["batch_stats"]
    for _ in range(4):
        expected = plain(params, stats)
        params, stats = step(params, stats)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            stats,
            expected,
        )
