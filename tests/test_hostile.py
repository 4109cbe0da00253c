"""Input that hurts: nothing finite becomes NaN, forward, backward or in a state."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FACTORIES, KINDS, LAYERS, SAMPLING, init, train

import cbn_jax as cbn

estimators = pytest.mark.parametrize("name", KINDS)
LAYER = LAYERS["dense"]


@functools.cache
def step_of(name):
    """A training call with its gradient, and the prediction that follows, jitted."""
    estimator = FACTORIES[name]()

    def loss(params, state, z):
        x, statistics, after = train(estimator, state, LAYER, params, z)
        y = cbn.normalize(x, statistics)
        predicted = cbn.normalize(x, estimator.infer(after, x))
        return jnp.abs(y).mean(), (after, y, predicted)

    return estimator, jax.jit(jax.value_and_grad(loss, has_aux=True))


def steps(name, params, batches, change=lambda params, gradient: params):
    """Training calls; all that was computed on the way."""
    estimator, step = step_of(name)
    state = init(estimator, LAYER, params)
    seen = []
    for z in batches:
        (value, (state, *outputs)), gradient = step(params, state, z)
        seen += [value, outputs, gradient, state]
        params = change(params, gradient)
    return seen


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


def batches_of(key, examples=8):
    return [LAYER.data(jax.random.fold_in(key, i), examples=examples) for i in range(3)]


CASES = {
    "constant": lambda z: jnp.full_like(z, 3.0),
    "zero": jnp.zeros_like,
    "one constant feature": lambda z: z.at[:, 0].set(2.0),
    "twins": lambda z: jnp.repeat(z[:1], len(z), axis=0),
    "denormal": lambda z: z * 1e-40,
    "tiny": lambda z: z * 1e-30,
    "large": lambda z: z * 1e15,
    "far": lambda z: z + 1e5,
    "alternating": lambda z: jnp.where(jnp.arange(len(z))[:, None] % 2 == 0, 1e6, -1e6) + z,
}


@pytest.mark.parametrize("case", CASES)
@estimators
def test_finite_input_stays_finite(name, case, key):
    batches = [CASES[case](z) for z in batches_of(key)]
    assert_finite(steps(name, LAYER.params(key), batches))


@estimators
def test_a_window_that_collapses(name, key):
    """Ordinary batches, then constant ones, then ordinary ones again."""
    ordinary = batches_of(key)
    batches = [*ordinary, *map(jnp.zeros_like, ordinary), *ordinary]
    assert_finite(steps(name, LAYER.params(key), batches))


@pytest.mark.parametrize("rate", [1e2, 1e6])
@estimators
def test_huge_learning_rates(name, rate, key):
    """The weights are thrown about; the activations are normalized nevertheless."""

    def change(params, gradient):
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    assert_finite(steps(name, LAYER.params(key), batches_of(key), change))


@pytest.mark.parametrize("name", ["batch_norm", "group_batch_norm", "streaming_batch_norm"])
@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_digits_survive_large_means(name, ratio, key):
    """Unit variance comes out, however far away the mean is."""
    x = ratio + jax.random.normal(key, (64, 6, 6, 4))
    estimator = FACTORIES[name]()
    if name == "streaming_batch_norm":
        layer = LAYERS["conv"]
        z = jax.random.normal(key, (16, 5, 5, 2))
        params = {"kernel": layer.params(key)["kernel"], "bias": jnp.full(4, ratio)}
        x, statistics, _ = train(
            estimator, init(estimator, layer, params), layer, params, z
        )
    elif name == "group_batch_norm":
        estimator = cbn.group_batch_norm(0.0, num_groups=1, order="parallel")
        statistics, _ = estimator.train(estimator.init(4), x)
    else:
        statistics, _ = estimator.train(estimator.init(4), x)
    y = np.float64(cbn.normalize(x, statistics))
    tolerance = 3e-2 if ratio == 1e5 else 1e-3
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1.0, rtol=tolerance)


ALONE = [
    "carried_batch_norm",
    "streaming_batch_norm",
    "replay_batch_norm",
    "small_batch_norm",
    "group_batch_norm",
    "group_norm",
    "bidirectional_batch_norm",
    "filter_response_norm",
    "moving_average_batch_norm",
    "online_norm",
]


@pytest.mark.parametrize("name", KINDS)
def test_one_example_without_space(name, key):
    """Methods that know more than the batch take it; the others say what to do."""
    run = functools.partial(steps, name, LAYER.params(key), batches_of(key, 1))
    if name in ALONE:
        assert_finite(run())
    else:
        with pytest.raises(
            ValueError, match=r"one value per|at least two examples|a multiple of 2"
        ):
            run()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", sorted(set(KINDS) - SAMPLING))
def test_half_precision_is_float32_rounded(name, dtype, key):
    """Statistics of half-precision activations are taken in float32."""
    estimator = FACTORIES[name]()
    params = jax.tree.map(lambda p: p.astype(dtype), LAYER.params(key))
    z = LAYER.data(key).astype(dtype)
    x, statistics, after = train(
        estimator, init(estimator, LAYER, params), LAYER, params, z
    )
    y = cbn.normalize(x, statistics)
    assert y.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves((statistics, after))} == {
        jnp.dtype("float32")
    }
    exact = cbn.normalize(x.astype(jnp.float32), statistics)
    np.testing.assert_array_equal(y, exact.astype(dtype))
    np.testing.assert_allclose(
        cbn.batch_moments(x).mean, np.float64(x).mean(axis=0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_inference_is_as_good_as_flax(dtype, key):
    """At mean 100, where a rounded mean is a large part of a standard deviation."""
    x = (100.0 + jax.random.normal(key, (256, 8))).astype(dtype)
    wide = np.float64(x)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    mean, var = (jnp.float32(v) for v in (wide.mean(0), wide.var(0)))
    estimator = cbn.batch_norm()
    ours = cbn.normalize(x, estimator.infer(cbn.from_batch_stats(mean, var), x))
    module = nn.BatchNorm(use_running_average=True, dtype=dtype)
    variables = {
        "params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
        "batch_stats": {"mean": mean, "var": var},
    }
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = module.apply(variables, x)
    assert ours.dtype == dtype
    error = np.abs(np.float64(ours) - expected).max()
    assert error <= np.abs(np.float64(theirs) - expected).max()
    assert error <= 2 * np.abs(expected).max() * float(jnp.finfo(dtype).eps)


@estimators
def test_float64_stays_float64(name, key, x64):
    estimator = FACTORIES[name]()
    params, z = LAYER.params(key, jnp.float64), LAYER.data(key, jnp.float64)
    state = init(estimator, LAYER, params)
    x, statistics, after = train(estimator, state, LAYER, params, z)
    assert cbn.normalize(x, statistics).dtype == jnp.float64
    assert {leaf.dtype for leaf in statistics} == {jnp.dtype(jnp.float64)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
