"""Weights from elsewhere predict what they did there, and go on as they would have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import infer, normalize
from flax import linen as nn

import cbn_jax as cbn
from cbn_jax import convert

EPSILON = 1e-3
VALUES = 6  # of a feature in a batch
MEAN, VAR = np.linspace(-1.0, 1.0, 3), np.linspace(0.5, 2.0, 3)
SCALE, BIAS = np.array([2.0, -1.0, 0.5]), np.array([0.1, 0.2, -3.0])


def batches(count, seed=0):
    """Images, [2, 3, 1, 3] each."""
    rng = np.random.default_rng(seed)
    data = rng.normal(3.0, 2.0, (count, 2, VALUES // 2, 1, 3))
    return list(data.astype(np.float32))


def predicted(weights, x):
    x = jnp.asarray(x)
    statistics = infer(cbn.batch_norm(epsilon=EPSILON), weights.running, x)
    return normalize(x, statistics, weights.scale, weights.bias)


def trained_on(weights, x, momentum):
    """The weights after one more batch."""
    estimator = cbn.batch_norm(momentum)
    return weights._replace(running=estimator.train(weights.running, jnp.asarray(x))[1])


def weights_of(scale=SCALE, bias=BIAS, mean=MEAN, var=VAR, steps=3.0):
    def leaf(value):
        return None if value is None else jnp.asarray(value, jnp.float32)

    running = cbn.RunningMoments(leaf(mean), leaf(var), jnp.full(len(mean), steps))
    return convert.BatchNormWeights(leaf(scale), leaf(bias), running)


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_close, actual, expected)


@pytest.fixture
def loosely():
    """Other frameworks promote."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


ROUND_TRIPS = {
    "flax": lambda w: convert.from_flax(*convert.to_flax(w)),
    "pytorch": lambda w: convert.from_pytorch(convert.to_pytorch(w, VALUES), VALUES),
    "pytorch-as_it_is": lambda w: convert.from_pytorch(convert.to_pytorch(w, None), None),
    "keras": lambda w: convert.from_keras(convert.to_keras(w)),
    "haiku": lambda w: convert.from_haiku(*convert.to_haiku(w, 4, 0.9)),
}
COUNTS = {"pytorch", "pytorch-as_it_is", "haiku"}


@pytest.mark.parametrize("affine", [(SCALE, BIAS), (None, BIAS), (SCALE, None)])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_there_and_back(name, affine):
    weights = weights_of(*affine)
    back = ROUND_TRIPS[name](weights)
    if name not in COUNTS:
        assert (back.running.steps == cbn.from_batch_stats(MEAN, VAR).steps).all()
        back = back._replace(running=back.running._replace(steps=weights.running.steps))
    assert_same(back, weights)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_one_feature(name):
    weights = weights_of(*(value[:1] for value in (SCALE, BIAS, MEAN, VAR)))
    assert ROUND_TRIPS[name](weights).running.mean.shape == (1,)


def fresh_and_next(x):
    """Averages of nothing, and those after one batch."""
    fresh = weights_of(mean=np.zeros(3), var=np.ones(3), steps=0.0)
    return fresh, trained_on(fresh, x, 0.9).running


def test_an_average_of_nothing_takes_the_next_batch_whole():
    (x,) = batches(1)
    fresh, expected = fresh_and_next(x)
    assert_close(expected.mean, x.mean((0, 1, 2)))
    assert_same(trained_on(ROUND_TRIPS["pytorch"](fresh), x, 0.9).running, expected)


@pytest.mark.studies
def test_an_average_of_nothing_in_haiku(loosely):
    hk = pytest.importorskip("haiku")
    (x,) = batches(1)
    fresh, expected = fresh_and_next(x)
    params, state = in_haiku(convert.to_haiku(fresh, 4, 0.9))
    _, state = haiku_norm(hk).apply(params, state, None, jnp.asarray(x), True)
    assert_same(out_of_haiku(params, state).running, expected)


# Flax


