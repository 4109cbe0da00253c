"""Meshes of two axes, meshes with explicit axes, and what the devices remember."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, LAYERS, eager_train, init, make
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
import cbn_jax.linen
import cbn_jax.nnx

pytestmark = pytest.mark.usefixtures("eight_devices")
DEVICES = 8
OUTER, INNER = 2, 4
BOTH = ("outer", "inner")
WHOLE = P(BOTH)
subgroups = pytest.mark.parametrize(
    "name",
    [
        "batch_norm",
        "cross_iteration_batch_norm",
        "streaming_batch_norm",
        "replay_batch_norm",
        "group_batch_norm",
    ],
)
# What runs under explicit axes as it is; the others need jax.sharding.auto_axes.
EXPLICIT = {
    "cross_iteration_batch_norm",
    "batch_norm",
    "batch_renorm",
    "bidirectional_batch_norm",
    "carried_batch_norm",
    "diminishing_batch_norm",
    "filter_response_norm",
    "frozen",
    "group_batch_norm",
    "group_norm",
    "group_norm_plus",
    "mixed_inference",
    "momentum_batch_norm",
    "moving_average_batch_norm",
    "corrected_inference",
    "adaptive_batch_norm",
}


def make_loss(estimator, layer, axis_name=None):
    """The mean loss of this program's examples, with the state and the outputs."""

    def loss_fn(params, state, z, target):
        x, statistics, state = eager_train(
            estimator, state, layer, params, z, axis_name=axis_name
        )
        y = cbn.normalize(x, statistics)
        return jnp.square(y - target).mean(), (state, y)

    return loss_fn


def batch_of(layer, params, key):
    z = layer.data(key, examples=2 * DEVICES)
    target = jax.random.normal(
        jax.random.fold_in(key, 1), jax.eval_shape(layer.fn, params, z).shape
    )
    return z, target


def assert_equal(actual, expected, rtol=2e-4, atol=2e-5):
    chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(expected), rtol=rtol, atol=atol
    )


# Sub-groups: statistics over one axis of a mesh, gradients over both.


def mesh_of_groups():
    return jax.make_mesh((OUTER, INNER), BOTH, axis_types=(AxisType.Auto,) * 2)


def make_step(estimator, layer, axis_name, spec):
    """Parameters everywhere, a state for each index of ``spec``'s axis."""
    loss_fn = make_loss(estimator, layer, axis_name)

    def step(params, states, z, target):
        state = jax.tree.map(lambda leaf: leaf[0], states)

        def global_loss(params):
            loss, (after, y) = loss_fn(params, state, z, target)
            return jax.lax.pmean(loss, BOTH), (after, y)

        gradients, (after, y) = jax.grad(global_loss, has_aux=True)(params)
        return gradients, jax.tree.map(lambda leaf: leaf[None], after), y

    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh_of_groups(),
            in_specs=(P(), spec, WHOLE, WHOLE),
            out_specs=(P(), spec, WHOLE),
        )
    )


def run_groups(step, estimator, layer, groups, key, steps=3):
    """Gradients, states and outputs of some steps of plain descent."""
    params = layer.params(key)
    states = jax.tree.map(
        lambda leaf: np.stack([leaf] * groups), init(estimator, layer, params)
    )
    found = []
    for i in range(steps):
        batch = batch_of(layer, params, jax.random.fold_in(key, i))
        gradients, states, y = step(params, states, *batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        found.append(jax.device_get((gradients, states, y)))
    return found


def groups_on_one_device(estimator, layer, groups):
    """Every group by itself, and the gradient of their mean loss."""
    loss_fn = make_loss(estimator, layer)

    def mean_loss(params, states, *batch):
        batch = [a.reshape(groups, -1, *a.shape[1:]) for a in batch]
        each = [
            loss_fn(params, *jax.tree.map(lambda leaf, g=g: leaf[g], (states, *batch)))
            for g in range(groups)
        ]
        losses, (states, y) = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        return losses.mean(), (states, y.reshape(-1, *y.shape[2:]))

    @jax.jit
    def step(*args):
        gradients, (states, y) = jax.grad(mean_loss, has_aux=True)(*args)
        return gradients, states, y

    return step


@subgroups
def test_an_axis_of_a_mesh_makes_groups(name, key):
    """Four devices are one, and know nothing of the other four."""
    layer, estimator = LAYERS["dense"], make(name)
    step = make_step(estimator, layer, "inner", P("outer"))
    alone = groups_on_one_device(estimator, layer, OUTER)
    actual = run_groups(step, estimator, layer, OUTER, key)
    assert_equal(actual, run_groups(alone, estimator, layer, OUTER, key))
    _, states, _ = actual[-1]
    first, second = getattr(states, "running", states).mean
    assert np.abs(first - second).max() > 1e-3


@subgroups
def test_both_axes_are_the_whole_batch(name, key):
    layer, estimator = LAYERS["dense"], make(name)
    step = make_step(estimator, layer, BOTH, P())
    alone = groups_on_one_device(estimator, layer, 1)
    assert_equal(
        run_groups(step, estimator, layer, 1, key),
        run_groups(alone, estimator, layer, 1, key),
    )


# Explicit axes, the default of jax.make_mesh: shardings are part of the types.


def explicit_mesh():
    return jax.make_mesh((DEVICES,), ("data",))


def step_and_arguments(name, layer, key):
    """A gradient step under ``jit``, and arrays of the host for it."""
    estimator = make(name)
    params = layer.params(key)
    loss_fn = make_loss(estimator, layer)

    def step(params, state, z, target):
        gradients, (state, y) = jax.grad(loss_fn, has_aux=True)(params, state, z, target)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), state, y

    arguments = params, init(estimator, layer, params), *batch_of(layer, params, key)
    return step, jax.device_get(arguments)


