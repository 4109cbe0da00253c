import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from cbn_jax.optax import centralize


class Net(nn.Module):
    @nn.compact
    def __call__(self, z):
        z = nn.relu(nn.Conv(4, (3, 3))(z))
        z = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2)(z))
        return nn.Dense(3)(z.mean((1, 2)))


@pytest.fixture
def params(key):
    """Of Flax layers, whose kernels have a mean."""
    params = Net().init(key, jnp.ones((1, 5, 5, 2)))["params"]
    return jax.tree.map(lambda leaf: leaf + 0.1, params)


def noise(params, seed):
    """Gradients of which no mean is zero."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(1.0 + generator.standard_normal(leaf.shape), leaf.dtype),
        params,
    )


def apply(transformation, gradients, params=None):
    return transformation.update(gradients, transformation.init(gradients), params)[0]


def filter_means(tree):
    """Mean of what each output feature is computed from, of all kernels in a row."""
    kernels = [np.float64(leaf) for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]
    return np.concatenate([k.reshape(-1, k.shape[-1]).mean(0) for k in kernels])


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol),
        actual,
        expected,
    )


# Computed values.


def test_every_filter_loses_its_mean_and_nothing_else(params):
    """g − mean(g) over all axes but the last; biases are left as they are."""
    gradients = noise(params, 0)
    centered = apply(centralize(), gradients)
    assert (np.abs(filter_means(gradients)) > 0.01).all()
    np.testing.assert_allclose(filter_means(centered), 0.0, atol=1e-6)
    for name, layer in gradients.items():
        g = np.float64(layer["kernel"])
        assert_close(centered[name]["kernel"], g - g.mean(tuple(range(g.ndim - 1))))
        np.testing.assert_array_equal(centered[name]["bias"], layer["bias"])


def test_optax_centralizes_the_wrong_axes_for_flax(params):
    """The weights of one input lose their mean; the weights of one output keep it."""
    gradients = noise(params, 0)
    theirs = apply(optax.centralize(), gradients)
    assert (np.abs(filter_means(theirs)) > 0.01).any()
    for layer in theirs.values():
        mean = layer["kernel"].mean(tuple(range(1, layer["kernel"].ndim)))
        np.testing.assert_allclose(mean, 0.0, atol=1e-6)
    # Each is the other's for kernels with the axes in the other's order.
    ours = apply(centralize(), jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), params))
    moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), ours)
    assert_close(moved, apply(optax.centralize(), params))


def test_conv_leaves_dense_kernels_alone(params):
    gradients = noise({**params, "in 1-D": {"kernel": jnp.ones((3, 2, 4))}}, 0)
    convolutions = apply(centralize("conv"), gradients)
    everything = apply(centralize("all"), gradients)
    dense = gradients.pop("Dense_0")
    np.testing.assert_array_equal(convolutions["Dense_0"]["kernel"], dense["kernel"])
    for name in gradients:
        np.testing.assert_array_equal(
            convolutions[name]["kernel"], everything[name]["kernel"]
        )


def test_it_is_the_projection_that_takes_constants_out():
    """Φ(Φ(g)) = Φ(g), Φ(constant) = 0, ⟨Φ(g), constant⟩ = 0 and Φ is symmetric."""
    one, other = np.random.default_rng(0).standard_normal((2, 3, 3, 2, 4))
    phi = jax.jit(lambda g: apply(centralize(), jnp.asarray(g, jnp.float32)))
    assert_close(phi(phi(one)), phi(one))
    constant = np.broadcast_to([1.0, -2.0, 3.0, 4.0], one.shape)
    np.testing.assert_array_equal(phi(constant), 0.0)
    assert_close((phi(one) * constant).sum((0, 1, 2)), np.zeros(4), atol=1e-5)
    assert_close((phi(one) * other).sum(), (one * phi(other)).sum())


# Its place in the chain.


def descend(optimizer, params, steps=4):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(noise(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_after_adam_every_filter_keeps_its_mean(params):
    """Before it, the division by the root of the second moment brings a mean back."""
    after = optax.chain(optax.scale_by_adam(), centralize(), optax.scale(-0.1))
    before = optax.chain(centralize(), optax.scale_by_adam(), optax.scale(-0.1))
    start = filter_means(params)
    with jax.numpy_dtype_promotion("standard"):  # Adam's count is an integer
        kept, moved = (filter_means(descend(tx, params)) for tx in (after, before))
    np.testing.assert_allclose(kept, start, atol=1e-6)
    assert (np.abs(moved - start) > 1e-4).all()


def test_the_published_order_for_sgd(params):
    """Weight decay, then the mean, then momentum; against a loop in NumPy."""
    optimizer = optax.chain(
        optax.add_decayed_weights(0.1), centralize(), optax.sgd(0.5, momentum=0.9)
    )
    found = descend(optimizer, params)

    def loop(path, theta):
        velocity = np.zeros_like(theta)
        for step in range(4):
            gradient = noise(params, step)[path[0].key][path[1].key]
            g = np.float64(gradient) + 0.1 * theta
            if g.ndim > 1:
                g -= g.mean(tuple(range(g.ndim - 1)), keepdims=True)
            velocity = 0.9 * velocity + g
            theta = theta - 0.5 * velocity
        return theta

    double = jax.tree.map(np.float64, params)
    assert_close(found, jax.tree.map_with_path(loop, double), 1e-5, 1e-5)


# Where it works.


def test_it_has_no_state_and_needs_no_parameters(params):
    gradients = noise(params, 0)
    assert jax.tree.leaves(centralize().init(params)) == []
    eager = apply(centralize(), gradients)
    assert_close(jax.jit(lambda g: apply(centralize(), g, params))(gradients), eager)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_keep_their_dtype(dtype, params):
    gradients = jax.tree.map(lambda leaf: leaf.astype(dtype), noise(params, 0))
    centered = apply(centralize(), gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(centered)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(filter_means(centered), 0.0, atol=0.02)


def test_masked_leaves_others_alone(params):
    """An embedding's last axis is no output of a sum."""
    gradients = noise({**params, "embedding": jnp.ones((7, 3))}, 0)
    mask = {**jax.tree.map(lambda _: True, params), "embedding": False}
    masked = apply(optax.masked(centralize(), mask), gradients)
    np.testing.assert_array_equal(masked.pop("embedding"), gradients.pop("embedding"))
    assert_close(masked, apply(centralize(), gradients))


