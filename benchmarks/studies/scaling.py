# SPDX-License-Identifier: Apache-2.0
"""Growth of cost with the window, the features and the number of devices.

One normalized 3x3 convolution is compiled at several sizes. Each row of the table has the
counts and their slope on logarithmic axes, beside the expected slope. State, FLOPs and time
are those of one device. All-reduces of the forward pass are counted on simulated devices.

Run it with ``python -m benchmarks.studies.scaling``.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import cbn_jax
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console
    from rich.progress import track

from benchmarks.lib import report, study
from benchmarks.studies import data_parallel

SAMPLES = 16  # of replay


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the study."""

    windows: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Iterations in the window, at the middle number of features."""
    features: tuple[int, ...] = (32, 64, 128, 256)
    """Input and output features of the convolution, at the middle window."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of simulated devices, with one example each."""
    side: int = 8
    """Height and width of the images."""
    batch_size: int = 2
    """Examples per step, on one device."""
    rounds: int = 20
    """Number of steps that are timed one by one; the median counts."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/scaling")
    """Folder for results.json, table.md and scaling.svg."""


QUICK = Config(windows=(2, 4), features=(8, 16), devices=(1, 2), side=4, rounds=2)

# Window -> estimator.
METHODS: dict[str, Callable[[int], cbn_jax.Estimator]] = {
    "batch_norm": lambda window: cbn_jax.batch_norm(),
    "streaming_batch_norm": lambda window: cbn_jax.streaming_batch_norm(window),
    "cross_iteration_batch_norm": lambda window: cbn_jax.cross_iteration_batch_norm(window),
    "replay_batch_norm": lambda window: cbn_jax.replay_batch_norm(window, samples=SAMPLES),
}
# Expected exponents of growth for large sizes. A state of the size of θ grows as features²,
# one of input patches as features. k slots of either grow with the window, k - 1 slightly
# faster. FLOPs are the layer's, features², except for replay, which runs the layer at (k -
# 1) · SAMPLES more positions. Time has a constant part, so its slope is smaller. Devices
# send all their data in one message.
SLOPES: dict[tuple[str, str], dict[str, float]] = {
    ("window", "state"): {
        "batch_norm": 0,
        "streaming_batch_norm": 0,
        "cross_iteration_batch_norm": 1,
        "replay_batch_norm": 1,
    },
    ("window", "time"): {
        "batch_norm": 0,
        "streaming_batch_norm": 0,
        "cross_iteration_batch_norm": 1,
        "replay_batch_norm": 1,
    },
    ("features", "state"): {
        "batch_norm": 1,
        "streaming_batch_norm": 2,
        "cross_iteration_batch_norm": 2,
        "replay_batch_norm": 1,
    },
    ("features", "FLOPs"): dict.fromkeys(METHODS, 2),
    ("devices", "all-reduces"): dict.fromkeys(METHODS, 0),
}


def main(config: Config, console: Console) -> dict:
    """Counts everything, writes and shows the results."""
    data_parallel.simulate(max(config.devices))
    sizes: dict[str, tuple[int, ...]] = {
        "window": config.windows,
        "features": config.features,
        "devices": config.devices,
    }
    rows = [(*key, method) for key in SLOPES for method in METHODS]
    cells = []
    for against, what, method in track(rows, "counting", console=console):
        values = [_count(config, what, method, **{against: n}) for n in sizes[against]]
        cells.append(
            {
                "against": against,
                "what": what,
                "method": method,
                "sizes": sizes[against],
                "values": values,
                "should": SLOPES[against, what][method],
                "has": slope(sizes[against], values),
            }
        )
    return study.publish(config, {"cells": cells}, console, markdown, **FIGURES)


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Slope on logarithmic axes between the last two points: the law for large sizes."""
    (a, b), (u, v) = np.log(sizes[-2:]), np.log(values[-2:])
    return float((v - u) / (b - a))


def _count(
    config: Config,
    what: str,
    method: str,
    window: int | None = None,
    features: int | None = None,
    devices: int = 1,
) -> float:
    window = window or _middle(config.windows)
    features = features or _middle(config.features)
    estimator = METHODS[method](window)
    kernel = jnp.ones((3, 3, features, features)) * 0.01
    images = jnp.ones((config.batch_size, config.side, config.side, features))
    state = estimator.init(features, cbn_jax.convolution(), kernel)
    if what == "state":
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if what in ("FLOPs", "time"):
        step: Any = jax.jit(_gradient(estimator), donate_argnums=1)
        program = step.lower(kernel, state, images).compile()
        if what == "FLOPs":
            return program.cost_analysis()["flops"]
        return _milliseconds(program, kernel, state, images, config.rounds)
    return _all_reduces(estimator, kernel, state, images, devices)


