"""Each operation accepted as linear is linear; the other operations are named."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cbn_jax.core.linear import _inner, why_not_linear


def normal(*shape, seed=0):
    values = np.random.default_rng((*shape, seed)).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


W, Z = normal(3, 4), normal(5, 3)
TABLE = np.array([[2, 0], [1, 2], [0, 0]])


@jax.custom_jvp
def doubled(x):
    return 2.0 * x


@doubled.defjvp
def _(primals, tangents):
    return doubled(*primals), 2.0 * tangents[0]


@jax.custom_vjp
def tripled(x):
    return 3.0 * x


tripled.defvjp(lambda x: (tripled(x), None), lambda _, ct: (3.0 * ct,))


def conv(kernel, z):
    return lax.conv_general_dilated(
        z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def spread(kernel, z):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    return jax.shard_map(lambda w, z: z @ w, mesh=mesh, **specs)(kernel, z)


def two(p, z):
    return z @ p["kernel"] + p["bias"].reshape(1, -1)


KERNEL, IMAGES = normal(3, 3, 2, 4), normal(2, 5, 5, 2)
LINEAR = {
    "dense": (lambda w, z: z @ w, W, Z),
    "dense of two": (two, {"kernel": W, "bias": normal(4)}, Z),
    "transposed": (lambda w, z: (w.T @ z.T).T, W, Z),
    "einsum": (lambda w, z: jnp.einsum("ni,ic->nc", z, w), W, Z),
    "batched": (
        lambda w, z: jnp.einsum("nki,kic->nkc", z, w),
        normal(2, 3, 4),
        normal(5, 2, 3),
    ),
    "features as a batch": (
        lambda w, z: jnp.einsum("cni,ic->nc", z, w),
        W,
        normal(4, 5, 3),
    ),
    "convolution": (conv, KERNEL, IMAGES),
    "jit": (jax.jit(lambda w, z: z @ w), W, Z),
    "remat": (jax.checkpoint(lambda w, z: z @ w), W, Z),
    "mapped": (spread, W, Z),
    "custom derivatives": (lambda w, z: z @ tripled(doubled(w)), W, Z),
    "half precision": (
        lambda w, z: (z.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
        W,
        Z,
    ),
    "scaled": (lambda w, z: 2.0 * (z @ -w) / jnp.float32(3.0), W, Z),
    "masked": (lambda w, z: z @ jnp.where(w.shape[0] * TABLE[:, :1] > 2, w, 0.0), W, Z),
    "masked by a zero of its own": (
        lambda w, z: z @ jnp.where(TABLE[:, :1] > 1, w, jnp.zeros_like(w)),
        W,
        Z,
    ),
    "table": (lambda w, ids: w[ids], W, TABLE),
    "flattened": (lambda w, z: z @ w.reshape(6, 4), normal(3, 2, 4), normal(5, 6)),
    "repeated": (lambda w, z: z @ jnp.broadcast_to(w, (3, 4)), normal(1, 4), Z),
    "summed": (lambda w, z: z[:, :1] * w.sum(0).reshape(1, -1), W, Z),
    "squeezed": (lambda w, z: z @ lax.squeeze(w, (0,)), normal(1, 3, 4), Z),
    "sliced": (lambda w, z: z[:, :2] @ w[1:], W, Z),
    "sliced at an index": (
        lambda w, z: z[:, :2] @ lax.dynamic_slice_in_dim(w, jnp.int32(1), 2),
        W,
        Z,
    ),
    "padded": (lambda w, z: z @ jnp.pad(w, ((1, 0), (0, 0))), normal(2, 4), Z),
    "concatenated": (lambda w, z: z @ jnp.concatenate([w, w[:1]])[:3], W, Z),
    "reversed": (lambda w, z: z @ w[::-1], W, Z),
    "added up": (lambda w, z: z @ w - (2.0 * z) @ w, W, Z),
}
NOT = {
    "an activation": (lambda w, z: jax.nn.relu(z @ w), "applies max to its"),
    "a square": (lambda w, z: z @ jnp.square(w), "applies square to its parameters"),
    "a product": (lambda w, z: (z @ w) * w[:1], "multiplies its parameters with each"),
    "two layers": (lambda w, z: z @ w @ w.T @ w, "multiplies its parameters with each"),
    "a quotient": (lambda w, z: z @ (1.0 / w), "applies div to its parameters"),
    "a constant": (lambda w, z: z @ w + 1.0, "adds something else to its parameters"),
    "a constant where": (
        lambda w, z: z @ jnp.where(TABLE[:, :1] > 1, w, 1.0),
        "adds something else to its parameters",
    ),
    "a choice by parameters": (
        lambda w, z: z @ jnp.where(w > 0, w, 0.0),
        "applies gt to its parameters",
    ),
    "whole numbers": (
        lambda w, z: z @ w.astype(jnp.int8).astype(jnp.float32),
        "applies convert_element_type to its parameters",
    ),
    "a part of the features": (lambda w, z: z @ w[:, :1], "applies slice to its"),
    "a sum over features": (
        lambda w, z: z @ w.sum(1, keepdims=True) @ jnp.ones((1, 4)),
        "applies reduce_sum to its parameters",
    ),
    "mixed features": (lambda w, z: z @ w @ jnp.ones((4, 4)), "applies dot_general to"),
    "reversed features": (lambda w, z: z @ w[:, ::-1], "applies rev to its parameters"),
    "more features": (lambda w, z: z @ jnp.concatenate([w, w], 1), "applies concatenate"),
    "padded features": (lambda w, z: z @ jnp.pad(w, ((0, 0), (0, 1))), "applies pad to"),
    "padded by ones": (
        lambda w, z: z @ jnp.pad(w, ((1, 0), (0, 0)), constant_values=1.0)[1:],
        "applies pad to its parameters",
    ),
    "chosen features": (lambda w, z: z @ w[:, TABLE[0]], "applies gather to its"),
    "split features": (lambda w, z: (z @ w).reshape(5, 2, 2), "applies reshape to its"),
    "features in front": (lambda w, z: (z @ w).T, "gives an output whose last axis is"),
    "no parameters": (lambda w, z: z, "gives an output whose last axis is not that of"),
    "a loop": (
        lambda w, z: lax.fori_loop(0, 2, lambda _, x: 2.0 * x, z @ w),
        "applies scan to its parameters",
    ),
    "a part that is replaced": (
        lambda w, z: z @ lax.dynamic_update_slice(W, w[:1], (0, 0)),
        "applies dynamic_update_slice to its parameters",
    ),
    "an order": (
        lambda w, z: jnp.take_along_axis(z, jnp.argsort(w[:1]), 1),
        "applies sort to its parameters",
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_feature_by_feature(name):
    apply, params, inputs = LINEAR[name]
    assert why_not_linear(apply, params, inputs) is None
    other = jax.tree.map(lambda p: normal(*p.shape, seed=1), params)
    combined = jax.tree.map(lambda p, o: 2.0 * p - o, params, other)
    expected = 2.0 * apply(params, inputs) - apply(other, inputs)
    tolerance = 0.1 if name == "half precision" else 1e-5
    np.testing.assert_allclose(
        apply(combined, inputs), expected, rtol=tolerance, atol=tolerance
    )
    moved = jax.tree.map(lambda p: p.at[..., 1].add(1.0), params)
    change = np.abs(apply(moved, inputs) - apply(params, inputs))
    assert change[..., 1].max() > 0.0
    np.testing.assert_array_equal(np.delete(change, 1, -1), 0.0)


@pytest.mark.parametrize("name", NOT)
def test_what_is_not_is_named(name):
    apply, reason = NOT[name]
    assert reason in why_not_linear(apply, W, Z)


def test_a_parameter_without_features():
    reason = why_not_linear(lambda p, z: p[0] * (z @ p[1]), (jnp.float32(2.0), W), Z)
    assert reason == "has a parameter without an axis of features"


def test_a_convolution_of_parameters():
    """They are the kernel, not what it is moved over."""
    reason = why_not_linear(lambda p, z: conv(z, p), IMAGES, KERNEL)
    assert reason == "applies conv_general_dilated to its parameters"


def test_rows_by_parameters():
    """They are the table, not the index."""

    def apply(p, z):
        return z.at[p].get(mode="promise_in_bounds", wrap_negative_indices=False)

    reason = why_not_linear(apply, jnp.arange(4), Z)
    assert reason == "applies gather to its parameters"


def test_the_body_of_a_call():
    """As JAX keeps it: closed or open; one with constants is not followed."""
    body = jax.make_jaxpr(lambda w: -w)(W)
    filled = SimpleNamespace(jaxpr=body.jaxpr, consts=[Z])
    for jaxpr, expected in ((body, body.jaxpr), (body.jaxpr, body.jaxpr), (filled, None)):
        call = SimpleNamespace(primitive=lax.neg_p, params={"jaxpr": jaxpr})
        assert _inner(call) is expected
