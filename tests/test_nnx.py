import functools
import inspect
import pickle
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FACTORIES, KINDS
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from cbn_jax.core.named import from_dict, to_dict
from cbn_jax.core.patches import product
from cbn_jax.linen import Norm as LinenNorm
from cbn_jax.nnx import Norm, from_batch_norm, to_batch_norm
from cbn_jax.nnx.layers import as_layer


@pytest.fixture(autouse=True)
def traces():
    chex.clear_trace_counter()


def assert_close(actual, expected, tolerance=1e-5):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


class Net(nnx.Module):
    def __init__(self, estimator, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = Norm(estimator, nnx.Linear(5, 8, use_bias=False, rngs=rngs), rngs=rngs)
        self.second = Norm(estimator, nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, z):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(z)))))


def net(name):
    return Net(FACTORIES[name]())


def rows():
    return np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


def images(seed=0, shift=0.0):
    values = np.random.default_rng(seed).normal(shift, size=(4, 6, 6, 2))
    return values.astype(np.float32)


@nnx.jit
def run(module, z):
    return module(z)


@functools.partial(nnx.jit, static_argnums=2)
def run_as(module, z, running):
    return module(z, use_running_average=running)


@pytest.mark.parametrize("axis", [-1, 1])
def test_drop_in_for_batch_norm(axis, key):
    x = 2.0 + jax.random.normal(key, (8, 5, 5, 5))
    options = {"axis": axis, "rngs": nnx.Rngs(0)}
    theirs = nnx.BatchNorm(5, momentum=0.9, use_fast_variance=False, **options)
    ours = Norm(cbn.batch_norm(momentum=0.9), num_features=5, **options)
    loss = nnx.value_and_grad(lambda module, x: jnp.sin(module(x)).sum())
    for module in (theirs, ours):
        module.train()
    both = nnx.jit(lambda ours, theirs, x: (loss(ours, x), loss(theirs, x)))
    (mine, my_grad), (other, their_grad) = both(ours, theirs, x)
    assert_close(mine, other, 2e-5)
    for name in ("scale", "bias"):
        assert_close(my_grad[name].get_value(), their_grad[name].get_value(), 2e-5)
    mean, var = (value.get_value() for value in (ours.mean, ours.var))
    np.testing.assert_allclose(theirs.mean.get_value(), 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(theirs.var.get_value(), 0.9 + 0.1 * var, rtol=1e-5)


def test_features_on_two_axes(key):
    """As in linen, where the state has both axes."""
    x = jax.random.normal(key, (8, 3, 5, 4))
    options = {"axis": (1, -1), "use_running_average": False}
    linen = LinenNorm(cbn.batch_norm(), **options)
    expected, stats = linen.apply(linen.init(key, x), x, mutable=["batch_stats"])
    norm = Norm(cbn.batch_norm(), num_features=12, rngs=nnx.Rngs(0), **options)
    assert_close(norm(x), expected)
    assert_close(norm.mean.get_value().reshape(3, 4), stats["batch_stats"]["mean"])


def transposed(params, z):
    space = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_transpose(z, params["kernel"], (1, 1), "SAME", dimension_numbers=space)
    return x + params["bias"].reshape(1, 1, 1, -1)


MIXED = cbn.learned(cbn.group_batch_norm, num_groups=2, momentum=0.9)
STREAMING = cbn.streaming_batch_norm(window=3, samples=None, momentum=0.9)
# Each with its layer in linen, in nnx, and as a function.
WAYS = {
    "no_layer": (cbn.batch_norm(momentum=0.9), None, lambda rngs: None, None),
    "dense": (STREAMING, nn.Dense(4), functools.partial(nnx.Linear, 2, 4), cbn.dense),
    "convolution": (
        STREAMING,
        nn.Conv(4, (3, 3), strides=2, padding=1, feature_group_count=2),
        functools.partial(
            nnx.Conv, 2, 4, (3, 3), strides=2, padding=1, feature_group_count=2
        ),
        cbn.convolution(2, 1, groups=2),
    ),
    "another_layer": (
        cbn.cross_iteration_batch_norm(window=3, momentum=0.9),
        nn.ConvTranspose(4, (3, 3)),
        functools.partial(nnx.ConvTranspose, 2, 4, (3, 3)),
        transposed,
    ),
    "learned": (MIXED, nn.Dense(4), functools.partial(nnx.Linear, 2, 4), cbn.dense),
}


@pytest.mark.parametrize("way", WAYS)
def test_linen_nnx_and_functions_are_one(way):
    """Two steps and a prediction each, with the same parameters and states."""
    method, linen_layer, nnx_layer, layer = WAYS[way]
    learns = isinstance(method, cbn.Learned)
    rngs = nnx.Rngs(0)
    features = 2 if layer is None else 4
    module = Norm(method, nnx_layer(rngs=rngs), num_features=features, rngs=rngs)
    graph, variables = nnx.split(module)
    linen = LinenNorm(method, linen_layer)

    def by_nnx(params, state, z, running):
        module = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))  # a copy
        nnx.update(module, params)
        module.state = state
        y = module(z, use_running_average=running)
        return y, module.state

    def by_linen(params, state, z, running):
        given = {"params": params, "batch_stats": to_dict(state)}
        y, updates = linen.apply(given, z, running, mutable=["batch_stats"])
        return y, from_dict(updates["batch_stats"], state)

    def by_functions(params, state, z, running):
        estimator = method.at(jax.nn.sigmoid(params["mix"])) if learns else method
        x, source = z, None
        if layer is not None:
            x, source = cbn.run_layer(layer, params["layer"], z)
        if running:
            statistics = estimator.infer(state, x)
        else:
            statistics, state = estimator.train(state, x, source)
        return cbn.normalize(x, statistics, params["scale"], params["bias"]), state

    @functools.partial(jax.jit, static_argnums=0)
    def steps(norm, params, state, batches):
        def step(carry, z):
            def loss(params, state):
                y, state = norm(params, state, z, False)
                return jnp.sin(y).sum(), (y, state)

            gradient, (y, state) = jax.grad(loss, has_aux=True)(*carry)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, carry[0], gradient)
            return (params, state), (y, gradient)

        after, results = lax.scan(step, (params, state), batches)
        return after, results, norm(*after, batches[0], True)[0]

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32),
        nnx.to_pure_dict(nnx.filter_state(variables, nnx.Param)),
    )
    estimator = method.at(0.5) if learns else method
    state = estimator.init(features, layer, params.get("layer"))
    chex.assert_trees_all_equal(module.state, state)
    batches = np.stack([images(), images(seed=1, shift=1.0)])
    expected = steps(by_functions, params, state, batches)
    assert_close(steps(by_linen, params, state, batches), expected)
    assert_close(steps(by_nnx, params, state, batches), expected)


