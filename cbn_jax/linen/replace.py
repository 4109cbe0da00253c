# SPDX-License-Identifier: Apache-2.0
"""Any linen model with the methods of this library in place of its batch norms."""

import contextlib
import contextvars
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

from cbn_jax._adapters import (
    Kernel,
    LayerError,
    Outputs,
    check_epsilons,
    check_replacement,
    default_fallback,
    feature_shape,
    form_of,
)
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.report import Replaced, Report
from cbn_jax.core.statistics import normalize

from .apply import Made, Mode, made_by, normalize_in, place_of
from .layers import LINEAR

M = TypeVar("M", bound=nn.Module)


class Plan(NamedTuple):
    """What to put in place of a batch norm; the arguments of ``replace_batch_norm``."""

    estimator: Estimator
    fallback: Estimator
    kernel: Kernel | None
    classes: tuple[type, ...]
    without_layer: tuple[str, ...]


def replace_batch_norm(
    model: M,
    estimator: Estimator,
    *,
    fallback: Estimator | None = None,
    kernel: Kernel | None = None,
    also: tuple[type, ...] = (),
    without_layer: tuple[str, ...] = (),
) -> M:
    """A model in which an estimator takes the place of every ``nn.BatchNorm``.

    The result is used as the model is: ``init``, ``apply``, ``method=``, ``tabulate``,
    ``bind``, as a part of another model. Its parameters have the same names and, from the
    same key, the same values, so that trained parameters and the state of an optimizer fit.
    Each batch norm keeps its settings (scale, bias, initializers, axes, dtype, mode).

    Methods that look at the layer before them find it by themselves: it is the
    ``nn.Conv``, ``nn.Dense`` or other linear layer whose output the batch norm receives.
    A batch norm behind anything else (an activation, a sum, a concatenation, pooling) gets
    the fallback. ``report`` tells what became of each.

    A layer and its batch norm that are called several times in a step, as a head is that
    several levels share, count each call as a batch. ``small_batch_norm(batch_size,
    micro_batches=calls)`` pools those of a step exactly.

    Args:
      model: any linen module, not yet bound. It is not changed.
      estimator: the method, such as ``cbn_jax.small_batch_norm(2)``, with the ε of the
        batch norms.
      fallback: the method for batch norms without a layer, if ``estimator`` needs one.
        None for ``batch_renorm(warmup_steps=100)``, the best of those that add no
        parameters; ``bidirectional_batch_norm()`` is better and adds the parameter
        ``backward``, for ``cbn_jax.optax.with_backward_statistics``.
      kernel: a change of the kernel of each layer before a batch norm, such as
        ``cbn_jax.standardize``.
      also: classes of your own with the fields and the call of ``nn.BatchNorm``.
      without_layer: paths of batch norms that get the fallback although they have a layer.

    Returns:
      The model, an instance of a subclass of its class.

    Raises:
      TypeError: ``estimator`` is no estimator, or ``model`` no module.
      ValueError: ``model`` is bound; a fallback that needs a layer. While initializing: no
        batch norm in the model; one with another ε or with ``axis_index_groups``; one whose
        class is a subclass not in ``also``; one that is called behind different layers.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.linen import replace_batch_norm
      >>> trained = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
      >>> model = replace_batch_norm(trained, cbn_jax.small_batch_norm(batch_size=2))
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> y, updates = model.apply(variables, jnp.ones((2, 3)), mutable=["batch_stats"])
      >>> sorted(variables["params"]["layers_1"])
      ['bias', 'scale']
    """
    check_replacement(model, nn.Module, estimator, fallback)
    if model.scope is not None:
        raise ValueError(
            f"replace_batch_norm got a bound {type(model).__name__}, expected one without "
            "variables; replace first, then bind."
        )
    if fallback is None:
        fallback = default_fallback(estimator)
    classes = (nn.BatchNorm, *also)
    plan = Plan(estimator, fallback, kernel, classes, tuple(without_layer))
    return _remake(_original(type(model)), plan, _fields(model), model.name)


