# SPDX-License-Identifier: Apache-2.0
"""Are the defaults robust? Test accuracy over a 16-fold range of learning rates.

Trains an MLP and a residual CNN at batch sizes 1, 2 and 4 with the recommended method and
with group norm. The reference is batch norm at batch size 32. All use five learning rates
with five seeds. Prints one table with the distance of the recommended method from the two
others in each cell. No rate is chosen, so no validation split is needed. The output folder
keeps finished runs, and the next call with the same options and code does not run them
again.

Run it with ``python -m benchmarks.studies.robustness``.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console
    from rich.markdown import Markdown

from benchmarks.lib import data, methods, report, runs


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a study."""

    dataset: str = "digits"
    """digits (embedded), fashion_mnist, or any image classification set of
    tensorflow-datasets by name."""
    batch_sizes: tuple[int, ...] = (1, 2, 4)
    """Examples per step."""
    methods: tuple[str, ...] = ("small_batch_norm", "nn.GroupNorm", "batch_norm@32")
    """First the method to judge, then the methods to compare it with. NAME@SIZE sets its
    own batch size."""
    networks: tuple[str, ...] = ("mlp", "cnn")
    """Networks to train."""
    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    """Peak rates at batch size 32, scaled in proportion to the batch size."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run per seed. A seed fixes the initial weights and the order of the examples."""
    epochs: int = 4
    """Passes over the training images."""
    examples: int | None = None
    """Largest number of images for training, and for testing."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/robustness")
    """Folder for results.json, table.md, robustness.svg and finished runs."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for prepared data; tensorflow-datasets' default if not given."""


def main(config: Config, console: Console) -> dict:
    """Runs the experiments that have no result yet; writes and prints all results."""
    runs.check_networks(config.networks)
    dataset = data.classified(config.dataset, config.data_dir, config.examples)
    # A method with its own batch size is the same at every batch size, so it is run once.
    chosen = dict.fromkeys(
        (network, methods.parse(text, size))
        for network in config.networks
        for size in config.batch_sizes
        for text in config.methods
    )
    cells = [
        runs.Run(network, method, rate, config.epochs, seed=0, reports=1)
        for (network, method), rate in itertools.product(chosen, config.learning_rates)
    ]
    total = len(config.seeds) * sum(cell.steps(dataset) for cell in cells)
    with runs.Bar(console, total) as bar:
        measured = [_measure(config, cell, dataset, bar) for cell in cells]
    results = {
        "config": report.plain(config),
        "environment": report.environment(),
        "cells": measured,
    }
    results = report.write_results(config.output / "results.json", results)
    (config.output / "table.md").write_text(markdown(results))
    figure(results, config.output / "robustness.svg")
    console.print(Markdown(markdown(results)))
    console.print(f"written to {config.output}/: results.json, table.md, robustness.svg")
    return results


def _measure(config, cell: runs.Run, dataset, bar) -> dict:
    trainer, folder = cell.trainer(dataset), config.output / "runs"
    last = [
        runs.curve(cell._replace(seed=seed), trainer, dataset, folder, bar.advance)[-1]
        for seed in config.seeds
    ]
    return {
        "network": cell.network,
        "label": str(cell.method),
        "batch_size": cell.method.batch_size,
        "learning_rate": cell.learning_rate,
        # If the loss is not finite, the run is lost, regardless of its last accuracy.
        "lost": sum(not np.isfinite(point["loss"]) for point in last),
        "accuracy": [point["accuracy"] for point in last],
    }


def _groups(results: dict):
    """(network, batch size, {label: [cell per rate]}), a method's own size everywhere."""
    config = results["config"]
    for network, size in itertools.product(config["networks"], config["batch_sizes"]):
        yield (
            network,
            size,
            {
                text: [
                    cell
                    for cell in results["cells"]
                    if cell["network"] == network
                    and cell["label"] == text
                    and ("@" in text or cell["batch_size"] == size)
                ]
                for text in config["methods"]
            },
        )


