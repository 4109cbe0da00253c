import functools
import inspect
import subprocess
import sys

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import KINDS, make
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from cbn_jax.equinox import Norm

MIXED = cbn.learned(cbn.group_batch_norm, num_groups=2, momentum=0.9)
CBN = cbn.cross_iteration_batch_norm(window=3, momentum=0.9)


@pytest.fixture(autouse=True)
def traces():
    chex.clear_trace_counter()


def assert_close(actual, expected, rtol=1e-4, atol=1e-4):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def over_batch(model):
    return jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")


def made(estimator, layer=None, **options):
    options = {"axis_name": "batch"} | options
    return eqx.nn.make_with_state(Norm)(estimator, layer, **options)


def numbers(*shape, seed=0, shift=0.0):
    values = np.random.default_rng(seed).normal(shift, size=shape)
    return values.astype(np.float32)


@eqx.filter_jit
def run(model, state, z, **options):
    return over_batch(functools.partial(model, **options))(z, state)


@eqx.filter_jit
def predict(model, state, z):
    """Without an axis name."""
    return jax.vmap(model, (0, None))(z, state)


# Each layer in Equinox, as a function, and the shape of an example.
KEY = jax.random.key(0)
LAYERS = {
    "no_layer": (lambda: None, None, (4, 3)),
    "linear": (lambda: eqx.nn.Linear(5, 4, key=KEY), cbn.dense, (5,)),
    "linear-no_bias": (
        lambda: eqx.nn.Linear(5, 4, use_bias=False, key=KEY),
        cbn.dense,
        (5,),
    ),
    "conv": (
        lambda: eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=KEY),
        cbn.convolution(strides=2, padding=1),
        (2, 5, 6),
    ),
    "conv-one_dimension": (
        lambda: eqx.nn.Conv1d(2, 4, 3, padding="SAME_LOWER", stride=2, key=KEY),
        cbn.convolution(2, "SAME_LOWER"),
        (2, 6),
    ),
    "conv-three_dimensions": (
        lambda: eqx.nn.Conv3d(2, 4, 2, use_bias=False, key=KEY),
        cbn.convolution(padding="VALID"),
        (2, 3, 4, 3),
    ),
    "conv-grouped": (
        lambda: eqx.nn.Conv2d(
            4, 4, 3, padding=((1, 0), (2, 1)), dilation=(1, 2), groups=2, key=KEY
        ),
        cbn.convolution(1, ((1, 0), (2, 1)), (1, 2), groups=2),
        (4, 5, 6),
    ),
    # Their patches are differentiated here, and cut in the functions.
    "conv-circular": (
        lambda: eqx.nn.Conv2d(2, 4, 3, padding=1, padding_mode="CIRCULAR", key=KEY),
        cbn.convolution(padding="CIRCULAR"),
        (2, 4, 5),
    ),
    "conv-reflect": (
        lambda: eqx.nn.Conv1d(4, 4, 3, 2, 1, groups=2, padding_mode="REFLECT", key=KEY),
        cbn.convolution(2, "REFLECT", groups=2),
        (4, 6),
    ),
}


def by_module(estimator, layer, states, model, state, z, inference):
    del estimator, layer
    state = jax.tree.map(lambda leaf: leaf, states).set(model.state_index, state)
    y, state = over_batch(functools.partial(model, inference=inference))(z, state)
    return y, state.get(model.state_index)


def by_functions(estimator, layer, states, model, state, z, inference):
    """The whole batch at once, features last, with the module's parameters."""
    del states
    if isinstance(estimator, cbn.Learned):
        estimator = estimator.at(jax.nn.sigmoid(model.mix))
    if model.backward is not None:
        estimator = estimator.at(model.backward)
    x, source = jnp.moveaxis(z, 1, -1), None
    if layer is not None:
        params = {"kernel": jnp.moveaxis(model.layer.weight, (1, 0), (-2, -1))}
        if model.layer.bias is not None:
            params["bias"] = model.layer.bias.reshape(-1)
        x, source = cbn.run_layer(layer, params, x)
    if inference:
        statistics = estimator.infer(state, x)
    else:
        statistics, state = estimator.train(state, x, source)
    y = cbn.normalize(x, statistics, model.scale, model.bias)
    return jnp.moveaxis(y, -1, 1), state


