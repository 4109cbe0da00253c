# SPDX-License-Identifier: Apache-2.0
"""Data that devices exchange in a training step of one normalized layer.

A 3x3 convolution is normalized under ``shard_map`` on simulated devices. The step is
compiled and never run. The bytes of its all-reduces come from the compiled program. A
second table has the data of a whole ResNet-50, computed from its shapes.

Run it with ``python -m benchmarks.studies.collectives``.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import optax
    import tyro
    from flax import linen as nn
    from rich.console import Console
    from rich.progress import track

    from cbn_jax.linen import Norm
    from cbn_jax.optax import with_backward_statistics

from benchmarks.lib import methods, profile, report, study
from benchmarks.lib.training import TrainState
from benchmarks.studies import cost, data_parallel

ALONE = "none"  # the layer with scale and bias; every method sends their gradient
STEPS = 1000  # length of the run, which affects nothing here


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the study."""

    methods: tuple[str, ...] = (
        "batch_norm",
        "bidirectional_batch_norm",
        "group_batch_norm",
        "carried_batch_norm",
        "small_batch_norm",
        "cross_iteration_batch_norm",
    )
    """Normalizers to compare."""
    devices: tuple[int, ...] = (8, 64)
    """Simulated devices of a CPU."""
    features: int = 64
    """Input and output features of the convolution."""
    side: int = 8
    """Height and width of the images."""
    batch_size: int = 2
    """Examples on each device."""
    network: str = "resnet50"
    """Network of the second table. Its shapes are computed and nothing is run."""
    network_devices: int = 256
    """Devices of the second table."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/collectives")
    """Folder for results.json and table.md."""


QUICK = Config(methods=("batch_norm",), devices=(2,), features=8, side=4, network="mlp")


def main(config: Config, console: Console) -> dict:
    """Counts everything, writes and shows the results."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        counted = pool.map(counts, [config] * len(config.devices), config.devices)
        cells = [
            {"devices": devices, **cell}
            for devices, found in zip(
                track(config.devices, "compiling", console=console), counted, strict=True
            )
            for cell in found
        ]
    whole = features_and_params(config.network)
    return study.publish(
        config,
        {"cells": cells, "whole": whole},
        console,
        markdown,
        device=jax.devices("cpu")[0],
    )


def counts(config: Config, devices: int) -> list[dict]:
    """Bytes that the step of each method sends; JAX must not have been used before."""
    data_parallel.simulate(devices)
    return [
        {"label": name, **sent(_program(config, name, devices))}
        for name in (ALONE, *config.methods)
    ]


class _Network(nn.Module):
    """One normalized layer, whose outputs are averaged over the positions."""

    method: methods.Method
    features: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        layer = nn.Conv(self.features, (3, 3), use_bias=False)
        if self.method.name == ALONE:
            norm = self.method.norm(steps=STEPS)(layer=layer, train=train)
        else:
            estimator = data_parallel.estimator_of(self.method, STEPS)
            norm = Norm(estimator, layer, use_running_average=not train, axis_name="data")
        return nn.relu(norm(images)).mean((1, 2))


