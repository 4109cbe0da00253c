"""What holds for all data, tried on data that Hypothesis chooses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CORRECTED,
    FACTORIES,
    GROUPS,
    KINDS,
    LAYERS,
    PARTS,
    SAMPLING,
    UNCENTERED,
    init,
    train,
)
from hypothesis import given
from hypothesis import strategies as st

import cbn_jax as cbn

LAYER = LAYERS["dense"]

estimators = pytest.mark.parametrize("name", KINDS)
seeds = st.integers(0, 2**31 - 1)
powers = st.integers(-8, 8).map(lambda p: 2.0**p)  # products with them are exact
shifts = st.floats(-100, 100, width=32)
# Features that see each other, and averages that start at 0 and 1.
MIXED = GROUPS | {name for name in FACTORIES if "diminishing_batch_norm" in name}


@functools.cache
def step_of(name):
    """Two batches from the start, jitted: activations and the state after the second."""
    # Groups of two values become signs, whose rounding a small variance tells.
    groups = {"num_groups": 1} if name in GROUPS else {}
    estimator = FACTORIES[name](epsilon=1e-12, **groups)

    def steps(params, batches, masks):
        state = init(estimator, LAYER, params)
        outputs = []
        for z, mask in zip(batches, masks, strict=True):
            x, statistics, state = train(estimator, state, LAYER, params, z, mask=mask)
            outputs.append(cbn.normalize(x, statistics))
        return outputs, state, cbn.normalize(x, estimator.infer(state, x))

    return jax.jit(steps)


def draw(seed):
    key = jax.random.key(seed)
    batches = list(LAYER.data(key, examples=16).reshape(2, 8, -1))
    return LAYER.params(key), batches, [jnp.ones((8, 1), bool)] * 2


def assert_close(actual, expected, **tolerance):
    tolerance = {"rtol": 5e-3, "atol": 5e-3} | tolerance
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected
    )


@pytest.mark.parametrize("name", sorted(set(KINDS) - MIXED - UNCENTERED - PARTS))
@given(seed=seeds, factor=powers, shift=shifts)
def test_neither_scale_nor_shift_of_the_layer_matters(name, seed, factor, shift):
    """Normalized values do not depend on the units of the layer's output."""
    params, batches, masks = draw(seed)
    other = {"kernel": factor * params["kernel"], "bias": factor * params["bias"] + shift}
    expected, _, predicted = step_of(name)(params, batches, masks)
    actual, _, again = step_of(name)(other, batches, masks)
    assert_close(actual, expected)
    if name not in CORRECTED:  # their wrappers have an epsilon of their own
        assert_close(again, predicted)


@pytest.mark.parametrize("name", sorted(set(KINDS) - PARTS))
@given(seed=seeds, data=st.data())
def test_the_order_of_examples_does_not_matter(name, seed, data):
    params, batches, masks = draw(seed)
    order = jnp.array(data.draw(st.permutations(range(8))))
    outputs, state, predicted = step_of(name)(params, batches, masks)
    mixed, after, again = step_of(name)(params, [z[order] for z in batches], masks)
    expected = [y[order] for y in outputs], predicted[order]
    memories = {*SAMPLING, "streaming_batch_norm"}  # of a few positions, in an order
    if name not in memories:
        assert_close((mixed, again), expected)
    if name not in {*memories, "replay_batch_norm"}:
        assert_close(after, state)


@estimators
@given(seed=seeds, counts=st.lists(st.booleans(), min_size=8, max_size=8))
def test_what_does_not_count_is_as_if_it_were_not_there(name, seed, counts):
    """Only a mask of the same shape changes; masked values may be arbitrary."""
    if sum(counts) < 3:
        return
    params, batches, masks = draw(seed)
    mask = jnp.array(counts)[:, None]
    outputs, state, _ = step_of(name)(params, batches, [mask, masks[1]])
    # Replace what does not count by an example that is there anyway.
    junk = jnp.where(mask, batches[0], 1e3)
    again, after, _ = step_of(name)(params, [junk, batches[1]], [mask, masks[1]])
    kept = np.asarray(counts)
    assert_close([y[kept] for y in again[:1]], [y[kept] for y in outputs[:1]], atol=1e-5)
    assert_close((again[1], after), (outputs[1], state), atol=1e-5)


@given(
    seed=seeds,
    cuts=st.sets(st.integers(1, 15), max_size=4),
    shift=st.floats(-1e4, 1e4, width=32),
)
def test_pooled_chunks_are_the_whole(seed, cuts, shift):
    x = np.asarray(shift + jax.random.normal(jax.random.key(seed), (16, 3)))
    chunks = np.split(x, sorted(cuts))
    each = [
        cbn.Moments(c.mean(0), c.var(0), np.full(3, len(c), np.float32)) for c in chunks
    ]
    pooled = cbn.pool_moments(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    wide = np.float64(x)
    np.testing.assert_allclose(pooled.mean, wide.mean(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pooled.var, wide.var(0), rtol=2e-2, atol=1e-5)
    np.testing.assert_array_equal(pooled.size, 16.0)


@functools.cache
def mapped(name):
    estimator = FACTORIES[name](**({"num_groups": 1} if name in GROUPS else {}))

    def one(params, state, z, mask, axis_name):
        x, statistics, after = train(
            estimator, state, LAYER, params, z, axis_name=axis_name, mask=mask
        )
        return cbn.normalize(x, statistics), after

    def both(params, z, mask):
        state = init(estimator, LAYER, params)
        whole = one(params, state, z, mask, None)
        split = jax.tree.map(lambda leaf: leaf.reshape(4, 2, -1), (z, mask))
        parts = jax.vmap(
            functools.partial(one, params, state, axis_name="data"), axis_name="data"
        )(*split)
        return whole, parts

    return jax.jit(both)


@pytest.mark.parametrize("name", sorted(set(KINDS) - SAMPLING))
@given(seed=seeds, counts=st.lists(st.booleans(), min_size=8, max_size=8))
def test_synchronized_devices_are_one(name, seed, counts):
    """Whatever each device has to contribute."""
    params, (z, _), _ = draw(seed)
    mask = jnp.array(counts)[:, None]
    (y, state), (parts, states) = mapped(name)(params, z, mask)
    kept = np.asarray(counts)
    assert_close(parts.reshape(y.shape)[kept], y[kept], atol=1e-3)
    if "replay" not in name:  # the rows of a memory are in another order
        assert_close(jax.tree.map(lambda leaf: leaf[3], states), state, atol=1e-3)
