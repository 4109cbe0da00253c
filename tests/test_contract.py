"""What every estimator promises, checked for each through the same tests."""

import dataclasses
import functools
import inspect
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CORRECTED,
    DESIGNED,
    FACTORIES,
    GROUPS,
    KINDS,
    LAYERS,
    PARTS,
    PER_EXAMPLE,
    SAMPLING,
    STATELESS,
    UNCENTERED,
    apply,
    drift,
    eager_train,
    infer,
    init,
    normalize,
    train,
)
from jax.test_util import check_grads

import cbn_jax as cbn
from cbn_jax.core.estimator import Infer, Init, Train

pytestmark = pytest.mark.filterwarnings("error")
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}  # a few float32 operations on values around one

# Wrapped and combined methods need not show again what those inside them did.
METHODS = [*KINDS, "cross_iteration_batch_norm-from_scratch", "batch_renorm-relaxed"]


def each(names):
    return pytest.mark.parametrize("name", sorted(names))


layers = pytest.mark.parametrize("layer", [LAYERS["dense"], LAYERS["conv-strided"]])


def assert_close(actual, expected, **tolerance):
    chex.assert_trees_all_close(actual, expected, **(ROUNDING | tolerance))


assert_same = chex.assert_trees_all_equal


def first(statistics, examples):
    """Statistics of the first examples, where they are per example."""
    return jax.tree.map(lambda s: s[:examples] if s.ndim > 1 else s, statistics)


def run(name, layer, key, dtype=jnp.float32):
    """Estimator, parameters, statistics and state after a few steps with moving weights."""
    del key  # the same for all tests, which share the cached results
    return _run(name, layer, dtype)


@functools.cache
def _run(name, layer, dtype):
    return several_steps(name, layer, jax.random.key(0), dtype)


def several_steps(name, layer, key, dtype=jnp.float32, steps=4):
    estimator = FACTORIES[name]()
    params = layer.params(key)
    state = init(estimator, layer, params)
    statistics = None
    for step in range(steps):
        z = layer.data(jax.random.fold_in(key, step), dtype)
        cast = jax.tree.map(lambda p: p.astype(dtype), params)
        _, statistics, state = train(estimator, state, layer, cast, z)
        params = drift(params, jax.random.fold_in(key, 100 + step))
    return estimator, params, statistics, state


def test_every_public_factory_has_a_case():
    factories = {
        name
        for name, value in ((name, getattr(cbn, name)) for name in cbn.__all__)
        if inspect.isfunction(value)
        and typing.get_type_hints(value).get("return") in (cbn.Estimator, cbn.Bidirectional)
    }
    assert factories == {name.split("-")[0] for name in FACTORIES}


@each(FACTORIES)
def test_signatures(name):
    """Everything after the source is given by name."""
    estimator = FACTORIES[name]()
    for function, protocol in (
        (estimator.init, Init),
        (estimator.train, Train),
        (estimator.infer, Infer),
    ):
        expected = list(inspect.signature(protocol.__call__).parameters.values())[1:]
        actual = inspect.signature(function).parameters.values()
        assert [(p.name, p.kind, p.default) for p in actual] == [
            (p.name, p.kind, p.default) for p in expected
        ]


@each(METHODS)
@layers
def test_init_from_shapes(name, layer, key):
    estimator = FACTORIES[name]()
    params = layer.params(key)
    abstract = jax.eval_shape(lambda p: p, params)
    state = init(estimator, layer, params)
    from_shapes = init(estimator, layer, abstract)
    assert_same(from_shapes, state)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == jnp.float32
        assert leaf.size > 0


