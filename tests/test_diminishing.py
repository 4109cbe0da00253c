import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import LAYERS, drift
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from cbn_jax.core.statistics import std_of

# A rule and the same in NumPy; m = 1, 2, …
RULES = {
    "constant": (0.6, lambda m: 0.6),
    "cumulative": (cbn.diminishing(1.0), lambda m: 1 / m),
    "squares": (cbn.diminishing(2.0), lambda m: m**-2.0),
    "linear": (optax.linear_schedule(0.9, 0.1, 4), lambda m: 0.9 - 0.2 * min(m, 4)),
    "decay": (optax.exponential_decay(0.8, 2, 0.5), lambda m: 0.8 * 0.5 ** (m / 2)),
}
EPSILON = 1e-5
orders = pytest.mark.parametrize("order", ["updated", "previous"])


@functools.cache
def start(alpha=0.25, order="updated", features=4):
    """A training call, compiled once for all tests, and the state before the first."""
    estimator = cbn.diminishing_batch_norm(alpha, normalize_by=order)
    return jax.jit(estimator.train), estimator.init(features)


def batches(key, steps=6, shape=(5, 4)):
    """Batches whose means and deviations move."""
    for m in range(1, steps + 1):
        noise = jax.random.normal(jax.random.fold_in(key, m), shape)
        yield 2.0 * m + (1.0 + m % 3) * noise


def average(statistics):
    """(mean, std) of statistics, in float64."""
    return np.float64(statistics.mean), 1 / np.float64(statistics.inv_std) - EPSILON


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Computed values.


@pytest.mark.parametrize("layer", ["dense", "conv"])
@orders
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_oracle(rule, order, layer, key):
    """Over six steps of moving weights: outputs, averages and their number."""
    layer = LAYERS[layer]
    alpha, expected_alpha = RULES[rule]
    step, state = start(alpha, order)
    oracle = reference.Diminishing(expected_alpha, order)
    params = layer.params(key)
    for m in range(6):
        x = layer.fn(params, layer.data(jax.random.fold_in(key, m)))
        statistics, state = step(state, x)
        assert_close(cbn.normalize(x, statistics), oracle.normalize(x))
        assert_close(state[:2], (oracle.mu, oracle.sigma))
        params = drift(params, jax.random.fold_in(key, 100 + m), 0.3)
    np.testing.assert_array_equal(state.steps, 6)


@pytest.mark.parametrize("alpha", [1.0, cbn.diminishing(0.0), cbn.exponential(0.0)])
def test_alpha_one_is_batch_norm(alpha, key):
    """But for ε, which is added to the deviation instead of to the variance."""
    step, state = start(alpha)
    for x in batches(key, 3, (2, 3, 3, 4)):
        statistics, state = step(state, x)
        moments = cbn.batch_moments(x)
        assert_close(statistics.mean, moments.mean, 1e-6, 0.0)
        assert_close(average(statistics)[1], np.sqrt(moments.var))
        y = cbn.normalize(x, statistics)
        assert_close(y, reference.batch_norm(x, epsilon=0.0), atol=1e-4)


def test_alpha_zero_stays_at_the_start(key):
    step, state = start(0.0)
    for x in batches(key):
        statistics, state = step(state, x)
        assert_same(state[:2], (np.zeros(4), np.ones(4)))
        assert_close(cbn.normalize(x, statistics), x, rtol=2 * EPSILON)


def test_the_default_is_a_quarter(key):
    estimator = cbn.diminishing_batch_norm()
    (x,) = batches(key, 1)
    expected = start(0.25)[0](estimator.init(4), x)
    assert_close(estimator.train(estimator.init(4), x), expected)


@pytest.mark.parametrize("alpha", [cbn.cumulative(), cbn.diminishing(1.0)])
def test_one_over_m_is_the_plain_mean(alpha, key):
    """Of means and of deviations, which are not those of all values together."""
    step, state = start(alpha)
    seen = []
    for x in batches(key):
        seen.append((np.mean(x, 0), np.std(x, 0)))
        statistics, state = step(state, x)
        assert_close(average(statistics), tuple(np.mean(seen, 0)))


