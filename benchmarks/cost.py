# SPDX-License-Identifier: Apache-2.0
"""What each method costs: FLOPs, bytes and state of a training step, and its time.

FLOPs and bytes are XLA's count for the compiled step (forward, backward, SGD with
momentum) on a ResNet-18 with the stem for 32x32 images and on the MLP; times are measured
side by side in one process. Everything is given as a ratio to batch norm.

Run it with ``python -m benchmarks.cost``.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from ._optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import track

from . import methods, networks, report, runs, timing, training

BASELINE = "batch_norm"
SHAPES = {"mlp": (14, 14, 1), "cnn": (8, 8, 1), "resnet18": (32, 32, 3)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    networks: tuple[str, ...] = ("mlp", "resnet18")
    """Networks to count."""
    batch_sizes: tuple[int, ...] = (1, 2, 8)
    """Examples per step; one example is left out where batch norm cannot train on it."""
    methods: tuple[str, ...] = (
        "group_norm",
        "small_batch",
        "streaming_all",
        "cross_iteration",
        "cross_iteration_gradient",
        "replay_16",
    )
    """Normalizers to compare with batch norm."""
    timing_rounds: int = 10
    """Rounds of steps for the times; 0 counts without running anything."""
    timing_steps: int = 2
    """Steps per round."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/cost")
    """Folder for results.json and table.md."""


def main(config: Config, console: Console) -> dict:
    """Counts and times every cell, writes and shows the results."""
    runs.check_networks(config.networks)
    pairs = [
        (network, size)
        for network, size in itertools.product(config.networks, config.batch_sizes)
        if network != "mlp" or size > 1
    ]
    cells = [
        cell
        for network, size in track(pairs, "counting and timing", console=console)
        for cell in _cells(config, network, size)
    ]
    results = {
        "config": report.plain(config),
        "environment": report.environment(),
        "cells": cells,
    }
    report.write_json(config.output / "results.json", results)
    (config.output / "table.md").write_text(markdown(results))
    console.print(Markdown(markdown(results)))
    console.print(f"written to {config.output}/: results.json, table.md")
    return results


def flops(network: str, size: int, names: Sequence[str]) -> dict[str, float]:
    """FLOPs of a training step with each method, as ratios to batch norm's."""
    shape = SHAPES[network]
    trainers = _trainers(network, size, (BASELINE, *names))
    counts = {name: _count(t, shape, size)["flops"] for name, t in trainers.items()}
    return {name: counts[name] / counts[BASELINE] for name in names}


def _trainers(network: str, size: int, names: Sequence[str]) -> dict:
    trainers = {}
    for name in names:
        norm = methods.parse(name, size).norm(steps=1000)
        model = networks.NETWORKS[network](norm=norm, classes=10)
        trainers[name] = training.make_trainer(
            model, SHAPES[network], training.OPTIMIZERS["sgd"](0.01, 1000)
        )
    return trainers


def _cells(config: Config, network: str, size: int) -> list[dict]:
    shape = SHAPES[network]
    names = (BASELINE, *config.methods)
    trainers = _trainers(network, size, names)
    counts = {name: _count(trainer, shape, size) for name, trainer in trainers.items()}
    times = _times(config, trainers, shape, size)
    return [
        {
            "network": network,
            "batch_size": size,
            "label": name,
            **{
                what: counts[name][what] / counts[BASELINE][what]
                for what in ("flops", "bytes accessed")
            },
            "state": counts[name]["state"] / counts[name]["params"],
            "time": times.get(name),
        }
        for name in names
    ]


def _count(trainer: training.Trainer, shape: tuple[int, ...], size: int) -> dict:
    """XLA's count for one step; nothing is run."""
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    labels, rows = (jax.ShapeDtypeStruct((size,), jnp.int32) for _ in range(2))
    step: Any = trainer.step
    counted = step.lower(state, images, labels, rows).compile().cost_analysis()
    return {
        "flops": counted["flops"],
        "bytes accessed": counted["bytes accessed"],
        "state": _bytes(state.batch_stats),
        "params": _bytes(state.params),
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _times(config, trainers, shape, size) -> dict:
    if config.timing_rounds == 0:
        return {}
    rng = np.random.default_rng(0)
    images = rng.random((size, *shape), np.float32)
    times = timing.time_steps(
        {name: (trainer, size) for name, trainer in trainers.items()},
        images,
        np.zeros(size, np.int32),
        baseline=BASELINE,
        rounds=config.timing_rounds,
        steps=config.timing_steps,
    )
    return {name: value._asdict() for name, value in times.items()}


def markdown(results: dict) -> str:
    """One row a network, batch size and method."""
    versions = results["environment"]
    rows = [
        (
            cell["network"],
            str(cell["batch_size"]),
            cell["label"],
            f"{cell['flops']:.2f}",
            f"{cell['bytes accessed']:.2f}",
            f"{cell['state']:.2f}",
            _ratio(cell["time"]),
        )
        for cell in results["cells"]
    ]
    headings = ("net", "batch", "method", "FLOPs", "bytes", "state / θ", "time")
    return (
        f"{report.markdown_table(headings, rows)}\n"
        "FLOPs, bytes and time of a training step as ratios to batch_norm (time: median "
        "and quartiles of side-by-side ratios); state / θ: bytes of batch_stats over bytes "
        f"of the parameters. JAX {versions['jax']}, Flax {versions['flax']}, Python "
        f"{versions['python']}, {versions['device']}, {versions['processor']}.\n"
    )


def _ratio(time: dict | None) -> str:
    if time is None:
        return "–"
    return f"{time['ratio']:.2f} ({time['ratio_low']:.2f}–{time['ratio_high']:.2f})"


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__, prog="cost")
    try:
        main(config, Console())
    except ValueError as error:
        sys.exit(f"cost: {error}")


if __name__ == "__main__":
    cli()
