# SPDX-License-Identifier: Apache-2.0
"""Variables of linen models, from ``nn.BatchNorm`` to ``Norm`` and back."""

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from cbn_jax._adapters import running_in, with_running
from cbn_jax.core.named import find_running
from cbn_jax.core.running import RunningMoments, from_batch_stats

Path = tuple[str, ...]


def from_batch_norm(
    variables: Mapping[str, Any], into: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Converts variables of a model with ``nn.BatchNorm`` to those with ``Norm``.

    Parameters stay unchanged. Give the estimator the ε with which the model was trained.
    The function renames modules named by Flax from ``BatchNorm_0`` to ``Norm_0``.
    ``optimizer_from_batch_norm`` renames them in the state of an optimizer. In a model of
    ``replace_batch_norm`` the modules keep their names.

    If the state of a method holds more than running averages, pass fresh variables of the
    new model, from its ``init``, as ``into``. The rest of the state starts from these. The
    new model predicts as the old one did, and training continues.

    Args:
      variables: the variables of the trained model, with ``params`` and ``batch_stats``.
      into: variables of the new model, of the same structure. None means those of
        ``Norm(batch_norm(...))``, also inside ``corrected_inference``.

    Returns:
      The variables for the new model.

    Raises:
      ValueError: no ``nn.BatchNorm`` in them; a ``Norm_0`` beside a ``BatchNorm_0``;
        modules or shapes that are not those of ``into``, or a method without running
        averages.

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
    found = _found(variables, _is_batch_norm)
    if not found:
        raise ValueError(f"from_batch_norm {_no_batch_norm(variables)}")
    modules = None if into is None else _modules(into)
    names = _names("from_batch_norm", variables, found, _BATCH_NORM, "Norm_", modules)
    if into is None:
        return _changed(variables, found, names, _norm_of)
    return _put(_changed(variables, found, names, _moments_of), into, "variables")


def optimizer_from_batch_norm(opt_state: Any, variables: Mapping[str, Any]) -> Any:
    """Renames modules in the state of an optimizer as ``from_batch_norm`` does.

    Args:
      opt_state: the state of an optax optimizer, any tree with parts like ``params``.
      variables: the variables of the trained model, as ``from_batch_norm`` takes them.

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
    found = _found(variables, _is_batch_norm)
    if not found:
        raise ValueError(f"optimizer_from_batch_norm {_no_batch_norm(variables)}")
    method = "optimizer_from_batch_norm"
    return _renamed(opt_state, _names(method, variables, found, _BATCH_NORM, "Norm_"))


def _no_batch_norm(variables: Mapping[str, Any]) -> str:
    return (
        f"got collections {sorted(variables)} without mean and var, expected the "
        "batch_stats of a model with nn.BatchNorm; pass all variables."
    )


def _put(trained: Any, fresh: Any, name: str) -> Any:
    """The trained variables, with fresh states around their running moments."""
    if isinstance(trained, RunningMoments):
        return _around(trained, fresh, name)
    if isinstance(trained, Mapping) and isinstance(fresh, Mapping):
        if set(trained) <= set(fresh) <= {*trained, *_ADDED}:
            return {
                key: _put(trained[key], value, key) if key in trained else value
                for key, value in fresh.items()
            }
        came, expected = sorted(trained), sorted(fresh)
    else:
        came, expected = getattr(trained, "shape", None), getattr(fresh, "shape", None)
        if came == expected:
            return trained
    raise ValueError(
        f"from_batch_norm got {came} in {name} of the trained model, expected {expected} "
        "as in the new model; build both models from the same modules and names."
    )


_ADDED = "backward", "mix"  # additional parameters of some methods


def _around(moments: RunningMoments, fresh: Any, name: str) -> Any:
    """A fresh state with the trained moments, at each place that has some."""
    places = find_running(fresh)
    if not places:
        raise ValueError(
            f"from_batch_norm got an estimator without running moments at {name}, expected "
            "batch_norm(...), small_batch_norm(...) or another that has them."
        )
    for running in places.values():
        _put(moments._asdict(), running._asdict(), name)
    return with_running(fresh, moments)


def to_batch_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Converts variables of a model with ``Norm`` to those with ``nn.BatchNorm``.

    This is the inverse of ``from_batch_norm``. Mean and variance are the running averages
    of each state, and ``Norm_0`` becomes ``BatchNorm_0``.

    Give ``nn.BatchNorm`` the estimator's ε. It then predicts as ``Norm`` did for
    ``batch_norm``, ``cross_iteration_batch_norm``, ``streaming_batch_norm`` and
    ``replay_batch_norm``. The same holds inside ``adaptive_batch_norm`` with
    ``inference="running"``. Predictions change if inference uses the example:
    ``corrected_inference`` and ``fitted_inference`` lose their correction, and
    ``group_batch_norm`` averages other activations.

    A layer made inside the model's ``__call__`` keeps its place. A layer that a ``Norm``
    owns stays below it, as ``layer``.

    Args:
      variables: the variables of the trained model, with ``params`` and ``batch_stats``.

    Returns:
      The variables for ``nn.BatchNorm(epsilon=...)``.

    Raises:
      ValueError: no ``Norm`` in them, or one without running averages; a ``BatchNorm_0``
        beside a ``Norm_0``.

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
    found = _found(variables, _is_state)
    if not found:
        raise ValueError(
            f"to_batch_norm got collections {sorted(variables)} without the state of a "
            "Norm, expected the batch_stats of a model with cbn_jax.linen.Norm; pass all "
            "variables."
        )
    names = _names("to_batch_norm", variables, found, _NORM, "BatchNorm_")
    return _changed(variables, found, names, _batch_norm_of)


def _found(variables: Mapping[str, Any], accept: Callable[[Any], bool]) -> set[Path]:
    """The paths of the modules whose statistics are accepted."""

    def search(node, path):
        if not isinstance(node, Mapping):
            return set()
        if accept(node):
            return {path}
        return set().union(*(search(child, (*path, name)) for name, child in node.items()))

    return search(variables.get("batch_stats", {}), ())


def _modules(variables: Mapping[str, Any]) -> set[Path]:
    """The paths of all modules with variables."""
    leaves = flatten_dict(unfreeze(cast(Any, variables)), keep_empty_nodes=True)
    return {path[1:end] for path in leaves for end in range(2, len(path) + 1)}


def _names(
    method: str,
    variables: Mapping[str, Any],
    found: set[Path],
    old: re.Pattern[str],
    new: str,
    expected: set[Path] | None = None,
) -> dict[Path, str]:
    """The new names of modules, by path; expected ones keep their names."""
    modules, names = _modules(variables), {}
    for path in found:
        if not path or (expected is not None and path in expected):
            continue
        names[path] = old.sub(new, path[-1])
        renamed = (*path[:-1], names[path])
        if renamed != path and renamed in modules:
            raise ValueError(
                f"{method} got modules {'/'.join(path)} and {'/'.join(renamed)}, which "
                "would have the same name, expected different names; rename one of them."
            )
    return names


def _changed(
    variables: Mapping[str, Any],
    found: set[Path],
    names: dict[Path, str],
    change: Callable[[Any], Any],
) -> dict[str, Any]:
    """All collections, with statistics changed and their modules renamed."""

    def changed(node, path):
        if path in found:
            return change(node)
        if not isinstance(node, Mapping):
            return node
        return {name: changed(child, (*path, name)) for name, child in node.items()}

    made = dict(variables)
    made["batch_stats"] = changed(variables["batch_stats"], ())
    return {collection: _renamed(made[collection], names) for collection in made}


def _renamed(node: Any, names: dict[Path, str], path: Path = ()) -> Any:
    """A tree with the modules renamed, in each nested mapping in it."""
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


def _is_batch_norm(stats: Mapping[str, Any]) -> bool:
    """Whether these are the statistics of an ``nn.BatchNorm``."""
    return set(stats) == {"mean", "var"}


def _is_state(stats: Mapping[str, Any]) -> bool:
    """Whether this is the state of an estimator.

    All states count the batches or values of each feature. ``diagnostics.watch`` has states
    inside.
    """
    counts = stats.get("steps", stats.get("examples"))
    per_feature = getattr(counts, "ndim", 0) > 0
    return per_feature or {"estimated", "truth"} <= stats.keys()


def _moments_of(stats: Any) -> RunningMoments:
    """The running moments of an ``nn.BatchNorm``."""
    return from_batch_stats(stats["mean"], stats["var"])


def _norm_of(stats: Any) -> dict[str, Any]:
    """The state of ``batch_norm``, from the statistics of an ``nn.BatchNorm``."""
    return _moments_of(stats)._asdict()


def _batch_norm_of(stats: Any) -> dict[str, Any]:
    """The statistics of an ``nn.BatchNorm``, from the state of an estimator."""
    running = running_in(stats)
    return {"mean": running.mean, "var": running.var}


_BATCH_NORM = re.compile(r"^BatchNorm_(?=\d+$)")
_NORM = re.compile(r"^Norm_(?=\d+$)")
