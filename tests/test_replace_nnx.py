"""Nnx models with a method of this library in place of each batch norm."""

import copy
import functools
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import NNX, Bottleneck, NnxBlock

import cbn_jax as cbn
from cbn_jax.nnx import Norm, replace_batch_norm, report, to_batch_norm

SMALL = cbn.small_batch_norm(2)
EXACT = cbn.replay_batch_norm(3, samples=400)  # of all positions
NO_LAYER = "its input is no layer's output"
models = pytest.mark.parametrize("name", NNX)


@pytest.fixture(autouse=True)
def traces():
    chex.clear_trace_counter()


assert_same = chex.assert_trees_all_equal


def assert_close(actual, expected, tolerance=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def pure(state):
    return nnx.to_pure_dict(state)


# The zoo. Programs are compiled once.


def inputs(name, seed=2):
    return NNX[name].data(jax.random.key(seed))


@functools.cache
def parts(name):
    """A model as a graph, parameters and the rest, on the host: steps donate theirs."""
    model = replace_batch_norm(NNX[name].make(), SMALL, inputs(name))
    return split(model)


def split(model):
    graph, params, others = nnx.split(model, nnx.Param, ...)
    return graph, *jax.device_get((params, others))


def make_step(graph, optimizer):
    def loss_fn(params, others, x):
        model = nnx.merge(graph, params, others, copy=True)
        loss = jnp.square(model(x) - 1).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def step(state, x):
        params, others, opt_state = state
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, others), gradients = gradient(params, others, x)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), others, opt_state), loss

    return step


@nnx.jit
def predict(model, x):
    return model(x)


def trained(name):
    """A model with averages of something."""
    model, rng = NNX[name].make(), np.random.default_rng(0)
    stats = jax.tree.map(
        lambda leaf: jnp.float32(rng.uniform(0.5, 2.0, leaf.shape)),
        nnx.state(model, nnx.BatchStat),
    )
    nnx.update(model, stats)
    return model


@models
def test_parameters_stay_the_same(name):
    model = NNX[name].make()
    new = replace_batch_norm(model, SMALL, inputs(name))
    assert_same(pure(nnx.state(new, nnx.Param)), pure(nnx.state(model, nnx.Param)))


@models
def test_each_norm_finds_its_layer(name):
    model = replace_batch_norm(NNX[name].make(), SMALL, inputs(name))
    rows = report(model).rows
    assert {row.path: row.layer for row in rows} == NNX[name].expected
    for row in rows:
        assert row.reason == ("" if row.layer else NO_LAYER)
        assert repr(row.estimator).startswith("small" if row.layer else "batch_renorm")


@models
def test_ten_steps_and_one_compilation(name, loose):
    optimizer, (graph, params, others) = optax.sgd(0.01, momentum=0.9), parts(name)
    step = chex.assert_max_traces(make_step(graph, optimizer), n=1)
    step = jax.jit(step, donate_argnums=0)
    state = jax.tree.map(jnp.array, (params, others, optimizer.init(params)))
    for i in range(10):
        state, loss = step(state, inputs(name, seed=i))
        assert np.isfinite(loss)
    chex.assert_tree_all_finite(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state[1], others)


@models
def test_a_trained_model_predicts_as_before(name):
    model = trained(name)
    new = replace_batch_norm(model, SMALL, inputs(name))
    model.eval(), new.eval()
    assert_same(predict(new, inputs(name)), predict(model, inputs(name)))


@models
def test_the_model_itself_is_unchanged(name):
    model, other = NNX[name].make(), NNX[name].make()
    replace_batch_norm(model, SMALL, inputs(name))
    (graph, state), (expected, before) = nnx.split(model), nnx.split(other)
    assert graph == expected
    assert_same(pure(state), pure(before))


