# SPDX-License-Identifier: Apache-2.0
"""Training on several devices, in three ways that give what one device gives.

``sharded_jit_step``, ``shard_map_step`` and ``pmap_step`` are complete training steps to
copy. A small network is trained with each of them and on one device with the whole batch;
the table says how far the results are apart, what a step costs and how often the devices
talk to each other.

Run it with ``python -m benchmarks.studies.data_parallel --devices 8``, which simulates
eight devices on a CPU; without ``--devices`` it takes those that are there.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import optax
    import tyro
    from flax import linen as nn
    from rich.console import Console

    from cbn_jax.linen import Norm

from benchmarks.lib import data, methods, profile, report, runs, study, training
from benchmarks.lib.training import TrainState

Step = Callable[[TrainState, Any, Any], tuple[TrainState, jax.Array]]
WAYS = (ONE := "one device", "sharded jit", "shard_map", "pmap")


class Network(nn.Module):
    """Normalized convolutions and a dense layer.

    ``axis_name`` is for ``shard_map`` and ``pmap``; under ``jit`` it stays None.
    """

    estimator: Any
    classes: int = 10
    features: tuple[int, ...] = (16, 32)
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, classes]``."""
        z = images
        for features in self.features:
            z = Norm(
                self.estimator,
                layer=nn.Conv(features, (3, 3), 2, use_bias=False),
                use_running_average=not train,
                axis_name=self.axis_name,
            )(z)
            z = nn.relu(z)
        return nn.Dense(self.classes)(z.mean((1, 2)))


def forward(model: nn.Module, params: Any, batch_stats: Any, images: Any) -> Any:
    """Logits and the new ``batch_stats``."""
    logits, updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    return logits, updates["batch_stats"]


def loss_fn(model: nn.Module, params: Any, batch_stats: Any, images: Any, labels: Any):
    """The mean loss over the images that this program sees, and the new statistics."""
    logits, batch_stats = forward(model, params, batch_stats, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), batch_stats


def updated(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Any,
    batch_stats: Any,
) -> TrainState:
    """The state after a step of the optimizer."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), batch_stats, opt_state)


def sharded_jit_step(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Step:
    """One program over the whole batch, which ``jit`` spreads: nothing is averaged here.

    The state is on every device, the batch is split over the mesh's axis ``data``.
    """

    def step(state, images, labels):
        def loss_of(params):
            return loss_fn(model, params, state.batch_stats, images, labels)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), gradients = gradient(state.params)
        return updated(optimizer, state, gradients, batch_stats), loss

    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return jax.jit(
        step,
        in_shardings=(everywhere, split, split),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def shard_map_step(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Step:
    """One program for each device, with ``axis_name="data"`` in the model.

    ``pmean`` averages the loss inside the differentiated function. The gradient by
    replicated parameters is then the gradient of the whole batch.
    """

    def step(state, images, labels):
        def loss_of(params):
            loss, batch_stats = loss_fn(model, params, state.batch_stats, images, labels)
            return jax.lax.pmean(loss, "data"), batch_stats

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), gradients = gradient(state.params)
        return updated(optimizer, state, gradients, batch_stats), loss

    each = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    return jax.jit(each, donate_argnums=0)


def pmap_step(model: nn.Module, optimizer: optax.GradientTransformation) -> Step:
    """One program for each device, with ``axis_name="data"`` in the model.

    State and batch have a leading axis of devices. Gradients are a device's own until they
    are averaged, as they are under ``shard_map(check_vma=False)``.
    """

    def step(state, images, labels):
        def loss_of(params):
            return loss_fn(model, params, state.batch_stats, images, labels)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), gradients = gradient(state.params)
        loss, gradients = jax.lax.pmean((loss, gradients), "data")
        return updated(optimizer, state, gradients, batch_stats), loss

    return jax.pmap(step, axis_name="data", donate_argnums=0)


class Way(NamedTuple):
    """A step, and how states and batches come to its devices and back."""

    step: Step
    forward: Any  # parameters, batch_stats and images -> logits and batch_stats
    to_devices: Callable[[Any], Any]  # a state
    split: Callable[[np.ndarray], Any]
    from_devices: Callable[[Any], Any]


def make_mesh(devices: int) -> Mesh:
    """The first devices in a row; Auto, because not every operation takes Explicit axes."""
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=chosen)


def make_ways(
    model: Network, optimizer: optax.GradientTransformation, devices: int
) -> dict[str, Way]:
    """One device and the three ways, by name."""
    mesh, parallel = make_mesh(devices), model.clone(axis_name="data")
    made = (
        _sharded_jit(model, optimizer, make_mesh(1)),
        _sharded_jit(model, optimizer, mesh),
        _shard_map(parallel, optimizer, mesh),
        _pmap(parallel, optimizer, devices),
    )
    return dict(zip(WAYS, made, strict=True))


def _sharded_jit(model, optimizer, mesh) -> Way:
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    run = jax.jit(
        lambda *args: forward(model, *args),
        in_shardings=(everywhere, everywhere, split),
        out_shardings=(split, everywhere),
    )
    step = sharded_jit_step(model, optimizer, mesh)
    return Way(step, run, _replicate(mesh), np.asarray, jax.device_get)


def _shard_map(model, optimizer, mesh) -> Way:
    each = jax.shard_map(
        lambda *args: forward(model, *args),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P("data"), P()),
    )
    step = shard_map_step(model, optimizer, mesh)
    return Way(step, jax.jit(each), _replicate(mesh), np.asarray, jax.device_get)


def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda state: state, out_shardings=NamedSharding(mesh, P()))


def _pmap(model, optimizer, devices) -> Way:
    place = jax.pmap(lambda state: state, axis_name="data")

    def copies(state):
        return place(jax.tree.map(lambda leaf: np.stack([leaf] * devices), state))

    return Way(
        step=pmap_step(model, optimizer),
        forward=jax.pmap(lambda *args: forward(model, *args), axis_name="data"),
        to_devices=copies,
        split=lambda batch: batch.reshape(devices, -1, *batch.shape[1:]),
        from_devices=lambda state: jax.tree.map(
            lambda leaf: leaf[0], jax.device_get(state)
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(study.Options):
    """Options of the study."""

    devices: int | None = None
    """Number of simulated devices of a CPU; all existing devices if not given."""
    methods: tuple[str, ...] = (
        "batch_norm",
        "cross_iteration_batch_norm",
        "small_batch_norm",
    )
    """Normalizers with batch statistics to compare. NAME@SIZE sets its own batch size."""
    batch_size: int = 8
    """Examples per step, on all devices together."""
    learning_rate: float = 0.1
    """Peak rate at batch size 32. It is scaled in proportion to the batch size."""
    seeds: tuple[int, ...] = (0,)
    """One run per seed. A seed fixes the initial weights and the order of the examples."""
    compared_steps: int = 10
    """Number of steps before the states are compared. Later, rounding errors grow."""
    timing_rounds: int = 20
    """Rounds of five steps for the step times."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/data_parallel")
    """Folder for results.json and table.md."""


