"""Statistics in hand: held, frozen, recomputed, pooled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FACTORIES, KINDS, LAYERS, STATELESS, init, train
from flax import nnx

import cbn_jax as cbn
from cbn_jax import linen as cbn_linen
from cbn_jax import nnx as cbn_nnx
from cbn_jax.core.named import find_running
from cbn_jax.population import pool_replicas, recompute

WITHOUT = {*STATELESS, "moving_average_batch_norm", "online_norm"} | {
    name for name in FACTORIES if "diminishing_batch_norm" in name
}
with_running = pytest.mark.parametrize("name", sorted(set(KINDS) - WITHOUT))


def running_of(state):
    (running,) = find_running(state).values()
    return running


def assert_close(actual, expected, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected
    )


def update_of(estimator, layer, params):
    return jax.jit(lambda state, z: train(estimator, state, layer, params, z)[2])


def test_recomputed_statistics_are_those_of_all_values(key):
    """Uneven batches of two and three, whose own variances are far too small."""
    layer = LAYERS["dense"]
    params = layer.params(key)
    z = 5.0 + 3.0 * layer.data(key, examples=25)
    batches = jnp.split(z, [2, 4, 7, 10, 12, 15, 18, 20, 23])
    estimator = cbn.batch_norm(momentum=0.9)
    update = update_of(estimator, layer, params)
    stale = jax.tree.map(lambda leaf: leaf + 7.0, estimator.init(4))
    state = recompute(update, stale, batches)
    x = np.float64(layer.fn(params, z))
    assert_close(state.mean, x.mean(axis=0))
    assert_close(state.var, x.var(axis=0))
    assert_close(state.steps, [10.0] * 4)


def test_a_mask_weighs_by_what_counts(key):
    layer = LAYERS["dense"]
    params, estimator = layer.params(key), cbn.batch_norm()
    z = layer.data(key, examples=24)
    mask = jax.random.bernoulli(key, 0.8, (24, 1))
    batches = [(z[i : i + 6], mask[i : i + 6]) for i in range(0, 24, 6)]

    def update(state, batch):
        z, mask = batch
        return train(estimator, state, layer, params, z, mask=mask)[2]

    state = recompute(update, estimator.init(4), batches, size=lambda b: b[1].sum())
    x = np.float64(layer.fn(params, z))[np.asarray(mask)[:, 0]]
    assert_close(state.mean, x.mean(axis=0))
    assert_close(state.var, x.var(axis=0))


def test_what_was_not_seen_or_not_finite_has_no_say(key):
    layer = LAYERS["dense"]
    params, estimator = layer.params(key), cbn.batch_norm()
    update = update_of(estimator, layer, params)
    z = layer.data(key, examples=16)
    bad = z[:8].at[0, 0].set(jnp.nan)
    fresh = estimator.init(4)
    assert_close(recompute(update, fresh, [bad, z[8:]]), recompute(update, fresh, [z[8:]]))
    assert_close(recompute(update, fresh, [bad]), fresh)


# A part has less variance than the population.
@pytest.mark.parametrize("name", sorted(set(KINDS) - WITHOUT - {"ghost_batch_norm"}))
def test_every_method_finds_the_population(name, key):
    """At its weights; windows in place of batches, up to their share at both ends."""
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    params = layer.params(key)
    z = layer.data(key, examples=40 * 8)
    batches = z.reshape(40, 8, -1)
    trained = init(estimator, layer, params)
    state = recompute(update_of(estimator, layer, params), trained, batches)
    running = running_of(state)
    x = layer.fn(params, z)
    if "group" in name:  # what the batch normalizer sees
        groups = x.reshape(len(x), 2, 2)
        spread = jnp.sqrt(groups.var(axis=2, keepdims=True) + 1e-5)
        x = ((groups - groups.mean(axis=2, keepdims=True)) / spread).reshape(x.shape)
    windows = {
        "bidirectional_batch_norm",
        "carried_batch_norm",
        "replay_batch_norm",
        "small_batch_norm",
        "streaming_batch_norm",
    }
    tolerance = {"rtol": 0.03, "atol": 0.05} if name in windows else {}
    assert_close(running.mean, x.mean(axis=0), **tolerance)
    assert_close(running.var, x.var(axis=0), **tolerance)
    assert jax.tree.structure(state) == jax.tree.structure(trained)


def test_recompute_keeps_gates_and_forgets_windows(key):
    layer = LAYERS["dense"]
    estimator = FACTORIES["adaptive_batch_norm-corrected-streaming"]()
    params = layer.params(key)
    fresh = init(estimator, layer, params)
    update, z = update_of(estimator, layer, params), layer.data(key)
    stale = jax.tree.map(lambda leaf: leaf + 3.0, fresh)
    assert_close(recompute(update, stale._replace(gate=fresh.gate), [z]), update(fresh, z))
    shut = cbn.set_gate(fresh, False)
    assert_close(recompute(update, shut, [z]), shut)


class Net(nn.Module):
    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, z, train, update_stats=True):
        for _ in range(2):
            norm = cbn_linen.Norm(
                self.estimator, layer=nn.Dense(4), use_running_average=not train
            )
            z = nn.tanh(norm(z, update_stats=update_stats))
        return z


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("average", ["ema", "schedule_free"])
def test_recomputed_under_averaged_weights(average, key):
    """A whole linen model, with the weights that optax averages."""
    model = Net(cbn.batch_norm())
    z = jax.random.normal(key, (64, 3))
    variables = model.init(key, z[:2], True)
    params, stats = variables["params"], variables["batch_stats"]
    if average == "ema":
        optimizer, ema = optax.sgd(0.1), optax.ema(0.9)
        ema_state = ema.init(params)
    else:
        optimizer = optax.contrib.schedule_free_sgd(0.1)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, stats, z):
        def loss(params):
            given = {"params": params, "batch_stats": stats}
            y, updates = model.apply(given, z, True, mutable=["batch_stats"])
            return jnp.square(y - 0.3).sum(), updates["batch_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, stats

    for i in range(0, 64, 2):
        params, opt_state, stats = step(params, opt_state, stats, z[i : i + 2])
        if average == "ema":
            final, ema_state = ema.update(params, ema_state)
        else:
            final = optax.contrib.schedule_free_eval_params(opt_state, params)

    @jax.jit
    def update(stats, z):
        given = {"params": final, "batch_stats": stats}
        return model.apply(given, z, True, mutable=["batch_stats"])[1]["batch_stats"]

    def first_error(stats):
        x = nn.Dense(4).apply({"params": final["Dense_0"]}, z)
        return np.abs(running_of(stats["Norm_0"]).mean - x.mean(axis=0)).max()

    recomputed = recompute(update, stats, z.reshape(32, 2, 3))
    assert first_error(recomputed) < 1e-5 < 0.02 < first_error(stats)
    y = model.apply({"params": final, "batch_stats": recomputed}, z, False)
    assert np.isfinite(y).all()


def test_recompute_an_nnx_model(key):
    rngs = nnx.Rngs(0)
    norm = cbn_nnx.Norm(cbn.batch_norm(), nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
    graph, stats, others = nnx.split(norm, nnx.BatchStat, ...)
    z = jax.random.normal(key, (24, 3))

    @jax.jit
    def update(stats, z):
        norm = nnx.merge(graph, stats, others)
        norm(z)
        return nnx.state(norm, nnx.BatchStat)

    nnx.update(norm, recompute(update, stats, z.reshape(8, 3, 3)))
    assert_close(norm.var.get_value(), norm.layer(z).var(axis=0))


def test_replicas_are_pooled_by_total_variance(key):
    """Replicas that never spoke, as one that saw everything."""
    layer = LAYERS["dense"]
    params = layer.params(key)
    estimator = cbn.batch_norm(momentum=cbn.cumulative())
    update = update_of(estimator, layer, params)
    z = layer.data(key, examples=48) + jnp.repeat(jnp.arange(3.0), 16)[:, None]
    states = [
        recompute(update, estimator.init(4), z[16 * i : 16 * i + 16].reshape(2, 8, -1))
        for i in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    pooled = pool_replicas(stacked)
    x = layer.fn(params, z)
    assert_close(pooled, cbn.RunningMoments(x.mean(0), x.var(0), jnp.full(4, 2.0)))


@pytest.mark.parametrize("name", KINDS)
def test_pooled_replicas_have_the_form_of_one(name, key):
    layer, estimator = LAYERS["conv"], FACTORIES[name]()
    state = init(estimator, layer, layer.params(key))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    if name in WITHOUT:
        with pytest.raises(ValueError, match="without running moments"):
            pool_replicas(stacked)
        with pytest.raises(ValueError, match="without running moments"):
            recompute(lambda state, z: state, state, [])
        return
    assert_close(pool_replicas(stacked), state)


def test_recompute_of_nothing():
    state = cbn.batch_norm().init(3)
    with pytest.raises(ValueError, match="got no batches"):
        recompute(lambda state, z: state, state, [])


def test_held_statistics_in_linen(key):
    """Trained on, with the statistics of training, and nothing is remembered."""
    model = Net(cbn.small_batch_norm(batch_size=2))
    z = jax.random.normal(key, (4, 3))
    variables = model.init(key, z, True)
    y, updates = model.apply(variables, z, True, mutable=["batch_stats"])
    held = model.apply(variables, z, True, update_stats=False)
    assert_close(held, y)
    _, untouched = model.apply(
        variables, z, True, update_stats=False, mutable=["batch_stats"]
    )
    assert_close(untouched["batch_stats"], variables["batch_stats"], atol=0)
    assert float(running_of(updates["batch_stats"]["Norm_0"]).steps.max()) == 1.0


def test_held_statistics_in_nnx(key):
    rngs = nnx.Rngs(0)
    norm = cbn_nnx.Norm(cbn.batch_norm(), num_features=3, rngs=rngs)
    x = jax.random.normal(key, (4, 3))
    held = norm(x, update_stats=False)
    assert_close(norm.state, cbn.batch_norm().init(3), atol=0)
    assert_close(norm(x), held)
    assert norm.state.steps.max() == 1.0


def test_a_frozen_part_keeps_its_statistics_and_thaws(key):
    """As in detection: the backbone predicts, the head trains; later both train."""

    class Detector(nn.Module):
        @nn.compact
        def __call__(self, z, freeze):
            norm = cbn_linen.Norm(cbn.batch_norm(), use_running_average=freeze)
            z = norm(nn.Dense(4)(z))
            return cbn_linen.Norm(cbn.batch_norm(), use_running_average=False)(z)

    z = jax.random.normal(key, (4, 3))
    variables = Detector().init(key, z, False)
    before = variables["batch_stats"]
    _, frozen = Detector().apply(variables, z, True, mutable=["batch_stats"])
    _, thawed = Detector().apply(variables, z, False, mutable=["batch_stats"])
    assert_close(frozen["batch_stats"]["Norm_0"], before["Norm_0"], atol=0)
    for stats in (frozen["batch_stats"]["Norm_1"], thawed["batch_stats"]["Norm_0"]):
        assert running_of(stats).steps.max() == 1.0


def test_any_rule_of_averaging_starts_with_the_first_batch():
    estimator = cbn.batch_norm(momentum=optax.constant_schedule(0.1))
    x = jnp.array([[1.0], [3.0]])
    _, state = estimator.train(estimator.init(1), x)
    assert_close(state, cbn.RunningMoments(*jnp.array([[2.0], [1.0], [1.0]])))
    _, state = estimator.train(state, x + 10.0)
    assert_close(state.mean, [3.0])