def test_a_trained_optimizer_goes_on(loose):
    """``batch_norm`` trains as ``nnx.BatchNorm`` does, so that the steps are the same."""
    optimizer, model = optax.adam(1e-2), NNX["pyramid"].make()
    data = functools.partial(inputs, "pyramid")
    graph, params, others = split(model)
    state = params, others, optimizer.init(params)
    step = jax.jit(make_step(graph, optimizer))
    for i in range(2):
        state, _ = step(state, data(i))
    new = replace_batch_norm(nnx.merge(graph, *state[:2]), cbn.batch_norm(), data())
    new_graph, params, others = split(new)
    chex.assert_trees_all_equal(params, state[0])
    ours, _ = jax.jit(make_step(new_graph, optimizer))((params, others, state[2]), data(2))
    theirs, _ = step(state, data(2))
    assert_close((ours[0], ours[2]), (theirs[0], theirs[2]), 1e-5)


def test_a_checkpoint_comes_back(tmp_path):
    _, params, others = parts("u-net")
    state = pure(nnx.merge_state(params, others))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(np.zeros_like, state)
        restored = checkpointer.restore(tmp_path / "state", blank)
    assert_same(restored, state)


# What a model does, a model does that is written by hand with ``Norm``.


class ByHand(nnx.Module):
    """``Bottleneck`` with its parameters."""

    def __init__(self, block, estimator, kernel):
        norm = functools.partial(Norm, estimator, kernel=kernel, rngs=nnx.Rngs(0))
        self.bn1, self.bn2 = norm(block.conv1), norm(block.conv2)
        self.bn3 = norm(block.conv3, scale_init=nnx.initializers.zeros_init())

    def __call__(self, x):
        y = nnx.relu(self.bn1(x))
        return nnx.relu(self.bn3(nnx.relu(self.bn2(y))) + x)


def norms_of(block):
    return block.bn1, block.bn2, block.bn3


def block_input(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 6, 6, 8))


def steps_of(block, steps=3):
    """Outputs, states and gradients of some steps, while the weights move."""
    graph, params, others = nnx.split(block, nnx.Param, ...)

    @jax.jit
    def step(params, others, x):
        def loss_fn(params):
            block = nnx.merge(graph, params, others, copy=True)
            y = block(x)
            states = [norm.state for norm in norms_of(block)]
            others_after = nnx.state(block, nnx.Not(nnx.Param))
            return jnp.sin(y).sum(), (others_after, (y, states))

        return jax.grad(loss_fn, has_aux=True)(params)

    found = []
    for i in range(steps):
        gradients, (others, seen) = step(params, others, block_input(i))
        norms = norms_of(nnx.merge(graph, gradients, others))
        scales = [norm.scale.get_value() for norm in norms]
        found.append((seen, scales, _sizes(gradients)))
        params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(7 * leaf), params)
    return found


def _sizes(gradients):
    """The norms of all gradients, in an order that is that of no model."""
    return jnp.sort(
        jnp.stack([jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(gradients)])
    )


@pytest.mark.parametrize(
    ("estimator", "kernel"),
    [(SMALL, None), (SMALL, cbn.standardize), (cbn.group_norm(4), cbn.standardize)],
    ids=lambda value: getattr(value, "__name__", repr(value).partition("(")[0]),
)
def test_it_equals_a_model_by_hand(estimator, kernel):
    block = Bottleneck(8, 4, 8, rngs=nnx.Rngs(0))
    ours = replace_batch_norm(block, estimator, block_input(), kernel=kernel)
    assert_close(steps_of(ours), steps_of(ByHand(nnx.clone(block), estimator, kernel)))


def test_back_to_batch_norm():
    model = replace_batch_norm(NnxBlock(6, nnx.Rngs(0)), SMALL, images())
    model(images())
    norm = to_batch_norm(model.bn)
    model.eval(), norm.eval()
    x = model.conv(images())
    assert_close(model(images()), images() + nnx.relu(norm(x)))


# Several devices.

DEVICES = 8


def parallel_step(axis_name=None):
    estimator = cbn.small_batch_norm(2 * DEVICES)
    block = NnxBlock(8, nnx.Rngs(0), axis_name)
    block = replace_batch_norm(block, estimator, block_input())
    graph, params, others = nnx.split(block, nnx.Param, ...)

    def step(params, others, x):
        def loss_fn(params):
            block = nnx.merge(graph, params, others, copy=True)
            y = block(x)
            loss = jnp.square(y - 1).mean()
            if axis_name is not None:
                loss = jax.lax.pmean(loss, axis_name)
            return loss, (nnx.state(block, nnx.Not(nnx.Param)), y)

        gradients, (after, y) = jax.grad(loss_fn, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)
        return params, after, y

    return step, jax.device_get((params, others))


