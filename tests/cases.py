"""Every public estimator with the arguments under which the contract suite runs it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import cbn_jax as cbn

FACTORIES = {
    "batch_norm": functools.partial(cbn.batch_norm, momentum=0.9),
    "batch_norm-cumulative": functools.partial(cbn.batch_norm, cbn.cumulative),
    "cross_iteration_batch_norm": functools.partial(
        cbn.cross_iteration_batch_norm, window=3, momentum=0.9
    ),
    "cross_iteration_batch_norm-burn_in": functools.partial(
        cbn.cross_iteration_batch_norm, window=3, burn_in=2
    ),
    "cross_iteration_batch_norm-window_1": functools.partial(
        cbn.cross_iteration_batch_norm, window=1
    ),
}


def dense(params, z):
    x = z @ params["kernel"]
    return x + params["bias"][None] if "bias" in params else x


def conv(params, z, *, stride=1, padding=0, dilation=1, groups=1):
    x = lax.conv_general_dilated(
        z,
        params["kernel"],
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + params["bias"][None, None, None] if "bias" in params else x


class Layer(NamedTuple):
    fn: Callable
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    bias: bool

    def params(self, key, dtype=jnp.float32):
        k1, k2 = jax.random.split(key)
        params = {"kernel": 0.5 * jax.random.normal(k1, self.kernel, dtype)}
        if self.bias:
            params["bias"] = jax.random.normal(k2, self.kernel[-1:], dtype)
        return params

    def data(self, key, dtype=jnp.float32, examples=None):
        shape = self.inputs if examples is None else (examples, *self.inputs[1:])
        return 0.3 + jax.random.normal(key, shape, dtype)

    @property
    def features(self):
        return self.kernel[-1]


LAYERS = {
    "dense": Layer(dense, (5, 4), (8, 5), bias=True),
    "dense-no_bias": Layer(dense, (5, 4), (8, 5), bias=False),
    "conv": Layer(
        functools.partial(conv, padding=1), (3, 3, 2, 4), (8, 5, 5, 2), bias=False
    ),
    "conv-strided": Layer(
        functools.partial(conv, stride=2), (3, 3, 2, 4), (8, 7, 7, 2), bias=True
    ),
    "conv-dilated": Layer(
        functools.partial(conv, dilation=2, padding=2),
        (3, 3, 2, 4),
        (8, 6, 6, 2),
        bias=True,
    ),
    "conv-grouped": Layer(
        functools.partial(conv, groups=2, padding=1),
        (3, 3, 2, 4),
        (8, 5, 5, 4),
        bias=True,
    ),
}


def drift(params, key, size=0.05):
    """Weights after an imagined optimizer step."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [
        p + size * jax.random.normal(k, p.shape, p.dtype)
        for p, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def train(estimator, state, layer, params, z, **kwargs):
    """One training call on a layer's output: (x, statistics, state)."""
    x, source = cbn.run_layer(layer.fn, params, z, axis_name=kwargs.get("axis_name"))
    statistics, state = estimator.train(state, x, source, **kwargs)
    return x, statistics, state
