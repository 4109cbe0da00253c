# SPDX-License-Identifier: Apache-2.0
"""Finds the layer before each norm of an nnx model, in an abstract call of the model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from cbn_jax._adapters import Kernel, LayerError
from cbn_jax._replacing import (
    NAMED,
    NO_LAYER,
    OTHER_AXIS,
    Outputs,
    abstractly,
    check_one_layer,
)

from .layers import LINEAR, as_layer


class Seen(NamedTuple):
    """A batch norm in the abstract call.

    Attributes:
      layer: the path of the layer whose output it receives.
      reason: the reason why that layer cannot be used, or why there is none.
      position: number of batch norms called before.
    """

    layer: str | None
    reason: str
    position: int


class Call(NamedTuple):
    """A call of a layer."""

    layer: Any
    args: tuple[Any, ...]


OUTPUTS = Outputs()


# The abstract call. Its modules are instances of subclasses, which record their inputs or
# outputs.


def nodes_of(model: nnx.Module) -> dict[str, Any]:
    """All parts of a model by their paths."""
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}


def become(module: Any, cls: type, path: str) -> None:
    """Makes a module an instance of a subclass, in place."""
    module.__class__ = cls
    module.module_path = path


@functools.cache
def recording(cls: type) -> type:
    """A subclass of a layer's class that records the outputs, made once."""
    if hasattr(cls, "recorded_from"):
        return cls

    def call(self, *args, **kwargs):
        y = cls.__call__(self, *args, **kwargs)
        OUTPUTS.note(y, Call(self, (*args, *kwargs.values())))
        return y

    def reduce(self, protocol):
        return _new, (recording, cls), object.__reduce_ex__(self, 2)[2]

    body = {"__call__": call, "__reduce_ex__": reduce, "recorded_from": cls}
    return type(cls.__name__, (cls,), body)


def _new(make: Callable[[type], type], cls: type) -> Any:
    return object.__new__(make(cls))


@functools.cache
def _noting(cls: type) -> type:
    """A subclass of a batch norm's class that records the layer it follows."""

    def call(self, x, use_running_average=None, *, mask=None):
        self.notes.note(self, x)
        return cls.__call__(self, x, True)  # no collectives

    return type(cls.__name__, (cls,), {"__call__": call})


def follow(
    model: nnx.Module,
    classes: tuple[type, ...],
    inputs: Any,
    arguments: Any,
    kernel: Kernel | None,
    without_layer: tuple[str, ...],
    one_layer: bool = True,
) -> dict[str, Seen]:
    """The findings for each batch norm in an abstract call of the model, by path."""
    probe, notes = nnx.clone(model), _Notes(kernel, without_layer, one_layer)
    for path, node in nodes_of(probe).items():
        if type(node) in classes:
            become(node, _noting(type(node)), path)
            node.notes = notes  # a new object makes ``nnx.jit`` trace again
        elif isinstance(node, LINEAR):
            become(node, recording(type(node)), path)
    _abstractly(probe, inputs, arguments)
    return notes.seen


class _Notes:
    """The findings of the batch norms of an abstract call."""

    def __init__(
        self, kernel: Kernel | None, without_layer: tuple[str, ...], one_layer: bool
    ):
        self.kernel = kernel
        self.without_layer = without_layer
        self.one_layer = one_layer
        self.seen: dict[str, Seen] = {}

    def note(self, norm: Any, x: jax.Array) -> None:
        place = norm.module_path
        call = OUTPUTS.find(x)
        reason = self._reason(norm, x, call)
        layer = None if reason else call.layer.module_path
        first = self.seen.setdefault(place, Seen(layer, reason, len(self.seen)))
        if self.one_layer:
            check_one_layer(place, first.layer, layer)

    def _reason(self, norm: Any, x: jax.Array, call: Call | None) -> str:
        """The reason why a batch norm has no layer; empty if it has one."""
        if norm.module_path in self.without_layer:
            return NAMED
        if call is None:
            return NO_LAYER
        if norm.axis not in (-1, x.ndim - 1):
            return OTHER_AXIS
        if len(call.args) != 1:
            return f"{call.layer.module_path} has several arguments"
        try:
            as_layer(call.layer, call.args[0], self.kernel)
        except LayerError as error:
            return f"{call.layer.module_path} {error.reason}"
        return ""


def _abstractly(model: Any, inputs: Any, arguments: Any) -> None:
    """Traces a call; the model is traced too, so that its variables do not change."""
    graph, state = nnx.split(model)

    def call(state, inputs, arguments):
        nnx.merge(graph, state)(*inputs, **arguments)

    abstractly(call, (state, inputs, arguments), {})


def exchange(nodes: dict[str, Any], new: dict[int, Any]) -> None:
    """Replaces old modules by new ones, also in lists, tuples and dicts."""

    def is_module(value):
        return isinstance(value, nnx.Module)

    def changed(value):
        return new.get(id(value), value)

    for node in filter(is_module, nodes.values()):
        for name, child in list(vars(node).items()):
            held = jax.tree.leaves(child, is_leaf=is_module)
            if any(id(value) in new for value in held):
                child = jax.tree.map(changed, child, is_leaf=is_module)
                setattr(node, name, nnx.data(child))