def learn(model, steps):
    """Losses of some jitted steps."""
    z, labels = rows(), np.arange(8) % 3
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, optimizer, z):
        def loss_fn(model):
            loss = optax.softmax_cross_entropy_with_integer_labels(model(z), labels)
            return loss.mean()

        loss, gradient = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradient)
        return loss

    model.train()
    return [step(model, optimizer, z) for _ in range(steps)]


@pytest.mark.parametrize("name", ["cross_iteration_batch_norm", "fitted_inference"])
def test_trains_and_evaluates(name):
    model = net(name)
    losses = learn(model, 8)
    assert losses[-1] < 0.9 * losses[0]
    before = nnx.state(model, nnx.BatchStat)
    model.eval()
    run(model, rows())
    chex.assert_trees_all_equal(nnx.state(model, nnx.BatchStat), before)


def test_a_model_is_a_tree_with_values():
    """Estimators made by equal calls are equal, so that models are of one form."""

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, z):
        return model(z)

    def made(seed):
        return Net(cbn.corrected_inference(cbn.small_batch_norm(2), examples=2), seed)

    for seed in range(3):
        step(made(seed), rows())
    one, other = made(0), made(1)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    kernels = [m.first.layer.kernel.get_value() for m in (one, other, mean)]
    assert_close(kernels[2], (kernels[0] + kernels[1]) / 2)
    assert mean.first.estimator == one.first.estimator
    assert jax.tree.structure(made(0)) != jax.tree.structure(Net(cbn.small_batch_norm(2)))


