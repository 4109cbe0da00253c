# SPDX-License-Identifier: Apache-2.0
"""Training runs that are kept in a folder and resumed."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    from flax import linen as nn
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

from benchmarks.lib import data, methods, networks, report, training
from benchmarks.lib.checkpoints import Checkpoints

Precision = Literal["float32", "bfloat16"]


class Run(NamedTuple):
    """The options that determine a learning curve, apart from code and data."""

    network: str
    method: methods.Method
    learning_rate: float  # peak; for SGD at batch size 32
    epochs: int
    seed: int
    reports: int = 20
    precision: Precision = "float32"  # of activations and products
    pairing: training.Pairing = "independent"

    def steps(self, dataset: data.Dataset) -> int:
        """Number of steps of the run."""
        size, epochs = self.method.batch_size, self.epochs
        return len(training.rows_of(dataset, self.pairing, size, epochs, self.seed))

    def trainer(self, dataset: data.Dataset) -> training.Trainer:
        """The pure functions of the run; runs that differ in the seed can share them."""
        steps = self.steps(dataset)
        optimizer = training.OPTIMIZERS[self.method.optimizer](self.rate, steps)
        return training.make_trainer(
            self.model(dataset), dataset.train_images.shape[1:], optimizer
        )

    def model(self, dataset: data.Dataset) -> nn.Module:
        """The network of the run."""
        return networks.NETWORKS[self.network](
            norm=self.method.norm(self.steps(dataset)),
            classes=dataset.classes,
            dtype=jnp.dtype(self.precision),
        )

    @property
    def rate(self) -> float:
        """The peak rate; that of SGD grows in proportion to the batch size."""
        if not self.method.optimizer.startswith("sgd"):
            return self.learning_rate
        return self.learning_rate * self.method.batch_size / 32


def curve(
    run: Run,
    trainer: training.Trainer,
    dataset: data.Dataset,
    folder: Path,
    advance: Callable[[int, str], None],
    checkpoint_dir: Path | None = None,
) -> list[dict]:
    """The learning curve, from its file if an earlier call with this code finished it.

    With a ``checkpoint_dir``, an interrupted run resumes from its last checkpoint.
    """
    identity = {
        **run._asdict(),
        "method": run.method._asdict(),
        "dataset": dataset.name,
        "examples": [len(dataset.train_labels), len(dataset.test_labels)],
    }

    paired = "-pairs" if run.pairing == "one class" else ""
    name = f"{run.network}-{run.method}{paired}-{run.seed}".replace("/", "_")

    def points() -> list[dict]:
        found, done = [], 0
        with _checkpoints(checkpoint_dir, name) as checkpoints:
            for point in _points(run, trainer, dataset, checkpoints):
                found.append(point._asdict())
                advance(
                    point.step - done,
                    f"{run.network} {run.method}, seed {run.seed}: "
                    f"{100 * point.accuracy:.0f} %",
                )
                done = point.step
        return found

    return kept(folder / name, identity, points, lambda: advance(run.steps(dataset), ""))


def kept(
    path: Path, identity: dict, make: Callable[[], Any], skip: Callable[[], None]
) -> Any:
    """The result of ``make``, from its file if an earlier call with this code wrote it.

    ``path`` is without the ending. ``skip`` is called if the file already exists.
    """
    identity = {
        **identity,
        "versions": report.environment(),
        "source": report.source_digest(),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = path.with_name(f"{path.name}-{digest[:8]}.json")
    if path.exists():
        skip()
        return json.loads(path.read_text())["found"]
    found = make()
    report.write_json(path, {"identity": identity, "found": found})
    return found


def _checkpoints(
    folder: Path | None, name: str
) -> contextlib.AbstractContextManager[Checkpoints | None]:
    return contextlib.nullcontext() if folder is None else Checkpoints(folder / name)


def _points(run, trainer, dataset, checkpoints) -> Iterator[training.Progress]:
    return training.run(
        trainer,
        dataset,
        batch_size=run.method.batch_size,
        epochs=run.epochs,
        seed=run.seed,
        pairing=run.pairing,
        reports=run.reports,
        checkpoints=checkpoints,
    )


def check_networks(names: tuple[str, ...]) -> None:
    """Checks that every network is known."""
    for name in names:
        if name not in networks.NETWORKS:
            known = ", ".join(networks.NETWORKS)
            raise ValueError(f"network {name!r} is unknown; known are {known}.")


class Bar:
    """A progress bar counted in training steps."""

    def __init__(self, console: Console, total: int):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),  # so that the line has 80 columns
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, steps: int, text: str = "") -> None:
        """Advances by ``steps``; an empty text keeps the description."""
        self._progress.update(self._task, advance=steps, description=text or None)