def report(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """What became of each batch norm of a model, without running it.

    Args:
      model: from ``replace_batch_norm``.
      *args: those of a call of the model; ``jax.ShapeDtypeStruct`` does for an array.
      **kwargs: the same.

    Returns:
      A ``Report``: print it, or read its rows.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.linen import replace_batch_norm, report
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
      >>> model = replace_batch_norm(model, cbn_jax.batch_norm())
      >>> print(report(model, jax.ShapeDtypeStruct((2, 3), jnp.float32)))
      batch norm  layer     method      state
      layers_1    layers_0  batch_norm  12
      <BLANKLINE>
      batch_norm(momentum=0.99, epsilon=1e-05)
    """
    with _recording() as rows:
        jax.eval_shape(lambda key: model.lazy_init(key, *args, **kwargs), jax.random.key(0))
    return Report(tuple(rows.values()))


_rows: contextvars.ContextVar[dict[str, Replaced] | None] = contextvars.ContextVar(
    "rows", default=None
)


@contextlib.contextmanager
def _recording() -> Iterator[dict[str, Replaced]]:
    """Collects a row for each batch norm that is initialized."""
    rows: dict[str, Replaced] = {}
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


# The class of a model is extended, so that all of its methods, fields and properties stay.


def _original(cls: type) -> type:
    return getattr(cls, "_replaced_from", cls)


def _fields(model: nn.Module) -> dict[str, Any]:
    return {
        name: getattr(model, name)
        for name, field in model.__dataclass_fields__.items()
        if field.init and name not in ("parent", "name")
    }


def _remake(cls: type, plan: Plan, fields: dict[str, Any], name: str | None) -> Any:
    return _extended(cls, plan)(**fields, name=name)


@functools.lru_cache
def _extended(cls: type, plan: Plan) -> type:
    """A subclass whose methods run with the batch norms replaced."""
    methods = {name: _within(plan, method) for name, method in _methods(cls).items()}
    entries = {name: nn.nowrap(_within(plan, getattr(cls, name))) for name in _ENTRIES}

    def reduce(self):
        return _remake, (cls, plan, _fields(self), self.name)

    def body(namespace):
        namespace.update(methods, **entries, __reduce__=nn.nowrap(reduce))
        namespace.update(_replaced_from=cls, __module__=cls.__module__, __doc__=cls.__doc__)

    return types.new_class(cls.__name__, (cls,), {}, body)


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

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        if _plan.get() is plan:
            return method(self, *args, **kwargs)
        token = _plan.set(plan)
        try:
            with nn.intercept_methods(_Interceptor(plan)):
                return method(self, *args, **kwargs)
        finally:
            _plan.reset(token)

    return run


_plan: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("plan", default=None)


class _Call(NamedTuple):
    """A call of a layer."""

    layer: nn.Module
    args: tuple[Any, ...]


class _Interceptor:
    """Runs an estimator where a batch norm is called, and notes what layers give."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.outputs = Outputs()
        self.layers: dict[tuple[str, ...], str | None] = {}

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if _original(type(module)) in self.plan.classes:
            return self._normalize(module, *args, **kwargs)
        _check_class(module)
        y = next_fun(*args, **kwargs)
        if isinstance(module, LINEAR):
            self.outputs.note(y, _Call(module, (*args, *kwargs.values())))
        return y

    def _normalize(self, module, x, use_running_average=None, *, mask=None):
        _check_batch_norm(module, self.plan.estimator)
        running = nn.merge_param(
            "use_running_average", module.use_running_average, use_running_average
        )
        estimator, made, row = self._chosen(module, x)
        if made is not None and self.plan.kernel is not None:
            x = made.layer.apply(made.params, made.inputs)
        if "layered" not in estimator.traits:
            made = None
        _record(row, estimator, x, made, module)
        mode = Mode(bool(running), mask)
        return normalize_in(module, estimator, x, made, mode, _output(module))

    def _chosen(self, module: Any, x: jax.Array) -> tuple[Estimator, Made | None, Any]:
        """The method for a batch norm, the layer behind ``x``, and why there is none."""
        estimator, fallback, kernel = self.plan[:3]
        layered = "layered" in estimator.traits
        call = self.outputs.find(x)
        path = None if call is None else place_of(call.layer)
        if not layered and kernel is None:
            return estimator, None, (path, "")
        made = self._made(module, x, call)
        if layered:
            self._check_calls(module, path if isinstance(made, Made) else None)
        if isinstance(made, Made):
            return estimator, made, (path, "")
        return fallback if layered else estimator, None, (None, made)

    def _made(self, module: Any, x: jax.Array, call: _Call | None) -> Made | str:
        """The layer that made ``x``, or why it is of no use."""
        if place_of(module) in self.plan.without_layer:
            return "named in without_layer"
        if call is None:
            return "its input is no layer's output"
        if module.axis not in (-1, x.ndim - 1):
            return "its features are not the last axis"
        if len(call.args) != 1:
            return f"{place_of(call.layer)} has several arguments"
        try:
            return made_by(call.layer, call.args[0], self.plan.kernel)
        except LayerError as error:
            return f"{place_of(call.layer)} {error.reason}"

    def _check_calls(self, module: Any, layer: str | None) -> None:
        """A state belongs to one layer, at all calls of the batch norm."""
        place = place_of(module)
        first = self.layers.setdefault(place, layer)
        if first != layer:
            raise ValueError(
                f"replace_batch_norm got the batch norm {place}, which is called behind "
                f"{first or 'no layer'} and behind {layer or 'no layer'}, expected one "
                f"layer; write replace_batch_norm(..., without_layer=({place!r},))."
            )


def _output(module: Any) -> Any:
    """Normalizes into the dtype that Flax would give."""

    def output(x, statistics, affine, mask):
        del mask
        dtype = canonicalize_dtype(x, *affine, dtype=module.dtype)
        return normalize(x, statistics, *affine, dtype=dtype)

    return output


def _check_class(module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm):
        name = type(module).__name__
        raise ValueError(
            f"replace_batch_norm got {name} at {place_of(module)}, a subclass of "
            "nn.BatchNorm, expected to be told whether it may be replaced; write "
            f"replace_batch_norm(..., also=({name},))."
        )


_NEEDED = "axis", "axis_name", "bias_init", "dtype", "epsilon", "param_dtype", "scale_init"
_NEEDED = *_NEEDED, "use_bias", "use_running_average", "use_scale"


def _check_batch_norm(module: Any, estimator: Estimator) -> None:
    """A batch norm has the fields of Flax's, the ε of the method, and no index groups."""
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"replace_batch_norm got {type(module).__name__} at {place_of(module)} without "
            f"{', '.join(missing)}, expected the fields of nn.BatchNorm; add them."
        )
    if getattr(module, "axis_index_groups", None) is not None:
        raise ValueError(
            f"replace_batch_norm got axis_index_groups at {place_of(module)}, expected "
            "None; use a mesh with an axis for each group and give axis_name."
        )
    check_epsilons(place_of(module), module.epsilon, estimator)


def _record(
    row: tuple[str | None, str],
    estimator: Estimator,
    x: jax.Array,
    made: Made | None,
    module: Any,
) -> None:
    """A row of the report, if somebody asks for one."""
    rows = _rows.get()
    if rows is None:
        return
    place, features = place_of(module), math.prod(feature_shape(x, module.axis))
    layer = (None, None) if made is None else (made.layer, made.params)
    form = form_of(estimator, features, *layer)
    size = sum(leaf.size for leaf in jax.tree.leaves(form))
    rows.setdefault(place, Replaced(place, *row, estimator, size))
