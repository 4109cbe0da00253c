import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn

import cbn_jax as cbn

SHAPES = [(2, 4), (16, 4), (2, 5, 5, 4), (3, 7, 4)]


def flax_norm(**options):
    return nn.BatchNorm(use_fast_variance=False, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_equals_flax(shape, shift, key):
    """Outputs and gradients, to float32 rounding."""
    x = shift + 2.0 * jax.random.normal(key, shape)
    weight = jax.random.normal(jax.random.fold_in(key, 1), shape)
    params = {"scale": jnp.linspace(0.5, 2.0, 4), "bias": jnp.linspace(-1.0, 1.0, 4)}
    module, estimator = flax_norm(), cbn.batch_norm()
    variables = {"batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}

    def theirs(x, params):
        y, _ = module.apply(
            {"params": params, **variables},
            x,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        return (weight * y).sum(), y

    def ours(x, params):
        statistics, _ = estimator.train(estimator.init(4), x)
        y = cbn.normalize(x, statistics, params["scale"], params["bias"])
        return (weight * y).sum(), y

    (_, expected), gradient = jax.value_and_grad(theirs, (0, 1), has_aux=True)(x, params)
    (_, y), (dx, dparams) = jax.value_and_grad(ours, (0, 1), has_aux=True)(x, params)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if shift else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(y, expected, **tolerance)
    np.testing.assert_allclose(dx, gradient[0], **tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), dparams, gradient[1]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(shape, key):
    x = 3.0 + jax.random.normal(key, shape)
    scale, bias = jnp.linspace(0.5, 2.0, 4), jnp.linspace(-1.0, 1.0, 4)
    estimator = cbn.batch_norm()
    statistics, _ = estimator.train(estimator.init(4), x)
    y = cbn.normalize(x, statistics, scale, bias)
    expected = reference.batch_norm(x, np.float64(scale), np.float64(bias))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_running_moments_are_flaxs_without_its_bias(key):
    """Flax starts at (0, 1) and keeps 0.9ᵐ of that after m steps."""
    module, estimator = flax_norm(momentum=0.9), cbn.batch_norm(momentum=0.9)
    x = jax.random.normal(key, (16, 4))
    variables, state = module.init(key, x, use_running_average=True), estimator.init(4)
    for m in range(1, 8):
        x = m + jax.random.normal(jax.random.fold_in(key, m), (16, 4))
        _, updates = module.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )
        variables = {**variables, **updates}
        _, state = estimator.train(state, x)
        theirs, start = variables["batch_stats"], 0.9**m
        np.testing.assert_allclose(theirs["mean"], (1 - start) * state.mean, rtol=1e-5)
        np.testing.assert_allclose(
            theirs["var"], start + (1 - start) * state.var, rtol=1e-5
        )


def bytes_moved(loss, *args):
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
    return compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("shape", [(2, 32, 32, 64), (8, 16, 16, 256)])
def test_moves_no_more_bytes_than_flax(shape):
    """Than Flax's default, the inaccurate one-pass form, by XLA's count."""
    x, affine = jnp.ones(shape), (jnp.ones(shape[-1]), jnp.ones(shape[-1]))
    module, estimator = nn.BatchNorm(use_running_average=False), cbn.batch_norm()
    stats = {"mean": jnp.zeros(shape[-1]), "var": jnp.ones(shape[-1])}

    def theirs(x, affine):
        params = {"scale": affine[0], "bias": affine[1]}
        variables = {"params": params, "batch_stats": stats}
        return jnp.sin(module.apply(variables, x, mutable=["batch_stats"])[0]).sum()

    def ours(x, affine):
        statistics, _ = estimator.train(estimator.init(shape[-1]), x)
        return jnp.sin(cbn.normalize(x, statistics, *affine)).sum()

    assert bytes_moved(ours, x, affine) <= 1.01 * bytes_moved(theirs, x, affine)


def test_one_value_per_feature_is_an_error():
    estimator = cbn.batch_norm()
    state = estimator.init(4)
    with pytest.raises(ValueError, match=r"one value per feature .*at least two; use"):
        estimator.train(state, jnp.ones((1, 4)))
    estimator.infer(state, jnp.ones((1, 4)))
    estimator.train(state, jnp.ones((1, 2, 4)))
