import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbn_jax as cbn

C = 3
STATE = cbn.from_batch_stats(jnp.array([0.0, 1.0, -2.0]), jnp.array([1.0, 4.0, 0.5]))


def batch():
    return 2.0 + np.random.default_rng(0).normal(size=(4, 6, C)).astype(np.float32)


@pytest.mark.parametrize("examples", [0, 4, 100.0])
def test_equals_the_formula(examples):
    estimator, x = cbn.mixed_inference(cbn.batch_norm(), examples), batch()
    w = 4 / (4 + examples)
    mean = (1 - w) * np.float64(STATE.mean) + w * np.float64(x).mean((0, 1))
    var = (1 - w) * np.float64(STATE.var) + w * np.float64(x).var((0, 1))
    statistics = jax.jit(estimator.infer)(STATE, x)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(statistics.inv_std, (var + 1e-5) ** -0.5, rtol=1e-5)


def test_training_is_the_estimators():
    estimator, x = cbn.mixed_inference(cbn.batch_norm()), batch()
    got, expected = estimator.train(STATE, x), cbn.batch_norm().train(STATE, x)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_without_examples_it_is_plain_inference():
    statistics = cbn.mixed_inference(cbn.batch_norm()).infer(STATE, jnp.ones((0, C)))
    np.testing.assert_allclose(statistics.mean, STATE.mean)
    np.testing.assert_allclose(statistics.inv_std, (STATE.var + 1e-5) ** -0.5, rtol=1e-6)


def test_arguments():
    with pytest.raises(ValueError, match="examples is -1, expected a number of examples"):
        cbn.mixed_inference(cbn.batch_norm(), -1)
    with pytest.raises(ValueError, match="statistics per example"):
        cbn.mixed_inference(cbn.group_norm())


def test_epsilon_counts_once():
    x = 1e-3 * batch()
    statistics = cbn.mixed_inference(cbn.batch_norm(), 0).infer(STATE, x)
    expected = (np.float64(x).var((0, 1)) + 1e-5) ** -0.5
    np.testing.assert_allclose(statistics.inv_std, expected, rtol=1e-4)
