# SPDX-License-Identifier: Apache-2.0
"""Which method fine-tunes a trained network on a new domain with two images per step?

Trains networks with ``nn.BatchNorm`` and 32 images per step. Then inverts the images and
halves their contrast, and fine-tunes with two images per step, independent or of one class.
``replace_batch_norm`` replaces the batch norms by each method. The rate is chosen on
held-out training images. Prints the test accuracy after a few steps and at the end.
Inference uses the running averages and, if a method has a window, also the moments of the
window.

Run it with ``python -m benchmarks.studies.fine_tuning``.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
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
    from flax import linen as nn
    from flax.traverse_util import flatten_dict
    from rich.console import Console

    from cbn_jax.linen import from_batch_norm, replace_batch_norm

from benchmarks.lib import data, report, runs, study, training

REFERENCE = 32  # images per step of the first training, and of the row to compare with
HELD_OUT = 5  # one in 5 training images is for choosing the rate


class CNN(nn.Module):
    """Four convolutions with Flax's batch norm."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, classes]``."""
        z = images
        for features, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
            z = nn.Conv(features, (3, 3), stride, use_bias=False)(z)
            z = nn.relu(nn.BatchNorm(use_running_average=not train)(z))
        return nn.Dense(self.classes)(z.mean((1, 2)))


class MLP(nn.Module):
    """Two dense layers with Flax's batch norm."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, classes]``."""
        z = images.reshape(len(images), -1)
        for _ in range(2):
            z = nn.Dense(128, use_bias=False)(z)
            z = nn.relu(nn.BatchNorm(use_running_average=not train)(z))
        return nn.Dense(self.classes)(z)


NETWORKS = {"cnn": CNN, "mlp": MLP}

