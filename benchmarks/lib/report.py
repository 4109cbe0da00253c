# SPDX-License-Identifier: Apache-2.0
"""Results as a file, a table and a figure."""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for
from cbn_jax.tools.figures import COLORS as COLORS
from cbn_jax.tools.figures import styled

with needed_for("benchmarks"):
    import matplotlib.figure
    import rich.box
    from PIL import Image
    from rich.table import Table


def environment(device: Any = None) -> dict[str, str]:
    """Versions and device, to go with every figure."""
    packages = ("cbn_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    device = device or jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "device": f"{device.platform}: {device.device_kind}",
        "processor": f"{platform.machine()}, {_cores()} cores",
    }


MARKERS = "osD^vPX"


def look(index: int) -> dict[str, Any]:
    """Color and marker of the line ``index``, which differ in gray too."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def source_digest() -> str:
    """Of the library and the benchmarks: results of other code are other results."""
    digest = hashlib.sha256()
    folders = (Path(cbn_jax.__file__).parent, Path(__file__).parent.parent)
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def write_json(path: Path, content: Any) -> None:
    """Writes in one piece, so that an interrupted run leaves no half file."""
    text = json.dumps(content, indent=1)
    # A list of numbers takes one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def write_results(path: Path, results: dict) -> dict:
    """Writes results with five digits, and returns them so, for tables and figures."""
    results = _rounded(results)
    write_json(path, results)
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def drawn(draw: Callable[[dict], Any]) -> Callable[[dict, Path], None]:
    """A function of results and a path, from one that makes the figure of the results."""

    @functools.wraps(draw)
    def write(results: dict, path: Path) -> None:
        with styled("benchmarks"):
            made = draw(results)
            path.parent.mkdir(parents=True, exist_ok=True)
            made.savefig(path)
        _reduce(path)

    return write


def _reduce(path: Path) -> None:
    """A picture with 64 colors, which are enough for a plot and a third of the bytes."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def plain(config: Any) -> dict:
    """The options of a study as JSON holds them."""
    fields = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    mean, deviation = np.mean(values), np.std(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def mean_error(values: Any, digits: int = 1) -> str:
    """Mean ± standard error over the seeds."""
    mean, error = np.mean(values), standard_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def standard_error(values: Any) -> float:
    """Of the mean; 0 of a single value, which says nothing of its spread."""
    count = np.size(values)
    return float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else 0.0


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


# One color and marker a method in all figures; where two share one, no figure has both.
_PLACES = {
    "batch_norm": 0,
    "cross_iteration_batch_norm": 1,
    "small_batch_norm": 2,
    "streaming_batch_norm": 2,
    "nn.GroupNorm": 3,
    "cross_iteration_batch_norm-burn_in": 4,
    "batch_norm+sgd_centralized": 4,
    "group_batch_norm": 5,
    "replay_batch_norm": 5,
    "none": 6,
    "group_norm_plus": 6,
    "batch_norm@32": 6,
}


def look_of(label: str, index: int) -> dict[str, Any]:
    """Color and marker of a method; of the line ``index`` where it has none of its own."""
    return look(_PLACES.get(label, index))


HEADINGS = ("net", "method", "train loss", "test, %", "step / BN", "state")


def rows(results: dict) -> list[tuple[str, ...]]:
    """One row a network and method, from the results as written to JSON."""
    made = []
    for cell in results["cells"]:
        last = [curve[-1] for curve in cell["curves"]]
        time = cell["step_time"]
        made.append(
            (
                cell["network"],
                cell["label"],
                spread([point["loss"] for point in last], 2),
                spread([100 * point["accuracy"] for point in last], 1),
                f"{time['ratio']:.1f} ({time['ratio_low']:.1f}–{time['ratio_high']:.1f})",
                size(cell["state_bytes"]),
            )
        )
    return made


def title(results: dict) -> str:
    """What was run."""
    config = results["config"]
    precision = config.get("precision", "float32")
    return (
        f"{config['dataset']}, batch size {config['batch_size']}, "
        f"{config['epochs']} epochs, {len(config['seeds'])} seeds"
        + (f", {precision}" if precision != "float32" else "")
    )


def legend(results: dict) -> str:
    """What the columns say, and where they were measured."""
    versions = results["environment"]
    return (
        "Mean ± standard deviation over seeds; step time as median (quartiles) of "
        f"side-by-side ratios to {results['baseline']}; state: bytes of batch_stats. "
        f"JAX {versions['jax']}, Flax {versions['flax']}, Python {versions['python']}, "
        f"{versions['device']}, {versions['processor']}."
    )


def table(results: dict) -> Table:
    """The table for the terminal."""
    made = Table(
        *HEADINGS,
        title=title(results),
        caption=legend(results),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    made.columns[1].overflow = "fold"  # a name cut short cannot be typed again
    for row in rows(results):
        made.add_row(*row)
    return made


def markdown(results: dict) -> str:
    """The same table for a README."""
    body = markdown_table(HEADINGS, rows(results))
    return f"{title(results)}:\n\n{body}\n{legend(results)}\n"


@drawn
def figure(results: dict) -> Any:
    """Learning curves, one panel a network: mean over seeds, band from least to most."""
    networks = list(dict.fromkeys(cell["network"] for cell in results["cells"]))
    made = matplotlib.figure.Figure((4.8 * len(networks), 3.6))
    axes = made.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(cell["label"] for cell in results["cells"]))
    for axis, network in zip(axes, networks, strict=True):
        for cell in (c for c in results["cells"] if c["network"] == network):
            _curve(axis, cell, methods.index(cell["label"]))
        axis.set_title(network.upper())
        axis.set_xlabel("training examples seen")
    axes[0].set_ylabel("test accuracy, %")
    axes[-1].legend(loc="lower right")
    made.suptitle(title(results))
    return made


def _curve(axis, cell: dict, index: int) -> None:
    examples = [cell["batch_size"] * point["step"] for point in cell["curves"][0]]
    accuracy = 100 * np.array([[p["accuracy"] for p in c] for c in cell["curves"]])
    line = {
        **look_of(cell["label"], index),
        "linestyle": "--" if "@" in cell["label"] else "-",
        "markevery": (index, 8),  # here and there, not all in one place
        "label": cell["label"],
    }
    axis.plot(examples, accuracy.mean(0), **line)
    low, high = accuracy.min(0), accuracy.max(0)
    axis.fill_between(examples, low, high, color=line["color"], alpha=0.15, lw=0)


# Name of the file -> what draws it from the results.
FIGURES = {"curves": figure}
