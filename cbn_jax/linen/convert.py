# SPDX-License-Identifier: Apache-2.0
"""Variables of linen models, from ``nn.BatchNorm`` to ``Norm`` and back."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from cbn_jax._adapters import running_in, with_running
from cbn_jax.core.running import RunningMoments, from_batch_stats

Path = tuple[str, ...]
Convert = Callable[[Any], dict[str, Any] | None]


def from_batch_norm(
    variables: Mapping[str, Any], into: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Variables of a model with ``nn.BatchNorm``, for the same model with ``Norm``.

    Parameters stay unchanged; in ``batch_stats``, mean and variance become a
    ``RunningMoments``. Modules named by Flax, ``BatchNorm_0``, are renamed ``Norm_0``;
    ``optimizer_from_batch_norm`` renames them in the state of an optimizer. Give the
    estimator the ε that the model was trained with.

    A method whose state holds more than running moments starts the rest afresh: pass the
    fresh variables of the new model, from its ``init``, as ``into``. The new model predicts
    as the old one did, and training continues.

    Args:
      variables: those of the trained model, with ``params`` and ``batch_stats``.
      into: variables of the model with ``Norm``, of the same structure; None for those of
        ``Norm(batch_norm(...))``, also inside ``corrected_inference``.

    Returns:
      The variables for the model with ``Norm``.

    Raises:
      ValueError: no ``nn.BatchNorm`` in them; a ``Norm_0`` beside a ``BatchNorm_0``;
        modules or shapes that are not those of ``into``, or a state in it without running
        moments.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.linen import Norm, from_batch_norm
      >>> trained = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
      >>> variables = trained.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> estimator = cbn_jax.corrected_inference(cbn_jax.batch_norm(), examples=2)
      >>> model = nn.Sequential([nn.Dense(4), Norm(estimator, use_running_average=True)])
      >>> model.apply(from_batch_norm(variables), jnp.ones((2, 3))).shape
      (2, 4)
    """
    made = _converted("from_batch_norm", variables, _norm_of, _BATCH_NORM, "Norm_")
    if made is None:
        raise ValueError(f"from_batch_norm {_no_batch_norm(variables)}")
    return made if into is None else _put(made, into, "variables")


def optimizer_from_batch_norm(opt_state: Any, variables: Mapping[str, Any]) -> Any:
    """The state of an optimizer, for the parameters that ``from_batch_norm`` renamed.

    Args:
      opt_state: that of an optax optimizer, any tree with parts like ``params``.
      variables: those of the trained model, as ``from_batch_norm`` takes them.

    Returns:
      The state with the modules renamed in the same way, everything else unchanged.

    Raises:
      ValueError: no ``nn.BatchNorm`` in the variables.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from cbn_jax.linen import optimizer_from_batch_norm
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return nn.BatchNorm(use_running_average=True)(x)
      >>> variables = Net().init(jax.random.key(0), jnp.ones((2, 3)))
      >>> opt_state = optax.adam(1e-3).init(variables["params"])
      >>> list(optimizer_from_batch_norm(opt_state, variables)[0].mu)
      ['Norm_0']
    """
    found = _statistics(_leaves(variables, _norm_of), _norm_of)
    if not found:
        raise ValueError(f"optimizer_from_batch_norm {_no_batch_norm(variables)}")
    return _renamed(opt_state, _names(found, _BATCH_NORM, "Norm_"))


def _no_batch_norm(variables: Mapping[str, Any]) -> str:
    return (
        f"got collections {sorted(variables)} without mean and var, expected the "
        "batch_stats of a model with nn.BatchNorm; pass all variables."
    )


def _put(trained: Any, fresh: Any, name: str) -> Any:
    """The trained variables, with fresh states around their running moments."""
    if isinstance(trained, RunningMoments):
        return with_running(fresh, trained)
    if isinstance(trained, Mapping) and isinstance(fresh, Mapping):
        if set(trained) == set(fresh):
            return {key: _put(trained[key], fresh[key], key) for key in trained}
        came, expected = sorted(trained), sorted(fresh)
    else:
        came, expected = getattr(trained, "shape", None), getattr(fresh, "shape", None)
        if came == expected:
            return trained
    raise ValueError(
        f"from_batch_norm got {came} in {name} of the trained model, expected {expected} "
        "as in the new one; give both models the same modules and names."
    )


