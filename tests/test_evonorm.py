"""EvoNorm as functions and modules, and the thresholded linear unit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from reference import evonorm_b0, evonorm_s0

import cbn_jax as cbn
import cbn_jax.linen
import cbn_jax.nnx

SHAPE = (3, 4, 5, 6)


def data(key, dtype=jnp.float32):
    return 0.5 + 2.0 * jax.random.normal(key, SHAPE, dtype)


def s0(x, v):
    norm = cbn.group_norm(2)
    return cbn.evonorm_s0(x, norm.infer(norm.init(6), x), v)


def b0(x, v):
    norm = cbn.batch_norm(epsilon=1e-3)
    return cbn.evonorm_b0(x, norm.train(norm.init(6), x)[0], v)


@pytest.mark.parametrize(
    ("ours", "oracle"),
    [(s0, lambda x, v: evonorm_s0(x, v, 2)), (b0, evonorm_b0)],
    ids=["s0", "b0"],
)
def test_equals_the_oracle_and_its_derivatives(ours, oracle, key, x64):
    x, v = data(key, jnp.float64), jnp.linspace(-1.0, 2.0, 6)
    y = jax.jit(ours)(x, v)
    np.testing.assert_allclose(y, oracle(np.float64(x), np.float64(v)), rtol=1e-10)
    check_grads(jax.jit(ours), (x, v), 1, ["rev"], rtol=1e-5, atol=1e-7)


def test_scale_and_bias_come_last(key):
    x, v = data(key), jnp.ones(6)
    norm = cbn.batch_norm(epsilon=1e-3)
    statistics, _ = norm.train(norm.init(6), x)
    for function in (cbn.evonorm_s0, cbn.evonorm_b0):
        plain = function(x, statistics, v)
        full = function(x, statistics, v, jnp.full(6, 2.0), jnp.full(6, 3.0))
        np.testing.assert_allclose(full, 2.0 * plain + 3.0, rtol=1e-6)


def test_half_precision_is_rounded_once(key):
    x, v = data(key).astype(jnp.bfloat16), jnp.ones(6)
    y = jax.jit(s0)(x, v)
    assert y.dtype == jnp.bfloat16
    expected = evonorm_s0(np.float64(x), np.ones(6), 2)
    np.testing.assert_allclose(np.float64(y), expected, rtol=8e-3)


@pytest.mark.parametrize("name", ["EvoNormS0", "EvoNormB0"])
def test_modules_equal_the_functions(name, key):
    x = data(key)
    estimator = cbn.group_norm(2) if name == "EvoNormS0" else cbn.batch_norm(epsilon=1e-3)
    expected = s0(x, jnp.ones(6)) if name == "EvoNormS0" else b0(x, jnp.ones(6))
    linen = getattr(cbn_jax.linen, name)(estimator, use_running_average=False)
    variables = jax.jit(linen.init)(key, x)
    y, updates = linen.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert sorted(variables["params"]) == ["bias", "scale", "v"]
    module = getattr(cbn_jax.nnx, name)(estimator, num_features=6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-6)
    # Inference, by what training left.
    of_use = getattr(cbn_jax.linen, name)(estimator, use_running_average=True)
    later = of_use.apply({**variables, **updates}, x)
    np.testing.assert_allclose(module(x, True), later, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(later, expected, rtol=1e-4, atol=1e-5)
    half = of_use.clone(dtype=jnp.bfloat16)
    assert half.apply({**variables, **updates}, x).dtype == jnp.bfloat16


def test_the_deviation_of_a_batch_may_be_that_of_a_window(key):
    """B0 with the statistics of the recommended method."""
    norm = cbn_jax.linen.EvoNormB0(
        cbn.small_batch_norm(2), nn.Conv(4, (3, 3)), use_running_average=False
    )
    x = data(key)[:2]
    variables = jax.jit(norm.init)(key, x)
    y, _ = norm.apply(variables, x, mutable=["batch_stats"])
    assert np.isfinite(y).all()


def test_thresholds_are_learned(key):
    x, threshold = data(key), jnp.linspace(-1.0, 1.0, 6)
    expected = np.maximum(x, np.asarray(threshold))
    y = cbn_jax.linen.TLU().apply({"params": {"threshold": threshold}}, x)
    np.testing.assert_array_equal(y, expected)
    module = cbn_jax.nnx.TLU(6, rngs=nnx.Rngs(0))
    module.threshold.set_value(threshold)
    np.testing.assert_array_equal(module(x), expected)


def test_wrong_input():
    norm = cbn.group_norm(2)
    statistics = norm.infer(norm.init(6), jnp.ones(SHAPE))
    with pytest.raises(TypeError, match="evonorm_s0 got x of dtype int32"):
        cbn.evonorm_s0(jnp.ones(SHAPE, jnp.int32), statistics, jnp.ones(6))
    with pytest.raises(ValueError, match="evonorm_b0 got a mask of shape"):
        cbn.evonorm_b0(jnp.ones(SHAPE), statistics, jnp.ones(6), mask=jnp.ones(3, bool))