def run_parallel(step, state, put=lambda x: x):
    outputs = []
    for i in range(3):
        x = jax.random.normal(jax.random.key(i), (2 * DEVICES, 6, 6, 8))
        *state, y = step(*state, put(x))
        outputs.append(y)
    return jax.device_get((jax.tree.leaves(state), outputs))


@functools.cache
def on_one_device():
    step, state = parallel_step()
    return run_parallel(jax.jit(step), state)


@pytest.mark.parametrize("way", ["sharded jit", "shard_map"])
def test_eight_devices_give_what_one_gives(way, eight_devices):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    step, state = parallel_step("data" if way == "shard_map" else None)
    if way == "shard_map":
        specs = (P(), P(), P("data"))
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
    put = functools.partial(jax.device_put, device=split)
    actual = run_parallel(jax.jit(step), state, put)
    chex.assert_trees_all_close(actual, on_one_device(), rtol=2e-4, atol=2e-5)


# Ways to use a model.


def rows(seed=0):
    return jax.random.normal(jax.random.key(seed), (4, 6))


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 4, 4, 6)) + 0.5


class Net(nnx.Module):
    """A layer and a norm, and what may be between."""

    def __init__(self, layer=None, norm=None, **settings):
        rngs = nnx.Rngs(0)
        self.layer = layer or nnx.Linear(6, 4, rngs=rngs)
        self.norm = norm or nnx.BatchNorm(4, rngs=rngs, **settings)

    def __call__(self, x, *args, between: Any = None, **kwargs):
        x = self.layer(x)
        return self.norm(x if between is None else between(x), *args, **kwargs)


def net(estimator=SMALL, **settings):
    return replace_batch_norm(Net(**settings), estimator, rows())


def value(variable):
    return variable.get_value()


def test_split_and_merge():
    model, other = net(), net()
    again = nnx.merge(*nnx.split(other))
    assert_same(again(rows()), model(rows()))
    assert_same(again.norm.state, model.norm.state)


