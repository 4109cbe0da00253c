import jax
import numpy as np
import pytest
from cases import normalize
from reference import Momentum, batch_norm, momentum_decay

import cbn_jax as cbn

C = 3


def batches(count):
    rng = np.random.default_rng(0)
    return rng.normal(1.0, 2.0, (count, 2, 5, C)).astype(np.float32)


def outputs(estimator, xs):
    train, state, ys = jax.jit(estimator.train), estimator.init(C), []
    for x in xs:
        statistics, state = train(state, x)
        ys.append(normalize(x, statistics))
    return ys, state


def test_equals_the_oracle_with_the_published_decay():
    ys, state = outputs(
        cbn.momentum_batch_norm(cbn.matched_noise(batch_size=2, steps=8)), batches(10)
    )
    oracle = Momentum(lambda t: momentum_decay(t, 2, 8))
    for x, y in zip(batches(10), ys, strict=True):
        np.testing.assert_allclose(y, oracle.step(np.float64(x)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.past_var, oracle.var, rtol=1e-5)
    assert momentum_decay(8, 2, 8) == pytest.approx(1 - 2 / 32)


def test_without_decay_it_is_batch_norm():
    ys, _ = outputs(cbn.momentum_batch_norm(0.0), batches(3))
    for x, y in zip(batches(3), ys, strict=True):
        np.testing.assert_allclose(y, batch_norm(x), rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_current_share(x64):
    """Equal to finite differences, with the past as a constant."""
    estimator = cbn.momentum_batch_norm(0.5)
    first, x = np.float64(batches(2))
    _, state = estimator.train(estimator.init(C), first)

    @jax.jit
    def loss(x):
        statistics, _ = estimator.train(state, x)
        return (cbn.normalize(x, statistics) ** 3).sum()

    gradient = jax.grad(loss)(x)
    for at in np.ndindex(2, 2, C):
        moved = np.zeros_like(x)
        moved[at] = 1e-6
        slope = (loss(x + moved) - loss(x - moved)) / 2e-6
        np.testing.assert_allclose(gradient[at], slope, rtol=1e-5)


def test_arguments():
    with pytest.raises(ValueError, match=r"decay is 1.0, expected a decay in \[0, 1\)"):
        cbn.momentum_batch_norm(1.0)
    with pytest.raises(TypeError, match=r"write decay=cumulative\(...\)"):
        cbn.momentum_batch_norm(cbn.cumulative)
    with pytest.raises(ValueError, match="steps is 1, expected an int of at least 2"):
        cbn.matched_noise(2, 1)


def test_a_decay_for_examples():
    """The same examples, whatever the batch size."""
    per_example = cbn.rescale_decay(0.99, batch_size=1, like=32)
    assert per_example**32 == pytest.approx(0.99)
    assert cbn.rescale_decay(0.9, 8, like=8) == 0.9
    with pytest.raises(ValueError, match=r"decay is 1.5"):
        cbn.rescale_decay(1.5, 2)


def test_the_first_batch_is_taken_over_exactly():
    """Whatever the schedule says of it."""
    ys, _ = outputs(cbn.momentum_batch_norm(lambda m: 0.0 * m + 0.3), batches(1))
    np.testing.assert_allclose(ys[0], batch_norm(batches(1)[0]), rtol=1e-4, atol=1e-5)
