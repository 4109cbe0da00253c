# SPDX-License-Identifier: Apache-2.0
"""Which training batches need normalization: assessed before training.

::

    assessment = assess(images for images, _ in batches)
    print(assessment)                  # how many batches, the threshold, the two sets
    assessment.draw("batches.png")     # a histogram
    batch_stats = cbn_jax.set_gate(batch_stats, assessment.gate(images))   # in a step

``cbn_jax.adaptive_batch_norm`` is the estimator that heeds the gate.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ._adaptive import Measure, heterogeneity
from ._checks import check_choice
from ._figure import COLORS, styled

Threshold = Literal["mean", "median"] | Callable[[np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What was found about the training batches.

    Attributes:
      values: ``[batches]``, the heterogeneity of each.
      threshold: batches above it are normalized.
      measure: how heterogeneity was measured.
    """

    values: np.ndarray
    threshold: float
    measure: Measure

    @property
    def table(self) -> np.ndarray:
        """``[batches]``, True where a batch needs normalization."""
        return self.values > np.float32(self.threshold)  # as ``gate`` compares

    def gate(self, x: jax.Array, *, axis_name: Any = None) -> jax.Array:
        """Whether a batch needs normalization, measured now; works under ``jit``.

        For batches that are composed anew in every epoch. Those that stay as they were
        assessed have their answer in ``table``.

        Args:
          x: the batch, as it was given to ``assess``.
          axis_name: as for ``heterogeneity``.

        Returns:
          A boolean scalar.
        """
        return heterogeneity(x, self.measure, axis_name=axis_name) > self.threshold

    def __str__(self) -> str:
        low, middle, high = np.quantile(self.values, [0.0, 0.5, 1.0])
        above = int(self.table.sum())
        return (
            f"{len(self.values)} batches, heterogeneity ({self.measure}): "
            f"{low:.4g} to {high:.4g}, median {middle:.4g}\n"
            f"threshold {self.threshold:.4g}: {above} to normalize, "
            f"{len(self.values) - above} to leave"
        )

    def draw(self, path: str | Path | None = None) -> Any:
        """Draws a histogram of the two sets.

        Args:
          path: where to write the figure; None for nowhere.

        Returns:
          The matplotlib figure, which a notebook shows.

        Raises:
          ModuleNotFoundError: matplotlib is not installed.
        """
        bins = np.histogram_bin_edges(self.values, bins="auto")
        with styled("Assessment.draw") as new_figure:
            figure = new_figure((4.8, 3.2))
            axis = figure.subplots()
            for chosen, label, color in (
                (self.table, "to normalize", COLORS[0]),
                (~self.table, "to leave", COLORS[1]),
            ):
                axis.hist(self.values[chosen], bins.tolist(), color=color, label=label)
            axis.axvline(self.threshold, color="black", lw=1, ls="--", label="threshold")
            axis.set_xlabel(f"heterogeneity ({self.measure})")
            axis.set_ylabel("batches")
            axis.legend()
            if path is not None:
                figure.savefig(path)
        return figure


def assess(
    batches: Iterable[jax.typing.ArrayLike],
    measure: Measure = "entries",
    threshold: Threshold = "mean",
) -> Assessment:
    """Measures every training batch and parts them in two sets by a threshold.

    Batches are taken one by one from any iterable and not kept. A progress bar is shown
    where rich is installed.

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
      >>> assessment.table
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
    values = np.array([float(measured(_array(x), measure)) for x in _track(batches)])
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


def _track(batches: Iterable) -> Iterator:
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return iter(batches)
    # As text in a notebook too, where rich would ask for widgets.
    console = Console(stderr=True, force_jupyter=False)
    return iter(track(batches, "assessing batches", console=console))