def test_flax_predicts_the_same_both_ways():
    theirs, (x, *train) = nn.BatchNorm(momentum=0.9, epsilon=EPSILON), batches(3)
    affine = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
    variables = {**theirs.init(jax.random.key(0), x, True), "params": affine}
    for batch in train:
        _, updates = theirs.apply(variables, batch, False, mutable=["batch_stats"])
        variables = {**variables, **updates}
    weights = convert.from_flax(variables["params"], variables["batch_stats"])
    assert_close(predicted(weights, x), theirs.apply(variables, x, True))
    params, stats = convert.to_flax(weights)
    assert_same({"params": params, "batch_stats": stats}, variables)


# PyTorch


def pytorch_oracle(data, momentum):
    """``state_dict`` of a PyTorch batch norm after some batches, in float64."""
    mean, var = np.zeros(3), np.ones(3)
    for m, x in enumerate(data, start=1):
        share = 1.0 / m if momentum is None else momentum
        rows = x.astype(np.float64).reshape(-1, 3)
        mean = (1.0 - share) * mean + share * rows.mean(0)
        var = (1.0 - share) * var + share * rows.var(0, ddof=1)
    tensors = {"weight": SCALE, "bias": BIAS, "running_mean": mean, "running_var": var}
    return {**tensors, "num_batches_tracked": np.array(len(data))}


@pytest.mark.parametrize("values_per_feature", [VALUES, None])
def test_pytorch_against_the_oracle(values_per_feature):
    tensors, (x,) = pytorch_oracle(batches(4), 0.1), batches(1, seed=1)
    weights = convert.from_pytorch(tensors, values_per_feature)
    var = tensors["running_var"]
    if values_per_feature:
        var = var * (VALUES - 1) / VALUES
    expected = (x - tensors["running_mean"]) / np.sqrt(var + EPSILON) * SCALE + BIAS
    assert_close(predicted(weights, x), expected)
    back = convert.to_pytorch(weights, values_per_feature)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert_close(back[name], value)
    assert back["num_batches_tracked"].dtype == np.int64


def test_pytorch_averages_over_all_batches_go_on():
    """Its cumulative average needs the number of batches; ours is the biased variance."""
    *data, last = batches(4)
    weights = convert.from_pytorch(pytorch_oracle(data, None), VALUES)
    weights = trained_on(weights, last, convert.decay_of_pytorch(None))
    expected = convert.from_pytorch(pytorch_oracle([*data, last], None), VALUES)
    assert_same(weights, expected)


def test_pytorch_averages_that_are_old_go_on():
    *data, last = batches(4)
    tensors = pytorch_oracle(data, 0.1)
    tensors["num_batches_tracked"] = None  # as with many
    weights = convert.from_pytorch(tensors, VALUES)
    weights = trained_on(weights, last, convert.decay_of_pytorch(0.1))
    expected = convert.from_pytorch(pytorch_oracle([*data, last], 0.1), VALUES)
    assert_same(weights.running[:2], expected.running[:2])


@pytest.mark.parametrize(("theirs", "ours"), [(0.1, 0.9), (1.0, 0.0), (0.25, 0.75)])
def test_decay_of_pytorch(theirs, ours):
    assert convert.decay_of_pytorch(theirs) == ours


def test_decay_of_pytorch_without_momentum():
    assert convert.decay_of_pytorch(None) == cbn.cumulative()


@pytest.mark.studies
def test_pytorch_itself():
    torch = pytest.importorskip("torch", reason="PyTorch is no dependency of the tests")
    *data, x = batches(4)
    theirs = torch.nn.BatchNorm2d(3, eps=EPSILON)
    tensors = {name: torch.tensor(v) for name, v in pytorch_oracle([], 0.1).items()}
    theirs.load_state_dict(tensors)

    def run(x):
        return theirs(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()

    for batch in data:
        run(batch)
    theirs.eval()
    oracle = pytorch_oracle(data, 0.1)
    for name, value in theirs.state_dict().items():
        assert_close(value.numpy(), oracle[name])
    weights = convert.from_pytorch(theirs.state_dict(), None)
    expected = np.moveaxis(run(x), 1, -1)
    assert_close(predicted(weights, x), expected)
    other = torch.nn.BatchNorm2d(3, eps=EPSILON).eval()
    arrays = convert.to_pytorch(weights, None)
    other.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    theirs = other
    assert_close(np.moveaxis(run(x), 1, -1), expected)


# Keras


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield pytest.importorskip("keras")


def keras_norm(keras, **options):
    layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=EPSILON, **options)
    layer.build((None, 3, 1, 3))
    return layer


