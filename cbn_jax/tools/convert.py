# SPDX-License-Identifier: Apache-2.0
"""Weights and averages of a batch norm, from and to Flax, PyTorch, Keras and Haiku.

Each function takes or returns the entries of one layer, without their prefix. Inputs may be
anything that ``np.asarray`` takes. Outputs are float32.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbn_jax.core.checks import check_count, check_fraction, check_state_type
from cbn_jax.core.running import LONG, RunningMoments
from cbn_jax.core.schedules import ScheduleFn, cumulative

_FLAX = ("scale", "bias", "mean", "var")
_PYTORCH = ("weight", "bias", "running_mean", "running_var")
_KERAS = ("gamma", "beta", "moving_mean", "moving_variance")
_HAIKU = ("scale", "offset", "mean_ema", "var_ema")


class BatchNormWeights(NamedTuple):
    """The learned parameters and the averages of a batch norm.

    Attributes:
      scale: ``[C]``, or None for a layer without a scale.
      bias: ``[C]``, or None for a layer without a bias.
      running: the averages, a state of ``batch_norm``.
    """

    scale: jax.Array | None
    bias: jax.Array | None
    running: RunningMoments


def from_flax(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any]
) -> BatchNormWeights:
    """Weights of a Flax batch norm.

    ``cbn_jax.linen.from_batch_norm`` converts whole models.

    Args:
      params: ``scale`` and ``bias`` of one layer; either may be missing.
      batch_stats: ``mean`` and ``var`` of that layer.

    Returns:
      The weights. Flax counts no batches, so the averages get the weight of very many
      batches, as in ``from_batch_stats``.

    Raises:
      ValueError: other names; shapes that differ or are not ``[C]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from cbn_jax import convert
      >>> batch_stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
      >>> convert.from_flax({"scale": jnp.array([2.0])}, batch_stats).running.var
      Array([4.], dtype=float32)
    """
    return _weights(_read("from_flax", {**params, **batch_stats}, _FLAX), LONG)


def to_flax(
    weights: BatchNormWeights,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Weights for a Flax batch norm, linen's or nnx's.

    Args:
      weights: the weights of one layer.

    Returns:
      ``params`` and ``batch_stats`` of one layer.

    Raises:
      ValueError: shapes that differ or are not ``[C]``.
      TypeError: ``running`` is another method's state.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import convert
      >>> running = cbn.from_batch_stats(jnp.array([1.0]), jnp.array([4.0]))
      >>> convert.to_flax(convert.BatchNormWeights(None, None, running))[1]["var"]
      Array([4.], dtype=float32)
    """
    vectors = _written("to_flax", weights, _FLAX)
    leaves = {name: jnp.asarray(value, jnp.float32) for name, value in vectors.items()}
    stats = {name: leaves.pop(name) for name in ("mean", "var")}
    return leaves, stats


def from_pytorch(
    tensors: Mapping[str, Any], values_per_feature: int | None
) -> BatchNormWeights:
    """Weights of a PyTorch batch norm.

    PyTorch trains with the biased variance of a batch, but averages the unbiased one and
    predicts with that average. Our estimators train and predict with the biased variance.
    Given n, this function converts the average to the biased variance. Predictions then
    change by a factor of √(n / (n − 1)) before the offset. Without n the average and the
    predictions stay unchanged.

    Args:
      tensors: the layer's ``state_dict()``: ``running_mean`` and ``running_var``,
        ``weight`` and ``bias`` if the layer is affine, and ``num_batches_tracked`` if
        known.
      values_per_feature: n ≥ 2, the number of values of one feature in a training batch:
        examples times positions. Count them on one device, or on all for ``SyncBatchNorm``.
        None keeps the variance.

    Returns:
      The weights. In two cases the averages get the weight of very many batches, as in
      ``from_batch_stats``: the number of batches is missing, or it is 0 although the
      averages are not those of a fresh layer (0 and 1).

    Raises:
      ValueError: other names; shapes that differ or are not ``[C]``;
        ``values_per_feature`` is not an int of at least 2.

    Example:
      >>> import numpy as np
      >>> from cbn_jax import convert
      >>> tensors = {"running_mean": np.array([1.0]), "running_var": np.array([4.0])}
      >>> convert.from_pytorch(tensors, values_per_feature=4).running.var
      Array([3.], dtype=float32)
    """
    share = _biased_share(values_per_feature)
    tensors = dict(tensors)
    steps = tensors.pop("num_batches_tracked", None)
    vectors = _read("from_pytorch", tensors, _PYTORCH)
    fresh = _is_fresh(vectors["running_mean"], vectors["running_var"], var=1.0)
    vectors["running_var"] *= 1.0 if fresh else share
    return _weights(vectors, _steps(steps, fresh))


