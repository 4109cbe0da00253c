"""Linen models with a method of this library in place of each batch norm."""

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
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import LINEN, Block, Dimensions, ResNetBlock

import cbn_jax as cbn
from cbn_jax.linen import (
    Norm,
    from_batch_norm,
    replace_batch_norm,
    report,
    to_batch_norm,
)

SMALL = cbn.small_batch_norm(2)
EXACT = cbn.replay_batch_norm(3, samples=400)  # of all positions
NO_LAYER = "its input is no layer's output"
models = pytest.mark.parametrize("name", LINEN)


@pytest.fixture(autouse=True)
def traces():
    chex.clear_trace_counter()


assert_same = chex.assert_trees_all_equal


def assert_close(actual, expected, tolerance=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


# The zoo. Programs are compiled once, and arrays stay on the host: steps donate theirs.


@functools.cache
def replaced(name):
    return replace_batch_norm(LINEN[name].make(), SMALL)


def model_of(name, original):
    return LINEN[name].make() if original else replaced(name)


@functools.cache
def fresh(name, original=False):
    init = jax.jit(model_of(name, original).init)
    return jax.device_get(init(jax.random.key(1), inputs(name)))


def inputs(name, seed=2):
    return LINEN[name].data(jax.random.key(seed))


def trained_variables(name):
    """Those of the model with ``nn.BatchNorm``, with averages of something."""
    variables, rng = fresh(name, original=True), np.random.default_rng(0)
    stats = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 2.0, leaf.shape).astype(leaf.dtype),
        variables["batch_stats"],
    )
    return {"params": variables["params"], "batch_stats": stats}


def predict(model, variables, x):
    return jax.jit(lambda variables, x: model.apply(variables, x, False))(variables, x)


def make_step(model, optimizer):
    def loss_fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, updates = model.apply(variables, x, mutable=["batch_stats"])
        return jnp.square(y - 1).mean(), updates["batch_stats"]

    def step(state, x):
        params, stats, opt_state = state
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), gradients = gradient(params, stats, x)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return step


def start(variables, optimizer):
    params = variables["params"]
    state = params, variables["batch_stats"], optimizer.init(params)
    return jax.tree.map(jnp.array, state)


@models
def test_parameters_stay_the_same(name):
    assert_same(fresh(name)["params"], fresh(name, original=True)["params"])


@models
def test_each_norm_finds_its_layer(name):
    rows = report(replaced(name), inputs(name)).rows
    assert {row.path: row.layer for row in rows} == LINEN[name].expected
    for row in rows:
        assert row.reason == ("" if row.layer else NO_LAYER)
        assert repr(row.estimator).startswith("small" if row.layer else "batch_renorm")


@models
def test_ten_steps_and_one_compilation(name, loose):
    optimizer = optax.sgd(0.01, momentum=0.9)
    step = chex.assert_max_traces(make_step(replaced(name), optimizer), n=1)
    step, state = jax.jit(step, donate_argnums=0), start(fresh(name), optimizer)
    for i in range(10):
        state, loss = step(state, inputs(name, seed=i))
        assert np.isfinite(loss)
    chex.assert_tree_all_finite(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state[1], fresh(name)["batch_stats"])


@models
def test_a_trained_model_predicts_as_before(name):
    trained, x = trained_variables(name), inputs(name)
    variables = from_batch_norm(trained, into=fresh(name))
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, fresh(name))
    assert_same(
        predict(replaced(name), variables, x),
        predict(model_of(name, original=True), trained, x),
    )
    assert_same(to_batch_norm(variables), trained)


def test_a_trained_optimizer_goes_on(loose):
    """``batch_norm`` trains as ``nn.BatchNorm`` does, so that the steps are the same."""
    optimizer, data = optax.adam(1e-2), functools.partial(inputs, "1-d")
    step = jax.jit(make_step(Dimensions(), optimizer))
    state = start(fresh("1-d", original=True), optimizer)
    for i in range(2):
        state, _ = step(state, data(i))
    params, stats, opt_state = state
    model = replace_batch_norm(Dimensions(), cbn.batch_norm())
    variables = from_batch_norm(
        {"params": params, "batch_stats": stats},
        into=jax.jit(model.init)(jax.random.key(0), data()),
    )
    ours = variables["params"], variables["batch_stats"], opt_state
    (params, _, opt_state), _ = jax.jit(make_step(model, optimizer))(ours, data(2))
    (expected, _, opt_expected), _ = step(state, data(2))
    assert_close((params, opt_state), (expected, opt_expected), 1e-5)


