import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cbn_jax as cbn
from cbn_jax.core.statistics import blend

SHAPES = [(2, 3), (64, 3), (4, 16, 16, 3), (2, 1024, 3)]


def far_from_zero(shape, ratio, seed=0):
    """Values with mean/std = ratio, as float32 holds them."""
    values = np.random.default_rng(seed).normal(size=shape)
    return np.float32(ratio + values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e3, 1e4, 1e5])
def test_accurate_at_any_mean(shape, ratio):
    x = far_from_zero(shape, ratio)
    moments = jax.jit(cbn.batch_moments)(x)
    axes = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(moments.var, np.var(np.float64(x), axes), rtol=1e-5)
    np.testing.assert_allclose(
        moments.mean, np.mean(np.float64(x), axes), rtol=2e-7, atol=1e-6
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e5])
def test_accurate_across_devices(ratio, masked):
    """Two values on each of eight devices, whose own means differ."""
    x = far_from_zero((8, 2, 3), ratio)
    mask = np.ones((8, 2, 1), bool)
    mask[1, 0] = mask[5] = not masked
    moments = jax.vmap(
        lambda x, m: cbn.batch_moments(x, axis_name="d", mask=m if masked else None),
        axis_name="d",
        out_axes=None,
    )(x, mask)
    kept = np.float64(x)[mask[..., 0]]
    np.testing.assert_allclose(moments.var, kept.var(0), rtol=1e-5)
    np.testing.assert_array_equal(moments.size, [len(kept)] * 3)


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e5])
def test_accurate_under_a_mask(ratio):
    x = far_from_zero((32, 8, 3), ratio)
    mask = np.random.default_rng(1).random((32, 8, 1)) < 0.7
    moments = cbn.batch_moments(x, mask=mask)
    kept = np.float64(x)[mask[..., 0]]
    np.testing.assert_allclose(moments.var, kept.var(0), rtol=1e-5)
    np.testing.assert_allclose(moments.size, [mask.sum()] * 3)


@pytest.mark.parametrize("place", [0, -1])
def test_accurate_with_an_outlier_at_the_edge(place):
    x = np.random.default_rng(0).normal(size=(4096, 1)).astype(np.float32)
    x[place] = 300.0
    moments = cbn.batch_moments(x)
    np.testing.assert_allclose(moments.var, np.var(np.float64(x), 0), rtol=1e-5)


