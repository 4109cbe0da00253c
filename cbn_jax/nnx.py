# SPDX-License-Identifier: Apache-2.0
"""Flax nnx: one module for every method, a drop-in for ``nnx.BatchNorm``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._adapter import (
    check_modules,
    estimator_of,
    flag_of,
    patches_of,
    require,
    running_in,
    to_last,
    with_running,
)
from ._estimator import Estimator
from ._layer import Layer, dense_patches
from ._moments import AxisName
from ._running import running_moments
from ._source import run_layer
from ._statistics import normalize

with require("Flax", "cbn_jax.nnx"):
    from flax import nnx


class Norm(nnx.Module):
    """Normalizes activations with any estimator of this library.

    ``Norm(estimator, num_features=64, rngs=rngs)`` stands where
    ``nnx.BatchNorm(64, rngs=rngs)`` stood. ``Norm(estimator, layer=nnx.Conv(...),
    rngs=rngs)`` runs the layer first and lets the estimator see its parameters; every
    method accepts that form, cross-iteration methods need it.

    ``scale`` and ``bias`` are ``nnx.Param``, the estimator's state is one
    ``nnx.BatchStat``. ``model.train()`` and ``model.eval()`` switch the mode.

    Args:
      estimator: the method, such as ``cbn_jax.batch_norm(momentum=0.9)``; decay and ε are
        its arguments. Or a function of a weight in [0, 1] that gives one, such as
        ``cbn_jax.group_batch_norm``; the module then learns the weight, as the sigmoid of
        a parameter ``mix``.
      layer: a module that is linear in its parameters (``nnx.Conv``, ``nnx.Linear``, …),
        run before normalizing.
      num_features: size of the feature axis; not needed where the layer tells it.
      use_running_average: True for inference, False for training; a call may override it.
      axis: the feature axis; ``layer`` needs features last.
      dtype: dtype of the result; None for the dtype of the activations.
      param_dtype: dtype of ``scale`` and ``bias``.
      use_bias: whether to add a learned ``bias``.
      use_scale: whether to multiply by a learned ``scale``.
      bias_init: initializer of ``bias``.
      scale_init: initializer of ``scale``.
      mix_init: initializer of ``mix``, a scalar.
      axis_name: axis of ``shard_map``, ``pmap`` or ``vmap`` over which the batch is
        spread; None under ``jit``, also with a sharded batch.
      rngs: random number generators for the initializers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import cbn_jax
      >>> from cbn_jax.nnx import Norm
      >>> rngs = nnx.Rngs(0)
      >>> estimator = cbn_jax.cross_iteration_batch_norm(window=8)
      >>> model = Norm(estimator, layer=nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
      >>> model(jnp.ones((2, 3))).shape
      (2, 4)
    """

    def __init__(
        self,
        estimator: Estimator | Callable[[jax.Array], Estimator],
        layer: nnx.Module | None = None,
        *,
        num_features: int | None = None,
        use_running_average: bool | None = False,
        axis: int = -1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., jax.Array] = nnx.initializers.zeros,
        scale_init: Callable[..., jax.Array] = nnx.initializers.ones,
        mix_init: Callable[..., jax.Array] = nnx.initializers.ones,
        axis_name: AxisName = None,
        rngs: nnx.Rngs,
    ):
        check_modules(estimator, layer, nnx.Module)
        spec, params = (None, None) if layer is None else _as_layer(layer)
        features = _features(num_features, params)
        self.estimator = estimator
        self.layer = layer
        self.use_running_average = use_running_average
        self.axis = axis
        self.dtype = dtype
        self.axis_name = axis_name

        def param(use, init, shape=(features,)):
            return nnx.Param(init(rngs.params(), shape, param_dtype)) if use else None

        self.scale = nnx.data(param(use_scale, scale_init))
        self.bias = nnx.data(param(use_bias, bias_init))
        self.mix = nnx.data(param(not isinstance(estimator, Estimator), mix_init, ()))
        self.state = nnx.BatchStat(
            self._estimator().init(features, params, spec.groups if spec else 1)
        )

    def __call__(
        self,
        inputs: Any,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: bool = True,
    ) -> jax.Array:
        """Normalizes ``inputs``, or the layer's output for them.

        Args:
          inputs: activations, or the layer's input if the module has one.
          use_running_average: overrides the module's own.
          mask: broadcastable to the activations, True where a value counts. Statistics
            ignore the others; the output is computed everywhere.
          update_stats: False trains with the method's statistics and leaves its state as
            it is.

        Returns:
          Normalized activations.
        """
        if use_running_average is None:
            running = flag_of(self.use_running_average, None)
        else:
            running = use_running_average
        estimator = self._estimator()
        x, source = self._run_layer(inputs)
        x, mask, back = to_last(x, mask, self.axis)
        state = self.state.get_value()
        if running:
            statistics = estimator.infer(state, x)
        else:
            statistics, state = estimator.train(
                state, x, source, axis_name=self.axis_name, mask=mask
            )
            if update_stats:
                self.state.set_value(state)
        y = back(normalize(x, statistics, _value(self.scale), _value(self.bias)))
        return y if self.dtype is None else y.astype(self.dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Switches the mode, for ``nnx.view(model, use_running_average=...)``."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _estimator(self):
        return estimator_of(self.estimator, lambda: _value(self.mix))

    def _run_layer(self, inputs):
        if self.layer is None:
            return inputs, None
        layer, params = _as_layer(self.layer)
        return run_layer(layer, params, inputs, axis_name=self.axis_name)


def from_batch_norm(
    module: nnx.BatchNorm, estimator: Estimator, layer: nnx.Module | None = None
) -> Norm:
    """A ``Norm`` that goes on where a trained ``nnx.BatchNorm`` stands.

    Args:
      module: the trained module; assign the result where it was.
      estimator: ``batch_norm`` with the module's ε, or any other with running moments,
        such as ``small_batch_norm``, also inside ``corrected_inference`` and other
        wrappers. It predicts as the module did, and what it remembers besides begins anew.
      layer: the trained layer before the module, for methods that look at it; it is run
        by the ``Norm`` from then on.

    Returns:
      A ``Norm`` with the module's parameters, running statistics, mode and axes.

    Raises:
      ValueError: an estimator without running moments; ``axis_index_groups``.
      TypeError: a function of a learned weight instead of an estimator.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import cbn_jax
      >>> from cbn_jax.nnx import from_batch_norm
      >>> trained = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> estimator = cbn_jax.corrected_inference(cbn_jax.batch_norm(), batch_size=2)
      >>> norm = from_batch_norm(trained, estimator)
      >>> norm(jnp.ones((2, 4)), use_running_average=True).shape
      (2, 4)
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"from_batch_norm got {estimator!r}, expected an estimator; write "
            "from_batch_norm(module, batch_norm(...))."
        )
    if module.axis_index_groups is not None:
        raise ValueError(
            "from_batch_norm got a module with axis_index_groups, expected None; use a "
            "mesh with an axis for each group and give axis_name."
        )
    norm = Norm(
        estimator,
        layer=layer,
        num_features=module.num_features,
        use_running_average=module.use_running_average,
        axis=module.axis,
        dtype=module.dtype,
        use_bias=module.bias is not None,
        use_scale=module.scale is not None,
        axis_name=module.axis_name,
        rngs=nnx.Rngs(0),
    )
    for mine, theirs in ((norm.scale, module.scale), (norm.bias, module.bias)):
        if mine is not None and theirs is not None:
            mine.set_value(theirs.get_value())
    moments = running_moments(module.mean.get_value(), module.var.get_value())
    norm.state.set_value(with_running(norm.state.get_value(), moments))
    return norm


