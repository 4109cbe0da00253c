"""At home in every transformation: of JAX, of linen, of nnx, of optax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FACTORIES, KINDS, LAYERS, init, train
from flax import nnx
from jax import export

import cbn_jax as cbn
from cbn_jax import linen as cbn_linen
from cbn_jax import nnx as cbn_nnx

estimators = pytest.mark.parametrize("name", KINDS)
# One of each kind of state, in Flax models.
flax_estimators = pytest.mark.parametrize(
    "name",
    [
        "batch_norm",
        "cross_iteration_batch_norm",
        "small_batch_norm",
        "replay_batch_norm",
        "adaptive_batch_norm-group",
        "fitted_inference-replay",
    ],
)
WIDTH = 4


def assert_close(actual, expected, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 2e-5} | tolerance
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected
    )


def loss_of(estimator, layer, state, z, params):
    x, statistics, after = train(estimator, state, layer, params, z)
    return jnp.square(cbn.normalize(x, statistics) - 1.0).sum(), after


@estimators
def test_checkpoint_recomputes_and_changes_nothing(name, key):
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    params = layer.params(key)
    f = functools.partial(
        loss_of, estimator, layer, init(estimator, layer, params), layer.data(key)
    )
    plain = jax.jit(jax.value_and_grad(f, has_aux=True))(params)
    again = jax.jit(jax.value_and_grad(jax.checkpoint(f), has_aux=True))(params)
    assert_close(again, plain)


@estimators
def test_no_tracer_leaks(name, key):
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    params = layer.params(key)
    state = init(estimator, layer, params)
    step = jax.jit(lambda s, z: train(estimator, s, layer, params, z)[2])
    with jax.checking_leaks():
        step(state, layer.data(key))


@estimators
def test_inference_is_exported(name, key):
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    params = layer.params(key)
    state = init(estimator, layer, params)
    x, _, state = train(estimator, state, layer, params, layer.data(key))

    def predict(state, x):
        return cbn.normalize(x, estimator.infer(state, x))

    (examples,) = export.symbolic_shape("examples")
    shape = jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype)
    # A state of NamedTuples has no name in a file: its leaves do.
    leaves, form = jax.tree.flatten(state)

    def from_leaves(leaves, x):
        return predict(jax.tree.unflatten(form, leaves), x)

    exported = export.export(jax.jit(from_leaves))(leaves, shape)
    restored = export.deserialize(exported.serialize())
    assert_close(restored.call(leaves, x), predict(state, x))


@estimators
def test_shapes_without_values(name, key):
    layer, estimator = LAYERS["conv"], FACTORIES[name]()
    params, z = layer.params(key), layer.data(key)
    state = jax.eval_shape(lambda: init(estimator, layer, params))
    _, _, after = jax.eval_shape(
        lambda state, z: train(estimator, state, layer, params, z), state, z
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for leaf, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype) == (leaf.shape, jnp.float32)
        assert new.size > 0


@estimators
def test_loss_scaling_leaves_the_statistics_alone(name, key):
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    params, z = layer.params(key), layer.data(key)
    state = init(estimator, layer, params)

    @jax.jit
    def step(scale, state, params):
        def scaled(params):
            loss, after = loss_of(estimator, layer, state, z, params)
            return scale * loss, after

        return jax.grad(scaled, has_aux=True)(params)

    gradient, after = step(2.0**15, state, params)
    expected, right = step(1.0, state, params)
    assert_close(after, right, rtol=0, atol=0)
    assert_close(jax.tree.map(lambda g: g / 2.0**15, gradient), expected)


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
    x = np.float64(layer.fn(before, z))
    mean = (weight * x).sum(axis=0)
    var = (weight * (x - mean) ** 2).sum(axis=0)
    assert float(jnp.abs(params["kernel"] - before["kernel"]).max()) > 1e-3
    expected = cbn.Statistics(mean, 1.0 / np.sqrt(var + 1e-5))
    assert_close(statistics, expected, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """A residual block, the same shape in and out."""

    name_of: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        norm = cbn_linen.Norm(
            FACTORIES[self.name_of](),
            layer=nn.Dense(WIDTH),
            use_running_average=not train,
            axis_name=self.axis_name,
        )
        return x + nn.relu(norm(x))


def data(key, examples=6):
    return jax.random.normal(key, (examples, WIDTH))


def linen_step(model, variables, x):
    def loss(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        y, updates = model.apply(given, x, True, mutable=["batch_stats"])
        return jnp.square(y).sum(), (y, updates["batch_stats"])

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


@flax_estimators
def test_linen_remat(name, key):
    plain, remat = Block(name), nn.remat(Block, static_argnums=(2,))(name)
    variables = plain.init(key, data(key), True)
    assert_close(
        linen_step(remat, variables, data(key)), linen_step(plain, variables, data(key))
    )


@flax_estimators
def test_linen_scan_over_layers(name, key):
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
            return scan(Block(name), x)[0]

    x = data(key)
    variables = Tower().init(key, x, True)
    (_, (y, after)), _ = linen_step(Tower(), variables, x)
    expected = x
    for i in range(3):
        one = jax.tree.map(lambda leaf: leaf[i], variables)  # noqa: B023
        one = {kind: tree["Block_0"] for kind, tree in one.items()}
        (_, (expected, stats)), _ = linen_step(Block(name), one, expected)
        slice_of = jax.tree.map(lambda leaf: leaf[i], after["Block_0"])  # noqa: B023
        assert_close(slice_of, stats, rtol=1e-4, atol=1e-4)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)


@flax_estimators
def test_linen_vmap_over_seeds(name, key):
    """An ensemble, each with parameters and statistics of its own."""
    ensemble = nn.vmap(
        Block,
        in_axes=(None, None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        axis_size=3,
    )(name)
    x = data(key)
    variables = ensemble.init(key, x, True)
    (_, (y, after)), _ = linen_step(ensemble, variables, x)
    one = jax.tree.map(lambda leaf: leaf[1], variables)
    (_, (expected, stats)), _ = linen_step(Block(name), one, x)
    assert_close(y[1], expected)
    assert_close(jax.tree.map(lambda leaf: leaf[1], after), stats)


@flax_estimators
def test_linen_vmap_over_parts_of_a_batch(name, key):
    """One model, whose statistics are those of all parts together."""
    shared = nn.vmap(
        Block,
        in_axes=(0, None),
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="parts",
    )(name, axis_name="parts")
    x = data(key, examples=8)
    variables = Block(name).init(key, x, True)
    (_, (y, after)), gradient = linen_step(shared, variables, x.reshape(4, 2, WIDTH))
    (_, (expected, stats)), right = linen_step(Block(name), variables, x)
    assert_close((y.reshape(8, WIDTH), gradient), (expected, right), rtol=1e-4, atol=1e-4)
    if "replay" not in name:  # the rows of a memory are in another order
        assert_close(after, stats, rtol=1e-4, atol=1e-4)


def nnx_norm(name, key):
    rngs = nnx.Rngs(key)
    layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    return cbn_nnx.Norm(FACTORIES[name](), layer=layer, rngs=rngs)


def three_norms(name, key):
    return nnx.vmap(functools.partial(nnx_norm, name))(jax.random.split(key, 3))


def nnx_step(norm, x):
    def loss(norm):
        return jnp.square(norm(x)).sum()

    value, gradient = nnx.jit(nnx.value_and_grad(loss))(norm)
    return value, nnx.to_pure_dict(gradient), nnx.state(norm, nnx.BatchStat)


@flax_estimators
def test_nnx_remat(name, key):
    plain, remat = nnx_norm(name, key), nnx_norm(name, key)
    x = data(key)

    def loss(norm):
        return jnp.square(nnx.remat(lambda norm, x: norm(x))(norm, x)).sum()

    value, gradient = nnx.jit(nnx.value_and_grad(loss))(remat)
    actual = value, nnx.to_pure_dict(gradient), nnx.state(remat, nnx.BatchStat)
    assert_close(actual, nnx_step(plain, x))


@flax_estimators
def test_nnx_vmap_over_seeds(name, key):
    ensemble = three_norms(name, key)
    graph, variables = nnx.split(ensemble)
    one = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[1], variables))
    x = data(key)
    y = nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(ensemble, x)
    assert_close(y[1], one(x))
    after = jax.tree.map(lambda leaf: leaf[1], nnx.state(ensemble, nnx.BatchStat))
    assert_close(after, nnx.state(one, nnx.BatchStat))


@flax_estimators
def test_nnx_scan_over_layers(name, key):
    tower = three_norms(name, key)
    graph, variables = nnx.split(tower)
    x = expected = data(key)
    for i in range(3):
        one = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], variables))  # noqa: B023
        expected = jnp.tanh(one(expected))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, norm):
        return jnp.tanh(norm(x))

    assert_close(forward(x, tower), expected, rtol=1e-4, atol=1e-4)
    last = jax.tree.map(lambda leaf: leaf[2], nnx.state(tower, nnx.BatchStat))
    assert_close(last, nnx.state(one, nnx.BatchStat), rtol=1e-4, atol=1e-4)


@flax_estimators
def test_nnx_split_and_merge_under_jax_jit(name, key):
    norm = nnx_norm(name, key)
    x = data(key)
    shapes = nnx.eval_shape(lambda: nnx_norm(name, key))
    graph, variables = nnx.split(norm)
    abstract = nnx.state(shapes)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, abstract)

    @jax.jit
    def step(variables, x):
        norm = nnx.merge(graph, variables)
        y = norm(x)
        return y, nnx.state(norm)

    y, after = step(variables, x)
    assert_close(y, norm(x))
    assert_close(after, nnx.state(norm))