def _middle(values: tuple[int, ...]) -> int:
    return values[len(values) // 2]


def _forward(estimator: cbn_jax.Estimator, axis_name: str | None = None) -> Callable:
    def forward(kernel, state, images):
        layer = cbn_jax.convolution()
        x, source = cbn_jax.run_layer(layer, kernel, images)
        statistics, state = estimator.train(state, x, source, axis_name=axis_name)
        return cbn_jax.normalize(x, statistics), state

    return forward


def _gradient(estimator: cbn_jax.Estimator) -> Callable:
    def loss(kernel, state, images):
        y, state = _forward(estimator)(kernel, state, images)
        return jax.nn.relu(y).sum(), state

    return jax.grad(loss, argnums=(0, 2), has_aux=True)  # gradients, new state


def _milliseconds(program: Any, kernel, state, images, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        gradients, state = program(kernel, state, images)
        jax.block_until_ready(gradients)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds[1:]))


def _all_reduces(estimator, kernel, state, images, devices: int) -> float:
    """All-reduces in the compiled forward pass with one example per device."""
    mesh = data_parallel.make_mesh(devices)
    forward = jax.shard_map(
        _forward(estimator, "data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P("data"), P()),
    )
    images = jnp.repeat(images[:1], devices, axis=0)
    program = jax.jit(forward).lower(kernel, state, images).compile()
    return data_parallel.all_reduces(program)


def markdown(results: dict) -> str:
    """One row per law and method."""
    rows = [
        (
            f"{cell['what']} against {cell['against']}",
            cell["method"],
            ", ".join(
                f"{size}: {_value(cell['what'], value)}"
                for size, value in zip(cell["sizes"], cell["values"], strict=True)
            ),
            f"{cell['should']:g}",
            f"{cell['has']:.2f}",
        )
        for cell in results["cells"]
    ]
    config = results["config"]
    headings = ("law", "method", "size: value", "should have", "has")
    return (
        f"{report.markdown_table(headings, rows)}\n"
        "A 3x3 convolution of as many features as it has inputs on "
        f"{config['side']}x{config['side']} positions, batch size "
        f"{config['batch_size']}; slopes on logarithmic axes between the two greatest "
        f"sizes; FLOPs of a forward and backward pass. {study.measured_on(results)}\n"
    )


def _value(what: str, value: float) -> str:
    if what == "state":
        return report.size(value)
    if what == "FLOPs":
        return f"{value / 1e6:.0f} M"
    return f"{value:.2f} ms" if what == "time" else f"{value:g}"


@report.drawn
def figure(results: dict) -> Any:
    """One panel per law, one line per method."""
    laws = list(dict.fromkeys((c["what"], c["against"]) for c in results["cells"]))
    rows = math.ceil(len(laws) / 3)
    made = matplotlib.figure.Figure((9.0, 0.5 + 2.7 * rows))
    axes = made.subplots(rows, 3, squeeze=False).flat
    for axis in axes[len(laws) :]:
        axis.remove()
    for axis, law in zip(axes, laws, strict=False):
        cells = [c for c in results["cells"] if (c["what"], c["against"]) == law]
        for i, cell in enumerate(cells):
            values = np.array(cell["values"]) * _UNITS[law[0]][0]
            look = report.look_of(cell["method"], i)
            axis.plot(cell["sizes"], values, label=cell["method"], **look)
        scale = "log" if law[0] in ("state", "FLOPs") else "linear"
        axis.set(xscale="log", yscale=scale, xlabel=law[1], title=law[0])
        if scale == "linear":
            axis.set_ylim(bottom=0)
        axis.set_ylabel(_UNITS[law[0]][1])
        axis.set_xticks(cells[0]["sizes"], [str(size) for size in cells[0]["sizes"]])
        axis.minorticks_off()
    report.legend_below(made)
    return made


_UNITS = {
    "state": (2**-20, "MiB"),
    "time": (1.0, "ms"),
    "FLOPs": (1e-9, "GFLOP"),
    "all-reduces": (1.0, "count"),
}


# Name of the file -> the function that draws it from the results.
FIGURES = {"scaling": figure}


if __name__ == "__main__":
    study.cli(Config, main, quick=QUICK)
