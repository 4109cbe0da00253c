# SPDX-License-Identifier: Apache-2.0
"""Batch norm and group norm compared with other frameworks, on the same shapes.

Times the forward and backward pass of a normalizer alone, in training, including its
running averages. Flax, cbn_jax, Keras on JAX and PyTorch run side by side in one process.
The comparison shows whether the baseline of the other tables is a fair one. PyTorch and
Keras are optional. If one is not installed, it is left out, and the table names it.

Run it with ``python -m benchmarks.studies.frameworks``.
"""

import dataclasses
import os
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from flax import linen as nn
    from rich.console import Console
    from rich.progress import track

    from cbn_jax.linen import Norm

from benchmarks.lib import report, study, timing
from benchmarks.lib.timing import Runner

BASELINE = "flax batch_norm"
GROUPS = 8
SHAPES = ((8, 128), (32, 1024), (2, 32, 32, 64), (8, 16, 16, 128), (2, 56, 56, 256))
OPTIONAL = {"keras": "Keras", "torch": "PyTorch"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    shapes: tuple[str, ...] = tuple("x".join(map(str, shape)) for shape in SHAPES)
    """Shapes of the activations, features last, as in 2x32x32x64."""
    rounds: int = 20
    """Rounds; each times every candidate once."""
    steps: int = 10
    """Steps of each candidate in a round."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/frameworks")
    """Folder for results.json and table.md."""


QUICK = Config(shapes=("8x16",), rounds=2, steps=1)


def main(config: Config, console: Console) -> dict:
    """Times all shapes, writes and shows the results."""
    absent = {package: not find_spec(package) for package in OPTIONAL}
    cells = []
    for text in track(config.shapes, "timing", console=console):
        runners = _runners(_shape(text), absent)
        times = timing.side_by_side(runners, BASELINE, config.rounds, config.steps)
        cells += [{"shape": text, "label": k, **v._asdict()} for k, v in times.items()]
    found = {
        "absent": [OPTIONAL[package] for package in OPTIONAL if absent[package]],
        "packages": {
            OPTIONAL[package]: metadata.version(package)
            for package in OPTIONAL
            if not absent[package]
        },
        "cells": cells,
    }
    return study.publish(config, found, console, markdown)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) < 2 or not all(size.isdigit() and size != "0" for size in sizes):
        raise ValueError(
            f"shape {text!r} is not one, expected examples, places and features, as in "
            "2x32x32x64 or 8x128."
        )
    return tuple(map(int, sizes))


def _runners(shape: tuple[int, ...], absent: dict[str, bool]) -> dict[str, Runner]:
    """Every available candidate, on the same numbers."""
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal(shape, np.float32) for _ in range(2))
    runners = {
        BASELINE: _linen(nn.BatchNorm(use_running_average=False), x, cotangent),
        "cbn_jax batch_norm": _linen(
            Norm(cbn_jax.batch_norm(), use_running_average=False), x, cotangent
        ),
        "flax group_norm": _linen(nn.GroupNorm(GROUPS), x, cotangent),
    }
    if not absent["keras"]:
        runners |= _keras(x, cotangent)
    if not absent["torch"]:
        runners |= _torch(x, cotangent)
    return runners


def _linen(module: nn.Module, x: np.ndarray, cotangent: np.ndarray) -> Runner:
    variables: Any = module.init(jax.random.key(0), x)
    params, stats = variables["params"], variables.get("batch_stats", {})

    def forward(params, stats, x):
        y, updates = module.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return y, updates.get("batch_stats", {})

    return _jitted(forward, params, stats, x, cotangent)


def _keras(x: np.ndarray, cotangent: np.ndarray) -> dict[str, Runner]:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras: Any = import_module("keras")

    def runner(layer, **options) -> Runner:
        layer.build(x.shape)
        params = [variable.value for variable in layer.trainable_variables]
        stats = [variable.value for variable in layer.non_trainable_variables]

        def forward(params, stats, x):
            return layer.stateless_call(params, stats, x, **options)

        return _jitted(forward, params, stats, x, cotangent)

    return {
        "keras batch_norm": runner(keras.layers.BatchNormalization(), training=True),
        "keras group_norm": runner(keras.layers.GroupNormalization(GROUPS)),
    }


def _jitted(forward: Callable, params, stats, x: Any, cotangent: Any) -> Runner:
    """A runner of derivatives with respect to parameters and ``x``, and of new averages."""

    @jax.jit
    def step(params, stats, x, cotangent):
        def run(params, x):
            return forward(params, stats, x)

        _, pull, stats_after = jax.vjp(run, params, x, has_aux=True)
        return pull(cotangent), stats_after

    x, cotangent = jnp.asarray(x), jnp.asarray(cotangent)

    def runner(steps: int) -> None:
        nonlocal stats
        gradients = None
        for _ in range(steps):
            gradients, stats = step(params, stats, x, cotangent)
        jax.block_until_ready((gradients, stats))

    return runner


def _torch(x: np.ndarray, cotangent: np.ndarray) -> dict[str, Runner]:
    """In PyTorch's own layout, features second."""
    torch: Any = import_module("torch")

    def tensor(values: np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 1)))

    features, many = x.shape[-1], x.ndim > 2
    batch_norm = (torch.nn.BatchNorm2d if many else torch.nn.BatchNorm1d)(features)
    inputs, back = tensor(x).requires_grad_(), tensor(cotangent)

    def runner(module) -> Runner:
        def run(steps: int) -> None:
            for _ in range(steps):
                inputs.grad = None
                module.zero_grad()
                module(inputs).backward(back)

        return run

    return {
        "torch batch_norm": runner(batch_norm),
        "torch group_norm": runner(torch.nn.GroupNorm(GROUPS, features)),
    }


def markdown(results: dict) -> str:
    """One row per candidate, one column per shape."""
    shapes = results["config"]["shapes"]
    labels = dict.fromkeys(cell["label"] for cell in results["cells"])
    found = {(cell["label"], cell["shape"]): cell for cell in results["cells"]}
    rows = [(label, *(_time(found[label, shape]) for shape in shapes)) for label in labels]
    absent = "".join(f" {name} is not installed: left out." for name in results["absent"])
    versions = "".join(f"{k} {v}, " for k, v in results["packages"].items())
    return (
        f"{report.markdown_table(('normalizer', *shapes), rows)}\n"
        "Forward and backward pass in training, float32: median (quartiles) of "
        f"side-by-side ratios to {BASELINE}, whose time is given in ms.{absent} "
        f"{versions}{study.measured_on(results)}\n"
    )


def _time(cell: dict) -> str:
    if cell["label"] == BASELINE:
        return f"{cell['milliseconds']:.3g} ms"
    return f"{cell['ratio']:.2f} ({cell['ratio_low']:.2f}–{cell['ratio_high']:.2f})"


if __name__ == "__main__":
    study.cli(Config, main, quick=QUICK)