def verdict(results: dict) -> str:
    """The number of cells in which the judged method is ahead, and the worst distance."""
    judged, *others = results["config"]["methods"]
    sentences = []
    for label in others:
        pairs = [
            pair
            for _, _, by_label in _groups(results)
            for pair in zip(by_label[judged], by_label[label], strict=True)
        ]
        ahead = sum(np.mean(a["accuracy"]) >= np.mean(b["accuracy"]) for a, b in pairs)
        worst = min(pairs, key=lambda pair: _difference(*pair)[0])
        below = sum(_distance(*pair).startswith("**") for pair in pairs)
        sentences.append(
            f"The mean accuracy of {judged} is at least that of {label} in {ahead} of "
            f"{len(pairs)} cells; the worst difference is {_distance(*worst).strip('*')} "
            f"points, and {below} are negative by more than two standard errors."
        )
    lost = sum(cell["lost"] for cell in results["cells"])
    count = sum(len(cell["accuracy"]) for cell in results["cells"])
    sentences.append(f"{lost} of {count} runs ended with a loss that is not finite.")
    return "\n".join(sentences)


def markdown(results: dict) -> str:
    """Accuracies, and the judged method's distance from each other method."""
    config, versions = results["config"], results["environment"]
    rates = [f"{rate:g}" for rate in config["learning_rates"]]
    rows = []
    for network, size, by_label in _groups(results):
        judged = by_label[config["methods"][0]]
        for label, cells in by_label.items():
            rows.append((network, str(size), label, *(_accuracy(cell) for cell in cells)))
        for label in config["methods"][1:]:
            distances = [
                _distance(*pair) for pair in zip(judged, by_label[label], strict=True)
            ]
            rows.append((network, str(size), f"*minus {label}*", *distances))
    headings = ("net", "batch", "test accuracy, % at rate", *rates)
    return (
        f"{config['dataset']}, {config['epochs']} epochs, {len(config['seeds'])} seeds:\n\n"
        f"{report.markdown_table(headings, rows)}\n{verdict(results)}\n\n"
        "Mean ± standard deviation over seeds; differences of the means ± their standard "
        f"error, bold where negative by more than two. JAX {versions['jax']}, Flax "
        f"{versions['flax']}, Python {versions['python']}, {versions['device']}, "
        f"{versions['processor']}.\n"
    )


def _accuracy(cell: dict) -> str:
    text = report.spread([100 * a for a in cell["accuracy"]], 1)
    return f"{text} ({cell['lost']} lost)" if cell["lost"] else text


def _difference(judged: dict, other: dict) -> tuple[float, float]:
    """The difference of the means, in points, and its standard error."""
    pair = [100 * np.array(cell["accuracy"]) for cell in (judged, other)]
    error = np.sqrt(sum(a.var(ddof=min(1, len(a) - 1)) / len(a) for a in pair))
    return pair[0].mean() - pair[1].mean(), error


def _distance(judged: dict, other: dict) -> str:
    difference, error = _difference(judged, other)
    text = f"{difference:+.1f} ± {error:.1f}"
    return f"**{text}**" if difference < -2 * error else text


@report.drawn
def figure(results: dict) -> Any:
    """One panel per network and batch size: test error over the learning rate."""
    config = results["config"]
    shape = len(config["networks"]), len(config["batch_sizes"])
    made = matplotlib.figure.Figure((3.2 * shape[1], 2.8 * shape[0]))
    axes = made.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for axis, (network, size, by_label) in zip(axes.flat, _groups(results), strict=True):
        for index, (label, cells) in enumerate(by_label.items()):
            error = 100 - 100 * np.array([cell["accuracy"] for cell in cells])
            rates = [cell["learning_rate"] for cell in cells]
            style = "--" if "@" in label else "-"
            axis.errorbar(
                rates,
                error.mean(axis=1),
                error.std(axis=1),
                linestyle=style,
                **report.look_of(label, index),
                label=label,
            )
        axis.set(title=f"{network.upper()}, batch size {size}", xscale="log", yscale="log")
        axis.set_xticks(config["learning_rates"], config["learning_rates"])
        axis.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axis.minorticks_off()
    made.supxlabel("peak learning rate, per 32 examples")
    made.supylabel("test error, %")
    report.legend_below(made)
    return made


# Name of the file -> the function that draws it from the results.
FIGURES = {"robustness": figure}


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__, prog="robustness")
    try:
        main(config, Console())
    except ValueError as error:
        sys.exit(f"robustness: {error}")


if __name__ == "__main__":
    cli()