@each(FACTORIES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_state_keeps_its_form(name, dtype, key):
    layer = LAYERS["conv-strided"]
    estimator, params, statistics, state = run(name, layer, key, dtype=dtype)
    fresh = init(estimator, layer, params)
    form = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert form(state) == form(fresh)
    for leaf in jax.tree.leaves((state, statistics)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    x = apply(
        layer, jax.tree.map(lambda p: p.astype(dtype), params), layer.data(key, dtype)
    )
    assert normalize(x, statistics).dtype == dtype


@each(METHODS)
def test_jit_is_eager(name, key):
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    arguments = (estimator, state, layer, params, layer.data(key))
    assert_close(train(*arguments), eager_train(*arguments))


@each(FACTORIES)
@layers
def test_the_second_call_is_not_traced(name, layer, key):
    """A state from training has the form of a fresh one."""
    estimator, params, _, state = run(name, layer, key)
    z = layer.data(key)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state, params, z):
        return eager_train(estimator, state, layer, params, z)[2]

    chex.clear_trace_counter()
    for start in (init(estimator, layer, params), state):
        step.lower(step.eval_shape(start, params, z), params, z)


@each(METHODS)
def test_donated_state(name, key):
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    z = layer.data(key)
    expected = train(estimator, state, layer, params, z)[2]
    step = jax.jit(lambda s: train(estimator, s, layer, params, z)[2], donate_argnums=0)
    assert_close(step(jax.tree.map(jnp.copy, state)), expected)
    fresh = init(estimator, layer, params)
    step(step(fresh))  # no buffer appears twice in a state


@each(METHODS)
def test_scan_is_a_loop(name, key):
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    batches = jnp.stack([layer.data(jax.random.fold_in(key, i)) for i in range(5)])

    def step(state, z):
        _, statistics, state = train(estimator, state, layer, params, z)
        return state, statistics

    scanned, statistics = jax.lax.scan(step, state, batches)
    for i, z in enumerate(batches):
        state, last = step(state, z)
        assert_close(jax.tree.map(lambda leaf: leaf[i], statistics), last)  # noqa: B023
    assert_close(scanned, state)


@each(METHODS)
def test_vmap_over_seeds(name, key):
    layer = LAYERS["conv"]
    keys = jax.random.split(key, 3)

    def two_steps(key):
        return several_steps(name, layer, key, steps=2)[2:]

    together = jax.jit(jax.vmap(two_steps))(keys)
    for i, one in enumerate(keys):
        assert_close(jax.tree.map(lambda leaf: leaf[i], together), two_steps(one))  # noqa: B023


# A filter's response to one value is nearly a jump; its own tests have more.
@each(set(METHODS) - DESIGNED - {"filter_response_norm"})
@layers
def test_gradients_are_finite_differences(name, layer, key, x64):
    """With respect to activations and affine parameters, in float64."""
    estimator, _, _, state = run(name, layer, key)
    params = layer.params(key, jnp.float64)
    x, source = cbn.run_layer(layer.layer, params, layer.data(key, jnp.float64))
    scale, bias = jnp.full(layer.features, 1.5), jnp.full(layer.features, 0.3)

    def f(x, scale, bias):
        statistics, _ = estimator.train(state, x, source)
        return cbn.normalize(x, statistics, scale, bias)

    order = 2 if name == "batch_norm" else 1
    given = (x, scale, bias)
    check_grads(jax.jit(f), given, order, ["fwd", "rev"], rtol=3e-5, atol=1e-7)


@each(METHODS)
def test_no_gradient_through_the_state(name, key):
    layer = LAYERS["conv-strided"]
    estimator, params, _, state = run(name, layer, key)

    def f(state, params):
        statistics, state = train(estimator, state, layer, params, layer.data(key))[1:]
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((statistics, state)))

    def state_only(params):
        state_next = train(estimator, state, layer, params, layer.data(key))[2]
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state_next))

    gradients = jax.jit(
        lambda: (jax.grad(f)(state, params), jax.grad(state_only)(params))
    )()
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, 0.0)


@each(set(METHODS) - CORRECTED - PARTS)
def test_inference_agrees_with_training_on_one_repeated_batch(name, key):
    layer = LAYERS["conv-strided"]
    estimator = FACTORIES[name]()
    params, z = layer.params(key), layer.data(key)
    state = init(estimator, layer, params)
    for _ in range(5):
        x, trained, state = train(estimator, state, layer, params, z)
        assert_close(infer(estimator, state, x), trained)