# Estimators for a number of images per step.
METHODS = {
    "batch_norm": lambda size: cbn_jax.batch_norm(),
    "frozen": lambda size: cbn_jax.frozen(cbn_jax.batch_norm(), after=0),
    "batch_renorm": lambda size: cbn_jax.batch_renorm(warmup_steps=0),
    "carried_batch_norm": lambda size: cbn_jax.carried_batch_norm(-(-32 // size)),
    "small_batch_norm": cbn_jax.small_batch_norm,
    "bidirectional_batch_norm": lambda size: cbn_jax.bidirectional_batch_norm(),
}
_MOMENTUM = 0.85  # with 32 images per step covers as many images as 0.99 with 2
REFERENCES = {
    "batch_norm": METHODS["batch_norm"],
    f"batch_norm(momentum={_MOMENTUM})": lambda size: cbn_jax.batch_norm(_MOMENTUM),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the comparison."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """Networks to train and to fine-tune."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to fine-tune with."""
    batch_size: int = 2
    """Images per step of fine-tuning. The number must be even for pairs."""
    pairings: tuple[training.Pairing, ...] = ("independent", "one class")
    """Images of a step: independent images, or images of one class."""
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Rates for 32 images per step, scaled in proportion to the images per step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training and fine-tuning per seed."""
    epochs: int = 12
    """Passes over the training images before fine-tuning."""
    passes: int = 1
    """Passes over the training images of the new domain."""
    marks: tuple[int, ...] = (30, 100, 300)
    """Numbers of fine-tuning steps after which to test, besides the last step."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/fine_tuning")
    """Folder for results.json, table.md and finished runs."""


QUICK = Config(
    networks=("mlp",),
    methods=("batch_norm", "small_batch_norm"),
    learning_rates=(0.1,),
    seeds=(0, 1),
    epochs=1,
    marks=(20,),
    examples=200,
)


class Domains(NamedTuple):
    """The images of the first training, and those of fine-tuning."""

    source: data.Dataset
    target: data.Dataset
    validation: tuple[np.ndarray, np.ndarray]  # held-out images of the new domain


class Setting(NamedTuple):
    """A network and method to fine-tune, and the options."""

    network: str
    pairing: training.Pairing
    batch_size: int
    label: str
    rate: float


def main(config: Config, console: Console) -> dict:
    """Runs the experiments that have no result yet; writes and prints all results."""
    _check(config)
    domains = split(config.load())
    settings = list(_settings(config))
    total = sum(_steps(config, domains, each.batch_size) for each in settings)
    base = training.count_steps(domains.source, REFERENCE, config.epochs)
    total = (total + base * len(config.networks)) * len(config.seeds)
    with runs.Bar(console, total) as bar:
        starts = {name: _bases(config, domains, name, bar) for name in config.networks}
        make = functools.cache(functools.partial(_trainer, domains.target))
        cells = [_measure(config, each, domains, make, starts, bar) for each in settings]
    before = {name: [each["before"] for each in found] for name, found in starts.items()}
    return study.publish(config, {"before": before, "cells": cells}, console, markdown)


def _check(config: Config) -> None:
    """Checks that networks and methods are known, with something to compare."""
    for kind, names, known in (
        ("network", config.networks, NETWORKS),
        ("method", config.methods, METHODS),
    ):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{kind} {name!r} is unknown; known are {', '.join(known)}."
                )
    if "small_batch_norm" not in config.methods or config.batch_size >= REFERENCE:
        raise ValueError(
            f"methods are {', '.join(config.methods)} at batch size {config.batch_size}, "
            f"expected small_batch_norm among them and a size below {REFERENCE}."
        )


def _settings(config: Config) -> Iterator[Setting]:
    """All settings, the reference of each network first."""
    rates = config.learning_rates
    for network in config.networks:
        for label, rate in itertools.product(REFERENCES, rates):
            yield Setting(network, "independent", REFERENCE, label, rate)
        for pairing, label, rate in itertools.product(
            config.pairings, config.methods, rates
        ):
            yield Setting(network, pairing, config.batch_size, label, rate)


def split(dataset: data.Dataset) -> Domains:
    """Both domains, with the last fifth of the training images held out."""
    rest = len(dataset.train_labels) - len(dataset.train_labels) // HELD_OUT
    images, labels = dataset.train_images, dataset.train_labels
    source = dataset._replace(
        train_images=images[:rest],
        train_labels=labels[:rest],
        train_groups=dataset.train_groups[:rest],
    )
    target = source._replace(
        train_images=_changed(images[:rest]), test_images=_changed(dataset.test_images)
    )
    return Domains(source, target, (_changed(images[rest:]), labels[rest:]))


def _changed(images: np.ndarray) -> np.ndarray:
    """The new domain: inverted, with half the contrast."""
    return 1 - images / 2


def _steps(config: Config, domains: Domains, batch_size: int) -> int:
    """Number of fine-tuning steps; it may be slightly smaller for pairs."""
    return training.count_steps(domains.target, batch_size, config.passes)


def _bases(config: Config, domains: Domains, network: str, bar: runs.Bar) -> list[dict]:
    """The variables of the trained networks, one per seed, and their accuracy."""
    steps = training.count_steps(domains.source, REFERENCE, config.epochs)
    model = NETWORKS[network](domains.source.classes)
    shape = domains.source.train_images.shape[1:]
    trainer = training.make_trainer(model, shape, training.OPTIMIZERS["sgd"](0.1, steps))
    found = []
    for seed in config.seeds:
        identity = {"network": network, "seed": seed, **_training(config)}
        run = lambda s=seed: _base(config, domains, trainer, s)  # noqa: E731
        path = config.output / "runs" / f"{network}-base"
        found.append(runs.kept(path, identity, run, lambda: None))
        bar.advance(steps, f"{network}: {100 * found[-1]['before']['source']:.0f} %")
    return found


def _training(config: Config) -> dict:
    """The options that determine the trained networks, besides network and seed."""
    return {
        "dataset": config.dataset,
        "examples": config.examples,
        "epochs": config.epochs,
    }


def _base(config: Config, domains: Domains, trainer: training.Trainer, seed: int) -> dict:
    """A trained network as JSON represents it, and its accuracy on both domains."""
    state = trainer.init(jax.random.key(seed))
    examples = len(domains.source.train_labels)
    rows = training.batches(examples, REFERENCE, config.epochs, seed)
    state = collections.deque(training.train(trainer, domains.source, rows, state), 1)[0][0]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    before = {
        name: float(trainer.evaluate(state, *_test(dataset)))
        for name, dataset in (("source", domains.source), ("target", domains.target))
    }
    return {"variables": jax.tree.map(lambda x: x.tolist(), variables), "before": before}


def _test(dataset: data.Dataset) -> tuple[jax.Array, jax.Array]:
    return jax.device_put((dataset.test_images, dataset.test_labels))


def _trainer(
    dataset: data.Dataset, network: str, label: str, size: int
) -> training.Trainer:
    """A trainer whose rate is in the state of the optimizer."""
    model = NETWORKS[network](dataset.classes)
    model = replace_batch_norm(model, {**METHODS, **REFERENCES}[label](size))
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0, momentum=0.9)
    return training.make_trainer(model, dataset.train_images.shape[1:], optimizer)


