# SPDX-License-Identifier: Apache-2.0
"""Functions that the adapters share for folding whole models."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._adapters import Kernel, outputs_last, used_params
from .core.estimator import Estimator
from .core.layers import dense
from .tools.fold import fold
from .wrappers.learned import Learned


class Norm(NamedTuple):
    """The properties of a norm that folding needs.

    Attributes:
      estimator: its method.
      features: the number of features.
      read: ``(stored, params of the layer) -> state``.
      layer: the module before it, whose attributes are used; None if there is none.
      kernel: the change of that module's kernel.
    """

    estimator: Estimator | Learned
    features: int
    read: Callable[[Any, Any], Any]
    layer: Any = None
    kernel: Kernel | None = None


class Left(NamedTuple):
    """Parameters after folding: the layer's new ones, and those that the norm keeps."""

    layer: dict[str, jax.Array]
    norm: dict[str, jax.Array]


def fold_norm(
    norm: Norm, stored: Any, params: Mapping[str, Any] | None, own: Any, *, alone: bool
) -> Left:
    """Folds a norm into its layer, or makes it one multiplication and one addition.

    Args:
      norm: the norm.
      stored: its state as stored. Under ``scan`` all leaves have leading axes.
      params: the parameters of its layer, or None.
      own: its parameters.
      alone: whether this norm alone uses the layer's output.
    """
    estimator, features, read, layer, kernel = norm
    if isinstance(estimator, Learned):
        raise ValueError(
            f"fold got {estimator!r}, whose inference depends on the example, expected a "
            "method with one mean and one scale per feature, such as batch_norm(...)."
        )
    into_layer = params is not None and alone and {"kernel"} <= set(params)
    into_layer = into_layer and set(params or {}) <= {"kernel", "bias"}

    def one(stored, params, scale, bias):
        used = None if params is None else used_params(layer, params, kernel)
        ones = {"kernel": jnp.ones((1, features), jnp.float32)}
        target: Any = used if into_layer else ones
        return fold(estimator, read(stored, used), dense, target, scale, bias)

    for _ in range(_stacked(stored)):
        one = jax.vmap(one)
    made = one(stored, params, own.get("scale"), own.get("bias"))
    if not into_layer:
        return Left({}, {"scale": made["kernel"][..., 0, :], "bias": made["bias"]})
    made = outputs_last(layer, made)
    if "bias" in (params or {}):
        return Left(made, {})
    return Left({"kernel": made["kernel"]}, {"bias": made["bias"]})


def _stacked(stored: Any) -> int:
    """The number of leading axes, which are layers under ``scan``."""
    names = "steps", "examples", "mean"
    leaf = next(stored[name] for name in names if name in stored)
    return jnp.ndim(leaf) - 1


def check_same(
    before: Callable[..., Any], after: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    """Checks that both models predict the same for random inputs."""
    args, kwargs = _random((args, kwargs))
    old, new = before(*args, **kwargs), after(*args, **kwargs)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        tolerance = 1e-3 if a.dtype in (jnp.float32, jnp.float64) else 0.05
        scale = float(jnp.abs(a).max())
        off = float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
        if not off <= tolerance * scale + 1e-6:
            raise ValueError(
                f"fold got a model whose outputs (size {scale:.3g}) would change by "
                f"{off:.3g}, expected no change; if the model also uses the output of a "
                "layer before its norm, write fold(..., without_layer=(path of the norm,))."
            )


def _random(tree: Any) -> Any:
    """Random values for abstract arrays."""

    def value(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)

    return jax.tree.map(value, tree)
