"""What an example's statistics would have been in training: by the formula, and fitted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import LAYERS, infer, init, normalize, train
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from cbn_jax.linen import Norm

EPSILON = 1e-5
FEATURES = 5
shapes = pytest.mark.parametrize("shape", [(6, FEATURES), (6, 3, 2, FEATURES)])


def variance(statistics, epsilon=EPSILON):
    return 1 / np.square(np.float64(statistics.inv_std)) - epsilon


def running(rng):
    """Running mean and variance, and a state that holds them."""
    mean, var = rng.normal(size=FEATURES), rng.uniform(0.5, 2.0, FEATURES)
    return mean, var, cbn.from_batch_stats(mean, var)


def rms(values):
    return np.sqrt(np.square(values).mean())


def data(rng, shape):
    return jnp.asarray(0.5 + 2.0 * rng.normal(size=shape), jnp.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@functools.partial(jax.jit, static_argnums=0)
def take_in(estimator, state, x, mask=None):
    return estimator.train(state, x, mask=mask)[1]


# corrected_inference.


@shapes
@pytest.mark.parametrize("batch_size", [1, 2, 3.5, 16])
@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_corrected_equals_the_oracle(shape, batch_size, epsilon, rng):
    mean, var, state = running(rng)
    x = data(rng, shape)
    inner = cbn.batch_norm(epsilon=epsilon)
    estimator = cbn.corrected_inference(inner, batch_size)
    statistics = infer(estimator, state, x)
    expected = reference.corrected_moments(mean, var, x, batch_size)
    assert statistics.mean.shape == (6, *[1] * (len(shape) - 2), FEATURES)
    assert statistics.inv_std.shape == statistics.mean.shape
    np.testing.assert_allclose(statistics.mean.reshape(6, -1), expected[0], rtol=1e-4)
    np.testing.assert_allclose(
        variance(statistics, epsilon).reshape(6, -1), expected[1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_corrected_is_the_expectation_over_all_batches(positions, batch_size, rng):
    """Exactly, from the exact averages: all batches of five examples are counted."""
    population = 2.0 + rng.gamma(1.0, size=(5, positions, FEATURES))
    means, variances = reference.conditional_moments(population, batch_size)
    state = cbn.from_batch_stats(means.mean(0), variances.mean(0))
    estimator = cbn.corrected_inference(cbn.batch_norm(), batch_size)
    statistics = estimator.infer(state, jnp.asarray(population, jnp.float32))
    np.testing.assert_allclose(statistics.mean[:, 0], means, rtol=1e-5)
    np.testing.assert_allclose(variance(statistics)[:, 0], variances, rtol=1e-4, atol=1e-5)


@shapes
@pytest.mark.parametrize("batch_size", [1e9, np.inf])
def test_large_batches_are_ordinary_inference(shape, batch_size, rng):
    state, x = running(rng)[2], data(rng, shape)
    ordinary = cbn.normalize(x, cbn.batch_norm().infer(state, x))
    estimator = cbn.corrected_inference(cbn.batch_norm(), batch_size)
    corrected = normalize(x, infer(estimator, state, x))
    np.testing.assert_allclose(corrected, ordinary, rtol=1e-5, atol=1e-5)


@shapes
def test_batches_of_one_are_instance_norm(shape, rng):
    """For a dense layer, where an example has one value, nothing is left of it."""
    state, x = running(rng)[2], data(rng, shape)
    estimator = cbn.corrected_inference(cbn.batch_norm(), examples=1)
    y = normalize(x, infer(estimator, state, x))
    expected = [reference.batch_norm(example.reshape(-1, FEATURES)) for example in x]
    # Divided by √ε, rounding errors are seen.
    np.testing.assert_allclose(y.reshape(6, -1, FEATURES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_after_a_dense_layer_no_output_leaves_what_training_had(batch_size, rng):
    """No value of m is further than √(m − 1) standard deviations from their mean."""
    state = running(rng)[2]
    x = jnp.asarray(10.0 ** rng.uniform(-3, 6, (50, FEATURES)), jnp.float32)
    estimator = cbn.corrected_inference(cbn.batch_norm(), batch_size)
    y = np.abs(normalize(x, infer(estimator, state, x)))
    assert y.max() <= np.sqrt(batch_size - 1) * (1 + 1e-6)
    assert y.max() > 0.99 * np.sqrt(batch_size - 1)


def test_corrected_trains_as_the_estimator_does():
    inner = cbn.cross_iteration_batch_norm(window=3)
    estimator = cbn.corrected_inference(inner, examples=2)
    assert estimator.init is inner.init
    assert estimator.train is inner.train


def test_corrects_a_model_trained_with_flax(key):
    x = np.linspace(-1.0, 3.0, 12, dtype=np.float32).reshape(4, 3) ** 3
    module = nn.BatchNorm(momentum=0.5, use_bias=False, use_scale=False)
    _, trained = module.init_with_output(key, x, use_running_average=False)
    trained = module.apply(trained, x, use_running_average=False, mutable="batch_stats")[1]
    stats = trained["batch_stats"]
    state = cbn.from_batch_stats(**stats)

    def corrected(batch_size):
        estimator = cbn.corrected_inference(cbn.batch_norm(), batch_size)
        return cbn.normalize(jnp.asarray(x), estimator.infer(state, jnp.asarray(x)))

    expected = module.apply(trained, x, use_running_average=True)
    np.testing.assert_allclose(corrected(1e9), expected, rtol=1e-5)
    moments = np.float64(stats["mean"]), np.float64(stats["var"])
    mean, var = reference.corrected_moments(*moments, x, 2)
    np.testing.assert_allclose(
        corrected(2), (x - mean) / np.sqrt(var + EPSILON), rtol=1e-4, atol=1e-6
    )


# Both.

WRAPPERS = {
    "corrected": functools.partial(cbn.corrected_inference, examples=2),
    "fitted": cbn.fitted_inference,
}
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=list(WRAPPERS))


@pytest.mark.parametrize("shape", [(4, FEATURES), (4, 3, FEATURES)])
@pytest.mark.parametrize("batch_size", [1, None])
def test_gradients_of_inference_are_finite(shape, batch_size, rng):
    """Also where an example, or everything, is constant."""
    mean, var, state = running(rng)
    if batch_size is None:
        estimator, state = fitted_on(data(rng, (3, *shape)), mean, var)
    else:
        estimator = cbn.corrected_inference(cbn.batch_norm(), batch_size)

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sin(normalize(x, infer(estimator, state, x))).sum()

    x = data(rng, shape).at[0].set(0.7)
    for batch in (x, jnp.zeros(shape), jnp.full(shape, 1e4)):
        assert np.isfinite(gradient(batch)).all()


@wrappers
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_inference_is_as_precise_as_the_activations(wrapper, dtype, x64):
    """Statistics in float64 for float64, else in float32."""
    estimator = wrapper(cbn.batch_norm())
    x = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3).astype(dtype)
    state = estimator.init(3)
    for _ in range(2):
        state = take_in(estimator, state, x)
    for leaf in infer(estimator, state, x):
        assert leaf.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        assert np.isfinite(leaf).all()


NONSENSE = {
    "corrected": (
        WRAPPERS["corrected"](cbn.batch_norm()),
        "with corrected inference, expected one without",
    ),
    "fitted": (
        cbn.fitted_inference(cbn.batch_norm()),
        "with corrected inference, expected one without",
    ),
    "group": (cbn.group_batch_norm(0.5), "statistics per example, expected one mean"),
    "group_plus": (cbn.group_norm_plus(0.5), "statistics per example, expected one mean"),
    "gated": (cbn.adaptive_batch_norm(cbn.batch_norm()), r"expected the gate outside; w"),
    "gated_corrected": (
        cbn.adaptive_batch_norm(WRAPPERS["corrected"](cbn.batch_norm())),
        "with corrected inference",
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("inner", NONSENSE)
def test_nonsense_is_an_error_at_construction(name, inner):
    estimator, sentence = NONSENSE[inner]
    with pytest.raises(ValueError, match=rf"^{name}_inference got a .*{sentence}"):
        WRAPPERS[name](estimator)


@pytest.mark.parametrize("batch_size", [0, 0.5, -1, np.nan])
def test_a_batch_has_one_example_at_least(batch_size):
    with pytest.raises(ValueError, match=r"examples is .*number of examples .*at least 1"):
        cbn.corrected_inference(cbn.batch_norm(), batch_size)


def test_momentum_is_a_decay():
    with pytest.raises(ValueError, match=r"momentum is 1\.0, expected a decay"):
        cbn.fitted_inference(cbn.batch_norm(), momentum=1.0)


# fitted_inference.


@functools.partial(jax.jit, static_argnums=0)
def one_pass(estimator, state, batches):
    def step(state, x):
        return estimator.train(state, x)[1], None

    return jax.lax.scan(step, state, batches)[0]


FROZEN = cbn.batch_norm(momentum=cbn.cumulative())  # from running moments as good as given
FITTED = cbn.fitted_inference(FROZEN)


def fitted_on(batches, mean, var, estimator=FITTED):
    """Fitted in one pass around these running moments."""
    trained = cbn.from_batch_stats(mean, var)
    state = estimator.init(len(mean))._replace(state=trained)
    return estimator, one_pass(estimator, state, jnp.asarray(batches, jnp.float32))


def coefficients(estimator, inner, state):
    """a and c = (c₀, c₁, c₂), computed from the predictions for three examples."""
    ordinary = infer(inner, state.state, jnp.zeros((1, FEATURES)))
    example = jnp.array([[0.0, 0.0], [-1.0, 1.0], [1.0, 1.0]])[..., None]
    predicted = infer(estimator, state, ordinary.mean[None, None] + example)
    mean, var = predicted.mean[:, 0] - ordinary.mean[None], predicted.inv_std[:, 0] ** -2
    c0 = var[0] * ordinary.inv_std**2
    return mean[2], np.stack([c0, var[1] - var[0], var[2] - var[0]])


def draws(rng, count, batch_size, correlation=0.0):
    """Batches ``[count, batch_size, 2, C]`` and their expected mean and variance.

    The examples' means have variance 1, of which a batch shares the part ``correlation``;
    the variances within them, one on average, are gamma distributed.
    """
    shared = np.sqrt(correlation) * rng.normal(size=(count, 1, 1, FEATURES))
    own = np.sqrt(1 - correlation) * rng.normal(size=(count, batch_size, 1, FEATURES))
    within = np.sqrt(rng.gamma(3.0, 1 / 3, (count, batch_size, 1, FEATURES)))
    x = shared + own + within * np.array([-1.0, 1.0])[:, None]
    var = 1 + (1 - correlation) * (1 - 1 / batch_size)
    return x, np.zeros(FEATURES), np.full(FEATURES, var)


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_before_the_first_batch_it_is_ordinary_inference(epsilon, rng):
    x, mean, var = draws(rng, 1, 4)
    inner = cbn.batch_norm(epsilon=epsilon)
    estimator = cbn.fitted_inference(inner)
    trained = cbn.from_batch_stats(mean, var)
    state = estimator.init(FEATURES)._replace(state=trained)
    x = jnp.asarray(x[0], jnp.float32)
    predicted, ordinary = infer(estimator, state, x), infer(inner, trained, x)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, np.broadcast_to(e, a.shape), rtol=1e-5),
        predicted,
        ordinary,
    )


def test_trains_as_the_estimator_does(key):
    layer, inner = LAYERS["conv"], cbn.cross_iteration_batch_norm(window=3)
    params, estimator = layer.params(key), cbn.fitted_inference(inner)
    state, alone = init(estimator, layer, params), init(inner, layer, params)

    @jax.jit
    def both(state, alone, z):
        fitted = train(estimator, state, layer, params, z)[1:]
        return fitted, train(inner, alone, layer, params, z)[1:]

    for step in range(3):
        z = layer.data(jax.random.fold_in(key, step))
        (statistics, state), (expected, alone) = both(state, alone, z)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6),
            (statistics, state.state),
            (expected, alone),
        )


@pytest.mark.parametrize("batch_size", [2, 4])
def test_independent_draws_give_the_corrected_coefficients(batch_size, rng):
    m = batch_size
    batches, mean, var = draws(rng, 4000, m)
    estimator, state = fitted_on(batches, mean, var)
    a, c = coefficients(estimator, FROZEN, state)
    np.testing.assert_allclose(a, 1 / m, atol=0.02)
    expected = np.array([1 - 1 / m, 1 / m, (m - 1) / m**2])
    np.testing.assert_allclose(c, np.tile(expected[:, None], FEATURES), atol=0.03)
    corrected = cbn.corrected_inference(FROZEN, m)
    x = jnp.asarray(batches[:50].reshape(-1, 2, FEATURES), jnp.float32)
    np.testing.assert_allclose(
        normalize(x, infer(estimator, state, x)),
        cbn.normalize(x, corrected.infer(state.state, x)),
        atol=0.05,
    )


def expected_training(rng, x, batch_size, correlation, count=1000):
    """Batch moments given one example ``[N, 2, C]``, by drawing the others of its batch."""
    own, r = x.mean(1), correlation
    shape = (count, *own.shape)
    shared = r * own + np.sqrt(r * (1 - r)) * rng.normal(size=shape)
    others = shared + np.sqrt(1 - r) * rng.normal(size=(batch_size - 1, *shape))
    means = np.concatenate([np.broadcast_to(own, (1, *shape)), others])
    within = (x.var(1) + batch_size - 1) / batch_size  # the others' is one on average
    return means.mean((0, 1)), within + means.var(0).mean(0)


def test_correlated_batches_are_predicted_better_than_by_any_formula(rng):
    """An example then has a larger share in its statistics than 1/m."""
    m, correlation = 4, 0.6
    batches, mean, var = draws(rng, 4000, m, correlation)
    estimator, state = fitted_on(batches, mean, var)
    a = coefficients(estimator, FROZEN, state)[0]
    np.testing.assert_allclose(a, correlation + (1 - correlation) / m, atol=0.02)

    x = draws(rng, 300, 1, correlation)[0][:, 0]
    expected = expected_training(rng, x, m, correlation)

    def error(estimator, state):
        statistics = estimator.infer(state, jnp.asarray(x, jnp.float32))
        found = statistics.mean, variance(statistics)
        found = [np.broadcast_to(f, x[:, :1].shape)[:, 0] for f in found]
        return np.sqrt(np.square(np.subtract(found, expected)).mean((1, 2)))

    fitted = error(estimator, state)
    corrected = error(cbn.corrected_inference(FROZEN, m), state.state)
    ordinary = error(FROZEN, state.state)
    assert (fitted < 0.05).all()
    assert (fitted < 0.4 * corrected).all()
    assert (fitted < 0.4 * ordinary).all()


PARTS_OF_A_BATCH = {
    "window": (
        cbn.cross_iteration_batch_norm(
            window=3, running="window", momentum=cbn.cumulative()
        ),
        1 / 3,
    ),
    "diminishing": (cbn.diminishing_batch_norm(0.25), 1 / 4),
}


@pytest.mark.parametrize("name", PARTS_OF_A_BATCH)
def test_the_share_is_one_in_all_examples_of_a_statistic(name, rng):
    """A window of k batches makes it 1/(k m), a weight α makes it α/m."""
    inner, part = PARTS_OF_A_BATCH[name]
    m, params = 2, {"kernel": jnp.eye(FEATURES)}
    batches = jnp.asarray(draws(rng, 4000, m)[0], jnp.float32)
    estimator = cbn.fitted_inference(inner)

    @jax.jit
    def run(state):
        def step(state, z):
            x, source = cbn.run_layer(cbn.dense, params, z)
            return estimator.train(state, x, source)[1], None

        return jax.lax.scan(step, state, batches)[0]

    state = run(estimator.init(FEATURES, cbn.dense, params))
    a = coefficients(estimator, inner, state)[0]
    np.testing.assert_allclose(a, part / m, atol=0.02)


def test_along_with_training_it_does_not_fit_the_start(rng):
    """A fresh average says mean 0 and variance 1, which are nobody's statistics."""
    batches = jnp.asarray(50.0 + draws(rng, 2000, 4)[0], jnp.float32)
    state = one_pass(FITTED, FITTED.init(FEATURES), batches)
    a, c = coefficients(FITTED, FROZEN, state)
    np.testing.assert_allclose(a, 1 / 4, atol=0.03)
    np.testing.assert_allclose(c[2], 3 / 16, atol=0.03)


