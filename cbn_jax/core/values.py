# SPDX-License-Identifier: Apache-2.0
"""Objects made of functions that compare, hash, print and pickle like plain values.

Python compares functions by identity and cannot pickle inner functions. ``factory`` stores
the call that made an object. The object then compares, prints and pickles as that call.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer


class Call(NamedTuple):
    """A call of a factory, with its defaults filled in."""

    make: Callable[..., Any]
    arguments: inspect.BoundArguments


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Value:
    """Equal, with equal hashes, if made by equal calls; prints and pickles as the call.

    Without a call, for example after ``dataclasses.replace``, it compares by identity.

    Attributes:
      call: the factory call that made it; ``factory`` writes it.
    """

    # It is not a field of the dataclass, because Flax hashes the fields.
    call: ClassVar[Call | None] = None

    @functools.cached_property
    def _key(self) -> Any:
        if self.call is None:
            return id(self)
        return self.call.make, _key_of(self.call.arguments.arguments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        if self.call is None:
            return object.__repr__(self)
        make, bound = self.call
        return f"{make.__name__}({', '.join(_written(bound))})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.call is None:
            return super().__reduce_ex__(protocol)
        make, bound = self.call
        return _remake, (make, bound.args, bound.kwargs)


P = ParamSpec("P")
V = TypeVar("V", bound=Value)


def factory(make: Callable[P, V]) -> Callable[P, V]:
    """Decorates a function that makes an estimator or a schedule.

    The returned object compares, hashes, prints and pickles as the call that made it, if
    the arguments do. Arrays compare by dtype, shape and content. Traced arrays and
    functions compare by identity. The decorated function must be at the top level of a
    module.

    Args:
      make: a function that returns a new ``Estimator`` or ``Schedule`` at each call.

    Returns:
      The function with the same signature and docstring.

    Example:
      >>> import cbn_jax as cbn
      >>> @cbn.factory
      ... def sluggish_batch_norm(epsilon=1e-5):
      ...     return cbn.batch_norm(momentum=0.999, epsilon=epsilon)
      >>> sluggish_batch_norm()
      sluggish_batch_norm(epsilon=1e-05)
      >>> sluggish_batch_norm() == sluggish_batch_norm(1e-5)
      True
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> V:
        value = dataclasses.replace(make(*args, **kwargs))  # the only reference
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        object.__setattr__(value, "call", Call(made, bound))
        return value

    _factories.append(made)
    return made


_factories: list[Callable[..., Any]] = []


def is_factory(value: Any) -> bool:
    """Whether ``value`` is a factory of estimators or schedules, like ``batch_norm``."""
    return any(value is make for make in _factories)


def _remake(make: Callable[..., Value], args: tuple, kwargs: dict[str, Any]) -> Value:
    return make(*args, **kwargs)


def _written(bound: inspect.BoundArguments) -> list[str]:
    """The arguments as in source code, by name if Python allows it."""
    words = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            words += [f"{key}={_word(each)}" for key, each in value.items()]
        elif kind is inspect.Parameter.POSITIONAL_ONLY:
            words.append(_word(value))
        else:
            words.append(f"{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if inspect.isroutine(value):
        return value.__name__
    return repr(value)


def _key_of(value: Any) -> Any:
    """A value with equality and a hash that represents the argument ``value``."""
    if isinstance(value, dict):
        return tuple((name, _key_of(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_key_of, value))
    if isinstance(value, Tracer):
        return id(value)  # valid while the call refers to it
    if isinstance(value, jax.Array | np.ndarray):
        array = np.asarray(value)
        return array.dtype, array.shape, array.tobytes()
    return value
