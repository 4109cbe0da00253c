# SPDX-License-Identifier: Apache-2.0
"""Trained nnx modules, from ``nnx.BatchNorm`` to ``Norm`` and back."""

from typing import Any

from flax import nnx

from cbn_jax._adapters import running_in, with_running
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.running import from_batch_stats

from .norm import Norm


def from_batch_norm(
    module: nnx.BatchNorm, estimator: Estimator, layer: nnx.Module | None = None
) -> Norm:
    """Makes a ``Norm`` that continues from a trained ``nnx.BatchNorm``.

    Args:
      module: the trained module. Assign the result in its place.
      estimator: ``batch_norm`` with the module's ε, or any other method with running
        moments, such as ``small_batch_norm``, also inside ``corrected_inference`` and other
        wrappers. It predicts as the module did. The rest of its state starts fresh.
      layer: the trained layer before the module, for methods that look at it. From then on
        the ``Norm`` runs it.

    Returns:
      A ``Norm`` with the module's parameters, running statistics, mode and axes.

    Raises:
      ValueError: an estimator with another ε than the module, or without running moments;
        ``axis_index_groups``.
      TypeError: no estimator, as ``learned(...)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import cbn_jax
      >>> from cbn_jax.nnx import from_batch_norm
      >>> trained = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> estimator = cbn_jax.corrected_inference(cbn_jax.batch_norm(), examples=2)
      >>> norm = from_batch_norm(trained, estimator)
      >>> norm(jnp.ones((2, 4)), use_running_average=True).shape
      (2, 4)
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"from_batch_norm got {estimator!r}, expected an estimator; write "
            "from_batch_norm(module, batch_norm(...))."
        )
    if estimator.epsilon != module.epsilon:
        raise ValueError(
            f"from_batch_norm got a module with epsilon={module.epsilon} and an estimator "
            f"with epsilon={estimator.epsilon}, expected the same; write "
            f"batch_norm(epsilon={module.epsilon})."
        )
    if module.axis_index_groups is not None:
        raise ValueError(
            "from_batch_norm got a module with axis_index_groups, expected None; write "
            "jax.make_mesh((groups, devices), ('group', 'device'), ...) and "
            "axis_name='device'."
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
    moments = from_batch_stats(module.mean.get_value(), module.var.get_value())
    norm.state = with_running(norm.state, moments)
    return norm


def to_batch_norm(module: Norm, *, momentum: float = 0.99) -> nnx.BatchNorm:
    """Makes an ``nnx.BatchNorm`` that continues from a trained ``Norm``.

    This is the inverse of ``from_batch_norm``. Mean and variance are the running averages
    of the state, and ε is that of the estimator.

    It predicts as ``Norm`` did for ``batch_norm``, ``cross_iteration_batch_norm``,
    ``streaming_batch_norm`` and ``replay_batch_norm``. The same holds inside
    ``adaptive_batch_norm`` with ``inference="running"``. Predictions change if inference
    uses the example: ``corrected_inference`` and ``fitted_inference`` lose their
    correction, and ``group_batch_norm`` averages other activations.

    Args:
      module: the trained module. Assign the result in its place. Replace a ``Norm`` with a
        layer by ``nnx.Sequential(module.layer, to_batch_norm(module))``.
      momentum: decay of the new module's averages.

    Returns:
      An ``nnx.BatchNorm`` with the module's parameters, running statistics, mode and axes.

    Raises:
      ValueError: a state without running averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import cbn_jax
      >>> from cbn_jax.nnx import Norm, to_batch_norm
      >>> norm = Norm(cbn_jax.batch_norm(), num_features=4, rngs=nnx.Rngs(0))
      >>> to_batch_norm(norm)(jnp.ones((2, 4)), use_running_average=True).shape
      (2, 4)
    """
    moments = running_in(module.state)
    # Flax also passes on several names and axes.
    axis_name: Any = module.axis_name
    axis: Any = module.axis
    batch_norm = nnx.BatchNorm(
        moments.mean.shape[-1],
        use_running_average=bool(module.use_running_average),
        axis=axis,
        momentum=momentum,
        epsilon=module.estimator.epsilon,
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