def biased(rng, count=400, batch_size=3):
    """Batches for which least squares wants something negative: c₀, c₁, c₂, nothing.

    The variance of the examples' means goes as w², as 5 − 3w, falls with the size of the
    shared offset, is one; w is the variance within, the same for all examples of a batch.
    """
    w = rng.uniform(0.3, 1.5, (count, 1, 1, FEATURES))
    shared = rng.normal(size=w.shape)
    between = np.ones_like(w)
    between[..., 0] = 4 * w[..., 0] ** 2
    between[..., 1] = 5 - 3 * w[..., 1]
    between[..., 2] = np.exp(-2 * shared[..., 2] ** 2)
    own = np.sqrt(between) * rng.normal(size=(count, batch_size, 1, FEATURES))
    x = shared + own + np.sqrt(w) * np.array([-1.0, 1.0])[:, None]
    return x, np.zeros(FEATURES), x.var((1, 2)).mean(0)


@pytest.mark.parametrize("make", [draws, biased])
def test_fit_is_least_squares(make, rng):
    """Clipped where negative; a small ridge apart."""
    batches, mean, var = make(rng, 300, 3)
    estimator, state = fitted_on(batches, mean, var)
    a, c = coefficients(estimator, FROZEN, state)
    slope, expected = reference.regression(np.float32(batches), mean, var)
    np.testing.assert_allclose(a, slope, rtol=1e-3)
    np.testing.assert_allclose(c, expected, rtol=0.02, atol=5e-3)
    if make is biased:
        assert (np.diag(expected)[:3] == 0).all()
        constant = jnp.zeros((1, 2, FEATURES))  # nothing is left of its first feature
        assert infer(estimator, state, constant).inv_std.max() < 1.01 / np.sqrt(EPSILON)


