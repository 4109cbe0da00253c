# SPDX-License-Identifier: Apache-2.0
"""Cost of each method: time, FLOPs, bytes, memory, compile time and state of a step.

A training step (forward, backward, SGD with momentum) is compiled with every method. The
networks are an MLP, a basic stage of ResNet-18, and the whole ResNet-18 with the stem for
32x32 images. FLOPs and bytes are XLA's counts. Times are measured side by side in one
process, each as a ratio to the same network with Flax's BatchNorm. A table compares the
results with targets. If a method misses a target for its time, the study reports two more
results. The floor is the time for the memory traffic of the method's state alone, and a
profile lists the time of each part. A last table has the state of a ResNet-50.

Run it with ``python -m benchmarks.studies.cost``; on an accelerator with ``python -m
benchmarks.studies.cost --device gpu --networks resnet50 --batch-sizes 1 2 4 8
--command-buffers both --output results/cost_gpu``, and the same with ``--precision
bfloat16``. Outside a GPU leave out ``--command-buffers``.
"""

import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
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

from benchmarks.lib import methods, networks, profile, runs, study, timing, training
from benchmarks.studies.cost_report import markdown
from benchmarks.studies.cost_tables import BASELINE, SHAPES
from benchmarks.studies.cost_targets import slow

CommandBuffers = Literal["default", "with", "without"]
# Options of the compiler. A GPU launches the operations of a command buffer together.
COMMAND_BUFFERS: dict[CommandBuffers, dict[str, Any]] = {
    "default": {},
    "with": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUDNN,CUSTOM_CALL,CUBLASLT",
        "xla_gpu_graph_min_graph_size": 1,
    },
    "without": {"xla_gpu_enable_command_buffer": ""},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    networks: tuple[str, ...] = ("mlp", "stage", "resnet18")
    """Networks to measure; also resnet50, at 224x224."""
    batch_sizes: tuple[int, ...] = (1, 2, 8)
    """Examples per step. One example is left out if batch norm cannot train on it."""
    methods: tuple[str, ...] = (
        "batch_norm",
        "nn.GroupNorm",
        "group_norm",
        "diminishing_batch_norm-0.5",
        "group_batch_norm",
        "carried_batch_norm",
        "small_batch_norm",
        "cross_iteration_batch_norm",
        "cross_iteration_batch_norm-gradient",
        "replay_batch_norm-16",
        "batch_renorm",
        "bidirectional_batch_norm",
        "moving_average_batch_norm",
        "momentum_batch_norm",
        "online_norm",
    )
    """Normalizers to compare with Flax's batch norm."""
    precision: runs.Precision = "float32"
    """Precision of activations and products."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Device to run on; JAX's own choice if not given."""
    command_buffers: Literal["default", "with", "without", "both"] = "default"
    """With or without CUDA graphs, on a GPU only; JAX's own choice if not given."""
    stored: str = "resnet50"
    """Network of the table of states. Its shapes are computed and nothing is run."""
    timing_rounds: int = 7
    """Rounds of steps for the times. 0 runs nothing and only counts."""
    timing_seconds: float = 0.2
    """Approximate time for a method in each round, of at least one step."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/cost")
    """Folder for results.json and table.md."""


QUICK = Config(
    networks=("mlp",),
    batch_sizes=(1, 2),
    methods=("batch_norm", "small_batch_norm"),
    stored="mlp",
    timing_rounds=2,
    timing_seconds=0.01,
)


def main(config: Config, console: Console) -> dict:
    """Counts and times every cell, writes and shows the results."""
    runs.check_networks((*config.networks, config.stored))
    device = _device(config.device)
    forms = _forms(config.command_buffers, device)
    groups = [
        group
        for group in itertools.product(config.networks, config.batch_sizes, forms)
        if group[:2] != ("mlp", 1)
    ]
    with jax.default_device(device):
        rates = _rates() if config.timing_rounds else None
        cells = [
            cell
            for group in track(groups, "counting and timing", console=console)
            for cell in _cells(config, *group)
        ]
        states = _states(config.stored, (BASELINE, *config.methods))
    return study.publish(
        config,
        {"rates": rates, "cells": cells, "states": states},
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


def _forms(asked: str, device: Any) -> tuple[CommandBuffers, ...]:
    if asked == "default":
        return ("default",)
    if device.platform != "gpu":
        raise ValueError(
            f"--command-buffers {asked} is for a GPU, and the device is a "
            f"{device.platform}; leave the option out."
        )
    forms: tuple[CommandBuffers, ...] = ("with", "without")
    return tuple(form for form in forms if asked in (form, "both"))


def _rates() -> dict[str, float]:
    """FLOPs and bytes per second of the device, the best of several calls."""
    square, long = jnp.ones((2048, 2048)), jnp.ones(2**26)
    # The array is overwritten in place, because new memory would cost additional time.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    return {
        "flops": 2 * 2048**3 / _seconds(jax.jit(lambda x: x @ square), square),
        "bytes": 2 * long.nbytes / _seconds(negate, long),
    }


def _seconds(function: Callable, x: jax.Array, calls: int = 8) -> float:
    """The least time of several calls, each on the result of the one before."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        x = jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class Compiled(NamedTuple):
    """A compiled step."""

    step: Any
    seconds: float  # process time to trace, lower and compile
    params: int  # bytes
    state: int  # bytes of batch_stats
    layers: int  # number of normalized layers