def test_one_over_m_squared_leaves_the_first_batch_half_of_the_weight(key):
    """(1 − 1/2²) ⋯ (1 − 1/m²) = (m + 1) / 2m."""
    step, state = start(cbn.diminishing(2.0))
    (x,) = batches(key, 1)
    _, first = _, state = step(state, x)
    for m in range(2, 40):
        _, state = step(state, jnp.zeros((5, 4)))
        share = (m + 1) / (2 * m)
        assert_close(state[:2], tuple(share * leaf for leaf in first[:2]))


def test_a_constant_keeps_the_start_and_an_exponential_does_not(key):
    """After m batches 0.75ᵐ of mean 0 and deviation 1 is left, or nothing of it."""
    (biased, state), (debiased, other) = start(0.25), start(cbn.exponential(0.75))
    seen = []
    for m, x in enumerate(batches(key), 1):
        seen.append((np.mean(x, 0), np.std(x, 0)))
        _, state = biased(state, x)
        _, other = debiased(other, x)
        weights = reference.exponential_weights(m, 0.75)
        mean, std = np.tensordot(weights, seen, 1)
        assert_close(other[:2], (mean, std))
        left = 0.75**m
        assert_close(state[:2], ((1 - left) * mean, left + (1 - left) * std))


@orders
def test_training_and_inference_use_the_same_average(order, key):
    """With "previous" training lags one batch behind."""
    estimator = cbn.diminishing_batch_norm(normalize_by=order)
    step, state = start(order=order)
    for x in batches(key):
        statistics, after = step(state, x)
        used = after if order == "updated" else state
        assert_close(estimator.infer(used, x), statistics, 1e-6, 1e-6)
        state = after


def test_epsilon_is_added_to_the_deviation():
    estimator = cbn.diminishing_batch_norm(epsilon=0.5)
    state = cbn.DiminishingState(jnp.full(4, 3.0), jnp.full(4, 1.5), jnp.ones(4))
    statistics = estimator.infer(state, jnp.ones((1, 4)))
    assert_same(statistics, cbn.Statistics(np.full(4, 3.0), np.full(4, 0.5)))


def test_schedules_that_know_one_count_at_a_time(key):
    """Some of optax's: a count per feature does not fit their intervals."""
    schedule = optax.piecewise_interpolate_schedule("linear", 0.9, {2: 0.5, 4: 0.2, 6: 2.0})
    with jax.numpy_dtype_promotion("standard"):  # they mix dtypes
        estimator = cbn.diminishing_batch_norm(schedule)
        state, oracle = estimator.init(4), reference.Diminishing(schedule)
        for x in batches(key, 3):
            statistics, state = estimator.train(state, x)
            assert_close(average(statistics), oracle.step(x))


# Normalizing by the average before the batch.


def test_the_previous_average_leaves_the_first_batch_unchanged(key):
    for alpha in (0.25, cbn.cumulative()):
        step, state = start(alpha, "previous")
        (x,) = batches(key, 1)
        assert_close(cbn.normalize(x, step(state, x)[0]), x, rtol=2 * EPSILON)


def test_the_orders_keep_the_same_state(key):
    blend, state = start()
    behind, other = start(order="previous")
    for x in batches(key):
        statistics, state = blend(state, x)
        one_behind, other = behind(other, x)
        assert_close(other, state, 1e-6, 1e-6)
        assert (np.abs(statistics.mean - one_behind.mean) > 0.1).all()


def seen_state(order="updated", alpha=0.25):
    step, state = start(alpha, order)
    for x in batches(jax.random.key(1), 3):
        _, state = step(state, x)
    return state


