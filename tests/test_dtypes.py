"""The table of ``docs/how_to/dtypes.md``, row by row."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FACTORIES, KINDS, LAYERS, init, train
from flax import linen as nn
from flax import nnx

import cbn_jax as cbn
import cbn_jax.nnx
from cbn_jax.linen import Norm

HALVES = [jnp.float16, jnp.bfloat16]
estimators = pytest.mark.parametrize("name", KINDS)
LAYER = LAYERS["dense"]


def data(dtype=np.float64):
    return np.random.default_rng(0).normal(3.0, 2.0, (16, 4)).astype(dtype)


def exact(x):
    x = np.float64(x)
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def normalized(x, **options):
    norm = Norm(cbn.batch_norm(), use_running_average=False, **options)
    variables = norm.init(jax.random.key(0), x)
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    return y, updates["batch_stats"]


@pytest.mark.parametrize("dtype", [*HALVES, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.float16, jnp.float32])
def test_the_result_has_the_dtype_of_the_activations(dtype, param_dtype):
    x = data().astype(dtype)
    y, state = normalized(jnp.asarray(x), param_dtype=param_dtype)
    assert y.dtype == dtype
    assert {leaf.dtype for leaf in state.values()} == {jnp.dtype(jnp.float32)}
    half_an_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(y), exact(x), rtol=1.1 * half_an_ulp, atol=1e-6)


@pytest.mark.parametrize("dtype", [*HALVES, jnp.float32])
def test_a_result_is_rounded_once_to_the_dtype_asked_for(dtype):
    x = data().astype(jnp.bfloat16)
    y, _ = normalized(jnp.asarray(x), dtype=dtype)
    assert y.dtype == dtype
    half_an_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(y), exact(x), rtol=1.1 * half_an_ulp, atol=1e-6)
    norm = cbn_jax.nnx.Norm(cbn.batch_norm(), num_features=4, dtype=dtype, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(jnp.asarray(x)), y)


def test_float64_is_computed_in_float64(x64):
    x = data() + 1e6
    y, state = normalized(x)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, exact(x), rtol=1e-7, atol=1e-9)
    assert {leaf.dtype for leaf in state.values()} == {jnp.dtype(jnp.float32)}
    statistics = cbn.Statistics(np.float32([1e6] * 4), np.float32([0.3] * 4))
    x = np.float32(x)
    y = cbn.normalize(x, statistics, dtype=jnp.float64)
    assert y.dtype == jnp.float64
    expected = (np.float64(x) - 1e6) * np.float64(np.float32(0.3))
    np.testing.assert_allclose(y, expected, rtol=1e-14)


@estimators
def test_arrays_of_numpy_pass_without_a_warning(name):
    """NumPy's default is float64, which JAX has only on request."""
    estimator, x = FACTORIES[name](), data()
    kernel = np.random.default_rng(1).normal(size=(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = estimator.init(4, cbn.dense, kernel)
        x, source = cbn.run_layer(cbn.dense, kernel, jnp.asarray(x))
        mask = np.ones((16, 1), bool)
        statistics, state = estimator.train(state, np.asarray(x), source, mask=mask)
        y = cbn.normalize(data(), statistics, np.ones(4), np.zeros(4))
        predicted = cbn.normalize(data(), estimator.infer(state, data()))
    assert y.dtype == predicted.dtype == jnp.float32


def test_modules_take_arrays_of_numpy_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = normalized(data())
        norm = Norm(cbn.small_batch_norm(2), nn.Dense(3))
        variables = norm.init(jax.random.key(0), data(), True)
        norm.apply(variables, data(), False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, exact(data()), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "write"),
    [
        (np.int32, r"x\.astype\(jnp\.float32\)"),
        (bool, r"x\.astype\(jnp\.float32\)"),
        (np.complex64, r"jnp\.concatenate\(\[x\.real, x\.imag\], axis=-1\)"),
    ],
)
@estimators
def test_what_is_not_floating_is_refused(name, dtype, write):
    estimator, x = FACTORIES[name](), np.ones((8, 4), dtype)
    state = estimator.init(4, cbn.dense, jnp.eye(4))
    _, source = cbn.run_layer(cbn.dense, jnp.eye(4), jnp.ones((8, 4)))
    for call in (
        lambda: estimator.train(state, x, source),
        lambda: estimator.infer(state, x),
        lambda: cbn.normalize(x, cbn.Statistics(jnp.zeros(4), jnp.ones(4))),
    ):
        with pytest.raises(TypeError, match=f"got x of dtype .*expected floating.*{write}"):
            call()


def test_float64_that_jax_has_not_is_float32():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = normalized(jnp.asarray(data(np.float32)), dtype=np.float64)
    assert y.dtype == jnp.float32


def test_a_dtype_of_whole_numbers_is_refused():
    with pytest.raises(TypeError, match=r"normalize got dtype=int32, .*write dtype="):
        normalized(jnp.asarray(data(np.float32)), dtype=jnp.int32)


@pytest.mark.parametrize("dtype", HALVES)
@estimators
def test_a_state_cast_to_half_precision_is_read_as_float32(name, dtype, key):
    """And written as float32: averages would stand still."""
    estimator, params, z = FACTORIES[name](), LAYER.params(key), LAYER.data(key)
    _, _, state = train(estimator, init(estimator, LAYER, params), LAYER, params, z)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    x, statistics, after = train(estimator, half, LAYER, params, z)
    expected = train(estimator, wide, LAYER, params, z)[1:]
    # Two programs may round the last digit differently.
    chex.assert_trees_all_close((statistics, after), expected, rtol=1e-6, atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(
        np.testing.assert_array_equal,
        estimator.infer(half, x.astype(dtype)),
        estimator.infer(wide, x.astype(dtype)),
    )


@pytest.mark.parametrize("mask", [np.int32, np.float32, bool])
def test_a_mask_of_numbers_counts_where_it_is_not_zero(mask):
    x, counts = data(np.float32), np.arange(16)[:, None] % 3 > 0
    moments = cbn.batch_moments(x, mask=counts.astype(mask))
    np.testing.assert_allclose(moments.mean, x[counts[:, 0]].mean(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [4, 256])
def test_no_derivative_of_half_precision_underflows(dtype, size, key):
    """For a large image 1/N is no number of float16, and neither is a sum without it."""
    layer = cbn.convolution()
    kernel = 0.3 * jax.random.normal(key, (1, 1, 3, 4))
    z = 1.0 + jax.random.normal(key, (1, size, size, 3))
    z, kernel = z.astype(dtype), kernel.astype(dtype)
    estimator = cbn.cross_iteration_batch_norm(2)
    state = estimator.init(4, layer, kernel)
    x, source = cbn.run_layer(layer, kernel, z)
    _, state = jax.jit(lambda state: estimator.train(state, x, source))(state)
    patches = np.float64(z).reshape(-1, 3)
    deviation = np.float64(x).reshape(-1, 4) - np.float64(x).mean((0, 1, 2))
    d_var = 2 * patches.T @ deviation / len(patches)
    tolerance = {"rtol": 0.03, "atol": 0.03}
    np.testing.assert_allclose(
        state.history.d_mean[0, 0, 0, :, 0], patches.mean(0), **tolerance
    )
    np.testing.assert_allclose(state.history.d_var[0, 0, 0], d_var, **tolerance)
