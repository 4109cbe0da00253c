import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn

C, GROUPS = 6, 2
GBN, GNP = "group_batch_norm", "group_norm_plus"
FACTORIES = {
    GBN: functools.partial(cbn.group_batch_norm, momentum=0.9),
    GNP: cbn.group_norm_plus,
}
MIXES = {
    "batch": np.zeros(C),
    "mixed": np.full(C, 0.3),
    "group": np.ones(C),
    "per_feature": np.linspace(0.1, 0.9, C),
}
DENSE, CONV = (8, C), (4, 3, 2, C)

names = pytest.mark.parametrize("name", FACTORIES)
orders = pytest.mark.parametrize("order", ["group_first", "batch_first", "parallel"])
mixes = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
shapes = pytest.mark.parametrize("shape", [DENSE, CONV], ids=["dense", "conv"])

# Three of four examples count at each place, and in each example other places.
RAGGED = (np.indices(CONV[:-1]).sum(0) % 4 > 0)[..., None]


normalize = jax.jit(cbn.normalize)


def make(name, mix, order="group_first", num_groups=GROUPS):
    return FACTORIES[name](mix, num_groups=num_groups, order=order)


@functools.cache
def compiled(name, order, method):
    """``train`` or ``infer`` as a function of the weight too, for all tests."""

    def call(mix, *args, **kwargs):
        return getattr(make(name, mix, order), method)(*args, **kwargs)

    return jax.jit(call)


def train(name, order, mix, state, x, mask=None):
    mix = np.broadcast_to(np.float32(mix), C)
    statistics, state = compiled(name, order, "train")(mix, state, x, mask=mask)
    return normalize(x, statistics), state


def predict(name, order, mix, state, x, mask=None):
    mix = np.broadcast_to(np.float32(mix), C)
    return normalize(x, compiled(name, order, "infer")(mix, state, x, mask=mask))


def fresh(name):
    return make(name, 0.5).init(C)


def trained():
    """A state of ``group_batch_norm`` that has seen something."""
    return cbn.RunningMoments(
        jnp.linspace(-1.0, 2.0, C), jnp.linspace(0.5, 3.0, C), jnp.full(C, 3.0)
    )


def data(key, shape, shift=1.0):
    """Features and examples that differ in mean, features in deviation too."""
    noise, features = np.asarray(jax.random.normal(key, shape)), np.arange(C)
    offsets = np.sin(3.0 * np.arange(len(noise))).reshape(-1, *[1] * (len(shape) - 1))
    return np.float32(shift + (0.5 + 0.3 * features) * noise + features % 3 + offsets)


def oracle(name, x, mix, order, **options):
    """What training makes of one batch."""
    if name == GNP:
        return reference.group_norm_plus(x, mix, GROUPS, order, **options)
    return reference.GroupBatch(GROUPS, order, **options).train(x, mix)


def assert_close(actual, expected, rtol=1e-4, atol=1e-4):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Computed values.


@names
@orders
@shapes
@mixes
def test_training_equals_the_oracle(name, order, shape, mix, key):
    x = data(key, shape)
    y, state = train(name, order, mix, fresh(name), x)
    assert_close(y, oracle(name, x, mix, order))
    np.testing.assert_array_equal(state.steps, 1)


@orders
@shapes
@mixes
def test_predictions_equal_the_oracle(order, shape, mix, key):
    """With running averages of what B saw over four steps."""
    state, expected = fresh(GBN), reference.GroupBatch(GROUPS, order, momentum=0.9)
    for m in range(4):
        x = data(jax.random.fold_in(key, m), shape, shift=m)
        _, state = train(GBN, order, mix, state, x)
        expected.train(x, mix)
    x = data(key, shape)
    assert_close(predict(GBN, order, mix, state, x), expected.infer(x, mix))
    np.testing.assert_array_equal(state.steps, 4)


@orders
@shapes
def test_group_norm_plus_predicts_as_it_trains(order, shape, key):
    x, mix = data(key, shape), MIXES["per_feature"]
    y = predict(GNP, order, mix, fresh(GNP), x)
    assert_close(y, oracle(GNP, x, mix, order))


@names
def test_epsilon_is_added_to_both(name, key):
    """To variances or deviations, those of groups and those of batches."""
    x, options = data(key, DENSE), {"order": "parallel", "epsilon": 0.5}
    estimator = FACTORIES[name](0.3, num_groups=GROUPS, **options)
    statistics, _ = jax.jit(estimator.train)(estimator.init(C), x)
    assert_close(normalize(x, statistics), oracle(name, x, 0.3, **options))