def flops(network: str, size: int, names: Sequence[str]) -> dict[str, float]:
    """FLOPs of a training step with each method, as ratios to batch norm's."""
    trainers = make_trainers(network, size, (BASELINE, *names))
    counts = {
        name: _counts(_compile(trainer, SHAPES[network], size), name)["flops"]
        for name, trainer in trainers.items()
    }
    return {name: counts[name] / counts[BASELINE] for name in names}


def make_trainers(
    network: str,
    size: int,
    names: Sequence[str],
    precision: str = "float32",
    classes: int = 10,
) -> dict[str, training.Trainer]:
    """Trainers of a network with every method, for images of ``SHAPES``."""
    trainers = {}
    for name in names:
        norm = methods.parse(name, size).norm(steps=1000)
        model = networks.NETWORKS[network](
            norm=norm, classes=classes, dtype=jnp.dtype(precision)
        )
        trainers[name] = training.make_trainer(
            model, SHAPES[network], training.OPTIMIZERS["sgd"](0.01, 1000)
        )
    return trainers


def _compile(
    trainer: training.Trainer,
    shape: tuple[int, ...],
    size: int,
    form: CommandBuffers = "default",
) -> Compiled:
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    labels, rows = (jax.ShapeDtypeStruct((size,), jnp.int32) for _ in range(2))
    step: Any = trainer.step
    with _no_garbage():
        begin = time.process_time()
        lowered = step.lower(state, images, labels, rows)
        compiled = lowered.compile(compiler_options=COMMAND_BUFFERS[form])
        seconds = time.process_time() - begin
    return Compiled(
        step=compiled,
        seconds=seconds,
        params=_bytes(state.params),
        state=_bytes(state.batch_stats),
        layers=_layers(state.params),
    )


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Disables garbage collection, which takes longer the more programs exist."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _layers(params: Any) -> int:
    """The number of normalized layers; each has a scale."""
    paths = (path for path, _ in jax.tree.leaves_with_path(params))
    return sum(path[-1] == jax.tree_util.DictKey("scale") for path in paths)


def _counts(compiled: Compiled, name: str) -> dict[str, float]:
    """FLOPs, bytes accessed, fusions and greatest memory of a step.

    XLA counts the body of a loop once. The loop over the history runs once per slot: it
    reads the slot and the parameters, and for the gradient the slot and two sums again.
    """
    counted, memory = compiled.step.cost_analysis(), compiled.step.memory_analysis()
    turns = methods.WINDOW - 1 if name.startswith("cross_iteration_batch_norm") else 0
    reads = 5 if name == "cross_iteration_batch_norm-gradient" else 2
    return {
        "flops": counted["flops"] + turns * (reads // 2) * 2 * compiled.params / 4,
        "bytes": counted["bytes accessed"] + turns * reads * compiled.params,
        "fusions": fusions(compiled.step.as_text()),
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }


def fusions(program: str) -> int:
    """The number of fusions in the main computation of a compiled program."""
    return sum(" fusion(" in line for line in profile.computations(program)[profile.ENTRY])


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cells(config: Config, network: str, size: int, form: CommandBuffers) -> list[dict]:
    names = (BASELINE, *config.methods)
    trainers = make_trainers(network, size, names, config.precision)
    shape = SHAPES[network]
    made = {
        name: _compile(trainer, shape, size, form) for name, trainer in trainers.items()
    }
    # The compiled steps are run directly, so that nothing is compiled twice.
    trainers = {name: t._replace(step=made[name].step) for name, t in trainers.items()}
    batch = _batch(shape, size)
    times = _times(config, trainers, batch)
    place = {"network": network, "batch_size": size, "command_buffers": form}
    cells = [place | _cell(name, made[name], times.get(name)) for name in names]
    missed = [cell for cell in cells if slow(cells[0], cell)]
    for cell in [cells[0], *missed] if missed else []:
        cell["profile"] = _profile(trainers[cell["label"]], batch)
    return cells


def _cell(name: str, compiled: Compiled, time: dict | None) -> dict:
    return {
        "label": name,
        **_counts(compiled, name),
        "compile": compiled.seconds,
        "state": compiled.state,
        "params": compiled.params,
        "layers": compiled.layers,
        "time": time,
        "profile": None,
    }


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


def _profile(trainer: training.Trainer, batch: tuple) -> dict[str, float]:
    rows = np.arange(len(batch[1]), dtype=np.int32)
    state = trainer.init(jax.random.key(0))
    return profile.parts(trainer.step, state, (*jax.device_put(batch), rows))


def _states(network: str, names: Sequence[str]) -> list[dict]:
    """The state of each method for a network, with windows for batch size 2."""
    states = []
    for name, trainer in make_trainers(network, 2, names, classes=1000).items():
        state = jax.eval_shape(trainer.init, jax.random.key(0))
        sizes = {"state": _bytes(state.batch_stats), "params": _bytes(state.params)}
        states.append({"label": name, **sizes})
    return states


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
