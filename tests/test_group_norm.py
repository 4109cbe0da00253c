import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import infer, normalize
from flax import linen as nn

import cbn_jax as cbn

C = 6
shapes = pytest.mark.parametrize("shape", [(4, C), (3, 5, C), (3, 4, 2, C)])
groups = pytest.mark.parametrize("num_groups", [1, 2, 3])


def oracle(x, num_groups, epsilon=1e-5):
    """Wu & He, equations 1 to 3 and 7, in float64."""
    split = np.float64(x).reshape(len(x), -1, num_groups, x.shape[-1] // num_groups)
    mean = split.mean((1, 3), keepdims=True)
    var = np.mean((split - mean) ** 2, (1, 3), keepdims=True)
    return ((split - mean) / np.sqrt(var + epsilon)).reshape(x.shape)


def normalized(x, num_groups):
    estimator = cbn.group_norm(num_groups)
    return normalize(x, infer(estimator, estimator.init(x.shape[-1]), x))


@shapes
@groups
def test_equals_the_oracle_and_flax(shape, num_groups, key):
    x = 2.0 + 3.0 * jax.random.normal(key, shape)
    y = normalized(x, num_groups)
    np.testing.assert_allclose(y, oracle(x, num_groups), rtol=1e-4, atol=1e-5)
    module = nn.GroupNorm(num_groups, epsilon=1e-5, use_bias=False, use_scale=False)
    np.testing.assert_allclose(y, module.apply({}, x), rtol=1e-3, atol=1e-4)


def test_training_is_inference_and_examples_do_not_meet(key):
    x = jax.random.normal(key, (4, 5, C))
    estimator = cbn.group_norm(2)
    state = estimator.init(C)
    statistics, after = jax.jit(estimator.train)(state, x)
    y = normalize(x, statistics)
    np.testing.assert_array_equal(y, normalized(x, 2))
    np.testing.assert_allclose(y[:1], normalized(x[:1], 2), rtol=1e-6)
    np.testing.assert_array_equal(after.steps, 1.0)


def test_as_many_groups_as_features_are_instance_norm(key):
    x = jax.random.normal(key, (3, 7, C))
    y = np.float64(normalized(x, C))
    np.testing.assert_allclose(y.mean(1), 0.0, atol=1e-6)
    np.testing.assert_allclose(y.std(1), 1.0, rtol=1e-4)


def test_large_means_do_not_cancel(key):
    x = jax.random.normal(key, (4, 8, C)) + 1e4
    np.testing.assert_allclose(normalized(x, 2), oracle(x, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [0, -1, 2.0])
def test_groups_are_counted(bad):
    with pytest.raises(ValueError, match=r"num_groups is .*int of at least 1"):
        cbn.group_norm(bad)


def test_groups_divide_the_features():
    with pytest.raises(ValueError, match=r"got 6 features and num_groups=4"):
        cbn.group_norm(4).init(C)
    with pytest.raises(ValueError, match="groups of one value"):
        cbn.group_norm(C).infer(cbn.group_norm(C).init(C), jnp.ones((2, C)))