def test_a_checkpoint_comes_back(tmp_path, loose):
    optimizer = optax.adam(0.01)
    state = start(fresh("u-net"), optimizer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(jnp.zeros_like, state)
        restored = checkpointer.restore(tmp_path / "state", blank)
    assert_same(restored, state)


# What a model does, a model does that is written by hand with ``Norm``.


class ByHand(nn.Module):
    """``ResNetBlock`` with strides."""

    estimator: cbn.Estimator
    kernel: Any = None

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, 12, use_bias=False)
        norm = functools.partial(
            Norm, self.estimator, kernel=self.kernel, use_running_average=False
        )
        y = norm(conv((3, 3), (2, 2)), name="BatchNorm_0")(x)
        last = norm(
            conv((3, 3)), name="BatchNorm_1", scale_init=nn.initializers.zeros_init()
        )
        y = last(nn.relu(y))
        projection = conv((1, 1), (2, 2), name="conv_proj")
        return nn.relu(norm(projection, name="norm_proj")(x) + y)


def resnet_block():
    conv = functools.partial(nn.Conv, use_bias=False)
    norm = functools.partial(nn.BatchNorm, use_running_average=False)
    return ResNetBlock(12, conv, norm, strides=(2, 2))


def steps_of(model, params=None, steps=3):
    """Outputs, states and gradients of some steps, while the weights move."""

    @jax.jit
    def step(params, stats, z):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, z, mutable=["batch_stats"])
            return jnp.sin(y).sum(), (updates["batch_stats"], y)

        return jax.grad(loss_fn, has_aux=True)(params)

    key = jax.random.key(3)
    variables = jax.jit(model.init)(key, jax.random.normal(key, (2, 6, 6, 8)))
    params, stats, found = variables["params"], variables["batch_stats"], []
    for i in range(steps):
        z = jax.random.normal(jax.random.fold_in(key, i), (2, 6, 6, 8))
        gradients, (stats, y) = step(params, stats, z)
        found.append((y, stats, gradients))
        params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(7 * leaf), params)
    return found


@pytest.mark.parametrize(
    ("estimator", "kernel"),
    [
        (SMALL, None),
        (cbn.bidirectional_batch_norm(), None),
        (SMALL, cbn.standardize),
        (cbn.group_norm(4), cbn.standardize),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value).partition("(")[0]),
)
def test_it_equals_a_model_by_hand(estimator, kernel):
    model = replace_batch_norm(resnet_block(), estimator, kernel=kernel)
    assert_close(steps_of(model), steps_of(ByHand(estimator, kernel)))


# Several devices.

DEVICES = 8


def mesh_of_devices():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def parallel_step(axis_name=None):
    """Statistics, gradients and outputs of a step."""
    estimator = cbn.small_batch_norm(2 * DEVICES)
    model = replace_batch_norm(Dimensions(axis_name), estimator)

    def step(params, stats, x):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, x, mutable=["batch_stats"])
            loss = jnp.square(y - 1).mean()
            if axis_name is not None:
                loss = jax.lax.pmean(loss, axis_name)
            return loss, (updates["batch_stats"], y)

        gradients, (after, y) = jax.grad(loss_fn, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)
        return params, after, y

    return step


def run_parallel(step, put=lambda x: x):
    variables = fresh("1-d")
    params, stats = variables["params"], variables["batch_stats"]
    outputs = []
    for i in range(3):
        x = LINEN["1-d"].data(jax.random.key(i), examples=2 * DEVICES)
        params, stats, y = step(params, stats, put(x))
        outputs.append(y)
    return jax.device_get((params, stats, outputs))


@functools.cache
def on_one_device():
    return run_parallel(jax.jit(parallel_step()))


@pytest.mark.parametrize("way", ["sharded jit", "shard_map"])
def test_eight_devices_give_what_one_gives(way, eight_devices):
    mesh = mesh_of_devices()
    split = NamedSharding(mesh, P("data"))
    step = jax.jit(parallel_step())
    if way == "shard_map":
        specs = (P(), P(), P("data"))
        step = jax.jit(
            jax.shard_map(parallel_step("data"), mesh=mesh, in_specs=specs, out_specs=specs)
        )
    actual = run_parallel(step, functools.partial(jax.device_put, device=split))
    chex.assert_trees_all_close(actual, on_one_device(), rtol=2e-4, atol=2e-5)