def to_batch_norm(
    module: Norm, *, momentum: float = 0.99, epsilon: float = 1e-5
) -> nnx.BatchNorm:
    """An ``nnx.BatchNorm`` that goes on where a trained ``Norm`` stands.

    The inverse of ``from_batch_norm``: mean and variance are those of the one
    ``RunningMoments`` in the state. With the estimator's ε it predicts what ``Norm`` did,
    for ``batch_norm``, ``cross_iteration_batch_norm``, ``streaming_batch_norm`` and
    ``replay_batch_norm``, also inside ``adaptive_batch_norm`` with ``inference="running"``.
    It does not where inference looks at the example: ``corrected_inference`` and
    ``fitted_inference`` lose their correction, and ``group_batch_norm`` has averages of
    other activations.

    Args:
      module: the trained module; assign the result where it was. A ``Norm`` with a layer is
        replaced by ``nnx.Sequential(module.layer, to_batch_norm(module))``.
      momentum: decay of the new module's averages.
      epsilon: that of the estimator.

    Returns:
      An ``nnx.BatchNorm`` with the module's parameters, running statistics, mode and axes.

    Raises:
      ValueError: a state without exactly one ``RunningMoments``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import cbn_jax
      >>> from cbn_jax.nnx import Norm, to_batch_norm
      >>> norm = Norm(cbn_jax.batch_norm(), num_features=4, rngs=nnx.Rngs(0))
      >>> to_batch_norm(norm)(jnp.ones((2, 4)), use_running_average=True).shape
      (2, 4)
    """
    moments = running_in(module.state.get_value())
    axis_name: Any = module.axis_name  # Flax hands on several names too
    batch_norm = nnx.BatchNorm(
        moments.mean.shape[-1],
        use_running_average=bool(module.use_running_average),
        axis=module.axis,
        momentum=momentum,
        epsilon=epsilon,
        dtype=module.dtype,
        use_bias=module.bias is not None,
        use_scale=module.scale is not None,
        axis_name=axis_name,
        rngs=nnx.Rngs(0),
    )
    for mine, theirs in ((module.scale, batch_norm.scale), (module.bias, batch_norm.bias)):
        if mine is not None and theirs is not None:
            theirs.set_value(mine.get_value())
    batch_norm.mean.set_value(moments.mean)
    batch_norm.var.set_value(moments.var)
    return batch_norm


def _as_layer(layer: nnx.Module) -> tuple[Layer, Any]:
    """The module as a pure function of its parameters, a plain dict of arrays."""
    graph, params, others = nnx.split(layer, nnx.Param, ...)
    structure = jax.tree.structure(params)

    def apply(params, inputs):
        params = jax.tree.unflatten(structure, jax.tree.leaves(params))
        return nnx.merge(graph, params, others)(inputs)

    params = nnx.to_pure_dict(params)
    if isinstance(layer, nnx.Linear):
        return Layer(apply, dense_patches), params
    groups = getattr(layer, "feature_group_count", 1)
    return Layer(
        apply, patches_of(layer) if isinstance(layer, nnx.Conv) else None, groups
    ), params


def _features(num_features: int | None, params: Any) -> int:
    """The number of features, given or read off the layer's parameters."""
    if num_features is not None:
        return num_features
    widths = {leaf.shape[-1] for leaf in jax.tree.leaves(params)}
    if len(widths) != 1:
        raise ValueError(
            f"Norm got num_features=None and layer parameters with last axes "
            f"{sorted(widths)}, expected one size; write num_features=..."
        )
    return widths.pop()


def _value(variable: nnx.Param | None) -> jax.Array | None:
    return None if variable is None else variable.get_value()