@pytest.mark.parametrize(("factor", "slope"), [(3.0, 1.0), (0.5, 0.25), (-1.0, 0.0)])
def test_slope_lies_between_zero_and_one(factor, slope, rng):
    """Whatever a training statistic does: one that exaggerates the batch's mean."""

    def exaggerated(*args, **kwargs):
        statistics, state = FROZEN.train(*args, **kwargs)
        return statistics._replace(mean=factor * statistics.mean), state

    batches, mean, var = draws(rng, 2000, 2)
    inner = dataclasses.replace(FROZEN, train=exaggerated)
    estimator, state = fitted_on(batches, mean, var, cbn.fitted_inference(inner))
    a = coefficients(estimator, FROZEN, state)[0]
    np.testing.assert_allclose(a, slope, atol=0.02)


def test_after_a_dense_layer_the_rest_is_fitted(rng):
    """An example has no variance in itself, which leaves one coefficient open."""
    m = 4
    batches = rng.normal(size=(4000, m, FEATURES))
    var = np.full(FEATURES, 1 - 1 / m)
    estimator, state = fitted_on(batches, np.zeros(FEATURES), var)
    a, c = coefficients(estimator, FROZEN, state)
    np.testing.assert_allclose(a, 1 / m, atol=0.02)
    np.testing.assert_allclose(c[0], 1 - 1 / m, atol=0.03)
    np.testing.assert_allclose(c[1], 0.0, atol=1e-3)
    np.testing.assert_allclose(c[2], (m - 1) / m**2, atol=0.03)