def _measure(config: Config, setting: Setting, domains, make, starts, bar) -> dict:
    """A cell of the results: accuracies by seed."""
    trainer = make(setting.network, setting.label, setting.batch_size)
    name = f"{setting.network}-{setting.label}"
    found = []
    for seed, base in zip(config.seeds, starts[setting.network], strict=True):
        more = {"seed": seed, "passes": config.passes, "marks": config.marks}
        identity = {**setting._asdict(), **more, **_training(config)}
        start = functools.partial(_start, trainer, base["variables"], setting, seed)
        run = functools.partial(_tuned, config, setting, domains, trainer, start, seed)
        found.append(runs.kept(config.output / "runs" / name, identity, run, lambda: None))
        steps = _steps(config, domains, setting.batch_size)
        bar.advance(steps, f"{name}: {100 * found[-1]['running'][-1]:.0f} %")
    return {**setting._asdict(), **{key: [each[key] for each in found] for key in found[0]}}


def _tuned(config: Config, setting: Setting, domains, trainer, start, seed: int) -> dict:
    """Accuracies of one run: at the marks on the test images, and on held-out images."""
    target, found = domains.target, collections.defaultdict(list)
    size, passes = setting.batch_size, config.passes
    # The order differs from that of the first training.
    rows = training.rows_of(target, setting.pairing, size, passes, 1000 + seed)
    marks = _marks(config, setting.batch_size, len(rows))
    test = _test(target)
    state = start()
    steps = training.train(trainer, target, rows, state)
    for step, (state, _) in enumerate(steps, 1):
        if step in marks:
            for name, stats in _statistics(state.batch_stats).items():
                tested = state._replace(batch_stats=stats)
                found[name].append(float(trainer.evaluate(tested, *test)))
    return {"validation": float(trainer.evaluate(state, *domains.validation)), **found}