# Ways to use a model.


class Coder(nn.Module):
    """Modules in ``setup``, and methods."""

    def setup(self):
        self.first = nn.Dense(4)
        self.norm = nn.BatchNorm(use_running_average=False)
        self.last = nn.Dense(4)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.relu(self.norm(self.first(x)))

    def decode(self, code):
        return self.last(code)


def rows(seed=0, width=6):
    return jax.random.normal(jax.random.key(seed), (4, width))


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 4, 4, 6)) + 0.5


@functools.cache
def coder():
    model = replace_batch_norm(Coder(), SMALL)
    return model, jax.jit(model.init)(jax.random.key(0), rows())


def run(model, variables, *args, **kwargs):
    return model.apply(variables, *args, mutable=["batch_stats"], **kwargs)


def test_methods_by_name_and_by_function():
    model, variables = coder()
    code, updates = run(model, variables, rows(), method="encode")
    assert "d_mean" in updates["batch_stats"]["norm"]
    for method in (Coder.encode, model.encode, lambda model, x: model.encode(x)):
        assert_same(run(model, variables, rows(), method=method), (code, updates))
    y, after = run(model, variables, rows())
    assert_same((model.apply(variables, code, method="decode"), updates), (y, after))


def test_init_by_a_method():
    model, variables = coder()
    by_method = model.init(jax.random.key(0), rows(), method="encode")
    assert_same(by_method["batch_stats"], variables["batch_stats"])
    both = model.init(jax.random.key(0), rows(), method=lambda m, x: m.decode(m.encode(x)))
    chex.assert_trees_all_equal_shapes(both, variables)


def test_a_bound_model():
    model, variables = coder()
    bound = model.bind(variables, mutable=["batch_stats"])
    y, updates = run(model, variables, rows(), method="encode")
    assert_same(
        (bound.encode(rows()), bound.variables["batch_stats"]), (y, *updates.values())
    )
    again, updates = run(model, {**variables, **updates}, rows(1))
    assert_same(
        (bound(rows(1)), bound.variables["batch_stats"]), (again, *updates.values())
    )


def test_a_table_of_the_model():
    model, _ = coder()
    table = model.tabulate(jax.random.key(0), rows(), console_kwargs={"width": 200})
    assert all(name in table for name in ("BatchNorm", "Dense", "d_mean", "norm"))


class Outer(nn.Module):
    """Another model around one."""

    model: nn.Module
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        if self.remat:
            return nn.remat(lambda model, x: model(x))(self.model, x)
        return self.model(x)


@pytest.mark.parametrize("remat", [False, True])
def test_a_part_of_another_model(remat):
    model, _ = coder()
    outer = Outer(model, remat)
    variables = outer.init(jax.random.key(0), rows())
    y, updates = jax.jit(functools.partial(run, outer))(variables, rows())
    x = nn.Dense(6).apply({"params": variables["params"]["Dense_0"]}, rows())
    own = {name: tree["model"] for name, tree in variables.items()}
    expected, after = run(model, own, x)
    assert_close((y, updates["batch_stats"]["model"]), (expected, after["batch_stats"]))


def test_only_the_part_is_replaced():
    class Both(nn.Module):
        part: nn.Module

        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x))
            return self.part(x)

    variables = Both(coder()[0]).init(jax.random.key(0), rows())
    assert set(variables["batch_stats"]["BatchNorm_0"]) == {"mean", "var"}
    assert "d_mean" in variables["batch_stats"]["part"]["norm"]


def test_another_model_around_one_can_be_replaced():
    inner = replace_batch_norm(Coder(), cbn.batch_norm())

    class Both(nn.Module):
        part: nn.Module

        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x))
            return self.part(x)

    rows_of = report(replace_batch_norm(Both(inner), SMALL), rows()).rows
    methods = {row.path: repr(row.estimator).partition("(")[0] for row in rows_of}
    assert methods == {"BatchNorm_0": "small_batch_norm", "part/norm": "batch_norm"}


def test_a_class_that_is_transformed():
    """``nn.remat`` of the class of a model."""
    model, variables = coder()
    again = nn.remat(type(model))()
    assert_same(jax.jit(again.init)(jax.random.key(0), rows()), variables)
    assert_close(run(again, variables, rows()), run(model, variables, rows()))


