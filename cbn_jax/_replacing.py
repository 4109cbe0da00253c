# SPDX-License-Identifier: Apache-2.0
"""Functions that the adapters share for replacing the batch norms of whole models."""

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax

from ._adapters import short
from .core.estimator import Estimator
from .methods.batch_renorm import batch_renorm

#: Reasons why a batch norm gets the fallback.
NO_LAYER = "its input is no layer's output"
NAMED = "named in without_layer"
OTHER_AXIS = "its features are not the last axis"


class Outputs:
    """The calls that made arrays, found by identity and forgotten with the array."""

    def __init__(self):
        self._calls: dict[int, tuple[weakref.ref, Any]] = {}

    def note(self, y: Any, call: Any) -> None:
        """Notes the call that made ``y``."""
        if isinstance(y, jax.Array):
            forget = functools.partial(self._calls.pop, id(y), None)
            self._calls[id(y)] = weakref.ref(y, lambda _: forget()), call

    def find(self, x: Any) -> Any:
        """The call that made ``x``, or None."""
        reference, call = self._calls.get(id(x), (lambda: None, None))
        return call if x is not None and reference() is x else None


def check_replacement(
    model: Any, kind: type, estimator: Any, fallback: Any, also: Any, without_layer: Any
) -> None:
    """Checks for a module, an estimator, a fallback that needs no layer, and two tuples."""
    for name, value, each in (
        ("also", also, type),
        ("without_layer", without_layer, str),
    ):
        if not isinstance(value, tuple) or not all(isinstance(v, each) for v in value):
            raise TypeError(
                f"replace_batch_norm got {name}={short(value)}, expected a tuple; write "
                f"{name}=({short(value)},)."
            )
    if not isinstance(model, kind):
        raise TypeError(
            f"replace_batch_norm got model={short(model)}, expected a Flax module; write "
            "replace_batch_norm(model, estimator)."
        )
    for name, value in (("estimator", estimator), ("fallback", fallback)):
        if not isinstance(value, Estimator | None) or (
            value is None and name != "fallback"
        ):
            raise TypeError(
                f"replace_batch_norm got {name}={short(value)}, expected an estimator, "
                "such as cbn_jax.small_batch_norm(2)."
            )
    if fallback is not None and "layered" in fallback.traits:
        raise ValueError(
            f"replace_batch_norm got fallback={fallback!r}, which needs a layer, "
            "expected a method that needs none; write "
            "fallback=cbn_jax.batch_renorm(warmup_steps=100)."
        )


def default_fallback(estimator: Estimator) -> Estimator:
    """The best method that needs no layer and adds no parameters."""
    return batch_renorm(warmup_steps=100, epsilon=estimator.epsilon)


def check_epsilons(place: str, epsilon: float, estimator: Estimator) -> None:
    """Checks ε, because a trained model predicts correctly only with its own."""
    if epsilon != estimator.epsilon:
        raise ValueError(
            f"replace_batch_norm got {place} with epsilon={epsilon} and an estimator with "
            f"epsilon={estimator.epsilon}, expected the same; write epsilon={epsilon} in "
            f"{estimator!r}."
        )


def abstractly(call: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Traces a call with abstract arrays; other arguments stay Python values."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [leaf if hasattr(leaf, "shape") else None for leaf in leaves]

    def run(arrays):
        both = zip(leaves, arrays, strict=True)
        values = [leaf if array is None else array for leaf, array in both]
        args, kwargs = jax.tree.unflatten(structure, values)
        return call(*args, **kwargs)

    jax.eval_shape(run, arrays)


def check_places(without_layer: tuple[str, ...], places: Iterable[str]) -> None:
    """Checks that every path in ``without_layer`` is that of a batch norm."""
    unknown = sorted(set(without_layer).difference(places))
    if unknown:
        raise ValueError(
            f"replace_batch_norm got {unknown[0]!r} in without_layer, expected paths of "
            f"batch norms: {', '.join(sorted(places))}."
        )


def check_one_layer(place: str, first: str | None, layer: str | None) -> None:
    """Checks that all calls follow the same layer, because a state belongs to one layer."""
    if first != layer:
        raise ValueError(
            f"replace_batch_norm got the batch norm {place}, which is called after "
            f"{first or 'no layer'} and after {layer or 'no layer'}, expected one layer; "
            f"write replace_batch_norm(..., without_layer=({place!r},))."
        )


def refuse_subclass(name: str, place: str, flax: str) -> None:
    """Refuses a subclass, which may compute something else than a batch norm."""
    raise ValueError(
        f"replace_batch_norm got {name} at {place}, a subclass of {flax}.BatchNorm, "
        f"expected {flax}.BatchNorm itself; to replace the subclass too, write "
        f"replace_batch_norm(..., also=({name},))."
    )


def check_index_groups(place: str, norm: Any) -> None:
    """Refuses index groups; here groups of devices are axes of a mesh."""
    if getattr(norm, "axis_index_groups", None) is not None:
        raise ValueError(
            f"replace_batch_norm got axis_index_groups at {place}, expected None; write "
            "jax.make_mesh((groups, devices), ('group', 'device'), ...) and "
            "axis_name='device'."
        )