def test_no_gradient_flows_through_the_previous_average(key):
    """The output's gradient with respect to x is its factor, and nothing else."""
    estimator, state = (
        cbn.diminishing_batch_norm(normalize_by="previous"),
        seen_state("previous"),
    )
    (x,) = batches(key, 1)
    weight = jax.random.normal(key, x.shape)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(x, state):
        statistics, after = estimator.train(state, x)
        y = cbn.normalize(x, statistics)
        return (weight * y).sum() + sum(jnp.sum(leaf) for leaf in after)

    by_x, by_state = gradient(x, state)
    assert_close(by_x, weight * estimator.infer(state, x).inv_std[None])
    assert_same(by_state, jax.tree.map(np.zeros_like, state))


def test_the_previous_average_ignores_the_mask_but_the_state_does_not(key):
    step, state = start(order="previous")[0], seen_state("previous")
    (x,) = batches(key, 1)
    mask = jnp.arange(5)[:, None] < 3
    statistics, after = step(state, jnp.where(mask, x, jnp.nan), mask=mask)
    expected, sliced = step(state, x[:3])
    assert_same(statistics, expected)
    assert_close(after, sliced)


@orders
def test_a_feature_without_values_waits(order, key):
    """It is normalized by the average as it is; the others are not held up."""
    step, state = start(cbn.cumulative(), order)[0], seen_state(order, cbn.cumulative())
    (x,) = batches(key, 1)
    mask = jnp.ones((5, 4), bool).at[:, 1].set(False)
    statistics, after = step(state, x, mask=mask)
    usual, expected = step(state, x)
    waits = np.arange(4) == 1
    infer = cbn.diminishing_batch_norm().infer(state, x)
    for mine, theirs, untouched in zip(
        (*statistics, *after), (*usual, *expected), (*infer, *state), strict=True
    ):
        assert_close(mine, np.where(waits, untouched, theirs), 1e-6, 1e-6)


def test_nan_stays_in_its_place_under_the_previous_average(key):
    step, state = start(order="previous")[0], seen_state("previous")
    (x,) = batches(key, 1)
    bad = x.at[3, 1].set(jnp.nan)
    statistics, after = step(state, bad)
    assert_same(np.isnan(cbn.normalize(bad, statistics)), np.isnan(bad))
    waits, (_, usual) = np.arange(4) == 1, step(state, x)
    for mine, theirs, untouched in zip(after, usual, state, strict=True):
        assert_close(mine, np.where(waits, untouched, theirs))


# Gradients.


def test_the_gradient_is_alpha_times_that_of_the_batch(x64):
    """Of mean and deviation; α₃ = 0.3 of a schedule."""
    state = seen_state()._replace(steps=jnp.full(4, 2.0, jnp.float32))
    alpha = optax.linear_schedule(0.9, 0.1, 4)
    estimator = cbn.diminishing_batch_norm(alpha)
    draw = np.random.default_rng(0).standard_normal
    x, v, w = draw((5, 4)), draw(4), draw(4)

    @jax.jit
    @jax.grad
    def gradient(x):
        statistics = estimator.train(state, x)[0]
        return (v * statistics.mean + w / statistics.inv_std).sum()

    expected = 0.3 * (v + w * (x - x.mean(0)) / x.std(0)) / len(x)
    assert_close(gradient(x), expected, 1e-6, 1e-12)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_gradient_is_the_oracles_finite_difference(alpha, x64):
    """Of outputs, after a first batch that is not differentiated."""
    estimator = cbn.diminishing_batch_norm(alpha)
    draws = np.random.default_rng(0).standard_normal((4, 2, 3, 3, 4))
    first, x, direction, weight = draws
    _, state = estimator.train(estimator.init(4), jnp.asarray(first))

    @jax.jit
    @jax.grad
    def gradient(x):
        return (weight * cbn.normalize(x, estimator.train(state, x)[0])).sum()

    def oracle(x):
        after = reference.Diminishing(lambda m: alpha)
        after.step(first)
        return (weight * after.normalize(x)).sum()

    slope = (oracle(x + 1e-5 * direction) - oracle(x - 1e-5 * direction)) / 2e-5
    assert_close((gradient(x) * direction).sum(), slope, 1e-6, 0.0)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_a_constant_feature_has_no_gradient_through_its_deviation(alpha, key):
    estimator = cbn.diminishing_batch_norm(alpha)
    (x,) = batches(key, 1)
    x = x.at[:, 1].set(3.0)

    @jax.jit
    @jax.grad
    def gradient(x):
        return (1.0 / estimator.train(estimator.init(4), x)[0].inv_std).sum()

    slope = gradient(x)
    np.testing.assert_array_equal(slope[:, 1], 0.0)
    assert (np.abs(slope[:, 0]) > 1e-3).all()


