import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CORRECTED, FACTORIES, GROUPS, KINDS, LAYERS
from flax import linen as nn
from flax import serialization

import cbn_jax as cbn
from cbn_jax.linen import Norm, from_batch_norm, to_batch_norm

estimators = pytest.mark.parametrize("name", KINDS)
CBN = cbn.cross_iteration_batch_norm(window=3, momentum=0.9)
DIMINISHING = {"diminishing_batch_norm", "diminishing_batch_norm-all_alike"}


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


class Net(nn.Module):
    """Two normalized convolutions; ``norm`` is the one line that changes."""

    norm: functools.partial

    @nn.compact
    def __call__(self, z, train):
        norm = functools.partial(self.norm, use_running_average=not train)
        z = nn.relu(norm(layer=nn.Conv(4, (3, 3), use_bias=False))(z))
        z = nn.relu(norm(layer=nn.Conv(4, (3, 3), strides=2, feature_group_count=2))(z))
        return nn.Dense(3)(z.mean((1, 2)))


def net(name):
    return Net(functools.partial(Norm, FACTORIES[name]()))


def images(key, n=4):
    return jax.random.normal(key, (n, 6, 6, 2))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_drop_in_for_batch_norm(where, axis, key):
    """Outputs, gradients and predictions; running averages but for Flax's own bias."""
    x = 2.0 + jax.random.normal(key, (8, 5, 5, 5))
    flag = {"use_running_average": False}
    made, called = (flag, {}) if where == "constructor" else ({}, flag)
    theirs = nn.BatchNorm(momentum=0.9, axis=axis, use_fast_variance=False, **made)
    ours = Norm(cbn.batch_norm(momentum=0.9), axis=axis, **made)

    def run(module):
        variables = module.init(key, x, **called)

        def loss(params):
            y, updates = module.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"], **called
            )
            return jnp.sin(y).sum(), (y, updates)

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, (y, updates)), gradient = grad(variables["params"])
        return variables["params"], value, y, gradient, updates

    *mine, my_state = run(ours)
    *others, their_state = run(theirs)
    assert_close(mine, others, 2e-5)
    running, flax_stats = my_state["batch_stats"]["state"], their_state["batch_stats"]
    np.testing.assert_allclose(flax_stats["mean"], 0.1 * running.mean, rtol=1e-5)
    np.testing.assert_allclose(flax_stats["var"], 0.9 + 0.1 * running.var, rtol=1e-5)


def test_inference_equals_flax_with_the_same_statistics(key):
    x = jax.random.normal(key, (8, 5))
    mean, var = jnp.linspace(-1, 1, 5), jnp.linspace(0.5, 2, 5)
    ours, theirs = Norm(cbn.batch_norm()), nn.BatchNorm()
    state = cbn.RunningMoments(mean, var, jnp.ones(5))
    params = {"scale": jnp.linspace(1, 2, 5), "bias": jnp.linspace(0, 1, 5)}
    mine = {"params": params, "batch_stats": {"state": state}}
    flax_variables = {"params": params, "batch_stats": {"mean": mean, "var": var}}
    assert_close(
        ours.apply(mine, x, use_running_average=True),
        theirs.apply(flax_variables, x, use_running_average=True),
    )


