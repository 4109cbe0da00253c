# SPDX-License-Identifier: Apache-2.0
"""What each method costs: time, FLOPs, bytes, memory, compile time and state of a step.

A training step (forward, backward, SGD with momentum) of an MLP, of a basic stage of
ResNet-18 and of the whole network with the stem for 32x32 images is compiled with every
method. FLOPs and bytes are XLA's count, times are measured side by side in one process,
each as a ratio to the same network with Flax's BatchNorm. Where a method takes longer
than it should, a profile says where the time goes. The roofline is what the device would
need for the FLOPs and bytes alone, at the rates it reached in the same call on a large
matrix product and a large copy.

Run it with ``python -m benchmarks.studies.cost``; on an accelerator with ``--device gpu
--networks resnet50 --batch-sizes 1 2 4 8 --precision bfloat16``.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console
    from rich.progress import track

from benchmarks.lib import methods, networks, profile, report, runs, study, timing, training

BASELINE = "nn.BatchNorm"
SHAPES = {
    "mlp": (14, 14, 1),
    "cnn": (8, 8, 1),
    "stage": (32, 32, 3),
    "resnet18": (32, 32, 3),
    "resnet50": (224, 224, 3),
}
# Time as a ratio to Flax's batch norm that a method should not exceed.
TARGETS = {"batch_norm": 1.02, "small_batch_norm": 1.2, "cross_iteration_batch_norm": 1.4}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    networks: tuple[str, ...] = ("mlp", "stage", "resnet18")
    """Networks to count and time; also resnet50, at 224x224."""
    batch_sizes: tuple[int, ...] = (1, 2, 8, 32)
    """Examples per step; one example is left out where batch norm cannot train on it."""
    methods: tuple[str, ...] = (
        "batch_norm",
        "nn.GroupNorm",
        "group_norm",
        "diminishing_batch_norm-0.5",
        "group_batch_norm",
        "small_batch_norm",
        "cross_iteration_batch_norm",
        "cross_iteration_batch_norm-gradient",
        "replay_batch_norm-16",
    )
    """Normalizers to compare with Flax's batch norm."""
    precision: runs.Precision = "float32"
    """Of activations and products."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; JAX's own choice if not given."""
    timing_rounds: int = 7
    """Rounds of steps for the times; 0 counts without running anything."""
    timing_seconds: float = 0.2
    """About how long a method is timed in each round, at least a step."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/cost")
    """Folder for results.json and table.md."""


QUICK = Config(
    networks=("mlp",),
    batch_sizes=(1, 2),
    methods=("batch_norm", "small_batch_norm"),
    timing_rounds=2,
    timing_seconds=0.01,
)


def main(config: Config, console: Console) -> dict:
    """Counts and times every cell, writes and shows the results."""
    runs.check_networks(config.networks)
    device = _device(config.device)
    pairs = [
        (network, size)
        for network, size in itertools.product(config.networks, config.batch_sizes)
        if network != "mlp" or size > 1
    ]
    with jax.default_device(device):
        rates = _rates() if config.timing_rounds else None
        cells = [
            cell
            for network, size in track(pairs, "counting and timing", console=console)
            for cell in _cells(config, network, size)
        ]
    return study.publish(
        config,
        {"rates": rates, "cells": cells},
        console,
        markdown,
        device=device,
    )


def _device(platform: str | None) -> Any:
    try:
        return jax.devices(platform)[0]
    except RuntimeError as error:
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(
            f"--device {platform} is not to be found, JAX sees {there}; install JAX for "
            "it, as in pip install 'jax[cuda13]', or leave the option out."
        ) from error


def _rates() -> dict[str, float]:
    """FLOPs and bytes per second that the device reaches, the best of some calls."""
    square, long = jnp.ones((2048, 2048)), jnp.ones(2**26)
    # Overwritten in place: new memory would cost time of its own.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    return {
        "flops": 2 * 2048**3 / _seconds(jax.jit(lambda x: x @ square), square),
        "bytes": 2 * long.nbytes / _seconds(negate, long),
    }


def _seconds(function: Callable, x: jax.Array, calls: int = 8) -> float:
    """The least of some calls, each on the result of the one before."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        x = jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class Compiled(NamedTuple):
    """A step as the compiler left it."""

    step: Any
    seconds: float  # to trace, lower and compile
    params: int  # bytes
    state: int  # bytes of batch_stats


def flops(network: str, size: int, names: Sequence[str]) -> dict[str, float]:
    """FLOPs of a training step with each method, as ratios to batch norm's."""
    trainers = _trainers(network, size, (BASELINE, *names))
    counts = {
        name: _counts(_compile(trainer, SHAPES[network], size), name)["flops"]
        for name, trainer in trainers.items()
    }
    return {name: counts[name] / counts[BASELINE] for name in names}


