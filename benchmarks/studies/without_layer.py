# SPDX-License-Identifier: Apache-2.0
"""Which method suits norms without a layer before them, at two examples?

After an activation or a residual sum there is no layer whose weights a window could follow.
Trains a residual network that normalizes its sums, or an MLP that normalizes after its
activations, at batch size 2. The examples are independent or pairs of one class. The
optimizer makes a step at every batch or at every 16. Prints the test accuracy at each rate.
For each setting it prints the methods whose best mean is within two standard errors of the
best.

Run it with ``python -m benchmarks.studies.without_layer``.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import optax
    import tyro
    from rich.console import Console

from benchmarks.lib import data, methods, networks, report, runs, study, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the comparison."""

    networks: tuple[str, ...] = ("preactivation",)
    """Networks whose norms have no layer. mlp300_normalized_last is another choice; its
    width does not divide into the groups of group_norm."""
    methods: tuple[str, ...] = (
        "batch_norm",
        "batch_renorm",
        "momentum_batch_norm-window",
        "bidirectional_batch_norm",
        "moving_average_batch_norm",
        "online_norm",
        "group_norm",
    )
    """Normalizers to compare."""
    batch_size: int = 2
    """Examples per norm batch. The number must be even for pairs."""
    pairings: tuple[training.Pairing, ...] = ("independent", "one class")
    """Examples of a batch: independent examples, or pairs of one class."""
    accumulate: tuple[int, ...] = (1, 16)
    """Batches per step of the optimizer."""
    learning_rates: tuple[float, ...] = (0.1, 0.4)
    """Peak rates for 32 examples per step, scaled in proportion to the step."""
    seeds: tuple[int, ...] = (0, 1)
    """One run per seed."""
    epochs: int = 2
    """Passes over the training images."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/without_layer")
    """Folder for results.json, table.md and finished runs."""


QUICK = Config(
    networks=("mlp300_normalized_last",),
    methods=("batch_norm", "bidirectional_batch_norm"),
    accumulate=(1,),
    learning_rates=(0.1,),
    seeds=(0, 1),
    epochs=1,
    examples=64,
)


def main(config: Config, console: Console) -> dict:
    """Runs the experiments that have no result yet; writes and prints all results."""
    runs.check_networks(config.networks)
    dataset = config.load()
    settings = [
        dict(zip(("network", "pairing", "accumulate", "label", "rate"), each, strict=True))
        for each in itertools.product(
            config.networks,
            config.pairings,
            config.accumulate,
            config.methods,
            config.learning_rates,
        )
    ]
    steps = training.count_steps(dataset, config.batch_size, config.epochs)
    with runs.Bar(console, steps * len(settings) * len(config.seeds)) as bar:
        cells = [_measure(config, setting, dataset, steps, bar) for setting in settings]
    return study.publish(config, {"cells": cells}, console, markdown)


def _measure(config: Config, setting: dict, dataset: data.Dataset, steps: int, bar) -> dict:
    trainer = _trainer(config, setting, dataset, steps)
    name = f"{setting['network']}-{setting['label']}"
    found = []
    for seed in config.seeds:
        identity = {
            **setting,
            "seed": seed,
            "batch_size": config.batch_size,
            "epochs": config.epochs,
            "dataset": dataset.name,
            "examples": len(dataset.train_labels),
        }
        run = lambda s=seed: _accuracy(config, setting, trainer, dataset, s)  # noqa: E731
        found.append(runs.kept(config.output / "runs" / name, identity, run, lambda: None))
        bar.advance(steps, f"{name}: {100 * found[-1]['accuracy']:.0f} %")
    return {**setting, **{key: [each[key] for each in found] for key in found[0]}}


def _trainer(config: Config, setting: dict, dataset, steps: int) -> training.Trainer:
    method = methods.parse(setting["label"], config.batch_size)
    every = setting["accumulate"]
    rate = setting["rate"] * config.batch_size * every / 32
    optimizer: Any = training.OPTIMIZERS["sgd"](rate, max(1, steps // every))
    if every > 1:
        optimizer = optax.MultiSteps(optimizer, every)
    model = networks.NETWORKS[setting["network"]](
        norm=method.norm(steps), classes=dataset.classes
    )
    return training.make_trainer(model, dataset.train_images.shape[1:], optimizer)


def _accuracy(config: Config, setting: dict, trainer, dataset, seed: int) -> dict:
    size, epochs = config.batch_size, config.epochs
    rows = training.rows_of(dataset, setting["pairing"], size, epochs, seed)
    start = trainer.init(jax.random.key(seed))
    (last,) = collections.deque(training.train(trainer, dataset, rows, start), maxlen=1)
    state, loss = last
    test = jax.device_put((dataset.test_images, dataset.test_labels))
    lost = not np.isfinite(float(loss))
    return {"accuracy": float(trainer.evaluate(state, *test)), "lost": int(lost)}


def markdown(results: dict) -> str:
    """One row per setting and method; then the verdict."""
    config = results["config"]
    rates = [f"{rate:g}" for rate in config["learning_rates"]]
    rows = [
        (
            network,
            pairing,
            str(config["batch_size"] * every),
            label,
            *(report.spread([100 * a for a in c["accuracy"]], 1) + _lost(c) for c in cells),
        )
        for (network, pairing, every), by_label in _groups(results)
        for label, cells in by_label.items()
    ]
    headings = ("net", "batch holds", "step", "method", *(f"rate {rate}" for rate in rates))
    return (
        f"{study.setting(results)}, norm batch {config['batch_size']}; step: examples per "
        f"step of the optimizer.\n\n{report.markdown_table(headings, rows)}\n"
        f"{verdict(results)}\n\nTest accuracy in %, mean ± standard deviation over seeds; "
        f"rates are for steps of 32 examples. {study.measured_on(results)}\n"
    )


def _lost(cell: dict) -> str:
    return f" ({sum(cell['lost'])} lost)" if sum(cell["lost"]) else ""


def _groups(results: dict) -> Iterator:
    """((network, pairing, accumulate), {label: [cell per rate]})."""
    config = results["config"]
    for setting in itertools.product(
        config["networks"], config["pairings"], config["accumulate"]
    ):
        yield (
            setting,
            {
                label: [
                    cell
                    for cell in results["cells"]
                    if (cell["network"], cell["pairing"], cell["accumulate"]) == setting
                    and cell["label"] == label
                ]
                for label in config["methods"]
            },
        )


def brief(results: dict) -> str:
    """The verdict as a table."""
    counts, behind, total = _counted(results)
    rows = [(name, f"{counts[name]} of {total}", f"{behind[name]:.1f}") for name in counts]
    table = report.markdown_table(("method", "settings", "points behind at worst"), rows)
    return (
        f"{table}\nSettings: those within two standard errors of the best method, each "
        f"method at its best rate. {study.measured_on(results)}\n"
    )


def verdict(results: dict) -> str:
    """How often each method is within two standard errors of the best, at its best rate."""
    counts, behind, total = _counted(results)
    return "\n".join(
        f"{label}: within two standard errors of the best method in {counts[label]} of "
        f"{total} settings, at worst {behind[label]:.1f} points behind it."
        for label in counts
    )


def _counted(results: dict) -> tuple[dict[str, int], dict[str, float], int]:
    """Settings in which a method equals the best, its worst distance, and all settings."""
    groups = [by_label for _, by_label in _groups(results)]
    counts = dict.fromkeys(results["config"]["methods"], 0)
    behind = dict.fromkeys(counts, 0.0)
    for by_label in groups:
        best = {label: _best(cells) for label, cells in by_label.items()}
        top, error = max(best.values())
        for label, (mean, own) in best.items():
            counts[label] += top - mean <= 2 * np.hypot(error, own)
            behind[label] = max(behind[label], top - mean)
    return counts, behind, len(groups)


def _best(cells: list[dict]) -> tuple[float, float]:
    """Mean and standard error, in %, at the rate with the best mean."""
    accuracies = [100 * np.array(cell["accuracy"]) for cell in cells]
    best = max(accuracies, key=np.mean)
    return best.mean(), best.std(ddof=min(1, len(best) - 1)) / np.sqrt(len(best))


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
