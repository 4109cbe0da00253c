"""A folded layer is the layer and its normalizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CORRECTED, FACTORIES, LAYERS, PER_EXAMPLE, apply, infer, init, normalize
from flax import linen as nn
from flax import nnx
from jax import lax

import cbn_jax as cbn
from cbn_jax.core.named import from_dict
from cbn_jax.linen import Norm as LinenNorm
from cbn_jax.nnx import Norm

REFUSED = CORRECTED | PER_EXAMPLE
SCALE, BIAS = jnp.array([0.5, -2.0, 1.0, 3.0]), jnp.array([1.0, 0.0, -1.0, 0.3])


def some_state(name, layer):
    """(estimator, a state that means nothing and is not fresh, parameters)."""
    estimator, params = FACTORIES[name](), layer.params(jax.random.key(1))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), leaf.dtype),
        init(estimator, layer, params),
    )
    return estimator, state, params


fold = jax.jit(cbn.fold, static_argnames=("estimator", "layer"))


def check(layer, estimator, state, params, z, scale, bias):
    """The folded layer against the layer, inference and the affine map."""
    x = apply(layer, params, z)
    expected = normalize(x, infer(estimator, state, x), scale, bias)
    folded = fold(estimator, state, layer.layer, params, scale, bias)
    assert set(folded) == {"kernel", "bias"}
    np.testing.assert_allclose(apply(layer, folded, z), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(FACTORIES.keys() - REFUSED))
def test_every_method_with_one_statistic_per_feature(name, key):
    layer = LAYERS["dense"]
    estimator, state, params = some_state(name, layer)
    check(layer, estimator, state, params, layer.data(key), SCALE, BIAS)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_inference_that_looks_at_the_example_is_refused(name):
    estimator = FACTORIES[name]()
    with pytest.raises(ValueError, match=r"^fold got a method whose inference depends on"):
        cbn.fold(estimator, None, cbn.dense, jnp.ones((3, 4)))


def test_statistics_per_example_are_refused_without_the_trait():
    def infer(state, x):
        return cbn.Statistics(x, jnp.ones_like(x))

    estimator = dataclasses.replace(cbn.batch_norm(), infer=infer)
    with pytest.raises(ValueError, match=r"^fold got a method whose inference depends on"):
        cbn.fold(estimator, None, cbn.dense, jnp.ones((3, 4)))


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name, key):
    layer = LAYERS[name]
    estimator, state, params = some_state("batch_norm", layer)
    params = params if layer.bias else params["kernel"]  # a kernel alone
    check(layer, estimator, state, params, layer.data(key), SCALE, BIAS)


@pytest.mark.parametrize("affine", [(None, None), (SCALE, None), (None, BIAS)])
def test_a_normalizer_without_scale_or_bias(affine, key):
    layer = LAYERS["dense"]
    estimator, state, params = some_state("batch_norm", layer)
    check(layer, estimator, state, params, layer.data(key), *affine)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv(4, (3,)), (2, 5, 3)),
        (nn.Conv(4, (2, 2, 2), use_bias=False), (1, 2, 2, 2, 2)),
        (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), (2, 3, 3, 2)),
        (nn.ConvTranspose(4, (3, 3), transpose_kernel=True), (2, 3, 3, 2)),
        # The same number of inputs and outputs does not show which axis is which.
        (nn.ConvTranspose(4, (3, 3), transpose_kernel=True), (2, 3, 3, 4)),
    ],
    ids=["1d", "3d", "transposed", "transposed-kernel", "transposed-kernel-square"],
)
def test_convolutions_of_linen(layer, shape, key):
    z = jax.random.normal(key, shape)
    estimator = cbn.batch_norm()
    state = cbn.from_batch_stats(BIAS, jnp.square(SCALE))

    @jax.jit
    def expected_and_actual(key, z):
        params = layer.init(key, z)["params"]
        if layer.use_bias:
            params = {**params, "bias": jax.random.normal(key, params["bias"].shape)}
        x = layer.apply({"params": params}, z)
        expected = cbn.normalize(x, estimator.infer(state, x), SCALE, BIAS)
        folded = cbn.fold(estimator, state, layer, params, SCALE, BIAS)
        with jax.numpy_rank_promotion("allow"):
            return expected, layer.clone(use_bias=True).apply({"params": folded}, z)

    expected, actual = expected_and_actual(key, z)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_linen_model(key):
    estimator = cbn.batch_norm()

    class Net(nn.Module):
        folded: bool

        @nn.compact
        def __call__(self, z, train=False):
            conv = nn.Conv(4, (3, 3), use_bias=self.folded, name="conv")
            if self.folded:
                return nn.Dense(2, name="head")(nn.relu(conv(z)).mean((1, 2)))
            norm = LinenNorm(estimator, conv, use_running_average=not train, name="norm")
            return nn.Dense(2, name="head")(nn.relu(norm(z)).mean((1, 2)))

    z = 1.0 + jax.random.normal(key, (2, 5, 5, 3))
    model = Net(folded=False)

    @jax.jit
    def expected_and_actual(key, z):
        variables = model.init(key, z)
        _, updates = model.apply(variables, z, train=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
        params, stats = variables["params"], variables["batch_stats"]["norm"]
        state = from_dict(stats, estimator.init(4))
        conv = cbn.fold(
            estimator, state, cbn.convolution(), params["conv"], **params["norm"]
        )
        folded = {"params": {"conv": conv, "head": params["head"]}}
        return model.apply(variables, z), Net(folded=True).apply(folded, z)

    expected, actual = expected_and_actual(key, z)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_nnx_model(key):
    rngs = nnx.Rngs(0)
    estimator = cbn.cross_iteration_batch_norm(window=2)
    norm = Norm(estimator, nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs), rngs=rngs)
    model = nnx.Sequential(norm, nnx.relu)
    run = nnx.jit(lambda model, z: model(z))
    z = 1.0 + jax.random.normal(key, (2, 5, 5, 3))
    run(model, z)
    model.eval()
    params = nnx.to_pure_dict(nnx.state(norm, nnx.Param))
    folded = cbn.fold(
        estimator,
        norm.state,
        norm.layer,
        params["layer"],
        params["scale"],
        params["bias"],
    )
    conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    nnx.update(conv, folded)
    actual = run(nnx.Sequential(conv, nnx.relu), z)
    np.testing.assert_allclose(actual, run(model, z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variables", [False, True])
def test_an_nnx_layer_with_a_transposed_kernel(variables, key):
    """By what the modules hold, or by the variables themselves."""
    rngs, z = nnx.Rngs(0), 1.0 + jax.random.normal(key, (2, 5, 5, 4))
    conv = nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, rngs=rngs)
    norm = Norm(cbn.batch_norm(), conv, rngs=rngs)
    norm(z)
    norm.eval()
    parts = (norm.state, nnx.state(conv), norm.scale, norm.bias)
    if not variables:
        parts = (norm.state, nnx.to_pure_dict(parts[1]), *parts[2:])
    folded = cbn.fold(norm.estimator, parts[0], conv, *parts[1:])
    bare = nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, rngs=rngs)
    nnx.update(bare, folded)
    np.testing.assert_allclose(bare(z), norm(z), rtol=1e-4, atol=1e-5)


def test_parameters_in_the_place_of_the_layer():
    estimator = cbn.batch_norm()
    with pytest.raises(
        TypeError, match=r"array of shape \(3, 4\) as layer, .*write fold\("
    ):
        cbn.fold(estimator, estimator.init(4), jnp.ones((3, 4)), jnp.ones(4))


def test_against_float64():
    """Far from zero nothing is lost but the last digits."""
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(5, 4)), rng.normal(size=4)
    mean, var = 100.0 * rng.normal(size=4), rng.uniform(0.01, 100.0, size=4)
    scale, beta = rng.normal(size=4), rng.normal(size=4)
    state = cbn.from_batch_stats(*(jnp.asarray(v, jnp.float32) for v in (mean, var)))
    float32 = [jnp.asarray(v, jnp.float32) for v in (kernel, bias, scale, beta)]
    folded = cbn.fold(
        cbn.batch_norm(epsilon=1e-3),
        state,
        cbn.dense,
        dict(zip(("kernel", "bias"), float32[:2], strict=True)),
        *float32[2:],
    )
    factor = scale / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(folded["kernel"], kernel * factor, rtol=1e-5)
    np.testing.assert_allclose(folded["bias"], (bias - mean) * factor + beta, rtol=1e-5)


def test_a_small_kernel_dtype_is_rounded_once():
    kernel = jnp.full((1, 4), 3.0, jnp.bfloat16)
    state = cbn.from_batch_stats(BIAS, jnp.full(4, 1e4))
    folded = cbn.fold(cbn.batch_norm(), state, cbn.dense, kernel, 100.0 + SCALE, BIAS)
    expected = 3.0 * (100.0 + SCALE) / 100.0
    assert folded["kernel"].dtype == folded["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(folded["kernel"][0], expected.astype(jnp.bfloat16))


def test_under_jit_and_float64(key, x64):
    del key
    kernel = jnp.ones((3, 4), jnp.float64)
    state = cbn.from_batch_stats(BIAS, jnp.square(SCALE))
    folded = fold(cbn.batch_norm(), state, cbn.dense, kernel, SCALE)
    assert folded["kernel"].dtype == jnp.float64
    np.testing.assert_allclose(
        folded["bias"], -BIAS * SCALE * lax.rsqrt(jnp.square(SCALE) + 1e-5), rtol=1e-5
    )


def test_a_gate_is_folded_as_it_is():
    estimator = cbn.adaptive_batch_norm(cbn.batch_norm(), inference="gated")
    state = estimator.init(4)._replace(state=cbn.from_batch_stats(BIAS, jnp.square(SCALE)))
    kernel = jnp.ones((3, 4))
    shut = cbn.fold(estimator, cbn.set_gate(state, False), cbn.dense, kernel)
    np.testing.assert_array_equal(shut["kernel"], kernel)
    assert (cbn.fold(estimator, state, cbn.dense, kernel)["kernel"] != kernel).any()


@pytest.mark.parametrize(
    ("params", "scale", "message"),
    [
        (
            {"bias": BIAS},
            None,
            r"params with \['bias'\], expected kernel .*of one layer",
        ),
        ({"kernel": jnp.ones((3, 4)), "mask": BIAS}, None, r"\['kernel', 'mask'\]"),
        ({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(3)}, None, r"\['bias'\] of shape"),
        (jnp.ones((3, 4)), jnp.ones(3), r"\['scale'\] of shape \(3,\)"),
        (jnp.ones((4, 3)), None, r"expected 4 features last as in its state"),
    ],
)
def test_what_does_not_fit(params, scale, message):
    estimator = cbn.batch_norm()
    with pytest.raises(ValueError, match=message):
        cbn.fold(estimator, estimator.init(4), cbn.dense, params, scale)
