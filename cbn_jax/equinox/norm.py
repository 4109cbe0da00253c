# SPDX-License-Identifier: Apache-2.0
"""The Equinox module that normalizes with any estimator."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax._adapters import estimator_of
from cbn_jax.core.backward import BackwardStatistics, Bidirectional
from cbn_jax.core.devices import AxisName
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.source import run_layer
from cbn_jax.core.statistics import normalize
from cbn_jax.wrappers.learned import Learned

from .layers import as_layer, check_layer, sizes_of


class Norm(eqx.nn.StatefulLayer):
    """Normalizes activations with any estimator of this library.

    ``Norm(estimator, num_features=64, axis_name="batch")`` replaces ``eqx.nn.BatchNorm(64,
    "batch")``, also inside ``eqx.nn.Sequential``. ``Norm(estimator,
    layer=eqx.nn.Conv2d(...), axis_name="batch")`` runs the layer first and gives the
    estimator access to its parameters. Every method accepts this form, and cross-iteration
    methods need it.

    A call takes one example, channels first. Map the model over the batch. The estimator's
    state is in ``eqx.nn.State``. ``eqx.nn.inference_mode`` switches the mode. Inference
    needs no axis name. Only methods that predict from a batch, such as
    ``cbn_jax.mixed_inference``, need one to access the batch. Methods with backward
    statistics have a parameter ``backward``, which the optimizer writes. Wrap the optimizer
    in ``cbn_jax.optax.with_backward_statistics``.

    Args:
      estimator: the method, such as ``cbn_jax.batch_norm(momentum=0.9)``. Decay and ε are
        its arguments. With ``cbn_jax.learned(cbn_jax.group_batch_norm, ...)`` the module
        learns the weight of the method, as the sigmoid of a parameter ``mix``.
      layer: an ``eqx.nn.Linear`` or ``eqx.nn.Conv`` (``Conv1d``, ``Conv2d``, ``Conv3d``),
        run before normalizing.
      num_features: number of channels; not needed if the layer determines it.
      axis_name: the ``axis_name`` of the ``jax.vmap`` over the batch. If devices share the
        batch under ``shard_map`` or ``pmap``, give a tuple with the name of the ``vmap``
        last. None if every call is a separate batch.
      use_scale: whether to multiply by a learned ``scale``.
      use_bias: whether to add a learned ``bias``.
      dtype: dtype of the result; None for the dtype of the activations.
      inference: True for inference, False for training; a call may override it.

    Example:
      >>> import equinox as eqx
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.equinox import Norm
      >>> layer = eqx.nn.Linear(3, 4, key=jax.random.key(0))
      >>> model, state = eqx.nn.make_with_state(Norm)(
      ...     cbn_jax.small_batch_norm(batch_size=2), layer, axis_name="batch"
      ... )
      >>> train = jax.vmap(
      ...     model, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
      ... )
      >>> y, state = train(jnp.ones((2, 3)), state)
      >>> y.shape
      (2, 4)
      >>> model = eqx.nn.inference_mode(model)
      >>> y, _ = jax.vmap(model, in_axes=(0, None))(jnp.ones((5, 3)), state)
      >>> y.shape
      (5, 4)

    Differs from ``eqx.nn.BatchNorm``: the parameter ``weight`` is called ``scale``.
    Training normalizes with the statistics of the method, as ``mode="batch"`` does with
    those of a batch.
    """

    layer: eqx.nn.Linear | eqx.nn.Conv | None
    scale: jax.Array | None
    bias: jax.Array | None
    mix: jax.Array | None
    backward: BackwardStatistics | None
    state_index: eqx.nn.StateIndex[Any]
    inference: bool
    estimator: Estimator | Learned = eqx.field(static=True)
    channels: int = eqx.field(static=True)
    axis_name: AxisName = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(
        self,
        estimator: Estimator | Learned,
        layer: eqx.nn.Linear | eqx.nn.Conv | None = None,
        *,
        num_features: int | None = None,
        axis_name: AxisName,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
        inference: bool = False,
    ):
        _check_estimator(estimator)
        self.channels, features = _sizes(layer, num_features)
        self.estimator = estimator
        self.layer = layer
        self.scale = jnp.ones(features, jnp.float32) if use_scale else None
        self.bias = jnp.zeros(features, jnp.float32) if use_bias else None
        self.mix = jnp.float32(1.0) if isinstance(estimator, Learned) else None
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.dtype = dtype
        self.inference = inference
        method, self.backward = self._estimator(), None
        if isinstance(method, Bidirectional):
            self.backward = method.init_backward(features)
        spec, params = (None, None) if layer is None else as_layer(layer)
        self.state_index = eqx.nn.StateIndex(method.init(features, spec, params))

    def __call__(
        self,
        x: jax.Array,
        state: eqx.nn.State,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalizes one example, or the layer's output for it.

        Args:
          x: ``[C]``, ``[C, H, W]``, …: activations, or the layer's input if the module has
            one.
          state: the model's state.
          key: ignored; other Equinox modules have it.
          inference: overrides the module's own.

        Returns:
          The normalized activations, channels first, and the new state.
        """
        del key
        inference = self.inference if inference is None else inference
        if not inference:
            _check_axis_name(self.axis_name)
        _check_example(x, self.channels)
        estimator, seen = self._estimator(), state.get(self.state_index)
        inputs = jnp.moveaxis(x, 0, -1)[None]
        x = self._run_layer(inputs)[0]
        if inference:
            statistics = self._infer(estimator, seen, x)
        else:
            statistics, seen = self._train(estimator, seen, x, inputs)
            state = state.set(self.state_index, seen)
        y = normalize(x, statistics, self.scale, self.bias, dtype=self.dtype)
        return jnp.moveaxis(y[0], -1, 0), state

    def _estimator(self):
        return estimator_of(self.estimator, lambda: self.mix)

    def _train(self, estimator, state, x, inputs):
        """Statistics for one example, from the whole batch.

        The array under ``vmap`` is already the whole batch. A collective of the estimator
        over that axis would cost the square of the batch size.
        """
        devices, batch = _split(self.axis_name)
        # The layer has already run, so only the source of this call is used.
        _, source = self._run_layer(_gather(inputs, batch))
        x = _gather(x, batch)
        if isinstance(estimator, Bidirectional) and self.backward is not None:
            estimator = estimator.at(self.backward)
        statistics, state = estimator.train(state, x, source, axis_name=devices)
        return jax.tree.map(lambda leaf: _own(leaf, x, batch), statistics), state

    def _infer(self, estimator, state, x):
        """Statistics for inference, from the whole batch if its axis is named."""
        _, batch = _split(self.axis_name)
        batch = batch if batch is not None and _is_bound(batch) else None
        x = _gather(x, batch)
        statistics = estimator.infer(state, x)
        return jax.tree.map(lambda leaf: _own(leaf, x, batch), statistics)

    def _run_layer(self, inputs):
        if self.layer is None:
            return inputs, None
        layer, params = as_layer(self.layer)
        return run_layer(layer, params, inputs)


