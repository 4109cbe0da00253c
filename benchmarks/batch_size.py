# SPDX-License-Identifier: Apache-2.0
"""Test accuracy against batch size, every method at its own best learning rate.

Trains small networks at batch sizes 1 to 32 with every method, all on the same number of
examples. The rate of each method at each batch size is chosen on a validation part of the
training images, with a seed of its own, over one grid that all methods share; then come
the seeds that are reported, on the test images. At one batch size every rate is reported,
which shows how much hangs on the choice. Finished runs are kept in the output folder and
taken up again by the next call with the same options and code; two calls with different
--networks may work on the same folder at the same time, and a third puts all together.

Run it with ``python -m benchmarks.batch_size``.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from cbn_jax._figure import new_figure, tidy

from ._optional import needed_for

with needed_for("benchmarks"):
    import optax
    import tyro
    from rich.console import Console

from . import methods, report, runs, study, training
from .data import Dataset

# Those that keep running statistics of a batch: the others have nothing to correct.
_CORRECTABLE = ("batch_norm", "cross_iteration", "naive", "small_batch", "replay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the study."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Examples per step."""
    methods: tuple[str, ...] = (
        "none",
        "layer_norm",
        "group_norm",
        "batch_norm",
        "diminishing_0.5",
        "group_plus",
        "group_batch",
        "naive",
        "cross_iteration",
        "cross_iteration_burn_in",
        "cross_iteration_gradient",
        "small_batch",
    )
    """Normalizers to compare."""
    networks: tuple[str, ...] = ("mlp", "cnn")
    """Networks to train; cnn_halved is cnn for images of 28x28."""
    learning_rates: tuple[float, ...] = (0.025, 0.1, 0.4, 1.6)
    """Peak rates at batch size 32, scaled in proportion to the batch size: the grid."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds that are reported, one run each."""
    tuning_seed: int = 0
    """The seed with which rates are chosen."""
    every_rate_at: int = 2
    """The batch size at which all rates are reported."""
    examples: int | None = 1500
    """Use at most so many images for training and validation, and for testing."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/batch_size")
    """Folder for results.json, table.md, the figures and finished runs."""


QUICK = Config(
    batch_sizes=(1, 2),
    methods=("batch_norm", "group_norm", "small_batch"),
    networks=("mlp",),
    learning_rates=(0.1, 0.4),
    seeds=(1, 2),
    epochs=1,
    examples=60,
)


class Split(NamedTuple):
    """Training and test images, and those on which rates are chosen."""

    dataset: Dataset
    images: np.ndarray
    labels: np.ndarray


def split(dataset: Dataset) -> Split:
    """Sets the last fifth of the training images aside."""
    count = len(dataset.train_labels) * 4 // 5
    images, labels = dataset.train_images, dataset.train_labels
    rest = dataset._replace(train_images=images[:count], train_labels=labels[:count])
    return Split(rest, images[count:], labels[count:])


class Programs(NamedTuple):
    """Compiled once for all rates and seeds of a method at a batch size."""

    trainer: training.Trainer
    corrected: training.Trainer | None  # the same, with corrected inference

    def start(self, key: jax.Array, rate: float) -> training.TrainState:
        """The first state, with its learning rate in it."""
        state = self.trainer.init(key)
        optimizer = state.opt_state._replace(
            hyperparams={"learning_rate": jnp.float32(rate)}
        )
        return state._replace(opt_state=optimizer)


def make_programs(run: runs.Run, dataset: Dataset) -> Programs:
    """The rate is part of the optimizer's state, so that another one compiles nothing."""
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
    """What the method says where it cannot train; nothing is run."""
    state = jax.eval_shape(programs.trainer.init, jax.random.key(0))
    images, labels = dataset.train_images, dataset.train_labels
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    try:
        jax.eval_shape(programs.trainer.step, state, images, labels, rows)
    except ValueError as error:
        return str(error)
    return None


class Outcome(NamedTuple):
    """How a run ended."""

    loss: float  # mean over the last quarter of the steps; not finite: the run is lost
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
    """Runs what is missing, writes and shows the results."""
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
        markdown,
        batch_size=figure,
        learning_rate=rates_figure,
    )


