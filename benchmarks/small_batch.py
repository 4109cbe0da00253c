# SPDX-License-Identifier: Apache-2.0
"""What small batches do: the same small networks with different normalizers.

Trains an MLP and a residual CNN on real images at batch size 2 with batch norm, group
norm and cross-iteration batch norm, with batch norm at 32 as the mark to reach; prints a
table and draws the learning curves. Finished runs are kept in the output folder and taken
up again by the next call with the same options and code.

Run it with ``python -m benchmarks.small_batch``.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated

import jax

from ._optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

from . import data, methods, networks, report, timing, training


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
        "group_norm",
        "cross_iteration",
        "cross_iteration_burn_in",
        "batch_norm@32",
    )
    """Normalizers to compare; NAME@SIZE sets a batch size of its own."""
    networks: tuple[str, ...] = ("mlp", "cnn")
    """Networks to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each; a seed fixes the initial weights and the order of the examples."""
    epochs: int = 4
    """Passes over the training images."""
    learning_rate: float = 0.1
    """Peak rate at batch size 32; it is scaled in proportion to the batch size."""
    examples: int | None = None
    """Use at most so many images for training, and for testing."""
    timing_rounds: int = 20
    """Rounds of ten steps for the step-time ratios."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/small_batch")
    """Folder for results.json, table.md, curves.png and finished runs."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where prepared data is kept; tensorflow-datasets' default if not given."""


def main(config: Config, console: Console) -> dict:
    """Runs what is missing, measures step times, writes and shows the results."""
    chosen = [methods.parse(text, config.batch_size) for text in config.methods]
    for name in config.networks:
        if name not in networks.NETWORKS:
            known = ", ".join(networks.NETWORKS)
            raise ValueError(f"network {name!r} is unknown; known are {known}.")
    dataset = data.load(config.dataset, config.data_dir, config.examples)
    cells = []
    with _progress(console) as progress:
        total = progress.add_task("all runs", total=_total_steps(config, chosen, dataset))
        for network in config.networks:
            trainers = {
                text: (_trainer(config, network, method, dataset), method.batch_size)
                for text, method in zip(config.methods, chosen, strict=True)
            }
            progress.update(total, description=f"timing {network}")
            times = timing.time_steps(
                trainers,
                dataset.train_images,
                dataset.train_labels,
                baseline=_baseline(config),
                rounds=config.timing_rounds,
            )
            for text, method in zip(config.methods, chosen, strict=True):
                trainer, _ = trainers[text]
                curves = [
                    _curve(
                        config,
                        network,
                        text,
                        method,
                        trainer,
                        dataset,
                        seed,
                        progress,
                        total,
                    )
                    for seed in config.seeds
                ]
                cells.append(
                    {
                        "network": network,
                        "label": text,
                        "method": method.name,
                        "batch_size": method.batch_size,
                        "step_time": times[text]._asdict(),
                        "state_bytes": _state_bytes(trainer),
                        "curves": curves,
                    }
                )
    results = {
        "config": _plain(config),
        "baseline": _baseline(config),
        "environment": report.environment(),
        "cells": cells,
    }
    report.write_json(config.output / "results.json", results)
    (config.output / "table.md").write_text(report.markdown(results))
    report.figure(results, config.output / "curves.png")
    console.print(report.table(results))
    console.print(f"written to {config.output}/: results.json, table.md, curves.png")
    return results


def _baseline(config: Config) -> str:
    return "batch_norm" if "batch_norm" in config.methods else config.methods[0]


def _total_steps(config, chosen, dataset) -> int:
    per_seed = sum(
        training.count_steps(dataset, method.batch_size, config.epochs) for method in chosen
    )
    return per_seed * len(config.seeds) * len(config.networks)


def _trainer(config, network, method, dataset) -> training.Trainer:
    steps = training.count_steps(dataset, method.batch_size, config.epochs)
    model = networks.NETWORKS[network](norm=method.norm(steps), classes=dataset.classes)
    rate = config.learning_rate * method.batch_size / 32
    return training.make_trainer(model, dataset.train_images.shape[1:], rate, steps)


def _curve(
    config, network, text, method, trainer, dataset, seed, progress, total
) -> list[dict]:
    """The learning curve of one run, from its file if an earlier call finished it."""
    identity = {
        **_plain(
            config, without=("methods", "networks", "seeds", "output", "timing_rounds")
        ),
        "network": network,
        "method": text,
        "seed": seed,
        "versions": report.environment(),
        "source": report.source_digest(),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = config.output / "runs" / f"{network}-{text}-{seed}-{digest[:8]}.json"
    steps = training.count_steps(dataset, method.batch_size, config.epochs)
    if path.exists():
        progress.advance(total, steps)
        return json.loads(path.read_text())["curve"]
    curve, done = [], 0
    for point in training.run(
        trainer, dataset, batch_size=method.batch_size, epochs=config.epochs, seed=seed
    ):
        curve.append(point._asdict())
        progress.update(
            total,
            advance=point.step - done,
            description=f"{network} {text} seed {seed}: loss {point.loss:.3f}, "
            f"accuracy {100 * point.accuracy:.1f} %",
        )
        done = point.step
    report.write_json(path, {"identity": identity, "curve": curve})
    return curve


def _state_bytes(trainer: training.Trainer) -> int:
    state = jax.eval_shape(trainer.init, jax.random.key(0)).batch_stats
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _plain(config: Config, without: tuple[str, ...] = ()) -> dict:
    """The options as JSON holds them."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in without}
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
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
