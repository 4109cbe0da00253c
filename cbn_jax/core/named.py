# SPDX-License-Identifier: Apache-2.0
"""States as nested dicts of arrays, and parts of a tree found by name.

Checkpoints, npz files and ``flax.traverse_util`` support dicts and arrays, but not
NamedTuples. The Flax modules therefore keep ``to_dict(state)``. Tools find running moments
and gates by the names of the leaves, both in states and in such dicts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from .running import RunningMoments

Name = tuple[str, ...]


def to_dict(state: Any) -> Any:
    """A state as nested dicts, with ``mean``, ``var`` and ``steps`` at the top level.

    The state of a wrapped method is also at the top level.
    """
    if isinstance(state, RunningMoments):
        return state._asdict()
    if isinstance(state, Mapping):
        return {str(name): to_dict(value) for name, value in state.items()}
    if not hasattr(state, "_fields"):
        return state
    made = {}
    for name, value in state._asdict().items():
        fields = to_dict(value) if _is_on_top(name, value) else {name: to_dict(value)}
        if not made.keys().isdisjoint(fields):
            raise ValueError(
                f"{type(state).__name__} got a field {', '.join(made.keys() & fields)}, "
                "which the inner state also has, expected different names; rename the "
                "outer field."
            )
        made |= fields
    return made


def _is_on_top(name: str, value: Any) -> bool:
    is_tree = isinstance(value, Mapping) or hasattr(value, "_fields")
    return name in ("running", "state") and is_tree


def from_dict(tree: Any, form: Any) -> Any:
    """The state in the form of another state, whose arrays are not used."""
    if isinstance(form, Mapping):
        return {name: from_dict(tree[str(name)], value) for name, value in form.items()}
    if not hasattr(form, "_fields"):
        return tree
    return type(form)(
        *(
            from_dict(tree if _is_on_top(name, value) else tree[name], value)
            for name, value in form._asdict().items()
        )
    )


def named_leaves(tree: Any) -> dict[Name, Any]:
    """The leaves of any tree by name, the dict keys and attributes that lead there."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: Any) -> Name:
    """The path without the parts that nnx variables and linen boxes add."""
    if path[-1:] == (jax.tree_util.GetAttrKey("value"),):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def map_named(change: Callable[[Name, Any], Any], tree: Any) -> Any:
    """The tree with each leaf changed, given its name."""
    return jax.tree.map_with_path(lambda path, leaf: change(_name(path), leaf), tree)


def find_running(tree: Any) -> dict[Name, RunningMoments]:
    """All running moments in a tree, by the name of their place."""
    leaves = named_leaves(tree)
    places = (name[:-1] for name in leaves if name[-1:] == ("steps",))
    return {
        place: RunningMoments(*(leaves[*place, field] for field in RunningMoments._fields))
        for place in places
        if all((*place, field) in leaves for field in RunningMoments._fields)
    }


def put_running(tree: Any, moments: Mapping[Name, RunningMoments]) -> Any:
    """The tree with its running moments replaced."""
    new: dict[Name, jax.Array] = {
        (*place, name): leaf
        for place, running in moments.items()
        for name, leaf in running._asdict().items()
    }
    return map_named(lambda name, leaf: new.get(name, leaf), tree)