@each(set(METHODS) - PER_EXAMPLE - CORRECTED)
def test_inference_before_training_changes_nothing(name, key):
    layer = LAYERS["dense"]
    params = layer.params(key)
    estimator = FACTORIES[name](epsilon=1e-12)
    x = apply(layer, params, layer.data(key))
    statistics = infer(estimator, init(estimator, layer, params), x)
    assert_close(normalize(x, statistics), x)


@each(set(METHODS) - SAMPLING - {"ghost_batch_norm"})
@layers
def test_mask_is_slicing(name, layer, key):
    estimator, params, _, state = run(name, layer, key)
    z = layer.data(key)
    mask = np.arange(len(z)) < 5
    mask = mask.reshape(-1, *[1] * (z.ndim - 1))
    _, masked, after = train(estimator, state, layer, params, z, mask=mask)
    _, sliced, expected = train(estimator, state, layer, params, z[:5])
    assert_close(first(masked, 5), sliced)
    assert_close(after, expected)


@each(FACTORIES)
def test_masked_values_may_be_anything(name, key):
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    z = layer.data(key)
    mask = np.arange(8)[:, None] < 5

    @jax.jit
    def value_and_gradient(poison):
        x, source = cbn.run_layer(layer.layer, params, z)

        def f(x):
            statistics, _ = estimator.train(state, x, source, mask=mask)
            y = cbn.normalize(x[:5], first(statistics, 5))
            return jnp.square(y + 1.0).sum(), statistics

        return jax.value_and_grad(f, has_aux=True)(jnp.where(mask, x, poison))

    (_, statistics), gradient = value_and_gradient(jnp.nan)
    (_, expected), right = value_and_gradient(7.0)
    assert_same(statistics, expected)
    assert_close(gradient, right)
    assert np.isfinite(gradient).all()


@each(set(METHODS) - PER_EXAMPLE - CORRECTED)
def test_an_empty_mask_means_inference_and_leaves_the_averages(name, key):
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    if hasattr(state, "running"):  # a filled window still knows better than the averages
        blank = init(estimator, layer, params)
        state = blank._replace(running=state.running)
    z = layer.data(key)
    mask = jnp.zeros((8, 1), bool)
    x, statistics, after = train(estimator, state, layer, params, z, mask=mask)
    expected = infer(estimator, state, x)
    # Close, not the same: XLA may round a root otherwise in another program.
    assert_close(
        jax.tree.map(lambda e, s: jnp.broadcast_to(e, s.shape), expected, statistics),
        statistics,
    )
    assert_same(infer(estimator, after, x), expected)
    assert np.isfinite(jnp.concatenate(statistics)).all()


@each(FACTORIES)
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays_out_of_the_state(name, poison, key):
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    z = layer.data(key)
    bad = z.at[3, 2].set(poison)
    x, statistics, after = train(estimator, state, layer, params, bad)
    poisoned = ~np.isfinite(normalize(x, statistics))
    alone = {"group_norm", "filter_response_norm", *PARTS}
    assert poisoned[3].all() if name in alone else poisoned.all()
    for leaf in jax.tree.leaves(after):
        assert np.isfinite(leaf).all()
    if name not in PARTS:  # whose other parts are taken in
        assert_same(infer(estimator, after, x), infer(estimator, state, x))
    x, statistics, _ = train(estimator, after, layer, params, z)
    assert np.isfinite(normalize(x, statistics)).all()


