# SPDX-License-Identifier: Apache-2.0
"""Stores a state as variables of an nnx module, one ``BatchStat`` for each array."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from cbn_jax.core.named import Name, from_dict, to_dict


def store(module: nnx.Module, state: Any, metadata: Mapping[Name, Any]) -> None:
    """Gives the module the variables of a fresh state.

    Args:
      module: the module. It gets an attribute for each field, nested ones as an
        ``nnx.Dict``.
      state: the state.
      metadata: shape and sharding of the parameters, by name. Arrays like a parameter, with
        or without slots, are sharded like it.
    """

    def variables(node, name):
        if isinstance(node, Mapping):
            return nnx.Dict({k: variables(v, (*name, k)) for k, v in node.items()})
        return nnx.BatchStat(node, **_sharding(node, name, metadata))

    for name, value in to_dict(state).items():
        if hasattr(module, name):
            raise ValueError(
                f"Norm got a method whose state has a field {name}, a name that Norm uses, "
                "expected another name; rename the field."
            )
        setattr(module, name, nnx.data(variables(value, (name,))))


def load(module: nnx.Module, structure: Any) -> Any:
    """The state stored in the variables, a tree of the given structure."""
    form = jax.tree.unflatten(structure, range(structure.num_leaves))
    stored = {name: _values(getattr(module, name)) for name in to_dict(form)}
    return from_dict(stored, form)


def _values(node: Any) -> Any:
    if isinstance(node, nnx.Variable):
        return node.get_value()
    return {name: _values(node[name]) for name in node}


def write(module: nnx.Module, state: Any) -> None:
    """Sets the variables."""
    for name, value in to_dict(state).items():
        _set(getattr(module, name), value)


def _set(node: Any, value: Any) -> None:
    if isinstance(node, nnx.Variable):
        node.set_value(value)
    else:
        for name in node:
            _set(node[name], value[name])


def metadata_of(layer: nnx.Module) -> dict[Name, Any]:
    """Shape and sharding of each parameter that has one."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        sharding = variable.get_metadata().get("out_sharding")
        if sharding is not None:
            found[tuple(map(str, path))] = variable.get_value().shape, tuple(sharding)
    return found


def _sharding(leaf: jax.Array, name: Name, metadata: Mapping[Name, Any]) -> dict[str, Any]:
    for end, (shape, sharding) in metadata.items():
        if name[-len(end) :] == end and leaf.shape == shape:
            return {"out_sharding": sharding}
        if name[-len(end) :] == end and leaf.shape[1:] == shape:
            return {"out_sharding": (None, *sharding)}
    return {}