def test_parameter_tree_is_that_of_batch_norm(key):
    """Snapshot: the wrapped layers stay where they were; checkpoints move over."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, z, train):
            norm = functools.partial(nn.BatchNorm, use_running_average=not train)
            z = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(z)))
            z = nn.Conv(4, (3, 3), strides=2, feature_group_count=2)(z)
            return nn.Dense(3)(nn.relu(norm()(z)).mean((1, 2)))

    plain = Plain().init(key, images(key), train=False)["params"]
    expected = {name.replace("BatchNorm", "Norm"): leaf for name, leaf in plain.items()}
    for name in FACTORIES:
        params = net(name).init(key, images(key), train=False)["params"]
        assert set(params) == set(expected)
        jax.tree.map(np.testing.assert_array_equal, params, expected)


@estimators
def test_equals_the_functional_core(name, key):
    """Four SGD steps by hand and through the module."""
    layer, estimator = LAYERS["dense"], FACTORIES[name]()
    module = Norm(estimator, layer=nn.Dense(4), use_running_average=False)
    variables = module.init(key, layer.data(key))
    params = variables["params"]
    state = estimator.init(4, params["layer"])
    variables = {"batch_stats": variables["batch_stats"]}
    mine = theirs = params

    def functional(params, state, z):
        x, source = cbn.run_layer(layer.layer, params["layer"], z)
        statistics, state = estimator.train(state, x, source)
        y = cbn.normalize(x, statistics, params["scale"], params["bias"])
        return jnp.sin(y).sum(), state

    def modular(params, variables, z):
        y, updates = module.apply(
            {"params": params, **variables}, z, mutable=["batch_stats"]
        )
        return jnp.sin(y).sum(), updates

    for step in range(4):
        z = layer.data(jax.random.fold_in(key, step))
        (_, state), g = jax.value_and_grad(functional, has_aux=True)(mine, state, z)
        (_, variables), h = jax.value_and_grad(modular, has_aux=True)(theirs, variables, z)
        assert_close(h, g)
        mine, theirs = (
            jax.tree.map(lambda p, d: p - 0.1 * d, p, d)
            for p, d in ((mine, g), (theirs, h))
        )
    assert_close(variables["batch_stats"]["state"], state)


@estimators
def test_a_model_written_once_trains_with_every_method(name, key):
    """Jitted, donated, serialized in the middle, without a second trace."""
    model, optimizer = net(name), optax.sgd(0.1)
    variables = model.init(key, images(key), train=False)
    params, stats = variables["params"], variables["batch_stats"]
    opt_state, labels = optimizer.init(params), jnp.arange(4) % 3
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, opt_state, z):
        traces.append(None)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, z, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(y, labels)
            return loss.mean(), updates["batch_stats"]

        (loss, new), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), new, opt_state, loss

    losses, z = [], images(key)
    for i in range(30):
        params, stats, opt_state, loss = step(params, stats, opt_state, z)
        losses.append(loss)
        if i == 10:
            stats = serialization.from_bytes(stats, serialization.to_bytes(stats))
            stats = jax.tree.map(jnp.asarray, stats)
    assert len(traces) == 1
    # Of four images, each by itself, there is less to learn by heart.
    assert losses[-1] < (0.75 if name in GROUPS else 0.6) * losses[0]
    model.apply({"params": params, "batch_stats": stats}, z, train=False)


@estimators
def test_initializing_updates_nothing_and_needs_no_axis(name, key):
    module = Norm(FACTORIES[name](), layer=nn.Dense(4), axis_name="nowhere")
    variables = module.init(key, jnp.ones((1, 5)), use_running_average=False)
    fresh = FACTORIES[name]().init(4, variables["params"]["layer"])
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"]["state"], fresh)


def test_evaluation_leaves_the_state(key):
    model = net("cross_iteration_batch_norm")
    variables = model.init(key, images(key), train=False)
    model.apply(variables, images(key), train=False)  # not even mutable
    _, after = model.apply(variables, images(key), train=False, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"]
    )
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        model.apply(variables, images(key), train=True)


def test_options(key):
    x = jax.random.normal(key, (8, 5), jnp.bfloat16)
    module = Norm(
        cbn.batch_norm(),
        use_running_average=True,
        use_bias=False,
        scale_init=nn.initializers.constant(3.0),
        param_dtype=jnp.bfloat16,
        dtype=jnp.float32,
    )
    y, variables = module.init_with_output(key, x)
    assert set(variables["params"]) == {"scale"}
    assert variables["params"]["scale"].dtype == jnp.bfloat16
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 3.0 * np.float32(x), rtol=1e-2)
    assert (
        Norm(cbn.batch_norm(), use_running_average=True)
        .apply(
            {
                "params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
                "batch_stats": {"state": cbn.batch_norm().init(5)},
            },
            x,
        )
        .dtype
        == jnp.bfloat16
    )


def test_wide_layers_take_one_pass(key):
    """The layer is run with one feature more, not twice."""
    module = Norm(CBN, layer=nn.Conv(32, (3, 3)), use_running_average=False)
    plain = Norm(cbn.batch_norm(), layer=nn.Conv(32, (3, 3)), use_running_average=False)

    def flops(module):
        z = jnp.ones((2, 16, 16, 32))
        variables = module.init(key, z)
        apply = jax.jit(lambda v, z: module.apply(v, z, mutable=["batch_stats"]))
        return apply.lower(variables, z).compile().cost_analysis()["flops"]

    assert flops(module) / flops(plain) < 2.15


@pytest.mark.parametrize(
    ("given", "came"), [((None, None), "neither"), ((True, False), "both")]
)
def test_flag_given_never_or_twice(given, came, key):
    with pytest.raises(ValueError, match=f"use_running_average from {came} .*not train"):
        Norm(cbn.batch_norm(), use_running_average=given[0]).init(
            key, jnp.ones((2, 3)), given[1]
        )


def test_cross_iteration_without_a_layer(key):
    with pytest.raises(ValueError, match="params=None"):
        Norm(CBN, use_running_average=False).init(key, jnp.ones((2, 3)))


CONVOLUTIONS = {
    "plain": ({}, ()),
    "strided": ({"strides": 2, "padding": "VALID"}, (2, "VALID")),
    "padded": ({"padding": (1, (2, 0))}, (1, (1, (2, 0)))),
    "dilated": ({"kernel_dilation": 2, "padding": 1}, (1, 1, 2)),
    "grouped": ({"feature_group_count": 2}, (1, "SAME", 1, 2)),
    "no window strides": ({"strides": None, "kernel_dilation": None}, ()),
}


@pytest.mark.parametrize("name", ["streaming_batch_norm", "replay_batch_norm"])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions_know_their_patches(options, name, key):
    """Two steps of the module equal two of the functional core."""
    flax_options, ours = CONVOLUTIONS[options]
    estimator, layer = FACTORIES[name](), cbn.convolution(*ours)
    module = Norm(
        estimator, nn.Conv(4, (3, 3), **flax_options), use_scale=False, use_bias=False
    )
    z = images(key)
    variables = module.init(key, z, use_running_average=False)
    params = variables["params"]["layer"]
    state = estimator.init(4, params, layer.groups)
    for batch in (z, z[::-1] + 1.0):
        y, updates = module.apply(
            variables, batch, use_running_average=False, mutable=["batch_stats"]
        )
        x, source = cbn.run_layer(layer, params, batch)
        statistics, state = estimator.train(state, x, source)
        assert_close(y, cbn.normalize(x, statistics))
        assert_close(updates["batch_stats"]["state"], state)
        variables = {**variables, **updates}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv(4, (3, 3), padding="CIRCULAR"),
        nn.Conv(4, (3, 3), input_dilation=(2, 1), padding=1),
        nn.ConvTranspose(4, (3, 3)),
    ],
)
def test_other_layers_say_what_to_write(layer, key):
    """And are good enough for the method that needs no patches."""
    module = Norm(cbn.small_batch_norm(2), layer, use_running_average=False)
    z = images(key)
    variables = module.init(key, z)
    with pytest.raises(ValueError, match=r"without patches, .*cross_iteration_batch_norm"):
        module.apply(variables, z, mutable=["batch_stats"])
    module = Norm(CBN, layer, use_running_average=False)
    y, _ = module.apply(module.init(key, z), z, mutable=["batch_stats"])
    assert np.isfinite(y).all()


# A learned weight.


def mixed(mix):
    return cbn.group_batch_norm(mix, num_groups=2, momentum=0.9)


def gated(mix):
    return cbn.adaptive_batch_norm(mixed(mix))


@pytest.mark.parametrize("running", [False, True])
def test_a_function_of_a_weight_gets_the_sigmoid_of_a_parameter(running, key):
    x = images(key)
    module = Norm(mixed, use_running_average=running, mix_init=nn.initializers.zeros)
    variables = module.init(key, x)
    assert variables["params"]["mix"].shape == ()
    assert variables["params"]["mix"] == 0.0
    params = {**variables["params"], "mix": jnp.float32(-0.4)}
    state = cbn.running_moments(jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0]))
    variables = {"params": params, "batch_stats": {"state": state}}
    y, _ = module.apply(variables, x, mutable=["batch_stats"])
    estimator = mixed(jax.nn.sigmoid(-0.4))
    statistics = estimator.infer(state, x) if running else estimator.train(state, x)[0]
    assert_close(y, cbn.normalize(x, statistics))


def test_the_weight_starts_as_published(key):
    params = Norm(mixed).init(key, images(key), use_running_average=False)["params"]
    assert set(params) == {"bias", "mix", "scale"}
    assert jax.nn.sigmoid(params["mix"]) == pytest.approx(0.731, abs=1e-3)
    half = Norm(mixed, use_running_average=False, param_dtype=jnp.bfloat16)
    variables = half.init(key, images(key))
    assert variables["params"]["mix"].dtype == jnp.bfloat16
    half.apply(variables, images(key), mutable=["batch_stats"])


@pytest.mark.parametrize("factory", [mixed, gated])
def test_the_weight_is_trained(factory, key):
    """Also inside a wrapper, without a second trace."""
    model, optimizer = Net(functools.partial(Norm, factory)), optax.sgd(0.1)
    z, labels, traces = images(key), jnp.arange(4) % 3, []
    variables = model.init(key, z, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    opt_state, start = optimizer.init(params), params

    @jax.jit
    def step(params, stats, opt_state):
        traces.append(None)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, z, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(y, labels)
            return loss.mean(), updates["batch_stats"]

        (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    losses = []
    for _ in range(20):
        params, stats, opt_state, loss = step(params, stats, opt_state)
        losses.append(loss)
    assert len(traces) == 1
    assert losses[-1] < 0.8 * losses[0]
    for name in ("Norm_0", "Norm_1"):
        assert abs(params[name]["mix"] - start[name]["mix"]) > 1e-4


# Models trained with Flax.


class Block(nn.Module):
    norm: functools.partial

    @nn.compact
    def __call__(self, z, train):
        z = nn.Conv(4, (3, 3))(z)
        return nn.relu(self.norm(use_running_average=not train)(z))


class Tower(nn.Module):
    """Names by Flax and by hand, on two levels."""

    norm: functools.partial

    @nn.compact
    def __call__(self, z, train):
        running = not train
        z = self.norm(use_running_average=running)(z)
        z = Block(self.norm)(z, train)
        z = self.norm(use_running_average=running, name="my_BatchNorm_0")(z)
        z = self.norm(use_running_average=running, use_bias=False)(z)
        return self.norm(use_running_average=running, name="BatchNorm_out")(z)


def towers(estimator):
    theirs = functools.partial(
        nn.BatchNorm, momentum=0.9, epsilon=1e-3, use_fast_variance=False
    )
    return Tower(theirs), Tower(functools.partial(Norm, estimator))


@functools.cache
def trained_tower():
    """Variables of a model with ``nn.BatchNorm`` after some batches."""
    theirs, _ = towers(None)
    key = jax.random.key(0)
    variables = theirs.init(key, images(key), train=False)
    leaves, structure = jax.tree.flatten(variables["params"])
    leaves = [
        leaf + 0.3 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    variables = {**variables, "params": jax.tree.unflatten(structure, leaves)}
    for i in range(3):
        z = i + images(jax.random.fold_in(key, i))
        _, updates = theirs.apply(variables, z, train=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    return variables


@pytest.mark.parametrize(
    "wrapped",
    [lambda e: e, lambda e: cbn.corrected_inference(e, batch_size=1e9, epsilon=1e-3)],
    ids=["batch_norm", "corrected_inference"],
)
def test_a_converted_model_predicts_the_same(wrapped, key):
    theirs, ours = towers(wrapped(cbn.batch_norm(epsilon=1e-3)))
    variables, z = from_batch_norm(trained_tower()), images(key)
    fresh = ours.init(key, z, train=False)
    assert jax.tree.structure(variables) == jax.tree.structure(fresh)
    actual = ours.apply(variables, z, train=False)
    assert_close(actual, theirs.apply(trained_tower(), z, train=False))


def test_a_converted_model_trains_on(key):
    """At its own pace: two more steps are those of Flax, averages included."""
    theirs, ours = towers(cbn.batch_norm(momentum=0.9, epsilon=1e-3))
    flax_variables, variables = trained_tower(), from_batch_norm(trained_tower())
    for i in range(2):
        z = 5.0 + images(jax.random.fold_in(key, i))
        expected, updates = theirs.apply(
            flax_variables, z, train=True, mutable=["batch_stats"]
        )
        flax_variables = {**flax_variables, **updates}
        y, updates = ours.apply(variables, z, train=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert_close(y, expected, 1e-4)
    z = images(key)
    actual = ours.apply(variables, z, train=False)
    assert_close(actual, theirs.apply(flax_variables, z, train=False), 1e-4)


class Layers(nn.Module):
    """Each layer and its normalizer by one function, as in a model that is to change."""

    norm: functools.partial

    @nn.compact
    def __call__(self, z, train):
        z = nn.relu(self.norm(nn.Conv(4, (3, 3)), z, train))
        return self.norm(nn.Dense(3), z, train)


def behind(layer, z, train):
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.5, epsilon=1e-3)
    return norm(layer(z))


@functools.cache
def trained_layers():
    key = jax.random.key(0)
    variables = Layers(behind).init(key, images(key), False)
    z = 2.0 + images(key)
    _, updates = Layers(behind).apply(variables, z, True, mutable=["batch_stats"])
    return {**variables, **updates}


def around(estimator):
    return lambda layer, z, train: Norm(estimator, layer, use_running_average=not train)(z)


@pytest.mark.parametrize(
    "estimator",
    [
        cbn.small_batch_norm(2, epsilon=1e-3),
        cbn.cross_iteration_batch_norm(4, running="window", epsilon=1e-3),
        cbn.adaptive_batch_norm(cbn.replay_batch_norm(2, samples=8, epsilon=1e-3)),
    ],
    ids=["small_batch", "cross_iteration", "adaptive_replay"],
)
def test_any_method_goes_on_from_batch_norm(estimator, key):
    """It predicts as before, begins its window anew, and trains."""
    model, z = Layers(around(estimator)), images(key)
    fresh = model.init(key, z, False)
    variables = from_batch_norm(trained_layers(), into=fresh)
    assert jax.tree.structure(variables) == jax.tree.structure(fresh)
    expected = Layers(behind).apply(trained_layers(), z, False)
    assert_close(model.apply(variables, z, False), expected)
    assert jnp.abs(model.apply(fresh, z, False) - expected).max() > 0.1
    y, updates = model.apply(variables, z, True, mutable=["batch_stats"])
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize(
    ("features", "named", "came"),
    [
        (5, None, r"\(3, 3, 2, 4\) in kernel .*expected \(3, 3, 2, 5\)"),
        (4, "last", r"got \['Conv_0', .*'last'\]"),
    ],
)
def test_what_goes_on_has_the_same_modules(features, named, came, key):
    class Other(nn.Module):
        @nn.compact
        def __call__(self, z, train):
            norm = around(cbn.batch_norm())
            z = norm(nn.Conv(features, (3, 3)), z, train)
            return norm(nn.Dense(3, name=named), z, train)

    fresh = Other().init(key, images(key), False)
    with pytest.raises(ValueError, match=came):
        from_batch_norm(trained_layers(), into=fresh)


def test_a_method_without_running_moments_does_not_go_on(key):
    fresh = Layers(around(cbn.diminishing_batch_norm())).init(key, images(key), False)
    with pytest.raises(ValueError, match="without running moments, expected batch_norm"):
        from_batch_norm(trained_layers(), into=fresh)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norms_own_state_is_not_taken_for_ours(train, key):
    """With equal names Flax would begin a state beside it, and lose the averages."""
    z = images(key)
    norm = nn.BatchNorm(use_running_average=True)
    variables = nn.Sequential([norm]).init(key, z)
    ours = nn.Sequential([Norm(cbn.batch_norm(), use_running_average=not train)])
    with pytest.raises(
        ValueError, match=r"mean and var of an nn.BatchNorm .*from_batch_norm"
    ):
        ours.apply(variables, z, mutable=["batch_stats"])


@pytest.mark.parametrize(
    ("arguments", "came"),
    [
        ((nn.Dense(3), CBN), "a module, Dense, as its estimator"),
        ((3,), "3 as its estimator"),
        ((CBN, nn.Dense), "layer=.*Dense.*, no module"),
        ((CBN, jnp.sin), "layer=.*sin.*, no module"),
    ],
)
def test_arguments_of_another_kind(arguments, came, key):
    with pytest.raises(TypeError, match=f"Norm got {came}.*expected an estimator"):
        Norm(*arguments, use_running_average=False).init(key, jnp.ones((2, 3)))


def test_nothing_to_convert(key):
    variables = nn.Dense(4).init(key, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"collections \['params'\] .*pass all variables"):
        from_batch_norm(variables)


def test_two_modules_cannot_have_one_name():
    moments = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    stats = {"BatchNorm_0": moments, "Norm_0": {"state": cbn.running_moments(**moments)}}
    with pytest.raises(
        ValueError, match=r"'BatchNorm_0', 'Norm_0'\], .*names of their own"
    ):
        from_batch_norm({"batch_stats": stats})


def test_a_scanned_stack_is_converted(key):
    """Moments of all its layers are in one array."""

    def stack(norm):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, z, _):
                return norm(use_running_average=True, name="norm")(nn.Dense(2)(z)), None

        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(Body, axes, split_rngs={"params": True}, length=3)()

    theirs = stack(functools.partial(nn.BatchNorm, epsilon=1e-3))
    ours = stack(functools.partial(Norm, cbn.batch_norm(epsilon=1e-3)))
    z = jax.random.normal(key, (4, 2))
    variables = theirs.init(key, z, None)
    stats = jax.tree.map(
        lambda leaf: jnp.linspace(0.5, 2.0, 6).reshape(leaf.shape), variables["batch_stats"]
    )
    variables = {**variables, "batch_stats": stats}
    y, _ = ours.apply(from_batch_norm(variables), z, None)
    assert_close(y, theirs.apply(variables, z, None)[0])


# And back.


def test_back_again():
    """Names, parameters and averages are what they were."""
    back = to_batch_norm(from_batch_norm(trained_tower()))
    assert jax.tree.structure(back) == jax.tree.structure(trained_tower())
    jax.tree.map(np.testing.assert_array_equal, back, trained_tower())


@pytest.mark.parametrize(
    "name", sorted(FACTORIES.keys() - CORRECTED - GROUPS - DIMINISHING)
)
def test_flax_predicts_what_norm_did(name, key):
    """For any state; layers made in the model stay where they are."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, z):
            norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3)
            z = norm()(nn.Conv(4, (3, 3), use_bias=False)(z))
            return norm(name="last")(nn.Dense(3)(z.mean((1, 2))))

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, z):
            estimator = FACTORIES[name](epsilon=1e-3)
            norm = functools.partial(Norm, estimator, use_running_average=True)
            z = norm(layer=nn.Conv(4, (3, 3), use_bias=False))(z)
            return norm(name="last", layer=nn.Dense(3))(z.mean((1, 2)))

    z = images(key, 2)
    variables = jax.jit(Ours().init)(key, z)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), leaf.dtype), variables
    )
    actual = Plain().apply(to_batch_norm(variables), z)
    assert_close(actual, Ours().apply(variables, z), 1e-4)