def test_constant_activations_are_predicted_to_be_zero():
    batches = np.full((3, 4, 2, FEATURES), 7.0)
    estimator, state = fitted_on(batches, np.full(FEATURES, 7.0), np.zeros(FEATURES))
    x = jnp.asarray(batches[0], jnp.float32)
    np.testing.assert_array_equal(normalize(x, infer(estimator, state, x)), 0.0)


def test_momentum_says_how_batches_are_averaged(rng):
    batches, mean, var = draws(rng, 3, 4)
    each = [fitted_on(batches[n : n + 1], mean, var)[1].fit for n in range(3)]
    for momentum, weights in (
        (cbn.cumulative(), [1, 1, 1]),
        (0.0, [0, 0, 1]),
        (0.5, [1, 2, 4]),
    ):
        estimator = cbn.fitted_inference(FROZEN, momentum=momentum)
        state = fitted_on(batches, mean, var, estimator)[1]
        for leaf, *fits in zip(state.fit, *each, strict=True):
            expected = np.average(fits, 0, weights)
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(state.batches, 3.0)


def test_masked_positions_do_not_count(rng):
    """Nor does an example without any, nor a feature."""
    batches, mean, var = draws(rng, 2, 4)
    estimator, state = fitted_on(batches[:1], mean + 0.5, var)
    mask = np.ones((5, 3, FEATURES), bool)
    mask[:, 2], mask[4], mask[..., 0] = False, False, False
    x = np.full(mask.shape, np.nan, np.float32)
    x[:4, :2] = batches[1]
    x = np.where(mask, x, np.nan)
    after = take_in(estimator, state, jnp.asarray(x), jnp.asarray(mask))
    sliced = take_in(estimator, state, jnp.asarray(batches[1], jnp.float32))
    np.testing.assert_array_equal(after.batches, [1.0, *[2.0] * (FEATURES - 1)])
    for leaf, new, old in zip(after.fit, sliced.fit, state.fit, strict=True):
        np.testing.assert_array_equal(leaf[..., 0], old[..., 0])
        np.testing.assert_allclose(leaf[..., 1:], new[..., 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_leaves_its_own_feature_as_it_was(poison, rng):
    batches, mean, var = draws(rng, 2, 4)
    estimator, state = fitted_on(batches[:1], mean, var)
    x = jnp.asarray(batches[1], jnp.float32)
    clean = take_in(estimator, state, x)
    after = take_in(estimator, state, x.at[2, 1, 0].set(poison))
    for leaf, new, old in zip(after.fit, clean.fit, state.fit, strict=True):
        np.testing.assert_array_equal(leaf[..., 0], old[..., 0])
        np.testing.assert_allclose(leaf[..., 1:], new[..., 1:], rtol=1e-6)
    np.testing.assert_array_equal(after.batches, [1.0, *[2.0] * (FEATURES - 1)])


def test_a_statistic_that_is_not_finite_leaves_its_feature_as_it_was(rng):
    """Though the batch is: a window may remember what the batch does not show."""

    def overflown(*args, **kwargs):
        statistics, state = FROZEN.train(*args, **kwargs)
        return statistics._replace(inv_std=statistics.inv_std.at[0].set(0.0)), state

    batches, mean, var = draws(rng, 1, 4)
    estimator = cbn.fitted_inference(dataclasses.replace(FROZEN, train=overflown))
    _, state = fitted_on(batches, mean, var, estimator)
    np.testing.assert_array_equal(state.batches, [0.0, *[1.0] * (FEATURES - 1)])
    for leaf in state.fit:
        np.testing.assert_array_equal(leaf[..., 0], 0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_eight_devices_fit_as_one(masked, rng):
    """Also with unequal counts, and one device without any value."""
    batches, mean, var = draws(rng, 1, 16)
    estimator, state = fitted_on(batches[:1, :4], mean, var)
    x = jnp.asarray(batches[0], jnp.float32)
    mask = jnp.asarray(rng.uniform(size=(16, 2, 1)) < 0.6).at[4:6].set(False)
    mask = mask if masked else jnp.ones_like(mask)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(x, mask):
        mask = mask if masked else None
        return estimator.train(state, x, axis_name="data", mask=mask)[1]

    spread = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P())
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
        jax.jit(spread)(x, mask),
        take_in(estimator, state, x, mask if masked else None),
    )


class Net(nn.Module):
    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, z, train):
        for _ in range(2):
            norm = Norm(self.estimator, use_running_average=not train)
            z = nn.relu(norm(nn.Dense(4)(z)))
        return z.sum(-1)


