# SPDX-License-Identifier: Apache-2.0
"""Errors of each method's statistics while a network trains.

Trains the networks of the main job at batch size 2, normalized by streaming batch norm. The
other methods see the same activations. Every few steps, the estimates of each method are
compared with the moments of a large batch under the same weights. Prints a table and draws
the errors.

Run it with ``python -m benchmarks.studies.statistics_error``.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for
from cbn_jax.diagnostics import Errors, errors, reference, watch
from cbn_jax.figures import draw_errors

with needed_for("benchmarks"):
    import tyro
    from flax import linen as nn
    from rich.console import Console
    from rich.markdown import Markdown

    from cbn_jax.linen import Norm

from benchmarks.lib import data, networks, report, runs, training

USE = "streaming_batch_norm"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a study."""

    dataset: str = "digits"
    """digits (embedded), fashion_mnist, or any image classification set of
    tensorflow-datasets by name."""
    batch_size: int = 2
    """Examples per step."""
    networks: tuple[str, ...] = ("mlp", "cnn")
    """Networks to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per seed. A seed fixes the initial weights and the order of the examples."""
    epochs: int = 4
    """Passes over the training images."""
    learning_rates: tuple[float, ...] = (0.1, 0.8)
    """Peak rates at batch size 32, scaled in proportion to the batch size."""
    window: int = 16
    """Iterations in the window of every method except batch norm."""
    every: int = 50
    """Number of steps between measurements."""
    reference: int = 512
    """Number of training images in the batch whose moments are the truth."""
    examples: int | None = None
    """Largest number of images for training."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path(
        "results/statistics_error"
    )
    """Folder for results.json, table.md and statistics_error.svg."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for prepared data; tensorflow-datasets' default if not given."""


def methods(config: Config) -> dict[str, cbn_jax.Estimator]:
    """The methods to compare."""
    window = config.window
    samples = max(16, config.batch_size)
    return {
        "batch_norm": cbn_jax.batch_norm(),
        "cross_iteration_batch_norm-uncompensated": cbn_jax.cross_iteration_batch_norm(
            window, rho=0.0
        ),
        "cross_iteration_batch_norm": cbn_jax.cross_iteration_batch_norm(window),
        "streaming_batch_norm": cbn_jax.streaming_batch_norm(window),
        "replay_batch_norm": cbn_jax.replay_batch_norm(window, samples=samples),
    }


def main(config: Config, console: Console) -> dict:
    """Trains, measures, writes and shows the results."""
    runs.check_networks(config.networks)
    dataset = data.classified(config.dataset, config.data_dir, config.examples)
    steps = training.count_steps(dataset, config.batch_size, config.epochs)
    if config.every > steps:
        raise ValueError(f"{steps} steps are fewer than --every {config.every}; lower it.")
    runs_in_all = len(config.seeds) * len(config.networks) * len(config.learning_rates)
    with runs.Bar(console, steps * runs_in_all) as bar:
        results = {
            "config": report.plain(config),
            "environment": report.environment(),
            "runs": list(_runs(config, dataset, bar)),
        }
    results = report.write_results(config.output / "results.json", results)
    (config.output / "table.md").write_text(markdown(results))
    figure(results, config.output / "statistics_error.svg")
    console.print(Markdown(markdown(results)))
    console.print(
        f"written to {config.output}/: results.json, table.md, statistics_error.svg"
    )
    return results


def _runs(config, dataset, bar) -> Iterator[dict]:
    """Runs every network and rate with every seed."""
    chosen = methods(config)
    for network, rate in itertools.product(config.networks, config.learning_rates):
        pair = make_pair(config, network, rate, chosen, dataset)
        for seed in config.seeds:
            bar.advance(0, f"{network} rate {rate:g} seed {seed}")
            run = list(records(config, *pair, dataset, seed, bar))
            columns = _columns(run, list(chosen))
            yield {"network": network, "learning_rate": rate, "seed": seed, **columns}


def records(config, train, measure, dataset, seed, bar) -> Iterator[tuple[int, dict]]:
    """One run: (step, errors) at every measurement."""
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    rows = training.batches(len(labels), config.batch_size, config.epochs, seed)
    state = train.init(jax.random.key(seed))
    for step, chosen in enumerate(rows, start=1):
        due = step % config.every == 0
        # A step donates its parameters, and the truth is measured under these parameters.
        params = jax.tree.map(jnp.copy, state.params) if due else None
        state, _ = train.step(state, images, labels, chosen)
        if due:
            many = images[: config.reference]
            yield step, errors(measure(params, state.batch_stats, many))
        bar.advance(1)