def _steps(config: Config, cell: runs.Run, parts: Split) -> int:
    """Of all runs of a cell."""
    rates, seeds = len(config.learning_rates), len(config.seeds)
    every = cell.method.batch_size == config.every_rate_at
    return cell.steps(parts.dataset) * (rates + seeds * (rates if every else 1))


def _measure(config: Config, cell: runs.Run, parts: Split, bar: runs.Bar) -> dict:
    """A network and method at a batch size: the choice of the rate, and what it gives."""
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
    """Validation accuracy; a lost run has none."""
    return end.validation if np.isfinite(end.loss) else -1.0


def _lost(ends: list[Outcome]) -> int:
    return sum(not np.isfinite(end.loss) for end in ends)


def _grid(results: dict) -> Iterator[tuple[str, str, dict[int, dict]]]:
    """(network, method, {batch size: cell}), without what the method refused."""
    config = results["config"]
    for network, label in itertools.product(config["networks"], config["methods"]):
        yield (
            network,
            label,
            {
                cell["batch_size"]: cell
                for cell in _trained(results)
                if (cell["network"], cell["label"]) == (network, label)
            },
        )


def _trained(results: dict) -> list[dict]:
    return [cell for cell in results["cells"] if "refused" not in cell]


def percent(values: list[float]) -> np.ndarray:
    """Accuracies in percent."""
    return 100 * np.array(values, float)


def markdown(results: dict) -> str:
    """Accuracy, what corrected inference adds, and accuracy at every rate."""
    config = results["config"]
    seen = config["epochs"]
    return (
        f"{study.setting(results)}; each method at its own best rate:\n\n"
        f"{_accuracies(results)}\n"
        "Test accuracy, %, mean ± standard error over seeds, the best of a network and "
        "batch size and all within two standard errors of it bold. The rate is the best "
        f"of {', '.join(f'{rate:g}' for rate in config['learning_rates'])} per 32 "
        "examples on a validation part of the training images, "
        f"with a seed of its own. {_edges(results)} All saw every training image {seen} "
        "times.\n\n"
        f"Points gained by corrected inference:\n\n{_corrections(results)}\n"
        "Mean ± standard error over pairs.\n\n"
        f"Batch size {config['every_rate_at']}, test accuracy, % at rate:\n\n"
        f"{_rates(results)}\n"
        "lost: runs whose loss is not finite. least: the worst of the rates, mean.\n\n"
        f"{study.measured_on(results)}\n"
    )


def summary(results: dict) -> str:
    """The accuracies of a few methods."""
    return f"{study.setting(results)}:\n\n{_accuracies(results, DRAWN)}"


def verdict(results: dict) -> str:
    """From the greatest to the smallest batch size at which each method trains."""
    sentences = []
    for chosen in results["config"]["networks"]:
        ways = [
            f"{label} from {_mean(by_size, max)} to {_mean(by_size, min)}"
            for network, label, by_size in _grid(results)
            if network == chosen and label in VERDICT
        ]
        sentences.append(
            f"{chosen}, {results['config']['dataset']}: from the greatest to the smallest "
            f"batch size at which each trains, test accuracy goes {', '.join(ways)}."
        )
    return "\n".join(sentences)


def _mean(by_size: dict[int, dict], choose) -> str:
    size = choose(by_size)
    return f"{percent(by_size[size]['test']).mean():.1f} % ({size})"


def _accuracies(results: dict, methods: Sequence[str] | None = None) -> str:
    sizes = results["config"]["batch_sizes"]
    rows = [
        (network, label, *(_accuracy(results, by_size.get(size)) for size in sizes))
        for network, label, by_size in _grid(results)
        if methods is None or label in methods
    ]
    headings = ("net", "method at batch size", *map(str, sizes))
    return report.markdown_table(headings, rows)


def _accuracy(results: dict, cell: dict | None) -> str:
    if cell is None:
        return "refused"
    text = report.mean_error(percent(cell["test"]))
    if cell["lost"]:
        text = f"{text} ({cell['lost']} lost)"
    return f"**{text}**" if _among_the_best(results, cell) else text


def _among_the_best(results: dict, cell: dict) -> bool:
    rivals = [
        percent(other["test"])
        for other in _trained(results)
        if (other["network"], other["batch_size"]) == (cell["network"], cell["batch_size"])
    ]
    best, mine = max(rivals, key=np.mean), percent(cell["test"])
    error = np.hypot(report.standard_error(best), report.standard_error(mine))
    return bool(best.mean() - mine.mean() <= 2 * error)


