import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LAYERS, conv

import cbn_jax as cbn

layers = pytest.mark.parametrize("name", LAYERS)


@layers
def test_output_and_gradient_are_the_layers_own(name, key):
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)
    direct = jax.value_and_grad(lambda p, z: jnp.sin(layer.fn(p, z)).sum(), (0, 1))
    through = jax.value_and_grad(
        lambda p, z: jnp.sin(cbn.run_layer(layer.fn, p, z)[0]).sum(), (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, through(params, z), direct(params, z))


@layers
def test_one_pullback_holds_the_derivatives_of_all_features(name, key):
    """The full Jacobian is zero off the feature's own filter, and equal to it there."""
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)

    def moments(params):
        return cbn.batch_moments(layer.fn(params, z))

    jacobian = jax.jacobian(moments)(params)
    x, source = cbn.run_layer(layer.fn, params, z)
    n = x.size // x.shape[-1]
    deviation = 2 * (x - x.mean(tuple(range(x.ndim - 1)), keepdims=True)) / n
    d_var, d_mean = source.pullback(deviation, jnp.full((*x.shape[:-1], 1), 1 / n))
    for full, block in ((jacobian.mean, d_mean), (jacobian.var, d_var)):
        for leaf, own in zip(jax.tree.leaves(full), jax.tree.leaves(block), strict=True):
            own = np.broadcast_to(own, leaf.shape[1:])
            for feature in range(layer.features):
                expected = np.zeros_like(own)
                expected[..., feature] = own[..., feature]
                np.testing.assert_allclose(leaf[feature], expected, atol=1e-5)


@layers
def test_shared_cotangents_equal_full_ones(name, key):
    layer = LAYERS[name]
    x, source = cbn.run_layer(layer.fn, layer.params(key), layer.data(key))
    each = jax.random.normal(key, x.shape)
    shared = jax.random.normal(key, (*x.shape[:-1], 1))
    narrow = source.pullback(each, shared)
    full = source.pullback(each, jnp.broadcast_to(shared, x.shape))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.broadcast_to(a, b.shape), b, rtol=1e-5, atol=1e-5
        ),
        narrow,
        full,
    )


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def test_both_pullbacks_cost_little_more_than_one_weight_gradient(key):
    layer_fn = functools.partial(conv, padding=1)
    z, kernel = jnp.ones((2, 32, 32, 32)), {"kernel": jnp.ones((3, 3, 32, 32))}

    def pull(kernel, z):
        _, source = cbn.run_layer(layer_fn, kernel, z)
        return source.pullback(z, z[..., :1])

    one = flops(lambda k, z: jax.vjp(lambda k: layer_fn(k, z), k)[1](z), kernel, z)
    assert flops(pull, kernel, z) / one < 1.05


def test_an_unused_source_costs_nothing(key):
    layer_fn = functools.partial(conv, padding=1)
    z, kernel = jnp.ones((2, 16, 16, 8)), {"kernel": jnp.ones((3, 3, 8, 8))}
    with_source = jax.grad(lambda k, z: cbn.run_layer(layer_fn, k, z)[0].sum())
    without = jax.grad(lambda k, z: layer_fn(k, z).sum())
    assert flops(with_source, kernel, z) == flops(without, kernel, z)


def test_nothing_in_a_source_carries_a_gradient(key):
    layer = LAYERS["conv-strided"]

    def f(params, z):
        x, source = cbn.run_layer(layer.fn, params, z)
        pulled = source.pullback(jnp.ones_like(x), jnp.ones((*x.shape[:-1], 1)))
        return sum(leaf.sum() for leaf in jax.tree.leaves((source.params, pulled)))

    gradients = jax.grad(f, (0, 1))(layer.params(key), layer.data(key))
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0.0)