def test_a_clone_goes_its_own_way():
    model = net()
    for other in (
        nnx.clone(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert type(other.layer) is type(model.layer)
        assert report(other) == report(model)
        before = jax.tree.map(np.array, model.norm.state)
        other(rows())
        assert_same(model.norm.state, before)
        assert value(other.norm.steps).all()
        assert_same(net()(rows()), nnx.clone(net())(rows()))


def test_nnx_jit_compiles_once(loose):
    model = net()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(x)
        loss, gradients = nnx.value_and_grad(lambda model: jnp.sin(model(x)).mean())(model)
        optimizer.update(model, gradients)
        return loss

    for i in range(4):
        assert np.isfinite(step(model, optimizer, rows(i)))
    assert len(traces) == 1
    assert value(model.norm.mean).any()


def test_train_and_eval():
    model = net()
    model.train()
    model(rows())
    before = jax.tree.map(np.array, model.norm.state)
    model.eval()
    y, x = model(rows(1)), model.layer(rows(1))
    assert_same(model.norm.state, before)
    assert_close(y, cbn.normalize(x, SMALL.infer(model.norm.state, x)), 1e-5)
    assert_close(model(rows(), use_running_average=True), model(rows()))
    model.train()
    model(rows(1))
    assert np.any(model.norm.state.running.mean != before.running.mean)


def test_the_mode_stays():
    assert net(use_running_average=True).norm.use_running_average
    assert not net().norm.use_running_average


def test_trained_averages_continue_and_fresh_ones_start_at_zero_steps():
    model = Net()
    assert not value(replace_batch_norm(model, SMALL, rows()).norm.steps).any()
    for i in range(20):
        model(rows(i))
    mean, var = value(model.norm.mean), value(model.norm.var)
    new = replace_batch_norm(model, SMALL, rows())
    assert_same((value(new.norm.mean), value(new.norm.var)), (mean, var))
    assert value(new.norm.steps).all()
    assert_same(value(model.norm.mean), mean)


def test_a_batch_norm_alone():
    norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    new = replace_batch_norm(norm, SMALL, rows())
    assert [(row.path, row.layer, row.reason) for row in report(new).rows] == [
        ("", None, NO_LAYER)
    ]
    assert_close(new(rows()).mean(0), jnp.zeros(6), 1e-5)


def test_shapes_do_for_inputs():
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    assert report(replace_batch_norm(Net(), SMALL, shape)) == report(net())


class Switched(nnx.Module):
    """Arguments that are no arrays, and dropout."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layer, self.other = (nnx.Linear(6, 4, rngs=rngs) for _ in range(2))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x, *, train: bool, mode: str = "plain"):
        assert isinstance(train, bool)
        x = self.other(x) if mode == "other" else self.layer(x)
        if mode == "dropout":
            x = self.dropout(x, deterministic=not train)
        return self.norm(x, use_running_average=not train)


def test_arguments_by_name():
    model = replace_batch_norm(Switched(), SMALL, rows(), train=True)
    assert report(model).rows[0].layer == "layer"
    assert model(rows(), train=True).shape == (4, 4)
    model = replace_batch_norm(Switched(), SMALL, x=rows(), train=True, mode="dropout")
    assert report(model).rows[0].layer is None
    assert model(rows(), train=True, mode="dropout").shape == (4, 4)


@pytest.mark.parametrize("mode", ["dropout", "other"])
@pytest.mark.parametrize(
    ("estimator", "kernel"), [(SMALL, None), (cbn.group_norm(2), cbn.center)]
)
def test_a_call_in_which_the_norm_follows_something_else(mode, estimator, kernel):
    model = replace_batch_norm(Switched(), estimator, rows(), kernel=kernel, train=True)
    model(rows(), train=True)
    with pytest.raises(
        ValueError,
        match="a call in which a norm does not follow layer, expected this layer",
    ):
        model(rows(), train=True, mode=mode)


class Held(nnx.Module):
    """Modules in containers."""

    def __init__(self, hold):
        rngs = nnx.Rngs(0)
        self.parts = hold([nnx.Linear(6, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

    def __call__(self, x):
        for part in self.parts.values() if hasattr(self.parts, "values") else self.parts:
            x = part(x)
        return x


HOLDERS = {
    "list": nnx.List,
    "sequential": lambda parts: nnx.List([nnx.Sequential(*parts)]),
    "dict": lambda parts: nnx.Dict(zip("ab", parts, strict=True)),
    "plain list": nnx.data,
    "plain tuple": lambda parts: nnx.data(tuple(parts)),
    "plain dict": lambda parts: nnx.data(dict(zip("ab", parts, strict=True))),
    "nested": lambda parts: nnx.data([tuple(parts)][0]),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_norms_in_containers(name):
    new = replace_batch_norm(Held(HOLDERS[name]), SMALL, rows())
    assert len(report(new).rows) == 1
    assert not any(isinstance(node, nnx.BatchNorm) for _, node in nnx.iter_graph(new))
    new(rows())


def test_a_norm_at_two_places():
    model = Net()
    model.again = model.norm
    new = replace_batch_norm(model, SMALL, rows())
    assert new.again is new.norm
    assert len(report(new).rows) == 1


# ``nnx.jit`` and others keep traces, and those of another model would be wrong.


@nnx.jit
def jitted(block, x):
    return block(x)


@nnx.remat
def rematerialized(block, x):
    return block(x)


class Transformed(nnx.Module):
    def __init__(self, transform):
        self.transform = transform
        self.block = NnxBlock(6, nnx.Rngs(0))

    def __call__(self, x):
        return self.transform(self.block, x)


@pytest.mark.parametrize("transform", [jitted, rematerialized], ids=["jit", "remat"])
def test_traces_of_another_model_are_not_reused(transform):
    model, found = Transformed(transform), []
    expected = nnx.clone(model)(images())
    for momentum in (0.5, 0.9):
        estimator = cbn.small_batch_norm(2, momentum=momentum)
        for _ in range(2):
            new = replace_batch_norm(model, estimator, images())
            assert [row.layer for row in report(new).rows] == ["block/conv"]
        for i in range(2):
            new(images(i))
        found.append(value(new.block.bn.mean))
    assert not np.allclose(*found)
    assert_same(nnx.clone(model)(images()), expected)


# The settings of a batch norm.


def test_scale_and_bias_are_those_of_the_model():
    for left_out in ("scale", "bias"):
        norm = net(**{f"use_{left_out}": False}).norm
        kept = ({"scale", "bias"} - {left_out}).pop()
        assert getattr(norm, left_out) is None
        assert value(getattr(norm, kept)).shape == (4,)


def test_features_in_front_get_the_fallback():
    model = Net(nnx.Conv(6, 4, (3, 3), rngs=nnx.Rngs(0)), axis=1)
    new = replace_batch_norm(model, SMALL, images())
    row = report(new).rows[0]
    assert (row.layer, row.reason) == (None, "its features are not the last axis")
    assert_close(new(images()), model(images()), 1e-4)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("of_layer", [jnp.bfloat16, jnp.float32])
def test_the_dtype_is_that_of_the_model(dtype, of_layer, loose):
    layer = nnx.Linear(6, 4, dtype=of_layer, rngs=nnx.Rngs(0))
    model = Net(layer, dtype=dtype)
    new = replace_batch_norm(model, SMALL, rows())
    assert new(rows()).dtype == model(rows()).dtype


def test_a_mask_reaches_the_method():
    masked, fewer = net(), net()
    y = masked(rows(), mask=jnp.arange(4)[:, None] < 3)
    assert_close(y[:3], fewer(rows()[:3]), 1e-5)
    assert_close(masked.norm.state, fewer.norm.state, 1e-5)


# Other classes.


class Derived(nnx.BatchNorm):
    pass


class Copied(nnx.Module):
    """Attributes copied from Flax."""

    def __init__(self, num_features, *, rngs):
        norm = nnx.BatchNorm(num_features, rngs=rngs)
        for name, attribute in vars(norm).items():
            if not name.startswith("_"):
                setattr(self, name, nnx.data(attribute) if attribute is None else attribute)

    def __call__(self, x, use_running_average=None, *, mask=None):
        return x


@pytest.mark.parametrize("cls", [Derived, Copied])
def test_a_class_of_ones_own(cls):
    model = Net(norm=cls(4, rngs=nnx.Rngs(0)))
    new, expected = replace_batch_norm(model, SMALL, rows(), also=(cls,)), net()
    assert report(new) == report(expected)
    assert_same(new(rows()), expected(rows()))
    assert_same(new.norm.state, expected.norm.state)


# Layers that are more than they seem.


class Standardized(nnx.Conv):
    def __call__(self, x):
        space = ("NHWC", "HWIO", "NHWC")
        kernel = cbn.standardize(self.kernel.get_value())
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=space
        )


def rounded(a, b, dims, **options):
    step = jnp.abs(b).max() / 7
    return jax.lax.dot_general(a, jnp.round(b / step) * step, dims)


LAYERS = {
    "linear": (nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rows, "layer"),
    "general": (nnx.LinearGeneral(6, 4, rngs=nnx.Rngs(0)), rows, "layer"),
    "einsum": (nnx.Einsum("ni,io->no", (6, 4), rngs=nnx.Rngs(0)), rows, "layer"),
    "conv": (nnx.Conv(6, 4, (3, 3), rngs=nnx.Rngs(0)), images, "layer"),
    "standardized": (
        Standardized(6, 4, (3, 3), rngs=nnx.Rngs(0)),
        images,
        "layer applies stop_gradient to its parameters",
    ),
    "rounded": (
        nnx.Linear(6, 4, dot_general=rounded, rngs=nnx.Rngs(0)),
        rows,
        "layer applies abs to its parameters",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_that_stay_are_normalized_exactly(name):
    layer, data, expected = LAYERS[name]
    model = Net(layer, use_scale=False, use_bias=False)
    model = replace_batch_norm(model, EXACT, data())
    row = report(model).rows[0]
    assert expected in (row.layer, row.reason)
    run = nnx.jit(lambda model, x: model(x))
    for _ in range(4):
        y = run(model, data())
        axes = tuple(range(y.ndim - 1))
        np.testing.assert_allclose(y.mean(axes), 0.0, atol=2e-3)
        np.testing.assert_allclose(y.std(axes), 1.0, atol=2e-3)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w: w + 0.3 * jnp.cos(7 * w), params))


# Refused models and arguments.


def refused(message, kind=ValueError):
    return pytest.raises(kind, match=message)


class Twice(nnx.Module):
    """One norm behind two layers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.first(x)) + self.norm(self.second(x))


def test_a_norm_behind_two_layers():
    with refused(
        r"norm, which is called after first and after second, .*"
        r"without_layer=\('norm',\)"
    ):
        replace_batch_norm(Twice(), SMALL, rows())
    new = replace_batch_norm(Twice(), SMALL, rows(), without_layer=("norm",))
    row = report(new).rows[0]
    assert (row.layer, row.reason) == (None, "named in without_layer")
    chex.assert_tree_all_finite(new(rows()))


def test_a_norm_behind_two_layers_for_a_method_that_does_not_look():
    new = replace_batch_norm(Twice(), cbn.batch_norm(), rows())
    assert [(row.path, row.reason) for row in report(new).rows] == [("norm", "")]


def test_a_norm_that_is_not_called():
    model = Net()
    model.spare = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    found = {row.path: row for row in report(replace_batch_norm(model, SMALL, rows())).rows}
    assert (found["spare"].layer, found["norm"].layer) == (None, "layer")
    assert found["spare"].reason == "not called with these inputs"


def test_a_subclass_that_nobody_named():
    model = Net(norm=Derived(4, rngs=nnx.Rngs(0)))
    with refused(r"got Derived at norm, a subclass of nnx.BatchNorm, .*also=\(Derived,\)"):
        replace_batch_norm(model, SMALL, rows())


def test_another_epsilon():
    with refused(r"got norm with epsilon=0.001 and .*write epsilon=0.001 in small_batch"):
        net(epsilon=1e-3)
    model = net(cbn.small_batch_norm(2, epsilon=1e-3), epsilon=1e-3)
    assert report(model).rows[0].layer == "layer"


def test_index_groups():
    with refused("got axis_index_groups at norm, expected None"):
        net(axis_index_groups=[[0, 1]])


def test_no_batch_norm():
    with refused(r"got a model without nnx.BatchNorm, expected .*also=\(...\)"):
        replace_batch_norm(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), SMALL, rows())


