# SPDX-License-Identifier: Apache-2.0
"""Finds out before training which training batches need normalization.

::

    assessment = assess(images for images, _ in batches)
    print(assessment)                  # how many batches, the threshold, the two sets
    figures.draw_assessment(assessment, "batches.png")      # a histogram
    batch_stats = cbn_jax.set_gate(batch_stats, assessment.gate(images))   # in a step

``cbn_jax.adaptive_batch_norm`` is the estimator that uses the gate.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cbn_jax.core.checks import check_choice
from cbn_jax.wrappers.adaptive import Measure, heterogeneity

Threshold = Literal["mean", "median"] | Callable[[np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Assessment:
    """The heterogeneity of every training batch, and the threshold.

    Attributes:
      values: ``[batches]``, the heterogeneity of each batch.
      threshold: batches with a larger heterogeneity are normalized.
      measure: the measure of heterogeneity.
    """

    values: np.ndarray
    threshold: float
    measure: Measure

    @property
    def selected(self) -> np.ndarray:
        """``[batches]``, True where a batch needs normalization."""
        return self.values > np.float32(self.threshold)  # as ``gate`` compares

    def gate(self, x: jax.Array, *, axis_name: Any = None) -> jax.Array:
        """Whether a batch needs normalization, measured now; works under ``jit``.

        Use it if every epoch composes new batches. ``selected`` has the answer for batches
        that stay as they were assessed.

        Args:
          x: the batch, in the form given to ``assess``.
          axis_name: as for ``heterogeneity``.

        Returns:
          A boolean scalar.
        """
        return heterogeneity(x, self.measure, axis_name=axis_name) > self.threshold

    def __str__(self) -> str:
        low, middle, high = np.quantile(self.values, [0.0, 0.5, 1.0])
        above = int(self.selected.sum())
        return (
            f"{len(self.values)} batches, heterogeneity ({self.measure}): "
            f"{low:.4g} to {high:.4g}, median {middle:.4g}\n"
            f"threshold {self.threshold:.4g}: {above} to normalize, "
            f"{len(self.values) - above} to leave"
        )


def assess(
    batches: Iterable[jax.typing.ArrayLike],
    measure: Measure = "entries",
    threshold: Threshold = "mean",
) -> Assessment:
    """Measures every training batch and divides the batches into two sets by a threshold.

    The function takes batches one by one from any iterable and keeps none. To see a
    progress bar, write ``assess(tqdm.tqdm(batches))``.

    Args:
      batches: each ``[N, ..., C]``, as it enters the network, floating point.
      measure: see ``cbn_jax.heterogeneity``.
      threshold: "mean" or "median" of the batches' heterogeneity; or a function of all of
        them, such as ``lambda h: np.quantile(h, 0.25)`` or ``lambda h: 0.3``.

    Returns:
      An ``Assessment``; ``print`` it.

    Raises:
      ValueError: no batches; another measure or threshold; a batch that is not finite.
      TypeError: a batch that is no array of floating point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from cbn_jax.assessment import assess
      >>> batches = [jnp.array([[0.0], [spread]]) for spread in (2.0, 4.0, 12.0)]
      >>> assessment = assess(batches)
      >>> assessment.selected
      array([False, False,  True])
      >>> print(assessment)
      3 batches, heterogeneity (entries): 1 to 6, median 2
      threshold 3: 1 to normalize, 2 to leave

    Reference: as for ``cbn_jax.adaptive_batch_norm``.
    """
    if not callable(threshold):
        check_choice("threshold", threshold, _RULES)
    rule = threshold if callable(threshold) else _RULES[threshold]
    measured = jax.jit(heterogeneity, static_argnums=1)
    values = np.array([float(measured(_array(x), measure)) for x in batches])
    if len(values) == 0:
        raise ValueError("assess got no batches, expected at least one.")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(
            f"assess got NaN or inf in batch {bad}, expected finite numbers; clean the "
            "data."
        )
    return Assessment(values, float(rule(values)), measure)


_RULES: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "median": np.median}


def _array(batch: Any) -> jax.Array:
    if isinstance(batch, tuple | list | dict):
        raise TypeError(
            f"assess got a batch of type {type(batch).__name__}, expected an array; write "
            "assess(images for images, _ in batches)."
        )
    return jnp.asarray(batch)
