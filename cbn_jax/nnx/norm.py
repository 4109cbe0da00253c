# SPDX-License-Identifier: Apache-2.0
"""The nnx module that normalizes with any estimator."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cbn_jax._adapters import Kernel, check_modules, estimator_of, flag_of, to_last
from cbn_jax.core.backward import Bidirectional
from cbn_jax.core.devices import AxisName
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.source import source_of
from cbn_jax.core.statistics import normalize
from cbn_jax.wrappers.learned import Learned

from .layers import as_layer, run_changed
from .state import load, metadata_of, store, write


class Norm(nnx.Module):
    """Normalizes activations with any estimator of this library.

    ``Norm(estimator, num_features=64, rngs=rngs)`` replaces
    ``nnx.BatchNorm(64, rngs=rngs)``. ``Norm(estimator, layer=nnx.Conv(...), rngs=rngs)``
    runs the layer first and gives the estimator access to its parameters. Every method
    accepts this form, and cross-iteration methods need it.

    ``scale`` and ``bias`` are ``nnx.Param``. Each array of the estimator's state is an
    ``nnx.BatchStat``. ``norm.state`` is the whole state. If the method has running
    averages, they are ``norm.mean`` and ``norm.var``. ``model.train()`` and
    ``model.eval()`` switch the mode. Methods with backward statistics have an additional
    ``nnx.Param``, ``backward``, which the optimizer writes. Wrap the optimizer in
    ``cbn_jax.optax.with_backward_statistics``.

    Args:
      estimator: the method, such as ``cbn_jax.batch_norm(momentum=0.9)``. Decay and ε are
        its arguments. With ``cbn_jax.learned(cbn_jax.group_batch_norm, ...)`` the module
        learns the weight of the method, as the sigmoid of a parameter ``mix``.
      layer: a module that is linear in its parameters (``nnx.Conv``, ``nnx.Linear``, …),
        run before normalizing.
      kernel: a function that changes the layer's kernel before its use:
        ``cbn_jax.standardize``, ``cbn_jax.center`` or your own. It returns a kernel of the
        same shape.
      num_features: size of the feature axis; not needed if the layer determines it.
      use_running_average: True for inference, False for training; a call may override it.
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
        estimator: Estimator | Learned,
        layer: nnx.Module | None = None,
        *,
        kernel: Kernel | None = None,
        num_features: int | None = None,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
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
        spec, params = (None, None) if layer is None else as_layer(layer, None, kernel)
        if kernel is not None and layer is None:
            raise ValueError(
                "Norm got kernel=... without a layer, expected a layer with a parameter "
                "kernel; write Norm(estimator, layer=Conv(...), kernel=...)."
            )
        features = _features(num_features, params)
        self.estimator = estimator
        self.layer = layer
        self.kernel = kernel
        self.num_features = features
        self.param_dtype = param_dtype
        self.use_running_average = use_running_average
        self.axis = axis
        self.dtype = dtype
        self.axis_name = axis_name

        def param(use, init, shape=(features,)):
            return nnx.Param(init(rngs.params(), shape, param_dtype)) if use else None

        self.scale = nnx.data(param(use_scale, scale_init))
        self.bias = nnx.data(param(use_bias, bias_init))
        self.mix = nnx.data(param(isinstance(estimator, Learned), mix_init, ()))
        self.backward = nnx.data(backward_of(self._estimator(), features))
        state = self._estimator().init(features, spec, params)
        self.structure = jax.tree.structure(state)
        store(self, state, {} if layer is None else metadata_of(layer))

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
          mask: True where a value counts. It has the axes of the activations, each of size
            1 or of their size. Statistics ignore the other values, in training and
            inference. The output is computed everywhere.
          update_stats: False trains with the method's statistics and does not change its
            state.

        Returns:
          Normalized activations.
        """
        if use_running_average is None:
            running = flag_of(self.use_running_average, None)
        else:
            running = use_running_average
        estimator = self._estimator()
        made_by = None if running else self._seen_layer(inputs)
        x = self._run_layer(inputs)
        source = None if made_by is None else source_of(*made_by, x)
        x, mask, back = to_last(x, mask, self.axis, self.layer)
        if running:
            statistics = estimator.infer(self.state, x, mask=mask)
        else:
            statistics, state = self._bound(estimator).train(
                self.state, x, source, axis_name=self.axis_name, mask=mask
            )
            if update_stats:
                self.state = state
        return back(self._output(x, statistics, mask))

    @property
    def state(self) -> Any:
        """The estimator's state, from the variables that store it."""
        return load(self, self.structure)

    @state.setter
    def state(self, state: Any) -> None:
        write(self, state)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":  # Flax 0.12.8 takes a property for an attribute
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Switches the mode, for ``nnx.view(model, use_running_average=...)``."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _estimator(self):
        return estimator_of(self.estimator, lambda: _value(self.mix))

    def _bound(self, estimator):
        """A method with its backward statistics taken from the module."""
        if not isinstance(estimator, Bidirectional):
            return estimator
        return estimator.at(_value(self.backward))

    def _run_layer(self, inputs):
        if self.layer is None:
            return inputs
        if self.kernel is None:
            return self.layer(inputs)
        return run_changed(self.layer, self.kernel, inputs)

    def _seen_layer(self, inputs):
        """The layer, its parameters and inputs before it runs, if the method uses them."""
        if self.layer is None or "layered" not in self._estimator().traits:
            return None
        return *as_layer(self.layer, inputs, self.kernel), inputs

    def _output(self, x, statistics, mask):
        """The steps after the statistics; EvoNorm also activates here."""
        del mask
        return normalize(x, statistics, *self._affine(), dtype=self.dtype)

    def _affine(self):
        return _value(self.scale), _value(self.bias)


def _signature(cls: type) -> inspect.Signature:
    """The signature of ``__init__``, which the metaclass of nnx hides from editors."""
    signature = inspect.signature(cls.__init__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


Norm.__signature__ = _signature(Norm)  # pyright: ignore[reportAttributeAccessIssue]


def _features(num_features: int | None, params: Any) -> int:
    """The number of features, given or taken from the layer's parameters."""
    if num_features is not None:
        return num_features
    widths = {leaf.shape[-1] for leaf in jax.tree.leaves(params)}
    if len(widths) != 1:
        raise ValueError(
            f"Norm got num_features=None and layer parameters with last axes "
            f"{sorted(widths)}, expected one size; write num_features=..."
        )
    return widths.pop()


def backward_of(estimator: Estimator, features: int) -> nnx.Param | None:
    """The variable of a method with backward statistics."""
    if not isinstance(estimator, Bidirectional):
        return None
    return nnx.Param(estimator.init_backward(features))


def _value(variable: nnx.Param | None) -> Any:
    return None if variable is None else variable.get_value()
