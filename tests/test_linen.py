import functools
import pickle

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FACTORIES, KINDS, PARTS, PER_EXAMPLE, infer, normalize
from flax import linen as nn
from flax import serialization
from flax.traverse_util import flatten_dict

import cbn_jax as cbn
from cbn_jax.core.named import find_running, from_dict, to_dict
from cbn_jax.core.patches import product
from cbn_jax.linen import (
    Norm,
    from_batch_norm,
    optimizer_from_batch_norm,
    to_batch_norm,
)
from cbn_jax.linen.layers import as_layer

CBN = cbn.cross_iteration_batch_norm(window=3, momentum=0.9)
WITHOUT_AVERAGES = ["diminishing_batch_norm", "group_norm", "group_norm_plus"]


@pytest.fixture(autouse=True)
def traces():
    chex.clear_trace_counter()


def assert_close(actual, expected, tolerance=1e-5):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


assert_same = chex.assert_trees_all_equal


class Net(nn.Module):
    """Normalized layers; the estimator is the one line that changes."""

    estimator: cbn.Estimator | cbn.Learned
    depth: int = 2

    @nn.compact
    def __call__(self, z, train):
        norm = functools.partial(Norm, self.estimator, use_running_average=not train)
        for _ in range(self.depth):
            z = nn.relu(norm(layer=nn.Dense(8))(z))
        return nn.Dense(3)(z)


def rows(n=8):
    return np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)


def images(n=4, seed=0, shift=0.0):
    values = np.random.default_rng(seed).normal(shift, size=(n, 6, 6, 2))
    return values.astype(np.float32)


# Equal modules share one compiled program in all tests. ``flag`` is ``train`` or
# ``use_running_average``.


@functools.partial(jax.jit, static_argnames=("model", "flag"))
def start(model, key, z, flag=None):
    return model.init(key, z, flag)


@functools.partial(jax.jit, static_argnames=("model", "flag"))
def run(model, variables, z, flag=None):
    """Outputs and the new statistics."""
    return model.apply(variables, z, flag, mutable=["batch_stats"])


def predict(model, variables, z, flag=None):
    return run(model, variables, z, flag)[0]


def form(model, z, flag=None):
    """Shapes of the variables, or the error of making them."""
    return jax.eval_shape(lambda key: model.init(key, z, flag), jax.random.key(0))


@pytest.mark.parametrize("axis", [-1, 1, (1, -1), (3, 1), (2,)])
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_drop_in_for_batch_norm(where, axis, key):
    """Outputs, gradients and predictions; running averages but for Flax's own bias."""
    x = 2.0 + jax.random.normal(key, (8, 5, 5, 5))
    flag = {"use_running_average": False}
    made, called = (flag, {}) if where == "constructor" else ({}, flag)
    theirs = nn.BatchNorm(momentum=0.9, axis=axis, use_fast_variance=False, **made)
    ours = Norm(cbn.batch_norm(momentum=0.9), axis=axis, **made)

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, key, x):
        variables = module.init(key, x, **called)

        def loss(params):
            y, updates = module.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"], **called
            )
            return jnp.sin(y).sum(), (y, updates)

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, (y, updates)), gradient = grad(variables["params"])
        return variables["params"], value, y, gradient, updates

    *mine, my_state = run(ours, key, x)
    *others, their_state = run(theirs, key, x)
    assert_close(mine, others, 2e-5)
    running, flax_stats = my_state["batch_stats"], their_state["batch_stats"]
    np.testing.assert_allclose(flax_stats["mean"], 0.1 * running["mean"], rtol=1e-5)
    np.testing.assert_allclose(flax_stats["var"], 0.9 + 0.1 * running["var"], rtol=1e-5)


def test_inference_equals_flax_with_the_same_statistics(key):
    x = jax.random.normal(key, (8, 5))
    mean, var = jnp.linspace(-1, 1, 5), jnp.linspace(0.5, 2, 5)
    ours, theirs = Norm(cbn.batch_norm()), nn.BatchNorm()
    state = cbn.RunningMoments(mean, var, jnp.ones(5))
    params = {"scale": jnp.linspace(1, 2, 5), "bias": jnp.linspace(0, 1, 5)}
    mine = {"params": params, "batch_stats": state._asdict()}
    flax_variables = {"params": params, "batch_stats": {"mean": mean, "var": var}}
    assert_close(predict(ours, mine, x, True), predict(theirs, flax_variables, x, True))


class Convolutions(nn.Module):
    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, z, train):
        norm = functools.partial(Norm, self.estimator, use_running_average=not train)
        z = nn.relu(norm(layer=nn.Conv(4, (3, 3), use_bias=False))(z))
        z = nn.relu(norm(layer=nn.Conv(4, (3, 3), strides=2, feature_group_count=2))(z))
        return nn.Dense(3)(z.mean((1, 2)))


