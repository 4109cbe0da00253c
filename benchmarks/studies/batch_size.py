# SPDX-License-Identifier: Apache-2.0
"""Test accuracy against batch size, every method at its best learning rate.

Trains small networks at batch sizes 1 to 32 with every method, on the same number of
examples. All methods share one grid of rates. A separate seed chooses the rate of each
method at each batch size, on a validation part of the training images. The reported seeds
then train with that rate, and are tested on the test images. At one batch size every rate
is reported, to show the effect of the choice.

The output folder keeps finished runs. The next call with the same options and code does not
run them again. Two calls with different --networks may use the same folder at the same
time, and a third collects all results.

Run it with ``python -m benchmarks.studies.batch_size``.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import optax
    import tyro
    from rich.console import Console

from benchmarks.lib import methods, runs, study, training
from benchmarks.lib.data import Dataset
from benchmarks.studies import batch_size_report

# Methods with running statistics of a batch; the others have nothing to correct.
_CORRECTABLE = (
    "batch_norm",
    "cross_iteration_batch_norm",
    "cross_iteration_batch_norm-uncompensated",
    "small_batch_norm",
    "replay_batch_norm",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the study."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Examples per step."""
    methods: tuple[str, ...] = (
        "none",
        "nn.GroupNorm-1",
        "nn.GroupNorm",
        "batch_norm",
        "diminishing_batch_norm-0.5",
        "group_norm_plus",
        "group_batch_norm",
        "cross_iteration_batch_norm-uncompensated",
        "cross_iteration_batch_norm",
        "cross_iteration_batch_norm-burn_in",
        "cross_iteration_batch_norm-gradient",
        "small_batch_norm",
    )
    """Normalizers to compare."""
    networks: tuple[str, ...] = ("mlp", "cnn")
    """Networks to train; cnn_halved is cnn for images of 28x28."""
    learning_rates: tuple[float, ...] = (0.025, 0.1, 0.4, 1.6)
    """The grid: peak rates at batch size 32, scaled in proportion to the batch size."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Reported seeds, one run each."""
    tuning_seed: int = 0
    """The seed of the runs that choose rates."""
    every_rate_at: int = 2
    """The batch size for which all rates are reported."""
    examples: int | None = 1500
    """Largest number of images for training and validation, and for testing."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/batch_size")
    """Folder for results.json, table.md, the figures and finished runs."""


QUICK = Config(
    batch_sizes=(1, 2),
    methods=("batch_norm", "nn.GroupNorm", "small_batch_norm"),
    networks=("mlp",),
    learning_rates=(0.1, 0.4),
    seeds=(1, 2),
    epochs=1,
    examples=60,
)


class Split(NamedTuple):
    """Training and test images, and the images for choosing rates."""

    dataset: Dataset
    images: np.ndarray
    labels: np.ndarray


def split(dataset: Dataset) -> Split:
    """Sets the last fifth of the training images aside."""
    count = len(dataset.train_labels) * 4 // 5
    images, labels = dataset.train_images, dataset.train_labels
    rest = dataset._replace(
        train_images=images[:count],
        train_labels=labels[:count],
        train_groups=dataset.train_groups[:count],
    )
    return Split(rest, images[count:], labels[count:])


class Programs(NamedTuple):
    """The programs of a method at a batch size, compiled once for all rates and seeds."""

    trainer: training.Trainer
    corrected: training.Trainer | None  # the same, with corrected inference

    def start(self, key: jax.Array, rate: float) -> training.TrainState:
        """The first state, which contains its learning rate."""
        state = self.trainer.init(key)
        optimizer = state.opt_state._replace(
            hyperparams={"learning_rate": jnp.float32(rate)}
        )
        return state._replace(opt_state=optimizer)


def make_programs(run: runs.Run, dataset: Dataset) -> Programs:
    """Compiles once for all rates, because the rate is part of the optimizer's state."""
    steps, shape = run.steps(dataset), dataset.train_images.shape[1:]
    make = training.OPTIMIZERS[run.method.optimizer]

    def with_rate(learning_rate):
        return make(learning_rate, steps)

    optimizer = optax.inject_hyperparams(with_rate)(learning_rate=1.0)
    model: Any = run.model(dataset)
    trainer = training.make_trainer(model, shape, optimizer)
    if not run.method.name.startswith(_CORRECTABLE):
        return Programs(trainer, None)
    estimator = cbn_jax.corrected_inference(run.method.estimator(steps), run.method.pooled)
    model = model.clone(norm=methods.estimated(estimator))
    return Programs(trainer, training.make_trainer(model, shape, optimizer))


def refusal(programs: Programs, batch_size: int, dataset: Dataset) -> str | None:
    """The error message of a method that cannot train; nothing is run."""
    state = jax.eval_shape(programs.trainer.init, jax.random.key(0))
    images, labels = dataset.train_images, dataset.train_labels
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    try:
        jax.eval_shape(programs.trainer.step, state, images, labels, rows)
    except ValueError as error:
        return str(error)
    return None


class Outcome(NamedTuple):
    """The result of a run."""

    loss: float  # mean over the last quarter of the steps; if not finite, the run is lost
    validation: float  # accuracies
    test: float
    corrected: float | None  # on the test images, with corrected inference