def named(layer):
    return {weight.name: weight for weight in layer.weights}


@pytest.mark.studies
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_keras_itself(options, keras, loosely):
    """Predicts the same both ways, and trains on at the same pace."""
    *data, last, x = batches(4)
    theirs, other = keras_norm(keras, **options), keras_norm(keras, **options)
    for name, value in (("gamma", SCALE), ("beta", BIAS)):
        if name in named(theirs):
            named(theirs)[name].assign(value)
    for batch in data:
        theirs(batch, training=True)
    weights = convert.from_keras(named(theirs))
    assert (weights.scale is None) == ("scale" in options)
    assert (weights.bias is None) == ("center" in options)
    assert_close(predicted(weights, x), theirs(x, training=False))
    arrays = convert.to_keras(weights)
    assert list(arrays) == list(named(other))
    other.set_weights(list(arrays.values()))
    assert_close(other(x, training=False), theirs(x, training=False))
    theirs(last, training=True)
    assert_same(trained_on(weights, last, 0.9), convert.from_keras(named(theirs)))


# Haiku


def haiku_norm(hk, **options):
    options = {"create_scale": True, "create_offset": True, **options}

    def apply(x, training):
        return hk.BatchNorm(decay_rate=0.9, eps=EPSILON, name="norm", **options)(
            x, training
        )

    return hk.transform_with_state(apply)


def out_of_haiku(params, state):
    return convert.from_haiku(params.get("norm", {}), state)


def in_haiku(converted):
    params, state = converted
    return {"norm": params}, {f"norm/~/{name}": ema for name, ema in state.items()}


@pytest.mark.studies
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("affine", [True, False])
def test_haiku_itself(affine, data_format, loosely):
    """Predicts the same both ways; the debiased averages go on as one, from step one."""
    hk = pytest.importorskip("haiku")
    last = data_format == "channels_last"
    norm = haiku_norm(
        hk, create_scale=affine, create_offset=affine, data_format=data_format
    )

    def run(params, state, x, training):
        x = jnp.asarray(x if last else np.moveaxis(x, -1, 1))
        y, state = norm.apply(params, state, None, x, training)
        return y if last else jnp.moveaxis(y, 1, -1), state

    x, *data = batches(4)
    first = jnp.asarray(x if last else np.moveaxis(x, -1, 1))
    params, state = norm.init(None, first, True)
    shape = (1, 1, 1, 3) if last else (1, 3, 1, 1)
    if affine:
        values = {"scale": SCALE, "offset": BIAS}
        params = {"norm": {k: jnp.asarray(v).reshape(shape) for k, v in values.items()}}
    _, state = run(params, state, data[0], True)
    weights = out_of_haiku(params, state)
    for batch in data[1:]:
        assert_close(predicted(weights, x), run(params, state, x, False)[0], 1e-4)
        weights = trained_on(weights, batch, 0.9)
        _, state = run(params, state, batch, True)
        assert_same(out_of_haiku(params, state), weights)
    if last:
        ours_params, ours = in_haiku(convert.to_haiku(weights, 4, 0.9))
        assert_same(ours, dict(state))
        assert ours["norm/~/mean_ema"]["counter"].dtype == jnp.int32
        assert_same(ours_params["norm"], dict(params.get("norm", {})))
        _, state = run(ours_params, ours, batch, True)
        assert_same(out_of_haiku(params, state), trained_on(weights, batch, 0.9))


# Mistakes