def test_mask_per_feature():
    x = jnp.arange(8.0).reshape(4, 2)
    mask = jnp.array([[True, False], [True, False], [False, False], [True, False]])
    moments = cbn.batch_moments(x, mask=mask)
    np.testing.assert_allclose(moments.mean, [np.mean([0, 2, 6]), 0.0], rtol=1e-6)
    np.testing.assert_allclose(moments.var, [np.var([0, 2, 6]), 0.0], rtol=1e-6)
    np.testing.assert_array_equal(moments.size, [3, 0])


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    shift=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_pooling_groups_is_the_moments_of_their_union(sizes, shift, seed):
    rng = np.random.default_rng(seed)
    groups = [np.float32(shift + rng.normal(size=(n, 2))) for n in sizes]
    each = [cbn.batch_moments(g) for g in groups]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    pooled = cbn.pool_moments(stacked)
    union = np.float64(np.concatenate(groups))
    np.testing.assert_allclose(pooled.mean, union.mean(0), rtol=1e-6, atol=1e-6)
    # Group means are float32 numbers: at 1e4 they are rounded to 1e-3.
    np.testing.assert_allclose(pooled.var, union.var(0), rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(pooled.size, [len(union)] * 2)


def spike(noise, place):
    """A click map: one large value, and little else."""
    noise = 0.01 * noise
    noise[place] = 100.0
    return noise


# By the values and the index of the middle position.
HARD = {
    "a spike first": lambda noise, _: spike(noise, 0),
    "a spike in the middle": spike,
    "a spike last": lambda noise, _: spike(noise, -1),
    "a spike and zeros": lambda noise, middle: spike(0.0 * noise, middle),
    "a spike, far": lambda noise, middle: spike(noise, middle) + 1e3,
    "ascending": lambda noise, _: np.sort(noise, 0),
    "descending in size": lambda noise, _: np.take_along_axis(
        noise, np.argsort(-np.abs(noise), 0), 0
    ),
    "far": lambda noise, _: noise + 1e4,
    "two neighbors": lambda noise, _: np.where(noise > 0, 1e7, 1e7 + 1.0),
}


def hard(case, shape):
    noise = np.random.default_rng(0).normal(size=(np.prod(shape[:-1]), shape[-1]))
    middle = np.ravel_multi_index([0, *(n // 2 for n in shape[1:-1])], shape[:-1])
    return np.float32(HARD[case](noise, middle)).reshape(shape)


measure = jax.jit(cbn.batch_moments)


@pytest.mark.program
@pytest.mark.parametrize("case", HARD)
def test_sums_of_positive_values_have_the_error_of_the_derivation(case):
    """XLA adds in a tree. One by one, 160³ values would lose three digits more."""
    x = np.square(hard(case, (1, 160, 160, 160, 1)))
    total = jax.jit(lambda x: x.sum(tuple(range(x.ndim - 1))))(x)
    np.testing.assert_allclose(total, np.float64(x).sum((0, 1, 2, 3)), rtol=5e-7)


@pytest.mark.program
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize(
    "shape", [(1, 160, 160, 160, 1), (1, 640, 368, 2), (4096, 3), (2, 64, 64, 4)]
)
def test_variances_keep_their_digits(shape, case):
    """The relative error is at most 1e-5, whatever the position, order and mean."""
    x = hard(case, shape)
    expected = np.var(np.float64(x), tuple(range(x.ndim - 1)))
    np.testing.assert_allclose(measure(x).var, expected, rtol=1e-5)
    everything = np.ones((1,) * x.ndim, bool)
    np.testing.assert_allclose(measure(x, mask=everything).var, expected, rtol=1e-5)


@pytest.mark.program
@pytest.mark.parametrize("case", HARD)
def test_variances_keep_their_digits_on_eight_devices(case, eight_devices):
    x = hard(case, (8, 64, 64, 2)).reshape(8, 1, 64, 64, 2)
    mask = np.ones((8, 1, 64, 64, 1), bool)
    mask[0] = False  # the first device has nothing to say
    expected = np.var(np.float64(x), (0, 1, 2, 3)), np.var(np.float64(x[1:]), (0, 1, 2, 3))
    for each, var in zip((None, mask), expected, strict=True):

        def local(x, mask):
            return cbn.batch_moments(x, axis_name="data", mask=mask)

        moments = jax.jit(jax.vmap(local, axis_name="data"))(x, each)
        np.testing.assert_allclose(moments.var[0], var, rtol=1e-5)


def test_a_small_variance_is_averaged_with_all_its_digits():
    """The start of the average, 1, has no part in it."""
    x = 1e-3 * jnp.arange(8.0)[:, None]
    _, state = cbn.batch_norm().train(cbn.batch_norm().init(1), x)
    np.testing.assert_allclose(state.var, np.var(np.float64(x)), rtol=1e-6)


def test_pooling_ignores_empty_groups():
    moments = cbn.Moments(
        mean=jnp.array([[9.0], [1.0]]),
        var=jnp.array([[9.0], [2.0]]),
        size=jnp.array([[0.0], [3.0]]),
    )
    pooled = cbn.pool_moments(moments)
    np.testing.assert_array_equal(pooled.mean, [1.0])
    np.testing.assert_array_equal(pooled.var, [2.0])
    empty = cbn.pool_moments(jax.tree.map(lambda leaf: leaf[:1], moments))
    assert np.isfinite(jnp.stack(empty)).all()
    np.testing.assert_array_equal(empty.size, [0.0])


@pytest.mark.program
def test_activations_are_read_once_per_sum():
    """Nothing of the activations' size is written; on CPU each sum reads them once."""

    def bytes_moved(n):
        x = jax.ShapeDtypeStruct((2, n // 2, 64), jnp.float32)
        compiled = jax.jit(cbn.batch_moments).lower(x).compile()
        return compiled.cost_analysis()["bytes accessed"]

    size = 2**14 * 64 * 4
    reads = (bytes_moved(2**15) - bytes_moved(2**14)) / size
    assert reads == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_has_float32_moments(dtype):
    x = jnp.asarray(far_from_zero((512, 3), 10.0), dtype)
    moments = cbn.batch_moments(x)
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(moments.var, np.var(np.float64(x), 0), rtol=1e-5)


def test_normalize_rounds_once():
    x = jnp.asarray(far_from_zero((64, 3), 100.0), jnp.bfloat16)
    statistics = cbn.Statistics(jnp.full(3, 100.3), jnp.full(3, 1.7))
    scale, bias = jnp.full(3, 0.7), jnp.full(3, 0.1)
    y = cbn.normalize(x, statistics, scale, bias)
    exact = (np.float64(x) - 100.3) * 1.7 * 0.7 + 0.1
    np.testing.assert_allclose(np.float64(y), exact, rtol=2**-8, atol=1e-4)


def test_normalize_with_identity_statistics_is_the_identity():
    x = jnp.asarray(far_from_zero((5, 3), 3.0))
    identity = cbn.Statistics(jnp.zeros(3), jnp.ones(3))
    np.testing.assert_array_equal(cbn.normalize(x, identity), x)


def test_normalize_takes_statistics_per_example():
    x = jnp.asarray(far_from_zero((4, 5, 3), 0.0))
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True)
    y = cbn.normalize(x, cbn.Statistics(mean, 1 / std))
    np.testing.assert_allclose(y.mean(1), 0.0, atol=1e-6)


@pytest.mark.program
def test_no_rounding_makes_a_variance_negative():
    """The two sums of a constant, whose mean under a mask is rounded."""
    x = jnp.broadcast_to(jnp.linspace(0.1, 3.0, 2000), (7, 2000))
    var = measure(x, mask=jnp.ones((7, 1), bool)).var
    assert (var >= 0.0).all()
    assert (var < 1e-12).all()


@pytest.mark.program
def test_a_program_rounds_the_mean_once():
    """Else the means of devices lie apart by another rounding than the one corrected."""
    x = far_from_zero((4, 1, 6, 8), 1e4)

    def local(x):
        return cbn.batch_moments(x, axis_name="data")

    moments = jax.jit(jax.vmap(local, axis_name="data"))(x)
    expected = np.var(np.float64(x), (0, 1, 2))
    np.testing.assert_allclose(moments.var[0], expected, rtol=1e-5)


def test_a_blend_of_scales_of_zero_has_a_mean():
    """Variances that overflowed make everything zero, not NaN."""
    one = cbn.Statistics(jnp.array([1.0]), jnp.array([0.0]))
    other = cbn.Statistics(jnp.array([3.0]), jnp.array([0.0]))
    mean, inv_std = blend(jnp.array([0.5]), one, other)
    assert np.isfinite(mean).all()
    assert inv_std == 0.0
