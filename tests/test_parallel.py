"""Eight devices give what one gives: outputs, gradients, states, whatever the context."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    FACTORIES,
    GROUPS,
    KINDS,
    LAYERS,
    SAMPLING,
    apply,
    eager_train,
    init,
    make,
    train,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn

pytestmark = pytest.mark.usefixtures("eight_devices")
DEVICES = 8
# One of each way to communicate.
estimators = pytest.mark.parametrize(
    "name",
    [
        "batch_norm",
        "cross_iteration_batch_norm",
        "cross_iteration_batch_norm-from_scratch",
        "replay_batch_norm",
        "streaming_batch_norm",
        "group_batch_norm",
        "fitted_inference",
    ],
)


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def make_step(estimator, layer, axis_name=None, global_gradient=False):
    """An SGD step whose loss is the mean over the whole batch.

    ``global_gradient``: inside checked ``shard_map``, the gradient of a loss averaged over
    the devices with respect to replicated parameters arrives summed.
    """
    optimizer = optax.sgd(0.1, momentum=0.9)

    def loss_fn(params, state, z, target):
        x, statistics, state = eager_train(
            estimator, state, layer, params, z, axis_name=axis_name
        )
        y = cbn.normalize(x, statistics)
        loss = jnp.square(y - target).mean()
        if axis_name is not None and global_gradient:
            loss = jax.lax.pmean(loss, axis_name)
        return loss, (state, y)

    def step(params, opt_state, state, z, target):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (state, y)), gradients = gradient(params, state, z, target)
        if axis_name is not None and not global_gradient:
            loss, gradients = jax.lax.pmean((loss, gradients), axis_name)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, state, loss, y

    return step, optimizer


# Layers of which nothing is known.
DIFFERENTIATED = {
    name: LAYERS[name]._replace(layer=LAYERS[name].layer._replace(patches=None))
    for name in ("dense", "conv")
}


def one_device(estimator, layer):
    return jax.jit(make_step(estimator, layer)[0])


def sharded_jit(estimator, layer):
    step = jax.jit(make_step(estimator, layer)[0])
    split = NamedSharding(mesh(), P("data"))

    def run(params, opt_state, state, z, target):
        return step(params, opt_state, state, *jax.device_put((z, target), split))

    return run


def shard_map(estimator, layer, check_vma):
    step, _ = make_step(estimator, layer, "data", global_gradient=check_vma)
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh(),
            in_specs=(P(), P(), P(), P("data"), P("data")),
            out_specs=(P(), P(), P(), P(), P("data")),
            check_vma=check_vma,
        )
    )


def mapped(transform, estimator, layer):
    """``pmap`` or ``vmap`` over a leading axis of devices, everything replicated."""
    step = transform(make_step(estimator, layer, "data")[0], axis_name="data")

    def run(params, opt_state, state, z, target):
        def split(batch):
            return batch.reshape(DEVICES, -1, *batch.shape[1:])

        copies = jax.tree.map(
            lambda leaf: np.stack([leaf] * DEVICES), (params, opt_state, state)
        )
        *out, y = jax.device_get(step(*copies, split(z), split(target)))
        for leaf in jax.tree.leaves(out):
            np.testing.assert_allclose(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return *jax.tree.map(lambda leaf: leaf[0], out), y.reshape(-1, *y.shape[2:])

    return run


CONTEXTS = {
    "sharded jit": sharded_jit,
    "shard_map": functools.partial(shard_map, check_vma=True),
    "shard_map unchecked": functools.partial(shard_map, check_vma=False),
    "pmap": functools.partial(mapped, jax.pmap),
    "vmap": functools.partial(mapped, jax.vmap),
}


@functools.cache
def expected_of(name, layer):
    estimator = make(name)
    return run(one_device(estimator, layer), estimator, layer, jax.random.key(0))


def run(step, estimator, layer, key, steps=4):
    params = layer.params(key)
    opt_state = make_step(estimator, layer)[1].init(params)
    state = init(estimator, layer, params)
    history = []
    for i in range(steps):
        z = layer.data(jax.random.fold_in(key, i), examples=2 * DEVICES)
        shape = jax.eval_shape(layer.fn, params, z).shape
        target = jax.random.normal(jax.random.fold_in(key, 50 + i), shape)
        params, opt_state, state, loss, y = step(params, opt_state, state, z, target)
        history.append((loss, y))
    return jax.device_get((params, opt_state, state, history))


@pytest.mark.parametrize(
    ("context", "layer"),
    [
        ("sharded jit", "dense"),
        ("shard_map", "dense"),
    ],
)
@estimators
def test_many_devices_are_one(context, layer, name, key):
    check_many_devices(context, layer, name, key)


@pytest.mark.parametrize("name", ["streaming_batch_norm", "cross_iteration_batch_norm"])
@pytest.mark.parametrize(
    ("context", "layer"),
    [
        ("shard_map unchecked", "dense"),
        ("pmap", "dense"),
        ("vmap", "dense"),
        ("sharded jit", "conv"),
        ("shard_map", "conv"),
    ],
)
def test_many_devices_are_one_in_other_contexts(context, layer, name, key):
    check_many_devices(context, layer, name, key)


@pytest.mark.parametrize("layer", DIFFERENTIATED)
@pytest.mark.parametrize("context", ["sharded jit", "shard_map", "pmap", "vmap"])
def test_differentiated_patches_on_many_devices(context, layer, key):
    """Each device differentiates its own examples, and no others."""
    check_layer(context, DIFFERENTIATED[layer], "streaming_batch_norm", key)


def check_many_devices(context, layer, name, key):
    check_layer(context, LAYERS[layer], name, key)


def check_layer(context, layer, name, key):
    estimator = make(name)
    expected = expected_of(name, layer)
    actual = run(CONTEXTS[context](estimator, layer), estimator, layer, key)
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@estimators
def test_masks_are_exact_across_devices(name, check_vma, key):
    """Unequal counts, one device without any value, NaN where nothing counts."""
    layer = LAYERS["dense"]
    estimator = make(name)
    params = layer.params(key)
    state = init(estimator, layer, params)
    z = layer.data(key, examples=2 * DEVICES)
    mask = jax.random.bernoulli(key, 0.6, (2 * DEVICES, 1)).at[4:6].set(False)

    def step(z, mask):
        return eager_train(estimator, state, layer, params, z, axis_name="data", mask=mask)[
            1:
        ]

    parallel = jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=(P("data"), P("data")),
        out_specs=(P("data") if name in GROUPS else P(), P()),
        check_vma=check_vma,
    )
    _, *expected = train(estimator, state, layer, params, z, mask=mask)
    actual = jax.jit(parallel)(z, mask)
    chex.assert_trees_all_close(actual, tuple(expected), rtol=1e-4, atol=1e-5)


def collectives(f, *args):
    """Those of every step, and not one that follows where a pivot is far off."""
    text = jax.jit(f).lower(*args).compile().as_text()
    every = text[text.index("ENTRY ") :]
    return re.findall(r"= .*? (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", every)


def forward_of(name, layer, masked, key):
    """A training call on eight devices, with its arguments."""
    estimator = make(name)
    params = layer.params(key)

    def forward(params, state, z):
        mask = jnp.ones((len(z),) + (1,) * (len(layer.inputs) - 1)) > 0 if masked else None
        x, statistics, after = eager_train(
            estimator, state, layer, params, z, axis_name="data", mask=mask
        )
        return cbn.normalize(x, statistics), after

    step = jax.shard_map(
        forward,
        mesh=mesh(),
        in_specs=(P(), P(), P("data")),
        out_specs=(P("data"), P()),
    )
    state = init(estimator, layer, params)
    return step, params, state, layer.data(key, examples=2 * DEVICES)


@pytest.mark.program
@pytest.mark.parametrize(
    ("name", "layer", "masked"),
    [
        *((name, "dense", True) for name in KINDS),
        ("streaming_batch_norm", "conv", False),
        ("cross_iteration_batch_norm", "conv", False),
    ],
)
def test_one_collective_forward(name, layer, masked, key):
    """Under an axis name, state and mask included; a fit needs the statistics first.

    Methods for single examples need nothing from the other devices.
    """
    alone = {"group_norm", "filter_response_norm"}
    expected = 2 if name == "fitted_inference" else 0 if name in alone else 1
    step = forward_of(name, LAYERS[layer], masked, key)
    assert collectives(*step) == ["all-reduce"] * expected


@pytest.mark.program
@pytest.mark.parametrize("devices", [2, 8])
def test_as_many_numbers_travel_on_any_number_of_devices(devices, key):
    """Three sums of each feature, at once."""
    masked = functools.partial(cbn.batch_moments, axis_name="data")
    some = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"mesh": some, "in_specs": P("data"), "out_specs": P()}
    f = jax.shard_map(lambda x, m: masked(x, mask=m), **specs)
    x = jax.random.normal(key, (16, 5))
    text = jax.jit(f).lower(x, x[:, :1] > 0).compile().as_text()
    (shapes,) = re.findall(r"= (.*?) all-reduce\(", text[text.index("ENTRY ") :])
    assert sum(map(int, re.findall(r"f32\[(\d+)\]", shapes))) == 3 * 5


@pytest.mark.parametrize("pivot", [None, 1e4, 1e4 + 2])
def test_moments_are_exact_about_any_pivot(pivot, key):
    """Far from it the devices add up their sums a second time."""
    x = 1e4 + jax.random.normal(key, (16, 5))
    guess = None if pivot is None else jnp.full(5, pivot)

    def f(x):
        return cbn.batch_moments(x, axis_name="data", pivot=guess)

    moments = jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=P("data"), out_specs=P()))(x)
    exact = np.float64(x)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(moments.var, exact.var(0), rtol=1e-5)


@pytest.mark.program
@pytest.mark.parametrize("layer", [LAYERS["dense"], LAYERS["conv"]])
def test_a_sharded_batch_needs_three_means(layer, key):
    """Under sharded ``jit``: small all-reduces of start, mean and squares, one backward."""
    estimator = cbn.batch_norm()
    state = estimator.init(layer.features)

    def forward(x):
        return cbn.normalize(x, estimator.train(state, x)[0])

    x = apply(layer, layer.params(key), layer.data(key, examples=2 * DEVICES))
    x = jax.device_put(x, NamedSharding(mesh(), P("data")))
    assert collectives(forward, x) == ["all-reduce"] * 3
    backward = jax.grad(lambda x: (forward(x) ** 3).sum())
    assert collectives(backward, x) == ["all-reduce"] * 4


def test_many_devices_sample_the_positions_of_one(key):
    """The same positions of every example, wherever the example is."""
    layer, estimator = LAYERS["conv"], cbn.streaming_batch_norm(3, samples=2 * DEVICES)
    params = layer.params(key)
    state = init(estimator, layer, params)
    z = layer.data(key, examples=DEVICES)

    def step(z):
        return eager_train(estimator, state, layer, params, z, axis_name="data")[1:]

    parallel = jax.shard_map(step, mesh=mesh(), in_specs=P("data"), out_specs=P())
    expected = train(estimator, state, layer, params, z)[1:]
    chex.assert_trees_all_close(jax.jit(parallel)(z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.program
@pytest.mark.parametrize("name", ["small_batch_norm", "streaming_batch_norm"])
def test_sampled_positions_stay_on_their_device(name, key):
    """Under sharded ``jit`` the patches are cut where the examples are.

    Only the patches travel, and not the inputs from which they are cut.
    """
    layer = LAYERS["conv"]
    estimator = FACTORIES[name]() if name in SAMPLING else cbn.streaming_batch_norm(3)
    params = layer.params(key)
    state = init(estimator, layer, params)
    z = layer.data(key, examples=2 * DEVICES)
    expected = train(estimator, state, layer, params, z)[1:]
    sharded = jax.device_put(z, NamedSharding(mesh(), P("data")))

    def step(z):
        return train(estimator, state, layer, params, z)[1:]

    chex.assert_trees_all_close(jax.jit(step)(sharded), expected, rtol=1e-4, atol=1e-5)
    assert set(collectives(step, sharded)) == {"all-reduce"}
