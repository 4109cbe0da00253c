import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import cbn_jax as cbn
from cbn_jax.core.patches import product

CONVOLUTIONS = {
    "1d": ((3,), {}),
    "1d-valid": ((3,), {"strides": 2, "padding": "VALID"}),
    "1d-dilated": ((4,), {"padding": 2, "dilation": 2}),
    "1d-grouped": ((3,), {"strides": (2,), "groups": 2}),
    "2d": ((3, 3), {}),
    "2d-pointwise": ((1, 1), {"strides": 2}),
    "2d-strided": ((3, 2), {"strides": (2, 1)}),
    "2d-same_on_one_side": ((2, 4), {"strides": (3, 2), "padding": "SAME"}),
    "2d-number": ((3, 3), {"padding": 1, "strides": 2}),
    "2d-numbers": ((3, 3), {"padding": (2, 0)}),
    "2d-pairs": ((2, 3), {"padding": ((1, 0), (0, 2)), "strides": (1, 2)}),
    "2d-wide_padding": ((2, 2), {"padding": 4}),
    "2d-dilated": ((3, 3), {"dilation": (1, 2), "strides": 2}),
    "2d-grouped": ((3, 3), {"padding": "VALID", "groups": 4}),
    "3d": ((2, 3, 2), {"strides": (1, 2, 1)}),
    "3d-pairs": ((2, 1, 3), {"padding": ((0, 1), (1, 1), (2, 0)), "dilation": (1, 1, 2)}),
    "3d-grouped": ((3, 3, 3), {"padding": "VALID", "groups": 2}),
}

convolutions = pytest.mark.parametrize("name", CONVOLUTIONS)


class Run(NamedTuple):
    params: dict
    x: jax.Array
    expected: jax.Array  # by Flax
    patches: dict  # at all positions, in some order
    there: jax.Array  # x in that order


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def run(layer, module, params, z):
    """A layer and its patches beside the Flax module's output."""

    @jax.jit
    def compute(params, z):
        x, source = cbn.run_layer(layer, params, z)
        rows = x.reshape(-1, x.shape[-1])
        place = jnp.asarray(np.random.default_rng(0).permutation(len(rows)))
        expected = module.apply({"params": params}, z)
        return Run(params, x, expected, source.patches(place), rows[place])

    return compute(params, z)


@functools.cache
def convolve(name):
    size, options = CONVOLUTIONS[name]
    groups = options.get("groups", 1)
    module = nn.Conv(
        features=8,
        kernel_size=size,
        strides=options.get("strides", 1),
        padding=options.get("padding", "SAME"),
        kernel_dilation=options.get("dilation", 1),
        feature_group_count=groups,
    )
    params = {"kernel": normal(*size, 4 // groups, 8), "bias": normal(8)}
    z = normal(2, *(7, 6, 5)[: len(size)], 4)
    return run(cbn.convolution(**options), module, params, z)


@convolutions
def test_convolution_is_that_of_flax(name):
    made = convolve(name)
    np.testing.assert_allclose(made.x, made.expected, rtol=1e-5, atol=1e-5)


@convolutions
def test_patches_of_a_convolution_make_its_output(name):
    """x = ⟨P, θ⟩ at all positions, in any order."""
    params, _, _, patches, there = convolve(name)
    groups = CONVOLUTIONS[name][1].get("groups", 1)
    shape = (len(there), *params["kernel"].shape[:-1], groups)
    assert patches["kernel"].shape == shape
    np.testing.assert_array_equal(patches["bias"], np.ones((len(there), groups)))
    np.testing.assert_allclose(product(patches, params), there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["2d-strided", "2d-grouped"])
def test_patches_are_the_derivative(name):
    """∂x/∂θ of every feature is the patch, for its own filter."""
    size, options = CONVOLUTIONS[name]
    layer = cbn.convolution(**options)
    kernel = jnp.asarray(normal(*size, 4 // layer.groups, 8))
    z = jnp.asarray(normal(2, 7, 6, 4))
    source = cbn.run_layer(layer, kernel, z)[1]
    place = jnp.array([3, 12], jnp.int32)
    jacobian = jax.jit(jax.jacobian(lambda k: layer.apply(k, z).reshape(-1, 8)))(kernel)
    for row, patch in zip(place, source.patches(place), strict=True):
        for feature in range(8):
            own = jacobian[row, feature][..., feature]
            group = feature * layer.groups // 8
            np.testing.assert_array_equal(patch[..., group], own)


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_is_that_of_flax(shape, bias):
    """With extra axes, as for tokens, every row is a position."""
    params = {"kernel": normal(5, 3)} | ({"bias": normal(3)} if bias else {})
    made = run(cbn.dense, nn.Dense(3, use_bias=bias), params, normal(*shape))
    np.testing.assert_allclose(made.x, made.expected, rtol=1e-5, atol=1e-6)
    rows = math.prod(shape[:-1])
    assert made.patches["kernel"].shape == (rows, 5, 1)
    assert set(made.patches) == set(made.params)
    if bias:
        np.testing.assert_array_equal(made.patches["bias"], np.ones((rows, 1)))
    there = product(made.patches, made.params)
    np.testing.assert_allclose(there, made.there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "size", "shape"),
    [(cbn.dense, (5, 3), (4, 5)), (cbn.convolution(), (3, 3, 5, 3), (2, 4, 4, 5))],
)
def test_parameters_may_be_the_kernel_alone(layer, size, shape):
    kernel, z = jnp.asarray(normal(*size)), jnp.asarray(normal(*shape))
    x, source = cbn.run_layer(layer, kernel, z)
    same, with_name = cbn.run_layer(layer, {"kernel": kernel}, z)
    np.testing.assert_array_equal(x, same)
    place = jnp.array([1, 0], jnp.int32)
    patches = source.patches(place)
    np.testing.assert_array_equal(patches, with_name.patches(place)["kernel"])
    there = x.reshape(-1, 3)[place]
    np.testing.assert_allclose(product(patches, kernel), there, rtol=1e-4, atol=1e-5)