AVERAGE = {"counter": 3, "hidden": MEAN, "average": MEAN}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: convert.from_flax(
                {"norm": {"scale": SCALE}}, {"mean": MEAN, "var": VAR}
            ),
            r"^from_flax got \['mean', 'norm', 'var'\], expected mean and var, with scale "
            r".*of one layer, without their prefix\.$",
        ),
        (
            lambda: convert.from_pytorch({"bn1.running_mean": MEAN}, 8),
            r"^from_pytorch got \['bn1.running_mean'\], expected running_mean and ",
        ),
        (
            lambda: convert.from_keras({"moving_mean": MEAN, "moving_variance": None}),
            r"^from_keras got \['moving_mean'\], expected moving_mean and moving_variance",
        ),
        (
            lambda: convert.from_flax({}, {"mean": MEAN, "var": VAR[:2]}),
            r"^from_flax got shapes {'mean': \(3,\), 'var': \(2,\)}, expected the same",
        ),
        (
            lambda: convert.from_flax({}, {"mean": np.ones((2, 3)), "var": VAR}),
            r"^from_flax got shapes .*\(2, 3\).*, expected \[features\], perhaps with",
        ),
        (
            lambda: convert.from_keras({"moving_mean": 0.0, "moving_variance": 1.0}),
            r"^from_keras got shapes .*, expected \[features\]",
        ),
        (
            lambda: convert.from_haiku(
                {}, {"a/~/mean_ema": AVERAGE, "b/mean_ema": AVERAGE}
            ),
            r"^from_haiku got a state of \['a/~/mean_ema', 'b/mean_ema'\], expected mean",
        ),
        (
            lambda: convert.from_haiku({}, {"mean_ema": MEAN, "var_ema": VAR}),
            r"^from_haiku got a state of .*each with counter, hidden and average\.$",
        ),
        (
            lambda: convert.from_haiku({}, {"var_ema": AVERAGE}),
            r"^from_haiku got \['var_ema'\], expected mean_ema and var_ema",
        ),
        (
            lambda: convert.to_flax(weights_of(scale=SCALE[:2])),
            r"^to_flax got shapes {'scale': \(2,\), .*, expected the same number",
        ),
        (
            lambda: convert.to_pytorch(weights_of(), 1),
            r"^values_per_feature is 1, expected an int of at least 2",
        ),
        (
            lambda: convert.from_pytorch({}, 2.5),
            r"^values_per_feature is 2.5, expected an int of at least 2",
        ),
        (lambda: convert.to_haiku(weights_of(), 0, 0.9), r"^ndim is 0, expected an int"),
        (lambda: convert.to_haiku(weights_of(), 4, 1.0), r"^decay_rate is 1.0, expected"),
        (lambda: convert.decay_of_pytorch(0.0), r"^momentum is 0.0, .*\(0, 1\]\) or None"),
        (lambda: convert.decay_of_pytorch(1.5), r"^momentum is 1.5, expected PyTorch's"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrapped_state_is_not_the_averages():
    state = cbn.adaptive_batch_norm(cbn.batch_norm()).init(3)
    with pytest.raises(TypeError, match=r"^to_keras got a state of type GateState"):
        convert.to_keras(convert.BatchNormWeights(None, None, state))


# Counters that contradict the averages.

TRAINED = {"running_mean": MEAN, "running_var": VAR}
FRESH = {"running_mean": np.zeros(3), "running_var": np.ones(3)}


@pytest.mark.parametrize(
    ("tensors", "counter", "steps"),
    [
        (TRAINED, None, 1e6),
        (TRAINED, 0, 1e6),  # nobody counted
        (TRAINED, 7, 7),
        (FRESH, 0, 0),
        (FRESH, 7, 7),  # a layer frozen as the identity
    ],
)
@pytest.mark.parametrize("values", [None, VALUES])
def test_a_count_of_zero_beside_trained_averages_is_no_count(
    tensors, counter, steps, values
):
    counted = {} if counter is None else {"num_batches_tracked": np.array(counter)}
    running = convert.from_pytorch(tensors | counted, values).running
    np.testing.assert_array_equal(running.steps, steps)


@pytest.mark.parametrize(("value", "steps"), [(0.0, 0), (1.0, 1e6)])
def test_a_count_of_zero_in_haiku(value, steps):
    entry = {"counter": 0, "hidden": np.zeros((1, 3)), "average": np.full((1, 3), value)}
    running = convert.from_haiku({}, {"mean_ema": entry, "var_ema": entry}).running
    np.testing.assert_array_equal(running.steps, steps)
    np.testing.assert_array_equal(running.var, 1.0)  # a start of 0 predicts infinities


def test_an_average_of_nothing_comes_back_from_haiku():
    fresh = weights_of(mean=np.zeros(3), var=np.ones(3), steps=0.0)
    assert_same(ROUND_TRIPS["haiku"](fresh), fresh)
