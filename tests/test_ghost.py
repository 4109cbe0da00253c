import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normalize
from reference import batch_norm

import cbn_jax as cbn

SHAPE = (6, 4, 3)


def data(key):
    return 1.0 + 2.0 * jax.random.normal(key, SHAPE)


def test_parts_are_batches_of_their_own(key):
    x, estimator = data(key), cbn.ghost_batch_norm(2)
    statistics, state = jax.jit(estimator.train)(estimator.init(3), x)
    parts = np.float64(x).reshape(3, 2, 4, 3)
    expected = np.concatenate([batch_norm(part) for part in parts])
    np.testing.assert_allclose(normalize(x, statistics), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.mean, parts.mean((1, 2)).mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.var, parts.var((1, 2)).mean(0), rtol=1e-5)


def test_one_part_is_batch_norm(key):
    x, estimator = data(key), cbn.ghost_batch_norm(6)
    statistics, state = jax.jit(estimator.train)(estimator.init(3), x)
    np.testing.assert_allclose(
        normalize(x, statistics), batch_norm(x), rtol=1e-4, atol=1e-5
    )
    _, expected = jax.jit(cbn.batch_norm().train)(cbn.batch_norm().init(3), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected)


def test_a_part_without_values_keeps_out(key):
    x, estimator = data(key), cbn.ghost_batch_norm(2)
    mask = jnp.ones((6, 4, 1), bool).at[2:4].set(False)
    statistics, state = jax.jit(estimator.train)(estimator.init(3), x, mask=mask)
    np.testing.assert_array_equal(statistics.mean[2:4], 0.0)
    rest = np.float64(x)[[0, 1, 4, 5]].reshape(2, 2, 4, 3)
    np.testing.assert_allclose(state.mean, rest.mean((1, 2)).mean(0), rtol=1e-5)


def test_parts_fit_the_batch(key):
    estimator = cbn.ghost_batch_norm(4)
    with pytest.raises(ValueError, match="examples=4, expected a multiple of 4 examples"):
        estimator.train(estimator.init(3), data(key))
    with pytest.raises(ValueError, match="one value per feature"):
        cbn.ghost_batch_norm(1).train(estimator.init(3), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="examples is 0"):
        cbn.ghost_batch_norm(0)
