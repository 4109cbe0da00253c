"""Changes of a kernel, as functions and in the modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import center, standardize

import cbn_jax as cbn
import cbn_jax.linen
import cbn_jax.nnx
from cbn_jax.core.named import from_dict

CHANGES = {"center": (cbn.center, center), "standardize": (cbn.standardize, standardize)}
changes = pytest.mark.parametrize("name", CHANGES)


@changes
@pytest.mark.parametrize("shape", [(5, 4), (3, 3, 2, 4)])
def test_equals_the_oracle(name, shape, key):
    ours, oracle = CHANGES[name]
    kernel = 1.0 + jax.random.normal(key, shape)
    np.testing.assert_allclose(
        jax.jit(ours)(kernel), oracle(np.float64(kernel)), rtol=1e-5, atol=1e-6
    )


def test_a_constant_filter_is_zero():
    np.testing.assert_array_equal(cbn.standardize(jnp.full((4, 2), 3.0)), 0.0)


@changes
@pytest.mark.parametrize("name_of_estimator", ["group_norm", "streaming_batch_norm"])
def test_the_estimator_sees_the_kernel_that_is_used(name, name_of_estimator, key):
    """Both adapters equal the functions with the changed kernel, gradients too."""
    change, _ = CHANGES[name]
    estimator = {
        "group_norm": cbn.group_norm(2),
        "streaming_batch_norm": cbn.streaming_batch_norm(2, samples=None),
    }[name_of_estimator]
    z = jax.random.normal(key, (2, 5, 5, 3))
    layer = cbn.convolution(padding="SAME")

    def functions(kernel):
        used = {"kernel": change(kernel)}
        x, source = cbn.run_layer(layer, used, z)
        statistics, state = estimator.train(estimator.init(4, layer, used), x, source)
        return jnp.sin(cbn.normalize(x, statistics)).sum(), state

    norm = cbn_jax.linen.Norm(
        estimator, nn.Conv(4, (3, 3), use_bias=False), change, use_running_average=False
    )
    variables = jax.jit(norm.init)(key, z)

    def linen(kernel):
        params = {**variables["params"], "layer": {"kernel": kernel}}
        y, updates = norm.apply({**variables, "params": params}, z, mutable=["batch_stats"])
        form = estimator.init(4, layer, {"kernel": kernel})
        return jnp.sin(y).sum(), from_dict(updates["batch_stats"], form)

    module = cbn_jax.nnx.Norm(
        estimator,
        nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0)),
        kernel=change,
        rngs=nnx.Rngs(0),
    )
    graph, others = nnx.split(module)

    def of_nnx(kernel):
        norm = nnx.merge(graph, jax.tree.map(jnp.copy, others))
        norm.layer.kernel.set_value(kernel)
        y = norm(z)
        return jnp.sin(y).sum(), norm.state

    kernel = variables["params"]["layer"]["kernel"]
    expected = jax.jit(jax.value_and_grad(functions, has_aux=True))(kernel)
    for form in (linen, of_nnx):
        got = jax.jit(jax.value_and_grad(form, has_aux=True))(kernel)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
            got,
            expected,
        )


def test_group_norm_after_ours(key):
    """Batch-channel normalization: the statistics of a window, then those of groups."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, z):
            norm = cbn_jax.linen.Norm(
                cbn.batch_norm(),
                nn.Conv(4, (3, 3)),
                cbn.standardize,
                use_running_average=False,
            )
            return cbn_jax.linen.Norm(cbn.group_norm(2), use_running_average=False)(norm(z))

    z = jax.random.normal(key, (2, 5, 5, 3))
    y, variables = Block().init_with_output(key, z)
    y, _ = Block().apply(variables, z, mutable=["batch_stats"])
    kernel = standardize(np.float64(variables["params"]["Conv_0"]["kernel"]))
    x = jax.lax.conv_general_dilated(
        z, jnp.float32(kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = np.float64(x)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    split = x.reshape(2, -1, 2, 2)
    split = (split - split.mean((1, 3), keepdims=True)) / np.sqrt(
        split.var((1, 3), keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(y, split.reshape(y.shape), rtol=1e-3, atol=1e-4)


def test_a_change_needs_a_kernel():
    with pytest.raises(ValueError, match=r"got kernel=\.\.\. without a layer, expected"):
        cbn_jax.linen.Norm(
            cbn.batch_norm(), kernel=cbn.center, use_running_average=True
        ).init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"got kernel=\.\.\. without a layer"):
        cbn_jax.nnx.Norm(
            cbn.batch_norm(), num_features=3, kernel=cbn.center, rngs=nnx.Rngs(0)
        )
    layer = nnx.Embed(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layer=Embed\(.*which has no kernel"):
        cbn_jax.nnx.Norm(cbn.batch_norm(), layer, kernel=cbn.center, rngs=nnx.Rngs(0))