def test_a_model_is_a_value():
    model, _ = coder()
    same, other = replace_batch_norm(Coder(), SMALL), replace_batch_norm(Coder(), EXACT)
    assert model == same
    assert hash(model) == hash(same)
    assert model != other
    assert model != Coder()
    assert isinstance(model, Coder)
    assert model.clone() == model
    again = replace_batch_norm(other, SMALL)
    assert again == model


def test_a_model_keeps_its_fields_and_name():
    class Wide(nn.Module):
        width: int
        inner: Any = None

        @property
        def twice(self):
            return 2 * self.width

    model = replace_batch_norm(Wide(4, nn.Dense(3), name="own"), SMALL)
    assert (model.width, model.twice, model.name) == (4, 8, "own")
    assert model.inner == nn.Dense(3)


@pytest.mark.parametrize(
    "model", [Dimensions("data"), nn.Sequential([nn.BatchNorm(True)], name="own")]
)
def test_pickle(model):
    model = replace_batch_norm(model, SMALL, kernel=cbn.standardize)
    again = pickle.loads(pickle.dumps(model))
    assert again == model
    assert type(again) is type(model)


def test_intermediates_are_captured():
    model, variables = coder()
    _, updates = model.apply(
        variables,
        rows(),
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    found = updates["intermediates"]
    x = nn.Dense(4).apply({"params": variables["params"]["first"]}, rows())
    assert_same(found["first"]["__call__"][0], x)
    assert_same(found["norm"]["__call__"][0].shape, x.shape)
    code = nn.relu(found["norm"]["__call__"][0])
    assert_same(model.apply(variables, code, method="decode"), found["__call__"][0])


# ``nn.jit`` keeps traces, and those of another model would be wrong.

JITTED = nn.jit(Block)


class InCompact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JITTED(True, name="block")(x)[0]


class InSetup(nn.Module):
    def setup(self):
        self.block = JITTED(True)

    def __call__(self, x):
        return self.block(x)[0]


class AsField(nn.Module):
    block: nn.Module

    def __call__(self, x):
        return self.block(x)[0]


class Decorated(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return Block(True, name="block")(x)[0]


@pytest.mark.parametrize(
    "model", [InCompact(), InSetup(), AsField(JITTED(True)), Decorated()], ids=repr
)
def test_traces_of_another_model_are_not_reused(model):
    x = images()
    variables = model.init(jax.random.key(0), x)
    expected = run(model, variables, x)
    found = []
    for momentum in (0.5, 0.9):
        ours = replace_batch_norm(model, cbn.batch_norm(momentum=momentum))
        assert len(report(ours, x).rows) == len(report(ours, x).rows) == 2
        stats = ours.init(jax.random.key(0), x)["batch_stats"]
        for i in range(2):
            _, updates = run(ours, {**variables, "batch_stats": stats}, images(i))
            stats = updates["batch_stats"]
        found.append(stats["block"]["BatchNorm_0"]["mean"])
    assert not np.allclose(*found)
    assert_same(run(model, variables, x), expected)


def test_init_again_from_a_cache_of_nn_jit():
    """The batch norms are not met again, and are there."""
    for model in (InCompact(), InSetup(), InCompact()):
        model = replace_batch_norm(model, SMALL)
        stats = model.init(jax.random.key(0), images())["batch_stats"]
        assert "d_mean" in stats["block"]["BatchNorm_0"]


# The settings of a batch norm.


class Net(nn.Module):
    """A layer and a norm."""

    layer: Any
    norm: Any

    def __call__(self, x, *args, **kwargs):
        return self.norm(self.layer(x), *args, **kwargs)


def net(layer=None, **settings):
    settings = {"use_running_average": False} | settings
    return Net(layer or nn.Dense(4), nn.BatchNorm(**settings))


def begin(model, x, *args, **kwargs):
    return jax.jit(lambda x: model.init(jax.random.key(0), x, *args, **kwargs))(x)


@pytest.mark.parametrize("in_call", [False, True])
def test_the_mode(in_call):
    mode, args = (None, (True,)) if in_call else (True, ())
    model = replace_batch_norm(net(use_running_average=mode), SMALL)
    variables = begin(model, rows(), *args)
    y, updates = run(model, variables, rows(), *args)
    assert_close(
        y, nn.Dense(4).apply({"params": variables["params"]["layer"]}, rows()), 1e-4
    )
    assert not updates or updates["batch_stats"] == variables["batch_stats"]
    if in_call:
        _, updates = run(model, variables, rows(), False)
        assert updates["batch_stats"]["norm"]["steps"].all()


def test_the_mode_is_given_once():
    model = replace_batch_norm(net(use_running_average=None), SMALL)
    with pytest.raises(ValueError, match="use_running_average"):
        model.init(jax.random.key(0), rows())
    model = replace_batch_norm(net(use_running_average=True), SMALL)
    with pytest.raises(ValueError, match="use_running_average"):
        model.init(jax.random.key(0), rows(), True)


def test_scale_and_bias_are_those_of_the_model(loose):
    settings = {
        "scale_init": nn.initializers.uniform(),
        "bias_init": nn.initializers.normal(),
        "param_dtype": jnp.bfloat16,
    }
    variables = begin(net(**settings), rows())
    ours = begin(replace_batch_norm(net(**settings), SMALL), rows())
    assert_same(ours["params"], variables["params"])
    for left_out in ("scale", "bias"):
        model = replace_batch_norm(net(**{f"use_{left_out}": False}), SMALL)
        kept = {"scale", "bias"} - {left_out}
        assert set(begin(model, rows())["params"]["norm"]) == kept
    model = replace_batch_norm(net(use_scale=False, use_bias=False), SMALL)
    assert "norm" not in begin(model, rows())["params"]


@pytest.mark.parametrize("axis", [1, (1, -1)])
def test_features_in_front_get_the_fallback(axis):
    model = replace_batch_norm(net(axis=axis), SMALL)
    row = report(model, images()).rows[0]
    assert (row.layer, row.reason) == (None, "its features are not the last axis")
    variables = begin(model, images())
    y, updates = run(model, variables, images())
    theirs = begin(net(axis=axis), images())
    assert_same(variables["params"], theirs["params"])
    assert_close(y, run(net(axis=axis), theirs, images())[0], 1e-4)
    assert updates["batch_stats"]["norm"]["mean"].shape == (
        theirs["batch_stats"]["norm"]["mean"].shape
    )


def test_features_last_by_a_positive_axis():
    row = report(replace_batch_norm(net(axis=3), SMALL), images()).rows[0]
    assert row.layer == "layer"


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("of_layer", [jnp.bfloat16, jnp.float32])
def test_the_dtype_is_that_of_the_model(dtype, of_layer, loose):
    model = net(nn.Dense(4, dtype=of_layer), dtype=dtype)
    ours = replace_batch_norm(model, SMALL)
    theirs = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), rows())[0])
    y, _ = jax.eval_shape(lambda: ours.init_with_output(jax.random.key(0), rows()))
    assert y.dtype == theirs.dtype
    variables = begin(ours, rows())
    y, _ = run(ours, variables, rows())
    assert y.dtype == theirs.dtype
    chex.assert_tree_all_finite(y)


