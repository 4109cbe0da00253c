import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FACTORIES, KINDS, LAYERS
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from cbn_jax.linen import Norm as LinenNorm
from cbn_jax.nnx import Norm, from_batch_norm, to_batch_norm

estimators = pytest.mark.parametrize("name", KINDS)


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        norm = functools.partial(norm, rngs=rngs)
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.first = norm(layer=conv(2, 4, use_bias=False))
        self.second = norm(layer=conv(4, 4, strides=2, feature_group_count=2))
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, z):
        z = nnx.relu(self.second(nnx.relu(self.first(z))))
        return self.head(z.mean((1, 2)))


def net(name):
    return Net(functools.partial(Norm, FACTORIES[name]()), nnx.Rngs(0))


def images(key):
    return jax.random.normal(key, (4, 6, 6, 2))


@pytest.mark.parametrize("axis", [-1, 1])
def test_drop_in_for_batch_norm(axis, key):
    x = 2.0 + jax.random.normal(key, (8, 5, 5, 5))
    options = {"axis": axis, "rngs": nnx.Rngs(0)}
    theirs = nnx.BatchNorm(5, momentum=0.9, use_fast_variance=False, **options)
    ours = Norm(cbn.batch_norm(momentum=0.9), num_features=5, **options)
    loss = nnx.value_and_grad(lambda module, x: jnp.sin(module(x)).sum())
    for module in (theirs, ours):
        module.train()
    (mine, my_grad), (other, their_grad) = loss(ours, x), loss(theirs, x)
    assert_close(mine, other, 2e-5)
    for name in ("scale", "bias"):
        assert_close(my_grad[name].get_value(), their_grad[name].get_value(), 2e-5)
    state = ours.state.get_value()
    np.testing.assert_allclose(theirs.mean.get_value(), 0.1 * state.mean, rtol=1e-5)
    np.testing.assert_allclose(theirs.var.get_value(), 0.9 + 0.1 * state.var, rtol=1e-5)


@estimators
def test_equals_linen(name, key):
    """The same weights, inputs and steps: one core under both."""
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    linen = LinenNorm(estimator, layer=nn.Dense(4), use_running_average=False)
    variables = linen.init(key, layer.data(key))
    module = Norm(estimator, nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    for step in range(4):
        moved = 0.5 + 0.1 * step + variables["params"]["layer"]["kernel"]
        params = {**variables["params"]["layer"], "kernel": moved}
        module.layer.kernel.set_value(moved)
        variables = {**variables, "params": {**variables["params"], "layer": params}}
        z = layer.data(jax.random.fold_in(key, step))
        expected, updates = linen.apply(variables, z, mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert_close(module(z), expected)
    assert_close(module.state.get_value(), variables["batch_stats"]["state"])
    module.eval()
    assert_close(module(z), linen.clone(use_running_average=True).apply(variables, z))


@estimators
def test_trains_and_evaluates(name, key):
    model, z, labels = net(name), images(key), jnp.arange(4) % 3
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, z):
        traces.append(None)

        def loss_fn(model):
            loss = optax.softmax_cross_entropy_with_integer_labels(model(z), labels)
            return loss.mean()

        loss, gradient = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradient)
        return loss

    model.train()
    losses = [step(model, optimizer, z) for _ in range(30)]
    assert len(traces) == 1
    assert losses[-1] < 0.6 * losses[0]
    before = nnx.state(model, nnx.BatchStat)
    model.eval()
    model(z)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), before)


def test_split_and_merge(key):
    model, z = net("cross_iteration_batch_norm"), images(key)
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, z):
        model = nnx.merge(graph, state)
        y = model(z)
        return y, nnx.state(model)

    y, state = step(state, z)
    assert_close(y, model(z))
    assert_close(state, nnx.state(model))


def test_state_is_one_batch_stat_and_layers_keep_their_names():
    model = net("cross_iteration_batch_norm")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert set(params["first"]) == {"layer", "scale", "bias"}
    assert set(params["second"]["layer"]) == {"kernel", "bias"}
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert isinstance(stats["first"]["state"], cbn.CrossIterationState)