def _trainers(
    network: str, size: int, names: Sequence[str], precision: str = "float32"
) -> dict[str, training.Trainer]:
    trainers = {}
    for name in names:
        norm = methods.parse(name, size).norm(steps=1000)
        model = networks.NETWORKS[network](
            norm=norm, classes=10, dtype=jnp.dtype(precision)
        )
        trainers[name] = training.make_trainer(
            model, SHAPES[network], training.OPTIMIZERS["sgd"](0.01, 1000)
        )
    return trainers


def _compile(trainer: training.Trainer, shape: tuple[int, ...], size: int) -> Compiled:
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    labels, rows = (jax.ShapeDtypeStruct((size,), jnp.int32) for _ in range(2))
    step: Any = trainer.step
    begin = time.perf_counter()
    compiled = step.lower(state, images, labels, rows).compile()
    seconds = time.perf_counter() - begin
    return Compiled(compiled, seconds, _bytes(state.params), _bytes(state.batch_stats))


def _counts(compiled: Compiled, name: str) -> dict[str, float]:
    """FLOPs, bytes accessed and greatest memory of a step.

    XLA counts the body of a loop once. The one over the history turns for every slot: it
    reads the slot and the parameters, and with their gradient the slot and two sums again.
    """
    counted, memory = compiled.step.cost_analysis(), compiled.step.memory_analysis()
    turns = methods.WINDOW - 1 if name.startswith("cross_iteration_batch_norm") else 0
    reads = 5 if name == "cross_iteration_batch_norm-gradient" else 2
    return {
        "flops": counted["flops"] + turns * (reads // 2) * 2 * compiled.params / 4,
        "bytes": counted["bytes accessed"] + turns * reads * compiled.params,
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cells(config: Config, network: str, size: int) -> list[dict]:
    names = (BASELINE, *config.methods)
    trainers = _trainers(network, size, names, config.precision)
    shape = SHAPES[network]
    made = {name: _compile(trainer, shape, size) for name, trainer in trainers.items()}
    # The compiled steps are run as they are, so that nothing is compiled twice.
    trainers = {name: t._replace(step=made[name].step) for name, t in trainers.items()}
    batch = _batch(shape, size)
    times = _times(config, trainers, batch)
    over = [BASELINE, *(name for name in TARGETS if _misses(name, times.get(name)))]
    profiles = {name: _profile(trainers[name], batch) for name in over if len(over) > 1}
    counts = {name: _counts(compiled, name) for name, compiled in made.items()}
    return [
        {
            "network": network,
            "batch_size": size,
            "label": name,
            **counts[name],
            "compile": made[name].seconds,
            "state": made[name].state,
            "params": made[name].params,
            "time": times.get(name),
            "profile": profiles.get(name),
        }
        for name in names
    ]


def _batch(shape: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).random((size, *shape), np.float32)
    return images, np.zeros(size, np.int32)


def _times(config: Config, trainers: dict, batch: tuple) -> dict[str, dict]:
    if config.timing_rounds == 0:
        return {}
    pairs = {name: (trainer, len(batch[1])) for name, trainer in trainers.items()}
    runners = timing.make_runners(pairs, *batch)
    steps = timing.steps_in(config.timing_seconds, runners[BASELINE])
    times = timing.side_by_side(runners, BASELINE, config.timing_rounds, steps)
    return {name: value._asdict() for name, value in times.items()}


def _misses(name: str, time: dict | None) -> bool:
    return time is not None and time["ratio"] > TARGETS[name]


def _profile(trainer: training.Trainer, batch: tuple) -> dict[str, float]:
    rows = np.arange(len(batch[1]), dtype=np.int32)
    state = trainer.init(jax.random.key(0))
    return profile.parts(trainer.step, state, (*jax.device_put(batch), rows))


def markdown(results: dict) -> str:
    """One row a network, batch size and method; then targets and profiles."""
    config = results["config"]
    legend = (
        "FLOPs, bytes and time of a training step as ratios to nn.BatchNorm, whose "
        "time is given in ms (time: median and quartiles of side-by-side ratios); memory: "
        "arguments, results and temporary arrays; compile: to trace and compile, once, "
        "seconds; state / θ: bytes of batch_stats over bytes of the parameters"
    )
    if results["rates"]:
        legend += (
            "; roofline: what the FLOPs and bytes take at the rates of a large matrix "
            f"product and a large copy ({results['rates']['flops'] / 1e9:.0f} GFLOP/s, "
            f"{results['rates']['bytes'] / 1e9:.1f} GB/s), over the measured time"
        )
    return (
        f"{_table(results)}\n{legend}. Activations: "
        f"{config['precision']}. {study.measured_on(results)}\n\n"
        f"{verdict(results)}\n\n{_profiles(results)}"
    )


def of(results: dict, *labels: str) -> str:
    """What some methods cost beside Flax's batch norm, in short."""
    headings = (*BESIDE, "state / θ")
    rows = [
        (
            *_beside(base, cell),
            f"{cell['state'] / cell['params']:.2f}",
        )
        for base, cells in _groups(results)
        for cell in cells
        if cell["label"] in labels
    ]
    return (
        f"{report.markdown_table(headings, rows)}\nA training step's FLOPs, bytes and time "
        "as ratios to Flax's batch norm (time: median and quartiles of side-by-side "
        "ratios); bytes of batch_stats over bytes of the parameters. "
        f"{study.measured_on(results)}\n"
    )


def _groups(results: dict) -> list[tuple[dict, list[dict]]]:
    """(the cell of the baseline, its whole group) of each network and batch size."""
    cells = results["cells"]
    starts = [i for i, cell in enumerate(cells) if cell["label"] == BASELINE]
    ends = [*starts[1:], len(cells)]
    return [(cells[i], cells[i:j]) for i, j in zip(starts, ends, strict=True)]


def _table(results: dict) -> str:
    headings = (*BESIDE, "roofline", "memory", "compile", "state / θ")
    rows = [
        (
            *_beside(base, cell),
            _roofline(cell, results["rates"]),
            report.size(cell["memory"]),
            f"{cell['compile']:.1f}",
            f"{cell['state'] / cell['params']:.2f}",
        )
        for base, cells in _groups(results)
        for cell in cells
    ]
    return report.markdown_table(headings, rows)


BESIDE = ("net", "batch", "method", "FLOPs", "bytes", "time")


def _beside(base: dict, cell: dict) -> tuple[str, ...]:
    """The columns ``BESIDE``, of which three are ratios to the baseline."""
    return (
        cell["network"],
        str(cell["batch_size"]),
        cell["label"],
        f"{cell['flops'] / base['flops']:.2f}",
        f"{cell['bytes'] / base['bytes']:.2f}",
        _time(cell),
    )


def _time(cell: dict) -> str:
    time = cell["time"]
    if time is None:
        return "–"
    if cell["label"] == BASELINE:
        return f"{time['milliseconds']:.3g} ms"
    return f"{time['ratio']:.2f} ({time['ratio_low']:.2f}–{time['ratio_high']:.2f})"


def _roofline(cell: dict, rates: dict | None) -> str:
    if rates is None or cell["time"] is None:
        return "–"
    least = max(cell["flops"] / rates["flops"], cell["bytes"] / rates["bytes"])
    return f"{1e5 * least / cell['time']['milliseconds']:.0f} %"


def verdict(results: dict) -> str:
    """The median and the worst cell of each method with a target."""
    sentences = []
    for name, target in TARGETS.items():
        cells = [c for c in results["cells"] if c["label"] == name and c["time"]]
        if cells:
            worst = max(cells, key=lambda cell: cell["time"]["ratio"])
            median = float(np.median([cell["time"]["ratio"] for cell in cells]))
            met = sum(not _misses(name, cell["time"]) for cell in cells)
            sentences.append(
                f"Step time of {name} relative to Flax's batch norm: median {median:.2f}, "
                f"worst {worst['time']['ratio']:.2f} ({worst['network']}, batch size "
                f"{worst['batch_size']}); {met} of {len(cells)} cells meet {target:.2f}."
            )
    return "\n".join(sentences)


def _profiles(results: dict) -> str:
    """Where a target is missed: the parts of a step beside those of the baseline."""
    rows, names = [], (*profile.PARTS, profile.UNNAMED)
    for base, cells in _groups(results):
        for cell in (cell for cell in cells if cell["profile"] and cell is not base):
            here, usual = cell["profile"], base["profile"]
            more = {name: here.get(name, 0.0) - usual.get(name, 0.0) for name in names}
            rows.append(
                (
                    cell["network"],
                    str(cell["batch_size"]),
                    cell["label"],
                    f"{sum(usual.values()):.3g}",
                    *(f"{more[name]:+.2g}" for name in names),
                )
            )
    if not rows:
        return ""
    headings = ("net", "batch", "method", "nn.BatchNorm", *names)
    return (
        "Where a target is missed, the milliseconds of a step that each part takes more "
        "than with nn.BatchNorm (in all), summed over threads, from one profile each:"
        f"\n\n{report.markdown_table(headings, rows)}\n"
        "derivatives: those of the statistics with respect to θ; transport: the past moved "
        "to today's θ; remember: what the state takes in; unnamed: what the compiler left "
        "without a name or added, weight gradients of convolutions (the derivatives' among "
        "them), copies and changes of layout.\n"
    )


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