def to_pytorch(
    weights: BatchNormWeights, values_per_feature: int | None
) -> dict[str, np.ndarray[Any, Any]]:
    """Weights for a PyTorch batch norm.

    Args:
      weights: the weights of one layer.
      values_per_feature: n ≥ 2, as for ``from_pytorch``. None keeps the variance, and
        PyTorch predicts what our estimators predicted.

    Returns:
      Arrays for ``load_state_dict``, which takes
      ``{name: torch.tensor(array) for name, array in arrays.items()}``.

    Raises:
      ValueError: shapes that differ or are not ``[C]``; ``values_per_feature`` is not an
        int of at least 2.
      TypeError: ``running`` is another method's state.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import convert
      >>> running = cbn.from_batch_stats(jnp.array([1.0]), jnp.array([3.0]))
      >>> weights = convert.BatchNormWeights(None, None, running)
      >>> convert.to_pytorch(weights, values_per_feature=4)["running_var"]
      array([4.], dtype=float32)
    """
    share = _biased_share(values_per_feature)
    vectors = _written("to_pytorch", weights, _PYTORCH)
    # The initial value of an average is not the variance of a batch.
    seen = np.asarray(weights.running.steps) > 0
    vectors["running_var"] /= np.where(seen, share, 1.0)
    arrays = {name: value.astype(np.float32) for name, value in vectors.items()}
    return {**arrays, "num_batches_tracked": np.array(_batches(weights), np.int64)}


def decay_of_pytorch(momentum: float | None) -> float | ScheduleFn:
    """Converts PyTorch's ``momentum`` to that of our estimators.

    Args:
      momentum: weight of the current batch, in (0, 1]; None for the mean of all batches.

    Returns:
      The argument of ``batch_norm(momentum=...)``, the fraction kept or ``cumulative()``.

    Raises:
      ValueError: ``momentum`` out of range.

    Example:
      >>> from cbn_jax import convert
      >>> convert.decay_of_pytorch(0.1)
      0.9
    """
    if momentum is None:
        return cumulative()
    if not 0.0 < momentum <= 1.0:
        raise ValueError(
            f"momentum is {momentum!r}, expected PyTorch's momentum (the weight of the "
            "current batch, in (0, 1]) or None."
        )
    return 1.0 - momentum


def from_keras(weights: Mapping[str, Any]) -> BatchNormWeights:
    """Weights of a Keras batch normalization.

    Args:
      weights: ``{w.name: w for w in layer.weights}``: ``moving_mean``, ``moving_variance``,
        ``gamma`` and ``beta``. ``gamma`` and ``beta`` may be missing.

    Returns:
      The weights. Keras counts no batches, so the averages get the weight of very many
      batches, as in ``from_batch_stats``.

    Raises:
      ValueError: other names; shapes that differ or are not ``[C]``.

    Example:
      >>> import numpy as np
      >>> from cbn_jax import convert
      >>> theirs = {"moving_mean": np.array([1.0]), "moving_variance": np.array([4.0])}
      >>> convert.from_keras(theirs).running.var
      Array([4.], dtype=float32)
    """
    return _weights(_read("from_keras", weights, _KERAS), LONG)