def test_a_view_with_the_other_mode(key):
    module = Norm(cbn.batch_norm(), num_features=2, use_bias=False, rngs=nnx.Rngs(0))
    x = images(key)
    module(x)
    module.set_view(use_running_average=True)
    before = module.state.get_value()
    module(x)
    assert_close(module.state.get_value(), before, 0)
    module(x, use_running_average=False)
    assert (module.state.get_value().steps == 2).all()
    assert module.bias is None


def test_number_of_features_must_be_known():
    with pytest.raises(ValueError, match=r"num_features=None .*write num_features="):
        Norm(cbn.batch_norm(), rngs=nnx.Rngs(0))
    norm = Norm(
        cbn.batch_norm(), num_features=2, use_running_average=None, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"from neither .*use_running_average=not train"):
        norm(jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("options", "ours"),
    [({}, ()), ({"strides": 2, "padding": 1, "feature_group_count": 2}, (2, 1, 1, 2))],
)
def test_convolutions_know_their_patches(options, ours, key):
    estimator, layer = FACTORIES["streaming_batch_norm"](), cbn.convolution(*ours)
    conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0), **options)
    module = Norm(estimator, conv, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    params = {"bias": conv.bias.get_value(), "kernel": conv.kernel.get_value()}
    state = estimator.init(4, params, layer.groups)
    for batch in (images(key), images(key) + 1.0):
        x, source = cbn.run_layer(layer, params, batch)
        statistics, state = estimator.train(state, x, source)
        assert_close(module(batch), cbn.normalize(x, statistics))
    assert_close(module.state.get_value(), state)


def test_other_layers_say_what_to_write(key):
    conv = nnx.Conv(2, 4, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0))
    module = Norm(cbn.small_batch_norm(2), conv, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"without patches, .*cross_iteration_batch_norm"):
        module(images(key))


# A learned weight.


def mixed(mix):
    return cbn.group_batch_norm(mix, num_groups=2, momentum=0.9)


def gated(mix):
    return cbn.adaptive_batch_norm(mixed(mix))