def test_a_trained_model_is_fitted_in_one_pass(key):
    """Then it predicts what it said in training better than it did before."""
    inner = cbn.batch_norm(momentum=0.9)
    trained, fitted = Net(inner), Net(cbn.fitted_inference(inner))
    offset = 2.0 * jax.random.normal(key, (200, 2, 1, 3))
    batches = offset + jax.random.normal(jax.random.fold_in(key, 1), (200, 2, 4, 3))

    @jax.jit
    def run():
        """Outputs in training and in inference, before and after the fit."""
        variables = trained.init(key, batches[0], train=False)
        params, untrained = variables["params"], variables["batch_stats"]
        fresh = fitted.init(key, batches[0], train=False)["batch_stats"]

        def one_pass(model, stats):
            def step(stats, z):
                variables = {"params": params, "batch_stats": stats}
                y, new = model.apply(variables, z, train=True, mutable="batch_stats")
                return new["batch_stats"], y

            return jax.lax.scan(step, stats, batches)

        def predict(model, stats):
            variables = {"params": params, "batch_stats": stats}
            return model.apply(variables, batches.reshape(400, 4, 3), train=False)

        stats = one_pass(trained, untrained)[0]
        start = {name: fresh[name] | stats[name] for name in fresh}
        stats_fitted, training = one_pass(fitted, start)
        return (
            training.reshape(400, 4),
            predict(trained, stats),
            predict(fitted, start),
            predict(fitted, stats_fitted),
        )

    training, ordinary, unfitted, predicted = run()
    np.testing.assert_allclose(unfitted, ordinary, rtol=1e-4, atol=1e-5)
    assert rms(predicted - training) < 0.7 * rms(ordinary - training)


