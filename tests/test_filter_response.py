import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normalize
from reference import filter_response

import cbn_jax as cbn


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 4, 3)])
def test_equals_the_oracle(shape, key):
    x, estimator = 1.0 + jax.random.normal(key, shape), cbn.filter_response_norm()
    statistics, state = jax.jit(estimator.train)(estimator.init(3), x)
    y = normalize(x, statistics)
    np.testing.assert_allclose(y, filter_response(np.float64(x)), rtol=1e-5)
    np.testing.assert_array_equal(y, normalize(x, jax.jit(estimator.infer)(state, x)))
    np.testing.assert_allclose(
        jnp.square(y).mean(tuple(range(1, x.ndim - 1))), 1, rtol=1e-4
    )


def test_gradients(x64, key):
    """Orthogonal to the output of each feature and example."""
    x, estimator = jax.random.normal(key, (2, 5, 3)), cbn.filter_response_norm()
    state = estimator.init(3)

    @jax.jit
    def loss(x):
        y = cbn.normalize(x, estimator.infer(state, x))
        return (y**3).sum(), y

    gradient, y = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_allclose((gradient * y).sum(1), 0.0, atol=1e-3)
    moved = jnp.zeros_like(x).at[1, 2, 0].set(1e-6)
    slope = (loss(x + moved)[0] - loss(x - moved)[0]) / 2e-6
    np.testing.assert_allclose(gradient[1, 2, 0], slope, rtol=1e-5)


def test_one_position_leaves_the_sign(key):
    x = jax.random.normal(key, (4, 3))
    estimator = cbn.filter_response_norm()
    y = normalize(x, estimator.infer(estimator.init(3), x))
    np.testing.assert_allclose(y, x / np.sqrt(np.square(x) + 1e-6), rtol=1e-5)
