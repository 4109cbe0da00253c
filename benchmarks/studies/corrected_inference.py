# SPDX-License-Identifier: Apache-2.0
"""Corrected inference: does it help networks that batch norm trained on small batches?

Trains networks with plain batch norm at small batch sizes. Then predicts the test images
with the same weights in several ways. Ordinary and corrected inference use the running
statistics of training, or statistics recomputed with the final weights. Fitted inference is
fitted in one pass over the training data. Batch statistics predict as in training. The
study also uses batches that are not random draws, in which every image occurs twice. Prints
a table and draws the outputs of the last normalizer in training and in inference.

Run it with ``python -m benchmarks.studies.corrected_inference``.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for
from cbn_jax.core.named import find_running, put_running

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console

    from cbn_jax.linen import Norm

from benchmarks.lib import data, methods, networks, report, runs, study, training

BATCH_NORM = cbn_jax.batch_norm(methods.MOMENTUM)
# The same average, exact for constant weights.
RECOMPUTED = cbn_jax.batch_norm(cbn_jax.cumulative())
INFERENCES = (
    "ordinary",
    "corrected",
    "recomputed",
    "recomputed, corrected",
    "fitted",
    "batch statistics",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the study."""

    networks: tuple[str, ...] = ("mlp", "cnn", "deep")
    """Networks to train."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Examples per step. With one example only the CNN has two values per feature."""
    draws: tuple[str, ...] = ("random", "twice")
    """Draws of batches: at random, or with every image twice."""
    learning_rate: float = 0.1
    """Peak rate at batch size 32. It is scaled in proportion to the batch size."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path(
        "results/corrected_inference"
    )
    """Folder for results.json, table.md, two figures and finished runs."""


def main(config: Config, console: Console) -> dict:
    """Trains, predicts in every way, writes and shows the results."""
    runs.check_networks(config.networks)
    dataset = config.load()
    wanted = [
        cell
        for cell in itertools.product(config.networks, config.draws, config.batch_sizes)
        if _is_possible(*cell)
    ]
    steps = sum(training.count_steps(dataset, size, config.epochs) for *_, size in wanted)
    with runs.Bar(console, steps * len(config.seeds)) as bar:
        cells = [_cell(config, dataset, bar, *cell) for cell in wanted]
        histograms = _histograms(config, dataset)
    found = {"cells": cells, "histograms": histograms}
    return study.publish(config, found, console, markdown, **FIGURES)


def _is_possible(network: str, draw: str, size: int) -> bool:
    if draw == "twice" and (size < 4 or size % 2):
        return False
    return size > 1 or network == "cnn"


def _cell(config, dataset, bar, network, draw, size) -> dict:
    run = _Trained(config, dataset, network, draw, size)
    return {
        "network": network,
        "draw": draw,
        "batch_size": size,
        "accuracy": [
            runs.kept(
                config.output / "runs" / f"{network}-{draw}-{size}-{seed}",
                {
                    "cell": [network, draw, size, seed],
                    "dataset": [dataset.name, config.examples],
                    "training": [config.epochs, config.learning_rate],
                },
                lambda seed=seed: run.accuracies(seed, bar),
                lambda: bar.advance(run.steps),
            )
            for seed in config.seeds
        ],
    }


class _Trained:
    """A network trained with plain batch norm, and ways to predict with it."""

    def __init__(self, config, dataset: data.Dataset, network: str, draw: str, size: int):
        self.dataset, self.size, self.draw = dataset, size, draw
        self.network, self.epochs = network, config.epochs
        self.steps = training.count_steps(dataset, size, config.epochs)
        rate = config.learning_rate * size / 32
        self.trainer = training.make_trainer(
            self.model(BATCH_NORM),
            dataset.train_images.shape[1:],
            training.OPTIMIZERS["sgd"](rate, self.steps),
        )
        corrected = cbn_jax.corrected_inference(BATCH_NORM, size)
        fitted = cbn_jax.fitted_inference(RECOMPUTED)
        self.predict = {
            "ordinary": self._predictor(BATCH_NORM),
            "corrected": self._predictor(corrected),
            "fitted": self._predictor(fitted),
        }
        self.recompute, self.fit = self._passer(RECOMPUTED), self._passer(fitted)
        self.in_training = jax.jit(self._in_training)

    def model(self, estimator: cbn_jax.Estimator) -> Any:
        return networks.NETWORKS[self.network](
            norm=methods.estimated(estimator), classes=self.dataset.classes
        )

    def rows(self, seed: int, epochs: int) -> Iterator[np.ndarray]:
        """Rows of every step."""
        count = len(self.dataset.train_labels)
        if self.draw == "random":
            return training.batches(count, self.size, epochs, seed)
        halves = training.batches(count, self.size // 2, 2 * epochs, seed)
        steps = training.count_steps(self.dataset, self.size, epochs)
        return (np.repeat(half, 2) for half in itertools.islice(halves, steps))

    def train(self, seed: int, bar: runs.Bar | None = None) -> training.TrainState:
        state = self.trainer.init(jax.random.key(seed))
        rows = self.rows(seed, self.epochs)
        name = f"{self.network}, batch size {self.size} ({self.draw}), seed {seed}"
        for after, _ in training.train(self.trainer, self.dataset, rows, state):
            state = after
            if bar:
                bar.advance(1, name)
        return state

    def accuracies(self, seed: int, bar: runs.Bar) -> dict[str, float]:
        """Test accuracy for each way of predicting."""
        state = self.train(seed, bar)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        found = {name: self.predict[name](variables) for name in ("ordinary", "corrected")}
        stats = self._pass(self.recompute, RECOMPUTED, variables, None, seed)
        again = {**variables, "batch_stats": stats}
        found["recomputed"] = self.predict["ordinary"](again)
        found["recomputed, corrected"] = self.predict["corrected"](again)
        fitted = cbn_jax.fitted_inference(RECOMPUTED)
        stats = self._pass(self.fit, fitted, variables, stats, seed)
        found["fitted"] = self.predict["fitted"]({**variables, "batch_stats": stats})
        found["batch statistics"] = self._accuracy_in_training(variables, seed)
        return found

    def _predictor(self, estimator) -> Callable[[Any], float]:
        model = self.model(estimator)
        images, labels = jax.device_put(
            (self.dataset.test_images, self.dataset.test_labels)
        )

        @jax.jit
        def accuracy(variables):
            logits = model.apply(variables, images, train=False)
            return jnp.mean(logits.argmax(-1) == labels)

        return lambda variables: float(accuracy(variables))

    def _passer(self, estimator) -> Callable:
        model, images = self.model(estimator), jax.device_put(self.dataset.train_images)

        @jax.jit
        def look(params, stats, rows):
            variables = {"params": params, "batch_stats": stats}
            _, updates = model.apply(
                variables, images[rows], train=True, mutable=["batch_stats"]
            )
            return updates["batch_stats"]

        return look

    def _pass(self, look, estimator, variables, inside, seed) -> Any:
        """States after one pass over the training data, with unchanged weights."""
        shape = (2, *self.dataset.train_images.shape[1:])
        stats = self.model(estimator).init(jax.random.key(0), jnp.ones(shape), train=False)[
            "batch_stats"
        ]
        if inside is not None:
            stats = put_running(stats, find_running(inside))
        for rows in self.rows(seed + 1000, 1):
            stats = look(variables["params"], stats, rows)
        return stats

    def _accuracy_in_training(self, variables, seed) -> float:
        """Accuracy by statistics of random test batches of training's size and draw."""
        count = len(self.dataset.test_labels)
        each = self.size if self.draw == "random" else self.size // 2
        hits = []
        for rows in training.batches(count, each, 1, seed):
            twice = rows if self.draw == "random" else np.repeat(rows, 2)
            hits.append(self.in_training(variables, twice))
        return float(np.mean(jax.device_get(hits)))

    def _in_training(self, variables, rows):
        images, labels = self.dataset.test_images, self.dataset.test_labels
        logits, _ = self.model(BATCH_NORM).apply(
            variables, jnp.asarray(images)[rows], train=True, mutable=["batch_stats"]
        )
        return jnp.mean(logits.argmax(-1) == jnp.asarray(labels)[rows])


