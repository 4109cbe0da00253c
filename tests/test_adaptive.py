"""A gate for all layers: open it changes nothing, closed nothing is normalized."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import LAYERS, infer, init, train
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from cbn_jax.linen import Norm
from cbn_jax.nnx import Norm as NnxNorm

MEASURES = ["entries", "channels", "examples"]
measures = pytest.mark.parametrize("measure", MEASURES)
INSIDE = {
    "batch_norm": cbn.batch_norm(momentum=0.9),
    "cross_iteration": cbn.cross_iteration_batch_norm(window=3),
    "group": cbn.group_batch_norm(0.5, num_groups=2),
    "fitted": cbn.fitted_inference(cbn.batch_norm()),
}
GATED = {name: cbn.adaptive_batch_norm(inner) for name, inner in INSIDE.items()}
LAYER = LAYERS["conv"]
every_estimator = pytest.mark.parametrize("name", INSIDE)


assert_same = chex.assert_trees_all_equal


def assert_close(actual, expected, rtol=2e-6, atol=1e-7):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


@functools.partial(jax.jit, static_argnums=0)
def step(estimator, state, z):
    return train(estimator, state, LAYER, LAYER.params(jax.random.key(1)), z)


def started(name, key):
    """States of the estimator and of the gated one, after a batch."""
    params = LAYER.params(key)
    states = [init(e, LAYER, params) for e in (INSIDE[name], GATED[name])]
    z = LAYER.data(key)
    return step(INSIDE[name], states[0], z)[2], step(GATED[name], states[1], z)[2]


# The gate.


@every_estimator
def test_open_it_is_the_estimator(name, key):
    alone, state = started(name, key)
    z = LAYER.data(jax.random.fold_in(key, 1))
    _, expected, alone = step(INSIDE[name], alone, z)
    x, statistics, state = step(GATED[name], state, z)
    assert_close(statistics, expected)
    assert_close(state.state, alone)
    assert state.gate == 1.0
    assert_close(infer(GATED[name], state, x), infer(INSIDE[name], alone, x))


@every_estimator
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_closed_a_batch_passes_bit_for_bit(name, dtype, key):
    """And leaves no trace in the estimator's state."""
    _, state = started(name, key)
    closed = cbn.set_gate(state, False)
    z = LAYER.data(jax.random.fold_in(key, 1))
    x, statistics, after = step(GATED[name], closed, 1e3 + z)
    assert_same(after, closed)
    odd = x.astype(dtype).at[0, 0, 0].set(jnp.array([1e-7, -0.0, jnp.nan, jnp.inf], dtype))
    y = np.asarray(cbn.normalize(odd, statistics))
    assert y.tobytes() == np.asarray(odd).tobytes()


@every_estimator
def test_closed_gradients_pass_too(name, key):
    """Through constant channels as well."""
    _, state = started(name, key)
    closed = cbn.set_gate(state, False)
    params = LAYER.params(key)
    x, source = cbn.run_layer(LAYER.layer, params, LAYER.data(key))
    weight = jax.random.normal(key, x.shape)

    @jax.jit
    @jax.grad
    def gradient(x):
        statistics, _ = GATED[name].train(closed, x, source)
        return (weight * cbn.normalize(x, statistics)).sum()

    for batch in (x, jnp.full_like(x, 3.0)):
        assert_same(gradient(batch), weight)


def test_a_nan_passes_the_closed_gate_alone(key):
    x = jax.random.normal(key, (4, 3)).at[1, 2].set(jnp.nan)
    estimator = GATED["batch_norm"]
    state = cbn.set_gate(estimator.init(3), False)
    statistics, after = estimator.train(state, x)
    assert_same(cbn.normalize(x, statistics), x)
    assert_same(after, state)


def test_learned_scale_and_bias_serve_both_regimes(key):
    x = jax.random.normal(key, (4, 3))
    module = Norm(
        GATED["batch_norm"],
        use_running_average=False,
        scale_init=nn.initializers.constant(2.0),
        bias_init=nn.initializers.constant(1.0),
    )
    variables = module.init(key, x)
    stats = cbn.set_gate(variables["batch_stats"], False)
    y, _ = module.apply({**variables, "batch_stats": stats}, x, mutable="batch_stats")
    np.testing.assert_allclose(y, 2 * x + 1, rtol=1e-6)