def to_keras(weights: BatchNormWeights) -> dict[str, np.ndarray[Any, Any]]:
    """Weights for a Keras batch normalization.

    Args:
      weights: the weights of one layer.

    Returns:
      Arrays in the order of ``layer.weights``, so that ``layer.set_weights`` takes the list
      of them.

    Raises:
      ValueError: shapes that differ or are not ``[C]``.
      TypeError: ``running`` is another method's state.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import convert
      >>> running = cbn.from_batch_stats(jnp.array([1.0]), jnp.array([4.0]))
      >>> list(convert.to_keras(convert.BatchNormWeights(None, None, running)))
      ['moving_mean', 'moving_variance']
    """
    vectors = _written("to_keras", weights, _KERAS)
    return {name: value.astype(np.float32) for name, value in vectors.items()}


def from_haiku(
    params: Mapping[str, Any], state: Mapping[str, Mapping[str, Any]]
) -> BatchNormWeights:
    """Weights of a Haiku batch norm.

    Args:
      params: ``scale`` and ``offset`` of one module; either may be missing.
      state: that module's ``mean_ema`` and ``var_ema``. The function ignores the part of a
        name before the last slash.

    Returns:
      The weights. Haiku debiases as we do and counts batches, so ``batch_norm`` with
      momentum ``decay_rate`` continues with the same averages. If the counter is 0 and the
      averages are not, they get the weight of very many batches.

    Raises:
      ValueError: other names; shapes that differ or are not ``[C]`` with axes of size 1.

    Example:
      >>> import numpy as np
      >>> from cbn_jax import convert
      >>> mean = {"counter": 7, "hidden": np.zeros((1, 1)), "average": np.ones((1, 1))}
      >>> state = {"batch_norm/~/mean_ema": mean, "batch_norm/~/var_ema": mean}
      >>> convert.from_haiku({}, state).running.steps
      Array([7.], dtype=float32)
    """
    method = "from_haiku"
    averages = {name.rsplit("/", 1)[-1]: average for name, average in state.items()}
    if len(averages) < len(state) or not all(
        isinstance(average, Mapping) and {"counter", "average"} <= set(average)
        for average in averages.values()
    ):
        raise ValueError(
            f"{method} got a state of {sorted(state)}, expected mean_ema and var_ema of "
            "one module, each with counter, hidden and average."
        )
    found = {name: average["average"] for name, average in averages.items()}
    vectors = _read(method, {**params, **found}, _HAIKU)
    fresh = _is_fresh(vectors["mean_ema"], vectors["var_ema"], var=0.0)
    weights = _weights(vectors, _steps(averages["mean_ema"]["counter"], fresh))
    if fresh:
        running = weights.running._replace(var=jnp.ones_like(weights.running.var))
        weights = weights._replace(running=running)
    return weights


