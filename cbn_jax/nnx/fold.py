# SPDX-License-Identifier: Apache-2.0
"""Folds the norms of a whole nnx model into the layers before them."""

from collections import Counter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from cbn_jax import _folding
from cbn_jax._adapters import to_last
from cbn_jax.core.named import from_dict, to_dict
from cbn_jax.core.running import from_batch_stats
from cbn_jax.methods.batch_norm import batch_norm
from cbn_jax.tools.fold import scale_and_shift

from .follow import Seen, exchange, follow, nodes_of
from .norm import Norm
from .replace import ReplacedBatchNorm

M = TypeVar("M", bound=nnx.Module)

_KINDS = nnx.BatchNorm, ReplacedBatchNorm, Norm


class FoldedNorm(nnx.Module):
    """The rest of a norm: its layer, if it owns one, a multiplication, an addition."""

    def __init__(self, norm: Any, left: dict[str, jax.Array]):
        self.layer = nnx.data(getattr(norm, "layer", None))
        self.axis = norm.axis
        self.dtype = norm.dtype
        # As in Flax, half precision becomes float32 unless the module has a dtype.
        self.widens = not isinstance(norm, Norm) or isinstance(norm, ReplacedBatchNorm)
        self.scale = nnx.data(_param(left.get("scale")))
        self.bias = nnx.data(_param(left.get("bias")))

    def __call__(
        self,
        inputs: Any,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the same in every mode."""
        del use_running_average, mask
        x = inputs if self.layer is None else self.layer(inputs)
        dtype = self.dtype
        if dtype is None and self.widens:
            dtype = jnp.promote_types(x.dtype, jnp.float32)
        x, _, back = to_last(x, None, self.axis, self.layer)
        scale, bias = (
            None if each is None else each.get_value() for each in (self.scale, self.bias)
        )
        return back(scale_and_shift(x, scale, bias, dtype))


def _param(value: jax.Array | None) -> nnx.Param | None:
    return None if value is None else nnx.Param(value)


def fold(
    model: M, *inputs: Any, without_layer: tuple[str, ...] = (), **arguments: Any
) -> M:
    """Copies a model with all norms folded into the layers before them, for inference.

    The model has ``nnx.BatchNorm`` or ``Norm``, or comes from ``replace_batch_norm``. A
    norm after a layer becomes part of the layer's parameters. If the layer has no bias, one
    addition per value remains. Any other norm becomes one multiplication and one addition.

    Args:
      model: a trained module. It is not changed.
      *inputs: inputs of a call of the model. Arrays may be ``jax.ShapeDtypeStruct``. The
        function runs both models with them, to compare.
      without_layer: paths of norms after layers whose output the model also uses without
        the norm.
      **arguments: keyword arguments of that call.

    Returns:
      A model with the same call.

    Raises:
      ValueError: a method whose inference looks at the example; no norm in the model;
        outputs that differ from those of the model.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from cbn_jax.nnx import fold
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
      >>> folded = fold(model, jnp.ones((2, 3)))
      >>> folded(jnp.ones((5, 3))).shape, len(nnx.state(folded, nnx.BatchStat))
      ((5, 4), 0)
    """
    copy = nnx.clone(model)
    nodes = nodes_of(copy)
    norms = {path: node for path, node in nodes.items() if type(node) in _KINDS}
    if not norms:
        raise ValueError(
            "fold got a model without a norm, expected nnx.BatchNorm, a model of "
            "replace_batch_norm or cbn_jax.nnx.Norm."
        )
    seen = follow(model, _KINDS, inputs, arguments, None, without_layer)
    uses = Counter(each.layer for each in seen.values())
    new = {}
    for path, norm in norms.items():
        found = seen.get(path, Seen(None, "", 0))
        layer = None if found.layer is None else nodes[found.layer]
        new[id(norm)] = _fold_one(norm, layer, alone=uses[found.layer] == 1)
    exchange(nodes, new)
    for node in nodes.values():
        if hasattr(node, "recorded_from"):
            node.__class__ = node.recorded_from
    folded = new.get(id(copy), copy)
    _folding.check_same(_predict(model), _predict(folded), inputs, arguments)
    return folded


def _predict(model: nnx.Module) -> Any:
    copy = nnx.clone(model)
    copy.eval()
    return copy


def _fold_one(norm: Any, layer: Any, *, alone: bool) -> FoldedNorm:
    """The rest of a norm; the layer gets new parameters."""
    layer, alone = (
        (layer, alone) if getattr(norm, "layer", None) is None else (norm.layer, True)
    )
    params = None if layer is None else nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    own = {
        name: getattr(norm, name).get_value()
        for name in ("scale", "bias")
        if getattr(norm, name) is not None
    }
    described, stored = _described(norm, layer)
    left = _folding.fold_norm(described, stored, params, own, alone=alone)
    for name, value in left.layer.items():
        getattr(layer, name).set_value(value)
    return FoldedNorm(norm, left.norm)


def _described(norm: Any, layer: Any) -> tuple[_folding.Norm, Any]:
    """A norm for folding, and its state as dicts."""
    if isinstance(norm, nnx.BatchNorm):
        stored = {"mean": norm.mean.get_value(), "var": norm.var.get_value()}
        estimator = batch_norm(epsilon=norm.epsilon)
        read: Any = lambda stored, _: from_batch_stats(**stored)  # noqa: E731
        return _folding.Norm(estimator, norm.num_features, read, layer), stored
    form = jax.tree.unflatten(norm.structure, range(norm.structure.num_leaves))
    described = _folding.Norm(
        norm.estimator,
        norm.num_features,
        lambda stored, _: from_dict(stored, form),
        layer,
        norm.kernel,
    )
    return described, to_dict(norm.state)
