"""At home in every transformation: of JAX, of linen, of nnx, of optax."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    FACTORIES,
    KINDS,
    LAYERS,
    apply,
    eager_train,
    infer,
    init,
    make,
    normalize,
    train,
)
from flax import nnx
from jax import export

import cbn_jax as cbn
from cbn_jax import linen as cbn_linen
from cbn_jax import nnx as cbn_nnx

estimators = pytest.mark.parametrize("name", KINDS)
WIDTH = 4
# In Flax models: a plain state, and one in another, with a ring.
NESTED = cbn.adaptive_batch_norm(cbn.cross_iteration_batch_norm(window=3, momentum=0.9))
flax_estimators = pytest.mark.parametrize(
    "estimator", [cbn.batch_norm(momentum=0.9), NESTED], ids=["plain", "nested"]
)


def assert_close(actual, expected, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 2e-5} | tolerance
    chex.assert_trees_all_close(actual, expected, **tolerance)


def slice_of(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], jax.device_get(tree))


def loss_of(estimator, layer, state, z, params):
    x, statistics, after = eager_train(estimator, state, layer, params, z)
    return jnp.square(cbn.normalize(x, statistics) - 1.0).sum(), after


@estimators
def test_gradients_of_recomputed_and_of_scaled_losses(name, key):
    """``jax.checkpoint`` changes nothing; loss scaling nothing but the gradient."""
    layer, estimator = LAYERS["dense"], make(name)
    params, z = layer.params(key), layer.data(key)
    state = init(estimator, layer, params)

    @jax.jit
    def gradients(state, params, z):
        f = functools.partial(loss_of, estimator, layer, state, z)

        def scaled(params):
            loss, after = f(params)
            return 2.0**15 * loss, after

        return [jax.grad(g, has_aux=True)(params) for g in (f, jax.checkpoint(f), scaled)]

    plain, recomputed, (large, after) = gradients(state, params, z)
    assert_close(recomputed, plain)
    assert_close((jax.tree.map(lambda g: g / 2.0**15, large), after), plain)


@estimators
def test_no_tracer_leaks(name, key):
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    params = layer.params(key)
    state = init(estimator, layer, params)
    step = jax.jit(lambda s, z: eager_train(estimator, s, layer, params, z))
    with jax.checking_leaks():
        step.trace(state, layer.data(key))


@estimators
def test_inference_is_exported(name, key):
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32),
        init(estimator, layer, layer.params(key)),
    )
    x = apply(layer, layer.params(key), layer.data(key))
    (examples,) = export.symbolic_shape("examples")
    shape = jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype)
    # A state of NamedTuples has no name in a file: its leaves do.
    leaves, form = jax.tree.flatten(state)

    @jax.jit
    def predict(leaves, x):
        return cbn.normalize(x, estimator.infer(jax.tree.unflatten(form, leaves), x))

    restored = export.deserialize(export.export(predict)(leaves, shape).serialize())
    expected = normalize(x, infer(estimator, state, x))
    assert_close(restored.call(leaves, x), expected)


@estimators
def test_arrays_of_numpy_as_constants(name, key):
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    params, z = jax.device_get((layer.params(key), layer.data(key)))
    state = init(estimator, layer, params)
    x = np.ones((3, 4), np.float32)
    jax.eval_shape(lambda: eager_train(estimator, state, layer, params, z))
    jax.eval_shape(lambda: estimator.infer(state, x))


@estimators
def test_shapes_without_values(name, key):
    layer, estimator = LAYERS["conv"], FACTORIES[name]()
    params, z = layer.params(key), layer.data(key)
    state = jax.eval_shape(lambda: init(estimator, layer, params))
    step = functools.partial(eager_train, estimator)
    _, _, after = jax.eval_shape(lambda s, z: step(s, layer, params, z), state, z)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for leaf, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype) == (leaf.shape, jnp.float32)
        assert new.size > 0


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(cbn.cross_iteration_batch_norm, gradient="window"),
        functools.partial(cbn.streaming_batch_norm, samples=None),
        functools.partial(cbn.replay_batch_norm, samples=4),
    ],
)
def test_accumulated_gradients_see_one_batch(factory, key):
    """Between two steps of ``optax.MultiSteps`` the window pools micro-batches exactly.

    Streaming forgets, so that later ones count more, and pools as exactly.
    """
    decays = factory.func is cbn.streaming_batch_norm
    layer, micro = LAYERS["dense"], 4
    estimator = factory(window=micro)
    params = layer.params(key)
    optimizer = optax.MultiSteps(optax.sgd(0.1), micro)
    opt_state = optimizer.init(params)
    state = init(estimator, layer, params)
    z = layer.data(key, examples=4 * micro)

    @jax.jit
    def step(params, opt_state, state, z):
        loss = functools.partial(loss_of, estimator, layer, state, z)
        gradient, state = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    before = params
    for batch in z.reshape(micro, 4, -1):
        last, filled = params, state
        params, opt_state, state = step(params, opt_state, state, batch)
    assert_close(last, before)  # the weights stood still
    _, statistics, _ = train(estimator, filled, layer, before, batch)
    weight = 0.75 ** np.arange(micro - 1, -1, -1) if decays else np.ones(micro)
    weight = np.repeat(weight / weight.sum() / 4, 4)[:, None]
    x = np.float64(apply(layer, before, z))
    mean = (weight * x).sum(axis=0)
    var = (weight * (x - mean) ** 2).sum(axis=0)
    assert float(jnp.abs(params["kernel"] - before["kernel"]).max()) > 1e-3
    expected = cbn.Statistics(mean, 1.0 / np.sqrt(var + 1e-5))
    assert_close(statistics, expected, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """A residual block, the same shape in and out."""

    estimator: cbn.Estimator
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        norm = cbn_linen.Norm(
            self.estimator,
            layer=nn.Dense(WIDTH),
            use_running_average=not train,
            axis_name=self.axis_name,
        )
        return x + nn.relu(norm(x))


def data(examples=6):
    return np.random.default_rng(0).normal(size=(examples, WIDTH)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def linen_init(model, key, x):
    return model.init(key, x, True)


@functools.partial(jax.jit, static_argnums=0)
def linen_step(model, variables, x):
    def loss(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        y, updates = model.apply(given, x, True, mutable=["batch_stats"])
        return jnp.square(y).sum(), (y, updates["batch_stats"])

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@flax_estimators
def test_linen_remat(estimator, key):
    plain, remat = Block(estimator), nn.remat(Block, static_argnums=(2,))(estimator)
    variables = linen_init(plain, key, data())
    assert_close(linen_step(remat, variables, data()), linen_step(plain, variables, data()))


@flax_estimators
def test_linen_scan_over_layers(estimator, key):
    """Three layers in a loop are three layers in a row."""

    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            def body(block, x):
                return block(x, train), None

            scan = nn.scan(
                body,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan(Block(estimator), x)[0]

    x = expected = data()
    variables = linen_init(Tower(), key, x)
    (_, (y, after)), _ = linen_step(Tower(), variables, x)
    for i in range(3):
        one = {kind: tree["Block_0"] for kind, tree in slice_of(variables, i).items()}
        (_, (expected, stats)), _ = linen_step(Block(estimator), one, expected)
        assert_close(slice_of(after["Block_0"], i), stats, rtol=1e-4, atol=1e-4)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)


@flax_estimators
def test_linen_vmap_over_seeds(estimator, key):
    """An ensemble, each with parameters and statistics of its own."""
    ensemble = nn.vmap(
        Block,
        in_axes=(None, None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        axis_size=3,
    )(estimator)
    variables = linen_init(ensemble, key, data())
    (_, (y, after)), _ = linen_step(ensemble, variables, data())
    (_, expected), _ = linen_step(Block(estimator), slice_of(variables, 1), data())
    assert_close(slice_of((y, after), 1), expected)


@flax_estimators
def test_linen_vmap_over_parts_of_a_batch(estimator, key):
    """One model, whose statistics are those of all parts together."""
    shared = nn.vmap(
        Block,
        in_axes=(0, None),
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="parts",
    )(estimator, axis_name="parts")
    x = data(examples=8)
    variables = linen_init(Block(estimator), key, x)
    (_, (y, after)), gradient = linen_step(shared, variables, x.reshape(4, 2, WIDTH))
    (_, (expected, stats)), right = linen_step(Block(estimator), variables, x)
    actual = y.reshape(8, WIDTH), after, gradient
    assert_close(actual, (expected, stats, right), rtol=1e-4, atol=1e-4)


def nnx_norm(estimator, key):
    rngs = nnx.Rngs(key)
    layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    return cbn_nnx.Norm(estimator, layer=layer, rngs=rngs)


def three_norms(estimator, key):
    make = nnx.vmap(functools.partial(nnx_norm, estimator))
    return nnx.jit(lambda key: make(jax.random.split(key, 3)))(key)


@nnx.jit
def nnx_apply(norm, x):
    return norm(x)


def stats_of(norm):
    return nnx.state(norm, nnx.BatchStat)


@flax_estimators
def test_nnx_remat(estimator, key):
    plain = nnx_norm(estimator, key)
    remat = nnx.clone(plain)

    @nnx.jit
    def both(plain, remat, x):
        def gradient(apply, norm):
            loss = nnx.value_and_grad(lambda norm: jnp.square(apply(norm, x)).sum())
            value, gradient = loss(norm)
            return value, nnx.to_pure_dict(gradient)

        again = nnx.remat(lambda norm, x: norm(x))
        return gradient(lambda n, x: n(x), plain), gradient(again, remat)

    expected, actual = both(plain, remat, data())
    assert_close(actual, expected)
    assert_close(stats_of(remat), stats_of(plain))


@flax_estimators
def test_nnx_vmap_over_seeds(estimator, key):
    ensemble = three_norms(estimator, key)
    graph, variables = nnx.split(ensemble)
    one = nnx.merge(graph, slice_of(variables, 1))
    together = nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))
    y = nnx.jit(lambda norm, x: together(norm, x))(ensemble, data())
    assert_close(y[1], nnx_apply(one, data()))
    assert_close(slice_of(stats_of(ensemble), 1), stats_of(one))


@flax_estimators
def test_nnx_scan_over_layers(estimator, key):
    tower = three_norms(estimator, key)
    graph, variables = nnx.split(tower)
    x = expected = data()
    for i in range(3):
        one = nnx.merge(graph, slice_of(variables, i))
        expected = np.tanh(nnx_apply(one, expected))

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, norm):
        return jnp.tanh(norm(x))

    assert_close(forward(x, tower), expected, rtol=1e-4, atol=1e-4)
    last = slice_of(stats_of(tower), 2)
    assert_close(last, stats_of(one), rtol=1e-4, atol=1e-4)


@flax_estimators
def test_nnx_split_and_merge_under_jax_jit(estimator, key):
    norm = nnx_norm(estimator, key)
    abstract = nnx.state(nnx.eval_shape(lambda: nnx_norm(estimator, key)))
    graph, variables = nnx.split(norm)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, abstract)

    @jax.jit
    def step(variables, x):
        norm = nnx.merge(graph, variables)
        y = norm(x)
        return y, nnx.state(norm)

    y, after = step(variables, data())
    assert_close(y, nnx_apply(norm, data()))
    assert_close(after, nnx.state(norm))
