# SPDX-License-Identifier: Apache-2.0
"""Figures of the tools. They need matplotlib, which no other module needs."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbn_jax.core.checks import check_choice

from .assessment import Assessment
from .diagnostics import Errors

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")


@contextlib.contextmanager
def styled(name: str) -> Iterator[Any]:
    """Gives matplotlib, in the library's style, to the function ``name``.

    Without matplotlib an error message names the package to install.
    """
    try:
        import matplotlib.figure
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs matplotlib; install it with: pip install 'cbn_jax[figures]'"
        ) from error
    with matplotlib.style.context("cbn_jax.figures"):
        yield matplotlib.figure.Figure


def draw_errors(
    records: Sequence[tuple[int, Mapping[str, Mapping[str, Errors]]]],
    path: str | Path | None = None,
    *,
    layers: Sequence[str] | None = None,
) -> Any:
    """Draws errors over a training run: one column per layer, one line per method.

    Args:
      records: ``(step, errors(...))``, in the order of the steps, at least one.
      path: file to write, with the ending of an image format; None writes none.
      layers: paths of the layers to draw; None for the first, the middle and the last.

    Returns:
      The matplotlib figure, which a notebook shows.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: no records; a layer that is not in them.

    Example:
      >>> from cbn_jax import diagnostics, figures
      >>> measured = {"first": {"batch": diagnostics.Errors(mean=0.7, scale=0.9)}}
      >>> figure = figures.draw_errors([(1, measured), (2, measured)])
      >>> [axes.get_title() for axes in figure.axes]
      ['first', '']
    """
    if not records:
        raise ValueError("draw_errors got no records, expected [(step, errors(...)), ...].")
    layers = _chosen(list(records[0][1]), layers)
    with styled("cbn_jax.figures.draw_errors") as new_figure:
        figure = new_figure((1.2 + 2.6 * len(layers), 5.2))
        grid = _empty_grid(figure, layers)
        for axes, kind in zip(grid, Errors._fields, strict=True):
            for axis, layer in zip(axes, layers, strict=True):
                _plot(axis, records, layer, kind)
        lines, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
        if path is not None:
            figure.savefig(path)
    return figure


def draw_assessment(assessment: Assessment, path: str | Path | None = None) -> Any:
    """Draws a histogram of the batches to normalize and the batches to leave.

    Args:
      assessment: from ``cbn_jax.assessment.assess``.
      path: file to write, with the ending of an image format; None writes none.

    Returns:
      The matplotlib figure, which a notebook shows.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from cbn_jax import assessment, figures
      >>> batches = [jnp.array([[0.0], [spread]]) for spread in (2.0, 4.0, 12.0)]
      >>> figure = figures.draw_assessment(assessment.assess(batches))
      >>> figure.axes[0].get_ylabel()
      'batches'
    """
    values, selected = assessment.values, assessment.selected
    bins = np.histogram_bin_edges(values, bins="auto")
    with styled("cbn_jax.figures.draw_assessment") as new_figure:
        figure = new_figure((4.8, 3.2))
        axis = figure.subplots()
        for chosen, label, color in (
            (selected, "to normalize", COLORS[0]),
            (~selected, "to leave", COLORS[1]),
        ):
            axis.hist(values[chosen], bins.tolist(), color=color, label=label)
        axis.axvline(assessment.threshold, color="black", lw=1, ls="--", label="threshold")
        axis.set_xlabel(f"heterogeneity ({assessment.measure})")
        axis.set_ylabel("batches")
        axis.legend()
        if path is not None:
            figure.savefig(path)
    return figure


def _chosen(names: list[str], layers: Sequence[str] | None) -> list[str]:
    """The names of the layers to draw."""
    if layers is None:
        return list(dict.fromkeys((names[0], names[(len(names) - 1) // 2], names[-1])))
    for layer in layers:
        check_choice("layer", layer, names)
    return list(layers)


def _empty_grid(figure: Any, layers: Sequence[str]) -> Any:
    """Axes ``[2, layers]``, labelled."""
    grid = figure.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False)
    for axis, layer in zip(grid[0], layers, strict=True):
        axis.set_title(layer)
    grid[0][0].set_ylabel("error of the mean\n(standard deviations)")
    grid[1][0].set_ylabel("error of the scale\n(log of the ratio)")
    for axis in grid[1]:
        axis.set_xlabel("training step")
    return grid


def _plot(axis: Any, records: Any, layer: str, kind: str) -> None:
    """One panel."""
    steps = [step for step, _ in records]
    for i, method in enumerate(records[0][1][layer]):
        values = [getattr(measured[layer][method], kind) for _, measured in records]
        # Each line is narrower and sparser than the one before, so that coinciding lines
        # all stay visible.
        look = {"lw": max(2.8 - 0.35 * i, 0.7), "ls": (0, (4, i)) if i else "-"}
        axis.plot(steps, values, color=COLORS[i % len(COLORS)], label=method, **look)
    axis.set_yscale("log")
