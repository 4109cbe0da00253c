import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LAYERS

import cbn_jax as cbn
from cbn_jax.core import patches as patches_module
from cbn_jax.core.patches import moments_and_sample, product, pull

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
        return source.pullback(deviation), source.mean_patch(None)

    jacobian = jax.jit(jax.jacobian(moments))(params)
    d_var, d_mean = derivatives(params)
    for full, block in ((jacobian.mean, d_mean), (jacobian.var, d_var)):
        for leaf, own in zip(jax.tree.leaves(full), jax.tree.leaves(block), strict=True):
            own = np.repeat(own, leaf.shape[-1] // own.shape[-1], axis=-1)
            for feature in range(layer.features):
                expected = np.zeros_like(own)
                expected[..., feature] = own[..., feature]
                np.testing.assert_allclose(leaf[feature], expected, atol=1e-5)


def all_patches(source, x):
    """Patches of every position, and the positions in the same order."""
    rows = x.reshape(-1, x.shape[-1])
    return source.patches(jnp.arange(len(rows))), rows


@layers
def test_patches_are_what_the_layer_saw(name, key):
    """x = ⟨P, θ⟩ at every position, and the pullback is a sum over them."""
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)

    @jax.jit
    def compute(params, z):
        x, source = cbn.run_layer(layer.layer, params, z)
        patches, rows = all_patches(source, x)
        return rows, product(patches, params), pull(patches, rows), source.pullback(x)

    rows, made, pulled, each = compute(params, z)
    np.testing.assert_allclose(made, rows, atol=1e-5)
    chex.assert_trees_all_close(pulled, each, rtol=1e-4, atol=1e-4)


def further_axes(kernel, z):
    """Flax's convolutions take any number of batch axes."""
    x = cbn.convolution().apply(kernel, z.reshape(-1, *z.shape[2:]))
    return x.reshape(*z.shape[:2], *x.shape[1:])


MORE = {
    "circular": (cbn.convolution(padding="CIRCULAR"), (3, 2, 2, 4), (3, 6, 5, 2)),
    "reflect": (cbn.convolution(2, "REFLECT"), (3, 3, 2, 4), (3, 6, 5, 2)),
    "causal": (cbn.convolution(padding="CAUSAL", dilation=2), (3, 2, 4), (3, 7, 2)),
    "uneven": (cbn.convolution((2, 3), [(2, 0), (1, 3)]), (3, 4, 2, 4), (3, 8, 9, 2)),
    "transposed": (
        cbn.convolution(padding=2, input_dilation=(2, 3)),
        (3, 3, 2, 4),
        (3, 4, 5, 2),
    ),
    "volume": (cbn.convolution(2), (3, 1, 2, 2, 4), (2, 5, 4, 6, 2)),
    "one": (cbn.convolution(2), (1, 1, 3, 4), (2, 5, 4, 3)),
    "further batch axes": (
        cbn.convolution()._replace(apply=further_axes),
        (3, 3, 2, 4),
        (2, 3, 4, 5, 2),
    ),
    "rows": (cbn.dense, (5, 4), (2, 3, 5)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, *MORE])
def test_the_mean_patch_is_the_mean_of_all_patches(name, masked, key):
    if name in MORE:
        layer, kernel, inputs = MORE[name]
        params, z = jnp.ones(kernel), jax.random.normal(key, inputs)
    else:
        layer = LAYERS[name].layer
        params, z = LAYERS[name].params(key), LAYERS[name].data(key)
    shape = (*jax.eval_shape(layer.apply, params, z).shape[:-1], 1)
    mask = jax.random.bernoulli(key, 0.6, shape) if masked else None

    @jax.jit
    def compute(params, z):
        x, source = cbn.run_layer(layer, params, z)
        weight = (
            jnp.ones(x[..., 0].size) if mask is None else mask.reshape(-1).astype(float)
        )
        patches, _ = all_patches(source, x)
        mean = jax.tree.map(
            lambda p: jnp.tensordot(weight / weight.sum(), p, (0, 0)), patches
        )
        _, plain = cbn.run_layer(layer._replace(patches=None), params, z)
        return mean, source.mean_patch(mask), plain.mean_patch(mask)

    mean, ours, pulled = compute(params, z)
    chex.assert_trees_all_close(ours, mean, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(pulled, mean, rtol=1e-5, atol=1e-6)


def test_masked_positions_stay_out_of_the_mean_patch(key):
    layer = LAYERS["conv"]
    params, z = layer.params(key), layer.data(key)
    mask = jnp.ones((*z.shape[:-1], 1), bool).at[0, :2, :2].set(False)

    @jax.jit
    def mean(z):
        _, source = cbn.run_layer(layer.layer, params, z)
        return source.mean_patch(mask)

    # The corner is seen by excluded positions alone.
    chex.assert_trees_all_equal(
        mean(z.at[0, 0, 0].set(jnp.nan)), mean(z.at[0, 0, 0].set(9))
    )


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.program
def test_the_mean_patch_costs_little_beside_the_layer(key):
    layer = cbn.convolution()
    z, kernel = jnp.ones((2, 32, 32, 32)), {"kernel": jnp.ones((3, 3, 32, 32))}

    def mean(kernel, z):
        _, source = cbn.run_layer(layer, kernel, z)
        return source.mean_patch(None)

    assert flops(mean, kernel, z) / flops(layer.apply, kernel, z) < 0.04


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
        pulled, mean = source.pullback(jnp.ones_like(x)), source.mean_patch(None)
        patches = source.patches(jnp.zeros(1, jnp.int32))
        return sum(leaf.sum() for leaf in jax.tree.leaves((pulled, mean, patches)))

    gradients = jax.jit(jax.grad(f, (0, 1)))(layer.params(key), layer.data(key))
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0.0)


