"""Statistics of the backward pass: their averages, and the optimizer that writes them."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import Bidirectional, MovingAverage, Online

import cbn_jax as cbn
from cbn_jax.core.backward import _Process
from cbn_jax.optax import with_backward_statistics

SHAPE = N, T, C = 4, 5, 3
METHODS = {
    "bidirectional_batch_norm": (
        cbn.bidirectional_batch_norm(window=3),
        lambda: Bidirectional(3),
    ),
    "moving_average_batch_norm": (
        cbn.moving_average_batch_norm(
            2, warmup_steps=3, limit=1.2, limit_steps=4, momentum=0.9
        ),
        lambda: MovingAverage(2, 3, 1.2, 4, 0.9),
    ),
    "moving_average_batch_norm-long_window": (
        cbn.moving_average_batch_norm(
            4, warmup_steps=2, limit=1.2, limit_steps=3, momentum=0.9
        ),
        lambda: MovingAverage(4, 2, 1.2, 3, 0.9),
    ),
    "online_norm": (cbn.online_norm(0.9, 0.8), lambda: Online(C, 0.9, 0.8)),
}
methods = pytest.mark.parametrize("name", METHODS)


def batches(count, dtype=np.float32):
    """Inputs and gradients of several steps, drifting."""
    rng = np.random.default_rng(0)
    xs = rng.normal(1.0, 2.0, (count, *SHAPE)) + 0.3 * np.arange(count)[:, None, None, None]
    return xs.astype(dtype), rng.normal(0.2, 1.0, (count, *SHAPE)).astype(dtype)


def initial(estimator):
    return estimator.init(C), estimator.init_backward(C)


def value(estimator, x, backward, state, g, axis_name=None, mask=None):
    """A loss whose gradient at the normalized values is ``g``."""
    statistics, state = estimator.at(backward).train(
        state, x, axis_name=axis_name, mask=mask
    )
    y = cbn.normalize(x, statistics)
    return (g * y).sum(), (y, state)


@functools.partial(jax.jit, static_argnames=("estimator", "axis_name"))
def step(estimator, x, backward, state, g, axis_name=None, mask=None):
    """Outputs, gradient and "gradient" of the averages, and the next state."""
    gradient = jax.grad(value, argnums=(1, 2), has_aux=True)
    (dx, db), (y, state) = gradient(
        estimator, x, backward, state, g, axis_name=axis_name, mask=mask
    )
    return y, dx, db, state


def write(backward, gradient):
    """One step of an optimizer that would do the averages harm."""
    optimizer = with_backward_statistics(optax.adamw(0.1, weight_decay=0.1))
    params, gradients = {"b": backward}, {"b": gradient}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return optax.apply_updates(params, updates)["b"]


@methods
def test_equals_the_oracle(name):
    """Outputs and gradients of several steps, through the optimizer."""
    estimator, oracle = METHODS[name]
    oracle, (state, backward) = oracle(), initial(estimator)
    for count, (x, g) in enumerate(zip(*batches(8), strict=True), start=1):
        y, dx, gradient, state = step(estimator, x, backward, state, g)
        backward = write(backward, gradient)
        np.testing.assert_allclose(y, oracle.forward(np.float64(x)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dx, oracle.backward(np.float64(g)), rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(backward.steps, count)


def test_a_window_of_one_batch_is_batch_norm(x64):
    """By its formula for the gradient, and by automatic differentiation."""
    estimator = cbn.bidirectional_batch_norm(window=1)
    (x, *_), (g, *_) = batches(1, np.float64)
    _, dx, _, _ = step(estimator, x, *initial(estimator)[::-1], g)

    def plain(x):
        statistics, _ = cbn.batch_norm().train(cbn.batch_norm().init(C), x)
        return (g * cbn.normalize(x, statistics)).sum()

    np.testing.assert_allclose(dx, jax.grad(plain)(x), rtol=1e-9, atol=1e-12)


def test_the_first_gradient_is_the_true_one(x64):
    """Of the mean square, by finite differences, while the window holds one batch."""
    estimator = cbn.moving_average_batch_norm(window=4)
    state, backward = initial(estimator)
    (x, *_), (g, *_) = batches(1, np.float64)
    _, dx, _, _ = step(estimator, x, backward, state, g)
    loss = jax.jit(lambda x: value(estimator, x, backward, state, g)[0])
    for at in np.ndindex(2, 2, C):
        moved = np.zeros(SHAPE)
        moved[at] = 1e-6
        slope = (loss(x + moved) - loss(x - moved)) / 2e-6
        np.testing.assert_allclose(dx[at], slope, rtol=1e-5, atol=1e-7)


def test_online_gradients_become_orthogonal(key):
    """To ones and to the normalized values, over time."""
    estimator = cbn.online_norm(0.99, 0.9)
    state, backward = initial(estimator)
    sums = []
    for each in jax.random.split(key, 300):
        x = 2.0 + jax.random.normal(each, SHAPE)
        y, dx, gradient, state = step(estimator, x, backward, state, 1.0 + 0.5 * x)
        backward = write(backward, gradient)
        sums.append((dx.mean((0, 1)), (dx * y).mean((0, 1))))
    late = np.mean(sums[100:], axis=0)
    np.testing.assert_allclose(late, 0.0, atol=0.05)


@methods
def test_devices_share_statistics(name, eight_devices):
    """Four devices with an example each do what one does with all, in two steps."""
    estimator, _ = METHODS[name]
    mesh = jax.make_mesh((N,), ("d",), (AxisType.Auto,), devices=jax.devices()[:N])
    spread = functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("d"), P(), P(), P("d")),
        out_specs=(P("d"), P("d"), P(), P()),
    )

    @jax.jit
    @spread
    def on_each(x, backward, state, g):
        return step(estimator, x, backward, state, g, axis_name="d")

    one, many = initial(estimator), initial(estimator)
    for x, g in zip(*batches(2), strict=True):
        y, dx, gradient, state = step(estimator, x, one[1], one[0], g)
        one = state, write(one[1], gradient)
        y_many, dx_many, gradient, state = on_each(x, many[1], many[0], g)
        many = state, write(many[1], gradient)
        for got, expected in ((y_many, y), (dx_many, dx), (many, one)):
            chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@methods
def test_devices_that_normalize_alone_average_once(name, eight_devices):
    """With the gradients: summed by shard_map, or by hand under vmap."""
    estimator, _ = METHODS[name]
    (x, *_), (g, *_) = batches(1)
    state, backward = initial(estimator)
    alone = [
        step(estimator, x[i : i + 1], backward, state, g[i : i + 1])[2] for i in range(N)
    ]
    expected = write(backward, jax.tree.map(lambda *leaves: sum(leaves), *alone))
    mesh = jax.make_mesh((N,), ("d",), (AxisType.Auto,), devices=jax.devices()[:N])
    summed = jax.jit(
        jax.shard_map(
            lambda x, g: step(estimator, x, backward, state, g)[2],
            mesh=mesh,
            in_specs=P("d"),
            out_specs=P(),
        )
    )(x, g)
    np.testing.assert_array_equal(summed.steps, N)
    chex.assert_trees_all_close(write(backward, summed), expected, rtol=1e-5, atol=1e-6)
    alone = jax.vmap(lambda x, g: step(estimator, x, backward, state, g)[2])
    each = alone(x[:, None], g[:, None])
    mean = jax.tree.map(lambda leaf: leaf.mean(0), each)
    chex.assert_trees_all_close(write(backward, mean), expected, rtol=1e-5, atol=1e-6)

    @jax.jit
    @jax.grad
    def together(backward):
        loss = jax.vmap(lambda x, g: value(estimator, x, backward, state, g)[0])
        return loss(x[:, None], g[:, None]).sum()

    summed = together(backward)
    np.testing.assert_array_equal(summed.steps, N)
    chex.assert_trees_all_close(write(backward, summed), expected, rtol=1e-5, atol=1e-6)


@methods
def test_a_factor_of_the_loss_changes_nothing_but_the_gradient(name):
    """As a constant loss scale, or a mean over micro-batches, does."""
    estimator, _ = METHODS[name]
    plain, scaled = initial(estimator), initial(estimator)
    for x, g in zip(*batches(3), strict=True):
        _, dx, gradient, state = step(estimator, x, plain[1], plain[0], g)
        plain = state, write(plain[1], gradient)
        _, dx_scaled, gradient, state = step(estimator, x, scaled[1], scaled[0], 1024 * g)
        scaled = state, write(scaled[1], jax.tree.map(lambda leaf: leaf / 1024, gradient))
        np.testing.assert_allclose(dx_scaled, 1024 * dx, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        scaled[1].values, 1024 * plain[1].values, rtol=1e-4, atol=1e-2
    )


@methods
def test_what_does_not_count_has_no_gradient(name):
    """Equal to a batch without it, where that is a batch."""
    estimator, _ = METHODS[name]
    (x, *_), (g, *_) = batches(1)
    state, backward = initial(estimator)
    mask = np.ones((N, T, 1), bool)
    mask[-1] = False
    junk = np.where(mask, x, 1e4)
    g = np.where(mask, g, 0.0)
    y, dx, gradient, after = step(estimator, junk, backward, state, g, mask=mask)
    less = step(estimator, x[:-1], backward, state, g[:-1])
    chex.assert_trees_all_close((y[:-1], dx[:-1]), less[:2], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(gradient, less[2], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(after, less[3], rtol=1e-5)
    np.testing.assert_array_equal(dx[-1], 0.0)


@methods
def test_nan_stays_in_its_step(name):
    estimator, _ = METHODS[name]
    (x, *_), (g, *_) = batches(1)
    state, backward = initial(estimator)
    _, _, gradient, state = step(estimator, x, backward, state, g)
    backward = write(backward, gradient)
    x[0, 0, 0] = np.nan
    y, _, gradient, after = step(estimator, x, backward, state, g)
    assert np.isnan(y[0, 0, 0])
    chex.assert_tree_all_finite((after, write(backward, gradient)))
    assert not np.isnan(y[..., 1:]).any()
    if name != "online_norm":  # which takes the other examples in
        first = jax.tree.map(lambda leaf: leaf[..., 0], backward)
        kept = jax.tree.map(lambda leaf: leaf[..., 0], write(backward, gradient))
        chex.assert_trees_all_equal(kept, first)


# The optimizer.


@pytest.mark.usefixtures("loose")
def test_the_inner_optimizer_never_sees_them():
    """Neither a clipped norm, nor weight decay, nor moments."""
    seen = []

    def spy(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.1, weight_decay=0.5),
        optax.GradientTransformation(lambda p: (), spy),
    )
    optimizer = with_backward_statistics(inner)
    backward = cbn.BackwardStatistics(jnp.full((2, C), 5.0), jnp.full(C, 3.0))
    params = {"w": jnp.ones(2), "b": backward}
    gradient = cbn.BackwardStatistics(jnp.full((2, C), 4e6), jnp.full(C, 2.0))
    gradients = {"w": jnp.full(2, 0.1), "b": gradient}
    state = optimizer.init(params)
    updates, after = optimizer.update(gradients, state, params)
    alone, _ = inner.update(
        {"w": gradients["w"]}, inner.init({"w": params["w"]}), {"w": params["w"]}
    )
    np.testing.assert_allclose(updates["w"], alone["w"], rtol=1e-6)
    new = optax.apply_updates(params, updates)["b"]
    np.testing.assert_array_equal(new.values, 2e6)
    np.testing.assert_array_equal(new.steps, 4.0)
    assert all(len(jax.tree.leaves(tree)) == 1 for tree in seen[-1])
    assert jax.tree.structure(state) == jax.tree.structure(after)


@pytest.mark.usefixtures("loose")
def test_without_backward_statistics_nothing_changes():
    optimizer, inner = with_backward_statistics(optax.adam(0.1)), optax.adam(0.1)
    params, gradients = {"w": jnp.ones(2)}, {"w": jnp.array([0.3, -2.0])}
    got = optimizer.update(gradients, optimizer.init(params), params)
    chex.assert_trees_all_equal(got, inner.update(gradients, inner.init(params), params))


def test_a_layer_without_a_gradient_keeps_its_averages():
    backward = cbn.BackwardStatistics(jnp.full((2, C), 5.0), jnp.full(C, 3.0))
    chex.assert_trees_all_equal(
        write(backward, jax.tree.map(jnp.zeros_like, backward)), backward
    )


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("inside", [True, False])
def test_multi_steps(inside):
    """Around MultiSteps the averages move at each micro-batch, within it at each step."""
    if inside:
        every = optax.MultiSteps(with_backward_statistics(optax.sgd(0.1)), 2)
    else:
        every = with_backward_statistics(optax.MultiSteps(optax.sgd(0.1), 2))
    params = {"w": jnp.ones(1), "b": cbn.bidirectional_batch_norm().init_backward(1)}
    state = every.init(params)
    steps = []
    for values in (2.0, 4.0):
        gradient = cbn.BackwardStatistics(jnp.full((2, 1), values), jnp.ones(1))
        updates, state = every.update({"w": jnp.ones(1), "b": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        steps.append(float(params["b"].steps[0]))
    assert steps == ([0, 1] if inside else [1, 2])
    np.testing.assert_allclose(params["b"].values, 3.0 if inside else 4.0)
    np.testing.assert_allclose(params["w"], 0.9)


@pytest.mark.usefixtures("loose")
def test_skipped_steps_leave_the_averages():
    """As with dynamic loss scaling, when a gradient overflows."""
    optimizer = optax.apply_if_finite(with_backward_statistics(optax.sgd(0.1)), 5)
    params = {"w": jnp.ones(1), "b": cbn.bidirectional_batch_norm().init_backward(1)}
    gradient = cbn.BackwardStatistics(jnp.ones((2, 1)), jnp.ones(1))
    gradients = {"w": jnp.full(1, jnp.inf), "b": gradient}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)


def test_the_optimizer_asks_for_params():
    optimizer = with_backward_statistics(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"optimizer.update\(gradients, opt_state"):
        optimizer.update({}, optimizer.init({}))


# What goes wrong, and how it shows.


@pytest.mark.usefixtures("loose")
@methods
@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adamw(1e-3), optax.lion(1e-4)])
def test_an_optimizer_without_the_wrapper_shows_at_the_next_step(name, optimizer):
    estimator, _ = METHODS[name]
    (x, *_), (g, *_) = batches(1)
    state, backward = initial(estimator)
    _, _, gradient, state = step(estimator, x, backward, state, g)
    updates, _ = optimizer.update(gradient, optimizer.init(backward), backward)
    backward = optax.apply_updates(backward, updates)
    y, _, _, after = step(estimator, x, backward, state, g)
    assert np.isnan(y).all()
    chex.assert_tree_all_finite(after)
    with pytest.raises(ValueError, match="with_backward_statistics"):
        estimator.at(backward).train(state, x)


def test_the_first_gradient_warns_without_the_wrapper(monkeypatch):
    monkeypatch.setattr(_Process, "has_optimizer", False)
    estimator = cbn.online_norm()

    def total(x):
        backward = estimator.init_backward(2)
        return estimator.at(backward).train(estimator.init(2), x)[0].mean.sum()

    with pytest.warns(UserWarning, match="no optimizer that updates the statistics; write"):
        jax.grad(total)(jnp.ones((3, 2)))
    with_backward_statistics(optax.sgd(0.1))
    jax.grad(total)(jnp.ones((3, 2)))  # no warning, which would be an error


def test_a_process_without_the_wrapper_is_warned():
    code = """if True:
        import jax, jax.numpy as jnp, cbn_jax as cbn
        e = cbn.online_norm()
        train = lambda b, x: e.at(b).train(e.init(2), x)[0].mean.sum()
        jax.grad(train)(e.init_backward(2), jnp.ones((3, 2)))
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert "optimizer = cbn_jax.optax.with_backward_statistics(optimizer)" in run.stderr


@methods
def test_training_needs_the_averages(name):
    estimator, _ = METHODS[name]
    with pytest.raises(
        TypeError, match=rf"{name.split('-')[0]} got no backward .*at\(backward"
    ):
        estimator.train(estimator.init(C), jnp.ones(SHAPE))
    with pytest.raises(TypeError, match="backward of type dict, expected Backward"):
        estimator.at({}).train(estimator.init(C), jnp.ones(SHAPE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cbn.bidirectional_batch_norm(0), "window is 0"),
        (lambda: cbn.moving_average_batch_norm(0), "window is 0"),
        (lambda: cbn.moving_average_batch_norm(limit=0.5), "limit is 0.5"),
        (lambda: cbn.moving_average_batch_norm(warmup_steps=-1), "warmup_steps is -1"),
        (lambda: cbn.online_norm(1.0), "forward_decay is 1.0"),
        (lambda: cbn.online_norm(backward_decay=-0.1), "backward_decay is -0.1"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