def _statistics(stats: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The statistics to predict with, by name."""
    if any("window" in path for path in flatten_dict(stats)):
        return {"running": stats, "window": with_window(stats)}
    return {"running": stats}


def with_window(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics with the moments of the window in place of the running averages."""
    if "window" in stats:
        window = stats["window"]
        if not isinstance(window, Mapping):
            window = cbn_jax.Window(*window)._asdict()
        return {**stats, **{name: window[name] for name in ("mean", "var")}}
    return {
        name: with_window(each) if isinstance(each, Mapping) else each
        for name, each in stats.items()
    }


def _marks(config: Config, batch_size: int, steps: int) -> list[int]:
    """Steps after which to test; with more images per step, after as many images."""
    marks = [max(1, round(m * config.batch_size / batch_size)) for m in config.marks]
    if marks != sorted({*marks, steps})[:-1]:
        raise ValueError(
            f"marks are {config.marks}, and a run has {steps} steps of {batch_size} "
            "images, expected rising marks before its end; change --marks."
        )
    return [*marks, steps]


def _start(trainer, variables: dict, setting: Setting, seed: int) -> training.TrainState:
    """The trained network with another method in place of its batch norms."""
    trained = jax.tree.map(
        lambda x: jnp.array(x, jnp.float32),
        variables,
        is_leaf=lambda x: isinstance(x, list),
    )
    params, stats, optimizer = trainer.init(jax.random.key(seed))
    into = {"params": params, "batch_stats": stats}
    rate = setting.rate * setting.batch_size / 32
    optimizer.hyperparams["learning_rate"] = jnp.float32(rate)
    return training.TrainState(**from_batch_norm(trained, into=into), opt_state=optimizer)


def markdown(results: dict) -> str:
    """One row per setting and method, at the chosen rate; then the verdict."""
    config = results["config"]
    rows = [
        (
            cell["network"],
            f"{cell['batch_size']}, {cell['pairing']}",
            cell["label"],
            f"{cell['rate']:g}",
            *(
                " / ".join(report.spread(each, 1) for each in found)
                for found in _pairs(cell)
            ),
        )
        for cells in chosen(results).values()
        for cell in cells
    ]
    marks = (f"after {mark}" for mark in config["marks"])
    headings = ("net", "batch holds", "method", "rate", *marks, "at the end")
    return (
        f"{_title(results)}\n\n{report.markdown_table(headings, rows)}\n"
        f"{verdict(results)}\n\n{_legend(results)}\n"
    )


def _pairs(cell: dict) -> list[list[list[float]]]:
    """Accuracies in % of all seeds, by mark: with running averages, with a window."""
    found = [cell[name] for name in ("running", "window") if name in cell]
    return (100 * np.array(found)).transpose(2, 0, 1).tolist()


def _title(results: dict) -> str:
    """The setting of the runs, and the accuracy of the trained networks."""
    config = results["config"]
    before = ", ".join(
        f"{network} {_mean(found, 'source')} % and {_mean(found, 'target')} %"
        for network, found in results["before"].items()
    )
    return (
        f"{config['dataset']}, {len(config['seeds'])} seeds. Epochs: {config['epochs']} "
        f"with batch norm at steps of {REFERENCE}, then {config['passes']} on the images "
        "inverted with half the contrast. Before fine-tuning, on the images as they were "
        f"and on the new ones: {before}."
    )


def _mean(found: list[dict], domain: str) -> str:
    return report.spread([100 * each[domain] for each in found], 1)


def _legend(results: dict) -> str:
    """The meaning of the columns."""
    config = results["config"]
    rates = ", ".join(f"{rate:g}" for rate in config["learning_rates"])
    return (
        "Test accuracy in %, mean ± standard deviation over seeds, after so many steps of "
        f"{config['batch_size']} images; steps of {REFERENCE} are tested after about as "
        "many images. Before the slash with the running averages, behind it with the "
        f"moments of the window. A momentum of {_MOMENTUM} at steps of {REFERENCE} looks "
        "back over as many images as 0.99 at steps of 2. Rates are for steps of 32 images, "
        f"from {rates}; a fifth of the training images chose each. "
        f"{study.measured_on(results)}"
    )


def chosen(results: dict) -> dict[tuple, list[dict]]:
    """The cells of all methods at the rate that validation chose, by setting."""
    found: dict[tuple, dict] = {}
    for cell in results["cells"]:
        setting = cell["network"], cell["batch_size"], cell["pairing"]
        by_label = found.setdefault(setting, {})
        best = by_label.setdefault(cell["label"], cell)
        if np.mean(cell["validation"]) > np.mean(best["validation"]):
            by_label[cell["label"]] = cell
    return {setting: list(cells.values()) for setting, cells in found.items()}


def verdict(results: dict) -> str:
    """How often inference is as good as with the window, or the method among the best."""
    found = chosen(results)
    ours = [_behind(cells) for (_, size, _), cells in found.items() if size != REFERENCE]
    return (
        "The running averages are within 1 point of the window's moments, or better, "
        f"{_lags(found)}; at the end, with the running averages, small_batch_norm is "
        "within two standard errors of the best method in "
        f"{sum(gap <= 2 * error for gap, error in ours)} of {len(ours)} settings of "
        f"{results['config']['batch_size']} images, at worst {max(ours)[0]:.1f} points "
        "behind it."
    )


def _lags(found: dict[tuple, list[dict]]) -> str:
    """How often each method's running averages match its window, and the worst case."""
    lags = collections.defaultdict(list)
    for cell in itertools.chain(*found.values()):
        for running, *window in _pairs(cell):
            lags[cell["label"]] += [np.mean(each) - np.mean(running) for each in window]
    return ", ".join(
        f"with {label} in {sum(lag <= 1 for lag in each)} of {len(each)} cells, at worst "
        f"{max(each):.1f} points behind"
        for label, each in lags.items()
        if each
    )


def _behind(cells: list[dict]) -> tuple[float, float]:
    """Points that small_batch_norm ends behind the best method, and the standard error."""
    ends = {cell["label"]: _pairs(cell)[-1][0] for cell in cells}
    ours, best = ends["small_batch_norm"], max(ends.values(), key=np.mean)
    error = np.hypot(report.standard_error(ours), report.standard_error(best))
    return float(np.mean(best) - np.mean(ours)), float(error)


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
