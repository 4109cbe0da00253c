# SPDX-License-Identifier: Apache-2.0
"""Figures of the study of norm batches."""

from typing import Any

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.figure
    from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.lib import report, tasks
from benchmarks.studies.norm_batch_report import Cell, Tested, tested

SHOWN = ("batch_norm", "group_norm", "group_norm-standardize", "small_batch_norm")
PAIRINGS = {"independent": "independent examples", "alike": "examples that are alike"}
Cells = dict[Cell, dict[str, Tested]]


@report.drawn
def over_norm_batch(results: dict) -> Any:
    """Test error over the norm batch; one row per task, one column per pairing."""
    cells = _own_steps(tested(results))
    sizes: dict[str, set[int]] = {}
    for cell in cells:
        sizes.setdefault(cell.task, set()).add(cell.norm_batch)
    several = [name for name, found in sizes.items() if len(found - {32}) > 1]
    names = several or list(sizes)
    made = matplotlib.figure.Figure((9.6, 0.4 + 3.0 * max(1, len(names))))
    axes = made.subplots(max(1, len(names)), 2, sharey="row", squeeze=False)
    for row, name in zip(axes, names, strict=False):
        for axis, pairing in zip(row, PAIRINGS, strict=True):
            here = {
                cell: found
                for cell, found in cells.items()
                if cell.task == name and cell.pairing == pairing and cell.norm_batch < 32
            }
            _lines(axis, here, _reference(cells, name))
            axis.set_title(f"{name}: norm batches of {PAIRINGS[pairing]}")
        row[0].set_ylabel("test error, %")
    for axis in axes[-1]:
        axis.set_xlabel("norm batch = step of the optimizer, examples")
    return made


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
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    if reference is not None and sizes:
        error = 100 - reference.mean
        axis.axhline(error, color="#999999", linestyle="--")
        ends["batch_norm@32"] = (sizes[-1], error, "#999999")
    report.name_ends(axis, ends)


@report.drawn
def alike(results: dict) -> Any:
    """Test error at norm batch 2: a filled mark for independent pairs, an open one for
    pairs that are alike; a panel for each task.
    """
    cells = {
        cell: found
        for cell, found in _own_steps(tested(results)).items()
        if cell.norm_batch == 2
    }
    names = [
        name for name in dict.fromkeys(cell.task for cell in cells) if _pairs(cells, name)
    ]
    names.sort(key=lambda name: bool(tasks.TASKS[name].before))  # fine-tuning last
    rows = max((len(_pairs(cells, name)) for name in names), default=1)
    made = matplotlib.figure.Figure((0.5 + 4.6 * max(1, len(names)), 1.2 + 0.24 * rows))
    axes = made.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        _dumbbells(axis, _pairs(cells, name))
        axis.set_title(_task_title(name))
        axis.set_xlabel("test error, %")
    if names:
        handles, labels = axes[0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside lower center", ncols=2)
    return made


def _task_title(name: str) -> str:
    before = " (fine-tuning)" if tasks.TASKS[name].before else ""
    return f"{name}{before}\nnorm batch 2"


def _pairs(cells: Cells, task: str) -> dict[str, tuple[Tested, Tested]]:
    """The tested runs of independent pairs and of pairs that are alike, by method."""
    both = [cells.get(Cell(task, 2, 2, pairing, "sgd"), {}) for pairing in PAIRINGS]
    names = [name for name in both[0] if name in both[1]]
    names.sort(key=lambda name: both[1][name].mean)
    return {name: (both[0][name], both[1][name]) for name in names}


def _dumbbells(axis: Any, pairs: dict[str, tuple[Tested, Tested]]) -> None:
    """A line per method from one mark to the other, with the best method on top."""
    for place, (name, both) in enumerate(pairs.items()):
        color = report.look_of(name, 6)["color"]
        errors = [100 - each.mean for each in both]
        first = place == 0
        axis.plot(errors, [place, place], color=color)
        for error, filled, label in (
            (errors[0], color, "independent pairs"),
            (errors[1], "white", "pairs that are alike"),
        ):
            axis.plot(
                [error],
                [place],
                "o",
                markersize=6,
                color=color,
                markerfacecolor=filled,
                label=label if first else None,
            )
    axis.set_yticks(range(len(pairs)), list(pairs))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())


FIGURES = {"norm_batch": over_norm_batch, "alike": alike}
