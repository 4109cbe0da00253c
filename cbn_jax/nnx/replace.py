# SPDX-License-Identifier: Apache-2.0
"""Replaces the batch norms of any nnx model by methods of this library."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from cbn_jax._adapters import Kernel
from cbn_jax._replacing import (
    check_epsilons,
    check_index_groups,
    check_places,
    check_replacement,
    default_fallback,
    refuse_subclass,
)
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.named import find_running, put_running
from cbn_jax.core.report import Replaced, Report
from cbn_jax.core.running import from_batch_stats
from cbn_jax.core.statistics import normalize

from .follow import OUTPUTS, Call, Seen, become, exchange, follow, nodes_of, recording
from .layers import as_layer, run_changed
from .norm import Norm, backward_of
from .state import metadata_of, store

M = TypeVar("M", bound=nnx.Module)


def replace_batch_norm(
    model: M,
    estimator: Estimator,
    *inputs: Any,
    fallback: Estimator | None = None,
    kernel: Kernel | None = None,
    also: tuple[type, ...] = (),
    without_layer: tuple[str, ...] = (),
    **arguments: Any,
) -> M:
    """Copies a model with an estimator in place of every ``nnx.BatchNorm``.

    Use the copy like the model: with ``nnx.jit``, ``split`` and ``merge``, ``train()`` and
    ``eval()``, and checkpoints. Its parameters are those of the model, at the same paths.
    The trained averages continue as ``mean`` and ``var`` of the new method. Each batch norm
    keeps its settings (scale, bias, axis, dtype, mode). The arrays are shared, not copied.

    The function finds the layer for methods that look at the layer before them. It is the
    ``nnx.Conv``, ``nnx.Linear`` or other linear layer whose output the batch norm receives
    in an abstract call of the model. A batch norm after anything else (an activation, a
    sum, a concatenation, pooling) gets the fallback. ``report`` lists all replacements.

    A step may call a layer and its batch norm several times, for example a head shared by
    several levels. Each call then counts as a batch.
    ``small_batch_norm(batch_size, micro_batches=calls)`` pools the calls of a step exactly.

    Args:
      model: any nnx module. It is not changed.
      estimator: the method, such as ``cbn_jax.small_batch_norm(2)``, with the ε of the
        batch norms.
      *inputs: inputs of a call of the model. Arrays may be ``jax.ShapeDtypeStruct``.
      fallback: the method for batch norms without a layer, if ``estimator`` needs one. None
        means ``batch_renorm(warmup_steps=100)``, the best method without additional
        parameters. ``bidirectional_batch_norm()`` is better but adds the parameter
        ``backward``, for ``cbn_jax.optax.with_backward_statistics``.
      kernel: a function that changes the kernel of each layer before a batch norm, such as
        ``cbn_jax.standardize``.
      also: your own classes with the attributes and the call of ``nnx.BatchNorm``.
      without_layer: paths of batch norms that get the fallback although they have a layer.
      **arguments: keyword arguments of that call.

    Returns:
      A model of the same class.

    Raises:
      TypeError: ``estimator`` is no estimator, ``model`` no module, or ``also`` or
        ``without_layer`` no tuple.
      ValueError: a fallback that needs a layer; no batch norm in the model; one with
        another ε or with ``axis_index_groups``; one whose class is a subclass not in
        ``also``; one that is called behind different layers; a path in
        ``without_layer`` that is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import cbn_jax
      >>> from cbn_jax.nnx import replace_batch_norm, report
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
      >>> x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
      >>> model = replace_batch_norm(model, cbn_jax.small_batch_norm(batch_size=2), x)
      >>> model(jnp.ones((2, 3))).shape
      (2, 4)
      >>> [(row.path, row.layer) for row in report(model).rows]
      [('layers/1', 'layers/0')]
    """
    check_replacement(model, nnx.Module, estimator, fallback, also, without_layer)
    if fallback is None:
        fallback = default_fallback(estimator)
    plan = _Plan(estimator, fallback, kernel, (nnx.BatchNorm, *also), without_layer)
    seen = follow(model, plan.classes, inputs, arguments, kernel, without_layer, plan.looks)
    copy = nnx.clone(model)
    nodes = nodes_of(copy)
    norms = {path: node for path, node in nodes.items() if type(node) in plan.classes}
    _check_norms(nodes, norms, estimator)
    check_places(without_layer, norms)
    new = {}
    for path, norm in norms.items():
        found = _chosen(path, seen, plan)
        layer = None if found.layer is None else nodes[found.layer]
        new[id(norm)] = ReplacedBatchNorm(norm, found, layer, plan)
        if found.layer is not None:
            become(layer, recording(type(layer)), found.layer)
    exchange(nodes, new)
    return new.get(id(copy), copy)


def report(model: nnx.Module) -> Report:
    """Lists the replacement of each batch norm of a model.

    Args:
      model: from ``replace_batch_norm``.

    Returns:
      A ``Report``. Print it, or read its rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import cbn_jax
      >>> from cbn_jax.nnx import replace_batch_norm, report
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
      >>> model = replace_batch_norm(model, cbn_jax.batch_norm(), jnp.ones((2, 3)))
      >>> report(model).rows[0].state_size
      12
    """
    norms = {
        path: node
        for path, node in nodes_of(model).items()
        if isinstance(node, ReplacedBatchNorm)
    }
    rows = [
        Replaced(path, norm.found.layer, norm.found.reason, norm.estimator, _size(norm))
        for path, norm in sorted(norms.items(), key=lambda item: item[1].found.position)
    ]
    return Report(tuple(rows))


class _Plan(NamedTuple):
    """The arguments of ``replace_batch_norm``."""

    estimator: Estimator
    fallback: Estimator
    kernel: Kernel | None
    classes: tuple[type, ...]
    without_layer: tuple[str, ...]

    @property
    def looks(self) -> bool:
        """Whether the method or a kernel function uses the layer before a batch norm."""
        return "layered" in self.estimator.traits or self.kernel is not None


class ReplacedBatchNorm(Norm):
    """A ``Norm`` in the place of a batch norm, with its parameters and settings.

    The model calls its layer. This module finds the layer's input by the identity of the
    output.
    """

    def __init__(self, norm: Any, found: Seen, layer: nnx.Module | None, plan: _Plan):
        layered = "layered" in plan.estimator.traits
        self.estimator = plan.fallback if layered and layer is None else plan.estimator
        self.layer = None
        self.kernel = None if layer is None else plan.kernel
        self.found = found
        self.num_features = norm.num_features
        for name in ("param_dtype", "use_running_average", "axis", "axis_name"):
            setattr(self, name, getattr(norm, name))
        self.dtype = norm.dtype
        self.scale, self.bias = nnx.data(norm.scale), nnx.data(norm.bias)
        self.mix = nnx.data(None)
        self.backward = nnx.data(backward_of(self.estimator, self.num_features))
        state = _state(self.estimator, norm, layer, plan.kernel)
        self.structure = jax.tree.structure(state)
        store(self, state, {} if layer is None else metadata_of(layer))

    def _run_layer(self, inputs):
        if self.kernel is None:
            return inputs
        call = self._call(inputs)
        return run_changed(call.layer, self.kernel, call.args[0])

    def _seen_layer(self, inputs):
        if "layered" not in self.estimator.traits:
            return None
        call = self._call(inputs)
        return *as_layer(call.layer, call.args[0], self.kernel), call.args[0]

    def _call(self, x: jax.Array) -> Call:
        """The call of the layer that gave ``x``."""
        call = OUTPUTS.find(x)
        if call is None or call.layer.module_path != self.found.layer:
            raise ValueError(
                "a model of replace_batch_norm got a call in which a norm does not follow "
                f"{self.found.layer}, expected this layer before the norm; write "
                "replace_batch_norm(model, estimator, inputs) with the inputs and the mode "
                "of training, or without_layer=(path,)."
            )
        return call

    def _output(self, x, statistics, mask):
        del mask
        # As in Flax, half precision becomes float32 unless the module has a dtype.
        dtype = self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        return normalize(x, statistics, *self._affine(), dtype=dtype)


def _state(
    estimator: Estimator, norm: Any, layer: nnx.Module | None, kernel: Kernel | None
) -> Any:
    """A fresh state that continues from the averages of a batch norm."""
    mean, var = norm.mean.get_value(), norm.var.get_value()
    stack = mean.shape[:-1]  # axes of layers, under nnx.vmap and nnx.scan
    spec, params = (None, None) if layer is None else as_layer(layer, None, kernel)
    params = jax.tree.map(lambda leaf: leaf[(0,) * len(stack)], params)
    state = estimator.init(norm.num_features, spec, params)
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*stack, *leaf.shape)), state)
    # A batch norm without any batch has averages of 0 and 1.
    fresh = (mean == 0).all() & (var == 1).all()
    moments = from_batch_stats(mean, var)
    moments = moments._replace(steps=jnp.where(fresh, 0.0, moments.steps))
    places = find_running(state)
    return put_running(state, dict.fromkeys(places, moments))


def _size(norm: ReplacedBatchNorm) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(norm.state))


def _chosen(path: str, seen: dict[str, Seen], plan: _Plan) -> Seen:
    """The findings for a batch norm; without a reason if the method needs no layer."""
    found = seen.get(path, Seen(None, "not called with these inputs", len(seen)))
    return found if plan.looks else found._replace(reason="")


def _check_norms(
    nodes: dict[str, Any], norms: dict[str, Any], estimator: Estimator
) -> None:
    """Checks that there are batch norms, and that all of them can be replaced."""
    for path, node in nodes.items():
        if isinstance(node, nnx.BatchNorm) and path not in norms:
            refuse_subclass(type(node).__name__, path, "nnx")
    if not norms:
        raise ValueError(
            "replace_batch_norm got a model without nnx.BatchNorm, expected at least one; "
            "name classes of your own in also=(...)."
        )
    for path, norm in norms.items():
        check_index_groups(path, norm)
        check_epsilons(path, norm.epsilon, estimator)