def test_parameter_tree_is_that_of_batch_norm(key):
    """Snapshot: the wrapped layers stay where they were; checkpoints move over."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, z, train):
            norm = functools.partial(nn.BatchNorm, use_running_average=not train)
            z = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(z)))
            z = nn.Conv(4, (3, 3), strides=2, feature_group_count=2)(z)
            return nn.Dense(3)(nn.relu(norm()(z)).mean((1, 2)))

    plain = start(Plain(), key, images(), False)["params"]
    expected = {name.replace("BatchNorm", "Norm"): leaf for name, leaf in plain.items()}
    assert_same(start(Convolutions(CBN), key, images(), False)["params"], expected)
    for name in FACTORIES:
        params = form(Convolutions(FACTORIES[name]()), images(), False)["params"]
        chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_written_once_trains_with_every_method(name, key):
    """Jitted, donated, serialized in the middle, without a second trace."""
    model, optimizer = Net(FACTORIES[name](), depth=1), optax.sgd(0.2)
    labels, z = np.arange(8) % 3, rows()
    variables = start(model, key, z, False)
    params, stats = variables["params"], variables["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(params, stats, z):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, z, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(y, labels)
            return loss.mean(), updates["batch_stats"]

        (loss, new), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params))
        return optax.apply_updates(params, updates), new, loss

    losses = []
    for i in range(8):
        params, stats, loss = step(params, stats, z)
        losses.append(loss)
        if i == 3:
            stats = serialization.from_bytes(stats, serialization.to_bytes(stats))
            stats = jax.device_put(stats)
    # Of eight rows, each by itself, there is less to learn by heart.
    assert losses[-1] < (0.9 if name in PER_EXAMPLE | PARTS else 0.75) * losses[0]
    predicted = predict(model, {"params": params, "batch_stats": stats}, z, False)
    assert np.isfinite(predicted).all()


@pytest.mark.parametrize("name", ["batch_norm", "cross_iteration_batch_norm"])
def test_initializing_updates_nothing_and_needs_no_axis(name, key):
    estimator, z = FACTORIES[name](), np.ones((1, 5), np.float32)
    module = Norm(estimator, layer=nn.Dense(4), axis_name="nowhere")
    variables = start(module, key, z, False)
    fresh = estimator.init(4, cbn.dense, variables["params"]["layer"])
    assert_same(variables["batch_stats"], to_dict(fresh))


@pytest.mark.parametrize("name", KINDS)
def test_a_state_is_plain_dicts_of_arrays(name, key):
    """As checkpoints know them, the running averages on top; and back."""
    estimator = FACTORIES[name]()
    variables = start(Norm(estimator, nn.Dense(4)), key, rows(), True)
    stats = variables["batch_stats"]
    flat = flatten_dict(stats)
    assert all(type(key) is str for path in flat for key in path)
    assert all(isinstance(leaf, jax.Array) for leaf in flat.values())
    form = estimator.init(4, cbn.dense, variables["params"]["layer"])
    assert from_dict(stats, form)._fields == form._fields
    assert_same(from_dict(stats, form), form)
    averages = find_running(form).values()
    assert_same(list(find_running(stats).items()), [((), each) for each in averages])


def test_evaluation_leaves_the_state(key):
    model, z = Net(CBN), rows()
    variables = start(model, key, z, False)
    jax.eval_shape(lambda v: model.apply(v, z, train=False), variables)  # immutable
    _, after = run(model, variables, z, False)
    assert_same(after["batch_stats"], variables["batch_stats"])
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        jax.eval_shape(lambda v: model.apply(v, z, train=True), variables)


def test_a_model_is_a_value(key):
    """As a static argument it is traced once, and it pickles with its estimator."""

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(1)
    def init(model, key):
        return model.init(key, rows(), False)

    def made():
        return Net(cbn.corrected_inference(cbn.small_batch_norm(2), examples=2))

    for seed in range(3):
        init(made(), jax.random.key(seed))
    again = pickle.loads(pickle.dumps(made()))
    assert again == made()
    assert repr(again) == repr(made())
    assert_same(init(again, key), init(made(), key))


def test_options(key):
    x = jax.random.normal(key, (8, 5), jnp.bfloat16)
    module = Norm(
        cbn.batch_norm(),
        use_running_average=True,
        use_bias=False,
        scale_init=nn.initializers.constant(3.0),
        param_dtype=jnp.bfloat16,
        dtype=jnp.float32,
    )
    variables = start(module, key, x)
    y = predict(module, variables, x)
    assert set(variables["params"]) == {"scale"}
    assert variables["params"]["scale"].dtype == jnp.bfloat16
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 3.0 * np.float32(x), rtol=1e-2)
    plain = Norm(cbn.batch_norm(), use_running_average=True)
    y, _ = jax.eval_shape(plain.init_with_output, key, x)
    assert y.dtype == jnp.bfloat16


@pytest.mark.program
def test_a_norm_around_a_norm(key):
    """A layer may have statistics itself, as in batch-channel normalization."""
    inner = Norm(cbn.small_batch_norm(2), nn.Dense(8), use_running_average=False)
    outer = Norm(cbn.group_norm(2), inner, use_running_average=False)
    variables = outer.init(key, rows())
    y, updates = outer.apply(variables, rows(), mutable=["batch_stats"])
    parts = {name: tree["layer"] for name, tree in variables.items()}
    z, after = inner.apply(parts, rows(), mutable=["batch_stats"])
    assert_same(updates["batch_stats"]["layer"], after["batch_stats"])
    group = nn.GroupNorm(2, epsilon=1e-5)
    assert_close(y, group.apply({"params": group.init(key, z)["params"]}, z))


def test_wide_layers_take_one_pass(key):
    """The derivatives for one feature more, not for all of them again."""
    z = np.ones((2, 16, 16, 32), np.float32)

    def flops(estimator):
        module = Norm(estimator, layer=nn.Conv(32, (3, 3)))
        variables = form(module, z, True)
        return run.lower(module, variables, z, False).compile().cost_analysis()["flops"]

    assert flops(CBN) / flops(cbn.batch_norm()) < 2.15


@pytest.mark.parametrize(
    ("given", "came"), [((None, None), "neither"), ((True, False), "both")]
)
def test_flag_given_never_or_twice(given, came):
    with pytest.raises(ValueError, match=f"use_running_average from {came} .*not train"):
        form(Norm(cbn.batch_norm(), use_running_average=given[0]), rows(), given[1])


def test_cross_iteration_without_a_layer():
    with pytest.raises(ValueError, match="params=None, expected the parameters"):
        form(Norm(CBN), rows(), False)


CONVOLUTIONS = {
    "plain": ({}, ()),
    "strided": ({"strides": 2, "padding": "VALID"}, (2, "VALID")),
    "padded": ({"padding": (1, (2, 0))}, (1, (1, (2, 0)))),
    "dilated": ({"kernel_dilation": 2, "padding": 1}, (1, 1, 2)),
    "grouped": ({"feature_group_count": 2}, (1, "SAME", 1, 2)),
    "no window strides": ({"strides": None, "kernel_dilation": None}, ()),
}


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions_know_their_patches(options, key):
    """A step of the module equals one of the functional core."""
    flax_options, ours = CONVOLUTIONS[options]
    estimator, layer = FACTORIES["streaming_batch_norm"](), cbn.convolution(*ours)
    conv = nn.Conv(4, (3, 3), **flax_options)
    module = Norm(estimator, conv, use_scale=False, use_bias=False)

    @jax.jit
    def compare(key, z):
        variables = module.init(key, z, True)
        params = variables["params"]["layer"]
        y, updates = module.apply(variables, z, False, mutable=["batch_stats"])
        x, source = cbn.run_layer(layer, params, z)
        statistics, state = estimator.train(estimator.init(4, layer, params), x, source)
        return (y, updates["batch_stats"]), (cbn.normalize(x, statistics), to_dict(state))

    assert_close(*compare(key, images()))


def mask_of(*shape):
    return (np.arange(np.prod(shape)).reshape(shape) % 3 > 0).astype(np.float32)


class Scaled(nn.Module):
    """A layer that nobody knows: its outputs are scaled, its kernel has another name."""

    @nn.compact
    def __call__(self, z):
        weight = self.param("weight", nn.initializers.lecun_normal(), (3, 2, 4))
        bias = self.param("bias", nn.initializers.normal(), (4,))
        scale = self.variable("scales", "own", lambda: jnp.float32(2.0)).value
        patches = jnp.stack([z, jnp.roll(z, 1, 1), jnp.roll(z, 1, 2)], -2)
        x = jnp.einsum("...ij,ijk->...k", patches, weight) + bias.reshape(1, 1, 1, -1)
        return scale * x


#: Layers whose patches a formula gives, or differentiation.
LAYERS = {
    "circular": nn.Conv(4, (3, 3), padding="CIRCULAR"),
    "reflect": nn.Conv(4, (3, 3), padding="REFLECT", strides=2),
    "causal": nn.Conv(4, (3,), padding="CAUSAL"),
    "input dilation": nn.Conv(4, (3, 3), input_dilation=(2, 1), padding=1),
    "mask": nn.Conv(4, (3, 3), mask=mask_of(3, 3, 2, 4)),
    "transposed": nn.ConvTranspose(4, (3, 3)),
    "transposed, strided": nn.ConvTranspose(4, (3, 2), (2, 1), padding="VALID"),
    "transposed, kernel": nn.ConvTranspose(4, (3, 3), transpose_kernel=True),
    "transposed, mask": nn.ConvTranspose(4, (3, 3), mask=mask_of(3, 3, 2, 4)),
    "local": nn.ConvLocal(4, (3, 3)),
    "own": Scaled(),
}


def inputs_of(layer, seed=0, shift=0.0):
    """Sequences for a window of one dimension."""
    values = images(seed=seed, shift=shift)
    return values[:, 0] if getattr(layer, "kernel_size", ()) == (3,) else values


@pytest.mark.parametrize("name", LAYERS)
def test_patches_of_other_layers_make_their_output(name, key):
    """x = ⟨P, θ⟩ at all positions, in any order."""
    layer = LAYERS[name]
    z = inputs_of(layer)
    variables = jax.jit(layer.init)(key, z)
    x = layer.apply(variables, z)
    place = jnp.asarray(np.random.default_rng(0).permutation(x.size // 4))

    @jax.jit
    def compute(variables, z):
        spec, params = as_layer(layer.bind(variables), z)
        made, source = cbn.run_layer(spec, params, z)
        return made, product(source.patches(place), params)

    made, there = compute(variables, z)
    assert_close(made, x)
    assert_close(there, x.reshape(-1, 4)[place])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "estimator",
    [
        cbn.batch_norm(),
        cbn.streaming_batch_norm(3, samples=None),
        cbn.replay_batch_norm(3, samples=400),
        CBN,
    ],
    ids=["batch_norm", "streaming", "replay", "cross_iteration"],
)
def test_every_layer_serves_every_method(estimator, name, key):
    """Under fixed weights a window of two batches has the moments of both."""
    layer = LAYERS[name]
    module = Norm(estimator, layer, use_running_average=False)
    batches = [inputs_of(layer), inputs_of(layer, seed=1, shift=1.0)]
    step = jax.jit(lambda v, z: module.apply(v, z, mutable=["batch_stats"]))
    variables = jax.jit(module.init)(key, batches[0])
    for z in batches:
        y, updates = step(variables, z)
        variables = {**variables, **updates}
    own = {"params": variables["params"]["layer"]}
    own |= {"scales": variables["scales"]["layer"]} if name == "own" else {}
    seen = batches[1:] if estimator == cbn.batch_norm() else batches
    x = np.concatenate([np.float64(layer.apply(own, z)) for z in seen])
    axes = tuple(range(x.ndim - 1))
    # Older batches have less weight in streaming.
    weights = [2.0, 3.0] if "streaming" in repr(estimator) else [1.0] * len(seen)
    weights = np.repeat(weights, len(x) // len(seen))
    mean = np.average(x.mean(axes[1:]), axis=0, weights=weights)
    var = np.average(np.square(x - mean).mean(axes[1:]), axis=0, weights=weights)
    assert_close(y, (x[-len(y) :] - mean) / np.sqrt(var + 1e-5), 1e-3)


class Rectified(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.relu(nn.Dense(4)(z))


class Standardized(nn.Module):
    @nn.compact
    def __call__(self, z):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 4))
        centered = kernel - kernel.mean(0, keepdims=True)
        return z @ (centered / jnp.sqrt(jnp.square(centered).mean(0, keepdims=True)))


class Shifted(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(4)(z) + 1.0


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(z))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Rectified(), "applies max to its parameters"),
        (Standardized(), "applies square to its parameters"),
        (Shifted(), "adds something else to its parameters"),
        (nn.Sequential([nn.Dense(4), nn.Dense(4)]), "multiplies .* with each other"),
    ],
)
def test_what_is_not_linear_is_refused(layer, reason, key):
    """At once, and by methods that look at the layer alone."""
    name = type(layer).__name__
    message = rf"^Norm got the layer {name} at layer, which {reason}, expected a "
    with pytest.raises(ValueError, match=message + "layer that is linear in its param"):
        form(Norm(cbn.small_batch_norm(2), layer), images(), False)
    form(Norm(cbn.batch_norm(), layer), images(), False)


def test_a_layer_that_draws_is_refused(key):
    module = Norm(cbn.small_batch_norm(2), Dropped(), use_running_average=False)
    keys = {"params": key, "dropout": key}
    with pytest.raises(ValueError, match="Dropped at layer, which draws random numbers"):
        module.init(keys, images())
    module = Norm(cbn.batch_norm(), Dropped(), use_running_average=False)
    module.init(keys, images())


# A learned weight.


MIXED = cbn.learned(cbn.group_batch_norm, num_groups=2, momentum=0.9)


def gated(mix):
    return cbn.adaptive_batch_norm(MIXED.at(mix))


def test_a_learned_method_is_a_value():
    assert repr(MIXED) == "learned(group_batch_norm, num_groups=2, momentum=0.9)"
    assert repr(cbn.learned(gated)) == "learned(gated)"
    same = cbn.learned(cbn.group_batch_norm, num_groups=2, momentum=0.9)
    assert (same, hash(same)) == (MIXED, hash(MIXED))
    assert cbn.learned(cbn.group_batch_norm, num_groups=4) != MIXED
    assert pickle.loads(pickle.dumps(MIXED)) == MIXED
    assert pickle.loads(pickle.dumps(cbn.learned(gated))) == cbn.learned(gated)
    options = {"num_groups": 2, "momentum": 0.9}
    assert MIXED.at(0.25) == cbn.group_batch_norm(0.25, **options)
    assert cbn.learned(cbn.group_norm_plus, num_groups=2, epsilon=0.1).epsilon == 0.1


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (cbn.batch_norm, {}, r"^learned got batch_norm, .*with an argument mix; write"),
        (MIXED.at(0.5), {}, r"^learned got group_batch_norm\(mix=0.5, .*, expected a"),
        (cbn.group_batch_norm, {"groups": 2}, "unexpected keyword argument 'groups'"),
        (cbn.group_batch_norm, {"mix": 0.5}, "multiple values for keyword argument 'mix'"),
    ],
)
def test_what_cannot_be_learned(method, options, message):
    with pytest.raises(TypeError, match=message):
        cbn.learned(method, **options)


def test_a_learned_method_checks_its_options():
    with pytest.raises(ValueError, match="num_groups is 0"):
        cbn.learned(cbn.group_batch_norm, num_groups=0)


def test_the_weight_is_the_sigmoid_of_a_parameter(key):
    x = images()
    module = Norm(MIXED, mix_init=nn.initializers.zeros)
    params = start(module, key, x, True)["params"]
    assert params["mix"].shape == ()
    assert params["mix"] == 0.0
    params = {**params, "mix": np.float32(-0.4)}
    state = cbn.from_batch_stats(jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0]))
    variables = {"params": params, "batch_stats": state._asdict()}
    estimator = MIXED.at(1.0 / (1.0 + np.exp(0.4)))
    trained = jax.jit(lambda state, x: estimator.train(state, x)[0])(state, x)
    for statistics, running in ((infer(estimator, state, x), True), (trained, False)):
        assert_close(predict(module, variables, x, running), normalize(x, statistics))


def test_the_weight_starts_as_published(key):
    params = start(Norm(MIXED), key, images(), True)["params"]
    assert set(params) == {"bias", "mix", "scale"}
    assert jax.nn.sigmoid(params["mix"]) == pytest.approx(0.731, abs=1e-3)
    half = Norm(MIXED, param_dtype=jnp.bfloat16)
    variables = form(half, images(), True)
    assert variables["params"]["mix"].dtype == jnp.bfloat16
    jax.eval_shape(lambda v: run(half, v, images(), False), variables)


@pytest.mark.parametrize("method", [MIXED, cbn.learned(gated)], ids=repr)
def test_the_weight_is_trained(method, key):
    """Also inside a wrapper, without a second trace."""
    model, z, labels = Net(method), rows(), np.arange(8) % 3
    variables = start(model, key, z, False)
    first, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, stats):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, z, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(y, labels)
            return loss.mean(), updates["batch_stats"]

        (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return params, stats, loss

    params, losses = first, []
    for _ in range(10):
        params, stats, loss = step(params, stats)
        losses.append(loss)
    assert losses[-1] < 0.9 * losses[0]
    for name in ("Norm_0", "Norm_1"):
        assert abs(params[name]["mix"] - first[name]["mix"]) > 1e-4


# Models trained with Flax.


class Block(nn.Module):
    norm: functools.partial

    @nn.compact
    def __call__(self, z, train):
        z = nn.Conv(4, (3, 3))(z)
        return nn.relu(self.norm(use_running_average=not train)(z))


class Tower(nn.Module):
    """Names by Flax and by hand, on two levels."""

    norm: functools.partial

    @nn.compact
    def __call__(self, z, train):
        running = not train
        z = self.norm(use_running_average=running)(z)
        z = Block(self.norm)(z, train)
        z = self.norm(use_running_average=running, name="my_BatchNorm_0")(z)
        z = self.norm(use_running_average=running, use_bias=False)(z)
        return self.norm(use_running_average=running, name="BatchNorm_out")(z)


@functools.cache
def tower(estimator=None):
    """With ``nn.BatchNorm``, or with an estimator."""
    options = {"momentum": 0.9, "epsilon": 1e-3, "use_fast_variance": False}
    if estimator is None:
        return Tower(functools.partial(nn.BatchNorm, **options))
    return Tower(functools.partial(Norm, estimator))


@functools.cache
def trained_tower():
    """Variables of a model with ``nn.BatchNorm`` after some batches."""
    variables = start(tower(), jax.random.key(0), images(), False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.normal(size=p.shape).astype(p.dtype), variables["params"]
    )
    variables = {**variables, "params": params}
    for i in range(3):
        _, updates = run(tower(), variables, images(seed=i, shift=i), True)
        variables = {**variables, **updates}
    return variables


@pytest.mark.parametrize(
    "wrapped",
    [lambda e: e, lambda e: cbn.corrected_inference(e, examples=1e9)],
    ids=["batch_norm", "corrected_inference"],
)
def test_a_converted_model_predicts_the_same(wrapped):
    ours = tower(wrapped(cbn.batch_norm(epsilon=1e-3)))
    variables, z = from_batch_norm(trained_tower()), images(seed=9)
    chex.assert_trees_all_equal_structs(variables, form(ours, z, False))
    expected = predict(tower(), trained_tower(), z, False)
    assert_close(predict(ours, variables, z, False), expected)


def test_a_converted_model_trains_on():
    """At its own pace: two more steps are those of Flax, averages included."""
    ours = tower(cbn.batch_norm(momentum=0.9, epsilon=1e-3))
    flax_variables, variables = trained_tower(), from_batch_norm(trained_tower())
    for i in range(2):
        z = images(seed=i, shift=5.0)
        expected, updates = run(tower(), flax_variables, z, True)
        flax_variables = {**flax_variables, **updates}
        y, updates = run(ours, variables, z, True)
        variables = {**variables, **updates}
        assert_close(y, expected, 1e-4)
    expected = predict(tower(), flax_variables, images(), False)
    assert_close(predict(ours, variables, images(), False), expected, 1e-4)


class Layers(nn.Module):
    """Each layer and its normalizer by one function, as in a model that is to change."""

    norm: functools.partial

    @nn.compact
    def __call__(self, z, train):
        z = nn.relu(self.norm(nn.Conv(4, (3, 3)), z, train))
        return self.norm(nn.Dense(3), z, train)


def behind(layer, z, train):
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.5, epsilon=1e-3)
    return norm(layer(z))


@functools.cache
def trained_layers():
    variables = start(Layers(behind), jax.random.key(0), images(), False)
    _, updates = run(Layers(behind), variables, images(shift=2.0), True)
    return {**variables, **updates}


def around(estimator):
    return lambda layer, z, train: Norm(estimator, layer, use_running_average=not train)(z)


@pytest.mark.parametrize(
    "estimator",
    [
        cbn.small_batch_norm(2, epsilon=1e-3),
        cbn.cross_iteration_batch_norm(4, running="window", epsilon=1e-3),
        cbn.adaptive_batch_norm(cbn.replay_batch_norm(2, samples=8, epsilon=1e-3)),
    ],
    ids=["small_batch", "cross_iteration", "adaptive_replay"],
)
def test_any_method_goes_on_from_batch_norm(estimator, key):
    """It predicts as before, starts with an empty window, and trains."""
    model, z = Layers(around(estimator)), images()
    fresh = start(model, key, z, False)
    variables = from_batch_norm(trained_layers(), into=fresh)
    chex.assert_trees_all_equal_structs(variables, fresh)
    expected = predict(Layers(behind), trained_layers(), z, False)
    assert_close(predict(model, variables, z, False), expected)
    assert np.abs(predict(model, fresh, z, False) - expected).max() > 0.1
    y, updates = run(model, variables, z, True)
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("features", "named", "came"),
    [
        (5, None, r"\(4,\) in mean .*expected \(5,\) as"),
        (4, "last", r"got \['Conv_0', .*'last'\]"),
    ],
)
def test_what_goes_on_has_the_same_modules(features, named, came):
    class Other(nn.Module):
        @nn.compact
        def __call__(self, z, train):
            norm = around(cbn.batch_norm())
            z = norm(nn.Conv(features, (3, 3)), z, train)
            return norm(nn.Dense(3, name=named), z, train)

    fresh = form(Other(), images(), False)
    with pytest.raises(ValueError, match=came):
        from_batch_norm(trained_layers(), into=fresh)


def test_a_method_without_running_moments_does_not_go_on():
    fresh = form(Layers(around(cbn.diminishing_batch_norm())), images(), False)
    with pytest.raises(ValueError, match="moments at Norm_0, expected batch_norm"):
        from_batch_norm(trained_layers(), into=fresh)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norms_own_state_is_not_taken_for_ours(train):
    """With equal names Flax would begin a state beside it, and lose the averages."""
    z = images()
    norm = nn.BatchNorm(use_running_average=True)
    variables = jax.eval_shape(nn.Sequential([norm]).init, jax.random.key(0), z)
    ours = nn.Sequential([Norm(cbn.batch_norm(), use_running_average=not train)])
    message = (
        r"^Norm got the state of another method or layer at layers_0, with mean, var, "
        r"expected mean, steps, var for batch_norm\(.*; "
        r"write variables = .*from_batch_norm\("
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: ours.apply(v, z, mutable=["batch_stats"]), variables)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("other", "came"),
    [
        (
            Norm(cbn.group_norm(2)),
            r"at the root, with steps, expected mean, steps, var for",
        ),
        (
            Norm(CBN, nn.Dense(2)),
            r"at the root, with history, .*, expected mean, steps, var",
        ),
        (Norm(cbn.batch_norm(), axis=1), r"mean of shape \(6,\), expected shape \(2,\)"),
        (
            nn.Dense(2),
            "at the root, with nothing, expected mean, steps, var for batch_norm",
        ),
    ],
)
def test_a_state_of_another_method_is_refused(other, came, train, key):
    z = images()
    flag = () if isinstance(other, nn.Dense) else (True,)
    stats = dict(jax.jit(lambda z: other.init(key, z, *flag))(z)).get("batch_stats", {})
    ours = Norm(cbn.batch_norm(), use_running_average=not train)
    variables = {**start(ours, key, z), "batch_stats": stats}
    with pytest.raises(ValueError, match=f"of another method or layer .*{came}"):
        ours.apply(variables, z, mutable=["batch_stats"])


@pytest.mark.parametrize(
    ("arguments", "came"),
    [
        ((nn.Dense(3), CBN), r"estimator=Dense\(, "),
        ((3,), "estimator=3, "),
        ((lambda mix: MIXED.at(mix),), "estimator=<function <lambda>"),
        ((cbn.cumulative(),), r"estimator=cumulative\(\), "),
        ((CBN, nn.Dense), "layer=<class .*Dense'>, "),
        ((CBN, jnp.sin), "layer=<.*sin.*, "),
        ((CBN, 16), "layer=16, "),
    ],
)
def test_arguments_of_another_kind(arguments, came):
    with pytest.raises(
        TypeError, match=f"^Norm got {came}.*expected an (estimator|instance)"
    ):
        form(Norm(*arguments), rows(), False)


@pytest.mark.parametrize(
    ("method", "write"),
    [
        (cbn.batch_norm, r"Norm\(batch_norm\(...\)\), with the function called"),
        (cbn.small_batch_norm, r"Norm\(small_batch_norm\(...\)\), with"),
        (cbn.group_batch_norm, r"Norm\(cbn_jax.learned\(group_batch_norm, ...\)\), which"),
        (cbn.group_norm_plus, r"Norm\(cbn_jax.learned\(group_norm_plus, ...\)\), which"),
    ],
)
def test_a_method_that_was_not_called(method, write):
    message = (
        f"^Norm got the function {method.__name__}, expected an estimator; write {write}"
    )
    with pytest.raises(TypeError, match=message):
        form(Norm(method), rows(), False)


def test_nothing_to_convert(key):
    variables = jax.eval_shape(nn.Dense(4).init, key, rows())
    with pytest.raises(ValueError, match=r"collections \['params'\] .*pass all variables"):
        from_batch_norm(variables)


@pytest.mark.parametrize(
    ("convert", "came"),
    [
        (
            from_batch_norm,
            "from_batch_norm got modules in/BatchNorm_0 and in/Norm_0, which",
        ),
        (to_batch_norm, "to_batch_norm got modules in/Norm_0 and in/BatchNorm_0, which"),
    ],
)
def test_two_modules_cannot_have_one_name(convert, came):
    moments = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    norm = cbn.from_batch_stats(**moments)._asdict()
    stats = {"BatchNorm_0": moments, "Norm_0": norm}
    with pytest.raises(ValueError, match=f"^{came} would have the same name, .*rename one"):
        convert({"batch_stats": {"in": stats}})


def test_a_scanned_stack_is_converted(key):
    """Moments of all its layers are in one array."""

    def stack(norm):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, z, _):
                return norm(use_running_average=True, name="norm")(nn.Dense(2)(z)), None

        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(Body, axes, split_rngs={"params": True}, length=3)()

    theirs = stack(functools.partial(nn.BatchNorm, epsilon=1e-3))
    ours = stack(functools.partial(Norm, cbn.batch_norm(epsilon=1e-3)))
    z = jax.random.normal(key, (4, 2))
    variables = start(theirs, key, z)
    stats = jax.tree.map(
        lambda leaf: jnp.linspace(0.5, 2.0, 6).reshape(leaf.shape), variables["batch_stats"]
    )
    variables = {**variables, "batch_stats": stats}
    y, _ = predict(ours, from_batch_norm(variables), z)
    assert_close(y, predict(theirs, variables, z)[0])


# And back.


def test_back_again():
    """Names, parameters and averages are what they were."""
    back = to_batch_norm(from_batch_norm(trained_tower()))
    assert_same(back, trained_tower())


class Plain(nn.Module):
    @nn.compact
    def __call__(self, z, _):
        norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3)
        z = norm()(nn.Conv(4, (3, 3), use_bias=False)(z))
        return norm(name="last")(nn.Dense(3)(z.mean((1, 2))))


class Ours(nn.Module):
    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, z, _):
        norm = functools.partial(Norm, self.estimator, use_running_average=True)
        z = norm(layer=nn.Conv(4, (3, 3), use_bias=False))(z)
        return norm(name="last", layer=nn.Dense(3))(z.mean((1, 2)))


@pytest.mark.parametrize(
    "name",
    [
        "batch_norm",
        "cross_iteration_batch_norm",
        "streaming_batch_norm",
        "replay_batch_norm",
        "adaptive_batch_norm",
    ],
)
def test_flax_predicts_what_norm_did(name):
    """For any state; layers made in the model stay where they are."""
    model, z = Ours(FACTORIES[name](epsilon=1e-3)), images(2)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 2.0, leaf.shape).astype(leaf.dtype), form(model, z)
    )
    actual = predict(Plain(), to_batch_norm(variables), z)
    assert_close(actual, predict(model, variables, z), 1e-4)


@pytest.mark.parametrize("name", WITHOUT_AVERAGES)
def test_a_state_without_running_moments_cannot_go_back(name):
    stats = {"Norm_0": to_dict(FACTORIES[name]().init(4))}
    message = r"to_batch_norm got a state \(.*steps.*\) with 0 pairs of running averages"
    with pytest.raises(ValueError, match=message):
        to_batch_norm({"batch_stats": stats})


def test_a_state_of_another_module_stays():
    averages = to_dict(FACTORIES["batch_norm"]().init(3))
    own = {"state": jnp.zeros(3), "steps": jnp.zeros(()), "mean": jnp.zeros(3)}
    within = {"Norm_0": averages, "steps": jnp.zeros(())}
    stats = {"Norm_0": averages, "own": own, "within": within}
    back = to_batch_norm({"batch_stats": stats})["batch_stats"]
    flax_stats = {name: averages[name] for name in ("mean", "var")}
    within = {"BatchNorm_0": flax_stats, "steps": within["steps"]}
    assert_same(back, {"BatchNorm_0": flax_stats, "own": own, "within": within})


def test_a_state_of_another_module_stays_also_on_the_way_to_ours():
    flax_stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    own = {"steps": jnp.zeros(3), "mean": jnp.zeros(3), "state": {"u": jnp.zeros(2)}}
    fresh = to_dict(cbn.batch_norm().init(3))
    variables = {"batch_stats": {"BatchNorm_0": flax_stats, "own": own}}
    expected = {"batch_stats": {"Norm_0": fresh | flax_stats, "own": own}}
    for into in (
        None,
        {"batch_stats": {"Norm_0": fresh, "own": jax.tree.map(jnp.ones_like, own)}},
    ):
        made = from_batch_norm(variables, into=into)
        made["batch_stats"]["Norm_0"] |= {"steps": fresh["steps"]}
        assert_same(made, expected)


def test_watched_methods_go_on_and_cannot_go_back():
    """Each has running averages of its own."""
    methods = {"one": cbn.batch_norm(), "other": cbn.cross_iteration_batch_norm(2)}
    estimator = cbn.diagnostics.watch(methods, use="one")
    fresh = form(Layers(around(estimator)), images(), False)
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fresh)
    variables = from_batch_norm(trained_layers(), into=fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, fresh)
    for name in methods:
        state = variables["batch_stats"]["Norm_0"]["states"][name]
        expected = trained_layers()["batch_stats"]["BatchNorm_0"]
        assert_same({key: state[key] for key in expected}, expected)
    with pytest.raises(ValueError, match=r"\(estimated, states, truth\) with 2 pairs"):
        to_batch_norm(variables)


def test_nothing_to_convert_back(key):
    variables = jax.eval_shape(nn.Dense(4).init, key, rows())
    with pytest.raises(ValueError, match=r"^to_batch_norm got .*\['params'\] without"):
        to_batch_norm(variables)


@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 1, 5), (6, 3, 5), (1, 3, 1)])
def test_a_mask_with_features_on_two_axes(shape, key):
    """As for one axis of as many features; the state has both."""
    x = jax.random.normal(key, (6, 3, 5))
    mask = jax.random.bernoulli(key, 0.7, shape)
    two = Norm(cbn.batch_norm(), axis=(1, 2), use_running_average=False)
    one = Norm(cbn.batch_norm(), use_running_average=False)
    joined = mask[:, 0, :1] if shape[1:] == (1, 1) else jnp.broadcast_to(mask, x.shape)
    options = {"mutable": ["batch_stats"]}
    flat = x.reshape(6, 15)
    y, stats = two.apply(two.init(key, x), x, mask=mask, **options)
    joined = joined.reshape(6, -1)
    expected, same = one.apply(one.init(key, flat), flat, mask=joined, **options)
    assert_close(y.reshape(6, 15), expected)
    assert_close(jax.tree.map(lambda leaf: leaf.reshape(-1), stats), same)
    assert stats["batch_stats"]["mean"].shape == (3, 5)


def test_a_mask_with_features_in_front(key):
    """The mask's axes are those of the activations, wherever the features are."""
    x = jax.random.normal(key, (6, 3, 5))
    mask = np.arange(5) < 4
    back = Norm(cbn.batch_norm(), axis=1)
    front = Norm(cbn.batch_norm())

    @jax.jit
    def both(key, x):
        variables = front.init(key, x.swapaxes(1, 2), True)
        options = {"mutable": ["batch_stats"]}
        y, stats = back.apply(variables, x, False, mask=mask[None, None], **options)
        swapped = front.apply(
            variables, x.swapaxes(1, 2), False, mask=mask[None, :, None], **options
        )
        return (y.swapaxes(1, 2), stats), swapped

    assert_close(*both(key, x))