def _program(config: Config, name: str, devices: int) -> str:
    """The compiled training step of one normalized layer."""
    model: Any = _Network(methods.parse(name, config.batch_size), config.features)
    optimizer = with_backward_statistics(optax.sgd(0.1))
    examples = devices * config.batch_size
    shape = examples, config.side, config.side, config.features
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct((examples,), jnp.int32)

    def init(images):
        variables = model.init(jax.random.key(0), images, train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(params, stats, optimizer.init(params))

    step = jax.shard_map(
        _step(model, optimizer),
        mesh=data_parallel.make_mesh(devices),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    state = jax.eval_shape(init, images)
    return str(jax.jit(step).lower(state, images, labels).compile().as_text())


def _step(model: Any, optimizer: optax.GradientTransformation) -> Any:
    def step(state, images, labels):
        def loss_of(params):
            arguments = params, state.batch_stats, images, labels
            loss, batch_stats = data_parallel.loss_fn(model, *arguments)
            return jax.lax.pmean(loss, "data"), batch_stats

        gradients, batch_stats = jax.grad(loss_of, has_aux=True)(state.params)
        # The optimizer writes backward statistics and needs the parameters for that.
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(
            optax.apply_updates(state.params, updates), batch_stats, opt_state
        )

    return step


_REDUCE = re.compile(r" = (.*?) all-reduce(?:-start)?\(")
_ARRAY = re.compile(r"[a-z]+(\d*)\[([\d,]*)\]")
_BRANCHES = re.compile(r"(?:branch_computations=\{|(?:true|false)_computation=)([^}]*)")
_NAME = re.compile(r"%([\w.\-]+)")


def sent(program: str) -> dict[str, int]:
    """Number of all-reduces of a program, and bytes of all and of those in branches.

    Instructions of a branch run only if the program takes the branch.
    """
    lines = profile.computations(program)
    branches = _reachable(lines, _branches(lines))
    always = [r for name in lines if name not in branches for r in _reduced(lines[name])]
    seldom = [r for name in branches for r in _reduced(lines[name])]
    return {
        "all_reduces": len(always),
        "bytes": sum(map(size_of, always)),
        "branch_bytes": sum(map(size_of, seldom)),
    }


def _reduced(lines: list[str]) -> list[str]:
    """The shapes of the results of a computation's all-reduces."""
    return [found[1] for line in lines if (found := _REDUCE.search(line))]


def size_of(shapes: str) -> int:
    """Bytes of the arrays of an instruction, as in ``(f32[64]{0}, pred[2,3]{1,0})``."""
    return sum(
        max(1, int(bits or 8) // 8) * math.prod(int(n) for n in axes.split(",") if n)
        for bits, axes in _ARRAY.findall(shapes)
    )


def _branches(lines: dict[str, list[str]]) -> set[str]:
    """The computations among which a condition chooses."""
    everything = "\n".join(line for each in lines.values() for line in each)
    return {
        name for names in _BRANCHES.findall(everything) for name in _NAME.findall(names)
    }


def _reachable(lines: dict[str, list[str]], names: Iterable[str]) -> set[str]:
    """The computations and all computations that they call."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        if name in lines and name not in found:
            found.add(name)
            left += [each for line in lines[name] for each in _NAME.findall(line)]
    return found


def features_and_params(network: str) -> dict[str, int]:
    """The numbers of normalized features and of parameters of a network."""
    (trainer,) = cost.make_trainers(network, 2, ("batch_norm",), classes=1000).values()
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    paths = jax.tree.leaves_with_path(state.params)
    scales = [leaf.size for path, leaf in paths if path[-1].key == "scale"]
    return {"features": sum(scales), "params": sum(leaf.size for _, leaf in paths)}


def markdown(results: dict) -> str:
    """One row per number of devices and method; then a whole network."""
    config = results["config"]
    size, side = config["batch_size"], config["side"]
    return (
        f"{_table(results['cells'])}\n"
        f"A 3x3 convolution of {config['features']} features on {size} images of "
        f"{side}x{side} on each device, with windows for batch size {size}. sent: bytes of "
        "the arrays that the all-reduces of the compiled training step add up; beyond: "
        f"those beyond {ALONE}, a learned scale and bias, whose gradients and those of the "
        "weights every method sends; far: more bytes, sent only where a mean is more than "
        "8 standard deviations from the pivot. "
        f"{study.measured_on(results)}\n\n{_whole(results)}"
    )


def _table(cells: list[dict]) -> str:
    headings = ("devices", "method", "all-reduces", "sent", "beyond", "far")
    alone = {cell["devices"]: cell["bytes"] for cell in cells if cell["label"] == ALONE}
    rows = [
        (
            str(cell["devices"]),
            cell["label"],
            str(cell["all_reduces"]),
            report.size(cell["bytes"]),
            report.size(cell["bytes"] - alone[cell["devices"]]),
            report.size(cell["branch_bytes"]),
        )
        for cell in cells
    ]
    return report.markdown_table(headings, rows)


def numbers_sent(features: int, params: int, devices: int) -> dict[str, int]:
    """The count of numbers that a whole network sends in a step."""
    return {
        "batch_norm, forward: 3 sums per feature": 3 * features,
        "batch_norm, forward without a mask: 2 sums per feature": 2 * features,
        f"for comparison: 4 numbers per feature for each of {devices} devices": (
            4 * features * devices
        ),
        "any method: the gradient of all parameters": params,
    }


def _whole(results: dict) -> str:
    config, whole = results["config"], results["whole"]
    sent = numbers_sent(**whole, devices=config["network_devices"])
    rows = [(what, f"{n:,}", f"{4e-6 * n:,.3g}") for what, n in sent.items()]
    return (
        f"A whole {config['network']} with {whole['features']:,} normalized features on "
        f"{config['network_devices']} devices, by its shapes; the gradient of the "
        "normalization is extra. Where nothing is masked the compiler knows the sums of "
        f"ones:\n\n{report.markdown_table(('what', 'numbers', 'MB'), rows)}"
    )


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
