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
from benchmarks.lib import svg
from benchmarks.lib.optional import needed_for
from cbn_jax.tools.figures import COLORS as COLORS
from cbn_jax.tools.figures import styled

with needed_for("benchmarks"):
    import matplotlib.figure
    import rich.box
    from rich.table import Table


def environment(device: Any = None) -> dict[str, str]:
    """Versions and device, to accompany every figure."""
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
    """Color and marker of the line ``index``, which also differ in gray."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def source_digest() -> str:
    """Digest of library and benchmarks, because results depend on the code."""
    digest = hashlib.sha256()
    folders = (Path(cbn_jax.__file__).parent, Path(__file__).parent.parent)
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def write_json(path: Path, content: Any) -> None:
    """Writes atomically, so that an interrupted run leaves no partial file."""
    text = json.dumps(content, indent=1)
    # A list of numbers takes one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def write_results(path: Path, results: dict) -> dict:
    """Writes results with five digits, and returns these for tables and figures."""
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
            svg.save(draw(results), path)

    return write


def plain(config: Any) -> dict:
    """The options of a study as JSON represents them."""
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
    """Standard error of the mean; 0 for one value, which has no spread."""
    count = np.size(values)
    return float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else 0.0


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


# Each method has one color and marker in all figures. Two methods share them only if no
# figure has both.
_PLACES = {
    "batch_norm": 0,
    "cross_iteration_batch_norm": 1,
    "small_batch_norm": 2,
    "small_batch_norm-standardize": 2,
    "streaming_batch_norm": 2,
    "carried_batch_norm": 5,
    "nn.GroupNorm": 3,
    "group_norm": 3,
    "cross_iteration_batch_norm-burn_in": 4,
    "group_norm-standardize": 4,
    "batch_norm+sgd_centralized": 4,
    "group_batch_norm": 5,
    "replay_batch_norm": 5,
    "none": 6,
    "group_norm_plus": 6,
    "batch_norm@32": 6,
}


def look_of(label: str, index: int) -> dict[str, Any]:
    """Color and marker of a method; those of the line ``index`` if it has none."""
    return look(_PLACES.get(label, index))


HEADINGS = ("net", "a step holds", "method", "test, %", "step / BN", "state")


def rows(results: dict) -> list[tuple[str, ...]]:
    """One row per network and method, from the results as written to JSON."""
    made = []
    for cell in results["cells"]:
        last = [curve[-1] for curve in cell["curves"]]
        time = cell["step_time"]
        made.append(
            (
                cell["network"],
                f"{cell['batch_size']} {_held(cell['pairing'])}",
                cell["label"],
                spread([100 * point["accuracy"] for point in last], 1),
                f"{time['ratio']:.1f} ({time['ratio_low']:.1f}–{time['ratio_high']:.1f})",
                size(cell["state_bytes"]),
            )
        )
    return made


def _held(pairing: str, what: str = "") -> str:
    """The images of a step in words."""
    if pairing == "independent":
        return f"independent{what}"
    return f"{what} of one class".strip()


def title(results: dict) -> str:
    """The setting of the runs."""
    config = results["config"]
    precision = config.get("precision", "float32")
    return (
        f"{config['dataset']}, batch size {config['batch_size']}, "
        f"{config['epochs']} epochs, {len(config['seeds'])} seeds"
        + (f", {precision}" if precision != "float32" else "")
    )


def legend(results: dict) -> str:
    """The meaning of the columns, and the device of the measurement."""
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
    made.columns[2].overflow = "fold"  # a truncated name cannot be typed again
    for row in rows(results):
        made.add_row(*row)
    return made


def markdown(results: dict) -> str:
    """The same table for a README."""
    body = markdown_table(HEADINGS, rows(results))
    return f"{title(results)}:\n\n{body}\n{legend(results)}\n"


@drawn
def figure(results: dict) -> Any:
    """Learning curves: mean over seeds, band from least to most.

    There is a row for each network, and a column for each pairing of the images of a step.
    """
    cells = results["cells"]
    networks = list(dict.fromkeys(cell["network"] for cell in cells))
    pairings = results["config"]["pairings"]
    made = matplotlib.figure.Figure((4.8 * len(pairings), 0.6 + 2.8 * len(networks)))
    axes = made.subplots(len(networks), len(pairings), sharey=True, squeeze=False)
    size = results["config"]["batch_size"]
    for row, network in zip(axes, networks, strict=True):
        for axis, pairing in zip(row, pairings, strict=True):
            _panel(axis, [cell for cell in cells if _belongs(cell, network, pairing, size)])
        row[0].set_ylabel(f"{network.upper()}: test accuracy, %")
    for axis, pairing in zip(axes[0], pairings, strict=True):
        axis.set_title(f"{size} {_held(pairing, ' images')} a step")
    for axis in axes[-1]:
        axis.set_xlabel("training images seen")
    made.suptitle(message(results))
    return made


def _belongs(cell: dict, network: str, pairing: str, size: int) -> bool:
    """Whether a cell belongs to a panel; references are in all panels of a network."""
    return cell["network"] == network and (
        cell["pairing"] == pairing or cell["batch_size"] != size
    )


def message(results: dict) -> str:
    """The largest difference of batch norm and the recommended method, in a sentence."""
    ends: dict[tuple, dict[str, float]] = {}
    for cell in results["cells"]:
        where = cell["network"], cell["pairing"], cell["batch_size"]
        last = np.mean([curve[-1]["accuracy"] for curve in cell["curves"]])
        ends.setdefault(where, {})[cell["label"]] = 100 * float(last)
    both = {
        where: (found["batch_norm"], found["small_batch_norm"])
        for where, found in ends.items()
        if {"batch_norm", "small_batch_norm"} <= set(found)
    }
    if not both:
        return title(results)
    where = max(both, key=lambda where: both[where][1] - both[where][0])
    (network, pairing, size), (batch, ours) = where, both[where]
    return (
        f"{network.upper()}, {size} {_held(pairing, ' images')} a step: "
        f"batch_norm ends at {batch:.0f} %, small_batch_norm at {ours:.0f} %"
    )


def _panel(axis: Any, cells: list[dict]) -> None:
    """Curves, with their names at their ends."""
    ends = {}
    for index, cell in enumerate(cells):
        examples = [cell["batch_size"] * point["step"] for point in cell["curves"][0]]
        accuracy = 100 * np.array([[p["accuracy"] for p in c] for c in cell["curves"]])
        color = look_of(cell["label"], index)["color"]
        dashed = "--" if "@" in cell["label"] else "-"
        axis.plot(examples, accuracy.mean(0), color=color, linestyle=dashed)
        low, high = accuracy.min(0), accuracy.max(0)
        axis.fill_between(examples, low, high, color=color, alpha=0.15, lw=0)
        ends[cell["label"]] = (examples[-1], float(accuracy[:, -1].mean()), color)
    name_ends(axis, ends)


def legend_below(made: Any, columns: int = 4) -> None:
    """One legend for all panels, below them, where it covers no data."""
    shown = {
        name: line
        for axis in made.axes
        for line, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    where = {"loc": "outside lower center", "ncols": min(columns, len(shown))}
    made.legend(list(shown.values()), list(shown), **where)


def name_ends(axis: Any, ends: dict[str, tuple[float, float, str]]) -> None:
    """Writes names beside the ends of lines, moved apart if they would overlap.

    Args:
      axis: axes of matplotlib.
      ends: the last point of each line and its color, by name.
    """
    if not ends:
        return
    axis.autoscale_view()
    scale = axis.yaxis.get_transform().transform  # of a logarithmic axis, too
    low, high = scale(np.array(axis.get_ylim()))
    point = (high - low) / (axis.get_position().height * axis.figure.get_figheight() * 72)
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = scale(np.array([ends[name][1] for name in names])) / point
    places = spread_apart(heights, gap=9.5)  # points between two lines of text
    right = max(x for x, _, _ in ends.values())
    for name, height, place in zip(names, heights, places, strict=True):
        _, y, color = ends[name]
        axis.annotate(
            name,
            (right, y),
            (6, place - height),
            textcoords="offset points",
            color=color,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def spread_apart(values: Sequence[float], gap: float) -> list[float]:
    """Rising values, moved as little as possible so that neighbors are a gap apart."""
    # Without its gaps, the sequence must not fall. Pooling finds the nearest such sequence.
    groups: list[list[float]] = []
    for index, value in enumerate(values):
        groups.append([value - index * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1].extend(last)
    level = [float(np.mean(group)) for group in groups for _ in group]
    return [each + index * gap for index, each in enumerate(level)]


# Name of the file -> the function that draws it from the results.
FIGURES = {"curves": figure}