def test_parameters_of_nnx(key):
    """As a tree of variables, and inside ``nnx.Optimizer``."""
    model = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    )
    start = nnx.state(model, nnx.Param)
    centered = apply(centralize(), noise(start, 0))
    np.testing.assert_allclose(filter_means(centered), 0.0, atol=1e-6)
    before = filter_means(start)
    optimizer = nnx.Optimizer(
        model, optax.chain(centralize(), optax.sgd(0.1)), wrt=nnx.Param
    )
    z = jax.random.normal(key, (2, 5, 5, 2))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.exp(model(z)).mean())(model))

    kernel = np.asarray(model.layers[0].kernel[...])
    step(model, optimizer)
    after = nnx.state(model, nnx.Param)
    np.testing.assert_allclose(filter_means(after), before, atol=1e-6)
    assert np.abs(kernel - model.layers[0].kernel[...]).max() > 1e-3


# Wrong arguments: the message names the value, the expected one and the line to write.


@pytest.mark.parametrize("bad", ["dense", None, 2])
def test_kernels_are_all_or_conv(bad):
    with pytest.raises(ValueError, match=rf"kernels is {bad!r}, expected 'all' or 'conv'"):
        centralize(bad)


def test_a_missing_optax_is_one_sentence():
    code = "import sys; sys.modules['optax'] = None; import cbn_jax.optax"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    sentence = "cbn_jax.optax needs optax; install it with: pip install 'cbn_jax[optax]'"
    assert run.stderr.strip().endswith(sentence)