def outcome(run: runs.Run, programs: Programs, parts: Split, bar: runs.Bar) -> Outcome:
    """Trains and predicts once."""
    dataset, steps = parts.dataset, run.steps(parts.dataset)
    state = programs.start(jax.random.key(run.seed), run.rate)
    rows = training.batches(
        len(dataset.train_labels), run.method.batch_size, run.epochs, run.seed
    )
    trained, losses = training.train(programs.trainer, dataset, rows, state), []
    for step, (last, loss) in enumerate(trained, 1):
        state = last
        losses.append(loss)
        if step % 100 == 0:
            bar.advance(100)
    mean = float(np.mean(jax.device_get(losses[-math.ceil(steps / 4) :])))
    bar.advance(steps % 100, _text(run, mean))
    test: Any = dataset.test_images, dataset.test_labels
    held_out: Any = parts.images, parts.labels
    evaluate, corrected = programs.trainer.evaluate, programs.corrected
    return Outcome(
        mean,
        float(evaluate(state, *held_out)),
        float(evaluate(state, *test)),
        None if corrected is None else float(corrected.evaluate(state, *test)),
    )


def _text(run: runs.Run, loss: float) -> str:
    return (
        f"{run.network} {run.method} batch {run.method.batch_size} "
        f"rate {run.learning_rate:g} seed {run.seed}: loss {loss:.3f}"
    )


def main(config: Config, console: Console) -> dict:
    """Runs the experiments that have no result yet; writes and prints all results."""
    runs.check_networks(config.networks)
    if config.every_rate_at not in config.batch_sizes:
        raise ValueError(
            f"--every-rate-at {config.every_rate_at} is none of --batch-sizes "
            f"{' '.join(map(str, config.batch_sizes))}; choose one of them."
        )
    chosen = [
        methods.parse(text, size)
        for text, size in itertools.product(config.methods, config.batch_sizes)
    ]
    parts = split(config.load())
    cells = [
        runs.Run(network, method, 0.0, config.epochs, seed=config.tuning_seed)
        for network, method in itertools.product(config.networks, chosen)
    ]
    with runs.Bar(console, sum(_steps(config, cell, parts) for cell in cells)) as bar:
        measured = [_measure(config, cell, parts, bar) for cell in cells]
    return study.publish(
        config,
        {"cells": measured},
        console,
        batch_size_report.markdown,
        **batch_size_report.FIGURES,
    )


def _steps(config: Config, cell: runs.Run, parts: Split) -> int:
    """The number of steps of all runs of a cell."""
    rates, seeds = len(config.learning_rates), len(config.seeds)
    every = cell.method.batch_size == config.every_rate_at
    return cell.steps(parts.dataset) * (rates + seeds * (rates if every else 1))


def _measure(config: Config, cell: runs.Run, parts: Split, bar: runs.Bar) -> dict:
    """A network and method at a batch size: the choice of the rate, and the accuracies."""
    programs = make_programs(cell, parts.dataset)
    about = {
        "network": cell.network,
        "label": str(cell.method),
        "batch_size": cell.method.batch_size,
    }
    if why := refusal(programs, cell.method.batch_size, parts.dataset):
        bar.advance(_steps(config, cell, parts))
        return about | {"refused": why}

    def end(rate: float, seed: int) -> Outcome:
        run = cell._replace(learning_rate=rate, seed=seed)
        return _kept(config, run, programs, parts, bar)

    tuning = {rate: end(rate, config.tuning_seed) for rate in config.learning_rates}
    best = max(tuning, key=lambda rate: (_found(tuning[rate]), -rate))
    every = cell.method.batch_size == config.every_rate_at
    reported = {
        rate: [end(rate, seed) for seed in config.seeds]
        for rate in (config.learning_rates if every else (best,))
    }
    return about | {
        "rate": best,
        "tuning": [tuning[rate].validation for rate in config.learning_rates],
        "test": [each.test for each in reported[best]],
        "corrected": [each.corrected for each in reported[best]],
        "lost": _lost(reported[best]),
        "at_rates": [
            {"rate": rate, "test": [e.test for e in ends], "lost": _lost(ends)}
            for rate, ends in reported.items()
            if every
        ],
    }


def _kept(config, run, programs, parts, bar) -> Outcome:
    identity = {
        **run._asdict(),
        "method": run.method._asdict(),
        "dataset": parts.dataset.name,
        "examples": [len(parts.dataset.train_labels), len(parts.dataset.test_labels)],
    }
    name = (
        f"{parts.dataset.name}-{run.network}-{run.method}-{run.method.batch_size}-"
        f"{run.learning_rate:g}-{run.seed}".replace("/", "_")
    )
    found = runs.kept(
        config.output / "runs" / name,
        identity,
        lambda: outcome(run, programs, parts, bar),
        lambda: bar.advance(run.steps(parts.dataset)),
    )
    return Outcome(*found)


def _found(end: Outcome) -> float:
    """Validation accuracy; none for a lost run."""
    return end.validation if np.isfinite(end.loss) else -1.0


def _lost(ends: list[Outcome]) -> int:
    return sum(not np.isfinite(end.loss) for end in ends)


if __name__ == "__main__":
    study.cli(Config, main, quick=QUICK)
