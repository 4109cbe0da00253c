# SPDX-License-Identifier: Apache-2.0
"""Flax linen: one module for every method, a drop-in for ``nn.BatchNorm``."""

import re
from collections.abc import Callable, Mapping
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
from ._running import RunningMoments, running_moments
from ._source import run_layer
from ._statistics import normalize

with require("Flax", "cbn_jax.linen"):
    from flax import linen as nn


class Norm(nn.Module):
    """Normalizes activations with any estimator of this library.

    ``Norm(estimator)(x)`` stands where ``nn.BatchNorm()(x)`` stood.
    ``Norm(estimator, layer=nn.Conv(...))(z)`` runs the layer first and lets the estimator
    see its parameters; every method accepts that form, cross-iteration methods need it.
    The layer's parameters stay where they were: ``Conv_0/kernel`` remains
    ``Conv_0/kernel``. In ``setup``, make the layer an attribute first; one made within the
    call of ``Norm`` there is below it, as ``layer``.

    Learned ``scale`` and ``bias`` are in the collection ``params``, the estimator's state
    is in ``batch_stats``: make that one mutable in training, as for ``nn.BatchNorm``. While
    initializing the state is not updated and no collective runs.

    Attributes:
      estimator: the method, such as ``cbn_jax.batch_norm(momentum=0.9)``; decay and ε are
        its arguments. Or a function of a weight in [0, 1] that gives one, such as
        ``cbn_jax.group_batch_norm``; the module then learns the weight, as the sigmoid of
        a parameter ``mix``.
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

    estimator: Estimator | Callable[[jax.Array], Estimator]
    layer: nn.Module | None = None
    use_running_average: bool | None = None
    axis: int = -1
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
          use_running_average: True for inference, False for training; give it here or in
            the constructor, not in both.
          mask: broadcastable to the activations, True where a value counts. Statistics
            ignore the others; the output is computed everywhere.
          update_stats: False trains with the method's statistics and leaves its state as
            it is.

        Returns:
          Normalized activations.
        """
        check_modules(self.estimator, self.layer, nn.Module)
        self._check_variables()
        running = flag_of(self.use_running_average, use_running_average)
        estimator = estimator_of(
            self.estimator, lambda: self.param("mix", self.mix_init, (), self.param_dtype)
        )
        x, source = self._run_layer(inputs)
        x, mask, back = to_last(x, mask, self.axis)
        features = x.shape[-1]
        params, groups = (None, 1) if source is None else (source.params, source.groups)
        state = self.variable(
            "batch_stats", "state", lambda: estimator.init(features, params, groups)
        )
        if running or self.is_initializing():
            statistics = estimator.infer(state.value, x)
        else:
            statistics, after = estimator.train(
                state.value, x, source, axis_name=self.axis_name, mask=mask
            )
            if update_stats:
                state.value = after
        scale, bias = self._affine(features)
        y = back(normalize(x, statistics, scale, bias))
        return y if self.dtype is None else y.astype(self.dtype)

    def _check_variables(self):
        if self.has_variable("batch_stats", "mean"):
            raise ValueError(
                "Norm got mean and var of an nn.BatchNorm in batch_stats, "
                "expected its own state; write cbn_jax.linen.from_batch_norm(variables)."
            )

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