def _edges(results: dict) -> str:
    """How often the grid may have been too short."""
    rates = results["config"]["learning_rates"]
    chosen = [cell["rate"] for cell in _trained(results)]
    low, high = chosen.count(rates[0]), chosen.count(rates[-1])
    return f"Of {len(chosen)} choices {low} are the lowest rate, {high} the highest."


def _corrections(results: dict) -> str:
    sizes = results["config"]["batch_sizes"]
    rows = [
        (network, label, *(_gain(by_size.get(size)) for size in sizes))
        for network, label, by_size in _grid(results)
        if by_size[max(by_size)]["corrected"][0] is not None
    ]
    return report.markdown_table(("net", "method at batch size", *map(str, sizes)), rows)


def gains(cell: dict) -> np.ndarray:
    """Points of each seed."""
    return percent(cell["corrected"]) - percent(cell["test"])


def _gain(cell: dict | None) -> str:
    if cell is None:
        return "refused"
    gain = gains(cell)
    return f"{gain.mean():+.1f} ± {report.standard_error(gain):.1f}"


def _rates(results: dict) -> str:
    size, rows = results["config"]["every_rate_at"], []
    for network, label, by_size in _grid(results):
        if size not in by_size:
            continue
        cells = by_size[size]["at_rates"]
        least = min(percent(cell["test"]).mean() for cell in cells)
        lost = sum(cell["lost"] for cell in cells)
        shown = [report.mean_error(percent(cell["test"])) for cell in cells]
        rows.append((network, label, *shown, f"{least:.1f}", str(lost)))
    rates = [f"{rate:g}" for rate in results["config"]["learning_rates"]]
    return report.markdown_table(("net", "method", *rates, "least", "lost"), rows)


VERDICT = ("small_batch", "batch_norm", "group_norm")
# Those that a figure and the summary have room for; the table has all.
DRAWN = (
    "small_batch",
    "batch_norm",
    "group_norm",
    "cross_iteration",
    "cross_iteration_burn_in",
    "group_batch",
    "none",
)


def figure(results: dict, path: Path) -> None:
    """Test error over the batch size, a panel a network."""

    def points(by_size):
        return {size: cell["test"] for size, cell in by_size.items()}

    sizes = results["config"]["batch_sizes"]
    _draw(results, path, points, "examples per step", sizes)


def rates_figure(results: dict, path: Path) -> None:
    """Test error over the learning rate at one batch size, a panel a network."""
    config = results["config"]

    def points(by_size):
        cell = by_size.get(config["every_rate_at"], {"at_rates": []})
        return {each["rate"]: each["test"] for each in cell["at_rates"]}

    label = f"peak rate per 32 examples, batch size {config['every_rate_at']}"
    _draw(results, path, points, label, config["learning_rates"])


def _draw(results: dict, path: Path, points, label: str, ticks) -> None:
    networks = results["config"]["networks"]
    made = new_figure("benchmarks", 4.6 * len(networks), 3.8)
    axes = made.subplots(1, len(networks), squeeze=False)[0]
    for axis, chosen in zip(axes, networks, strict=True):
        for network, name, by_size in _grid(results):
            if network == chosen and name in DRAWN:
                index = DRAWN.index(name)
                _line_of(axis, points(by_size), report.COLORS[index], name, index == 0)
        axis.set(title=f"{chosen.upper()}, {results['config']['dataset']}", xlabel=label)
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axis.minorticks_off()
        tidy(axis)
    axes[0].set_ylabel("test error, %")
    axes[-1].legend(fontsize=7, frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)


def _line_of(axis, points: dict, color: str, name: str, heavy: bool) -> None:
    values = [100 - percent(accuracies) for accuracies in points.values()]
    axis.errorbar(
        list(points),
        [value.mean() for value in values],
        [report.standard_error(value) for value in values],
        color=color,
        label=name,
        lw=2.4 if heavy else 1.4,
        marker="o",
        ms=3,
        capsize=2,
        zorder=3 if heavy else 2,
    )


if __name__ == "__main__":
    study.cli(Config, main, quick=QUICK)