@pytest.mark.parametrize("inference", ["running", "gated"])
@every_estimator
def test_inference_heeds_the_gate_if_asked_to(name, inference, key):
    alone, state = started(name, key)
    estimator = cbn.adaptive_batch_norm(INSIDE[name], inference=inference)
    x = LAYER.fn(LAYER.params(key), LAYER.data(key))
    expected = infer(INSIDE[name], alone, x)
    assert_close(infer(estimator, state, x), expected)
    y = cbn.normalize(x, infer(estimator, cbn.set_gate(state, False), x))
    right = x if inference == "gated" else cbn.normalize(x, expected)
    assert_close(y, right, atol=1e-6)


def test_one_program_serves_both_gates(key):
    _, state = started("batch_norm", key)
    z = LAYER.data(key)
    traces = []

    @jax.jit
    def run(state, z):
        traces.append(None)
        x, statistics, state = train(
            GATED["batch_norm"], state, LAYER, LAYER.params(key), z
        )
        return cbn.normalize(x, statistics), state

    shifts = []
    for flag in (True, False, np.True_, jnp.array(False), 1, 0):
        y, state = run(cbn.set_gate(state, flag), z)
        shifts.append(bool(jnp.abs(y.mean((0, 1, 2))).max() > 1e-3))
    assert shifts == [False, True] * 3
    assert len(traces) == 1


@pytest.mark.parametrize("flag", [True, False])
def test_eight_devices_are_gated_as_one(flag, key):
    """Statistics and averages are those of the whole batch."""
    estimator = GATED["batch_norm"]
    state = cbn.set_gate(estimator.init(3), flag)
    x = jax.random.normal(key, (16, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        functools.partial(estimator.train, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.jit(spread)(state, x),
        estimator.train(state, x),
    )


def test_a_table_of_gates_is_a_scan(key):
    """Traced flags; the averages are those of the normalized batches alone."""
    inner, estimator = INSIDE["batch_norm"], GATED["batch_norm"]
    batches = jax.random.normal(key, (5, 4, 3))
    table = jnp.array([True, False, True, True, False])

    @jax.jit
    def run(batches, table):
        def one(state, batch):
            x, flag = batch
            statistics, state = estimator.train(cbn.set_gate(state, flag), x)
            return state, cbn.normalize(x, statistics)

        return jax.lax.scan(one, estimator.init(3), (batches, table))

    state, y = run(batches, table)
    alone = inner.init(3)
    for x in batches[table]:
        _, alone = inner.train(alone, x)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), state.state, alone
    )
    assert state.gate == 0.0
    assert_same(y[~table], batches[~table])
    assert np.abs(y[table].mean(1)).max() < 1e-5


# set_gate.


class Net(nn.Module):
    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, z):
        norm = functools.partial(Norm, self.estimator, use_running_average=False)
        z = norm(nn.Dense(4))(z)
        z = nn.BatchNorm(use_running_average=False)(z)
        return norm(nn.Dense(3), name="last")(z)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        linear = nnx.Linear(5, 4, rngs=rngs)
        last = NnxNorm(GATED["batch_norm"], num_features=4, rngs=rngs)
        self.first = NnxNorm(GATED["cross_iteration"], linear, rngs=rngs)
        self.rest = nnx.List([last])

    def __call__(self, z):
        return self.rest[0](self.first(z))


def test_sets_every_gate_and_nothing_else(key):
    inner = {name: started(name, key)[1] for name in ("batch_norm", "fitted")}
    tree = {"a": inner["batch_norm"], "b": [inner["fitted"], jnp.ones(3)], "c": None}
    closed = cbn.set_gate(tree, False)
    assert jax.tree.structure(closed) == jax.tree.structure(tree)
    gates = [closed["a"].gate, closed["b"][0].gate]
    assert [(g.dtype, g.shape, float(g)) for g in gates] == [(jnp.float32, (), 0.0)] * 2
    assert closed["b"][1] is tree["b"][1]
    assert_same(
        [closed["a"].state, closed["b"][0].state], [i.state for i in inner.values()]
    )
    assert_same(cbn.set_gate(closed, True), tree)


