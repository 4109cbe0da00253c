# SPDX-License-Identifier: Apache-2.0
"""Flax linen: one module for every method, a drop-in for ``nn.BatchNorm``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._adapter import flag_of, patches_of, require_flax, to_last
from ._estimator import Estimator
from ._layer import Layer, dense_patches
from ._moments import AxisName
from ._source import run_layer
from ._statistics import normalize

with require_flax("cbn_jax.linen"):
    from flax import linen as nn


class Norm(nn.Module):
    """Normalizes activations with any estimator of this library.

    ``Norm(estimator)(x)`` stands where ``nn.BatchNorm()(x)`` stood.
    ``Norm(estimator, layer=nn.Conv(...))(z)`` runs the layer first and lets the estimator
    see its parameters; every method accepts that form, cross-iteration methods need it.
    The layer's parameters stay where they were: ``Conv_0/kernel`` remains
    ``Conv_0/kernel``.

    Learned ``scale`` and ``bias`` are in the collection ``params``, the estimator's state
    is in ``batch_stats``: make that one mutable in training, as for ``nn.BatchNorm``. While
    initializing the state is not updated and no collective runs.

    Attributes:
      estimator: the method, such as ``cbn_jax.batch_norm(momentum=0.9)``; decay and ε are
        its arguments.
      layer: a module that is linear in its parameters (``nn.Conv``, ``nn.Dense``, …), run
        before normalizing.
      use_running_average: True for inference, False for training; give it here or in the
        call, not in both.
      axis: the feature axis; ``layer`` needs features last.
      dtype: dtype of the result; None for the dtype of the activations.
      param_dtype: dtype of ``scale`` and ``bias``.
      use_bias: whether to add a learned ``bias``.
      use_scale: whether to multiply by a learned ``scale``.
      bias_init: initializer of ``bias``.
      scale_init: initializer of ``scale``.
      axis_name: axis of ``shard_map``, ``pmap`` or ``vmap`` over which the batch is
        spread; None under ``jit``, also with a sharded batch.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.linen import Norm
      >>> estimator = cbn_jax.cross_iteration_batch_norm(window=8)
      >>> model = Norm(estimator, layer=nn.Dense(4), use_running_average=False)
      >>> z = jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), z)
      >>> y, updates = model.apply(variables, z, mutable=["batch_stats"])
      >>> y.shape
      (2, 4)
    """

    estimator: Estimator
    layer: nn.Module | None = None
    use_running_average: bool | None = None
    axis: int = -1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    axis_name: AxisName = None

    @nn.compact
    def __call__(
        self,
        inputs: Any,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``inputs``, or the layer's output for them.

        Args:
          inputs: activations, or the layer's input if the module has one.
          use_running_average: True for inference, False for training; give it here or in
            the constructor, not in both.
          mask: broadcastable to the activations, True where a value counts. Statistics
            ignore the others; the output is computed everywhere.

        Returns:
          Normalized activations.
        """
        running = flag_of(self.use_running_average, use_running_average)
        x, source = self._run_layer(inputs)
        x, mask, back = to_last(x, mask, self.axis)
        features = x.shape[-1]
        params, groups = (None, 1) if source is None else (source.params, source.groups)
        state = self.variable(
            "batch_stats", "state", lambda: self.estimator.init(features, params, groups)
        )
        if running or self.is_initializing():
            statistics = self.estimator.infer(state.value, x)
        else:
            statistics, state.value = self.estimator.train(
                state.value, x, source, axis_name=self.axis_name, mask=mask
            )
        scale, bias = self._affine(features)
        y = back(normalize(x, statistics, scale, bias))
        return y if self.dtype is None else y.astype(self.dtype)

    def _run_layer(self, inputs):
        if self.layer is None:
            return inputs, None
        if self.is_initializing():
            self.layer(inputs)
        layer, params = _as_layer(self.layer)
        return run_layer(layer, params, inputs, axis_name=self.axis_name)

    def _affine(self, features):
        def param(use, name, init):
            return self.param(name, init, (features,), self.param_dtype) if use else None

        return (
            param(self.use_scale, "scale", self.scale_init),
            param(self.use_bias, "bias", self.bias_init),
        )


def _as_layer(layer: nn.Module) -> tuple[Layer, Any]:
    """The module as a pure function of its parameters, of any number of features."""
    module, variables = layer.unbind()
    params = variables.get("params", {})
    others = {name: value for name, value in variables.items() if name != "params"}

    def apply(params, inputs):
        width = {leaf.shape[-1] for leaf in jax.tree.leaves(params)}
        # Linen layers hold their width; a change of it is a change of the layer.
        if len(width) == 1 and isinstance(getattr(module, "features", None), int):
            resized = module.clone(features=width.pop())
        else:
            resized = module
        x: Any = resized.apply({"params": params, **others}, inputs)
        return x

    if isinstance(module, nn.Dense):
        return Layer(apply, dense_patches), params
    if isinstance(module, nn.Conv):
        return Layer(apply, patches_of(module), module.feature_group_count), params
    return Layer(apply, groups=getattr(module, "feature_group_count", 1)), params