def test_a_model_pickles():
    model = net("cross_iteration_batch_norm")
    again = pickle.loads(pickle.dumps(nnx.split(model)))
    assert again[0] == nnx.graphdef(model)
    chex.assert_trees_all_equal(nnx.merge(*again), model)


def test_signature():
    """Editors show the arguments, which the metaclass would hide."""
    parameters = inspect.signature(Norm).parameters
    expected = list(inspect.signature(Norm.__init__).parameters)[1:]
    assert list(parameters) == expected
    assert expected[:4] == ["estimator", "layer", "kernel", "num_features"]
    assert parameters["axis"].default == -1
    assert parameters["rngs"].kind is inspect.Parameter.KEYWORD_ONLY


def test_state_is_batch_stats_and_layers_keep_their_names():
    """Each array is a variable, named as in linen; they are the state and its place."""
    model = net("cross_iteration_batch_norm")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert set(params["first"]) == {"layer", "scale", "bias"}
    assert set(params["second"]["layer"]) == {"kernel", "bias"}
    run(model, rows())
    norm, state = model.second, model.second.state
    assert isinstance(state, cbn.CrossIterationState)
    stats = nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))
    chex.assert_trees_all_equal(stats, to_dict(state))
    assert norm.mean.get_value() is state.running.mean
    kernel = norm.history["d_mean"]["kernel"]
    assert isinstance(kernel, nnx.BatchStat)
    assert kernel.get_value() is state.history.d_mean["kernel"]
    norm.state = jax.tree.map(jnp.zeros_like, state)
    assert not kernel.get_value().any()
    chex.assert_trees_all_equal(norm.state, jax.tree.map(jnp.zeros_like, state))
    norm.var.set_value(jnp.full(8, 2.0))
    assert (norm.state.running.var == 2.0).all()


@pytest.mark.parametrize("name", KINDS)
def test_every_state_goes_in_and_out(name):
    norm = Norm(FACTORIES[name](), nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    rng, before = np.random.default_rng(0), norm.state
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), before)
    norm.state = state
    assert type(norm.state) is type(before)
    chex.assert_trees_all_equal(norm.state, state)
    chex.assert_trees_all_equal(nnx.merge(*nnx.split(norm)).state, state)


def test_a_view_with_the_other_mode():
    module = Norm(cbn.batch_norm(), num_features=2, use_bias=False, rngs=nnx.Rngs(0))
    x = images()
    run(module, x)
    module.set_view(use_running_average=True)
    before = module.state
    run(module, x)
    chex.assert_trees_all_equal(module.state, before)
    run_as(module, x, False)
    assert (module.steps.get_value() == 2).all()
    assert module.bias is None


def test_number_of_features_must_be_known():
    with pytest.raises(ValueError, match=r"num_features=None .*write num_features="):
        Norm(cbn.batch_norm(), rngs=nnx.Rngs(0))
    norm = Norm(
        cbn.batch_norm(), num_features=2, use_running_average=None, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"from neither .*use_running_average=not train"):
        norm(jnp.ones((4, 2)))


def mask_of(*shape):
    return (np.arange(np.prod(shape)).reshape(shape) % 3 > 0).astype(np.float32)


class Scaled(nnx.Module):
    """A layer that nobody knows: parts in a list, a scale that is no parameter."""

    def __init__(self, features, outputs, *, rngs):
        conv = nnx.Conv(features, outputs, (3, 3), rngs=rngs)
        self.parts = nnx.List([conv, nnx.Linear(features, outputs, rngs=rngs)])
        self.scale = nnx.Variable(jnp.float32(2.0))

    def __call__(self, z):
        return self.scale.get_value() * (self.parts[0](z) + self.parts[1](z))


class Valued(nnx.Module):
    """Its parameter is called as what a variable holds."""

    def __init__(self, features, outputs, *, rngs):
        init = nnx.initializers.lecun_normal()
        self.value = nnx.Param(init(rngs.params(), (features, outputs)))

    def __call__(self, z):
        return z @ self.value.get_value()


