# SPDX-License-Identifier: Apache-2.0
"""Masks of a U-Net that was trained with one map tile per step.

Trains the U-Net of the study of norm batches on tiles of the Earth, with one tile per step.
Each method uses the rate that ``norm_batch`` chose. Draws the predicted masks on tiles of
the test region, and prints the mean intersection over union.

Run it with ``python -m benchmarks.studies.masks``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.colors
    import matplotlib.figure
    import tyro
    from rich.console import Console

from benchmarks.lib import replicas, report, runs, study, tasks
from benchmarks.studies import norm_batch as trainings
from benchmarks.studies.norm_batch_results import Cell, Run, tested

COLORS = ("#08306b", "#b8a67a", "#56B4E9")  # sea, land, lakes


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the study."""

    task: str = "earth"
    """A task with a label for every position of a picture."""
    norm_batch: int = 1
    """Tiles per step."""
    methods: tuple[str, ...] = (
        "batch_norm",
        "group_norm-standardize",
        "small_batch_norm",
        "small_batch_norm-group_norm",
    )
    """Methods of the study of norm batches."""
    learning_rate: float | None = None
    """Rate for 32 tiles per step; if not given, the rate that norm_batch chose for each
    method."""
    tiles: int = 5
    """Tiles to draw: those of the test region with most of the rarest class, lakes."""
    seed: int = 0
    """Seed of weights and order."""
    epochs: float = 1.0
    """Multiple of the usual number of passes."""
    examples: int | None = 20000
    """Largest number of tiles for training, and for testing."""
    rates: Annotated[Path, tyro.conf.arg(metavar="FILE")] = trainings.COMMITTED
    """Results of norm_batch."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/masks")
    """Folder for results.json, table.md and masks.svg."""


QUICK = Config(
    methods=("batch_norm", "carried_batch_norm"), learning_rate=0.1, tiles=2, epochs=0.01
)


def main(config: Config, console: Console) -> dict:
    """Trains with every method, predicts, writes and shows the results."""
    cell = Cell(config.task, config.norm_batch, config.norm_batch, "independent", "sgd")
    rates = {name: _rate(config, cell, name) for name in config.methods}
    images, labels = tasks.load(tasks.TASKS[config.task], config.examples).test
    shown = _telling(labels, config.tiles)
    with runs.Bar(console, len(rates)) as bar:
        found = []
        for name, rate in rates.items():
            bar.advance(0, name)
            run = Run(cell, name, rate, config.seed)
            found.append(_predicted(config, run, images, labels, shown))
            bar.advance(1)
    content = {
        "images": [_text(np.rint(255 * images[i]).astype(np.uint8)) for i in shown],
        "truth": [_digits(labels[i]) for i in shown],
        "side": images.shape[1],
        "cells": found,
    }
    return study.publish(config, content, console, markdown, **FIGURES)


def _rate(config: Config, cell: Cell, method: str) -> float:
    if config.learning_rate is not None:
        return config.learning_rate
    results = json.loads(config.rates.read_text()) if config.rates.exists() else None
    found = tested(results).get(cell, {}) if results else {}
    if method not in found:
        raise ValueError(
            f"{config.rates} has no rate for {method} on {cell.task} at norm batch "
            f"{cell.norm_batch}; give --learning-rate, or run python -m "
            f"benchmarks.studies.norm_batch --tasks {cell.task} first."
        )
    return found[method].rate


def _telling(labels: np.ndarray, count: int) -> list[int]:
    """The tiles with most of the rarest class, in the order of the data."""
    shares = np.stack([(labels == k).mean((1, 2)) for k in range(labels.max() + 1)], 1)
    rarest = shares[:, shares.mean(0).argmin()]
    return np.sort(np.argsort(-rarest, kind="stable")[:count]).tolist()


def _predicted(config: Config, run: Run, images, labels, shown: list[int]) -> dict:
    """Score and masks of one method."""
    options = trainings.Config(epochs=config.epochs, examples=config.examples)
    trainer, state, _ = trainings.fitted(options, run)
    counts = replicas.counted(trainer, state, images, labels)
    masks = jax.device_get(trainer.classes(state, images[np.array(shown)]))
    return {
        "method": run.method,
        "rate": run.rate,
        "score": tasks.score(counts, dense=True),
        "masks": [_digits(mask) for mask in masks],
    }


def _digits(mask: np.ndarray) -> str:
    """Classes as a string, one digit per position."""
    return "".join(map(str, mask.reshape(-1).tolist()))


def _text(image: np.ndarray) -> str:
    return image.tobytes().hex()


def markdown(results: dict) -> str:
    """One row per method."""
    config = results["config"]
    rows = [
        (cell["method"], f"{cell['rate']:g}", f"{100 * cell['score']:.1f}")
        for cell in results["cells"]
    ]
    table = report.markdown_table(("method", "rate", "mean IoU, %"), rows)
    return (
        f"{config['task']}, {config['norm_batch']} tile a step, seed {config['seed']}:\n\n"
        f"{table}\nMean intersection over union of sea, land and lakes on the test region. "
        f"Rates are for steps of 32. {study.measured_on(results)}\n"
    )


@report.drawn
def figure(results: dict) -> Any:
    """One row per tile: picture, true mask, and the mask of each method."""
    names = [cell["method"] for cell in results["cells"]]
    side, count = results["side"], len(results["images"])
    made = matplotlib.figure.Figure((1.5 * (2 + len(names)), 0.5 + 1.5 * count))
    axes = made.subplots(count, 2 + len(names), squeeze=False)
    classes = matplotlib.colors.ListedColormap(COLORS)
    for row, place in zip(axes, range(count), strict=True):
        picture = bytes.fromhex(results["images"][place])
        row[0].imshow(np.frombuffer(picture, np.uint8).reshape(side, side, -1))
        masks = [results["truth"][place]]
        masks += [cell["masks"][place] for cell in results["cells"]]
        for axis, mask in zip(row[1:], masks, strict=True):
            pixels = np.array(list(mask), int).reshape(side, side)
            axis.imshow(pixels, cmap=classes, vmin=0, vmax=2, interpolation="nearest")
    for axis in axes.flat:
        axis.axis("off")
    titles = ["tile", "truth"]
    titles += [
        cell["method"].replace("-", "-\n") + f"\n{100 * cell['score']:.0f} % IoU"
        for cell in results["cells"]
    ]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return made


FIGURES = {"masks": figure}


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
