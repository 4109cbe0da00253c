"""Every method, by every way to call it, on whatever comes: against float64.

``pytest tests/test_any_input.py --hypothesis-profile=long`` tries all ways, and many more
inputs. No input compiles a program: shapes are fixed, and the programs are kept.
"""

import functools
import itertools

import hostile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standing
from cases import FACTORIES, GROUPS, KINDS
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
import cbn_jax.linen
import cbn_jax.nnx

SHAPE = N, T, C = 4, 6, 4
AXIS = "data"
LONG = settings().max_examples > 100
LAYERED = {
    "carried_batch_norm",
    "cross_iteration_batch_norm",
    "streaming_batch_norm",
    "replay_batch_norm",
    "small_batch_norm",
}
# Normalize two examples together, or predict by the whole batch.
TOGETHER = {"ghost_batch_norm", "mixed_inference"}
CALLS = ("functions", "linen", "nnx")
SPREADS = ("plain", "vmap", "devices")
EYE = np.eye(C, dtype=np.float32)


def ways():
    """(call, spread, masked). The short profile pairs each call with each of the others."""
    every = [*itertools.product(CALLS, SPREADS, (True, False))]
    short = [
        ("functions", "plain", True),
        ("functions", "plain", False),
        ("functions", "vmap", True),
        ("functions", "devices", True),
        ("linen", "plain", True),
        ("nnx", "vmap", False),
        ("nnx", "plain", True),
        ("linen", "devices", False),
    ]
    return every if LONG else short


# Three ways to make one function (xs, masks) -> outputs of two training steps and a
# prediction, on one device or on each of several.


def by_functions(name, axis_name):
    estimator = FACTORIES[name]()

    def run(xs, masks):
        kernel = jnp.asarray(EYE, xs[0].dtype)
        state, outputs = estimator.init(C, cbn.dense, kernel), []
        for x, mask in zip(xs[:2], masks[:2], strict=True):
            source = None
            if name in LAYERED:
                x, source = cbn.run_layer(cbn.dense, kernel, x)
            statistics, state = estimator.train(
                state, x, source, axis_name=axis_name, mask=mask
            )
            outputs.append(cbn.normalize(x, statistics))
        statistics = estimator.infer(state, xs[2], mask=masks[2])
        return *outputs, cbn.normalize(xs[2], statistics)

    return run


def by_linen(name, axis_name):
    layer = nn.Dense(C, use_bias=False) if name in LAYERED else None
    norm = cbn_jax.linen.Norm(FACTORIES[name](), layer, axis_name=axis_name)
    variables = norm.init(jax.random.key(0), jnp.ones(SHAPE), True)
    if layer is not None:
        variables["params"]["layer"]["kernel"] = jnp.asarray(EYE)

    def run(xs, masks):
        collections, outputs = variables, []
        for x, mask in zip(xs[:2], masks[:2], strict=True):
            y, updates = norm.apply(
                collections, x, False, mask=mask, mutable=["batch_stats"]
            )
            collections = {**collections, **updates}
            outputs.append(y)
        return *outputs, norm.apply(collections, xs[2], True, mask=masks[2])

    return run


def by_nnx(name, axis_name):
    rngs, layer = nnx.Rngs(0), None
    if name in LAYERED:
        layer = nnx.Linear(C, C, use_bias=False, rngs=rngs)
        layer.kernel.set_value(jnp.asarray(EYE))
    options = {"num_features": C, "axis_name": axis_name, "rngs": rngs}
    graph, state = nnx.split(cbn_jax.nnx.Norm(FACTORIES[name](), layer, **options))

    def run(xs, masks):
        # Values of this trace, which the module may write.
        norm = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        outputs = [norm(x, mask=m) for x, m in zip(xs[:2], masks[:2], strict=True)]
        return *outputs, norm(xs[2], True, mask=masks[2])

    return run


def on_four(run):
    """``run`` by four devices, an example each."""
    mesh = jax.make_mesh(
        (N,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:N]
    )
    return jax.shard_map(run, mesh=mesh, in_specs=P(None, AXIS), out_specs=P(AXIS))


def mapped(run):
    """``run`` over an axis of ``vmap``, an example at each index."""

    def split(tree):
        return jax.tree.map(lambda leaf: leaf[:, :, None], tree)

    def whole(xs, masks):
        each = jax.vmap(run, in_axes=1, out_axes=0, axis_name=AXIS)
        outputs = each(split(xs), split(masks))
        return jax.tree.map(lambda leaf: leaf[:, 0], outputs)

    return whole


