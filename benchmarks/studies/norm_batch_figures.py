# SPDX-License-Identifier: Apache-2.0
"""Figures of the study of norm batches."""

from typing import Any

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.figure
    from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.lib import report, tasks
from benchmarks.studies.norm_batch_results import Cell, Tested, tested

SHOWN = ("batch_norm", "group_norm", "group_norm-standardize", "small_batch_norm")
PAIRINGS = {"independent": "independent examples", "alike": "examples that are alike"}
Cells = dict[Cell, dict[str, Tested]]


@report.drawn
def over_norm_batch(results: dict) -> Any:
    """Test error over the norm batch, in a panel for each task.

    Lines are for independent examples, open marks for examples that are alike.
    """
    cells = _own_steps(tested(results))
    names = _several(cells)
    made = matplotlib.figure.Figure((max(7.5, 4.9 * len(names)), 3.5))
    axes = made.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        here = [cell for cell in cells if cell.task == name and cell.norm_batch < 32]
        _scaled(axis, here)
        _open_marks(axis, {cell: cells[cell] for cell in here if cell.pairing == "alike"})
        lines = {cell: cells[cell] for cell in here if cell.pairing == "independent"}
        _lines(axis, lines, _reference(cells, name))
        axis.set_title(name)
        axis.set_xlabel("norm batch, examples")
    axes[0].set_ylabel("test error, %")
    made.suptitle(_message(cells, names))
    return made


def _several(cells: Cells) -> list[str]:
    """Tasks with several norm batches; all tasks if there is none."""
    sizes: dict[str, set[int]] = {}
    for cell in cells:
        sizes.setdefault(cell.task, set()).add(cell.norm_batch)
    return [name for name, found in sizes.items() if len(found - {32}) > 1] or list(sizes)


def _message(cells: Cells, names: list[str]) -> str:
    """The largest difference of batch norm and the recommended method, in a sentence."""
    both = {
        cell: (100 - found["batch_norm"].mean, 100 - found["small_batch_norm"].mean)
        for cell, found in cells.items()
        if cell.task in names and {"batch_norm", "small_batch_norm"} <= set(found)
    }
    if not both:
        return "Test error over the norm batch"
    cell = max(both, key=lambda cell: both[cell][0] - both[cell][1])
    batch, ours = both[cell]
    return (
        f"{cell.task}, {cell.norm_batch} {PAIRINGS[cell.pairing]}: "
        f"error of batch_norm {batch:.0f} %, of small_batch_norm {ours:.0f} %"
    )


def _own_steps(cells: Cells) -> Cells:
    """Cells with a step of SGD at every norm batch."""
    return {
        cell: found
        for cell, found in cells.items()
        if cell.norm_batch == cell.gradient_batch and cell.optimizer == "sgd"
    }


def _reference(cells: Cells, task: str) -> Tested | None:
    """Batch norm at 32."""
    found = cells.get(Cell(task, 32, 32, "independent", "sgd"), {})
    return found.get("batch_norm")


def _lines(axis: Any, cells: Cells, reference: Tested | None) -> None:
    """Lines with their names at their ends; bars are standard errors."""
    ends, sizes = {}, sorted(cell.norm_batch for cell in cells)
    for name in SHOWN:
        points = sorted(
            (cell.norm_batch, 100 - found[name].mean, found[name].error)
            for cell, found in cells.items()
            if name in found
        )
        if points:
            x, y, error = zip(*points, strict=True)
            color = report.look_of(name, 0)["color"]
            axis.errorbar(x, y, error, color=color, marker="o")
            ends[name] = (x[-1], y[-1], color)
    if reference is not None and sizes:
        error = 100 - reference.mean
        axis.axhline(error, color="#999999", linestyle="--")
        ends["batch_norm@32"] = (sizes[-1], error, "#999999")
    report.name_ends(axis, ends)