@pytest.mark.parametrize("estimator", [SMALL, cbn.batch_norm()])
def test_a_mask_reaches_the_method(estimator):
    model = replace_batch_norm(net(), estimator)
    mask = jnp.arange(4)[:, None] < 3
    variables = begin(model, rows())
    masked, stats = run(model, variables, rows(), mask=mask)
    fewer, expected = run(model, variables, rows()[:3])
    assert_close(masked[:3], fewer, 1e-5)
    assert_close(stats, expected, 1e-5)


# Other classes.


class MyBatchNorm(nn.Module):
    """Fields copied from Flax."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Any = nn.initializers.zeros
    scale_init: Any = nn.initializers.ones
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        raise AssertionError


class Derived(nn.BatchNorm):
    pass


@pytest.mark.parametrize("cls", [MyBatchNorm, Derived])
def test_a_class_of_ones_own(cls):
    model = Net(nn.Dense(4), cls(use_running_average=False))
    ours = replace_batch_norm(model, SMALL, also=(cls,))
    theirs = replace_batch_norm(net(), SMALL)
    variables = begin(ours, rows())
    assert_same(variables, begin(theirs, rows()))
    assert_same(run(ours, variables, rows()), run(theirs, variables, rows()))


def test_a_class_without_the_fields():
    class Bare(nn.Module):
        epsilon: float = 1e-5

        def __call__(self, x):
            return x

    model = replace_batch_norm(Net(nn.Dense(4), Bare()), SMALL, also=(Bare,))
    with pytest.raises(ValueError, match=r"got Bare at norm without axis, axis_name"):
        report(model, rows())


# Layers that are more than they seem. Inputs stay and weights move, and a method that is
# exact gives a mean of 0 and a standard deviation of 1.


class StandardizedConv(nn.Conv):
    def param(self, name, *args, **kwargs):
        kernel = super().param(name, *args, **kwargs)
        return cbn.standardize(kernel) if name == "kernel" else kernel


def rounded(a, b, dims, precision=None, preferred_element_type=None):
    step = jnp.abs(b).max() / 7
    return jax.lax.dot_general(a, jnp.round(b / step) * step, dims)


class Pruned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def prune(variables):
            kept = jnp.arange(24).reshape(6, 4) % 3 > 0
            return jax.tree.map(
                lambda w: jnp.where(kept, w, 0.0) if w.ndim == 2 else w, variables
            )

        call = nn.map_variables(
            lambda layer, x: layer(x), "params", prune, init=self.is_initializing()
        )
        return call(nn.Dense(4), x)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Conv(4, (3, 3), name="conv"))(x, update_stats=True)


class Adapted(nn.Dense):
    """Two more kernels, of a low rank."""

    @nn.compact
    def __call__(self, x):
        down = self.param("down", nn.initializers.normal(), (6, 2))
        up = self.param("up", nn.initializers.normal(), (2, 4))
        return super().__call__(x) + x @ down @ up


def widths():
    """Each member has its own weights, and the features are last."""
    return nn.vmap(
        nn.Dense,
        in_axes=None,
        out_axes=1,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )


MASK = np.arange(24, dtype=np.float32).reshape(1, 1, 6, 4) % 3
LAYERS = {
    "dense": (nn.Dense(4), rows, "layer"),
    "general": (nn.DenseGeneral(4), rows, "layer"),
    "einsum": (nn.Einsum((6, 4), "ni,io->no"), rows, "layer"),
    "local": (nn.ConvLocal(4, (3, 3)), images, "layer"),
    "masked": (nn.Conv(4, (1, 1), mask=MASK), images, "layer"),
    "weight norm": (nn.WeightNorm(nn.Conv(4, (3, 3))), images, "layer/layer_instance"),
    "spectral norm": (Spectral(), images, "layer/conv"),
    "pruned": (Pruned(), rows, "layer/Dense_0"),
    "standardized": (
        StandardizedConv(4, (3, 3)),
        images,
        "layer applies stop_gradient to its parameters",
    ),
    "rounded": (
        nn.Dense(4, dot_general=rounded),
        rows,
        "layer applies abs to its parameters",
    ),
    "adapted": (
        Adapted(4),
        rows,
        "layer multiplies its parameters with each other",
    ),
    "remat": (nn.remat(nn.Dense)(4), rows, NO_LAYER),
    "vmap": (widths()(4), rows, NO_LAYER),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_that_stay_are_normalized_exactly(name):
    layer, data, expected = LAYERS[name]
    model = replace_batch_norm(net(layer, use_scale=False, use_bias=False), EXACT)
    row = report(model, data()).rows[0]
    assert expected in (row.layer, row.reason)
    variables, step = begin(model, data()), jax.jit(functools.partial(run, model))
    for _ in range(4):
        y, updates = step(variables, data())
        axes = tuple(range(y.ndim - 1))
        np.testing.assert_allclose(y.mean(axes), 0.0, atol=2e-3)
        np.testing.assert_allclose(y.std(axes), 1.0, atol=2e-3)
        params = jax.tree.map(lambda w: w + 0.3 * jnp.cos(7 * w), variables["params"])
        variables = {**variables, **updates, "params": params}


def test_a_layer_with_several_arguments():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Einsum((6, 4), name="layer")(x, "ni,io->no")
            return nn.BatchNorm(use_running_average=False)(x)

    row = report(replace_batch_norm(Two(), SMALL), rows()).rows[0]
    assert (row.layer, row.reason) == (None, "layer has several arguments")


def test_arguments_by_name():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="layer")(inputs=x)
            return nn.BatchNorm(use_running_average=False)(x=x)

    model = replace_batch_norm(Named(), SMALL)
    assert report(model, x=rows()).rows[0].layer == "layer"
    y, _ = run(model, begin(model, rows()), x=rows())
    assert_close(y.mean(0), jnp.zeros(4), 1e-5)


def test_an_ensemble_is_exact():
    """Members with their own layer and norm."""
    members = nn.vmap(
        Net,
        in_axes=None,
        out_axes=1,
        axis_size=3,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )
    norm = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
    model = replace_batch_norm(members(nn.Dense(4), norm), EXACT)
    assert report(model, rows()).rows[0].layer == "layer"
    variables = begin(model, rows())
    for _ in range(4):
        y, updates = run(model, variables, rows())
        assert y.shape == (4, 3, 4)
        np.testing.assert_allclose(y.mean(0), 0.0, atol=2e-3)
        np.testing.assert_allclose(y.std(0), 1.0, atol=2e-3)
        params = jax.tree.map(lambda w: w + 0.3 * jnp.cos(7 * w), variables["params"])
        variables = {**updates, "params": params}


# Refused models and arguments.


def refused(message):
    return pytest.raises(ValueError, match=message)


class Twice(nn.Module):
    """One norm behind two layers."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=False, name="norm")
        return norm(nn.Dense(4)(x)) + norm(nn.Dense(4)(x))