def to_batch_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a model with ``Norm``, for the same model with ``nn.BatchNorm``.

    The inverse of ``from_batch_norm``. Mean and variance are those of the one
    ``RunningMoments`` in each state, and ``Norm_0`` becomes ``BatchNorm_0``.

    With the estimator's ε, ``nn.BatchNorm`` predicts as ``Norm`` did for ``batch_norm``,
    ``cross_iteration_batch_norm``, ``streaming_batch_norm`` and ``replay_batch_norm``, also
    inside ``adaptive_batch_norm`` with ``inference="running"``. Predictions change if
    inference looks at the example: ``corrected_inference`` and ``fitted_inference`` lose
    their correction, and ``group_batch_norm`` averages other activations.

    A layer made inside the model's ``__call__`` stays where it is; one that a ``Norm`` owns
    stays below it, as ``layer``.

    Args:
      variables: those of the trained model, with ``params`` and ``batch_stats``.

    Returns:
      The variables for ``nn.BatchNorm(epsilon=...)``.

    Raises:
      ValueError: no ``Norm`` in them, or one without exactly one ``RunningMoments``; a
        ``BatchNorm_0`` beside a ``Norm_0``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.linen import Norm, to_batch_norm
      >>> norm = Norm(cbn_jax.batch_norm(), use_running_average=True)
      >>> variables = nn.Sequential([nn.Dense(4), norm]).init(
      ...     jax.random.key(0), jnp.ones((2, 3))
      ... )
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
      >>> model.apply(to_batch_norm(variables), jnp.ones((2, 3))).shape
      (2, 4)
    """
    made = _converted("to_batch_norm", variables, _batch_norm_of, _NORM, "BatchNorm_")
    if made is None:
        raise ValueError(
            f"to_batch_norm got collections {sorted(variables)} without the state of a "
            "Norm, expected the batch_stats of a model with cbn_jax.linen.Norm; pass all "
            "variables."
        )
    return made


def _converted(
    method: str,
    variables: Mapping[str, Any],
    convert: Convert,
    old: re.Pattern[str],
    new: str,
) -> dict[str, Any] | None:
    """All collections, with statistics converted and their modules renamed.

    None if ``convert`` recognizes no statistics.
    """
    leaves = _leaves(variables, convert)
    found = _statistics(leaves, convert)
    if not found:
        return None
    names = _names(found, old, new)
    modules = {path[1:end] for path in leaves for end in range(2, len(path) + 1)}
    for path, name in names.items():
        renamed = (*path[:-1], name)
        if renamed != path and renamed in modules:
            raise ValueError(
                f"{method} got modules {'/'.join(path)} and {'/'.join(renamed)}, which "
                "would have one name; give them names of their own."
            )
    made = unflatten_dict(
        {
            path: convert(node) if path[1:] in found else node
            for path, node in leaves.items()
        }
    )
    return {collection: _renamed(made[collection], names) for collection in made}


def _leaves(variables: Mapping[str, Any], convert: Convert) -> dict[Path, Any]:
    """All variables by their path, the statistics that ``convert`` knows as one."""

    def is_leaf(path, node):
        return path[:1] == ("batch_stats",) and convert(node) is not None

    return flatten_dict(dict(variables), keep_empty_nodes=True, is_leaf=is_leaf)


def _statistics(leaves: dict[Path, Any], convert: Convert) -> set[Path]:
    """The paths of the modules with statistics."""
    return {
        path[1:]
        for path, node in leaves.items()
        if path[0] == "batch_stats" and convert(node) is not None
    }


def _names(found: set[Path], old: re.Pattern[str], new: str) -> dict[Path, str]:
    """By path, the new names of modules."""
    return {path: old.sub(new, path[-1]) for path in found if path}


def _renamed(node: Any, names: dict[Path, str], path: Path = ()) -> Any:
    """A tree with the modules renamed, in each nest of mappings in it."""
    if isinstance(node, Mapping):
        return {
            names.get((*path, name), name): _renamed(child, names, (*path, name))
            for name, child in node.items()
        }
    return jax.tree.map(
        lambda child: _renamed(child, names) if isinstance(child, Mapping) else child,
        node,
        is_leaf=lambda child: isinstance(child, Mapping),
    )


def _norm_of(stats: Any) -> dict[str, Any] | None:
    """The statistics of a ``Norm``, from those of an ``nn.BatchNorm``."""
    if not isinstance(stats, Mapping) or set(stats) != {"mean", "var"}:
        return None
    return {"state": from_batch_stats(stats["mean"], stats["var"])}


def _batch_norm_of(stats: Any) -> dict[str, Any] | None:
    """The statistics of an ``nn.BatchNorm``, from those of a ``Norm``."""
    if not isinstance(stats, Mapping) or set(stats) != {"state"}:
        return None
    if not isinstance(stats["state"], tuple):
        return None
    running = running_in(stats["state"])
    return {"mean": running.mean, "var": running.var}


_BATCH_NORM = re.compile(r"^BatchNorm_(?=\d+$)")
_NORM = re.compile(r"^Norm_(?=\d+$)")