def test_a_grouped_layer_must_say_so(key):
    """Else its derivative would be taken with another group's inputs."""
    layer = LAYERS["conv-grouped"]
    _, source = cbn.run_layer(layer.fn, layer.params(key), layer.data(key))
    for look in (
        lambda: source.mean_patch(None),
        lambda: source.patches(jnp.zeros(1, jnp.int32)),
    ):
        with pytest.raises(
            ValueError, match=r"groups=1 .*one feature per group.*groups=\.\.\."
        ):
            look()


def test_an_unbatched_image_has_patches_by_differentiation(key):
    layer = LAYERS["conv-strided"]
    params, z = layer.params(key), layer.data(key)[0]
    x, source = cbn.run_layer(lambda p, z: layer.fn(p, z[None])[0], params, z)
    place = jnp.array([2, 8, 1], jnp.int32)
    there = product(source.patches(place), params)
    expected = x.reshape(-1, x.shape[-1])[place]
    np.testing.assert_allclose(there, expected, rtol=1e-5, atol=1e-5)
    spec = layer.layer._replace(apply=lambda p, z: layer.fn(p, z[None])[0])
    x, source = cbn.run_layer(spec, params, z)
    with pytest.raises(ValueError, match=r"shape \(7, 7, 2\), .*inputs\[None\]"):
        source.patches(place)


@pytest.mark.parametrize("name", LAYERS)
def test_a_plain_function_has_the_patches_of_its_layer(name, key):
    """JAX differentiates where no formula is given."""
    layer = LAYERS[name]
    params, z = layer.params(key), layer.data(key)
    plain = layer.layer._replace(patches=None)
    x, source = cbn.run_layer(layer.layer, params, z)
    place = jnp.asarray(np.random.default_rng(0).integers(0, x[..., 0].size, 6))
    _, same = cbn.run_layer(plain, params, z)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(same.patches)(place),
        source.patches(place),
    )


def test_one_position_that_is_not_finite_stays_out_of_the_others(key):
    layer = LAYERS["conv"]
    params, z = layer.params(key), layer.data(key).at[0, 0, 0, 0].set(jnp.nan)
    _, source = cbn.run_layer(layer.fn, params, z)
    patches = source.patches(jnp.array([24, 30], jnp.int32))  # far from it
    assert np.isfinite(patches["kernel"]).all()


def sampled(layer, params, z, samples, step):
    x, source = cbn.run_layer(layer, params, z)
    _, sample, _ = moments_and_sample(source, x, samples, jnp.float32(step))
    return sample


def test_positions_are_one_in_each_part_and_others_in_every_step():
    """The inputs are their own positions."""
    layer, params = cbn.convolution(), jnp.ones((1, 1, 1, 2))
    z = jnp.broadcast_to(jnp.arange(100.0).reshape(10, 10, 1), (2, 10, 10, 1))
    look = jax.jit(lambda step: sampled(layer, params, z, 8, step).patches.reshape(2, 4))
    steps = np.stack([look(step) for step in range(200)])
    np.testing.assert_array_equal(steps // 25, np.broadcast_to(np.arange(4), steps.shape))
    counts = np.bincount(steps.astype(int).ravel(), minlength=100)
    assert 12 <= counts.min() <= counts.max() <= 20  # 16 each, as evenly as can be
    assert (steps[:, 0] != steps[:, 1]).any(axis=1).all()


def test_few_of_many_examples_are_looked_at_in_turn():
    z = jnp.arange(20.0)[:, None]
    look = jax.jit(lambda step: sampled(cbn.dense, jnp.ones((1, 2)), z, 8, step))
    seen = np.stack([look(step).patches.reshape(-1) for step in range(100)])
    assert seen.shape == (100, 8)
    assert all(len(set(row)) == 8 for row in seen)
    counts = np.bincount(seen.astype(int).ravel(), minlength=20)
    assert 35 <= counts.min() <= counts.max() <= 45
    np.testing.assert_allclose(look(0).weight, 1 / 8)


def test_a_position_that_rounds_up_stays_inside(monkeypatch):
    """The largest number below one, times many positions, is all of them in float32."""
    almost = np.float32(1.0) - np.finfo(np.float32).epsneg
    monkeypatch.setattr(
        patches_module,
        "_sequence",
        lambda step, example, part: jnp.full(part.shape, almost),
    )
    layer = cbn.convolution()
    params, z = jnp.ones((1, 1, 1, 2)), jnp.ones((1, 40, 40, 1))
    sample = sampled(layer, params, z.at[0, -1, -1].set(7.0), 100, 0)
    np.testing.assert_array_equal(sample.patches[-1], [[[[7.0]]]])