def test_a_norm_behind_two_layers():
    model = replace_batch_norm(Twice(), SMALL)
    with refused(
        r"norm, which is called after Dense_0 and after Dense_1, .*"
        r"without_layer=\('norm',\)"
    ):
        model.init(jax.random.key(0), rows())
    model = replace_batch_norm(Twice(), SMALL, without_layer=("norm",))
    row = report(model, rows()).rows[0]
    assert (row.layer, row.reason) == (None, "named in without_layer")
    y, _ = run(model, begin(model, rows()), rows())
    chex.assert_tree_all_finite(y)


def test_a_norm_behind_two_layers_for_a_method_that_does_not_look():
    rows_of = report(replace_batch_norm(Twice(), cbn.batch_norm()), rows()).rows
    assert [(row.path, row.reason) for row in rows_of] == [("norm", "")]


def test_a_subclass_that_nobody_named():
    model = replace_batch_norm(Net(nn.Dense(4), Derived(False)), SMALL)
    with refused(r"got Derived at norm, a subclass of nn.BatchNorm, .*also=\(Derived,\)"):
        model.init(jax.random.key(0), rows())


def test_another_epsilon():
    model = replace_batch_norm(net(epsilon=1e-3), SMALL)
    with refused(r"got norm with epsilon=0.001 and .*write epsilon=0.001 in small_batch"):
        model.init(jax.random.key(0), rows())
    model = replace_batch_norm(net(epsilon=1e-3), cbn.small_batch_norm(2, epsilon=1e-3))
    assert report(model, rows()).rows[0].layer == "layer"