def main(config: Config, console: Console) -> dict:
    """Trains in every way, compares, writes and shows the results."""
    devices = _devices(config)
    chosen = [_run(config, text, devices) for text in config.methods]
    dataset = config.load()
    steps = sum(run.steps(dataset) for run in chosen)
    with runs.Bar(console, len(WAYS) * len(config.seeds) * steps) as bar:
        found = [c for run in chosen for c in _cells(config, run, dataset, devices, bar)]
    return study.publish(config, {"devices": devices, "cells": found}, console, markdown)


def _devices(config: Config) -> int:
    """As many as there are, simulated before the first use of JAX if asked for."""
    if config.devices is not None:
        simulate(config.devices)
    return jax.local_device_count()


def simulate(devices: int) -> None:
    """So many devices of a CPU, where JAX has not been used yet."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise ValueError(
            f"--devices {devices} came when JAX was in use with "
            f"{jax.local_device_count()}, expected a fresh process; run python -m "
            f"benchmarks.studies.data_parallel --devices {devices}."
        ) from error


def _run(config: Config, text: str, devices: int) -> runs.Run:
    method = methods.parse(text, config.batch_size)
    if method.batch_size % devices:
        raise ValueError(
            f"method {text!r} has a batch size of {method.batch_size} on {devices} "
            f"devices, expected a multiple of {devices}; write --batch-size {devices}."
        )
    estimator_of(method, steps=1)
    return runs.Run("two convolutions", method, config.learning_rate, config.epochs, 0)


def estimator_of(method: methods.Method, steps: int) -> Any:
    """The estimator of a method by name, or its function of a learned weight."""
    if method.name in methods.LAYERS:
        raise ValueError(
            f"method {method.label!r} takes no statistics over devices, expected one that "
            "does; write batch_norm, cross_iteration_batch_norm or "
            "small_batch_norm."
        )
    return method.estimator(steps)


def _cells(config, run: runs.Run, dataset, devices: int, bar) -> Iterator[dict]:
    """All ways with one method."""
    steps, size = run.steps(dataset), run.method.batch_size
    model = Network(estimator_of(run.method, steps), dataset.classes)
    optimizer = training.OPTIMIZERS[run.method.optimizer](run.rate, steps)
    batch = dataset.train_images[:size], dataset.train_labels[:size]
    states = {seed: init(model, optimizer, batch[0], seed) for seed in config.seeds}
    some = states[config.seeds[0]]
    bar.advance(0, f"{run.method}, compiling")
    ways = {
        name: _compiled(way, some, batch)
        for name, way in make_ways(model, optimizer, devices).items()
    }
    times = _milliseconds(ways, some, batch, config.timing_rounds)
    predict = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    expected = {}
    for name, way in ways.items():
        accuracy, apart = [], []
        for seed, start in states.items():
            order = training.batches(len(dataset.train_labels), size, config.epochs, seed)
            bar.advance(0, f"{run.method}, {name}, seed {seed}")
            early, state = _train(way, start, dataset, order, config.compared_steps, bar)
            accuracy.append(_accuracy(predict, state, dataset))
            apart.append(_differences(early, expected.setdefault(seed, early)))
        parameters, statistics = zip(*apart, strict=True)
        yield {
            "method": run.method.label,
            "way": name,
            "accuracy": accuracy,
            "parameters": max(parameters),
            "statistics": max(statistics),
            "milliseconds": times.get(name),
            "all_reduces": {
                "forward": all_reduces(way.forward),
                "step": all_reduces(way.step),
            },
        }


def init(
    model: nn.Module, optimizer: optax.GradientTransformation, images: Any, seed: int
) -> TrainState:
    """The state before the first step, as arrays of the host."""
    variables = model.init(jax.random.key(seed), images, train=False)
    params = variables["params"]
    state = TrainState(params, variables["batch_stats"], optimizer.init(params))
    return jax.device_get(state)


def _train(way: Way, start: TrainState, dataset, order, compared: int, bar) -> Any:
    """The states after the steps that are compared, and at the end."""
    state, early = way.to_devices(start), start
    for step, rows in enumerate(order, start=1):
        images, labels = dataset.train_images[rows], dataset.train_labels[rows]
        state, _ = way.step(state, way.split(images), way.split(labels))
        if step <= compared:
            early = way.from_devices(state)
        bar.advance(1)
    return early, way.from_devices(state)


def _accuracy(predict: Any, state: TrainState, dataset: data.Dataset) -> float:
    """On the test images; inference needs no axis name."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = jnp.argmax(predict(variables, dataset.test_images), -1)
    return float(np.mean(np.asarray(found) == dataset.test_labels))


