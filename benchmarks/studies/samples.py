# SPDX-License-Identifier: Apache-2.0
"""Number of sampled positions: accuracy and error of the statistics against cost.

Counts the FLOPs of a training step of a ResNet-18 on 32x32 images at batch size 2. The
methods are streaming and replay with an increasing number of sampled positions. On the
residual CNN of the main job the study measures two results of the positions: the error of
the statistics along the same run, and the test accuracy of networks trained with each.
Prints a table and draws both curves.

Run it with ``python -m benchmarks.studies.samples``.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for
from cbn_jax.diagnostics import Errors

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console
    from rich.markdown import Markdown

from benchmarks.lib import data, methods, report, runs, training
from benchmarks.studies import cost, statistics_error


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    dataset: str = "digits"
    """digits (embedded), fashion_mnist, or any image classification set of
    tensorflow-datasets by name."""
    batch_size: int = 2
    """Examples per step."""
    methods: tuple[str, ...] = (
        "streaming_batch_norm-4",
        "streaming_batch_norm-8",
        "streaming_batch_norm-16",
        "streaming_batch_norm-32",
        "streaming_batch_norm-all",
        "replay_batch_norm-4",
        "replay_batch_norm-8",
        "replay_batch_norm-16",
        "replay_batch_norm-32",
    )
    """N positions per step; streaming_batch_norm-8 is the default."""
    network: str = "cnn"
    """Network to train."""
    counted: str = "resnet18"
    """Network whose FLOPs are counted."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per seed."""
    epochs: int = 4
    """Passes over the training images."""
    learning_rate: float = 0.4
    """Peak rate at batch size 32. It is scaled in proportion to the batch size."""
    examples: int | None = None
    """Largest number of images for training, and for testing."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/samples")
    """Folder for results.json, table.md, samples.svg and finished runs."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for prepared data; tensorflow-datasets' default if not given."""


def main(config: Config, console: Console) -> dict:
    """Counts, trains, measures, writes and shows the results."""
    dataset = data.classified(config.dataset, config.data_dir, config.examples)
    chosen = [methods.parse(text, config.batch_size) for text in config.methods]
    steps = training.count_steps(dataset, config.batch_size, config.epochs)
    with runs.Bar(console, steps * len(config.seeds) * (len(chosen) + 1)) as bar:
        bar.advance(0, "measuring statistics")
        errors = _errors(config, dataset, bar)
        cells = [
            {
                "label": str(method),
                "accuracy": _accuracy(config, method, dataset, bar),
                **errors[str(method)],
            }
            for method in chosen
        ]
    flops = cost.flops(config.counted, config.batch_size, config.methods)
    results = {
        "config": report.plain(config),
        "environment": report.environment(),
        "cells": [{**cell, "flops": flops[cell["label"]]} for cell in cells],
    }
    results = report.write_results(config.output / "results.json", results)
    (config.output / "table.md").write_text(markdown(results))
    figure(results, config.output / "samples.svg")
    console.print(Markdown(markdown(results)))
    console.print(f"written to {config.output}/: results.json, table.md, samples.svg")
    return results


def _estimators(config: Config) -> dict[str, cbn_jax.Estimator]:
    """Every method, and the method that normalizes: streaming with all positions."""
    window = max(1, 32 // config.batch_size)
    made = {statistics_error.USE: cbn_jax.streaming_batch_norm(window, samples=None)}
    for text in config.methods:
        kind, _, count = text.partition("-")
        samples = None if count == "all" else int(count)
        factory = getattr(cbn_jax, kind)
        made[text] = factory(window, samples=samples)
    return made


def _errors(config: Config, dataset, bar) -> dict[str, dict]:
    """Mean error over layers and measurements, one number per seed."""
    study = statistics_error.Config(
        batch_size=config.batch_size, epochs=config.epochs, every=50
    )
    estimators = _estimators(config)
    pair = statistics_error.make_pair(
        study, config.network, config.learning_rate, estimators, dataset
    )
    measured = [
        list(statistics_error.records(study, *pair, dataset, seed, bar))
        for seed in config.seeds
    ]
    return {
        text: {
            kind: [
                float(np.mean([getattr(e[text], kind) for _, r in run for e in r.values()]))
                for run in measured
            ]
            for kind in Errors._fields
        }
        for text in config.methods
    }


def _accuracy(config: Config, method: methods.Method, dataset, bar) -> list[float]:
    run = runs.Run(
        config.network, method, config.learning_rate, config.epochs, 0, reports=1
    )
    trainer, folder = run.trainer(dataset), config.output / "runs"
    return [
        runs.curve(run._replace(seed=seed), trainer, dataset, folder, bar.advance)[-1][
            "accuracy"
        ]
        for seed in config.seeds
    ]


def markdown(results: dict) -> str:
    """One row per method."""
    config, versions = results["config"], results["environment"]
    rows = [
        (
            cell["label"],
            f"{cell['flops']:.2f}",
            report.spread(cell["mean"], 3),
            report.spread(cell["scale"], 3),
            report.spread([100 * a for a in cell["accuracy"]], 1),
        )
        for cell in results["cells"]
    ]
    headings = ("method", "FLOPs / BN", "error of the mean", "of the scale", "test, %")
    return (
        f"{config['dataset']}, batch size {config['batch_size']}, {config['epochs']} "
        f"epochs, rate {config['learning_rate']:g}, {len(config['seeds'])} seeds:\n\n"
        f"{report.markdown_table(headings, rows)}\n"
        f"FLOPs of a training step of {config['counted']}; errors and accuracy of "
        f"{config['network']}, mean ± standard deviation over seeds. "
        f"JAX {versions['jax']}, Flax {versions['flax']}, Python {versions['python']}, "
        f"{versions['device']}, {versions['processor']}.\n"
    )


@report.drawn
def figure(results: dict) -> Any:
    """Error of the scale and accuracy over the FLOPs, one line per kind of method."""
    made = matplotlib.figure.Figure((8.4, 3.4))
    left, right = made.subplots(1, 2)
    for index, kind in enumerate(("streaming_batch_norm", "replay_batch_norm")):
        cells = [cell for cell in results["cells"] if cell["label"].startswith(kind)]
        flops = [cell["flops"] for cell in cells]
        for axis, key, unit in ((left, "scale", 1), (right, "accuracy", 100)):
            values = unit * np.array([cell[key] for cell in cells])
            axis.errorbar(
                flops,
                values.mean(1),
                values.std(1),
                **report.look_of(kind, index),
                label=kind,
            )
            for place, (x, y) in enumerate(zip(flops, values.mean(1), strict=True)):
                text = cells[place]["label"].partition("-")[2]
                offset = (3, 4 if place % 2 else -10)  # neighbors may be close
                axis.annotate(text, (x, y), offset, textcoords="offset points", fontsize=7)
    left.set_ylabel("error of the scale (log of the ratio)")
    right.set_ylabel("test accuracy, %")
    for axis in (left, right):
        axis.set_xlabel("FLOPs of a step / batch norm's")
        axis.set_xscale("log")
    report.legend_below(made)
    made.suptitle("numbers: positions looked at in each step")
    return made


# Name of the file -> the function that draws it from the results.
FIGURES = {"samples": figure}


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__, prog="samples")
    try:
        main(config, Console())
    except ValueError as error:
        sys.exit(f"samples: {error}")


if __name__ == "__main__":
    cli()
