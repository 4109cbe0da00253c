import functools
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from cases import FACTORIES, LAYERS, init, train
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from benchmarks.lib.perturbation import Bands, draw, fan, perturb

pytestmark = pytest.mark.studies

GROUPS = 2
# Statistics of a feature, of an example, of a place; none at all; with a layer.
names = pytest.mark.parametrize(
    "name",
    [
        "batch_norm",
        "group_batch_norm",
        "group_norm_plus",
        "adaptive_batch_norm",
        "cross_iteration_batch_norm",
    ],
)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def split(noise, groups=GROUPS):
    """``[N, positions, G, C/G]``."""
    return noise.reshape(len(noise), -1, groups, noise.shape[-1] // groups)


# Noise.


@functools.cache
def step(name, layer="conv", num_groups=GROUPS, **options):
    """``(state, key) -> (noise, state, plain state)`` and the first state."""
    layer, plain = LAYERS[layer], FACTORIES[name]()
    noisy = perturb(plain, num_groups=num_groups, **options)
    params = layer.params(jax.random.key(0))

    @jax.jit
    def step(state, key):
        z = layer.data(key)
        x, statistics, after = train(noisy, state, layer, params, z)
        _, expected, inside = train(plain, state.state, layer, params, z)
        noise = cbn.normalize(x, statistics) - cbn.normalize(x, expected)
        return noise, after, inside

    return step, init(noisy, layer, params)


@names
def test_noise_is_one_draw_per_example_and_group(name, key):
    """Two groups of two features, whatever has the shape of the statistics."""
    call, state = step(name)
    noise = split(call(state, key)[0])
    np.testing.assert_allclose(noise, noise[:, :1, :, :1] + 0 * noise, atol=1e-5)
    assert len(np.unique(noise[:, 0, :, 0])) == 8 * GROUPS


@names
def test_the_state_inside_is_as_if_alone(name, key):
    call, state = step(name)
    for m in range(3):
        _, state, inside = call(state, jax.random.fold_in(key, m))
        assert_same(state.state, inside)
    assert state.draws == 3


@names
def test_inference_is_untouched(name, key):
    call, state = step(name)
    _, state, inside = call(state, key)
    x, plain = jax.random.normal(key, (8, 5, 5, 4)), FACTORIES[name]()
    assert_same(perturb(plain).infer(state, x), plain.infer(inside, x))


def test_noise_has_the_asked_mean_and_deviation():
    """16000 draws: both to about 0.01."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 8)), jnp.float32)
    plain, noisy = cbn.batch_norm(), perturb(cbn.batch_norm(), num_groups=8)
    statistics, _ = noisy.train(noisy.init(8), x)
    expected, _ = plain.train(plain.init(8), x)
    noise = np.array(cbn.normalize(x, statistics) - cbn.normalize(x, expected))
    assert noise.mean() == pytest.approx(0.5, abs=0.04)
    assert noise.std() == pytest.approx(1.25, abs=0.04)
    assert np.abs(np.corrcoef(noise, rowvar=False) - np.eye(8)).max() < 0.1
    statistics, _ = perturb(plain, mean=-2.0, std=0.0, num_groups=4).train(noisy.init(8), x)
    shifted = cbn.normalize(x, statistics)
    np.testing.assert_allclose(shifted + 2.0, cbn.normalize(x, expected), atol=1e-5)


@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_noise_is_a_function_of_state_and_batch(layer, key):
    """Steps and seeds differ; a repeated call gives the same noise."""
    call, state = step("batch_norm", layer)
    noise, second, _ = call(state, key)
    assert_same(call(state, key)[0], noise)
    later, third, _ = call(second, key)
    last, _, _ = call(third, key)
    seeded = step("batch_norm", layer, seed=1)[0](state, key)[0]
    for one, another in ((noise, later), (later, last), (noise, seeded)):
        assert np.abs(split(one - another).mean((1, 3))).min() > 1e-4


def test_noise_does_not_hang_on_the_last_bits_of_a_batch(key):
    """Which differ between eager and jitted code, one device and many."""
    layer, noisy = LAYERS["dense"], perturb(cbn.batch_norm(), num_groups=GROUPS)
    x = layer.fn(layer.params(key), layer.data(key))
    step, state = jax.jit(noisy.train), noisy.init(4)
    for _ in range(2):
        statistics, after = step(state, x)
        rounded, _ = step(state, x * (1.0 + 1e-6))
        np.testing.assert_allclose(rounded.mean, statistics.mean, atol=1e-3)
        state = after


def test_layers_differ(key):
    """In the second step at the latest; they have one seed and see different values."""
    call, first = step("batch_norm", "dense")
    second = first
    for m in range(2):
        one, first, _ = call(first, jax.random.fold_in(key, m))
        other, second, _ = call(second, jax.random.fold_in(key, 10 + m))
    assert np.abs(one - other).max() > 0.1


def test_devices_differ(key):
    """Also where their examples are the same; the state is one."""
    plain, noisy = (
        f(cbn.batch_norm()) for f in (lambda e: e, lambda e: perturb(e, num_groups=2))
    )
    x = jnp.tile(jax.random.normal(key, (2, 4)), (8, 1))

    def step(x):
        statistics, state = noisy.train(noisy.init(4), x, axis_name="data")
        expected, _ = plain.train(plain.init(4), x, axis_name="data")
        return cbn.normalize(x, statistics) - cbn.normalize(x, expected), state

    noise, state = jax.jit(
        jax.shard_map(
            step,
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=P("data"),
            out_specs=(P("data"), P()),
        )
    )(x)
    assert len(np.unique(np.round(split(noise)[:, 0, :, 0], 5))) == 16 * GROUPS
    assert state.draws == 1


def test_noise_has_no_gradient(key):
    """It is added: gradients are those without it."""
    plain, noisy = cbn.batch_norm(), perturb(cbn.batch_norm(), num_groups=GROUPS)
    x, weight = jax.random.normal(key, (2, 8, 3, 4))

    def gradient(estimator):
        def loss(x):
            statistics, _ = estimator.train(estimator.init(4), x)
            return (weight * cbn.normalize(x, statistics)).sum()

        return jax.jit(jax.grad(loss))(x)

    np.testing.assert_allclose(gradient(noisy), gradient(plain), rtol=1e-4, atol=1e-4)


def test_masks_reach_the_method_inside(key):
    plain, noisy = cbn.batch_norm(), perturb(cbn.batch_norm(), num_groups=GROUPS)
    x, mask = jax.random.normal(key, (8, 4)), jnp.arange(8)[:, None] < 5
    _, state = noisy.train(noisy.init(4), x, mask=mask)
    assert_same(state.state, plain.train(plain.init(4), x, mask=mask)[1])


def test_wrappers_know_what_is_inside():
    noisy = perturb(cbn.adaptive_batch_norm(cbn.batch_norm()))
    with pytest.raises(ValueError, match="expected one without a gate"):
        cbn.adaptive_batch_norm(noisy)
    with pytest.raises(ValueError, match="statistics per example"):
        cbn.corrected_inference(perturb(cbn.batch_norm()), examples=2)


def test_noise_needs_whole_groups():
    with pytest.raises(
        ValueError, match=r"perturb got 6 features and num_groups=4, .*of 6"
    ):
        perturb(cbn.batch_norm(), num_groups=4).init(6)
    with pytest.raises(ValueError, match="num_groups is 0, expected an int of at least 1"):
        perturb(cbn.batch_norm(), num_groups=0)


@pytest.mark.parametrize("std", [-1.0, np.nan])
def test_a_deviation_is_not_negative(std):
    with pytest.raises(
        ValueError, match=rf"std is {std}, expected a standard deviation of at"
    ):
        perturb(cbn.batch_norm(), std=std)


def test_noise_knows_its_state_and_its_input():
    noisy, x = perturb(cbn.batch_norm(), num_groups=1), jnp.ones((8, 4))
    for call in (noisy.train, noisy.infer):
        with pytest.raises(
            TypeError, match=r"perturb got .* RunningMoments, .*PerturbState"
        ):
            call(cbn.batch_norm().init(4), x)
    with pytest.raises(TypeError, match=r"perturb got x of dtype int32"):
        noisy.train(noisy.init(4), x.astype(jnp.int32))


# Trainings.

RATES = (0.1, 0.4)


def problem():
    """Least squares with momentum: batches, and each step with its gradient, in NumPy."""
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(5, 3)), rng.normal(size=5)) for _ in range(6)]
    losses, gradients = np.zeros((2, 6)), np.zeros((2, 6, 4))
    for i, rate in enumerate(RATES):
        w, v, c = np.ones(3), np.zeros(3), 0.5
        for t, (a, b) in enumerate(batches):
            error = a @ w + c - b
            losses[i, t] = np.square(error).mean()
            dw, dc = 2 * a.T @ error / 5, 2 * error.mean()
            gradients[i, t] = *dw, dc
            v = 0.5 * v + dw
            w, c = w - rate * v, c - rate * dc
    return batches, losses, np.linalg.norm(np.diff(gradients, axis=1), axis=2)


def test_fan_trains_at_each_rate_on_the_same_batches():
    """A generator gives each batch once, and the step eats the state."""
    batches, losses, changes = problem()
    traces = []

    def loss_of(params, batch):
        a, b = batch
        return jnp.square(a @ params["w"] + params["c"] - b).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, rate):
        traces.append(None)
        params, v = state
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        v = 0.5 * v + gradient["w"]
        params = {"w": params["w"] - rate * v, "c": params["c"] - rate * gradient["c"]}
        return (params, v), loss, gradient

    def start():
        return {"w": jnp.ones(3), "c": jnp.array(0.5)}, jnp.zeros(3)

    single = (jax.tree.map(np.float32, batch) for batch in batches)
    bands = fan(step, start, single, RATES)
    np.testing.assert_allclose(bands.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(bands.gradient_change, changes, rtol=1e-4)
    assert len(traces) == 1


def quadratic(w, batch, rate):
    return w - rate * 2 * w, w**2, 2 * w


def test_one_step_has_no_change_of_gradient():
    bands = fan(quadratic, lambda: 1.0, range(1), (0.1, 0.2, 0.3))
    assert bands.loss.shape == (3, 1)
    assert bands.gradient_change.shape == (3, 0)


@pytest.mark.parametrize(("batches", "rates"), [((), RATES), (range(3), ())])
def test_a_fan_of_nothing(batches, rates):
    with pytest.raises(ValueError, match="fan got no learning rates or no batches, expec"):
        fan(quadratic, lambda: 1.0, batches, rates)


# Figures.


def bands(rates=3, steps=7, seed=0):
    rng = np.random.default_rng(seed)
    return Bands(rng.normal(size=(rates, steps)), rng.normal(size=(rates, steps - 1)))


def test_a_figure():
    figure = draw({"one": bands(), "another": bands(seed=1)})
    assert [axes.get_title() for axes in figure.axes] == ["one", "another", "", ""]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss", "", "change of the gradient", ""]
    # In the library's look, which is nobody else's afterwards.
    assert not any(axes.spines["top"].get_visible() for axes in figure.axes)
    assert matplotlib.rcParams["axes.spines.top"]


@pytest.mark.parametrize("smooth", [1, 3])
def test_a_band_holds_the_averages_of_all_rates(smooth):
    """Over as many steps as asked; the line is their median."""
    one = bands()
    for axes, curves in zip(draw({"one": one}, smooth=smooth).axes, one, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(curves, smooth, axis=1)
        averages = windows.mean(-1)
        (line,), (area,) = axes.lines, axes.collections
        np.testing.assert_allclose(line.get_ydata(), np.median(averages, axis=0))
        corners = area.get_paths()[0].vertices
        for x, low, high in zip(
            line.get_xdata(), averages.min(0), averages.max(0), strict=True
        ):
            values = corners[corners[:, 0] == x, 1]
            np.testing.assert_allclose((values.min(), values.max()), (low, high))
    losses = draw({"one": one}, smooth=smooth).axes[0].lines[0].get_xdata()
    np.testing.assert_array_equal(losses, np.arange(smooth, 8))


def test_nothing_to_draw():
    with pytest.raises(ValueError, match=r"draw got no bands, expected \{name: fan"):
        draw({})


@pytest.mark.parametrize("smooth", [0, 7, 20])
def test_an_average_is_over_some_of_the_steps(smooth):
    """Of seven losses there are six changes."""
    with pytest.raises(ValueError, match=f"smooth is {smooth}, expected"):
        draw({"one": bands()}, smooth=smooth)


def test_without_matplotlib(monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"draw needs .*cbn_jax\[figures\]"):
        draw({"one": bands()})
