import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbn_jax as cbn
from cbn_jax.linen import Norm

C = 3


def batches(count):
    return 1.0 + np.random.default_rng(0).normal(size=(count, 4, 5, C)).astype(np.float32)


@pytest.mark.parametrize(
    "inside", [cbn.batch_norm(), cbn.ghost_batch_norm(2)], ids=["batch", "ghost"]
)
def test_the_method_until_then_and_inference_after(inside):
    estimator = cbn.frozen(inside, after=2)
    train, state, plain = jax.jit(estimator.train), estimator.init(C), inside.init(C)
    for x in batches(2):
        statistics, state = train(state, x)
        expected, plain = jax.jit(inside.train)(plain, x)
        chex.assert_trees_all_close(statistics, expected, rtol=1e-5)
    for x in batches(4)[2:]:
        statistics, after = train(state, x)
        fixed = inside.infer(plain, x)
        np.testing.assert_allclose(statistics.mean.reshape(-1, C)[0], fixed.mean, 1e-5)
        jax.tree.map(np.testing.assert_array_equal, after, state)
    np.testing.assert_array_equal(state.trained, 2.0)


def test_no_gradient_flows_through_frozen_statistics():
    estimator = cbn.frozen(cbn.batch_norm(), after=0)
    (x,) = batches(1)
    state = estimator.init(C)._replace(state=cbn.from_batch_stats(jnp.ones(C), jnp.ones(C)))

    def total(x):
        statistics, _ = estimator.train(state, x)
        return cbn.normalize(x, statistics).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), 1.0, rtol=1e-4)


def test_one_value_is_enough_for_inference():
    """Fine-tuning a dense layer at batch size 1."""
    estimator = cbn.frozen(cbn.batch_norm(), after=0)
    statistics, _ = estimator.train(estimator.init(C), jnp.ones((1, C)))
    np.testing.assert_array_equal(statistics.mean, 0.0)


def test_two_fields_of_one_name_are_refused():
    """Where a module stores them; as functions they are two counts."""
    inside = cbn.frozen(cbn.batch_norm(), after=1)
    twice = cbn.frozen(inside, after=2)
    (x,) = batches(1)
    _, state = twice.train(twice.init(C), x)
    np.testing.assert_array_equal(state.state.trained, 1.0)
    with pytest.raises(
        ValueError, match="FrozenState got a field trained, which the inner"
    ):
        Norm(twice, use_running_average=False).init(jax.random.key(0), x)


def test_arguments():
    with pytest.raises(ValueError, match="after is -1, expected an int of at least 0"):
        cbn.frozen(cbn.batch_norm(), after=-1)


def test_a_fit_around_it_stops_with_it(key):
    """What the wrapper counts tells whether the averages took a batch in."""
    estimator = cbn.fitted_inference(cbn.frozen(cbn.batch_norm(), after=2))
    state = estimator.init(4)
    step = jax.jit(lambda state, x: estimator.train(state, x)[1])
    for i in range(4):
        x = jax.random.normal(jax.random.fold_in(key, i), (6, 3, 4))
        state = step(state, x)
    np.testing.assert_array_equal(state.batches, 2.0)