def test_a_function_of_a_weight_learns_it(key):
    """A scalar as in linen; statistics, too, are those of linen."""
    module = Norm(mixed, num_features=2, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert set(params) == {"bias", "mix", "scale"}
    assert params["mix"].shape == ()
    assert jax.nn.sigmoid(params["mix"]) == pytest.approx(0.731, abs=1e-3)
    linen = LinenNorm(mixed, use_running_average=False)
    module.mix.set_value(jnp.array(-0.4))
    x = images(key)
    variables = linen.init(key, x)
    variables["params"]["mix"] = jnp.array(-0.4)
    for shift in (0.0, 2.0):
        expected, updates = linen.apply(variables, x + shift, mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert_close(module(x + shift), expected)
    expected = linen.clone(use_running_average=True).apply(variables, x)
    assert_close(module(x, use_running_average=True), expected)


def test_mix_init():
    options = {"num_features": 2, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    module = Norm(mixed, mix_init=nnx.initializers.constant(-2.0), **options)
    assert module.mix.get_value() == -2.0
    assert module.mix.get_value().dtype == jnp.bfloat16
    assert Norm(mixed(0.5), **options).mix is None


@pytest.mark.parametrize("factory", [mixed, gated])
def test_the_weight_is_trained(factory, key):
    """Also inside a wrapper, without a second trace."""
    model = Net(functools.partial(Norm, factory), nnx.Rngs(0))
    z, labels, traces = images(key), jnp.arange(4) % 3, []
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        traces.append(None)

        def loss_fn(model):
            loss = optax.softmax_cross_entropy_with_integer_labels(model(z), labels)
            return loss.mean()

        loss, gradient = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradient)
        return loss

    losses = [step(model, optimizer) for _ in range(20)]
    assert len(traces) == 1
    assert losses[-1] < 0.8 * losses[0]
    for norm in (model.first, model.second):
        assert abs(norm.mix.get_value() - 1.0) > 1e-4


# Models trained with Flax.


class Tower(nnx.Module):
    def __init__(self, rngs):
        norm = functools.partial(
            nnx.BatchNorm, momentum=0.9, epsilon=1e-3, use_fast_variance=False, rngs=rngs
        )
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List([norm(4), norm(6, axis=1, use_bias=False, use_scale=False)])

    def __call__(self, z):
        return self.norms[1](nnx.relu(self.norms[0](self.conv(z))))


def trained_tower(key):
    model = Tower(nnx.Rngs(0))
    for name in ("scale", "bias"):
        getattr(model.norms[0], name).set_value(1.0 + jax.random.normal(key, (4,)))
    model.train()
    for i in range(3):
        model(i + images(jax.random.fold_in(key, i)))
    return model


def converted(model, estimator):
    model = nnx.clone(model)
    for i, norm in enumerate(model.norms):
        model.norms[i] = from_batch_norm(norm, estimator)
    return model


def large_batches(estimator):
    return cbn.corrected_inference(estimator, batch_size=1e9, epsilon=1e-3)


@pytest.mark.parametrize(
    "wrapper", [lambda e: e, large_batches, cbn.fitted_inference, cbn.adaptive_batch_norm]
)
def test_a_converted_model_predicts_the_same(wrapper, key):
    """In the mode in which it was."""
    trained, z = trained_tower(key), images(key)
    trained.eval()
    model = converted(trained, wrapper(cbn.batch_norm(epsilon=1e-3)))
    assert_close(model(z), trained(z))


def test_a_converted_model_trains_on(key):
    """At its own pace: two more steps are those of Flax, averages included."""
    trained = trained_tower(key)
    model = converted(trained, cbn.batch_norm(momentum=0.9, epsilon=1e-3))
    for i in range(2):
        z = 5.0 + images(jax.random.fold_in(key, i))
        assert_close(model(z), trained(z), 1e-4)
    for one in (model, trained):
        one.eval()
    assert_close(model(z), trained(z), 1e-4)


def test_a_converted_module_keeps_its_options():
    options = {"dtype": jnp.bfloat16, "axis_name": "data", "use_bias": False}
    trained = nnx.BatchNorm(3, use_scale=False, rngs=nnx.Rngs(0), **options)
    norm = from_batch_norm(trained, cbn.batch_norm())
    assert norm.axis_name == "data"
    assert norm.bias is norm.scale is None
    assert norm(jnp.ones((2, 3)), use_running_average=True).dtype == jnp.bfloat16


def test_any_method_goes_on_from_batch_norm(key):
    """Around the layer before it: it predicts as before, and trains."""
    trained, z = trained_tower(key), images(key)
    estimator = cbn.small_batch_norm(2, epsilon=1e-3)
    norm = from_batch_norm(trained.norms[0], estimator, layer=trained.conv)
    expected = trained.norms[0](trained.conv(z), use_running_average=True)
    assert_close(norm(z, use_running_average=True), expected)
    norm(z, use_running_average=False)
    assert norm.state.get_value().window.size[0] == z[..., 0].size


@pytest.mark.parametrize(
    ("arguments", "came"),
    [
        (
            (nnx.Linear(3, 3, rngs=nnx.Rngs(0)), cbn.batch_norm()),
            "a module, Linear, as its estimator",
        ),
        ((cbn.batch_norm(), 16), "layer=16, no module"),
    ],
)
def test_arguments_of_another_kind(arguments, came):
    with pytest.raises(TypeError, match=f"Norm got {came}.*num_features"):
        Norm(*arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "estimator", [cbn.diminishing_batch_norm(), cbn.group_norm_plus(0.5, num_groups=2)]
)
def test_a_method_without_running_moments_cannot_go_on(estimator):
    trained = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"without running moments, expected batch_norm"):
        from_batch_norm(trained, estimator)


# And back.


def test_back_again(key):
    """Predictions, the next step and options are what they were."""
    trained, z = trained_tower(key), images(key)
    back = converted(trained, cbn.batch_norm(momentum=0.9, epsilon=1e-3))
    for i, norm in enumerate(back.norms):
        back.norms[i] = to_batch_norm(norm, momentum=0.9, epsilon=1e-3)
    back.train()
    assert_close(back(z), trained(z), 1e-4)
    for model in (back, trained):
        model.eval()
    assert_close(back(z), trained(z), 1e-4)
    assert back.norms[1].axis == 1
    assert back.norms[1].scale is back.norms[1].bias is None


def test_flax_predicts_what_norm_did(key):
    """Also with a layer, and with averages inside a larger state."""
    rngs = nnx.Rngs(0)
    estimator = cbn.adaptive_batch_norm(cbn.cross_iteration_batch_norm(window=2))
    norm = Norm(estimator, nnx.Linear(3, 4, rngs=rngs), dtype=jnp.float16, rngs=rngs)
    norm.scale.set_value(jnp.linspace(1, 2, 4))
    z = 1.0 + jax.random.normal(key, (8, 3))
    norm(z)
    norm.eval()
    plain = nnx.Sequential(norm.layer, to_batch_norm(norm))
    assert plain(z).dtype == jnp.float16
    assert_close(plain(z), norm(z), 1e-2)


@pytest.mark.parametrize(
    "estimator", [cbn.diminishing_batch_norm(), cbn.group_norm_plus(0.5, num_groups=2)]
)
def test_a_method_without_running_moments_cannot_go_back(estimator):
    norm = Norm(estimator, num_features=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"with 0 RunningMoments inside, expected one"):
        to_batch_norm(norm)


@pytest.mark.parametrize("way", ["jit", "shard_map", "vmap"])
@pytest.mark.parametrize(
    "name", ["batch_norm", "cross_iteration_batch_norm", "small_batch_norm"]
)
def test_many_devices_are_one(name, way, key):
    """Gradients, outputs and statistics of a pure step around the module."""
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = way != "jit"

    def step(axis_name, params, stats, z):
        def loss_of(params):
            rngs = nnx.Rngs(0)
            layer = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            norm = Norm(FACTORIES[name](), layer, axis_name=axis_name, rngs=rngs)
            nnx.update(norm, params, stats)
            y = norm(z)
            loss = jnp.square(y - 0.5).mean()
            if axis_name is not None and way == "shard_map":
                loss = jax.lax.pmean(loss, axis_name)
            return loss, (y, nnx.state(norm, nnx.BatchStat))

        gradients, (y, stats) = jax.grad(loss_of, has_aux=True)(params)
        if axis_name is not None and way == "vmap":
            gradients = jax.lax.pmean(gradients, axis_name)
        return gradients, stats, y

    rngs = nnx.Rngs(0)
    norm = Norm(FACTORIES[name](), nnx.Conv(3, 4, (3, 3), rngs=rngs), rngs=rngs)
    _, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)
    z = jax.random.normal(key, (16, 5, 5, 3))
    expected = jax.jit(functools.partial(step, None))(params, stats, z)
    run = functools.partial(step, "data" if spread else None)
    if way == "jit":
        split = NamedSharding(mesh, P("data"))
        actual = jax.jit(run)(params, stats, jax.device_put(z, split))
    elif way == "shard_map":
        spec = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P(), P("data"))}
        actual = jax.jit(jax.shard_map(run, mesh=mesh, **spec))(params, stats, z)
    else:
        mapped = jax.vmap(run, (None, None, 0), (None, None, 0), axis_name="data")
        *same, y = jax.jit(mapped)(params, stats, z.reshape(8, 2, *z.shape[1:]))
        actual = *same, y.reshape(16, *y.shape[2:])
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-5),
        actual,
        expected,
    )


def test_a_view_without_a_mode_changes_none():
    norm = Norm(cbn.batch_norm(), num_features=3, rngs=nnx.Rngs(0))
    norm.set_view()
    assert norm.use_running_average is False


def test_what_a_converted_module_needs():
    trained = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"expected an estimator; .*batch_norm\(...\)"):
        from_batch_norm(trained, cbn.group_batch_norm)
    trained.axis_index_groups = ((0, 1),)
    with pytest.raises(ValueError, match="axis_index_groups, expected None; use a mesh"):
        from_batch_norm(trained, cbn.batch_norm())