def test_index_groups():
    model = replace_batch_norm(net(axis_index_groups=[[0, 1]]), SMALL)
    with refused("got axis_index_groups at norm, expected None"):
        model.init(jax.random.key(0), rows())


def test_no_batch_norm():
    model = replace_batch_norm(nn.Sequential([nn.Dense(4), nn.relu]), SMALL)
    message = r"got a model without nn.BatchNorm, expected .*also=\(...\)"
    with refused(message):
        model.init(jax.random.key(0), rows())
    with refused(message):
        report(model, rows())


def test_a_bound_model_is_refused():
    bound = nn.Dense(4).bind({"params": {}})
    with refused("got a bound Dense, expected an unbound module"):
        replace_batch_norm(bound, SMALL)


def test_arguments_of_another_kind():
    def refused(message):
        return pytest.raises(TypeError, match=message)

    with refused(r"got model=.*expected a Flax module"):
        replace_batch_norm(SMALL, net())
    with refused(r"got model=.*expected a Flax module"):
        replace_batch_norm(Coder, SMALL)
    with refused("got estimator=<function batch_norm.*expected an estimator"):
        replace_batch_norm(net(), cbn.batch_norm)
    with refused("got estimator=None, expected an estimator"):
        replace_batch_norm(net(), None)
    with refused("got fallback=0.9, expected an estimator"):
        replace_batch_norm(net(), SMALL, fallback=0.9)


def test_a_fallback_that_needs_a_layer():
    with refused(r"got fallback=small_batch_norm\(.*expected a method that needs none"):
        replace_batch_norm(net(), SMALL, fallback=SMALL)


