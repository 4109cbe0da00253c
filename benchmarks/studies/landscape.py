# SPDX-License-Identifier: Apache-2.0
"""Smoothness of training and the effect of noise: group norm's analysis, repeated.

Trains the residual CNN with each method at five learning rates. Draws, step by step, the
band between the least and the greatest loss, and that of the gradient's changes. Then
trains with noise after every normalizer and compares test accuracies.

Run it with ``python -m benchmarks.studies.landscape``.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for
from benchmarks.lib.perturbation import Bands, draw, fan, perturb

with needed_for("benchmarks"):
    import optax
    import tyro
    from rich.console import Console

from benchmarks.lib import data, methods, networks, report, runs, study, training

BATCH_NORM = cbn_jax.batch_norm(methods.MOMENTUM)


def _group_batch(mix: jax.Array) -> cbn_jax.Estimator:
    return cbn_jax.group_batch_norm(mix, num_groups=methods.GROUPS)


# Estimators, or functions of a learned weight.
METHODS: dict[str, Any] = {
    "batch_norm": BATCH_NORM,
    "group_norm": _group_batch(jnp.ones(())),
    "group_batch_norm": cbn_jax.learned(
        cbn_jax.group_batch_norm, num_groups=methods.GROUPS
    ),
    "streaming_batch_norm": cbn_jax.streaming_batch_norm(4, momentum=methods.MOMENTUM),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the study."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare."""
    network: str = "cnn"
    """Network to train."""
    batch_size: int = 8
    """Examples per step."""
    learning_rates: tuple[float, ...] = (0.001, 0.002, 0.003, 0.004, 0.005)
    """Constant learning rates of Adam."""
    noise_mean: float = 0.001
    """Mean of the noise."""
    noise_std: float = 1.001
    """Standard deviation of the noise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per seed for the accuracies. The bands are drawn for the first seed."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/landscape")
    """Folder for results.json, table.md and landscape.svg."""


def main(config: Config, console: Console) -> dict:
    """Trains, measures, writes and shows the results."""
    runs.check_networks((config.network,))
    dataset = config.load()
    steps = training.count_steps(dataset, config.batch_size, config.epochs)
    each = len(config.learning_rates) + 2 * len(config.seeds)
    for name in config.methods:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is unknown; known are {', '.join(METHODS)}.")
    cells = []
    with runs.Bar(console, steps * each * len(config.methods)) as bar:
        for name in config.methods:
            method = METHODS[name]
            bar.advance(0, f"{name}, learning rates")
            bands = _bands(config, dataset, method, bar)
            accuracy = {
                how: [
                    _accuracy(config, dataset, noisy, seed, bar, f"{name}, {how}")
                    for seed in config.seeds
                ]
                for how, noisy in (("clean", method), ("noisy", _noisy(config, method)))
            }
            cells.append(
                {
                    "method": name,
                    "loss": bands.loss.tolist(),
                    "gradient_change": bands.gradient_change.tolist(),
                    "accuracy": accuracy,
                }
            )
    return study.publish(config, {"cells": cells}, console, markdown, **FIGURES)


def _noisy(config: Config, method: Any) -> Any:
    def noisy(estimator):
        return perturb(
            estimator,
            mean=config.noise_mean,
            std=config.noise_std,
            num_groups=methods.GROUPS,
        )

    if isinstance(method, cbn_jax.Estimator):
        return noisy(method)

    def of_weight(mix):
        return noisy(method.at(mix))

    return cbn_jax.learned(of_weight)


def _model(config: Config, dataset: data.Dataset, method: Any) -> Any:
    norm = methods.estimated(method)
    return networks.NETWORKS[config.network](norm=norm, classes=dataset.classes)


def _bands(config: Config, dataset: data.Dataset, method: Any, bar: runs.Bar) -> Bands:
    model, optimizer = _model(config, dataset, method), optax.scale_by_adam()
    trainer = training.make_trainer(model, dataset.train_images.shape[1:], optimizer)
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))

    def loss_fn(params, batch_stats, rows):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images[rows],
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return losses.mean(), updates["batch_stats"]

    def step(state, rows, rate):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), gradients = gradient(state.params, state.batch_stats, rows)
        updates, opt_state = optimizer.update(gradients, state.opt_state)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        params = optax.apply_updates(state.params, updates)
        return (
            training.TrainState(params, stats, opt_state),
            loss,
            gradients["Dense_0"]["kernel"],
        )

    def rows():
        seed, size = config.seeds[0], config.batch_size
        for rows in training.batches(len(labels), size, config.epochs, seed):
            yield rows
            bar.advance(len(config.learning_rates))

    return fan(
        jax.jit(step, donate_argnums=0),
        lambda: trainer.init(jax.random.key(config.seeds[0])),
        rows(),
        config.learning_rates,
    )


def _accuracy(config, dataset, method, seed, bar, name) -> float:
    """Accuracy at the middle learning rate."""
    rate = sorted(config.learning_rates)[len(config.learning_rates) // 2]
    trainer = training.make_trainer(
        _model(config, dataset, method), dataset.train_images.shape[1:], optax.adam(rate)
    )
    last = 0.0
    for point in training.run(
        trainer,
        dataset,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=seed,
        reports=1,
    ):
        bar.advance(point.step, f"{name}, seed {seed}")
        last = point.accuracy
    return last


def markdown(results: dict) -> str:
    """One row per method."""
    rows = []
    for cell in results["cells"]:
        loss, change = np.array(cell["loss"]), np.array(cell["gradient_change"])
        band = loss.max(axis=0) - loss.min(axis=0)
        clean, noisy = (100 * np.array(cell["accuracy"][k]) for k in ("clean", "noisy"))
        rows.append(
            (
                cell["method"],
                f"{band.mean():.3f}",
                f"{np.median(change):.3f}",
                f"{change.max(axis=0).mean():.3f}",
                report.spread(clean.tolist(), 1),
                report.spread(noisy.tolist(), 1),
                report.spread((noisy - clean).tolist(), 1),
            )
        )
    headings = (
        "method",
        "loss band",
        "gradient change",
        "its upper edge",
        "test, %",
        "with noise",
        "difference",
    )
    config = results["config"]
    return (
        f"{study.setting(results)}, {config['network']}, batch size "
        f"{config['batch_size']}:\n\n{report.markdown_table(headings, rows)}\n"
        f"Over learning rates {', '.join(f'{r:g}' for r in config['learning_rates'])} of "
        "Adam, first seed: distance of the greatest from the least loss, mean over steps; "
        "change of the last layer's gradient from step to step, median, and mean of the "
        "greatest. Test accuracy at the middle rate, mean ± standard deviation over seeds, "
        f"noise of mean {config['noise_mean']:g} and deviation {config['noise_std']:g} per "
        f"example and group. {study.measured_on(results)}\n"
    )


@report.drawn
def figure(results: dict) -> Any:
    """The bands, averaged over a fiftieth of the training."""
    bands = {
        cell["method"]: Bands(np.array(cell["loss"]), np.array(cell["gradient_change"]))
        for cell in results["cells"]
    }
    steps = next(iter(bands.values())).loss.shape[1]
    return draw(bands, smooth=max(1, steps // 50))


# Name of the file -> the function that draws it from the results.
FIGURES = {"landscape": figure}


if __name__ == "__main__":
    study.cli(Config, main)