def test_any_truth_value_sets_the_gates_of_many_runs():
    """A stacked state of several seeds keeps its shape; a true value sets the gate to 1."""
    states = jax.vmap(lambda _: GATED["batch_norm"].init(3))(jnp.arange(4))
    for flag, gate in ((2, 1.0), (0, 0.0), (np.True_, 1.0), (jnp.array(False), 0.0)):
        states = cbn.set_gate(states, flag)
        assert states.gate.dtype == jnp.float32
        np.testing.assert_array_equal(states.gate, np.full(4, gate))


def test_linen_models_are_gated_and_donated(key):
    """No buffer is there twice, neither in a fresh state nor after ``set_gate``."""
    model = Net(GATED["cross_iteration"])
    z = jax.random.normal(key, (8, 5))
    variables = jax.jit(model.init)(key, z)
    params, stats = variables["params"], variables["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=0)
    def run(stats, z):
        variables = {"params": params, "batch_stats": stats}
        y, updates = model.apply(variables, z, mutable="batch_stats")
        return updates["batch_stats"], y

    closed, _ = run(cbn.set_gate(stats, False), z)
    for name in ("Norm_0", "last"):
        assert closed[name]["gate"] == 0.0
        assert (closed[name]["steps"] == 0.0).all()
    opened, y = run(cbn.set_gate(closed, True), z)
    assert (opened["last"]["steps"] == 1.0).all()
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-5)


def test_nnx_models_are_gated_through_their_state(key):
    model = NnxNet(nnx.Rngs(0))
    z = jax.random.normal(key, (8, 5))
    run = nnx.jit(lambda model, z: model(z))
    nnx.update(model, cbn.set_gate(nnx.state(model), False))
    np.testing.assert_allclose(run(model, z), model.first.layer(z), rtol=1e-5, atol=1e-6)
    assert (model.rest[0].steps.get_value() == 0.0).all()
    nnx.update(model, cbn.set_gate(nnx.state(model, nnx.BatchStat), True))
    np.testing.assert_allclose(run(model, z).mean(0), 0.0, atol=1e-5)
    assert (model.first.state.state.running.steps == 1.0).all()


def test_a_tree_without_gates_is_an_error():
    state = cbn.batch_norm().init(3)
    for tree in ({"Norm_0": {"state": state}}, {"Norm_0": state._asdict()}, {}, None):
        with pytest.raises(
            ValueError, match=r"without a GateState, .*in linen .*batch_stats"
        ):
            cbn.set_gate(tree, True)


def test_wrong_use():
    with pytest.raises(
        ValueError, match="adaptive_batch_norm got a gated method, expected one"
    ):
        cbn.adaptive_batch_norm(GATED["batch_norm"])
    with pytest.raises(ValueError, match="inference is 'batch', expected 'running' or 'ga"):
        cbn.adaptive_batch_norm(cbn.batch_norm(), inference="batch")


# heterogeneity.

BATCHES = [(4, 3), (1, 3), (6, 5, 4, 2)]


@measures
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_heterogeneity_equals_the_oracle(measure, shape, dtype, key):
    channels = jnp.arange(1.0, shape[-1] + 1).reshape((1,) * (len(shape) - 1) + (-1,))
    x = (channels * (1.0 + jax.random.normal(key, shape))).astype(dtype)
    found = cbn.heterogeneity(x, measure)
    assert found.shape == ()
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference.heterogeneity(x, measure), rtol=1e-5)


def test_all_entries_are_measured_by_default(key):
    x = jax.random.normal(key, (4, 3)) + jnp.array([[0.0, 5.0, 9.0]])
    assert cbn.heterogeneity(x) == cbn.heterogeneity(x, "entries")


def constant_in(measure, key, shape):
    """What may be added to a batch without a change of its spread."""
    axes = {"entries": len(shape), "channels": len(shape) - 1, "examples": 1}[measure]
    free = jax.random.normal(key, (1,) * axes + shape[axes:])
    return jnp.broadcast_to(free, shape)


