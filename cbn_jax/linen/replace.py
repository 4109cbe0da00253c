# SPDX-License-Identifier: Apache-2.0
"""Replaces the batch norms of any linen model by methods of this library."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

from cbn_jax._adapters import Kernel, LayerError, feature_shape, form_of
from cbn_jax._replacing import (
    NAMED,
    NO_LAYER,
    OTHER_AXIS,
    Outputs,
    check_epsilons,
    check_index_groups,
    check_one_layer,
    check_places,
    check_replacement,
    default_fallback,
    refuse_subclass,
)
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.report import Replaced, Report
from cbn_jax.core.statistics import normalize

from .apply import Made, Mode, made_by, normalize_in, place_of
from .extend import extend, original, running
from .layers import LINEAR

M = TypeVar("M", bound=nn.Module)


class Plan(NamedTuple):
    """The arguments of ``replace_batch_norm``."""

    estimator: Estimator
    fallback: Estimator
    kernel: Kernel | None
    classes: tuple[type, ...]
    without_layer: tuple[str, ...]

    def interceptor(self) -> Any:
        """An interceptor that runs an estimator where the model calls a batch norm."""
        return _Interceptor(self)


def replace_batch_norm(
    model: M,
    estimator: Estimator,
    *,
    fallback: Estimator | None = None,
    kernel: Kernel | None = None,
    also: tuple[type, ...] = (),
    without_layer: tuple[str, ...] = (),
) -> M:
    """Replaces every ``nn.BatchNorm`` of a model by an estimator.

    Use the result like the model: with ``init``, ``apply``, ``method=``, ``tabulate`` or
    ``bind``, or as a part of another model. Its parameters have the same names and, from
    the same key, the same values. Trained parameters and the state of an optimizer
    therefore fit. Each batch norm keeps its settings (scale, bias, initializers, axes,
    dtype, mode).

    The function finds the layer for methods that look at the layer before them. It is the
    ``nn.Conv``, ``nn.Dense`` or other linear layer whose output the batch norm receives. A
    batch norm after anything else (an activation, a sum, a concatenation, pooling) gets the
    fallback. ``report`` lists all replacements.

    A step may call a layer and its batch norm several times, for example a head shared by
    several levels. Each call then counts as a batch.
    ``small_batch_norm(batch_size, micro_batches=calls)`` pools the calls of a step exactly.

    Args:
      model: any linen module, not yet bound. It is not changed.
      estimator: the method, such as ``cbn_jax.small_batch_norm(2)``, with the ε of the
        batch norms.
      fallback: the method for batch norms without a layer, if ``estimator`` needs one. None
        means ``batch_renorm(warmup_steps=100)``, the best method without additional
        parameters. ``bidirectional_batch_norm()`` is better but adds the parameter
        ``backward``, for ``cbn_jax.optax.with_backward_statistics``.
      kernel: a function that changes the kernel of each layer before a batch norm, such as
        ``cbn_jax.standardize``.
      also: your own classes with the fields and the call of ``nn.BatchNorm``.
      without_layer: paths of batch norms that get the fallback although they have a layer.

    Returns:
      The model, an instance of a subclass of its class.

    Raises:
      TypeError: ``estimator`` is no estimator, ``model`` no module, or ``also`` or
        ``without_layer`` no tuple.
      ValueError: ``model`` is bound; a fallback that needs a layer. While initializing: no
        batch norm in the model; one with another ε or with ``axis_index_groups``; one whose
        class is a subclass not in ``also``; one that is called behind different layers; a
        path in ``without_layer`` that is none.

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
    check_replacement(model, nn.Module, estimator, fallback, also, without_layer)
    if model.scope is not None:
        raise ValueError(
            f"replace_batch_norm got a bound {type(model).__name__}, expected an unbound "
            "module; replace first, then bind."
        )
    if fallback is None:
        fallback = default_fallback(estimator)
    classes = (nn.BatchNorm, *also)
    plan = Plan(estimator, fallback, kernel, classes, without_layer)
    return extend(model, plan)


