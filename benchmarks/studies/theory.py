# SPDX-License-Identifier: Apache-2.0
"""Bias and noise of the streaming window: predictions and measurements.

A layer has Gaussian inputs and a known true variance. Its weights turn by the same angle at
every step. The variance that each method estimates after six windows is compared with the
true one over many independent runs. docs/methods/streaming.md derives the expected value.
Prints a table and draws a figure.

Run it with ``python -m benchmarks.studies.theory``.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import track

from benchmarks.lib import report

EPSILON = 1e-12
ROWS = 8  # past positions that streaming stores


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    windows: tuple[int, ...] = (4, 16, 64)
    """Effective window k of each method."""
    turns: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)
    """Radians by which the weights turn in k steps."""
    batch_size: int = 2
    """Examples per step."""
    inputs: int = 32
    """Input features of the layer."""
    runs: int = 4000
    """Number of independent runs of each cell."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/theory")
    """Folder for results.json, table.md and theory.svg."""


def main(config: Config, console: Console) -> dict:
    """Measures every cell, writes and shows the results."""
    results = {
        "config": report.plain(config),
        "environment": report.environment(),
        "cells": [
            cell
            for window in track(config.windows, "simulating", console=console)
            for cell in _cells(config, window)
        ],
    }
    results = report.write_results(config.output / "results.json", results)
    (config.output / "table.md").write_text(markdown(results))
    figure(results, config.output / "theory.svg")
    console.print(Markdown(markdown(results)))
    console.print(f"written to {config.output}/: results.json, table.md, theory.svg")
    return results


def _cells(config: Config, window: int) -> Iterator[dict]:
    """The cells of one window, for every turn."""
    methods = {
        "streaming_batch_norm": cbn_jax.streaming_batch_norm(window, epsilon=EPSILON),
        "cross_iteration_batch_norm": cbn_jax.cross_iteration_batch_norm(
            window, epsilon=EPSILON
        ),
    }
    simulators = {
        name: simulator(estimator, config.batch_size, config.runs)
        for name, estimator in methods.items()
    }
    for turn in config.turns:
        weights = path(6 * window, turn / window, config.inputs)
        estimated = {name: simulate(weights) for name, simulate in simulators.items()}
        yield {
            "window": window,
            "turn": turn,
            "measured": {
                name: {"bias": float(var.mean() - 1.0), "deviation": float(var.std())}
                for name, var in estimated.items()
            },
            "predicted": {
                "streaming_batch_norm": {
                    "bias": streaming_bias(weights, window, config.batch_size),
                    "deviation": streaming_deviation(weights, window, config.batch_size),
                },
                "cross_iteration_batch_norm": {
                    "bias": taylor_bias(weights, window, config.batch_size)
                },
            },
        }


def path(steps: int, angle: float, inputs: int) -> np.ndarray:
    """Unit vectors ``[steps, inputs]`` that turn in a plane."""
    weights = np.zeros((steps, inputs))
    weights[:, 0] = np.cos(angle * np.arange(steps))
    weights[:, 1] = np.sin(angle * np.arange(steps))
    return weights


def simulator(estimator, batch_size: int, runs: int):
    """A function weights -> the estimated variance after the last step, ``[runs]``."""

    def step(state, pair):
        kernel, key = pair
        z = jax.random.normal(key, (batch_size, len(kernel)))
        x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, z)
        statistics, state = estimator.train(state, x, source)
        return state, statistics.inv_std[0]

    @jax.jit
    def last(kernels):
        def one(key):
            keys = jax.random.split(key, len(kernels))
            state = estimator.init(1, cbn_jax.dense, kernels[0])
            return jax.lax.scan(step, state, (kernels, keys))[1][-1]

        return jax.vmap(one)(jax.random.split(jax.random.key(0), runs))

    def simulate(weights: np.ndarray) -> np.ndarray:
        inv_std = last(jnp.asarray(weights, jnp.float32)[..., None])
        return 1.0 / np.square(np.float64(inv_std)) - EPSILON

    return simulate


def streaming_bias(weights: np.ndarray, window: int, batch_size: int) -> float:
    """Bias of the expected recursion: 1/N too little per batch, and p's part per step.

    A past row contributes to p as one value in several later batches.
    """
    share, values = 1.0 / window, batch_size * (2 * window - 1)
    own = share / batch_size * np.mean((1.0 - share) ** np.arange(ROWS))
    quadratic = 1.0 + 1.0 / values - 2.0 * own
    var, g = 1.0 - 1.0 / values, 2.0 * (1.0 - 1.0 / values) * weights[0]
    for old, new in itertools.pairwise(weights):
        step = new - old
        var += g @ step + quadratic * step @ step
        var += share * (1.0 - 1.0 / values - var)
        g = g + 2.0 * quadratic * step
        g += share * (2.0 * (1.0 - 1.0 / values) * new - g)
    return float(var - 1.0)


def streaming_deviation(weights: np.ndarray, window: int, batch_size: int) -> float:
    """√(Σ 2 tr(M²)) over all values, the M of docs/methods/streaming.md."""
    total = 0.0
    for then in range(1, len(weights)):
        batch = _of_batch(weights, then, window) / batch_size
        row = batch + _of_row(weights, then, window)
        total += (batch_size - 1) * np.trace(batch @ batch) + np.trace(row @ row)
    return float(np.sqrt(2.0 * total))