def test_a_fallback_of_ones_own():
    model = Net(nn.relu, nn.BatchNorm(use_running_average=False))
    fallback = cbn.group_norm(2)
    rows_of = report(replace_batch_norm(model, SMALL, fallback=fallback), rows()).rows
    assert [row.estimator for row in rows_of] == [fallback]


class Dropped(nn.Module):
    """The norm follows the layer without dropout, and does not with it."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))
        return nn.BatchNorm(use_running_average=False, name="norm")(x)


@pytest.mark.parametrize("train", [False, True])
def test_init_with_other_arguments_than_training(train):
    model = replace_batch_norm(Dropped(), SMALL)
    variables = begin(model, rows(), train)
    rngs = {"dropout": jax.random.key(1)}
    assert run(model, variables, rows(), train, rngs=rngs)[0].shape == (4, 4)
    with refused(r"at norm, .*batch_stats of model.init\(\.\.\.\)"):
        run(model, variables, rows(), not train, rngs=rngs)


@pytest.mark.parametrize("estimator", [SMALL, cbn.batch_norm()])
@pytest.mark.parametrize("running", [False, True])
def test_variables_of_nn_batch_norm_are_converted_first(estimator, running):
    trained = begin(net(), rows())
    model = replace_batch_norm(net(use_running_average=running), estimator)
    with refused(r"write variables = cbn_jax.linen.from_batch_norm\(variables, into="):
        run(model, trained, rows())


def test_a_state_of_another_method_is_refused():
    variables = begin(replace_batch_norm(net(), cbn.group_norm(2)), rows())
    with refused("got the state of another method or layer at norm"):
        run(replace_batch_norm(net(), SMALL), variables, rows())


def test_paths_and_classes_come_in_tuples_and_are_met(key):
    with pytest.raises(
        TypeError, match=r"got also=<class .*expected a tuple; write also=\("
    ):
        replace_batch_norm(Dimensions(), SMALL, also=nn.BatchNorm)
    with pytest.raises(TypeError, match=r"write without_layer=\('norm',\)"):
        replace_batch_norm(Dimensions(), SMALL, without_layer="norm")
    net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    model = replace_batch_norm(net, SMALL, without_layer=("layer_1",))
    with pytest.raises(ValueError, match=r"got 'layer_1' in without_layer.*: layers_1\."):
        model.init(key, jnp.ones((2, 3)))


def test_a_trained_model_goes_on_with_a_method_that_adds_parameters(key):
    net = nn.Sequential([nn.Dense(4), nn.relu, nn.BatchNorm(use_running_average=True)])
    model = replace_batch_norm(net, SMALL, fallback=cbn.bidirectional_batch_norm())
    x = jax.random.normal(key, (2, 3))
    trained, fresh = net.init(key, x), model.init(jax.random.key(1), x)
    variables = from_batch_norm(trained, into=fresh)
    assert set(variables["params"]["layers_2"]) == {"backward", "bias", "scale"}
    assert_close(model.apply(variables, x), net.apply(trained, x))


class Holds(nn.Module):
    """A module with an estimator as a field."""

    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, x):
        return Norm(self.estimator, nn.Dense(3), use_running_average=False)(x)


def test_an_estimator_may_be_a_field_of_a_jitted_module(key):
    model = nn.jit(Holds)(SMALL)
    variables = model.init(key, jnp.ones((2, 3)))
    y, _ = model.apply(variables, jnp.ones((2, 3)), mutable=["batch_stats"])
    assert y.shape == (2, 3)


class Pair(nn.Dense):
    """A layer that gives more than its output."""

    @nn.compact
    def __call__(self, inputs):
        y = super().__call__(inputs)
        return y, y.mean()


class OfAPair(nn.Module):
    @nn.compact
    def __call__(self, x):
        y, _ = Pair(4)(x)
        return nn.BatchNorm(use_running_average=False)(y)


def test_a_layer_that_gives_a_pair(key):
    model = replace_batch_norm(OfAPair(), SMALL)
    (row,) = report(model, jnp.ones((2, 3))).rows
    assert row.reason.startswith("Pair_0 ")
    variables = model.init(key, jnp.ones((2, 3)))
    y, _ = model.apply(variables, jnp.ones((2, 3)), mutable=["batch_stats"])
    assert np.isfinite(y).all()