@measures
def test_heterogeneity_is_invariant_to_shifts_and_follows_scale(measure, key):
    shape = (6, 5, 4, 2)
    x = jax.random.normal(key, shape)
    shifted = x + constant_in(measure, jax.random.fold_in(key, 1), shape)
    found = cbn.heterogeneity(x, measure)
    np.testing.assert_allclose(cbn.heterogeneity(shifted, measure), found, rtol=1e-5)
    np.testing.assert_allclose(cbn.heterogeneity(-3.0 * x, measure), 3 * found, rtol=1e-5)


@measures
def test_what_does_not_vary_has_none(measure):
    x = jnp.full((4, 3, 2), 1e4)
    assert cbn.heterogeneity(x, measure) == 0.0
    gradient = jax.grad(cbn.heterogeneity)(x, measure)
    assert_same(gradient, jnp.zeros_like(x))


@measures
@pytest.mark.parametrize("shape", [(8, 3), (6, 5, 4, 2)])
def test_heterogeneity_is_accurate_at_large_means(measure, shape, key):
    x = 1e4 + jax.random.normal(key, shape)
    found = cbn.heterogeneity(x, measure)
    np.testing.assert_allclose(found, reference.heterogeneity(x, measure), rtol=1e-4)


@measures
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_no_heterogeneity(measure, bad, key):
    x = jax.random.normal(key, (4, 3, 2)).at[1, 2, 0].set(bad)
    assert np.isnan(cbn.heterogeneity(x, measure))


def test_eight_devices_measure_as_one(key):
    x = 5.0 + jax.random.normal(key, (16, 3, 2)) * jnp.array([[[1.0, 4.0]]])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def measured(x):
        return [cbn.heterogeneity(x, m, axis_name="data") for m in MEASURES]

    spread = jax.jit(jax.shard_map(measured, mesh=mesh, in_specs=P("data"), out_specs=P()))
    expected = [reference.heterogeneity(x, m) for m in MEASURES]
    np.testing.assert_allclose(spread(x), expected, rtol=1e-5)


def test_bad_batches_and_measures():
    with pytest.raises(ValueError, match=r"measure is 'std', expected 'entries' or 'chan"):
        cbn.heterogeneity(jnp.ones((4, 3)), "std")
    with pytest.raises(TypeError, match=r"heterogeneity got x of dtype uint8, expected fl"):
        cbn.heterogeneity(jnp.ones((4, 3), jnp.uint8))
    for shape, expected in (((3,), "an axis of examples"), ((0, 3), "at least one")):
        with pytest.raises(ValueError, match=f"heterogeneity got x of shape .*{expected}"):
            cbn.heterogeneity(jnp.ones(shape), "examples")
    with pytest.raises(
        ValueError, match=r"heterogeneity got a mask of shape \(4,\) .*write"
    ):
        cbn.heterogeneity(jnp.ones((4, 3)), mask=jnp.ones(4, bool))


def test_a_gate_is_one_truth_value():
    state = cbn.adaptive_batch_norm(cbn.batch_norm()).init(2)
    with pytest.raises(
        ValueError, match=r"shape \(2,\), expected one truth .*assessment\."
    ):
        cbn.set_gate(state, jnp.array([True, False]))


@pytest.mark.parametrize("measure", MEASURES)
def test_entries_under_a_mask_are_not_measured(measure, key):
    x = jax.random.normal(key, (6, 5, 3))
    mask = jnp.arange(6)[:, None, None] < 4
    padded = jnp.where(mask, x, jnp.nan)
    found = cbn.heterogeneity(padded, measure, mask=mask)
    np.testing.assert_allclose(found, reference.heterogeneity(x[:4], measure), rtol=1e-5)


def test_places_without_two_entries_are_left_out(key):
    x = jax.random.normal(key, (4, 3))
    mask = jnp.ones((4, 3), bool).at[1:, 0].set(False)
    found = cbn.heterogeneity(x, "channels", mask=mask)
    expected = reference.heterogeneity(x[:, 1:], "channels")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