def test_arguments_of_another_kind():
    with refused(r"got model=.*expected a Flax module", TypeError):
        replace_batch_norm(SMALL, Net(), rows())
    with refused("got estimator=<function batch_norm.*expected an estimator", TypeError):
        replace_batch_norm(Net(), cbn.batch_norm, rows())
    with refused("got fallback=0.9, expected an estimator", TypeError):
        replace_batch_norm(Net(), SMALL, rows(), fallback=0.9)
    with refused(r"got fallback=small_batch_norm\(.*expected a method that needs none"):
        replace_batch_norm(Net(), SMALL, rows(), fallback=SMALL)


def test_a_fallback_of_ones_own():
    fallback, model = cbn.group_norm(2), Net(layer=nnx.Dropout(0.0))
    new = replace_batch_norm(model, SMALL, rows()[:, :4], fallback=fallback)
    assert [row.estimator for row in report(new).rows] == [fallback]


def test_paths_that_are_none():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    with pytest.raises(ValueError, match=r"got 'bn' in without_layer.*: layers/1\."):
        replace_batch_norm(net, cbn.batch_norm(), jnp.ones((2, 3)), without_layer=("bn",))


class Scaled(nnx.Linear):
    def __call__(self, inputs, gain):
        return super().__call__(inputs) * gain


class CallsWithMore(nnx.Module):
    def __init__(self, rngs):
        self.layer = Scaled(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.layer(x, 2.0))


def test_a_layer_that_is_called_with_more():
    net = CallsWithMore(nnx.Rngs(0))
    model = replace_batch_norm(net, cbn.small_batch_norm(2), jnp.ones((2, 3)))
    assert report(model).rows[0].reason == "layer has several arguments"