@functools.cache
def program(name, call, spread, masked):
    make = {"functions": by_functions, "linen": by_linen, "nnx": by_nnx}[call]
    run = make(name, None if spread == "plain" else AXIS)

    def unstacked(xs, masks):
        masks = masks if masked else [None] * len(xs)
        return run(list(xs), list(masks))

    return jax.jit(
        {"plain": lambda f: f, "vmap": mapped, "devices": on_four}[spread](unstacked)
    )


def outputs_of(way, name, batches, dtype, junk=None):
    """What the program gives for these batches, with junk where nothing counts."""
    call, spread, masked = way
    xs = np.stack(
        [
            np.where(b.mask, b.x, b.junk if junk is None else junk) if masked else b.x
            for b in batches
        ]
    ).astype(dtype)
    masks = np.stack([positions_of(name, b.mask) for b in batches])
    return program(name, call, spread, masked)(xs, masks)


def positions_of(name, mask):
    """Methods with a layer take one mask for all features."""
    return mask[..., :1] if name in LAYERED else mask


def expected_of(way, name, batches, dtype):
    """Oracle's outputs, and how far from them float32 may be."""
    oracle = standing.ORACLES[name](C)
    seen, kept, results = np.zeros((1, 1, C)), np.zeros(C), []
    for step, b in zip((oracle.train, oracle.train, oracle.infer), batches, strict=True):
        x = b.x.astype(dtype).astype(np.float64)
        mask = positions_of(name, b.mask) & np.ones(SHAPE, bool)
        mask = mask if way[2] else np.ones(SHAPE, bool)
        x = np.where(mask, x, 0.0)
        seen = np.maximum(seen, np.abs(x).max((0, 1), keepdims=True))
        largest = seen
        if name in GROUPS:
            largest = seen.reshape(1, 1, 2, -1).max(-1, keepdims=True).repeat(C // 2, -1)
            largest = largest.reshape(1, 1, C)
        y, gain = step(x, mask)
        mask = mask & (np.abs(y) < float(jnp.finfo(dtype).max))  # an overflow is right
        # The mean has the rounding of the largest value, the variance one of 1e-5.
        bound = 1e-6 * largest * gain
        if name in GROUPS:
            # A second normalizer spreads the rounding of one example over all of them, and
            # its averages keep it.
            inside = oracle.group(x, mask)[1]
            kept = np.maximum(kept, (1e-6 * largest * inside).max((0, 1)))
            bound = kept * (gain / inside).max((0, 1)) * (1 + np.abs(y))
        bound = bound + 2e-5 * (1 + np.abs(y))
        bound = bound + float(jnp.finfo(dtype).eps) * np.abs(y)
        results.append((y, bound, mask))
    return results


def check(way, name, batches, dtype):
    outputs = outputs_of(way, name, batches, dtype)
    # A regression is tested elsewhere; a published prediction looks at its own batch, which
    # no device knows whole.
    apart = name == "group_norm_plus" and way[1] != "plain"
    last = 2 if name == "fitted_inference" or apart else 3
    for i, (y, bound, mask) in enumerate(expected_of(way, name, batches, dtype)[:last]):
        assert outputs[i].dtype == dtype
        error = np.where(mask, np.abs(np.float64(outputs[i]) - y), 0.0)
        assert (error <= bound).all(), (i, (error / bound).max())
    if way[2]:
        cleared = outputs_of(way, name, batches, dtype, junk=0.0)
        for y, other, b in zip(outputs, cleared, batches, strict=True):
            mask = positions_of(name, b.mask) & np.ones(SHAPE, bool)
            assert not np.isnan(np.where(mask, y, 0)).any()
            np.testing.assert_array_equal(np.where(mask, y, 0), np.where(mask, other, 0))


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
    ("name", "way"),
    [(n, w) for n in KINDS for w in ways() if w[1] == "plain" or n not in TOGETHER],
    ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each)),
)
@given(data=st.data())
def test_any_input_of_float32(name, way, data):
    batches = data.draw(hostile.batches(SHAPE, per_feature=name not in LAYERED))
    check(way, name, batches, np.float32)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_any_input_of_half_precision(name, dtype, data):
    """A result is the exact one, rounded once."""
    batches = data.draw(
        hostile.batches(SHAPE, per_feature=name not in LAYERED, dtype=np.float16)
    )
    check(("functions", "plain", True), name, batches, dtype)