def on_mesh(mesh, params, state, *batch):
    return (
        *jax.device_put((params, state), NamedSharding(mesh, P())),
        *jax.device_put(batch, NamedSharding(mesh, P("data"))),
    )


@pytest.mark.parametrize("name", KINDS)
def test_what_explicit_axes_take(name, key):
    """As shardings are types, tracing decides."""
    step, arguments = step_and_arguments(name, LAYERS["dense"], key)
    mesh = explicit_mesh()
    refused = pytest.raises(Exception, match=r"[Ss]hard")
    with jax.set_mesh(mesh), contextlib.nullcontext() if name in EXPLICIT else refused:
        _, state, y = jax.eval_shape(step, *on_mesh(mesh, *arguments))
        assert y.sharding.spec[0] == "data"
        for leaf in jax.tree.leaves(state):
            assert set(leaf.sharding.spec) <= {None}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("batch_norm", "dense"),
        ("batch_norm", "conv"),
        ("cross_iteration_batch_norm", "dense"),
        ("streaming_batch_norm", "conv"),
        ("replay_batch_norm", "dense"),
        ("group_batch_norm", "dense"),
    ],
)
def test_training_under_explicit_axes(name, layer, key):
    """``auto_axes`` around the step, for those that need it."""
    step, arguments = step_and_arguments(name, LAYERS[layer], key)
    expected, mesh = jax.jit(step)(*arguments), explicit_mesh()
    if name not in EXPLICIT:
        step = jax.sharding.auto_axes(step, out_sharding=(P(), P(), P("data")))
    with jax.set_mesh(mesh):
        actual = jax.jit(step)(*on_mesh(mesh, *arguments))
    assert actual[-1].sharding.spec[0] == "data"
    assert_equal(actual, expected)


# What replay remembers is on every device.


@pytest.mark.parametrize("way", ["sharded jit", "shard_map"])
def test_every_device_remembers_all(way, key):
    """Rows of ``window − 1`` iterations, ``samples`` each, the same everywhere."""
    window, samples = 4, 2 * DEVICES
    layer = LAYERS["dense"]
    estimator = cbn.replay_batch_norm(window=window, samples=samples)
    params = layer.params(key)
    state = init(estimator, layer, params)
    axis_name = "data" if way == "shard_map" else None
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def step(state, z):
        return eager_train(estimator, state, layer, params, z, axis_name=axis_name)[-1]

    if way == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    for i in range(2):
        z = layer.data(jax.random.fold_in(key, i), examples=samples)
        z = jax.device_put(z, NamedSharding(mesh, P("data")))
        state = jax.jit(step)(state, z)
    rows = (window - 1) * samples
    assert int(np.count_nonzero(state.size)) == 2 * samples
    for leaf in jax.tree.leaves((state.patches, state.size)):
        assert leaf.sharding.is_fully_replicated
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == DEVICES
        for shard in shards:
            assert len(shard) == rows
            np.testing.assert_array_equal(shard, shards[0])
    kernel, bias = 5, 1  # numbers in a row, in addition to its size
    held = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves((state.patches, state.size))
    )
    assert held == 4 * rows * (kernel + bias + 1)


# Parameters that are spread over devices.


METHODS = {
    "streaming": (cbn.streaming_batch_norm(3), P(None, "model"), P("model")),
    "cross_iteration": (
        cbn.cross_iteration_batch_norm(3),
        P(None, None, "model"),
        P(None, "model"),
    ),
}


def expected_specs(specs, kernel, bias):
    """The arrays like a parameter, with slots or without, are spread like it."""

    def check(path, spec):
        names = [key.key for key in path]
        if names[-2:-1] in (["d_var"], ["params"]):
            assert spec == (kernel if names[-1] == "kernel" else bias), names
        else:
            assert spec == P(), names

    jax.tree.map_with_path(check, specs, is_leaf=lambda node: isinstance(node, P))


@pytest.mark.parametrize("name", METHODS)
def test_a_linen_state_is_sharded_like_the_parameters(name, key):
    estimator, kernel, bias = METHODS[name]
    dense = nn.Dense(
        4,
        kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
    )
    norm = cbn_jax.linen.Norm(estimator, dense, use_running_average=False)
    plain = cbn_jax.linen.Norm(estimator, nn.Dense(4), use_running_average=False)
    z = jax.random.normal(key, (8, 3))
    variables = norm.init(key, z)
    expected_specs(nn.get_partition_spec(variables)["batch_stats"], kernel, bias)
    y, updates = norm.apply(variables, z, mutable=["batch_stats"])
    expected_specs(nn.get_partition_spec(updates)["batch_stats"], kernel, bias)
    same = plain.apply(nn.meta.unbox(variables), z, mutable=["batch_stats"])
    chex.assert_trees_all_close((y, nn.meta.unbox(updates)), same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_an_nnx_state_is_sharded_like_the_parameters(name, key):
    estimator, kernel, bias = METHODS[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    bias_init = nnx.with_partitioning(nnx.initializers.zeros, ("model",))
    options = {"kernel_init": kernel_init, "bias_init": bias_init}
    z = jax.random.normal(key, (8, 3))
    with jax.set_mesh(mesh):
        rngs = nnx.Rngs(0)
        dense = nnx.Linear(3, 4, rngs=rngs, **options)
        norm = cbn_jax.nnx.Norm(estimator, dense, rngs=rngs)
        y = norm(z)
        stats = nnx.state(norm, nnx.BatchStat)
        expected_specs(nnx.to_pure_dict(nnx.get_partition_spec(stats)), kernel, bias)
    plain = cbn_jax.nnx.Norm(
        estimator, nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
    )
    np.testing.assert_allclose(y, plain(z), rtol=1e-5, atol=1e-6)