def test_the_root_of_nothing_has_no_slope():
    var = jnp.array([0.0, 1e-30, 0.25, 4.0])
    slope, curvature = jax.grad(std_of), jax.grad(jax.grad(std_of))
    assert_close(std_of(var), [0.0, 1e-15, 0.5, 2.0], 1e-6, 0.0)
    assert_close(jax.vmap(slope)(var), [0.0, 5e14, 1.0, 0.25], 1e-6, 0.0)
    assert_close(jax.vmap(curvature)(var[::2]), [0.0, -2.0], 1e-6, 0.0)


# Non-finite values, and several devices.


def test_a_variance_that_is_not_finite_is_not_zero():
    assert np.isnan(std_of(jnp.array(jnp.nan)))
    assert np.isinf(std_of(jnp.array(jnp.inf)))


@pytest.mark.parametrize("poison", [jnp.inf, 1e25])
def test_what_is_not_finite_shows_in_its_own_step(poison, key):
    """In a corner: the mean alone would not show it. 1e25 overflows when squared."""
    step, state = start()
    (x,) = batches(key, 1, (2, 3, 3, 4))
    x = x.at[0, 0, 0, 1].set(poison)
    y = cbn.normalize(x, step(state, x)[0])
    assert_same(np.isnan(y).all((0, 1, 2)), np.arange(4) == 1)


@orders
def test_eight_devices_are_one(order, key):
    """One example a device: no device could do it alone."""
    assert jax.device_count() == 8
    estimator = cbn.diminishing_batch_norm(cbn.diminishing(0.5), normalize_by=order)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(
            functools.partial(estimator.train, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
    )
    step, state = jax.jit(estimator.train), estimator.init(4)
    other = state
    for x in batches(key, 3, (8, 4)):
        statistics, state = sharded(state, x)
        expected, other = step(other, x)
        assert_close((statistics, state), (expected, other))


# Wrong arguments: the message names the value, the expected one and the line to write.


@pytest.mark.parametrize("bad", [-0.1, 1.1, 2, float("nan")])
def test_alpha_is_a_share(bad):
    with pytest.raises(ValueError, match=r"alpha is .*weight of the current batch in \[0"):
        cbn.diminishing_batch_norm(bad)


def test_the_order_is_one_of_two():
    with pytest.raises(ValueError, match=r"normalize_by is 'late', .*'updated' or"):
        cbn.diminishing_batch_norm(normalize_by="late")


@pytest.mark.parametrize("bad", [0.0, -1e-5, float("nan")])
def test_epsilon_is_positive(bad):
    with pytest.raises(ValueError, match=r"epsilon is .*expected a number above 0"):
        cbn.diminishing_batch_norm(epsilon=bad)


@orders
def test_one_value_per_feature_is_an_error(order):
    estimator = cbn.diminishing_batch_norm(normalize_by=order)
    state = estimator.init(4)
    with pytest.raises(ValueError, match=r"diminishing_batch_norm .*one value per feature"):
        estimator.train(state, jnp.ones((1, 4)))
    estimator.infer(state, jnp.ones((1, 4)))
    estimator.train(state, jnp.ones((1, 2, 4)))