def report(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Lists the replacement of each batch norm of a model, without running the model.

    Args:
      model: from ``replace_batch_norm``.
      *args: arguments of a call of the model. Arrays may be ``jax.ShapeDtypeStruct``.
      **kwargs: keyword arguments of that call.

    Returns:
      A ``Report``. Print it, or read its rows.

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
    with recording() as records:
        jax.eval_shape(lambda key: model.lazy_init(key, *args, **kwargs), jax.random.key(0))
    return Report(tuple(row for row, _ in records.values()))


#: The row of a batch norm and the change of its layer's kernel, by path.
Records = dict[str, tuple[Replaced, Kernel | None]]

_records: contextvars.ContextVar[Records | None] = contextvars.ContextVar(
    "records", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[Records]:
    """Collects a record of each batch norm that is called."""
    records: Records = {}
    token = _records.set(records)
    try:
        with _fresh(object()):
            yield records
    finally:
        _records.reset(token)


_fresh = jax.make_user_context()  # with a new value, ``nn.jit`` does not reuse traces


class _Call(NamedTuple):
    """A call of a layer."""

    layer: nn.Module
    args: tuple[Any, ...]


class _Interceptor:
    """Runs an estimator in place of each batch norm, and records the outputs of layers."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.outputs = Outputs()
        self.layers: dict[str, str | None] = {}
        self.places: set[str] = set()

    def check_init(self, init: Callable[[], Any]) -> None:
        """Checks that the model has batch norms, including those that ``nn.jit`` cached."""
        if self.places:
            check_places(self.plan.without_layer, self.places)
            return
        with recording() as records, nn.intercept_methods(self):
            jax.eval_shape(lambda: (init(), None)[1])
        if not records:
            raise ValueError(
                "replace_batch_norm got a model without nn.BatchNorm, expected at least "
                "one; name classes of your own in also=(...)."
            )

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        inner = running() != self.plan  # a part with its own replacement
        if original(type(module)) in self.plan.classes and not inner:
            return self._normalize(module, *args, **kwargs)
        if not inner:
            _check_class(module)
        y = next_fun(*args, **kwargs)
        if isinstance(module, LINEAR):
            self.outputs.note(y, _Call(module, (*args, *kwargs.values())))
        return y

    def _normalize(self, module, x, use_running_average=None, *, mask=None):
        self.places.add(place_of(module))
        _check_batch_norm(module, self.plan.estimator)
        running = nn.merge_param(
            "use_running_average", module.use_running_average, use_running_average
        )
        estimator, made, row = self._chosen(module, x)
        kernel = None if made is None else self.plan.kernel
        if made is not None and kernel is not None:
            x = made.layer.apply(made.params, made.inputs)
        if "layered" not in estimator.traits:
            made = None
        _record(row, estimator, x, made, module, kernel)
        mode = Mode(bool(running), mask)
        return normalize_in(module, estimator, x, made, mode, _output(module))

    def _chosen(self, module: Any, x: jax.Array) -> tuple[Estimator, Made | None, Any]:
        """The method for a batch norm, the layer behind ``x``, and the reason for none."""
        estimator, kernel = self.plan.estimator, self.plan.kernel
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
        return self.plan.fallback if layered else estimator, None, (None, made)

    def _made(self, module: Any, x: jax.Array, call: _Call | None) -> Made | str:
        """The layer that made ``x``, or the reason why it cannot be used."""
        if place_of(module) in self.plan.without_layer:
            return NAMED
        if call is None:
            return NO_LAYER
        if module.axis not in (-1, x.ndim - 1):
            return OTHER_AXIS
        if len(call.args) != 1:
            return f"{place_of(call.layer)} has several arguments"
        try:
            return made_by(call.layer, call.args[0], self.plan.kernel)
        except LayerError as error:
            return f"{place_of(call.layer)} {error.reason}"

    def _check_calls(self, module: Any, layer: str | None) -> None:
        """Checks that all calls have one layer, because a state belongs to one layer."""
        place = place_of(module)
        check_one_layer(place, self.layers.setdefault(place, layer), layer)


def _output(module: Any) -> Any:
    """Normalizes to the dtype of Flax's output."""

    def output(x, statistics, affine, mask):
        del mask
        dtype = canonicalize_dtype(x, *affine, dtype=module.dtype)
        return normalize(x, statistics, *affine, dtype=dtype)

    return output


def _check_class(module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm):
        refuse_subclass(type(module).__name__, place_of(module), "nn")


_NEEDED = "axis", "axis_name", "bias_init", "dtype", "epsilon", "param_dtype", "scale_init"
_NEEDED = *_NEEDED, "use_bias", "use_running_average", "use_scale"


def _check_batch_norm(module: Any, estimator: Estimator) -> None:
    """Checks for Flax's fields, the ε of the method, and no index groups."""
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"replace_batch_norm got {type(module).__name__} at {place_of(module)} without "
            f"{', '.join(missing)}, expected the fields of nn.BatchNorm; add them."
        )
    check_index_groups(place_of(module), module)
    check_epsilons(place_of(module), module.epsilon, estimator)


def _record(
    row: tuple[str | None, str],
    estimator: Estimator,
    x: jax.Array,
    made: Made | None,
    module: Any,
    kernel: Kernel | None,
) -> None:
    """Adds a record while ``recording`` is active."""
    records = _records.get()
    if records is None:
        return
    place, features = place_of(module), math.prod(feature_shape(x, module.axis))
    layer = (None, None) if made is None else (made.layer, made.params)
    form = form_of(estimator, features, *layer)
    size = sum(leaf.size for leaf in jax.tree.leaves(form))
    records.setdefault(place, (Replaced(place, *row, estimator, size), kernel))
