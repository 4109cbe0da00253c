"""Methods, corrected inference, gates and averages combine freely."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import LAYERS, eager_train, init
from flax import linen as nn
from flax import nnx

import cbn_jax as cbn
from cbn_jax.assessment import assess
from cbn_jax.linen import Norm
from cbn_jax.nnx import Norm as NnxNorm

# Methods with a window share their code, so one of them represents all.
METHODS = {
    "batch": cbn.batch_norm(),
    "cross_iteration": cbn.cross_iteration_batch_norm(window=3, running="window"),
    "diminishing": cbn.diminishing_batch_norm(),
}
INFERENCE = {
    "plain": lambda estimator: estimator,
    "corrected": functools.partial(cbn.corrected_inference, examples=24),
    "fitted": cbn.fitted_inference,
}
GATES = {"ungated": lambda estimator: estimator, "gated": cbn.adaptive_batch_norm}
LAYER = LAYERS["conv-grouped"]


@functools.cache
def two_steps(method, inference, gate):
    """Statistics, gradients and outputs of two jitted training steps, and predictions."""
    key = jax.random.key(0)
    estimator = GATES[gate](INFERENCE[inference](METHODS[method]))
    params = LAYER.params(key)
    state = init(estimator, LAYER, params)

    @jax.jit
    def step(params, state, z):
        def loss(params):
            x, statistics, after = eager_train(estimator, state, LAYER, params, z)
            y = cbn.normalize(x, statistics)
            return jnp.sin(y).sum(), (y, statistics, after)

        gradient, (y, *rest) = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
        return params, y, *rest, cbn.normalize(y, estimator.infer(rest[1], y))

    outputs = []
    for n in range(2):
        z = LAYER.data(jax.random.fold_in(key, n))
        params, y, statistics, state, predicted = step(params, state, z)
        outputs.append((params, y, statistics, predicted))
    return jax.device_get(outputs), state


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("inference", INFERENCE)
@pytest.mark.parametrize("method", METHODS)
def test_every_product_trains_as_the_bare_method(method, inference, gate):
    outputs, state = two_steps(method, inference, gate)
    for leaf in jax.tree.leaves((outputs, state)):
        assert np.isfinite(leaf).all()
    expected, _ = two_steps(method, "plain", "ungated")
    chex.assert_trees_all_close(
        [(params, y, statistics) for params, y, statistics, _ in outputs],
        [(params, y, statistics) for params, y, statistics, _ in expected],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_gate_predicts_what_is_behind_it(method):
    for inference in INFERENCE:
        gated, ungated = (two_steps(method, inference, gate)[0] for gate in GATES)
        for (*_, predicted), (*_, expected) in zip(gated, ungated, strict=True):
            np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)


# A triple product in a model: a window, its average, corrected, behind a gate.

TRIPLE = cbn.adaptive_batch_norm(
    cbn.corrected_inference(
        cbn.cross_iteration_batch_norm(
            window=3, running="window", momentum=cbn.diminishing(1.0)
        ),
        examples=12,
    )
)


def batches():
    """Half of them are homogeneous, all alike in size."""
    rng = np.random.default_rng(0)
    for n in range(12):
        yield np.float32((2.0 if n % 2 else 1.0) * rng.normal(size=(4, 6, 6, 2)))


def loss_of(y, z):
    return jnp.square(y - jnp.abs(z).mean((1, 2, 3))[:, None]).mean()


class Net(nn.Module):
    @nn.compact
    def __call__(self, z, train):
        norm = functools.partial(Norm, TRIPLE, use_running_average=not train)
        for _ in range(2):
            z = nn.relu(norm(layer=nn.Conv(4, (3, 3)))(z))
        return nn.Dense(1)(z.mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.first = NnxNorm(TRIPLE, conv(2, 4), rngs=rngs)
        self.second = NnxNorm(TRIPLE, conv(4, 4), rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, z):
        z = nnx.relu(self.second(nnx.relu(self.first(z))))
        return self.head(z.mean((1, 2)))


def assert_learned(losses, steps, predictions):
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:6])
    assert set(np.unique(steps)) == {18.0}  # of 36, by the gate
    assert np.isfinite(predictions).all()


def test_a_linen_model_learns_with_all_of_it(key):
    assessment = assess(batches())
    assert list(assessment.selected) == [False, True] * 6
    model, optimizer = Net(), optax.sgd(0.05)
    variables = jax.jit(functools.partial(model.init, train=False))(key, next(batches()))
    params, stats = variables["params"], variables["batch_stats"]
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, opt_state, z):
        stats = cbn.set_gate(stats, assessment.gate(z))

        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, z, train=True, mutable="batch_stats")
            return loss_of(y, z), updates["batch_stats"]

        (loss, new), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), new, opt_state, loss

    losses = []
    for _ in range(3):
        for z in batches():
            params, stats, opt_state, loss = step(params, stats, opt_state, z)
            losses.append(loss)
    steps = stats["Norm_1"]["steps"]
    predict = jax.jit(functools.partial(model.apply, train=False))
    predictions = predict({"params": params, "batch_stats": stats}, z)
    assert_learned(losses, steps, predictions)


def test_an_nnx_model_learns_with_all_of_it():
    selected = assess(batches()).selected
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, z, flag):
        nnx.update(model, cbn.set_gate(nnx.state(model, nnx.BatchStat), flag))
        loss, gradient = nnx.value_and_grad(lambda model: loss_of(model(z), z))(model)
        optimizer.update(model, gradient)
        return loss

    model.train()
    losses = []
    for _ in range(3):
        for z, flag in zip(batches(), selected, strict=True):
            losses.append(step(model, optimizer, z, flag))
    model.eval()
    steps = model.second.steps.get_value()
    assert_learned(losses, steps, nnx.jit(lambda model, z: model(z))(model, z))
