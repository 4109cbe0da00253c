# SPDX-License-Identifier: Apache-2.0
"""Folds the norms of a whole linen model into the layers before them."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
from flax import linen as nn
from flax.core import meta, unfreeze
from flax.linen.dtypes import canonicalize_dtype
from flax.traverse_util import flatten_dict, unflatten_dict

from cbn_jax import _folding
from cbn_jax._adapters import feature_shape, form_of, to_last
from cbn_jax._replacing import Outputs, abstractly
from cbn_jax.core.layers import dense
from cbn_jax.core.named import from_dict
from cbn_jax.core.running import from_batch_stats
from cbn_jax.methods.batch_norm import batch_norm
from cbn_jax.tools.fold import scale_and_shift

from .apply import flat_stats, place_of
from .extend import extend
from .layers import LINEAR
from .norm import Norm
from .replace import recording

Path = tuple[str, ...]


class _Plan(NamedTuple):
    """The norms of a folded model: place, and whether it still scales and shifts."""

    left: tuple[tuple[str, bool, bool], ...]

    def interceptor(self) -> Any:
        """An interceptor that scales and shifts where the model calls a norm."""
        return _Folded({place: (scales, shifts) for place, scales, shifts in self.left})


class _Found(NamedTuple):
    """A norm of the model."""

    path: Path
    layer: Path | None
    norm: _folding.Norm


def fold(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    without_layer: tuple[str, ...] = (),
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Folds all norms of a model into the layers before them, for inference.

    The model has ``nn.BatchNorm`` or ``Norm``, or comes from ``replace_batch_norm``. A norm
    after a layer becomes part of the layer's parameters. If the layer has no bias, one
    addition per value remains. Any other norm becomes one multiplication and one addition.

    Args:
      model: the module.
      variables: its trained variables.
      *args: arguments of a call of the model for inference. Arrays may be
        ``jax.ShapeDtypeStruct``. The function runs both models with them, to compare.
      without_layer: paths of norms after layers whose output the model also uses without
        the norm.
      **kwargs: keyword arguments of that call.

    Returns:
      A model with the same call, and its variables, without the statistics.

    Raises:
      ValueError: a method whose inference looks at the example; no norm in the model;
        outputs that differ from those of the model.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from cbn_jax.linen import fold
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> folded, variables = fold(model, variables, jnp.ones((2, 3)))
      >>> list(variables), folded.apply(variables, jnp.ones((5, 3))).shape
      (['params'], (5, 4))
    """
    variables = meta.unbox(unfreeze(cast(Any, variables)))
    found = _search(model, variables, args, kwargs, without_layer)
    if not found:
        raise ValueError(
            "fold got a model without a norm, expected nn.BatchNorm, a model of "
            "replace_batch_norm or cbn_jax.linen.Norm."
        )
    made = jax.tree.map(lambda leaf: leaf, variables)  # own copies of the dicts
    uses = Counter(each.layer for each in found.values())
    left = tuple(
        (place, *_fold_one(made, each, alone=uses[each.layer] == 1))
        for place, each in sorted(found.items())
    )
    folded, made = extend(model, _Plan(left)), unflatten_dict(flatten_dict(made))
    _folding.check_same(_predict(model, variables), _predict(folded, made), args, kwargs)
    return folded, made


def _fold_one(variables: Any, found: _Found, *, alone: bool) -> tuple[bool, bool]:
    """Folds one norm within the variables; returns whether it still scales and shifts."""
    own = _at(variables.setdefault("params", {}), found.path)
    stats = _at(variables["batch_stats"], found.path)
    layer = None if found.layer is None else _at(variables["params"], found.layer)
    left = _folding.fold_norm(found.norm, stats, layer, own, alone=alone)
    if layer is not None:
        layer |= left.layer
    for name in ("scale", "bias", "backward"):
        own.pop(name, None)
    own |= left.norm
    stats.clear()
    return "scale" in left.norm, "bias" in left.norm


def _at(tree: Any, path: Path) -> Any:
    """The dict at a path; empty for a norm without parameters."""
    for name in path:
        tree = tree.setdefault(name, {})
    return tree


def _predict(model: nn.Module, variables: Any) -> Any:
    """The model in inference, as a function of its inputs."""
    return lambda *args, **kwargs: model.apply(variables, *args, **kwargs)


def _search(
    model: nn.Module,
    variables: Any,
    args: Any,
    kwargs: Any,
    without_layer: tuple[str, ...],
) -> dict[str, _Found]:
    """All norms by place, in the order of their calls."""
    with recording() as records:
        searcher = _Searcher(records, without_layer)
        with nn.intercept_methods(searcher):
            abstractly(_predict(model, variables), args, kwargs)
    return searcher.found


class _Searcher:
    """Records the norms that are called, and the layers whose outputs they receive."""

    def __init__(self, records: Mapping[str, Any], without_layer: tuple[str, ...]):
        self.records = records
        self.without_layer = without_layer
        self.outputs = Outputs()
        self.found: dict[str, _Found] = {}

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        y = next_fun(*args, **kwargs)
        if context.method_name != "__call__":
            return y
        place = place_of(module)
        if isinstance(module, Norm):
            self._note(module, y, module.layer, module.estimator, module.kernel)
        elif place in self.records:
            row, kernel = self.records[place]
            layer = self.outputs.find(args[0])
            self._note(module, y, layer, row.estimator, kernel)
        elif isinstance(module, nn.BatchNorm):
            layer = self.outputs.find(args[0])
            self._note(module, y, layer, batch_norm(epsilon=module.epsilon), None)
        elif isinstance(module, LINEAR):
            self.outputs.note(y, module)
        return y

    def _note(self, module, y, layer, estimator, kernel):
        if module.axis not in (-1, y.ndim - 1) or place_of(module) in self.without_layer:
            layer = None
        shape = feature_shape(y, module.axis)
        plain = isinstance(module, nn.BatchNorm) and place_of(module) not in self.records
        read = _batch_norm_state if plain else _reader(estimator, shape)
        norm = _folding.Norm(estimator, math.prod(shape), read, layer, kernel)
        path = None if layer is None else layer.path
        self.found.setdefault(place_of(module), _Found(module.path, path, norm))


def _batch_norm_state(stats: Any, params: Any) -> Any:
    del params
    return from_batch_stats(stats["mean"].reshape(-1), stats["var"].reshape(-1))


def _reader(estimator: Any, shape: tuple[int, ...]) -> Any:
    """Reads a stored state in the form of the estimator."""

    def read(stats, params):
        form = form_of(estimator, math.prod(shape), dense, params)
        return from_dict(flat_stats(stats, shape), form)

    return read


class _Folded:
    """Multiplies and adds where the model calls a norm."""

    def __init__(self, left: dict[str, tuple[bool, bool]]):
        self.left = left

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        left = self.left.get(place_of(module))
        if left is None or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        if getattr(module, "layer", None) is not None:
            x = module.layer(x)
        names = "scale", "bias"
        scale, bias = (
            module.get_variable("params", name) if there else None
            for name, there in zip(names, left, strict=True)
        )
        dtype = module.dtype
        if isinstance(module, nn.BatchNorm):
            # As in the norm, half precision becomes that of the parameters.
            dtype = canonicalize_dtype(x, scale, bias, dtype=dtype)
        x, _, back = to_last(x, None, module.axis, None)
        return back(scale_and_shift(x, scale, bias, dtype))