def test_one_image_has_batch_statistics(key):
    """Those of its positions."""
    x, mix = data(key, (1, *CONV[1:])), MIXES["mixed"]
    y, state = train(GBN, "group_first", mix, fresh(GBN), x)
    assert_close(y, oracle(GBN, x, mix, "group_first"))
    np.testing.assert_array_equal(state.steps, 1)


@names
@orders
@shapes
def test_accurate_at_large_means(name, order, shape, key):
    """Means of 1e4 are themselves rounded to 5e-4."""
    x, mix = data(key, shape, shift=1e4), MIXES["mixed"]
    y, _ = train(name, order, mix, fresh(name), x)
    assert_close(y, oracle(name, x, mix, order), rtol=0, atol=5e-3)


@pytest.mark.parametrize("method", ["train", "infer"])
def test_half_precision_has_the_statistics_of_its_values(method, key):
    """The intermediate normalized values are not rounded."""
    x, mix = jnp.asarray(data(key, CONV), jnp.bfloat16), np.float32(MIXES["mixed"])
    call = functools.partial(compiled(GNP, "group_first", method), mix, fresh(GNP))
    assert_close(call(x), call(x.astype(jnp.float32)), rtol=1e-6, atol=1e-6)


@names
@orders
def test_gradients_are_finite_differences(name, order, key, x64):
    """In training and inference: of activations, weight, scale and bias."""
    state = trained() if name == GBN else fresh(name)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state)
    args = {
        "x": jnp.float64(data(key, (3, 2, 1, C))),
        "mix": jnp.float64(0.3),
        "scale": jnp.linspace(0.5, 2.0, C),
        "bias": jnp.linspace(-1.0, 1.0, C),
    }

    @jax.jit
    @jax.value_and_grad
    def loss(args):
        estimator, x = make(name, args["mix"], order), args["x"]
        both = estimator.train(state, x)[0], estimator.infer(state, x)
        both = [cbn.normalize(x, one, args["scale"], args["bias"]) for one in both]
        return jnp.sin(both[0]).sum() + jnp.cos(both[1]).sum()

    gradient, step = loss(args)[1], 1e-6
    for arg, value in args.items():
        move = step * jnp.cos(jnp.arange(float(value.size))).reshape(value.shape)
        up, down = (loss({**args, arg: moved})[0] for moved in (value + move, value - move))
        assert_close((up - down) / 2, (gradient[arg] * move).sum(), 1e-5, 1e-7 * step)


@orders
def test_maps_are_read_as_often_as_by_batch_norm(order):
    """Forward and backward, by XLA's count; statistics are small beside the positions."""

    def bytes_moved(estimator):
        x, state = jnp.ones((4, 16, 16, 64)), estimator.init(64)

        def loss(x):
            return jnp.sin(cbn.normalize(x, estimator.train(state, x)[0])).sum()

        compiled = jax.jit(jax.grad(loss)).lower(x).compile()
        return compiled.cost_analysis()["bytes accessed"]

    mixed = cbn.group_batch_norm(0.5, num_groups=8, order=order)
    assert bytes_moved(mixed) < 1.1 * bytes_moved(cbn.batch_norm())


# Known normalizers, at the ends of the scale.


@jax.jit
def group_norm(x):
    return nn.GroupNorm(
        GROUPS, epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False
    ).apply({}, x)


@jax.jit
def batch_norm(x):
    estimator = cbn.batch_norm(momentum=0.9)
    statistics, state = estimator.train(estimator.init(C), x)
    return cbn.normalize(x, statistics), state


@pytest.mark.parametrize("order", ["group_first", "parallel"])
@shapes
def test_mix_one_is_group_norm(order, shape, key):
    """Of Flax, in training and, whatever the averages, in inference."""
    x = data(key, shape)
    y, _ = train(GBN, order, 1.0, fresh(GBN), x)
    assert_close(y, group_norm(x), atol=1e-5)
    assert_close(predict(GBN, order, 1.0, trained(), x), group_norm(x), atol=1e-5)


@shapes
def test_mix_zero_in_parallel_is_batch_norm(shape, key):
    x = data(key, shape)
    y, state = train(GBN, "parallel", 0.0, fresh(GBN), x)
    assert_close((y, state), batch_norm(x), atol=1e-5)
    expected = cbn.normalize(x, cbn.batch_norm().infer(trained(), x))
    assert_close(predict(GBN, "parallel", 0.0, trained(), x), expected, atol=1e-5)


