# SPDX-License-Identifier: Apache-2.0
"""The linen module that normalizes with any estimator."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cbn_jax._adapters import Kernel, check_modules, estimator_of, flag_of
from cbn_jax.core.checks import check_axis
from cbn_jax.core.devices import AxisName
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.statistics import normalize
from cbn_jax.wrappers.learned import Learned

from .apply import Mode, made_by, normalize_in, run_changed


class Norm(nn.Module):
    """Normalizes activations with any estimator of this library.

    ``Norm(estimator)(x)`` replaces ``nn.BatchNorm()(x)``.
    ``Norm(estimator, layer=nn.Conv(...))(z)`` runs the layer first and gives the estimator
    access to its parameters. Every method accepts this form, and cross-iteration methods
    need it. The layer's parameters keep their place: ``Conv_0/kernel`` remains
    ``Conv_0/kernel``. In ``setup``, make the layer an attribute first. If ``setup`` creates
    it in the call of ``Norm``, its parameters are below the ``Norm``, as ``layer``.

    Learned ``scale`` and ``bias`` are in the collection ``params``. The estimator's state
    is in ``batch_stats``: make that collection mutable in training, as for
    ``nn.BatchNorm``. Initialization does not update the state and runs no collective.
    Methods with backward statistics have a parameter ``backward``, which the optimizer
    writes. Wrap the optimizer in ``cbn_jax.optax.with_backward_statistics``.

    Attributes:
      estimator: the method, such as ``cbn_jax.batch_norm(momentum=0.9)``. Decay and ε are
        its arguments. With ``cbn_jax.learned(cbn_jax.group_batch_norm, ...)`` the module
        learns the weight of the method, as the sigmoid of a parameter ``mix``.
      layer: a module that is linear in its parameters (``nn.Conv``, ``nn.Dense``, …), run
        before normalizing.
      kernel: a function that changes the layer's kernel before its use:
        ``cbn_jax.standardize``, ``cbn_jax.center`` or your own. It returns a kernel of the
        same shape.
      use_running_average: True for inference, False for training. Give it here or in the
        call, not in both.
      axis: the feature axis, or several; ``layer`` needs features last.
      dtype: dtype of the result; None for the dtype of the activations.
      param_dtype: dtype of ``scale`` and ``bias``.
      use_bias: whether to add a learned ``bias``.
      use_scale: whether to multiply by a learned ``scale``.
      bias_init: initializer of ``bias``.
      scale_init: initializer of ``scale``.
      mix_init: initializer of ``mix``, a scalar.
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

    estimator: Estimator | Learned
    layer: nn.Module | None = None
    kernel: Kernel | None = None
    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    mix_init: Callable[..., jax.Array] = nn.initializers.ones
    axis_name: AxisName = None

    @nn.compact
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
          use_running_average: True for inference, False for training. Give it here or in
            the constructor, not in both.
          mask: True where a value counts. It has the axes of the activations, each of size
            1 or of their size. Statistics ignore the other values, in training and
            inference. The output is computed everywhere.
          update_stats: False trains with the method's statistics and does not change its
            state.

        Returns:
          Normalized activations.
        """
        check_modules(self.estimator, self.layer, nn.Module)
        running = flag_of(self.use_running_average, use_running_average)
        estimator = estimator_of(
            self.estimator, lambda: self.param("mix", self.mix_init, (), self.param_dtype)
        )
        x = self._run_layer(inputs)
        if self.layer is not None:
            check_axis(self.axis, x, repr(self.layer).splitlines()[0])
        made = None
        if self.layer is not None and "layered" in estimator.traits:
            made = made_by(self.layer, inputs, self.kernel)
        mode = Mode(running, mask, update_stats)
        return normalize_in(self, estimator, x, made, mode, self._output)

    def _output(self, x, statistics, affine, mask):
        """The steps after the statistics; EvoNorm also activates here."""
        del mask
        return normalize(x, statistics, *affine, dtype=self.dtype)

    def _run_layer(self, inputs):
        if self.layer is None:
            if self.kernel is not None:
                raise ValueError(
                    "Norm got kernel=... without a layer, expected a layer with a "
                    "parameter kernel; write Norm(estimator, layer=Conv(...), kernel=...)."
                )
            return inputs
        if self.kernel is None:
            return self.layer(inputs)
        if self.is_initializing():  # creates the parameters that change
            self.layer(inputs)
        return run_changed(self.layer, self.kernel, inputs)