def _differences(actual: TrainState, expected: TrainState) -> tuple[float, float]:
    """Of parameters and of statistics."""
    return (
        difference(actual.params, expected.params),
        difference(actual.batch_stats, expected.batch_stats),
    )


def difference(actual: Any, expected: Any) -> float:
    """The greatest over all arrays, each relative to its largest value."""

    def of_leaf(a, e):
        largest = np.abs(e).max()
        return float(np.abs(a - e).max() / (largest if largest > 0 else 1.0))

    return max(jax.tree.leaves(jax.tree.map(of_leaf, actual, expected)))


def _milliseconds(ways, state, batch, rounds: int, steps: int = 5) -> dict[str, float]:
    """Median time of a step; every round times each way."""
    if rounds == 0:
        return {}
    states = {name: way.to_devices(state) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            for _ in range(steps):
                states[name], _ = way.step(states[name], *map(way.split, batch))
            jax.block_until_ready(states[name])
            seconds[name].append((time.perf_counter() - begin) / steps)
    # The first round warms up.
    return {name: 1e3 * float(np.median(times[1:])) for name, times in seconds.items()}


def _compiled(way: Way, state: TrainState, batch: Any) -> Way:
    """The way with its programs compiled for a state and a batch."""
    there, (images, labels) = way.to_devices(state), map(way.split, batch)
    step: Any = way.step
    forward = way.forward.lower(there.params, there.batch_stats, images)
    return way._replace(
        step=step.lower(there, images, labels).compile(), forward=forward.compile()
    )


def all_reduces(program: Any) -> int:
    """Those of every step; one more runs where a mean is far from its pivot."""
    lines = profile.computations(program.as_text())[profile.ENTRY]
    return sum(bool(re.search(r" all-reduce(?:-start)?\(", line)) for line in lines)


def markdown(results: dict) -> str:
    """One row a method and way."""
    config = results["config"]
    rows = [
        (
            cell["method"],
            cell["way"],
            report.spread([100 * a for a in cell["accuracy"]], 1),
            _scientific(cell["parameters"]),
            _scientific(cell["statistics"]),
            "–" if cell["milliseconds"] is None else f"{cell['milliseconds']:.1f}",
            str(cell["all_reduces"]["forward"]),
            str(cell["all_reduces"]["step"]),
        )
        for cell in results["cells"]
    ]
    headings = ("method", "way", "test, %", "Δ params", "Δ stats", "ms", "fwd", "step")
    return (
        f"{study.setting(results)}, batch size {config['batch_size']} on "
        f"{results['devices']} devices:\n\n{report.markdown_table(headings, rows)}\n"
        "Test accuracy at the end; Δ: greatest difference of parameters and statistics "
        f"from one device with the whole batch after {config['compared_steps']} steps, "
        "relative to the largest value of each array; ms: median time of a step, side by "
        "side; fwd, step: all-reduces in the compiled forward pass of two normalized "
        f"layers, and in a whole step. {study.measured_on(results)}\n"
    )


def _scientific(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments)


if __name__ == "__main__":
    cli()