@eqx.filter_jit
def two_steps(norm, estimator, layer, states, model, state, batches):
    """Outputs, gradients and states of two steps, and a prediction."""
    norm = functools.partial(norm, estimator, layer, states)
    arrays, others = eqx.partition(model, eqx.is_inexact_array)
    optimizer = cbn.optax.with_backward_statistics(optax.sgd(0.05))
    opt_state = optimizer.init(arrays)

    def step(carry, z):
        arrays, state = carry

        @functools.partial(eqx.filter_grad, has_aux=True)
        def gradient_of(model):
            y, new = norm(model, state, z, False)
            return jnp.sin(y).sum(), (y, new)

        gradient, (y, new) = gradient_of(eqx.combine(arrays, others))
        updates, _ = optimizer.update(gradient, opt_state, arrays)
        return (eqx.apply_updates(arrays, updates), new), (y, gradient, new)

    (arrays, state), results = lax.scan(step, (arrays, state), batches)
    return results, norm(eqx.combine(arrays, others), state, batches[0], True)[0]


def compared(estimator, kind):
    new, layer, shape = LAYERS[kind]
    model, states = made(estimator, new(), num_features=4)
    model = eqx.tree_at(
        lambda m: (m.scale, m.bias), model, (1.0 + numbers(4, seed=1), numbers(4))
    )
    state = jax.tree.map(jnp.copy, states.get(model.state_index))
    batches = np.stack([numbers(6, *shape), numbers(6, *shape, seed=1, shift=0.5)])
    given = (estimator, layer, states, model, state, batches)
    assert_close(two_steps(by_module, *given), two_steps(by_functions, *given))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", KINDS)
def test_the_module_is_the_functions(name, kind):
    """One example at a time under ``vmap``, with every method."""
    compared(make(name), kind)


@pytest.mark.parametrize("kind", sorted(LAYERS.keys() - {"linear", "conv", "no_layer"}))
def test_every_layer(kind):
    """With a method that needs the layer's patches."""
    compared(cbn.streaming_batch_norm(window=3, samples=None, momentum=0.9), kind)


@pytest.mark.parametrize("kind", ["no_layer", "conv"])
def test_a_learned_method_has_a_parameter(kind):
    model, _ = made(MIXED, LAYERS[kind][0](), num_features=4)
    assert model.mix == 1.0
    compared(MIXED, kind)


@pytest.mark.parametrize("method", [cbn.bidirectional_batch_norm, cbn.online_norm])
def test_backward_statistics_are_parameters(method):
    """With statistics of the batch, and of each example."""
    compared(method(), "conv")


def test_some_positions_are_those_of_the_whole_batch():
    compared(cbn.streaming_batch_norm(window=3, samples=12, momentum=0.9), "conv")


def test_drop_in_for_batch_norm():
    """The output of ``mode="batch"`` at the first step, and its prediction."""
    theirs, their_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        4, "batch", momentum=0.9, mode="batch"
    )
    model, state = made(cbn.batch_norm(momentum=0.9), num_features=4)
    z = numbers(6, 4, 3, shift=2.0)
    y, state = run(model, state, z)
    expected, their_state = run(theirs, their_state, z)
    assert_close(y, expected)
    y, _ = run(model, state, z, inference=True)
    assert_close(y.mean((0, 2)), jnp.zeros(4))
    assert_close(y.std((0, 2)), jnp.ones(4))


# What Equinox does with models.


class Net(eqx.Module):
    first: Norm
    second: Norm
    head: eqx.nn.Linear

    def __init__(self, estimator, key):
        keys = jax.random.split(key, 3)
        first = eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0])
        self.first = Norm(estimator, first, axis_name="batch")
        second = eqx.nn.Linear(4, 8, key=keys[1])
        self.second = Norm(estimator, second, axis_name="batch", use_bias=False)
        self.head = eqx.nn.Linear(8, 3, key=keys[2])

    def __call__(self, x, state):
        z, state = self.first(x, state)
        z, state = self.second(jax.nn.relu(z).mean((1, 2)), state)
        return self.head(jax.nn.relu(z)), state


def net(name="small_batch_norm", seed=0):
    return eqx.nn.make_with_state(Net)(make(name), jax.random.key(seed))


def test_trains_without_a_second_trace():
    @eqx.filter_jit
    @chex.assert_max_traces(1)
    def step(model, state, z, labels):
        def loss_of(model, state):
            logits, state = over_batch(model)(z, state)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -picked.mean(), state

        grad = eqx.filter_value_and_grad(loss_of, has_aux=True)
        (loss, state), gradient = grad(model, state)
        updates = jax.tree.map(lambda g: -0.3 * g, gradient)
        return loss, eqx.apply_updates(model, updates), state

    model, state = net()
    z, labels, losses = numbers(6, 2, 4, 4), np.arange(6) % 3, []
    for _ in range(8):
        loss, model, state = step(model, state, z, labels)
        losses.append(loss)
    assert losses[-1] < 0.9 * losses[0]
    step(*net(seed=1), z, labels)  # a new, equal model uses the same program