@shapes
def test_mix_zero_group_first_is_batch_norm_of_group_norm(shape, key):
    x = data(key, shape)
    actual = train(GBN, "group_first", 0.0, fresh(GBN), x)
    assert_close(actual, batch_norm(group_norm(x)))


@shapes
def test_mix_one_batch_first_is_group_norm_of_batch_norm(shape, key):
    x = data(key, shape)
    batched, state = batch_norm(x)
    actual = train(GBN, "batch_first", 1.0, fresh(GBN), x)
    assert_close(actual, (group_norm(batched), state))


# Unknown statistics.


@orders
def test_one_example_of_a_dense_layer_is_predicted(order, key):
    """One value has no variance: the running statistics are used and stay as they are."""
    x = data(key, (1, C))
    y, after = train(GBN, order, 0.3, trained(), x)
    assert_close(y, predict(GBN, order, 0.3, trained(), x))
    assert_same(after, trained())
    y, after = train(GBN, order, 0.3, fresh(GBN), x)
    assert_close(y, group_norm(x))
    assert_same(after, fresh(GBN))


@orders
def test_one_value_under_a_mask_is_predicted(order, key):
    x, mask = data(key, CONV), np.zeros((*CONV[:-1], 1), bool)
    mask[2, 1, 1] = True
    y, after = train(GBN, order, 0.3, trained(), x, mask)
    expected = predict(GBN, order, 0.3, trained(), x, mask)
    assert_close(y[2, 1, 1], expected[2, 1, 1])
    assert_same(after, trained())


@orders
def test_a_place_with_one_value_is_normalized_by_groups(order, key):
    x, mask = data(key, CONV), np.ones((*CONV[:-1], 1), bool)
    mask[1:, 0, 0] = False
    y, grouped = (train(GNP, order, mix, fresh(GNP), x, mask)[0] for mix in (0.3, 1.0))
    assert_close(y[0, 0, 0], grouped[0, 0, 0])
    assert np.abs(y[0, 1, 0] - grouped[0, 1, 0]).max() > 0.1


@orders
@shapes
def test_inference_before_training_is_group_norm(order, shape, key):
    x = data(key, shape)
    assert_close(predict(GBN, order, 0.3, fresh(GBN), x), group_norm(x))


@names
@orders
@shapes
def test_a_prediction_is_that_of_the_example_alone(name, order, shape, key):
    """As published it is not."""
    x, other = data(key, shape), data(jax.random.fold_in(key, 1), shape)
    other[0] = x[0]
    state = trained() if name == GBN else fresh(name)
    one, another = (predict(name, order, 0.3, state, batch)[0] for batch in (x, other))
    if name == GBN:
        assert_same(one, another)
    else:
        assert np.abs(one - another).max() > 0.1


# Masks.


@names
@orders
def test_masked_values_do_not_count(name, order, key):
    mix = MIXES["per_feature"]
    x = np.where(RAGGED, data(key, CONV), np.float32(np.nan))
    y, state = train(name, order, mix, fresh(name), x, RAGGED)
    assert_close(y, oracle(name, x, mix, order))
    if name == GBN:
        expected = reference.GroupBatch(GROUPS, order)
        expected.train(x, mix)
        assert_close((state.mean, state.var), expected.seen[0])


@pytest.mark.parametrize(
    ("name", "order"),  # one order for moments, each where arrays are normalized
    [(GBN, "group_first"), (GNP, "group_first"), (GNP, "batch_first"), (GNP, "parallel")],
)
def test_masked_values_reach_no_gradient(name, order, key):
    x = data(key, CONV)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(x, mix):
        statistics, _ = make(name, mix, order).train(fresh(name), x, mask=RAGGED)
        return jnp.sin(cbn.normalize(jnp.where(RAGGED, x, 0.0), statistics)).sum()

    dx, dmix = gradient(np.where(RAGGED, x, np.float32(np.nan)), 0.3)
    assert_close((dx, dmix), gradient(x, 0.3))
    np.testing.assert_array_equal(np.where(RAGGED, 0.0, dx), 0.0)


def test_gradients_are_finite_where_nothing_varies(key):
    """A place with one value for all examples, another with one example that counts."""
    x, mask = data(key, CONV), np.ones((*CONV[:-1], 1), bool)
    x[:, 0, 0], mask[1:, 1, 1] = 1.0, False
    estimator = make(GNP, 0.3, "parallel")

    @jax.jit
    @jax.grad
    def gradient(x):
        statistics, _ = estimator.train(fresh(GNP), x, mask=mask)
        return jnp.sin(cbn.normalize(x, statistics)).sum()

    assert np.isfinite(gradient(x)).all()