def test_a_feature_with_one_value_leaves_the_fit_as_it_is(key):
    """Its training statistics are the running ones, of which nothing is to be learned."""
    estimator, x = cbn.fitted_inference(cbn.batch_norm()), jax.random.normal(key, (4, 5, 3))
    _, state = estimator.train(estimator.init(3), x)
    mask = jnp.ones((4, 5, 3), bool).at[..., 0].set(False).at[0, 0, 0].set(True)
    _, after = estimator.train(state, 3.0 * x, mask=mask)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(new[..., 0], old[..., 0])
    np.testing.assert_array_equal(after.batches, [1, 2, 2])


@pytest.mark.parametrize(
    "estimator",
    [cbn.corrected_inference(cbn.batch_norm(), 2), cbn.fitted_inference(cbn.batch_norm())],
)
def test_an_example_without_a_value_has_ordinary_inference(estimator, key):
    x = jax.random.normal(key, (4, 5, 3))
    _, state = estimator.train(estimator.init(3), x)
    mask = jnp.arange(4)[:, None, None] > 0
    found = estimator.infer(state, 2.0 * x, mask=mask)
    inside = state.state if hasattr(state, "state") else state
    ordinary = cbn.batch_norm().infer(inside, x)
    np.testing.assert_allclose(found.mean[0, 0], ordinary.mean, rtol=1e-6)
    np.testing.assert_allclose(found.inv_std[0, 0], ordinary.inv_std, rtol=1e-5)
    alone = estimator.infer(state, 2.0 * x[1:])
    np.testing.assert_allclose(found.mean[1:], alone.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-5, 0.04])
def test_a_fitted_variance_is_at_least_epsilon(epsilon):
    """A regression may say that training divides by nothing."""
    estimator = cbn.fitted_inference(cbn.batch_norm(epsilon=epsilon))
    state = estimator.init(2)
    gram = 1e6 * jnp.broadcast_to(jnp.eye(3)[..., None], (3, 3, 2))
    state = state._replace(fit=state.fit._replace(gram=gram), batches=jnp.ones(2))
    inv_std = estimator.infer(state, jnp.ones((1, 2))).inv_std
    np.testing.assert_allclose(inv_std, epsilon**-0.5, rtol=1e-5)