def _sizes(layer: Any, num_features: int | None) -> tuple[int, int]:
    """The channels of a call's input and output."""
    if layer is not None:
        check_layer(layer)
        return sizes_of(layer)
    if num_features is None:
        raise ValueError(
            "Norm got neither a layer nor num_features, expected one of them; write "
            "num_features=..."
        )
    return num_features, num_features


def _split(axis_name: AxisName) -> tuple[AxisName, AxisName]:
    """The axes of devices, and the innermost axis, that of the ``vmap``."""
    if not isinstance(axis_name, tuple):
        return None, axis_name
    return axis_name[:-1] or None, axis_name[-1]


def _gather(example: jax.Array, axis_name: AxisName) -> jax.Array:
    """``[N, ...]`` from ``[1, ...]`` of each of N examples."""
    if axis_name is None:
        return example
    return lax.all_gather(example, axis_name, tiled=True)


def _own(statistics: jax.Array, x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The statistics of this example, or of all if the batch shares them."""
    if axis_name is None or statistics.ndim < x.ndim or statistics.shape[0] == 1:
        return statistics
    return lax.dynamic_slice_in_dim(statistics, lax.axis_index(axis_name), 1)


def _check_estimator(estimator: Any) -> None:
    if not isinstance(estimator, Estimator | Learned):
        name = getattr(estimator, "__name__", repr(estimator).splitlines()[0])
        raise TypeError(
            f"Norm got estimator={name}, expected an estimator, the result of a function "
            "of cbn_jax; write Norm(cbn_jax.small_batch_norm(2), eqx.nn.Conv2d(...), "
            'axis_name="batch").'
        )


def _is_bound(axis_name: AxisName) -> bool:
    """Whether the call is inside of a map with that name."""
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def _check_axis_name(axis_name: AxisName) -> None:
    """Checks the axis name: training gets the batch through the axis of a ``vmap``."""
    if axis_name is not None and not _is_bound(axis_name):
        raise ValueError(
            f"Norm got a training call outside of jax.vmap(axis_name={axis_name!r}), "
            "expected a vmap over the batch; write jax.vmap(model, "
            f"axis_name={axis_name!r}, "
            "in_axes=(0, None), out_axes=(0, None))(x, state)."
        )


def _check_example(x: jax.Array, channels: int) -> None:
    if jnp.ndim(x) == 0 or x.shape[0] != channels:
        raise ValueError(
            f"Norm got x of shape {jnp.shape(x)}, expected one example with {channels} "
            "channels first; write jax.vmap(model, ...)(x, state) over the batch, and "
            "jnp.moveaxis(x, -1, 1) for channels last."
        )