def _histograms(config: Config, dataset: data.Dataset) -> dict:
    """Outputs of the last normalizer, before scale and bias, at the least batch size."""
    network = config.networks[-1]
    size = min(size for size in config.batch_sizes if _is_possible(network, "random", size))
    run = _Trained(config, dataset, network, "random", size)
    state = run.train(config.seeds[0])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    corrected = cbn_jax.corrected_inference(BATCH_NORM, size)
    edges = np.linspace(-4, 4, 81)
    count = len(dataset.test_labels) // size * size

    def outputs(estimator, images, train):
        _, seen = run.model(estimator).apply(
            variables,
            images,
            train=train,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, Norm),
        )
        last = max(seen["intermediates"], key=lambda name: int(name.split("_")[-1]))
        y = np.asarray(seen["intermediates"][last]["__call__"][0])
        scale, bias = (np.asarray(variables["params"][last][k]) for k in ("scale", "bias"))
        return ((y - bias) / scale).ravel()

    batches = np.split(dataset.test_images[:count], count // size)
    ways = {
        "training": np.concatenate([outputs(BATCH_NORM, b, True) for b in batches]),
        "ordinary": outputs(BATCH_NORM, dataset.test_images[:count], False),
        "corrected": outputs(corrected, dataset.test_images[:count], False),
    }
    return {
        "network": network,
        "batch_size": size,
        "edges": edges.tolist(),
        "density": {
            name: np.histogram(values, edges, density=True)[0].tolist()
            for name, values in ways.items()
        },
    }


def markdown(results: dict) -> str:
    """One row per network, draw and batch size."""
    rows = []
    for cell in results["cells"]:
        by_way = {
            way: [100 * found[way] for found in cell["accuracy"]] for way in INFERENCES
        }
        gain = np.subtract(by_way["corrected"], by_way["ordinary"]).tolist()
        rows.append(
            (
                cell["network"],
                cell["draw"],
                str(cell["batch_size"]),
                *(report.spread(values, 1) for values in by_way.values()),
                report.spread(gain, 1),
            )
        )
    headings = ("net", "draw", "batch", *INFERENCES, "corrected − ordinary")
    return (
        f"{study.setting(results)}:\n\n{report.markdown_table(headings, rows)}\n"
        "Test accuracy, %, of networks trained with batch_norm, by the way of predicting; "
        "mean ± standard deviation over seeds, the last column over pairs. recomputed: "
        "running statistics from one pass with the final weights; fitted: on top of these; "
        "batch statistics: those of test batches as in training. twice: every image is in "
        f"its batch two times. {study.measured_on(results)}\n"
    )


def verdict(results: dict) -> str:
    """The gain of corrected over ordinary inference, at batch size 1 and above."""

    def gain(cell):
        gains = [100 * (a["corrected"] - a["ordinary"]) for a in cell["accuracy"]]
        return float(np.mean(gains)), report.spread(gains, 1)

    cells = [cell for cell in results["cells"] if cell["draw"] == "random"]
    sentences = []
    for size in results["config"]["batch_sizes"]:
        found = [
            f"{gain(cell)[1]} ({cell['network']})"
            for cell in cells
            if cell["batch_size"] == size
        ]
        sentences.append(f"batch size {size}: {', '.join(found)}")
    return f"Points gained by corrected inference, {'; '.join(sentences)}."


@report.drawn
def figure(results: dict) -> Any:
    """Test error of every way, one panel per network and draw."""
    panels = list(dict.fromkeys((c["network"], c["draw"]) for c in results["cells"]))
    rows = math.ceil(len(panels) / 3)
    made = matplotlib.figure.Figure((9.0, 0.6 + 2.7 * rows))
    axes = made.subplots(rows, 3, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        cells = [c for c in results["cells"] if (c["network"], c["draw"]) == panel]
        for i, way in enumerate(INFERENCES):
            errors = [[100 - 100 * a[way] for a in cell["accuracy"]] for cell in cells]
            axis.errorbar(
                [cell["batch_size"] for cell in cells],
                np.mean(errors, axis=1),
                np.std(errors, axis=1),
                linestyle="--" if way == "batch statistics" else "-",
                **report.look(i),
                label=way,
            )
        sizes = [cell["batch_size"] for cell in cells]
        axis.set(title=f"{panel[0].upper()}, {panel[1]}", xscale="log", yscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("batch size in training")
    for axis in axes[:, 0]:
        axis.set_ylabel("test error, %")
    report.legend_below(made, len(INFERENCES))
    return made


@report.drawn
def activations(results: dict) -> Any:
    """Distributions of normalized activations in training and in inference."""
    found = results["histograms"]
    made = matplotlib.figure.Figure((5.6, 3.4))
    axis = made.subplots()
    middles = np.convolve(found["edges"], [0.5, 0.5], mode="valid")
    for i, (name, density) in enumerate(found["density"].items()):
        axis.plot(middles, density, color=report.COLORS[i], label=name)
    axis.set(
        xlabel="normalized activation, last normalizer",
        ylabel="density",
        yscale="log",
        title=f"{found['network'].upper()}, batch norm at batch size {found['batch_size']}",
    )
    axis.legend()
    return made


# Name of the file -> the function that draws it from the results.
FIGURES = {"accuracy": figure, "activations": activations}


if __name__ == "__main__":
    study.cli(Config, main)
