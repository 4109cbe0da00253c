# SPDX-License-Identifier: Apache-2.0
"""Adaptive batch norm: normalize always, never, or only heterogeneous batches?

Composes training batches once, so that some are homogeneous and others are not: half of
them of one class and half mixed, or sorted by brightness, or at random as a control.
Assesses the batches. Trains with batch norm always, never, and only above the threshold,
with the same learning rate for all. Prints test accuracies and draws the histograms of the
assessments.

Run it with ``python -m benchmarks.studies.adaptive``.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for
from cbn_jax.assessment import Assessment, assess

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console

from benchmarks.lib import data, methods, networks, report, runs, study, training

WAYS = ("always", "never", "adaptive", "adaptive, gated inference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the study."""

    networks: tuple[str, ...] = ("mlp", "cnn")
    """Networks to train."""
    batch_sizes: tuple[int, ...] = (2, 4, 8)
    """Examples per step."""
    compositions: tuple[str, ...] = ("classes", "brightness", "random")
    """Composition of batches: half of them of one class, sorted by brightness, or at
    random."""
    measure: str = "examples"
    """Heterogeneity: entries, channels or examples."""
    learning_rate: float = 0.1
    """Peak rate at batch size 32. It is scaled in proportion to the batch size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per seed. A seed fixes the initial weights, the batches and their order."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/adaptive")
    """Folder for results.json, table.md, assessments.svg and finished runs."""


def main(config: Config, console: Console) -> dict:
    """Composes, assesses, trains, writes and shows the results."""
    runs.check_networks(config.networks)
    dataset = config.load()
    wanted = list(
        itertools.product(config.networks, config.compositions, config.batch_sizes)
    )
    steps = sum(training.count_steps(dataset, size, config.epochs) for *_, size in wanted)
    # There are three trainings. The last two entries of WAYS differ only in inference.
    with runs.Bar(console, 3 * steps * len(config.seeds)) as bar:
        cells = [_cell(config, dataset, bar, *cell) for cell in wanted]
    assessments = [
        {"composition": composition, "batch_size": size, **_assessed(config, dataset, *c)}
        for c in itertools.product(config.compositions, config.batch_sizes)
        for composition, size in [c]
    ]
    found = {"cells": cells, "assessments": assessments}
    return study.publish(config, found, console, markdown, **FIGURES)


def compose(labels: np.ndarray, brightness: np.ndarray, how: str, size: int, seed: int):
    """Rows of every batch, ``[batches, size]``, without an incomplete batch."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels)).astype(np.int32)
    if how == "brightness":
        order = order[np.argsort(brightness[order], kind="stable")]
    if how != "classes":
        return order[: len(order) // size * size].reshape(-1, size)
    half = order[: len(order) // 2]
    alike = [half[labels[half] == label] for label in np.unique(labels)]
    alike = [rows[: len(rows) // size * size].reshape(-1, size) for rows in alike]
    mixed = order[len(order) // 2 :]
    mixed = mixed[: len(mixed) // size * size].reshape(-1, size)
    return np.concatenate([*alike, mixed])


def _batches(config, dataset, composition, size, seed) -> tuple[np.ndarray, Assessment]:
    images = dataset.train_images
    brightness = images.mean(axis=(1, 2, 3))
    rows = compose(dataset.train_labels, brightness, composition, size, seed)
    measured = cbn_jax.heterogeneity
    values = jax.vmap(lambda x: measured(x, config.measure))(jnp.asarray(images)[rows])
    values = np.asarray(values, np.float64)
    return rows, Assessment(values, float(values.mean()), config.measure)


def _assessed(config, dataset, composition, size) -> dict:
    """The assessment as a user makes it, one batch after another."""
    rows, _ = _batches(config, dataset, composition, size, config.seeds[0])
    made = assess((dataset.train_images[r] for r in rows), config.measure)
    counts, edges = np.histogram(made.values, bins=40)
    return {
        "report": str(made),
        "threshold": made.threshold,
        "counts": counts.tolist(),
        "edges": edges.tolist(),
    }


def _cell(config, dataset, bar, network, composition, size) -> dict:
    accuracy: dict[str, list[float]] = {way: [] for way in WAYS}
    steps = training.count_steps(dataset, size, config.epochs)
    trained = {
        way: _Gated(config, dataset, network, size, steps)
        for way in ("always", "never", "adaptive")
    }
    for seed, (way, run) in itertools.product(config.seeds, trained.items()):
        found = runs.kept(
            config.output / "runs" / f"{network}-{composition}-{size}-{way}-{seed}",
            {
                "cell": [network, composition, size, way, seed],
                "dataset": [dataset.name, config.examples],
                "training": [config.epochs, config.learning_rate, config.measure],
            },
            lambda run=run, way=way, seed=seed: run.accuracies(way, composition, seed, bar),
            lambda: bar.advance(steps),
        )
        for name, value in found.items():
            accuracy[name].append(value)
    return {
        "network": network,
        "composition": composition,
        "batch_size": size,
        "accuracy": accuracy,
    }


class _Gated:
    """A network with gated batch norm, trained on batches that are composed once."""

    def __init__(self, config, dataset: data.Dataset, network: str, size: int, steps: int):
        self.config, self.dataset = config, dataset
        self.network, self.size, self.steps = network, size, steps
        batch_norm = cbn_jax.batch_norm(methods.MOMENTUM)
        self.models = {
            inference: networks.NETWORKS[network](
                norm=methods.estimated(
                    cbn_jax.adaptive_batch_norm(batch_norm, inference=inference)
                ),
                classes=dataset.classes,
            )
            for inference in ("running", "gated")
        }
        rate = config.learning_rate * size / 32
        self.trainer = training.make_trainer(
            self.models["running"],
            dataset.train_images.shape[1:],
            training.OPTIMIZERS["sgd"](rate, steps),
        )
        self.set_gate = jax.jit(cbn_jax.set_gate, donate_argnums=0)

    def accuracies(self, way, composition, seed, bar) -> dict[str, float]:
        """Test accuracy for each way of predicting."""
        rows, found = _batches(self.config, self.dataset, composition, self.size, seed)
        flags = {
            "always": np.ones(len(rows), bool),
            "never": np.zeros(len(rows), bool),
            "adaptive": found.selected,
        }[way]
        state = self.trainer.init(jax.random.key(seed))
        train = jax.device_put((self.dataset.train_images, self.dataset.train_labels))
        name = f"{self.network}, {composition} at {self.size}, {way}, seed {seed}"
        for b in self._order(len(rows), seed):
            state = state._replace(batch_stats=self.set_gate(state.batch_stats, flags[b]))
            state, _ = self.trainer.step(state, *train, rows[b])
            bar.advance(1, name)
        bar.advance(self.steps - self.config.epochs * len(rows), name)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        threshold = {"always": -np.inf, "never": np.inf, "adaptive": found.threshold}[way]
        gated = self._accuracy_gated(
            variables, dataclasses.replace(found, threshold=threshold), seed
        )
        if way != "adaptive":
            return {way: gated}
        test = jax.device_put((self.dataset.test_images, self.dataset.test_labels))
        running = float(self.trainer.evaluate(state, *test))
        return {"adaptive": running, "adaptive, gated inference": gated}

    def _order(self, batches: int, seed: int) -> Iterator[int]:
        rng = np.random.default_rng(seed)
        for _ in range(self.config.epochs):
            yield from rng.permutation(batches).tolist()

    def _accuracy_gated(self, variables: Any, found: Assessment, seed: int) -> float:
        """Accuracy on random test batches of the training's size, measured one by one."""
        rows = np.stack(
            list(training.batches(len(self.dataset.test_labels), self.size, 1, seed))
        )
        images = jnp.asarray(self.dataset.test_images)[rows]

        def logits(batch):
            stats = cbn_jax.set_gate(variables["batch_stats"], found.gate(batch))
            gated = {**variables, "batch_stats": stats}
            return self.models["gated"].apply(gated, batch, train=False)

        labels = self.dataset.test_labels[rows]
        return float(np.mean(jax.jit(jax.vmap(logits))(images).argmax(-1) == labels))


def markdown(results: dict) -> str:
    """One row per network, composition and batch size."""
    rows = [
        (
            cell["network"],
            cell["composition"],
            str(cell["batch_size"]),
            *(report.spread([100 * a for a in cell["accuracy"][way]], 1) for way in WAYS),
        )
        for cell in results["cells"]
    ]
    found = "\n".join(
        f"- {a['composition']}, batch size {a['batch_size']}: "
        + a["report"].replace("\n", "; ")
        for a in results["assessments"]
    )
    return (
        f"{study.setting(results)}:\n\n"
        f"{report.markdown_table(('net', 'batches', 'batch', *WAYS), rows)}\n"
        "Test accuracy, %, mean ± standard deviation over seeds. always: batch norm; "
        "never: no normalization, in inference neither; adaptive: batches above the mean "
        "heterogeneity are normalized, in inference all of them, or those above the "
        "threshold (random test batches of the same size). "
        f"{study.measured_on(results)}\n\n"
        f"The assessments, first seed:\n\n{found}\n"
    )


def verdict(results: dict) -> str:
    """How often the gate is better than always and than never normalizing."""
    means = [
        {way: float(np.mean(values)) for way, values in cell["accuracy"].items()}
        for cell in results["cells"]
    ]
    ahead = {
        way: sum(max(m["adaptive"], m["adaptive, gated inference"]) > m[way] for m in means)
        for way in ("always", "never")
    }
    return (
        "With the better of its two kinds of inference, adaptive batch norm has a higher "
        f"mean accuracy than always normalizing in {ahead['always']} of {len(means)} "
        f"cells, and than never normalizing in {ahead['never']}."
    )


@report.drawn
def figure(results: dict) -> Any:
    """Histograms of heterogeneity, with a dashed line at the threshold."""
    found = results["assessments"]
    columns = len(results["config"]["batch_sizes"])
    lines = len(found) // columns
    made = matplotlib.figure.Figure((2.8 * columns, 2.0 * lines))
    axes = made.subplots(lines, columns, sharex=True, squeeze=False)
    for axis, one in zip(axes.flat, found, strict=True):
        edges = np.array(one["edges"])
        above = edges[:-1] > one["threshold"]
        for chosen, color, label in (
            (above, report.COLORS[0], "to normalize"),
            (~above, report.COLORS[1], "to leave"),
        ):
            axis.bar(
                edges[:-1][chosen],
                np.array(one["counts"])[chosen],
                np.diff(edges)[chosen],
                align="edge",
                color=color,
                label=label,
            )
        axis.axvline(one["threshold"], color="black", lw=1, ls="--")
        axis.set_title(f"{one['composition']}, batch size {one['batch_size']}")
    report.legend_below(made)
    for axis in axes[-1]:
        axis.set_xlabel(f"heterogeneity ({results['config']['measure']})")
    made.supylabel("training batches")
    return made


# Name of the file -> the function that draws it from the results.
FIGURES = {"assessments": figure}


if __name__ == "__main__":
    study.cli(Config, main)
