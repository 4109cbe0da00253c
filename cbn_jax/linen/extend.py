# SPDX-License-Identifier: Apache-2.0
"""Models whose methods run within an interceptor of module calls.

A subclass of the model's class is made, so that its methods, fields and properties stay.
"""

import contextvars
import functools
import inspect
import types
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from flax import linen as nn
from flax.core import freeze


class Plan(Hashable, Protocol):
    """The behavior of an extended model, a value that pickles."""

    def interceptor(self) -> Callable[..., Any]:
        """A new interceptor for one call of the model.

        If the interceptor has a method ``check_init``, the extended model calls it with the
        initialization that has run.
        """
        ...


def extend(model: nn.Module, plan: Plan) -> Any:
    """A model like ``model`` whose methods run within an interceptor of the plan."""
    return _remake(original(type(model)), plan, _fields(model), model.name)


def original(cls: type) -> type:
    """The class that was extended, or the class itself."""
    return getattr(cls, "_extended_from", cls)


def _fields(model: nn.Module) -> dict[str, Any]:
    return {
        name: getattr(model, name)
        for name, field in model.__dataclass_fields__.items()
        if field.init and name not in ("parent", "name")
    }


def _remake(cls: type, plan: Plan, fields: dict[str, Any], name: str | None) -> Any:
    return _extended(cls, plan)(**fields, name=name)


@functools.cache
def _extended(cls: type, plan: Plan) -> type:
    """A subclass whose methods run within an interceptor."""
    methods = {name: _within(plan, method) for name, method in _methods(cls).items()}
    entries = {name: nn.nowrap(_within(plan, getattr(cls, name))) for name in _ENTRIES}

    def reduce(self):
        return _remake, (cls, plan, _fields(self), self.name)

    def post_init(self):
        cls.__post_init__(self)
        if self.scope is not None:
            _mark(self, id(plan))  # the plan lives as long as the class

    def body(namespace):
        namespace.update(methods, **entries, __reduce__=nn.nowrap(reduce))
        namespace.update(__post_init__=post_init)
        namespace.update(_extended_from=cls, __module__=cls.__module__, __doc__=cls.__doc__)

    return types.new_class(cls.__name__, (cls,), {}, body)


def _mark(module: nn.Module, plan: int) -> None:
    """Marks all scopes, so that ``nn.jit`` does not reuse the traces of another model."""
    assert module.scope is not None
    module.scope.flags = freeze({**module.scope.flags, "plan": plan})
    children = module._state.children.values()
    for child in [child for child in children if isinstance(child, nn.Module)]:
        _mark(child, plan)


_ENTRIES = "apply", "init_with_output"


def _methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The methods that the classes of a model add to ``nn.Module``."""
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(nn.Module)]):
        found |= {
            name: method
            for name, method in vars(base).items()
            if inspect.isfunction(method) and not getattr(method, "nowrap", False)
        }
    hidden = {name for name in found if name.startswith("__") and name != "__call__"}
    return {name: found[name] for name in found.keys() - hidden - {"setup"}}


def _within(plan: Plan, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with an interceptor around the outermost call."""
    initializes = method.__name__ == "init_with_output"

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        if _plan.get() == plan:
            return method(self, *args, **kwargs)
        token = _plan.set(plan)
        try:
            interceptor = plan.interceptor()
            with nn.intercept_methods(interceptor):
                found = method(self, *args, **kwargs)
            check: Any = getattr(interceptor, "check_init", None)
            if initializes and check is not None:
                check(lambda: method(self, *args, **kwargs))
            return found
        finally:
            _plan.reset(token)

    return run


def running() -> Plan | None:
    """The plan of the innermost running extended model."""
    return _plan.get()


_plan: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("plan", default=None)