@names
@orders
def test_an_example_without_a_value_passes_group_norm_as_it_is(name, order, key):
    """And leaves the others alone."""
    x, mask = data(key, CONV), np.ones((*CONV[:-1], 1), bool)
    mask[1] = False
    grouped, batched = (train(name, order, w, fresh(name), x, mask)[0] for w in (1.0, 0.0))
    assert_close(grouped[1], batched[1] if order == "batch_first" else x[1])
    others = np.delete(x, 1, axis=0)
    assert_close(np.delete(grouped, 1, axis=0), oracle(name, others, 1.0, order))
    assert_close(np.delete(batched, 1, axis=0), oracle(name, others, 0.0, order))
    assert np.isfinite(batched).all()


@orders
def test_an_empty_mask_means_running_statistics(order, key):
    """And before training nothing at all; groups know nothing either."""
    x, mask = data(key, CONV), np.zeros((*CONV[:-1], 1), bool)
    y, after = train(GBN, order, 0.3, trained(), x, mask)
    batched = cbn.normalize(x, cbn.batch_norm().infer(trained(), x))
    assert_close(y, batched if order == "batch_first" else 0.3 * x + 0.7 * batched)
    assert_same(after, trained())
    assert_same(train(GBN, order, 0.3, fresh(GBN), x, mask), (x, fresh(GBN)))


@orders
def test_an_empty_mask_changes_nothing_where_nothing_is_remembered(order, key):
    x, mask = data(key, CONV), np.zeros((*CONV[:-1], 1), bool)
    assert_same(train(GNP, order, 0.3, fresh(GNP), x, mask)[0], x)


# Across devices.


@names
@orders
def test_eight_devices_are_one(name, order, key):
    """Outputs, state and the weight's gradient, with one example on each device."""
    x = data(key, DENSE)

    def step(mix, x, axis_name=None):
        def loss(mix):
            estimator = make(name, mix, order)
            statistics, state = estimator.train(estimator.init(C), x, axis_name=axis_name)
            y = cbn.normalize(x, statistics)
            loss = jnp.sin(y).mean()
            return jax.lax.pmean(loss, axis_name) if axis_name else loss, (y, state)

        return jax.value_and_grad(loss, has_aux=True)(mix)

    parallel = jax.shard_map(
        functools.partial(step, axis_name="data"),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=((P(), (P("data"), P())), P()),
    )
    assert_close(jax.jit(parallel)(0.3, x), jax.jit(step)(0.3, x), atol=1e-6)


# Errors.


@names
def test_groups_must_divide_the_features(name):
    sentence = (
        rf"{name} got 4 features and num_groups=3, expected a num_groups that divides 4"
    )
    with pytest.raises(ValueError, match=sentence):
        make(name, 0.5, num_groups=3).init(4)
    with pytest.raises(ValueError, match=r"num_groups is 0, expected an int of at least 1"):
        make(name, 0.5, num_groups=0)


@names
@pytest.mark.parametrize("method", ["train", "infer"])
def test_groups_of_one_value(name, method):
    """Where examples have one position; more are fine."""
    estimator = make(name, 0.5, num_groups=4)
    call = functools.partial(jax.eval_shape, getattr(estimator, method), estimator.init(4))
    with pytest.raises(ValueError, match=rf"{name} got x of shape \(8, 4\) .*one value"):
        call(jnp.ones((8, 4)))
    call(jnp.ones((8, 2, 4)))


def test_group_norm_plus_trains_on_two_examples():
    estimator = make(GNP, 0.5)
    with pytest.raises(
        ValueError, match=r"at least two examples, .*write group_batch_norm"
    ):
        estimator.train(estimator.init(C), jnp.ones((1, 3, 2, C)))


@orders
def test_group_norm_plus_predicts_a_single_example_by_groups_alone(order, key):
    x = jax.random.normal(key, (1, 3, 2, C))
    mixed, alone = make(GNP, 0.5, order=order), make(GNP, 1.0)
    statistics, expected = (e.infer(e.init(C), x) for e in (mixed, alone))
    np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(statistics.inv_std, expected.inv_std, rtol=1e-6)


@names
@pytest.mark.parametrize("mix", [-0.1, 1.5])
def test_the_weight_is_a_share(name, mix):
    with pytest.raises(ValueError, match=rf"mix is {mix}, expected the share .*\[0, 1\]"):
        make(name, mix)


@names
def test_there_are_three_orders(name):
    with pytest.raises(ValueError, match=r"'group', expected 'group_first' or 'batch_fir"):
        make(name, 0.5, order="group")
