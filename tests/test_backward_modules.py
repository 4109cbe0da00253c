"""Backward statistics in Flax models, from the first step to a checkpoint."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import cbn_jax as cbn
import cbn_jax.linen
import cbn_jax.nnx
from cbn_jax.core.named import from_dict, to_dict
from cbn_jax.optax import with_backward_statistics

pytestmark = pytest.mark.usefixtures("loose")

METHODS = {
    "bidirectional_batch_norm": cbn.bidirectional_batch_norm(window=3),
    "moving_average_batch_norm": cbn.moving_average_batch_norm(2, warmup_steps=2),
    "online_norm": cbn.online_norm(0.9, 0.8),
}
methods = pytest.mark.parametrize("name", METHODS)


class Net(nn.Module):
    estimator: cbn.Estimator

    @nn.compact
    def __call__(self, z, train=True):
        norm = cbn_jax.linen.Norm(
            self.estimator, nn.Dense(4), cbn.center, use_running_average=not train
        )
        return nn.Dense(1)(nn.relu(norm(z)))


def batches(count=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 6, 3)).astype(np.float32)


def loss_of(y):
    return jnp.square(y - 1.0).mean()


def optimizer():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.03, weight_decay=0.1))
    return with_backward_statistics(inner)


def by_functions(estimator, params, count=5):
    """The parameters after some steps, with pure functions."""
    state, tx = estimator.init(4), optimizer()
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, state, z):
        def loss(params):
            dense, out = params["Dense_0"], params["Dense_1"]
            used = {**dense, "kernel": cbn.center(dense["kernel"])}
            x, _ = cbn.run_layer(cbn.dense, used, z)
            norm = params["Norm_0"]
            statistics, after = estimator.at(norm["backward"]).train(state, x)
            y = cbn.normalize(x, statistics, norm["scale"], norm["bias"])
            return loss_of(cbn.dense.apply(out, jax.nn.relu(y))), after

        gradients, after = jax.grad(loss, has_aux=True)(params)
        updates, new = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), new, after

    for z in batches(count):
        params, opt_state, state = step(params, opt_state, state, z)
    return params, state


@methods
def test_linen_equals_the_functions(name, key):
    """The training step is the usual one: only the optimizer is wrapped."""
    chex.clear_trace_counter()
    model = Net(METHODS[name])
    variables = jax.jit(model.init)(key, batches()[0])
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optimizer()
    )

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state, batch_stats, z):
        def loss(params):
            y, updates = state.apply_fn(
                {"params": params, "batch_stats": batch_stats}, z, mutable=["batch_stats"]
            )
            return loss_of(y), updates["batch_stats"]

        gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients), batch_stats

    batch_stats = variables["batch_stats"]
    for z in batches():
        state, batch_stats = step(state, batch_stats, z)
    params, after = by_functions(METHODS[name], variables["params"])
    chex.assert_trees_all_close(state.params, params, rtol=1e-3, atol=1e-4)
    stats = batch_stats["Norm_0"]
    chex.assert_trees_all_close(stats, to_dict(after), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(state.params["Norm_0"]["backward"].steps, 5.0)


class NnxNet(nnx.Module):
    def __init__(self, estimator, rngs):
        self.norm = cbn_jax.nnx.Norm(
            estimator, nnx.Linear(3, 4, rngs=rngs), kernel=cbn.center, rngs=rngs
        )
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, z):
        return self.out(nnx.relu(self.norm(z)))


@methods
def test_nnx_equals_the_functions(name):
    model = NnxNet(METHODS[name], nnx.Rngs(0))
    params = {
        "Dense_0": nnx.to_pure_dict(nnx.state(model.norm.layer, nnx.Param)),
        "Dense_1": nnx.to_pure_dict(nnx.state(model.out, nnx.Param)),
        "Norm_0": {
            "scale": model.norm.scale.get_value(),
            "bias": model.norm.bias.get_value(),
            "backward": model.norm.backward.get_value(),
        },
    }
    params = jax.tree.map(jnp.copy, params)
    trainer = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer, z):
        gradients = nnx.grad(lambda model: loss_of(model(z)))(model)
        trainer.update(model, gradients)

    for z in batches():
        step(model, trainer, z)
    expected, state = by_functions(METHODS[name], params)
    got = model.norm.backward.get_value()
    chex.assert_trees_all_close(got, expected["Norm_0"]["backward"], rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(model.norm.state, state, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        model.out.kernel.get_value(), expected["Dense_1"]["kernel"], rtol=1e-3, atol=1e-4
    )
    model.eval()
    assert np.isfinite(model(batches()[0])).all()


def test_a_checkpoint_holds_them(tmp_path, key):
    model = Net(METHODS["bidirectional_batch_norm"])
    params = jax.jit(model.init)(key, batches()[0])["params"]
    trained, _ = by_functions(METHODS["bidirectional_batch_norm"], params, 2)
    tx = optimizer()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "it", {"params": trained, "opt": tx.init(trained)})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "it", {"params": params, "opt": tx.init(params)}
        )
    chex.assert_trees_all_equal(restored["params"], trained)
    assert isinstance(restored["params"]["Norm_0"]["backward"], cbn.BackwardStatistics)


def test_an_ensemble_has_its_own(key):
    ensemble = nn.vmap(
        Net,
        in_axes=None,
        out_axes=0,
        axis_size=2,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )(METHODS["bidirectional_batch_norm"])
    z = batches()[0]
    variables = jax.jit(ensemble.init)(key, z)
    params, tx = variables["params"], optimizer()

    def loss(params):
        y, _ = ensemble.apply({**variables, "params": params}, z, mutable=["batch_stats"])
        return loss_of(y)

    gradients = jax.jit(jax.grad(loss))(params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    backward = optax.apply_updates(params, updates)["Norm_0"]["backward"]
    assert backward.values.shape == (2, 2, 4)
    assert not np.allclose(backward.values[0], backward.values[1])
    np.testing.assert_array_equal(backward.steps, 1.0)


def test_layers_of_a_scan_have_their_own(key):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, z, _):
            norm = cbn_jax.linen.Norm(
                METHODS["bidirectional_batch_norm"], nn.Dense(3), use_running_average=False
            )
            return jnp.tanh(norm(z)), None

    stack = nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )()
    z = batches()[0]
    variables = jax.jit(stack.init)(key, z, None)

    def loss(params):
        (y, _), _ = stack.apply(
            {**variables, "params": params}, z, None, mutable=["batch_stats"]
        )
        return loss_of(y)

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    np.testing.assert_array_equal(
        gradients["Norm_0"]["backward"].steps, np.ones((3, 3), np.float32)
    )


def test_a_layer_used_twice_averages_both(key):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, z):
            norm = cbn_jax.linen.Norm(
                METHODS["bidirectional_batch_norm"], use_running_average=False
            )
            return norm(z) + jnp.square(norm(2.0 * z))

    z = batches()[0]
    variables = Twice().init(key, z)

    def loss(params):
        y, _ = Twice().apply({**variables, "params": params}, z, mutable=["batch_stats"])
        return loss_of(y)

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    np.testing.assert_array_equal(gradients["Norm_0"]["backward"].steps, 2.0)


def test_pretrained_parameters_that_lack_them(key):
    """One sentence says what to write, and that works."""
    z = batches()[0]
    trained = jax.jit(Net(cbn.batch_norm()).init)(key, z)
    model = Net(METHODS["bidirectional_batch_norm"])
    fresh = jax.jit(model.init)(jax.random.key(1), z)
    lacking = {**fresh, "params": trained["params"]}
    with pytest.raises(
        ValueError, match=r"Norm at Norm_0 got params without backward.*fill_missing"
    ):
        model.apply(lacking, z, mutable=["batch_stats"])
    assert np.isfinite(model.apply(lacking, z, False)).all()  # inference needs none
    params = cbn_jax.linen.fill_missing(trained["params"], fresh["params"])
    y, _ = model.apply({**fresh, "params": params}, z, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    chex.assert_trees_all_equal(params["Dense_0"], trained["params"]["Dense_0"])
    with pytest.raises(ValueError, match="got Dense_0, Dense_1, Norm_0 in params"):
        cbn_jax.linen.fill_missing(trained["params"], fresh)


def test_corrected_inference_around_one(key):
    """Its training is that of the method; its inference looks at the example."""
    inner = METHODS["bidirectional_batch_norm"]
    z = batches()[0]
    model = Net(cbn.corrected_inference(inner, examples=4))
    variables = jax.jit(model.init)(key, z)
    _, updates = model.apply(variables, z, mutable=["batch_stats"])
    variables = {**variables, **updates}
    corrected = model.apply(variables, z, False)
    plain = Net(inner).apply(variables, z, False)
    assert not np.allclose(corrected, plain)
    backward = variables["params"]["Norm_0"]["backward"]
    bound = model.estimator.at(backward)
    x = batches()[1] @ np.ones((3, 4), np.float32)
    state = from_dict(variables["batch_stats"]["Norm_0"], inner.init(4))
    chex.assert_trees_all_equal(bound.infer(state, x), model.estimator.infer(state, x))


@pytest.mark.parametrize("wrap", [cbn.adaptive_batch_norm, cbn.fitted_inference])
def test_other_wrappers_are_refused_in_training(wrap, key):
    model = Net(wrap(METHODS["bidirectional_batch_norm"]))
    z = batches()[0]
    variables = jax.jit(model.init)(key, z)
    with pytest.raises(TypeError, match="the estimator to Norm without a wrapper"):
        model.apply(variables, z, mutable=["batch_stats"])


def test_centered_kernels_fold(key):
    """The folded layer has the centered kernel."""
    model = Net(METHODS["moving_average_batch_norm"])
    params, state = by_functions(
        model.estimator, jax.jit(model.init)(key, batches()[0])["params"]
    )
    dense, norm = params["Dense_0"], params["Norm_0"]
    used = {**dense, "kernel": cbn.center(dense["kernel"])}
    folded = cbn.fold(model.estimator, state, cbn.dense, used, norm["scale"], norm["bias"])
    z = batches()[1]
    y = nn.relu(cbn.dense.apply(folded, z)) @ params["Dense_1"]["kernel"]
    y = y + params["Dense_1"]["bias"][None]
    stats = {"Norm_0": to_dict(state)}
    expected = model.apply({"params": params, "batch_stats": stats}, z, False)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_donated_and_unused(key):
    """A step that donates its arguments, and a gradient of nothing."""
    model = Net(METHODS["online_norm"])
    z = batches()[0]
    variables = jax.jit(model.init)(key, z)
    tx = optimizer()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        gradients = jax.tree.map(jnp.zeros_like, params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.copy, variables["params"])
    params, _ = step(params, tx.init(params))
    np.testing.assert_array_equal(params["Norm_0"]["backward"].steps, 0.0)