def test_a_layer_of_ones_own(key):
    """No ``features`` that would have to change: its parameters say how many."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, z):
            if self.is_initializing():
                return z @ self.param("kernel", nn.initializers.lecun_normal(), (3, 4))
            return z @ self.variables["params"]["kernel"]

    own = Norm(CBN, layer=Own())
    dense = Norm(CBN, layer=nn.Dense(4, use_bias=False))
    z = jax.random.normal(key, (6, 3))
    variables = {layer: start(layer, key, z, True) for layer in (own, dense)}
    for step in range(3):
        kernel = jax.random.normal(jax.random.fold_in(key, step), (3, 4))
        made = {}
        for layer in (own, dense):
            params = {**variables[layer]["params"], "layer": {"kernel": kernel}}
            y, stats = run(layer, {**variables[layer], "params": params}, z, False)
            variables[layer] = {**variables[layer], **stats}
            made[layer] = y, stats
        # All features of a dense layer see the same inputs; of ours, nobody knows.
        shapes = jax.tree.map(jnp.shape, made[own][1])
        y, stats = made[dense]
        stats = jax.tree.map(jnp.broadcast_to, stats, shapes)
        assert_close(made[own], (y, stats))


# Arguments that do not fit together.


@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize("method", [cbn.batch_norm(), cbn.small_batch_norm(2)])
def test_an_axis_and_a_layer(method, rows, key):
    """The features of a layer are last, also where another axis has as many."""
    norm = Norm(method, nn.Conv(6, (3, 3)), axis=1, use_running_average=False)
    with pytest.raises(ValueError, match=r"axis=1 with the layer Conv\(.*leave out axis"):
        norm.init(key, jnp.ones((2, rows, 6, 3)))


@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_that_is_not_there(axis, key):
    norm = Norm(cbn.batch_norm(), axis=axis, use_running_average=False)
    with pytest.raises(
        ValueError, match=rf"axis={axis} for .*expected an axis from -3 to 2"
    ):
        norm.init(key, jnp.ones((2, 5, 4)))


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("axis", [-1, 1])
def test_a_mask_of_a_tokenizer(axis, running, key):
    norm, x = Norm(cbn.batch_norm(), axis=axis), jnp.ones((2, 5, 5))
    variables = norm.init(key, x, True)
    mask = jnp.ones((2, 5), bool)
    with pytest.raises(
        ValueError, match=r"Norm got a mask of .*write mask\[\.\.\., None\]"
    ):
        norm.apply(variables, x, running, mask=mask, mutable=["batch_stats"])


def test_a_layer_with_a_transposed_kernel(key):
    """Its inputs are last; with a window of 1 × 1 it is the layer without, transposed."""
    estimator, z = cbn.cross_iteration_batch_norm(3), jax.random.normal(key, (4, 3, 3, 4))
    outputs = []
    for transposed in (False, True):
        layer = nn.ConvTranspose(4, (1, 1), transpose_kernel=transposed)
        norm = Norm(estimator, layer, use_running_average=False)
        variables = norm.init(key, z)
        for step in range(3):  # the weights move between the steps
            kernel = jax.random.normal(jax.random.fold_in(key, step), (1, 1, 4, 4))
            kernel = kernel.swapaxes(2, 3) if transposed else kernel
            layer_params = {**variables["params"]["layer"], "kernel": kernel}
            params = {**variables["params"], "layer": layer_params}
            y, updates = norm.apply({**variables, "params": params}, z, mutable=True)
            variables = {**updates, "params": params}
        outputs.append(y)
    chex.assert_trees_all_close(*outputs, rtol=1e-4, atol=1e-5)


# The state of an optimizer.


class Residual(nn.Module):
    """Two levels of modules that Flax names, in another order than ours."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, z):
        z = nn.Dense(4)(z)
        z = nn.relu(self.norm()(z))
        return nn.Dense(2)(Inner(self.norm)(z))


