# SPDX-License-Identifier: Apache-2.0
"""Operations of ``Norm`` and ``replace_batch_norm`` within a bound module.

The parameters ``scale`` and ``bias`` and the state are in the module's own scope. This is
the scope of a ``Norm``, or that of an ``nn.BatchNorm`` that the estimator replaces.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.core import meta

from cbn_jax._adapters import (
    Kernel,
    changed_params,
    check_backward,
    check_stats,
    feature_shape,
    form_of,
    to_last,
)
from cbn_jax.core.backward import Bidirectional
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.layers import Layer
from cbn_jax.core.named import from_dict, map_named, to_dict
from cbn_jax.core.source import source_of
from cbn_jax.core.statistics import Statistics

from .layers import as_layer


class Made(NamedTuple):
    """The layer that made activations.

    Attributes:
      layer: the layer as a pure function.
      params: the parameters that it uses.
      inputs: the inputs of its call.
      boxes: the parameters with their metadata, as Flax stores them.
    """

    layer: Layer
    params: Any
    inputs: Any
    boxes: Any


class Mode(NamedTuple):
    """Whether to infer, the mask of values, and whether to update the state."""

    running: bool
    mask: jax.Array | None = None
    update: bool = True


#: ``(x, statistics, (scale, bias), mask) -> y``.
Output = Callable[[jax.Array, Statistics, tuple[Any, Any], Any], jax.Array]


def made_by(layer: nn.Module, inputs: Any, kernel: Kernel | None) -> Made:
    """The layer that has run, as a ``Made``."""
    spec, params = as_layer(layer, inputs, kernel)
    return Made(spec, params, inputs, layer.variables.get("params", {}))


def run_changed(layer: nn.Module, kernel: Kernel, inputs: Any) -> jax.Array:
    """The output of a layer whose kernel is changed before its use."""

    def change(variables):
        return {"params": changed_params(layer, variables["params"], kernel)}

    run = nn.map_variables(lambda layer, z: layer(z), "params", trans_in_fn=change)
    return run(layer, inputs)


def normalize_in(
    module: Any,
    estimator: Estimator,
    x: jax.Array,
    made: Made | None,
    mode: Mode,
    output: Output,
) -> jax.Array:
    """Normalizes within the scope of ``module``, which has the fields of ``Norm``."""
    shape = feature_shape(x, module.axis)
    x, mask, back = to_last(
        x, mode.mask, module.axis, None if made is None else "before it"
    )
    _init_state(module, estimator, x.shape[-1], made, shape)
    state = _read_state(module, estimator, x.shape[-1], made, shape)
    if mode.running or module.is_initializing():
        statistics = estimator.infer(state, x, mask=mask)
    else:
        source = None
        if made is not None:
            source = source_of(made.layer, made.params, made.inputs, x)
        bound = _bound(module, estimator, x.shape[-1])
        statistics, after = bound.train(
            state, x, source, axis_name=module.axis_name, mask=mask
        )
        if mode.update:
            _write_state(module, after, shape)
    return back(output(x, statistics, _affine(module, shape), mask))


def _affine(module: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Scale and bias in Flax's shape, flattened to one axis."""

    def param(use, name, init):
        if not use:
            return None
        return module.param(name, init, shape, module.param_dtype).reshape(-1)

    return (
        param(module.use_scale, "scale", module.scale_init),
        param(module.use_bias, "bias", module.bias_init),
    )


def _bound(module: Any, estimator: Estimator, features: int) -> Estimator:
    """A method with its backward statistics taken from the module."""
    if not isinstance(estimator, Bidirectional):
        return estimator
    check_backward(module)
    return estimator.at(_backward(module, estimator, features))


def _backward(module: Any, estimator: Bidirectional, features: int) -> Any:
    return module.param("backward", lambda _: estimator.init_backward(features))


def _layer_of(made: Made | None) -> tuple[Any, Any]:
    return (None, None) if made is None else (made.layer, made.params)


def _init_state(
    module: Any,
    estimator: Estimator,
    features: int,
    made: Made | None,
    shape: tuple[int, ...],
) -> None:
    """Makes the variables of the state, at the first call only."""
    if not module.is_initializing():
        return
    if isinstance(estimator, Bidirectional):
        _backward(module, estimator, features)
    state = to_dict(estimator.init(features, *_layer_of(made)))
    if len(shape) > 1:
        state = jax.tree.map(lambda leaf: _split(leaf, shape), state)
    if made is not None:
        state = _boxed(state, made.boxes)
    for name, value in state.items():
        module.variable("batch_stats", name, lambda value=value: value)


def _boxed(state: Any, params: Any) -> Any:
    """Gives arrays like a parameter, with or without slots, its sharding metadata."""

    def is_box(node):
        return isinstance(node, meta.AxisMetadata)

    boxes = {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): box
        for path, box in jax.tree.leaves_with_path(params, is_leaf=is_box)
        if is_box(box)
    }

    def boxed(name, leaf):
        for end, box in boxes.items():
            shape = box.unbox().shape
            if name[-len(end) :] == end and leaf.shape == shape:
                return box.replace_boxed(leaf)
            if name[-len(end) :] == end and leaf.shape[1:] == shape:
                with_slots = box.add_axis(0, {meta.PARTITION_NAME: None})
                return with_slots.replace_boxed(leaf)
        return leaf

    return map_named(boxed, state)


def _read_state(
    module: Any,
    estimator: Estimator,
    features: int,
    made: Made | None,
    shape: tuple[int, ...],
) -> Any:
    """The state that the module stores, in the form of the estimator."""
    form = form_of(estimator, features, *_layer_of(made))
    stats = meta.unbox(dict(module.variables.get("batch_stats", {})))
    stats.pop("layer", None)  # of a layer that has statistics itself
    stats = flat_stats(stats, shape)
    check_stats(place_of(module), estimator, stats, form, _WRITE)
    return from_dict(stats, form)


_WRITE = (
    "write variables = cbn_jax.linen.from_batch_norm(variables, into=model.init(...)) for "
    "a model with nn.BatchNorm; else use its method, or batch_stats of model.init(...) "
    "with the arguments of training."
)


def place_of(module: nn.Module) -> str:
    """The place of the module in the model."""
    return "/".join(module.path) or "the root"


def _write_state(module: Any, state: Any, shape: tuple[int, ...]) -> None:
    for name, value in to_dict(state).items():
        if len(shape) > 1:
            value = jax.tree.map(lambda leaf: _split(leaf, shape), value)
        module.variable("batch_stats", name, lambda value=value: value).value = value


def _split(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Splits the last axis of an array into the feature axes of ``shape``."""
    return leaf.reshape(*leaf.shape[:-1], *shape)


def flat_stats(stats: Any, shape: tuple[int, ...]) -> Any:
    """Stored statistics with their feature axes merged into one."""
    if len(shape) == 1:
        return stats
    return jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[: -len(shape)], -1), stats)
