"""The watched methods train as if alone, and their errors are those one can compute."""

import functools
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FACTORIES, LAYERS, drift, init, train
from flax import linen as nn
from flax import nnx

import cbn_jax as cbn
from cbn_jax.diagnostics import Errors, errors, reference, watch
from cbn_jax.figures import draw_errors
from cbn_jax.linen import Norm
from cbn_jax.nnx import Norm as NnxNorm

METHODS = {
    "batch": FACTORIES["batch_norm"](),
    "naive": cbn.cross_iteration_batch_norm(window=3, rho=0.0),
    "taylor": FACTORIES["cross_iteration_batch_norm"](),
    "streaming": FACTORIES["streaming_batch_norm"](),
    "replay": FACTORIES["replay_batch_norm"](),
}
WATCHED, TWIN = watch(METHODS, use="streaming"), reference(METHODS, use="streaming")
layers = pytest.mark.parametrize("layer", [LAYERS["dense"], LAYERS["conv-strided"]])


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected):
    """Equal but for the order in which another program adds."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, actual, expected)


def run(layer, key, steps=4, estimator=WATCHED):
    """A few training calls with moving weights; parameters are those of the last one."""
    params = layer.params(key)
    state, statistics = init(estimator, layer, params), None
    for step in range(steps):
        params = drift(params, jax.random.fold_in(key, 100 + step))
        z = layer.data(jax.random.fold_in(key, step))
        _, statistics, state = train(estimator, state, layer, params, z)
    return params, statistics, state


@layers
def test_each_method_trains_as_if_alone(layer, key):
    _, statistics, state = run(layer, key)
    for name, estimator in METHODS.items():
        _, alone, expected = run(layer, key, estimator=estimator)
        assert_close(state.states[name], expected)
        assert_close(state.estimated[name], alone)
    assert_same(statistics, state.estimated["streaming"])


def test_inference_and_gradients_are_those_of_the_one_in_use(key):
    layer, alone = LAYERS["dense"], METHODS["streaming"]
    params, _, state = run(layer, key)
    z = layer.data(key)

    def loss(params, estimator, state):
        x, statistics, _ = train(estimator, state, layer, params, z)
        return jnp.sin(cbn.normalize(x, statistics)).sum()

    own = state.states["streaming"]
    x = layer.fn(params, z)
    assert_same(WATCHED.infer(state, x), alone.infer(own, x))
    assert_same(jax.grad(loss)(params, WATCHED, state), jax.grad(loss)(params, alone, own))


@layers
def test_reference_measures_and_changes_nothing_else(layer, key):
    params, statistics, state = run(layer, key)
    many = layer.data(key, examples=64)
    x, measured_with, after = train(TWIN, state, layer, params, many)
    assert_same(measured_with, statistics)
    assert_same(after._replace(truth=state.truth), state)
    mean, var, _ = cbn.batch_moments(x)
    expected = cbn.Statistics(mean, (var + WATCHED.epsilon) ** -0.5)
    chex.assert_trees_all_close(after.truth, expected, rtol=1e-5, atol=1e-6)


@layers
def test_state_keeps_its_form_under_jit(layer, key):
    params = layer.params(key)
    fresh = init(WATCHED, layer, jax.eval_shape(lambda p: p, params))
    form = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    for estimator in (WATCHED, TWIN):
        traces = []

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, params, z, estimator=estimator, traces=traces):
            traces.append(None)
            return train(estimator, state, layer, params, z)[2]

        state = jax.tree.map(jnp.copy, fresh)
        for dtype in (jnp.float32, jnp.bfloat16):
            cast = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params)
            state = step(
                step(state, cast, layer.data(key, dtype)), cast, layer.data(key, dtype)
            )
        assert len(traces) == 2  # one a dtype
        assert form(state) == form(fresh)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_state_takes_neither_gradient_nor_float64(key, x64):
    layer = LAYERS["dense"]
    params, z = layer.params(key, jnp.float64), layer.data(key, jnp.float64)
    before = init(WATCHED, layer, params)

    def total(params, estimator):
        state = train(estimator, before, layer, params, z)[2]
        return sum(leaf.sum() for leaf in jax.tree.leaves(state)), state

    for estimator in (WATCHED, TWIN):
        gradient, state = jax.grad(total, has_aux=True)(params, estimator)
        assert_same(gradient, jax.tree.map(jnp.zeros_like, params))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_what_is_not_finite_stays_out_of_the_state(key):
    layer = LAYERS["dense"]
    params, _, state = run(layer, key)
    bad = layer.data(key).at[3, 2].set(jnp.nan)
    _, statistics, after = train(WATCHED, state, layer, params, bad)
    assert np.isnan(statistics.mean).all()
    assert_same(after.estimated, state.estimated)
    _, _, measured = train(TWIN, after, layer, params, bad)
    for leaf in jax.tree.leaves(measured):
        assert np.isfinite(leaf).all()
    assert np.isnan(errors(measured)[""]["batch"].mean)


@layers
def test_no_error_with_frozen_weights_and_the_reference_as_the_batch(layer, key):
    params, z = layer.params(key), layer.data(key)
    state = init(WATCHED, layer, params)
    for _ in range(5):
        _, _, state = train(WATCHED, state, layer, params, z)
    _, _, state = train(TWIN, state, layer, params, z)
    (measured,) = errors(state).values()
    assert set(measured) == set(METHODS)
    np.testing.assert_allclose(list(measured.values()), 0.0, atol=1e-5)


def test_errors_are_those_computed_by_hand():
    state = watch({"batch": cbn.batch_norm()}, "batch").init(3)
    estimated = cbn.Statistics(jnp.array([1.0, 2.0, 9.0]), 1 / jnp.array([1.0, 4.0, 9.0]))
    truth = cbn.Statistics(jnp.zeros(3), jnp.array([1.0, 0.5, 0.0]))
    state = state._replace(estimated={"batch": estimated}, truth=truth)
    expected = Errors(mean=1.0, scale=np.log(2) / np.sqrt(2))  # the third does not vary
    np.testing.assert_allclose(errors(state)[""]["batch"], expected, rtol=1e-4)


@pytest.mark.parametrize("epsilon", [1e-5, 3.0])
def test_the_true_scale_has_the_epsilon_of_the_method_in_use(epsilon):
    estimators = {"batch": cbn.batch_norm(epsilon=epsilon)}
    x = jnp.array([[1.0], [3.0]])
    _, state = watch(estimators, "batch").train(watch(estimators, "batch").init(1), x)
    _, state = reference(estimators, "batch").train(state, x)
    np.testing.assert_allclose(state.truth.inv_std, (1 + epsilon) ** -0.5, rtol=1e-6)
    np.testing.assert_allclose(errors(state)[""]["batch"], 0.0, atol=1e-6)


def test_compensation_is_seen_where_weights_move(key):
    """A steady move along one direction, and batches so large that no noise hides it."""
    layer = LAYERS["dense-no_bias"]
    params = layer.params(key)
    move = drift(jax.tree.map(jnp.zeros_like, params), key, 0.1)
    state = init(WATCHED, layer, params)
    for step in range(6):
        params = jax.tree.map(jnp.add, params, move)
        z = 1.0 + layer.data(jax.random.fold_in(key, step), examples=400)
        _, _, state = train(WATCHED, state, layer, params, z)
    many = 1.0 + layer.data(jax.random.fold_in(key, 99), examples=50_000)
    (measured,) = errors(train(TWIN, state, layer, params, many)[2]).values()
    assert measured["naive"].mean > 2 * measured["taylor"].mean > 0
    assert measured["naive"].scale > 2 * measured["taylor"].scale > 0
    assert measured["batch"].scale > measured["replay"].scale > 0


class Net(nn.Module):
    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, z):
        for _ in range(11):
            z = Norm(self.estimator, nn.Dense(4), use_running_average=False)(z)
        return z


def test_linen_layers_in_their_order(key):
    z = jax.random.normal(key, (8, 5))
    variables = jax.jit(Net(WATCHED).init)(key, z)
    apply = jax.jit(functools.partial(Net(WATCHED).apply, mutable=["batch_stats"]))
    _, updates = apply(variables, z)
    unmeasured = errors(updates["batch_stats"])
    assert np.isnan(unmeasured["Norm_0"]["batch"]).all()
    _, measured = jax.jit(functools.partial(Net(TWIN).apply, mutable=["batch_stats"]))(
        {**variables, **updates}, z
    )
    layers = errors(measured["batch_stats"])
    assert list(layers) == [f"Norm_{i}" for i in range(11)]
    np.testing.assert_allclose([layer["batch"] for layer in layers.values()], 0, atol=1e-4)
    assert "batch_stats/Norm_3" in errors(measured)


def test_nnx_layers(key):
    class Model(nnx.Module):
        def __init__(self, estimator, rngs):
            linears = [nnx.Linear(5, 5, rngs=rngs) for _ in range(2)]
            norm = functools.partial(NnxNorm, estimator, rngs=rngs)
            self.blocks = nnx.List([norm(layer=linear) for linear in linears])

        def __call__(self, z):
            return self.blocks[1](self.blocks[0](z))

    z = jax.random.normal(key, (8, 5))
    model, twin = (Model(estimator, nnx.Rngs(0)) for estimator in (WATCHED, TWIN))
    model(z)
    nnx.update(twin, nnx.state(model))
    twin(z)
    for tree in (twin, nnx.state(twin), nnx.to_pure_dict(nnx.state(twin, nnx.BatchStat))):
        layers = errors(tree)
        assert list(layers) == ["blocks/0", "blocks/1"]
        np.testing.assert_allclose([e["batch"] for e in layers.values()], 0, atol=1e-5)


def test_draw(tmp_path):
    made = {"batch": Errors(0.7, 0.9), "exact": Errors(0.0, np.nan)}
    draw_errors([(1, {"only": made}), (2, {"only": made})], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 3_000
    records = [(1, dict.fromkeys(("first", "second", "third", "fourth"), made))]

    def titles(figure):
        return [axes.get_title() for axes in figure.axes if axes.get_title()]

    assert titles(draw_errors(records)) == ["first", "second", "fourth"]
    assert titles(draw_errors(records, layers=["third"])) == ["third"]
    with pytest.raises(ValueError, match="layer is 'fifth', expected 'first' or 'second'"):
        draw_errors(records, layers=["fifth"])
    with pytest.raises(ValueError, match="draw_errors got no records"):
        draw_errors([])


@pytest.mark.parametrize("use", ["batch", "naive"])
def test_modules_show_the_layer_to_the_methods_that_look_at_it(use):
    """To both twins, whichever method normalizes."""
    assert "layered" in watch(METHODS, use=use).traits & reference(METHODS, use=use).traits
    alone = {"batch": cbn.batch_norm(), "group": cbn.ghost_batch_norm(2)}
    assert not watch(alone, use="batch").traits


def test_wrong_use():
    for make in (watch, reference):
        with pytest.raises(ValueError, match="use is 'group', expected 'batch' or 'naive'"):
            make(METHODS, use="group")
    state = cbn.batch_norm().init(2)
    for call in (WATCHED.train, WATCHED.infer, TWIN.train):
        with pytest.raises(TypeError, match="type RunningMoments, expected WatchState"):
            call(state, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="a tree without a WatchState"):
        errors({"Norm_0": state._asdict()})


def test_without_matplotlib_nothing_is_drawn(monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib; .*jax\[figures\]"):
        draw_errors([(1, {"layer": {"batch": Errors(1.0, 1.0)}})])


def test_a_missing_matplotlib_is_one_sentence():
    code = (
        "import sys; sys.modules['matplotlib'] = None;"
        "from cbn_jax import diagnostics, figures;"
        "errors = diagnostics.Errors(1.0, 1.0);"
        "figures.draw_errors([(1, {'layer': {'batch': errors}})])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "draw_errors needs matplotlib; install it with: pip install" in run.stderr


@pytest.mark.studies
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in tensorflow-datasets
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_study_writes_its_files(tmp_path):
    from rich.console import Console

    from benchmarks.studies import statistics_error

    config = statistics_error.Config(
        networks=("mlp",),
        learning_rates=(0.1,),
        seeds=(0, 1),
        epochs=1,
        every=8,
        examples=64,
        window=4,
        output=tmp_path / "out",
        data_dir=tmp_path / "data",
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
        statistics_error.main(config, Console(width=80))
    results = json.loads((config.output / "results.json").read_text())
    assert [run["steps"] for run in results["runs"]] == [[8, 16, 24, 32]] * 2
    table = (config.output / "table.md").read_text()
    assert table == statistics_error.markdown(results)
    assert table.count("| mlp |") == 5
    assert (config.output / "statistics_error.svg").stat().st_size > 3_000
