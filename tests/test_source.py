import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LAYERS

import cbn_jax as cbn
from cbn_jax.core.patches import mean_patch, moments_and_sample, product, pull

layers = pytest.mark.parametrize("name", LAYERS)


@layers
def test_output_and_gradient_are_the_layers_own(name, key):
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)
    direct = jax.value_and_grad(lambda p, z: jnp.sin(layer.fn(p, z)).sum(), (0, 1))
    through = jax.value_and_grad(
        lambda p, z: jnp.sin(cbn.run_layer(layer.layer, p, z)[0]).sum(), (0, 1)
    )
    chex.assert_trees_all_equal(jax.jit(through)(params, z), jax.jit(direct)(params, z))


@layers
def test_one_pullback_holds_the_derivatives_of_all_features(name, key):
    """The full Jacobian is zero off the feature's own filter, and equal to it there."""
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)

    def moments(params):
        return cbn.batch_moments(layer.fn(params, z))

    @jax.jit
    def derivatives(params):
        x, source = cbn.run_layer(layer.layer, params, z)
        n = x.size // x.shape[-1]
        deviation = 2 * (x - x.mean(tuple(range(x.ndim - 1)), keepdims=True)) / n
        return source.pullback(deviation, jnp.full((*x.shape[:-1], 1), 1 / n))

    jacobian = jax.jit(jax.jacobian(moments))(params)
    d_var, d_mean = derivatives(params)
    for full, block in ((jacobian.mean, d_mean), (jacobian.var, d_var)):
        for leaf, own in zip(jax.tree.leaves(full), jax.tree.leaves(block), strict=True):
            own = np.repeat(own, leaf.shape[-1] // own.shape[-1], axis=-1)
            for feature in range(layer.features):
                expected = np.zeros_like(own)
                expected[..., feature] = own[..., feature]
                np.testing.assert_allclose(leaf[feature], expected, atol=1e-5)


@layers
@pytest.mark.parametrize("samples", [None, 16])
def test_patches_are_what_the_layer_saw(name, samples, key):
    """x = ⟨P, θ⟩ at every sampled position, and the mean patch is the pulled-back one."""
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)

    @jax.jit
    def compute(params, z):
        x, source = cbn.run_layer(layer.layer, params, z)
        _, sample = moments_and_sample(source, x, samples, jnp.float32(3))
        shared = jnp.full((*x.shape[:-1], 1), layer.features / x.size)
        mine = mean_patch(sample), pull(sample.patches, sample.x)
        return (
            x,
            sample.x,
            product(sample.patches, params),
            mine,
            source.pullback(x, shared),
        )

    x, there, made, (mean, pulled), (each, shared) = compute(params, z)
    np.testing.assert_allclose(made, there, atol=1e-5)
    if samples is None:
        np.testing.assert_array_equal(there, x.reshape(-1, layer.features))
        chex.assert_trees_all_close(mean, shared, atol=1e-5)
        chex.assert_trees_all_close(pulled, each, rtol=1e-4, atol=1e-4)


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.program
def test_both_pullbacks_cost_little_more_than_one_weight_gradient(key):
    layer = cbn.convolution()
    z, kernel = jnp.ones((2, 32, 32, 32)), {"kernel": jnp.ones((3, 3, 32, 32))}

    def pull(kernel, z):
        _, source = cbn.run_layer(layer, kernel, z)
        return source.pullback(z, z[..., :1])

    one = flops(lambda k, z: jax.vjp(lambda k: layer.apply(k, z), k)[1](z), kernel, z)
    assert flops(pull, kernel, z) / one < 1.05


@pytest.mark.program
def test_an_unused_source_costs_nothing(key):
    layer = cbn.convolution()
    z, kernel = jnp.ones((2, 16, 16, 8)), {"kernel": jnp.ones((3, 3, 8, 8))}
    with_source = jax.grad(lambda k, z: cbn.run_layer(layer, k, z)[0].sum())
    without = jax.grad(lambda k, z: layer.apply(k, z).sum())
    assert flops(with_source, kernel, z) == flops(without, kernel, z)


def test_neither_pullback_nor_patches_carry_a_gradient(key):
    layer = LAYERS["conv-strided"]

    def f(params, z):
        x, source = cbn.run_layer(layer.layer, params, z)
        pulled = source.pullback(jnp.ones_like(x), jnp.ones((*x.shape[:-1], 1)))
        patches = source.patches(jnp.zeros((len(x), 1), jnp.int32))
        return sum(leaf.sum() for leaf in jax.tree.leaves((pulled, patches)))

    gradients = jax.jit(jax.grad(f, (0, 1)))(layer.params(key), layer.data(key))
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0.0)


def test_a_grouped_layer_must_say_so(key):
    """Else its derivative would be taken with another group's inputs."""
    layer = LAYERS["conv-grouped"]
    x, source = cbn.run_layer(layer.fn, layer.params(key), layer.data(key))
    for look in (
        lambda: source.pullback(x, x[..., :1]),
        lambda: source.patches(jnp.zeros((len(x), 1), jnp.int32)),
    ):
        with pytest.raises(
            ValueError, match=r"groups=1 .*one feature per group.*groups=\.\.\."
        ):
            look()


def test_an_unbatched_image_has_patches_by_differentiation(key):
    layer = LAYERS["conv-strided"]
    params, z = layer.params(key), layer.data(key)[0]
    x, source = cbn.run_layer(lambda p, z: layer.fn(p, z[None])[0], params, z)
    index = jnp.array([[2], [0], [1]], jnp.int32)
    there = product(source.patches(index), params)
    np.testing.assert_allclose(there, x[jnp.arange(3), index[:, 0]], rtol=1e-5, atol=1e-5)
    spec = layer.layer._replace(apply=lambda p, z: layer.fn(p, z[None])[0])
    x, source = cbn.run_layer(spec, params, z)
    with pytest.raises(ValueError, match=r"shape \(7, 7, 2\), .*inputs\[None\]"):
        source.patches(index)


@pytest.mark.parametrize("name", LAYERS)
def test_a_plain_function_has_the_patches_of_its_layer(name, key):
    """JAX differentiates where no formula is given."""
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)
    plain = layer.layer._replace(patches=None)
    x, source = cbn.run_layer(layer.layer, params, z)
    index = jnp.asarray(
        np.random.default_rng(0).integers(0, x[0, ..., 0].size, (len(x), 3))
    )
    _, same = cbn.run_layer(plain, params, z)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(same.patches)(index),
        source.patches(index),
    )


def test_one_position_that_is_not_finite_stays_out_of_the_others(key):
    layer = LAYERS["conv"]
    params, z = layer.params(key), layer.data(key).at[0, 0, 0, 0].set(jnp.nan)
    _, source = cbn.run_layer(layer.fn, params, z)
    index = jnp.full((len(z), 1), 24, jnp.int32)  # far from it
    patches = source.patches(index)
    assert np.isfinite(patches["kernel"]).all()


def test_a_draw_that_rounds_up_stays_inside(monkeypatch):
    """The largest number below one, times many positions, is all of them in float32."""
    almost = np.float32(1.0) - np.finfo(np.float32).epsneg
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, almost)
    )
    layer = cbn.convolution()
    params, z = jnp.ones((1, 1, 1, 2)), jnp.ones((1, 40, 40, 1))
    x, source = cbn.run_layer(layer, params, z.at[0, -1, -1].set(7.0))
    _, sample = moments_and_sample(source, x, 100, jnp.float32(0))
    np.testing.assert_array_equal(sample.x[-1], [7.0, 7.0])