def _open_marks(axis: Any, cells: Cells) -> None:
    """Test errors with examples that are alike."""
    for cell, found in cells.items():
        for name in (name for name in SHOWN if name in found):
            color = report.look_of(name, 0)["color"]
            place = cell.norm_batch, 100 - found[name].mean
            axis.plot(*place, "o", color=color, markersize=7, markerfacecolor="none")


def _scaled(axis: Any, cells: list[Cell]) -> None:
    """Logarithmic axes, so that small differences are visible beside large ones."""
    sizes = sorted({cell.norm_batch for cell in cells})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    _percent(axis.yaxis)


def _percent(axis: Any) -> None:
    """A logarithmic axis of errors, labeled in plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


@report.drawn
def alike(results: dict) -> Any:
    """Test error at norm batch 2: a filled mark for independent pairs, an open one for
    pairs that are alike; a row for each method, a panel for each task.

    Tasks with few examples are in the tables alone.
    """
    cells = {
        cell: found
        for cell, found in _own_steps(tested(results)).items()
        if cell.norm_batch == 2 and not cell.task.endswith("_few")
    }
    panels = {name: _pairs(cells, name) for name in sorted({cell.task for cell in cells})}
    panels = {name: panels[name] for name in sorted(panels, key=_tuned) if panels[name]}
    names, count = _ordered(list(panels.values())), max(1, len(panels))
    made = matplotlib.figure.Figure((2.2 + 2.3 * count, 1.4 + 0.24 * len(names)))
    axes = made.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis, (name, pairs) in zip(axes, panels.items(), strict=False):
        _dumbbells(axis, [pairs.get(method) for method in names], names)
        axis.set_title(f"{name}\n{'fine-tuning' if _tuned(name) else 'from scratch'}")
        axis.set_xlabel("test error, %")
    axes[0].set_yticks(range(len(names)), names)
    handles = [_mark(axes[0], [], [], "#999999", filled, label) for filled, label in KINDS]
    made.legend(handles=handles, loc="outside lower center", ncols=2)
    return made


KINDS = ((True, "independent pairs"), (False, "pairs that are alike"))


def _tuned(name: str) -> bool:
    return bool(tasks.TASKS[name].before)


Pairs = dict[str, tuple[Tested, Tested]]


def _pairs(cells: Cells, task: str) -> Pairs:
    """The tested runs of independent pairs and of pairs that are alike, by method."""
    both = [cells.get(Cell(task, 2, 2, pairing, "sgd"), {}) for pairing in PAIRINGS]
    return {name: (both[0][name], both[1][name]) for name in both[0] if name in both[1]}


def _ordered(panels: list[Pairs]) -> list[str]:
    """Methods by their accuracy with pairs that are alike; the best is last, on top."""
    places: dict[str, list[float]] = {}
    for pairs in panels:
        for place, name in enumerate(sorted(pairs, key=lambda name: pairs[name][1].mean)):
            places.setdefault(name, []).append(place / len(pairs))
    return sorted(places, key=lambda name: float(np.mean(places[name])))


def _dumbbells(
    axis: Any, pairs: list[tuple[Tested, Tested] | None], names: list[str]
) -> None:
    """A line per method from one mark to the other."""
    for place, (name, both) in enumerate(zip(names, pairs, strict=True)):
        if both is None:
            continue
        color = report.look_of(name, 6)["color"]
        errors = [100 - each.mean for each in both]
        axis.plot(errors, [place, place], color=color)
        for error, (filled, _) in zip(errors, KINDS, strict=True):
            _mark(axis, [error], [place], color, filled)
    _percent(axis.xaxis)


def _mark(
    axis: Any, x: list[float], y: list[float], color: str, filled: bool, label: str = ""
) -> Any:
    face = color if filled else "none"
    (line,) = axis.plot(x, y, "o", color=color, markerfacecolor=face, markersize=6)
    line.set_label(label)
    return line


FIGURES = {"norm_batch": over_norm_batch, "alike": alike}