def test_inference_mode():
    """It needs no axis name, and changes no state."""
    model, state = net("cross_iteration_batch_norm")
    z = numbers(6, 2, 4, 4)
    _, state = run(model, state, z)
    predicting = eqx.nn.inference_mode(model)
    y, after = predict(predicting, state, z)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], after), state)
    assert_close(predicting(z[0], state)[0], y[0])
    assert_close(run(predicting, state, z)[0], y)
    assert jax.tree.structure(eqx.nn.inference_mode(predicting, False)) == (
        jax.tree.structure(model)
    )


def test_inference_from_a_batch():
    """With the axis name; else every example is a batch of its own."""
    estimator = make("group_norm_plus")
    model, state = made(estimator, num_features=4, inference=True)
    z = numbers(6, 4, 3)
    each = jnp.stack([model(one, state)[0] for one in z])
    assert_close(predict(model, state, z)[0], each)
    x = jnp.moveaxis(z, 1, -1)
    expected = cbn.normalize(x, estimator.infer(state.get(model.state_index), x))
    assert_close(run(model, state, z)[0], jnp.moveaxis(expected, -1, 1))
    assert not np.allclose(each, jnp.moveaxis(expected, -1, 1), atol=0.1)


def test_a_call_overrides_the_mode():
    model, state = made(cbn.batch_norm(), num_features=4, inference=True)
    z = numbers(6, 4)
    y, after = run(model, state, z)
    chex.assert_trees_all_equal(after, state)
    trained, after = run(model, after, z, inference=False)
    assert (after.get(model.state_index).steps == 1).all()
    assert not np.allclose(trained, y)


def test_sequential():
    def build():
        return eqx.nn.Sequential(
            [
                Norm(CBN, eqx.nn.Linear(5, 4, key=KEY), axis_name="batch"),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Dropout(0.0),
                Norm(cbn.batch_norm(), num_features=4, axis_name="batch"),
            ]
        )

    model, state = eqx.nn.make_with_state(build)()
    z = numbers(6, 5)
    y, new = run(model, state, z, key=KEY)
    first, other = made(CBN, eqx.nn.Linear(5, 4, key=KEY))
    x, _ = run(first, other, z)
    last, other = made(cbn.batch_norm(), num_features=4)
    assert_close(y, run(last, other, jax.nn.relu(x))[0])
    assert (new.get(model[3].state_index).steps == 1).all()


@pytest.mark.parametrize("name", ["small_batch_norm", "fitted_inference"])
def test_a_model_on_disk(name, tmp_path):
    """Restored into a new model, it trains on as before."""
    model, state = net(name)
    z = numbers(6, 2, 4, 4)
    _, state = run(model, state, z)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", (model, state))
    like = eqx.filter_eval_shape(net, name, seed=1)
    again, restored = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(run(again, restored, z), run(model, state, z))


def test_weights_of_a_trained_layer():
    """They are in the layer, as Equinox has them."""
    layer = eqx.nn.Conv2d(2, 4, 3, key=jax.random.key(1))
    model, state = made(CBN, eqx.nn.Conv2d(2, 4, 3, key=KEY))
    model = eqx.tree_at(lambda model: model.layer, model, layer)
    z = numbers(6, 2, 4, 4)
    y, _ = run(model, state, z, inference=True)
    expected = jax.vmap(layer)(z) / np.sqrt(np.float32(1.0 + 1e-5))
    assert_close(y, expected)


def test_an_ensemble():
    """One state for each member."""

    @eqx.filter_vmap
    def build(key):
        return eqx.nn.make_with_state(Norm)(
            CBN, eqx.nn.Linear(5, 4, key=key), axis_name="batch"
        )

    models, states = build(jax.random.split(KEY, 3))
    z = numbers(6, 5)
    outputs, states = eqx.filter_vmap(run, in_axes=(eqx.if_array(0), 0, None))(
        models, states, z
    )
    one = jax.tree.map(lambda leaf: leaf[1] if eqx.is_array(leaf) else leaf, models)
    other, state = made(CBN, eqx.nn.Linear(5, 4, key=KEY))
    other = eqx.tree_at(lambda model: model.layer, other, one.layer)
    assert_close(outputs[1], run(other, state, z)[0])