def from_batch_norm(
    variables: Mapping[str, Any], into: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Variables of a model with ``nn.BatchNorm``, for the same model with ``Norm``.

    Parameters stay as they are; in ``batch_stats``, mean and variance become a
    ``RunningMoments``. Modules named by Flax, ``BatchNorm_0``, are renamed ``Norm_0``; give
    the estimator the ε that the model was trained with.

    A method that remembers more than running moments begins that anew: give the fresh
    variables of the new model, from its ``init``, as ``into``. It predicts as the old model
    did, and trains on.

    Args:
      variables: what ``init`` and training gave, with ``params`` and ``batch_stats``.
      into: variables of the model with ``Norm``, of the same structure; None for those of
        ``Norm(batch_norm(...))``, also inside ``corrected_inference``.

    Returns:
      The variables for the model with ``Norm``.

    Raises:
      ValueError: no ``nn.BatchNorm`` in them; a ``Norm_0`` beside a ``BatchNorm_0``;
        modules or shapes that are not those of ``into``, or a state in it without running
        moments.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.linen import Norm, from_batch_norm
      >>> trained = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
      >>> variables = trained.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> estimator = cbn_jax.corrected_inference(cbn_jax.batch_norm(), batch_size=2)
      >>> model = nn.Sequential([nn.Dense(4), Norm(estimator, use_running_average=True)])
      >>> model.apply(from_batch_norm(variables), jnp.ones((2, 3))).shape
      (2, 4)
    """
    made = _converted("from_batch_norm", variables, _norm_of, _BATCH_NORM, "Norm_")
    if made is None:
        raise ValueError(
            f"from_batch_norm got collections {sorted(variables)} without mean and var, "
            "expected the batch_stats of a model with nn.BatchNorm; pass all variables."
        )
    return made if into is None else _put(made, into, "variables")


def _put(trained: Any, fresh: Any, name: str) -> Any:
    """What was trained, with the fresh state around the running moments."""
    if isinstance(trained, RunningMoments):
        return with_running(fresh, trained)
    if isinstance(trained, Mapping) and isinstance(fresh, Mapping):
        if set(trained) == set(fresh):
            return {key: _put(trained[key], fresh[key], key) for key in trained}
        came, expected = sorted(trained), sorted(fresh)
    else:
        came, expected = getattr(trained, "shape", None), getattr(fresh, "shape", None)
        if came == expected:
            return trained
    raise ValueError(
        f"from_batch_norm got {came} in {name} of the trained model, expected {expected} "
        "as in the new one; give both models the same modules and names."
    )


def to_batch_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a model with ``Norm``, for the same model with ``nn.BatchNorm``.

    The inverse of ``from_batch_norm``: mean and variance are those of the one
    ``RunningMoments`` in each state, ``Norm_0`` becomes ``BatchNorm_0``. With the
    estimator's ε, ``nn.BatchNorm`` then predicts what ``Norm`` did, for ``batch_norm``,
    ``cross_iteration_batch_norm``, ``streaming_batch_norm`` and ``replay_batch_norm``, also
    inside ``adaptive_batch_norm`` with ``inference="running"``. It does not where inference
    looks at the example: ``corrected_inference`` and ``fitted_inference`` lose their
    correction, and ``group_batch_norm`` has averages of other activations.

    A layer made inside the model's ``__call__`` stays where it is; one that a ``Norm`` owns
    stays below it, as ``layer``.

    Args:
      variables: what ``init`` and training gave, with ``params`` and ``batch_stats``.

    Returns:
      The variables for ``nn.BatchNorm(epsilon=...)``.

    Raises:
      ValueError: no ``Norm`` in them, or one without exactly one ``RunningMoments``; a
        ``BatchNorm_0`` beside a ``Norm_0``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.linen import Norm, to_batch_norm
      >>> norm = Norm(cbn_jax.batch_norm(), use_running_average=True)
      >>> variables = nn.Sequential([nn.Dense(4), norm]).init(
      ...     jax.random.key(0), jnp.ones((2, 3))
      ... )
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
      >>> model.apply(to_batch_norm(variables), jnp.ones((2, 3))).shape
      (2, 4)
    """
    made = _converted("to_batch_norm", variables, _batch_norm_of, _NORM, "BatchNorm_")
    if made is None:
        raise ValueError(
            f"to_batch_norm got collections {sorted(variables)} without the state of a "
            "Norm, expected the batch_stats of a model with cbn_jax.linen.Norm; pass all "
            "variables."
        )
    return made


def _converted(
    method: str,
    variables: Mapping[str, Any],
    convert: Callable[[Mapping[str, Any]], dict[str, Any] | None],
    old: re.Pattern[str],
    new: str,
) -> dict[str, Any] | None:
    """All collections, along with ``batch_stats``, in which ``convert`` knows normalizers.

    None if there are none.
    """
    found = []

    def walk(tree, stats):
        if not isinstance(tree, Mapping):
            return tree
        made = convert(tree) if tree is stats else None
        if made is not None:
            found.append(made)
            return made
        below = {name: _below(stats, name) for name in tree}
        names = {
            name: name if convert(below[name]) is None else old.sub(new, name)
            for name in tree
        }
        if len(set(names.values())) < len(names):
            raise ValueError(
                f"{method} got modules {sorted(tree)}, of which two would have one name; "
                "give them names of their own."
            )
        return {names[name]: walk(tree[name], below[name]) for name in tree}

    stats = variables.get("batch_stats", {})
    made = {name: walk(tree, stats) for name, tree in variables.items()}
    return made if found else None


def _norm_of(stats: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a ``Norm`` keeps, from what an ``nn.BatchNorm`` keeps."""
    if set(stats) != {"mean", "var"}:
        return None
    return {"state": running_moments(stats["mean"], stats["var"])}


def _batch_norm_of(stats: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an ``nn.BatchNorm`` keeps, from what a ``Norm`` keeps."""
    if set(stats) != {"state"} or not isinstance(stats["state"], tuple):
        return None
    running = running_in(stats["state"])
    return {"mean": running.mean, "var": running.var}


def _below(stats: Any, name: str) -> Mapping[str, Any]:
    below = stats.get(name, {}) if isinstance(stats, Mapping) else {}
    return below if isinstance(below, Mapping) else {}


_BATCH_NORM = re.compile(r"^BatchNorm_(?=\d+$)")
_NORM = re.compile(r"^Norm_(?=\d+$)")


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