def _of_batch(weights: np.ndarray, then: int, window: int) -> np.ndarray:
    """M of the moments of a batch: the current weights minus the part of later rows."""
    now, age, share = weights[-1], len(weights) - 1 - then, 1.0 / window
    far = now - weights[then]
    return (1.0 - share) ** age * share * (np.outer(now, now) - np.outer(far, far))


def _of_row(weights: np.ndarray, then: int, window: int) -> np.ndarray:
    """M of the value of a batch that is a past row, over the steps it is stored."""
    last, total = len(weights) - 1, np.zeros((weights.shape[1],) * 2)
    for later in range(then + 1, min(then + ROWS, last) + 1):
        step, far = weights[later] - weights[later - 1], weights[-1] - weights[later]
        moved = np.outer(step, step) + np.outer(step, far) + np.outer(far, step)
        total += (1.0 - 1.0 / window) ** (last - later + 1) / ROWS * moved
    return total


def taylor_bias(weights: np.ndarray, window: int, batch_size: int) -> float:
    """−⟨Δθ, Q Δθ⟩ averaged over the window, and that of its mean."""
    far = weights[-1] - weights[-window:]
    return float(-np.square(far).sum(axis=1).mean() - 1.0 / (batch_size * window))


def brief(results: dict) -> str:
    """The ranges over all cells, and the rows of the middle window."""
    windows = results["config"]["windows"]
    rows = _rows(results, [windows[len(windows) // 2]])
    return f"{verdict(results)}\n\n{report.markdown_table(HEADINGS, rows)}\n{LEGEND}\n"


def verdict(results: dict) -> str:
    """The range of each bias, and how far streaming's is from its prediction."""
    measured, predicted = (
        np.array([cell[kind]["streaming_batch_norm"]["bias"] for cell in results["cells"]])
        for kind in ("measured", "predicted")
    )
    taylor = [c["measured"]["cross_iteration_batch_norm"]["bias"] for c in results["cells"]]
    off = np.abs(measured - predicted)
    worst = results["cells"][int(off.argmax())]
    return (
        f"In the {len(off)} cells of all windows, the bias of streaming is from "
        f"{_span(measured.tolist())} %, and the bias of the Taylor term from "
        f"{_span(taylor)} %. The bias of streaming differs from its prediction by at "
        f"most {100 * off.max():.1f} points (k = {worst['window']}, "
        f"{worst['turn']:g} radians)."
    )


def _span(values: list[float]) -> str:
    return f"{100 * min(values):+.1f} to {100 * max(values):+.1f}"


def markdown(results: dict) -> str:
    """Bias and deviation of the estimated variance, relative to the true one."""
    config, versions = results["config"], results["environment"]
    rows = _rows(results, config["windows"])
    return (
        f"Batch size {config['batch_size']}, {config['runs']} runs a cell:\n\n"
        f"{report.markdown_table(HEADINGS, rows)}\n{LEGEND} "
        f"JAX {versions['jax']}, Python {versions['python']}, {versions['device']}.\n"
    )


HEADINGS = (
    "k",
    "radians in k steps",
    "streaming bias, %",
    "predicted",
    "deviation, %",
    "predicted",
    "Taylor bias, %",
    "predicted",
    "deviation, %",
)
LEGEND = (
    "Of the estimated variance, relative to the true one. Taylor: the published method, "
    "its prediction before the guard against negative variances."
)


def _rows(results: dict, windows: Sequence[int]) -> list[tuple[str, ...]]:
    """A row per cell of these windows, under ``HEADINGS``."""
    rows = []
    for cell in (cell for cell in results["cells"] if cell["window"] in windows):
        streaming, taylor = (
            (cell["measured"][name], cell["predicted"][name])
            for name in ("streaming_batch_norm", "cross_iteration_batch_norm")
        )
        rows.append(
            (
                str(cell["window"]),
                f"{cell['turn']:g}",
                *(f"{100 * side['bias']:+.1f}" for side in streaming),
                *(f"{100 * side['deviation']:.1f}" for side in streaming),
                *(f"{100 * side['bias']:+.1f}" for side in taylor),
                f"{100 * taylor[0]['deviation']:.1f}",
            )
        )
    return rows


@report.drawn
def figure(results: dict) -> Any:
    """Bias and deviation over the turn; lines are predictions, dots measurements."""
    made = matplotlib.figure.Figure((8.4, 3.9))
    left, right = made.subplots(1, 2)
    for index, window in enumerate(results["config"]["windows"]):
        cells = [cell for cell in results["cells"] if cell["window"] == window]
        turns = [cell["turn"] for cell in cells]
        for axis, method, what, style in (
            (left, "streaming_batch_norm", "bias", "-"),
            (left, "cross_iteration_batch_norm", "bias", "--"),
            (right, "streaming_batch_norm", "deviation", "-"),
        ):
            look = report.look(index)
            predicted = [100 * cell["predicted"][method][what] for cell in cells]
            measured = [100 * cell["measured"][method][what] for cell in cells]
            label = f"k = {window}, {method}"
            axis.plot(turns, predicted, style, color=look["color"], label=label)
            axis.plot(turns, measured, linestyle="", **look)
    left.set_ylabel("bias of the variance, %")
    right.set_ylabel("its standard deviation, %")
    left.set_ylim(-105, 10)
    for axis in (left, right):
        axis.set_xlabel("radians in k steps")
    report.legend_below(made, 3)
    made.suptitle("lines: predicted, dots: measured")
    return made


# Name of the file -> the function that draws it from the results.
FIGURES = {"theory": figure}


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    main(tyro.cli(Config, args=arguments, description=__doc__, prog="theory"), Console())


if __name__ == "__main__":
    cli()