@pytest.mark.parametrize("way", ["jit", "shard_map"])
@pytest.mark.parametrize("name", ["cross_iteration_batch_norm", "group_batch_norm"])
def test_many_devices(name, way, eight_devices):
    """One batch: ``jit`` with a sharded batch, or a tuple of names, ``vmap``'s last."""
    layer, z = eqx.nn.Linear(5, 4, key=KEY), numbers(16, 5)
    model, state = made(make(name), layer)
    expected = run(model, state, z)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    if way == "jit":
        actual = run(model, state, jax.device_put(z, NamedSharding(mesh, P("data"))))
    else:
        model, state = made(make(name), layer, axis_name=["data", "batch"])
        specs = {"in_specs": (P("data"), P()), "out_specs": (P("data"), P())}
        spread = jax.shard_map(over_batch(model), mesh=mesh, check_vma=False, **specs)
        actual = jax.jit(spread)(z, state)
    assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected))


def test_without_an_axis_every_call_is_a_batch():
    model, state = made(cbn.group_norm(num_groups=2), num_features=4, axis_name=None)
    z = numbers(4, 3)
    y, state = model(z, state)
    assert_close(y.reshape(2, -1).mean(-1), jnp.zeros(2))
    assert (state.get(model.state_index).steps == 1).all()


def test_dtypes():
    model, state = made(cbn.batch_norm(), num_features=4, use_scale=False, use_bias=False)
    assert model.scale is model.bias is model.mix is None
    y, state = run(model, state, numbers(6, 4).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    model, state = made(cbn.batch_norm(), num_features=4, dtype=jnp.float16)
    assert run(model, state, numbers(6, 4))[0].dtype == jnp.float16


# What does not work says what to write.


def test_training_needs_the_batch():
    model, state = made(cbn.batch_norm(), num_features=4)
    message = (
        r"outside of jax.vmap\(axis_name='batch'\), .*; write jax\.vmap\(model, "
        r"axis_name='batch', in_axes=\(0, None\), out_axes=\(0, None\)\)\(x, state\)\."
    )
    for call in (model, jax.vmap(model, (0, None)), jax.vmap(model, axis_name="data")):
        with pytest.raises(ValueError, match=message):
            call(jnp.ones((4, 4)), state)


@pytest.mark.parametrize(
    ("layer", "came"),
    [
        (eqx.nn.ConvTranspose2d(2, 4, 3, key=KEY), "layer=ConvTranspose2d"),
        (eqx.nn.Linear("scalar", 4, key=KEY), r"layer=Linear\('scalar', 4\)"),
        (eqx.nn.Linear(4, "scalar", key=KEY), r"layer=Linear\(4, 'scalar'\)"),
        (eqx.nn.Linear, "layer=Linear"),
        (16, "layer=int"),
    ],
)
def test_other_layers(layer, came):
    message = f"^Norm got {came}, expected an instance of eqx.nn.Linear .*; .*num_features="
    with pytest.raises(TypeError, match=message):
        Norm(cbn.batch_norm(), layer, axis_name="batch")


@pytest.mark.parametrize("method", [CBN, cbn.small_batch_norm(2)], ids=["cbn", "small"])
@pytest.mark.parametrize("mode", ["CIRCULAR", "REFLECT", "REPLICATE"])
def test_another_padding(mode, method):
    """The first step is that of batch norm, whatever the padding."""
    layer = eqx.nn.Conv2d(2, 4, 3, padding=2, padding_mode=mode, key=KEY)
    z = numbers(6, 2, 4, 4)
    y, _ = run(*made(method, layer), z)
    x = jax.vmap(layer)(z)
    assert_close(y, run(*made(cbn.batch_norm(), num_features=4), x)[0])


@pytest.mark.parametrize(
    ("estimator", "came"),
    [(cbn.batch_norm, "batch_norm"), (MIXED.at, "at"), (64, "64")],
)
def test_arguments_of_another_kind(estimator, came):
    with pytest.raises(TypeError, match=f"^Norm got estimator={came}, .*; write Norm"):
        Norm(estimator, num_features=4, axis_name="batch")


def test_number_of_features():
    with pytest.raises(ValueError, match=r"neither a layer .*; write num_features=\.\.\.$"):
        Norm(cbn.batch_norm(), axis_name="batch")
    model, state = made(cbn.batch_norm(), num_features=4)
    for shape in ((3, 4), ()):
        with pytest.raises(ValueError, match=r"example with 4 channels first; write jax"):
            model(jnp.ones(shape), state, inference=True)


def test_signature():
    parameters = inspect.signature(Norm).parameters
    assert list(parameters)[:3] == ["estimator", "layer", "num_features"]
    assert parameters["axis_name"].default is inspect.Parameter.empty


def test_a_missing_equinox_is_one_sentence():
    code = "import sys; sys.modules['equinox'] = None; import cbn_jax.equinox"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "cbn_jax.equinox needs Equinox; install it with: pip install" in run.stderr