def make_pair(
    config, network, rate, chosen, dataset
) -> tuple[training.Trainer, Callable[..., Any]]:
    """The network that trains, and its copy that measures."""

    def model(estimator):
        def norm(layer: nn.Module, train: bool) -> nn.Module:
            return Norm(estimator, layer=layer, use_running_average=not train)

        return networks.NETWORKS[network](norm=norm, classes=dataset.classes)

    watched, twin = (model(make(chosen, USE)) for make in (watch, reference))

    @jax.jit
    def measure(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        _, measured = twin.apply(variables, images, train=True, mutable=["batch_stats"])
        return measured["batch_stats"]

    steps = training.count_steps(dataset, config.batch_size, config.epochs)
    rate = rate * config.batch_size / 32
    shape = dataset.train_images.shape[1:]
    return training.make_trainer(
        watched, shape, training.OPTIMIZERS["sgd"](rate, steps)
    ), measure


def _columns(records: list, names: list[str]) -> dict:
    """Records for JSON: layer ↦ method ↦ mean or scale ↦ a number per step."""

    def column(layer, name, kind):
        values = (getattr(measured[layer][name], kind) for _, measured in records)
        return [float(f"{value:.4g}") for value in values]

    return {
        "steps": [step for step, _ in records],
        "errors": {
            layer: {
                name: {kind: column(layer, name, kind) for kind in Errors._fields}
                for name in names
            }
            for layer in records[0][1]
        },
    }


HEADINGS = ("net", "rate", "method", "error of the mean", "error of the scale")


def markdown(results: dict) -> str:
    """The table, from the results as written to JSON."""
    versions = results["environment"]
    config = results["config"]
    return (
        f"{report.title(results)}:\n\n"
        f"{report.markdown_table(HEADINGS, _rows(results))}\n"
        "Error of the mean in true standard deviations, of the scale as the log of the "
        "ratio to the true one; RMS over features, mean over layers and measurements; mean "
        "± standard deviation over seeds. A measurement at which no feature of a layer "
        "varies is left out. The truth: "
        f"{config['reference']} training images under the same weights. Networks are "
        f"normalized by {USE}; window {config['window']} for all but batch. "
        f"JAX {versions['jax']}, Flax {versions['flax']}, Python {versions['python']}, "
        f"{versions['device']}, {versions['processor']}.\n"
    )


def brief(results: dict) -> str:
    """The error of the scale alone, with a column for each network and rate."""
    cells = _cells(results)
    methods = next(iter(results["runs"][0]["errors"].values()))
    rows = [
        (
            method,
            *(
                report.spread([mean_error(run, method, "scale") for run in same], 3)
                for same in cells.values()
            ),
        )
        for method in methods
    ]
    headings = ("error of the scale", *(f"{net}, rate {rate:g}" for net, rate in cells))
    return (
        f"{report.title(results)}:\n\n{report.markdown_table(headings, rows)}\n"
        "The log of the ratio of the estimated scale to the true one: RMS over features, "
        "mean over layers and measurements, mean ± standard deviation over seeds.\n"
    )


def _rows(results: dict) -> Iterator[tuple[str, ...]]:
    for (network, rate), same in _cells(results).items():
        for method in next(iter(same[0]["errors"].values())):
            means = ([mean_error(r, method, kind) for r in same] for kind in Errors._fields)
            cells = (report.spread(values, 3) for values in means)
            yield network, f"{rate:g}", method, *cells


def _cells(results: dict) -> dict[tuple[str, float], list[dict]]:
    """The runs of every network and rate."""
    cells: dict[tuple[str, float], list[dict]] = {}
    for run in results["runs"]:
        cells.setdefault((run["network"], run["learning_rate"]), []).append(run)
    return cells


def mean_error(run: dict, method: str, kind: str) -> float:
    """Mean over layers and measurements."""
    return float(np.nanmean([layer[method][kind] for layer in run["errors"].values()]))


COLORED = ("batch_norm", "cross_iteration_batch_norm", "streaming_batch_norm")


@report.drawn
def figure(results: dict) -> Any:
    """First and last layer of every network at the highest rate, means over the seeds."""
    highest = max(results["config"]["learning_rates"])
    panels = {
        f"{network} {layer}, rate {rate:g}": [run["errors"][layer] for run in same]
        for (network, rate), same in _cells(results).items()
        for layer in (list(same[0]["errors"])[i] for i in (0, -1))
        if rate == highest
    }

    def at(i, seeds):
        return {
            method: Errors(
                *(np.nanmean([s[method][k][i] for s in seeds]) for k in Errors._fields)
            )
            for method in sorted(seeds[0], key=_place)
        }

    steps = results["runs"][0]["steps"]
    measured = [
        (step, {panel: at(i, seeds) for panel, seeds in panels.items()})
        for i, step in enumerate(steps)
    ]
    return draw_errors(measured, layers=list(panels))


def _place(method: str) -> int:
    """The place of a method in the order of colors, which is that of all figures."""
    return COLORED.index(method) if method in COLORED else len(COLORED)


# Name of the file -> the function that draws it from the results.
FIGURES = {"statistics_error": figure}


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__, prog="statistics_error")
    try:
        main(config, Console())
    except ValueError as error:
        sys.exit(f"statistics_error: {error}")


if __name__ == "__main__":
    cli()