class Inner(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, z):
        return self.norm(name="own")(nn.Dense(4)(self.norm()(z)))


def kernels(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def names(params):
    return jax.tree.map(lambda leaf: "adam" if leaf.ndim > 1 else "momentum", params)


OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "masked": optax.chain(optax.clip(0.5), optax.masked(optax.adam(0.1), kernels)),
    "two": optax.multi_transform(
        {"adam": optax.adam(0.1), "momentum": optax.sgd(0.1, momentum=0.9)}, names
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_trained_optimizer_goes_on(optimizer, key, loose):
    """Its next update is the one that it would have made, under the new names."""
    theirs = functools.partial(nn.BatchNorm, use_running_average=True)
    ours = functools.partial(Norm, cbn.batch_norm(), use_running_average=True)
    z = jax.random.normal(key, (3, 4))
    variables = Residual(theirs).init(key, z)
    params, fresh = variables["params"], Residual(ours).init(key, z)["params"]

    def renamed(tree):
        return from_batch_norm({**variables, "params": tree})["params"]

    chex.assert_trees_all_equal_structs(renamed(params), fresh)
    gradients = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
    _, opt_state = optimizer.update(gradients, optimizer.init(params), params)
    expected, _ = optimizer.update(gradients, opt_state, params)
    opt_state = optimizer_from_batch_norm(opt_state, variables)
    actual, _ = optimizer.update(renamed(gradients), opt_state, renamed(params))
    chex.assert_trees_all_equal(actual, renamed(expected))


def test_an_optimizer_without_batch_norm(key):
    variables = nn.Dense(2).init(key, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"optimizer_from_batch_norm got collections"):
        optimizer_from_batch_norm((), variables)
