# SPDX-License-Identifier: Apache-2.0
"""Diminishing batch norm: how fast should statistics forget old batches?

Trains the paper's network (two dense layers of 300) on similar data with ten weights α of
the current batch. The weights range from 1 (batch norm's training) over constants and 1/m
to 0. The batch size and optimizer are those of the paper. The network normalizes after the
activation as in the paper, or before it as is common. Prints test errors after the last
epoch and, as in the paper, the least error over all epochs. Keeps finished runs and does
not run them again.

Run it with ``python -m benchmarks.studies.diminishing``; ``--dataset digits``
needs no download.
"""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console

from benchmarks.lib import methods, report, runs, study

# Least test error on MNIST in the paper, %.
PUBLISHED = {
    "1": 2.70,
    "0.75": 1.91,
    "0.5": 1.84,
    "0.25": 1.91,
    "0.1": 1.90,
    "0.01": 1.94,
    "0.001": 1.95,
    "1/m": 2.10,
    "1/m²": 2.00,
    "0": 24.27,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the study."""

    dataset: str = "fashion_mnist"
    """digits (embedded), fashion_mnist, or any image classification set of
    tensorflow-datasets by name."""
    alphas: tuple[str, ...] = ("batch_norm", *methods.ALPHAS)
    """Weights of the current batch; batch_norm also uses batch norm's inference."""
    places: tuple[str, ...] = ("after", "before")
    """Place of the normalizer: after or before the activation."""
    batch_size: int = 100
    """Examples per step."""
    learning_rate: float = 0.01
    """Learning rate of AdaGrad."""
    epochs: int = 6
    """Passes over the training images."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/diminishing")
    """Folder for results.json, table.md, diminishing.svg and finished runs."""


def main(config: Config, console: Console) -> dict:
    """Runs the experiments that have no result yet; writes and prints all results."""
    dataset = config.load()
    chosen = [
        _run(config, place, alpha)
        for place, alpha in itertools.product(config.places, config.alphas)
    ]
    total = sum(run.steps(dataset) for run in chosen) * len(config.seeds)
    with runs.Bar(console, total) as bar:
        cells = [_cell(config, run, dataset, bar) for run in chosen]
    return study.publish(config, {"cells": cells}, console, markdown, **FIGURES)


NETWORKS = {"after": "mlp300_normalized_last", "before": "mlp300"}


def _run(config: Config, place: str, alpha: str) -> runs.Run:
    if place not in NETWORKS:
        raise ValueError(f"place is {place!r}, expected 'after' or 'before'.")
    name = alpha if alpha == "batch_norm" else f"diminishing_batch_norm-{alpha}"
    method = methods.parse(f"{name}+adagrad", config.batch_size)
    rate, epochs = config.learning_rate, config.epochs
    return runs.Run(NETWORKS[place], method, rate, epochs, seed=0, reports=epochs)


def _cell(config, run, dataset, bar) -> dict:
    trainer, folder = run.trainer(dataset), config.output / "runs"
    curves = [
        runs.curve(run._replace(seed=seed), trainer, dataset, folder, bar.advance)
        for seed in config.seeds
    ]
    name = run.method.name.removeprefix("diminishing_batch_norm-")
    return {
        "place": "after" if run.network == NETWORKS["after"] else "before",
        "alpha": name,
        "error": [[100 - 100 * p["accuracy"] for p in curve] for curve in curves],
        "lost": sum(not np.isfinite(curve[-1]["loss"]) for curve in curves),
    }


def markdown(results: dict) -> str:
    """One row per weight."""
    rows = []
    for cell in results["cells"]:
        error = np.array(cell["error"])  # [seeds, epochs]
        second_half = error[:, (error.shape[1] - 1) // 2 :]
        jumps = np.abs(np.diff(second_half, axis=1)).sum(axis=1)
        jumps = jumps / max(second_half.shape[1] - 1, 1)
        alpha = cell["alpha"]
        rows.append(
            (
                f"{cell['place']} activation",
                alpha,
                report.spread(error[:, -1].tolist(), 2),
                report.spread(error.min(axis=1).tolist(), 2),
                report.spread(jumps.tolist(), 2),
                str(cell["lost"]),
                f"{PUBLISHED[alpha]:.2f}" if alpha in PUBLISHED else "",
            )
        )
    headings = (
        "normalized",
        "α",
        "error, %",
        "least of epochs",
        "epoch to epoch",
        "lost",
        "paper, MNIST",
    )
    return (
        f"{study.setting(results)}, batch size {results['config']['batch_size']}:\n\n"
        f"{report.markdown_table(headings, rows)}\n"
        "Test errors, mean ± standard deviation over seeds: after the last epoch; the "
        "least of all epochs (chosen on the test data, as in the paper); and the mean "
        "change from epoch to epoch in the second half. lost: runs whose loss is not "
        "finite. "
        f"{study.measured_on(results)}\n"
    )


def verdict(results: dict) -> str:
    """Test errors of the paper's preferred weight, 0.25, its extremes, and batch norm."""
    sentences = []
    for place in results["config"]["places"]:
        last = {
            cell["alpha"]: report.spread([seed[-1] for seed in cell["error"]], 1)
            for cell in results["cells"]
            if cell["place"] == place
        }
        named = ", ".join(
            f"{error} % with {'α = ' * (alpha != 'batch_norm')}{alpha}"
            for alpha in ("batch_norm", "0.25", "0.01", "1/m", "1/m²", "0")
            if (error := last.get(alpha))
        )
        sentences.append(f"Normalized {place} the activation, test errors are {named}.")
    return " ".join(sentences)


@report.drawn
def figure(results: dict) -> Any:
    """Test error of every weight after each epoch, one panel per place."""
    places = results["config"]["places"]
    made = matplotlib.figure.Figure((1.6 + 3.6 * len(places), 3.8))
    axes = made.subplots(1, len(places), sharey=True, squeeze=False)[0]
    for axis, place in zip(axes, places, strict=True):
        cells = [cell for cell in results["cells"] if cell["place"] == place]
        for i, cell in enumerate(cells):
            error = np.array(cell["error"])
            axis.errorbar(
                np.arange(error.shape[1]) + 1,
                error.mean(axis=0),
                error.std(axis=0),
                **_look(cell["alpha"], i / len(cells)),
                label=cell["alpha"],
            )
        axis.set(xlabel="epoch", title=f"normalized {place} the activation")
    axes[0].set_ylabel("test error, %")
    axes[-1].legend(title="α", loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def _look(alpha: str, place: float) -> dict[str, Any]:
    """A constant α has a color by its size; a schedule is dotted, batch norm dashed."""
    if alpha == "batch_norm":
        return {"color": report.COLORS[0], "linestyle": "--"}
    style = "-" if re.fullmatch(r"[\d.]+", alpha) else ":"
    return {"color": matplotlib.colormaps["viridis"](place), "linestyle": style}


# Name of the file -> the function that draws it from the results.
FIGURES = {"diminishing": figure}


if __name__ == "__main__":
    study.cli(Config, main)