@each(METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_overflow_is_forgotten(name, dtype, key):
    """Finite values whose squares are not: the next step is as if they had not been."""
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    z = layer.data(key, dtype)
    _, _, after = train(estimator, state, layer, params, z.at[3, 2].set(1e25))
    x, statistics, _ = train(estimator, after, layer, params, z)
    if name not in PARTS:
        assert_same(infer(estimator, after, x), infer(estimator, state, x))
    assert np.isfinite(jnp.concatenate(statistics)).all()
    assert np.abs(statistics.mean).max() < 10
    assert (statistics.inv_std > 0.05).all()


@each(set(METHODS) - UNCENTERED)
def test_constant_channels_give_zero(name, key):
    layer = LAYERS["dense"]
    estimator = FACTORIES[name]()
    params = layer.params(key)
    state = init(estimator, layer, params)

    def f(params):
        z = jnp.full(layer.inputs, 1e3)
        x, statistics, _ = train(estimator, state, layer, params, z)
        return jnp.abs(normalize(x, statistics)).sum()

    value, gradient = jax.value_and_grad(f)(params)
    assert np.isfinite(value)
    # Constant over the batch, but not over a group; and the start has its share.
    if name not in GROUPS | {"diminishing_batch_norm", "online_norm"}:
        assert value == 0.0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@each(METHODS)
def test_bad_activations(name, key):
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    source = cbn.run_layer(layer.layer, params, layer.data(key))[1]
    integers = jnp.ones((8, 4), jnp.int32)
    for call in (estimator.infer, functools.partial(estimator.train, source=source)):
        with pytest.raises(TypeError, match=r"dtype int32, .*write x\.astype"):
            call(state, integers)
    with pytest.raises(
        ValueError, match=r"got x of shape \(0, 4\), no value per feature .*skip an empty"
    ):
        estimator.train(state, jnp.ones((0, 4)), source)
    with pytest.raises(ValueError, match=r"got x of shape \(4,\), .*x\[None\]"):
        estimator.train(state, jnp.ones(4), source)
    with pytest.raises(ValueError, match=r"features.*\(3\)|\(8, 3\), expected 4 features"):
        estimator.train(state, jnp.ones((8, 3)), source)
    with pytest.raises(ValueError, match="expected 4 features"):
        estimator.infer(state, jnp.ones((8, 3)))


@each(FACTORIES)
def test_bad_state(name, key):
    estimator = FACTORIES[name]()
    layer = LAYERS["dense"]
    x, source = cbn.run_layer(layer.layer, layer.params(key), layer.data(key))
    for foreign in ({"mean": jnp.zeros(4)}, (jnp.zeros(4), jnp.ones(4))):
        with pytest.raises(TypeError, match=r"expected \w+(State|Moments|Count); make it"):
            estimator.train(foreign, x, source)
        with pytest.raises(TypeError, match=r"estimator\.init\(features, layer, params\)"):
            estimator.infer(foreign, x)


@each(METHODS)
@pytest.mark.parametrize("bad", [1.0, -0.1])
def test_bad_options(name, bad):
    factory = FACTORIES[name]
    if name not in {*STATELESS, "online_norm"} and "diminishing" not in name:
        with pytest.raises(ValueError, match=r"momentum is .*decay in \[0, 1\)"):
            factory(momentum=bad)
    with pytest.raises(ValueError, match=r"epsilon is .*above 0"):
        factory(epsilon=-abs(bad))


@each(KINDS)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 3), (8, 4, 1)])
def test_a_mask_that_does_not_fit(name, shape, key):
    """One sentence from each, in training and in inference."""
    layer = LAYERS["dense"]
    estimator, params, _, state = run(name, layer, key)
    x, source = cbn.run_layer(layer.layer, params, layer.data(key))
    write = (
        r"write mask\[\.\.\., None\]"
        if shape == (8,)
        else r"write a mask of shape \(8, 1\)"
    )
    for call in (functools.partial(estimator.train, source=source), estimator.infer):
        with pytest.raises(
            ValueError, match=rf"^\w+ got a mask of shape .*\(8, 4\).*{write}"
        ):
            call(state, x, mask=jnp.ones(shape, bool))


@pytest.mark.parametrize(
    "wrap",
    [
        cbn.adaptive_batch_norm,
        functools.partial(cbn.corrected_inference, examples=2),
        cbn.fitted_inference,
        lambda estimator: cbn.diagnostics.watch({"it": estimator}, use="it"),
    ],
    ids=["adaptive", "corrected", "fitted", "watch"],
)
def test_a_wrapper_hands_on_the_mask(wrap):
    """To a method whose inference looks at the example, now or one day."""
    seen = []

    def infer(state, x, *, mask=None):
        seen.append(mask)
        return plain.infer(state, x, mask=mask)

    plain = cbn.batch_norm()
    estimator, mask = wrap(dataclasses.replace(plain, infer=infer)), jnp.ones((4, 1), bool)
    estimator.infer(estimator.init(3), jnp.ones((4, 3)), mask=mask)
    assert seen[-1] is mask
