# SPDX-License-Identifier: Apache-2.0
"""Which normalizer trains a network with two images per step?

Trains an MLP and a residual CNN on real images at batch size 2. The two images of a step
are independent, or they are of one class, as neighboring frames and patches are. The
reference is batch norm with 32 independent images. Prints a table and draws the learning
curves.

The output folder keeps finished runs. The next call with the same options and code does not
run them again. With --checkpoint-dir an interrupted run resumes from its last checkpoint.

Run it with ``python -m benchmarks.small_batch``.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console

from benchmarks.lib import checkpoints, data, methods, report, runs, timing, training


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a study."""

    dataset: str = "digits"
    """digits (embedded), fashion_mnist, or any image classification set of
    tensorflow-datasets by name."""
    batch_size: int = 2
    """Examples per step."""
    methods: tuple[str, ...] = (
        "batch_norm",
        "nn.GroupNorm",
        "group_norm-standardize",
        "small_batch_norm",
        "batch_norm@32",
    )
    """Normalizers to compare. NAME@SIZE sets its own batch size, and then uses independent
    images only."""
    pairings: tuple[training.Pairing, ...] = ("independent", "one class")
    """Relation of the images of a step."""
    networks: tuple[str, ...] = ("mlp", "cnn")
    """Networks to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per seed. A seed fixes the initial weights and the order of the examples."""
    epochs: int = 3
    """Passes over the training images."""
    learning_rate: float = 0.1
    """Peak rate at batch size 32. It is scaled in proportion to the batch size."""
    precision: runs.Precision = "float32"
    """Precision of activations and products. Parameters, optimizer and statistics are
    float32."""
    examples: int | None = None
    """Largest number of images for training, and for testing."""
    timing_rounds: int = 20
    """Rounds of ten steps for the step-time ratios."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/small_batch")
    """Folder for results.json, table.md, curves.svg and finished runs."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for prepared data; tensorflow-datasets' default if not given."""
    checkpoint_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for checkpoints, four per run. An interrupted run resumes from the last."""


# Options that do not affect runs.
_AROUND = ("timing_rounds", "output", "data_dir", "checkpoint_dir")


def main(config: Config, console: Console) -> dict:
    """Executes missing runs, measures step times, writes and shows the results."""
    chosen = [methods.parse(text, config.batch_size) for text in config.methods]
    if config.timing_rounds < 1:
        raise ValueError(
            f"--timing-rounds is {config.timing_rounds}, expected at least 1 for a median."
        )
    runs.check_networks(config.networks)
    dataset = data.classified(config.dataset, config.data_dir, config.examples)
    total = len(config.seeds) * sum(
        run.steps(dataset)
        for network in config.networks
        for run in _runs(config, network, chosen)
    )
    if config.checkpoint_dir is not None:
        options = {k: v for k, v in report.plain(config).items() if k not in _AROUND}
        checkpoints.claim(config.checkpoint_dir, options)
    with runs.Bar(console, total) as bar:
        cells = [
            cell
            for network in config.networks
            for cell in _cells(config, network, chosen, dataset, bar)
        ]
    results = {
        "config": report.plain(config),
        "baseline": _baseline(config),
        "environment": report.environment(),
        "cells": cells,
    }
    results = report.write_results(config.output / "results.json", results)
    (config.output / "table.md").write_text(report.markdown(results))
    report.figure(results, config.output / "curves.svg")
    console.print(report.table(results))
    console.print(f"written to {config.output}/: results.json, table.md, curves.svg")
    return results


def _baseline(config: Config) -> str:
    return "batch_norm" if "batch_norm" in config.methods else config.methods[0]


def _runs(config: Config, network: str, chosen: list[methods.Method]) -> list[runs.Run]:
    """One run for each pairing and method, then the references."""

    def run(method, pairing):
        return runs.Run(
            network,
            method,
            config.learning_rate,
            config.epochs,
            config.seeds[0],
            precision=config.precision,
            pairing=pairing,
        )

    compared = [method for method in chosen if method.batch_size == config.batch_size]
    references = [method for method in chosen if method not in compared]
    pairs = itertools.product(config.pairings, compared)
    made = [run(method, pairing) for pairing, method in pairs]
    return made + [run(method, "independent") for method in references]


def _cells(config, network, chosen, dataset, bar) -> list[dict]:
    """One network with every method: step times side by side, then the curves."""
    every = _runs(config, network, chosen)
    firsts = {run.method: run for run in reversed(every)}
    trainers = {method: run.trainer(dataset) for method, run in firsts.items()}
    runners = timing.make_runners(
        {str(method): (trainers[method], method.batch_size) for method in chosen},
        dataset.train_images,
        dataset.train_labels,
    )
    for name, run in runners.items():
        bar.advance(0, f"compiling {network} {name}")
        run(1)
    bar.advance(0, f"timing {network}")
    times = timing.side_by_side(runners, _baseline(config), config.timing_rounds, steps=10)
    return [
        {
            "network": network,
            "pairing": run.pairing,
            "label": str(run.method),
            "method": run.method.name,
            "batch_size": run.method.batch_size,
            "step_time": times[str(run.method)]._asdict(),
            "state_bytes": _state_bytes(trainers[run.method]),
            "curves": [
                runs.curve(
                    run._replace(seed=seed),
                    trainers[run.method],
                    dataset,
                    config.output / "runs",
                    bar.advance,
                    config.checkpoint_dir,
                )
                for seed in config.seeds
            ],
        }
        for run in every
    ]


def _state_bytes(trainer: training.Trainer) -> int:
    state = jax.eval_shape(trainer.init, jax.random.key(0)).batch_stats
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def compare(results: dict, usual: dict) -> str:
    """Compares test accuracies with those of the same runs in float32, in two sentences."""
    recommended, below = [], []
    for cell, other in zip(results["cells"], usual["cells"], strict=True):
        ends = [
            np.array([100 * curve[-1]["accuracy"] for curve in each["curves"]])
            for each in (cell, other)
        ]
        difference = ends[0].mean() - ends[1].mean()
        error = np.sqrt(sum(end.var(ddof=1) / len(end) for end in ends))
        where = f"{cell['network']}, {cell['pairing']}"
        text = f"{cell['label']} {difference:+.1f} ± {error:.1f} ({where})"
        if cell["method"] == "small_batch_norm":
            recommended.append(text)
        if difference < -2 * error:
            below.append(text)
    return (
        f"Test accuracy with {results['config']['precision']} activations minus that with "
        f"float32, in points: {', '.join(recommended)}. {len(below)} of "
        f"{len(usual['cells'])} cells are negative by more than two standard errors"
        f"{': ' if below else ''}{', '.join(below)}."
    )


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__, prog="small_batch")
    try:
        main(config, Console())
    except ValueError as error:
        sys.exit(f"small_batch: {error}")


if __name__ == "__main__":
    cli()