def to_haiku(
    weights: BatchNormWeights, ndim: int, decay_rate: float
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    """Weights for a Haiku batch norm with features last.

    Args:
      weights: the weights of one layer.
      ndim: axes of the activations, 4 for images.
      decay_rate: the decay rate of the module. Haiku also keeps the average before
        debiasing, which depends on the decay rate.

    Returns:
      ``params`` and ``state`` of one module. The names in ``state`` are ``mean_ema`` and
      ``var_ema``; in a model they are ``f"{module_name}/~/mean_ema"``.

    Raises:
      ValueError: shapes that differ or are not ``[C]``; ``ndim`` is not an int of
        at least 1; ``decay_rate`` outside [0, 1).
      TypeError: ``running`` is another method's state.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import convert
      >>> running = cbn.RunningMoments(*jnp.array([[1.0], [4.0], [1.0]]))
      >>> weights = convert.BatchNormWeights(None, None, running)
      >>> _, state = convert.to_haiku(weights, ndim=2, decay_rate=0.75)
      >>> state["var_ema"]["hidden"], state["var_ema"]["average"]
      (Array([[1.]], dtype=float32), Array([[4.]], dtype=float32))
    """
    check_count("ndim", ndim, 1)
    check_fraction("decay_rate", decay_rate)
    vectors = _written("to_haiku", weights, _HAIKU)
    counter = _batches(weights)

    def leaf(value):
        return jnp.asarray(value.reshape((1,) * (ndim - 1) + (-1,)), jnp.float32)

    def average(value):
        value = value * (counter > 0)  # Haiku's averages start at 0
        return {
            "counter": jnp.asarray(counter, jnp.int32),
            "hidden": leaf(value * (1.0 - decay_rate**counter)),
            "average": leaf(value),
        }

    state = {name: average(vectors.pop(name)) for name in ("mean_ema", "var_ema")}
    return {name: leaf(value) for name, value in vectors.items()}, state


def _biased_share(values_per_feature: int | None) -> float:
    """The biased variance over the unbiased one; 1 if no conversion is wanted."""
    if values_per_feature is None:
        return 1.0
    check_count("values_per_feature", values_per_feature, 2)
    return (values_per_feature - 1) / values_per_feature


def _is_fresh(mean: Any, found_var: Any, var: float) -> bool:
    """Whether the averages are those of a layer that has seen no batch."""
    return bool((mean == 0.0).all() and (found_var == var).all())


def _steps(counter: Any, fresh: bool) -> float:
    """The number of batches; a counter of 0 with trained averages counts as unknown."""
    steps = LONG if counter is None else float(np.asarray(counter))
    return LONG if steps == 0 and not fresh else steps


def _read(
    method: str, tensors: Mapping[str, Any], names: tuple[str, str, str, str]
) -> dict[str, Any]:
    """All of scale, bias, mean and variance by name; None for a missing one."""
    scale, bias, mean, var = names
    given = {name for name, value in tensors.items() if value is not None}
    if not {mean, var} <= given or not given <= set(names):
        raise ValueError(
            f"{method} got {sorted(given)}, expected {mean} and {var}, with {scale} and "
            f"{bias} if there are any; pass the entries of one layer, without their prefix."
        )
    found = _vectors(method, {name: tensors[name] for name in names if name in given})
    return {name: found.get(name) for name in names}


def _written(
    method: str, weights: BatchNormWeights, names: tuple[str, str, str, str]
) -> dict[str, Any]:
    """Scale, bias, mean and variance by name, without the missing ones."""
    scale, bias, running = weights
    check_state_type(method, running, RunningMoments)
    values = zip(names, (scale, bias, running.mean, running.var), strict=True)
    return _vectors(method, {name: value for name, value in values if value is not None})


def _vectors(method: str, named: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays with one axis, all of one size."""
    arrays = {name: np.asarray(value) for name, value in named.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(array.ndim == 0 or array.size != max(array.shape) for array in arrays.values()):
        raise ValueError(
            f"{method} got shapes {shapes}, expected [features], perhaps with more axes of "
            "size 1."
        )
    if len({array.size for array in arrays.values()}) > 1:
        raise ValueError(
            f"{method} got shapes {shapes}, expected the same number of features."
        )
    return {name: array.reshape(-1).astype(np.float64) for name, array in arrays.items()}


def _weights(vectors: dict[str, Any], steps: float) -> BatchNormWeights:
    """The weights from scale, bias, mean and variance, in this order."""

    def leaf(value: Any) -> Any:
        return None if value is None else jnp.asarray(value, jnp.float32)

    scale, bias, mean, var = map(leaf, vectors.values())
    return BatchNormWeights(
        scale, bias, RunningMoments(mean, var, jnp.full_like(mean, steps))
    )


def _batches(weights: BatchNormWeights) -> int:
    """One number for all features, the largest: a feature may have missed batches."""
    return round(float(np.max(np.asarray(weights.running.steps))))