@pytest.mark.parametrize("name", sorted(DIMINISHING | {"group_norm_plus"}))
def test_a_state_without_running_moments_cannot_go_back(name):
    stats = {"Norm_0": {"state": FACTORIES[name]().init(4)}}
    with pytest.raises(ValueError, match=r"with 0 RunningMoments inside, expected one"):
        to_batch_norm({"batch_stats": stats})


def test_nothing_to_convert_back(key):
    variables = nn.Dense(4).init(key, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"^to_batch_norm got .*\['params'\] without"):
        to_batch_norm(variables)


def test_two_modules_cannot_have_one_name_going_back():
    moments = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    stats = {"BatchNorm_0": moments, "Norm_0": {"state": cbn.running_moments(**moments)}}
    with pytest.raises(ValueError, match=r"^to_batch_norm got .*names of their own"):
        to_batch_norm({"batch_stats": stats})


def test_a_mask_with_features_in_front(key):
    """The mask's axes are those of the activations, wherever the features are."""
    x = jax.random.normal(key, (6, 3, 5))
    mask = jnp.arange(5) < 4
    back = Norm(cbn.batch_norm(), axis=1, use_running_average=False)
    front = Norm(cbn.batch_norm(), use_running_average=False)
    variables = front.init(key, x.swapaxes(1, 2))
    options = {"mutable": ["batch_stats"]}
    y, stats = back.apply(variables, x, mask=mask[None, None], **options)
    expected, right = front.apply(
        variables, x.swapaxes(1, 2), mask=mask[None, :, None], **options
    )
    assert_close((y.swapaxes(1, 2), stats), (expected, right))


@pytest.mark.parametrize(
    ("method", "argument"),
    [(cbn.batch_norm, "momentum"), (cbn.small_batch_norm, "batch_size")],
)
def test_a_method_that_was_not_called(method, argument, key):
    message = rf"{argument} is an array, .* Norm\(method\(...\)\)"
    with pytest.raises(TypeError, match=message):
        Norm(method, use_running_average=False).init(key, jnp.ones((2, 3)))


def test_a_layer_of_ones_own(key):
    """No ``features`` that would have to change: its parameters say how many."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, z):
            if self.is_initializing():
                return z @ self.param("kernel", nn.initializers.lecun_normal(), (3, 4))
            return z @ self.variables["params"]["kernel"]

    estimator = cbn.cross_iteration_batch_norm(window=2)
    own = Norm(estimator, layer=Own(), use_running_average=False)
    dense = Norm(estimator, layer=nn.Dense(4, use_bias=False), use_running_average=False)
    z = jax.random.normal(key, (6, 3))
    variables = own.init(key, z)
    options = {"mutable": ["batch_stats"]}
    assert_close(own.apply(variables, z, **options), dense.apply(variables, z, **options))