#: Layers whose patches a formula gives, or differentiation.
LAYERS = {
    "circular": functools.partial(nnx.Conv, kernel_size=(3, 3), padding="CIRCULAR"),
    "input dilation": functools.partial(
        nnx.Conv, kernel_size=(3, 3), input_dilation=(2, 1), padding=1
    ),
    "mask": functools.partial(nnx.Conv, kernel_size=(3, 3), mask=mask_of(3, 3, 2, 4)),
    "transposed": functools.partial(nnx.ConvTranspose, kernel_size=(3, 3)),
    "transposed, mask": functools.partial(
        nnx.ConvTranspose, kernel_size=(3, 3), mask=mask_of(3, 3, 2, 4)
    ),
    "own": Scaled,
    "value": Valued,
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_of_other_layers_make_their_output(name):
    """x = ⟨P, θ⟩ at all positions, in any order."""
    layer, z = LAYERS[name](2, 4, rngs=nnx.Rngs(0)), images()
    x = run(layer, z)
    place = jnp.asarray(np.random.default_rng(0).permutation(x.size // 4))
    spec, params = as_layer(layer, z)

    @jax.jit
    def compute(params, z):
        made, source = cbn.run_layer(spec, params, z)
        return made, product(source.patches(place), params)

    made, there = compute(params, z)
    assert_close(made, x)
    assert_close(there, x.reshape(-1, 4)[place])


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_serves_a_method_with_a_window(name):
    """Under fixed weights a window of two batches has the moments of both."""
    layer = LAYERS[name](2, 4, rngs=nnx.Rngs(0))
    module = Norm(cbn.replay_batch_norm(3, samples=400), layer, rngs=nnx.Rngs(0))
    batches = [images(), images(seed=1, shift=1.0)]
    for z in batches:
        y = run(module, z)
    x = np.concatenate([np.float64(layer(z)) for z in batches])
    axes = (0, 1, 2)
    expected = (x[len(x) // 2 :] - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    assert_close(y, expected, 1e-3)


class Rectified(nnx.Linear):
    def __call__(self, z):
        return nnx.relu(super().__call__(z))


class Dropped(nnx.Module):
    def __init__(self, features, outputs, *, rngs):
        self.linear = nnx.Linear(features, outputs, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, z):
        return self.linear(self.dropout(z))


class WithoutParameters(nnx.Module):
    def __init__(self, features, outputs, *, rngs):
        pass

    def __call__(self, z):
        return jnp.concatenate([z, z], -1)


class Unshaped(nnx.Module):
    def __init__(self, features, outputs, *, rngs):
        self.factor = nnx.Param(jnp.float32(2.0))
        self.linear = nnx.Linear(features, outputs, rngs=rngs)

    def __call__(self, z):
        return self.factor.get_value() * self.linear(z)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            Rectified,
            "Rectified, which applies max to its parameters, expected a layer that",
        ),
        (Dropped, "Dropped, which draws random numbers, expected a layer that is linear"),
        (Unshaped, "factor.*'|parameter .*factor"),
        (WithoutParameters, r"params=\{\}, expected the parameters of the layer"),
    ],
)
def test_what_is_not_linear_is_refused(layer, reason):
    """By methods that look at the layer alone, at the latest in the first step."""
    options = {"num_features": 4, "rngs": nnx.Rngs(0)}
    layer, z = layer(2, 4, rngs=nnx.Rngs(0)), images()
    with pytest.raises(ValueError, match=reason):
        Norm(cbn.small_batch_norm(2), layer, **options)(z)
    assert Norm(cbn.batch_norm(), layer, **options)(z).shape == (4, 6, 6, 4)


class Counted(nnx.Linear):
    """A layer that writes a variable of its own, on which its output depends."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, z):
        self.calls.set_value(self.calls.get_value() + 1.0)
        return self.calls.get_value() * super().__call__(z)


@pytest.mark.parametrize("kernel", [None, cbn.center])
@pytest.mark.parametrize("method", [cbn.batch_norm(), cbn.replay_batch_norm(2, samples=9)])
def test_a_layer_runs_once_and_keeps_what_it_writes(method, kernel):
    """Under jit and grad, and after a merge; with a changed kernel too."""
    layer = Counted(5, 4, use_bias=False, rngs=nnx.Rngs(0))
    norm, z = Norm(method, layer, kernel=kernel, rngs=nnx.Rngs(0)), rows()
    weight = layer.kernel.get_value()
    used = weight if kernel is None else kernel(weight)

    def loss(norm, z):
        y = norm(z)
        return jnp.square(y - 1.0).mean(), y

    step = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    norm = nnx.merge(*nnx.split(norm))
    for count in (1.0, 2.0):
        (_, y), gradient = step(norm, z)
        assert norm.layer.calls.get_value() == count
        assert gradient["layer"]["kernel"].get_value().any()
        np.testing.assert_array_equal(norm.layer.kernel.get_value(), weight)
        x = count * np.float64(z) @ np.float64(used)
        if method == cbn.batch_norm():
            assert_close(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 1e-4)
    assert_close(norm.mean.get_value().shape, (4,))


@pytest.mark.parametrize("kernel", [None, cbn.standardize])
def test_a_module_of_another_trace_predicts(kernel):
    """Closed over, as a constant."""
    conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
    norm = Norm(cbn.small_batch_norm(2), conv, kernel=kernel, rngs=nnx.Rngs(0))
    run(norm, images())
    norm.eval()
    expected = norm(images())
    assert_close(jax.jit(lambda z: norm(z))(images()), expected)
    assert_close(jax.vmap(lambda z: norm(z[None])[0])(images()), expected)


class Scale(NamedTuple):
    scale: jax.Array


def test_a_field_of_a_state_with_a_name_of_the_modules():
    method = cbn.Estimator(
        lambda features, layer=None, params=None: Scale(jnp.ones(features)),
        cbn.batch_norm().train,
        cbn.batch_norm().infer,
        1e-5,
    )
    with pytest.raises(ValueError, match=r"a field scale, a name that Norm uses, .*rename"):
        Norm(method, num_features=3, rngs=nnx.Rngs(0))


# A learned weight.


def gated(mix):
    return cbn.adaptive_batch_norm(MIXED.at(mix))


def test_a_learned_method_has_a_parameter():
    module = Norm(MIXED, num_features=2, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert set(params) == {"bias", "mix", "scale"}
    assert params["mix"].shape == ()
    assert jax.nn.sigmoid(params["mix"]) == pytest.approx(0.731, abs=1e-3)


def test_mix_init():
    options = {"num_features": 2, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    module = Norm(MIXED, mix_init=nnx.initializers.constant(-2.0), **options)
    assert module.mix.get_value() == -2.0
    assert module.mix.get_value().dtype == jnp.bfloat16
    assert Norm(MIXED.at(0.5), **options).mix is None


@pytest.mark.parametrize("method", [MIXED, cbn.learned(gated)], ids=repr)
def test_the_weight_is_trained(method):
    """Also inside a wrapper, without a second trace."""
    model = Net(method)
    losses = learn(model, 10)
    assert losses[-1] < 0.95 * losses[0]
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


@functools.cache
def once_trained_tower():
    model = Tower(nnx.Rngs(0))
    for i, name in enumerate(("scale", "bias")):
        values = np.random.default_rng(i).normal(1.0, size=4)
        getattr(model.norms[0], name).set_value(jnp.asarray(values, jnp.float32))
    model.train()
    for i in range(3):
        run(model, images(seed=i, shift=i))
    return model


def trained_tower():
    return nnx.clone(once_trained_tower())


def converted(model, estimator):
    model = nnx.clone(model)
    for i, norm in enumerate(model.norms):
        model.norms[i] = from_batch_norm(norm, estimator)
    return model


def large_batches(estimator):
    return cbn.corrected_inference(estimator, examples=1e9)


@pytest.mark.parametrize(
    "wrapper", [lambda e: e, large_batches, cbn.fitted_inference, cbn.adaptive_batch_norm]
)
def test_a_converted_model_predicts_the_same(wrapper):
    """In the mode in which it was."""
    trained, z = trained_tower(), images()
    trained.eval()
    model = converted(trained, wrapper(cbn.batch_norm(epsilon=1e-3)))
    assert_close(run(model, z), run(trained, z))


def test_a_converted_model_trains_on():
    """At its own pace: two more steps are those of Flax, averages included."""
    trained = trained_tower()
    model = converted(trained, cbn.batch_norm(momentum=0.9, epsilon=1e-3))
    for i in range(2):
        z = images(seed=i, shift=5.0)
        assert_close(run(model, z), run(trained, z), 1e-4)
    for one in (model, trained):
        one.eval()
    assert_close(run(model, z), run(trained, z), 1e-4)


def test_a_converted_module_keeps_its_options():
    options = {"dtype": jnp.bfloat16, "axis_name": "data", "use_bias": False}
    trained = nnx.BatchNorm(3, use_scale=False, rngs=nnx.Rngs(0), **options)
    norm = from_batch_norm(trained, cbn.batch_norm())
    assert norm.axis_name == "data"
    assert norm.bias is norm.scale is None
    assert norm(jnp.ones((2, 3)), use_running_average=True).dtype == jnp.bfloat16


def test_any_method_goes_on_from_batch_norm():
    """Around the layer before it: it predicts as before, and trains."""
    trained, z = trained_tower(), images()
    estimator = cbn.small_batch_norm(2, epsilon=1e-3)
    norm = from_batch_norm(trained.norms[0], estimator, layer=trained.conv)
    expected = run_as(trained.norms[0], run(trained.conv, z), True)
    assert_close(run_as(norm, z, True), expected)
    run_as(norm, z, False)
    assert norm.window.get_value()[2, 0] == z[..., 0].size


@pytest.mark.parametrize("wrapper", [lambda e: e, cbn.fitted_inference, large_batches])
def test_epsilon_is_one_and_the_same(wrapper):
    trained = nnx.BatchNorm(3, epsilon=1e-3, rngs=nnx.Rngs(0))
    message = (
        r"^from_batch_norm got a module with epsilon=0.001 and an estimator with "
        r"epsilon=1e-05, expected the same; write batch_norm\(epsilon=0.001\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        from_batch_norm(trained, wrapper(cbn.batch_norm()))
    norm = from_batch_norm(trained, wrapper(cbn.batch_norm(epsilon=1e-3)))
    assert to_batch_norm(norm).epsilon == 1e-3
    norm = Norm(wrapper(cbn.batch_norm(epsilon=0.1)), num_features=3, rngs=nnx.Rngs(0))
    assert to_batch_norm(norm).epsilon == 0.1


@pytest.mark.parametrize(
    ("arguments", "came"),
    [
        ((nnx.Linear(3, 3, rngs=nnx.Rngs(0)), cbn.batch_norm()), r"estimator=Linear\("),
        ((cbn.batch_norm(), 16), "layer=16, "),
        ((cbn.batch_norm(), nnx.Linear), "layer=<class .*Linear'>, "),
        ((MIXED.at,), "estimator=<function "),
    ],
)
def test_arguments_of_another_kind(arguments, came):
    with pytest.raises(
        TypeError, match=f"^Norm got {came}.*expected an (estimator|instance)"
    ):
        Norm(*arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("method", "write"),
    [
        (cbn.batch_norm, r"Norm\(batch_norm\(...\)\), with the function called"),
        (cbn.group_batch_norm, r"Norm\(cbn_jax.learned\(group_batch_norm, ...\)\), which"),
    ],
)
def test_a_method_that_was_not_called(method, write):
    message = (
        f"^Norm got the function {method.__name__}, expected an estimator; write {write}"
    )
    with pytest.raises(TypeError, match=message):
        Norm(method, num_features=4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "estimator", [cbn.diminishing_batch_norm(), cbn.group_norm_plus(0.5, num_groups=2)]
)
def test_a_method_without_running_moments_cannot_go_on(estimator):
    trained = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"without running moments, expected batch_norm"):
        from_batch_norm(trained, estimator)


# And back.


def test_back_again():
    """Predictions, the next step and options are what they were."""
    trained, z = trained_tower(), images()
    back = converted(trained, cbn.batch_norm(momentum=0.9, epsilon=1e-3))
    for i, norm in enumerate(back.norms):
        back.norms[i] = to_batch_norm(norm, momentum=0.9)
    back.train()
    assert_close(run(back, z), run(trained, z), 1e-4)
    for model in (back, trained):
        model.eval()
    assert_close(run(back, z), run(trained, z), 1e-4)
    assert back.norms[1].axis == 1
    assert back.norms[1].scale is back.norms[1].bias is None


def test_flax_predicts_what_norm_did(key):
    """Also with a layer, and with averages inside a larger state."""
    rngs = nnx.Rngs(0)
    estimator = cbn.adaptive_batch_norm(cbn.cross_iteration_batch_norm(window=2))
    norm = Norm(estimator, nnx.Linear(3, 4, rngs=rngs), dtype=jnp.float16, rngs=rngs)
    norm.scale.set_value(jnp.linspace(1, 2, 4))
    z = 1.0 + jax.random.normal(key, (8, 3))
    run(norm, z)
    norm.eval()
    actual = run(nnx.Sequential(norm.layer, to_batch_norm(norm)), z)
    assert actual.dtype == jnp.float16
    assert_close(actual, run(norm, z), 1e-2)


@pytest.mark.parametrize(
    "estimator", [cbn.diminishing_batch_norm(), cbn.group_norm_plus(0.5, num_groups=2)]
)
def test_a_method_without_running_moments_cannot_go_back(estimator):
    norm = Norm(estimator, num_features=4, rngs=nnx.Rngs(0))
    message = r"to_batch_norm got a state \(.*steps.*\) with 0 pairs of running averages"
    with pytest.raises(ValueError, match=message):
        to_batch_norm(norm)


@pytest.mark.parametrize("way", ["jit", "shard_map", "vmap"])
def test_many_devices_are_one(way, key):
    """Gradients, outputs and statistics of a pure step around the module."""
    assert jax.device_count() == 8
    estimator = cbn.cross_iteration_batch_norm(window=3, momentum=0.9)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = way != "jit"

    def step(axis_name, params, stats, z):
        def loss_of(params):
            rngs = nnx.Rngs(0)
            layer = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            norm = Norm(estimator, layer, axis_name=axis_name, rngs=rngs)
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
    norm = Norm(estimator, nnx.Conv(3, 4, (3, 3), rngs=rngs), rngs=rngs)
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
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=2e-5)


def test_a_view_without_a_mode_changes_none():
    norm = Norm(cbn.batch_norm(), num_features=3, rngs=nnx.Rngs(0))
    norm.set_view()
    assert norm.use_running_average is False


def test_what_a_converted_module_needs():
    trained = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"expected an estimator; .*batch_norm\(...\)"):
        from_batch_norm(trained, cbn.group_batch_norm)
    trained.axis_index_groups = ((0, 1),)
    with pytest.raises(ValueError, match="axis_index_groups, expected None; write"):
        from_batch_norm(trained, cbn.batch_norm())


@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize("method", [cbn.batch_norm(), cbn.small_batch_norm(2)])
def test_an_axis_and_a_layer(method, rows):
    conv = nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0))
    norm = Norm(method, layer=conv, axis=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"axis=1 with the layer Conv\(.*leave out axis"):
        norm(jnp.ones((2, rows, 6, 3)))


def test_a_layer_with_a_transposed_kernel(key):
    """Its inputs are last; with a window of 1 × 1 it is the layer without, transposed."""
    z, outputs = jax.random.normal(key, (4, 3, 3, 4)), []
    for transposed in (False, True):
        layer = nnx.ConvTranspose(
            4, 4, (1, 1), transpose_kernel=transposed, rngs=nnx.Rngs(0)
        )
        norm = Norm(cbn.cross_iteration_batch_norm(3), layer, rngs=nnx.Rngs(0))
        for step in range(3):  # the weights move between the steps
            kernel = jax.random.normal(jax.random.fold_in(key, step), (1, 1, 4, 4))
            layer.kernel.set_value(kernel.swapaxes(2, 3) if transposed else kernel)
            y = norm(z)
        outputs.append(y)
    chex.assert_trees_all_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_variable_in_the_place_of_a_state():
    norm = Norm(cbn.batch_norm(), num_features=3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"type BatchStat, .*write norm\.state, which"):
        norm.estimator.infer(norm.mean, jnp.ones((2, 3)))
    norm.estimator.infer(norm.state, jnp.ones((2, 3)))


def test_running_moments_of_two_methods_are_buffers_of_their_own():
    methods = {"one": cbn.batch_norm(), "other": cbn.batch_norm(0.5)}
    norm = from_batch_norm(
        nnx.BatchNorm(3, rngs=nnx.Rngs(0)), cbn.diagnostics.watch(methods, use="one")
    )
    jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(norm.state)
