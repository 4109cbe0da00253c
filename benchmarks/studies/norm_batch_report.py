# SPDX-License-Identifier: Apache-2.0
"""Tables of the study of norm batches."""

from benchmarks.lib import report, study, tasks
from benchmarks.studies.norm_batch_results import (
    Cell,
    Standing,
    Tested,
    behind,
    contested,
    good,
    standings,
    tested,
    where,
)


def markdown(results: dict) -> str:
    """The verdict, then one table per task; rows are methods, columns are norm batches."""
    cells = tested(results)
    parts = [verdict(results, tuned) for tuned in (False, True)]
    for task in sorted({cell.task for cell in cells}):
        parts.append(f"{_title(task)}\n\n{_table(task, cells)}")
    return "\n\n".join(part.strip() for part in [*parts, _legend(results)] if part) + "\n"


def _title(task: str) -> str:
    chosen = tasks.TASKS[task]
    measure = "mean intersection over union" if chosen.dense else "test accuracy"
    before = f", fine-tunes {chosen.before}" if chosen.before else ""
    return f"**{task}**: {chosen.network} on {chosen.dataset}{before}, {measure} in %:"


def _table(task: str, cells: dict[Cell, dict[str, Tested]]) -> str:
    """One row per kind of batches and method."""
    here = {
        cell: found
        for cell, found in cells.items()
        if cell.task == task and cell.norm_batch < 32
    }
    sizes = sorted({cell.norm_batch for cell in here})
    rows = []
    for kind in dict.fromkeys(map(_kind, here)):
        block = {cell.norm_batch: here[cell] for cell in here if _kind(cell) == kind}
        names = dict.fromkeys(name for found in block.values() for name in found)
        for name in names:
            scores = [_shown(block.get(size, {}), name) for size in sizes]
            rows.append((kind, name, *scores))
    headings = ("norm batch holds", "method at norm batch", *map(str, sizes))
    return report.markdown_table(headings, rows)


def _kind(cell: Cell) -> str:
    """The examples of a norm batch, and what differs from a step of SGD for each."""
    step = "" if cell.gradient_batch == cell.norm_batch else ", steps of 32"
    return f"{cell.batches}{step}"


def _shown(found: dict[str, Tested], name: str) -> str:
    """Mean and spread, bold if within two standard errors of the best of the cell."""
    if name not in found:
        return ""
    text = f"{report.spread(found[name].scores, 1)} ({found[name].rate:g})"
    return f"**{text}**" if good(found, name) else text


def of(results: dict, *names: str) -> str:
    """The distance of some methods from the best, from scratch and in fine-tuning."""
    rows = [
        (
            name,
            setting,
            f"{each.good} of {each.cells}",
            f"{each.gap:.1f}",
            where(each.worst),
        )
        for setting, tuned in (("from scratch", False), ("fine-tuning", True))
        for name, each in standings(results, tuned).items()
        if name in names
    ]
    headings = ("method", "training", "cells", "points behind at worst", "worst cell")
    return (
        f"{report.markdown_table(headings, rows)}\n"
        "Cells: those within two standard errors of the best of all methods, of those in "
        "which the method was run, each at its own best rate. A cell has one task, norm "
        "batch, gradient batch, and relation of the examples. "
        f"{study.measured_on(results)}\n"
    )


def verdict(results: dict, tuned: bool) -> str:
    """The number of cells in which each method equals the best, and its worst cell."""
    found = standings(results, tuned)
    if not found:
        return ""
    rows = [
        (name, f"{each.good} of {each.cells}", where(each.worst), f"{each.gap:.1f}")
        for name, each in found.items()
    ]
    table = report.markdown_table(("method", "cells", "worst cell", "points behind"), rows)
    return (
        f"{'Fine-tuning' if tuned else 'Training from scratch'}, cells within two standard "
        f"errors of the best method, and the cell farthest from it:\n\n{table}"
    )


# Methods of the summary, if they were run.
IN_SHORT = (
    "small_batch_norm",
    "small_batch_norm-standardize",
    "small_batch_norm-standardize-group_norm",
    "group_norm-standardize",
    "group_norm",
    "frozen",
    "batch_norm",
)


def summary(results: dict) -> str:
    """One row per method, with the cells of training from scratch and of fine-tuning."""
    scratch, tuned = (standings(results, tuned) for tuned in (False, True))
    rows = [
        (name, *_in_short(scratch, name), *_in_short(tuned, name))
        for name in IN_SHORT
        if name in scratch or name in tuned
    ]
    headings = ("method", "from scratch", "at worst", "fine-tuning", "at worst")
    return (
        f"{report.markdown_table(headings, rows)}\n"
        "Cells within two standard errors of the best of all methods, of those in which "
        "the method was run; and its distance from the best in its worst cell, in points. "
        "-standardize: with `kernel=cbn_jax.standardize`; -group_norm: with group norm "
        "after it."
    )


def _in_short(found: dict[str, Standing], name: str) -> tuple[str, str]:
    if name not in found:
        return "", ""
    each = found[name]
    return f"{each.good} of {each.cells}", f"{-each.gap:.1f}".replace("-", "−")


def at(results: dict, size: str, *names: str) -> str:
    """Some tasks at one norm batch in a short table: a row for each method.

    A step of SGD takes one norm batch, or 32 examples for a name such as ``cells/32``. The
    best method in the last task is first. The last row is batch norm with 32 independent
    examples a step.
    """
    every = tested(results)
    wanted = [_wanted(name, int(size)) for name in names]
    cells = {cell: found for cell, found in every.items() if _setting(cell) in wanted}
    order = sorted(
        cells, key=lambda cell: (wanted.index(_setting(cell)), cell.pairing == "alike")
    )
    last = cells[order[-1]]
    methods = sorted(last, key=lambda name: -last[name].mean)
    methods += [
        name
        for name in dict.fromkeys(name for cell in order for name in cells[cell])
        if name not in methods
    ]
    rows = [(name, *(_short(cells[cell], name) for cell in order)) for name in methods]
    large = [_large(every, cell) for cell in order]
    rows += [("batch_norm@32", *large)] if any(large) else []
    table = report.markdown_table(
        ("method", *(f"{cell.task}, {_kind(cell)}" for cell in order)), rows
    )
    seeds = len(results["config"]["seeds"])
    return (
        f"{table}\nTest accuracy in % (mean intersection over union for maps), mean ± "
        f"standard error over {seeds} seeds, at norm batch {size}; bold: within two "
        f"standard errors of the best. {study.measured_on(results)}"
    )


def _wanted(name: str, size: int) -> tuple[str, int, int, str]:
    task, _, step = name.partition("/")
    return task, size, int(step or size), "sgd"


def _setting(cell: Cell) -> tuple[str, int, int, str]:
    """A cell without the relation of its examples."""
    return cell.task, cell.norm_batch, cell.gradient_batch, cell.optimizer


# Methods that a reader may choose, in the order of their cost; others are ablations.
CHOICES = (
    "group_norm",
    "group_norm-standardize",
    "frozen",
    "carried_batch_norm",
    "small_batch_norm",
    "small_batch_norm-standardize",
    "small_batch_norm-standardize-group_norm",
)


def choices(results: dict, setting: str) -> str:
    """The methods that are as good as the best one, in every cell of a setting.

    ``setting`` is scratch or tuned.
    """
    tuned = {"scratch": False, "tuned": True}[setting]
    rows = [
        (
            where(cell),
            ", ".join(name for name in CHOICES if name in found and good(found, name)),
            _points(found, "batch_norm"),
        )
        for cell, found in contested(results, tuned).items()
    ]
    headings = ("task, examples", "as good as the best", "batch_norm")
    return (
        f"{report.markdown_table(headings, rows)}\n2 of 32: two examples are normalized "
        "together, in a step of 32. As good as the best: within two standard errors of the "
        "best of all methods. The last column has the points of batch norm behind the "
        f"best. {study.measured_on(results)}"
    )


def _points(found: dict[str, Tested], name: str) -> str:
    return f"−{behind(found, name)[0]:.1f}" if name in found else ""


def windows(results: dict, task: str) -> str:
    """Windows of several lengths on pairs that are alike, in a sentence."""
    found = tested(results).get(Cell(task, 2, 2, "alike", "sgd"), {})
    lengths = {
        8: "streaming_batch_norm-8",
        32: "small_batch_norm",
        128: "streaming_batch_norm-128",
    }
    shown = [
        f"{report.mean_error(found[name].scores)} % with {length} examples"
        for length, name in lengths.items()
        if name in found
    ]
    return (
        f"Test accuracy on {task} with pairs that are alike, by the length of the window: "
        f"{', '.join(shown)}. {study.measured_on(results)}"
    )


def _large(cells: dict[Cell, dict[str, Tested]], cell: Cell) -> str:
    """Batch norm in steps of 32, on the task of a cell with independent examples."""
    found = cells.get(cell._replace(norm_batch=32, gradient_batch=32), {})
    return report.mean_error(found["batch_norm"].scores) if "batch_norm" in found else ""


def _short(found: dict[str, Tested], name: str) -> str:
    if name not in found:
        return ""
    text = report.mean_error(found[name].scores)
    return f"**{text}**" if good(found, name) else text


def _legend(results: dict) -> str:
    config = results["config"]
    return (
        f"Mean ± standard deviation over {len(config['seeds'])} seeds, and the rate of a "
        f"step of 32 examples. Validation data and {len(config['tuning_seeds'])} other "
        "seeds chose the rate. Bold: within two standard errors of the best in the cell. "
        "Norm batch: examples that are normalized together; gradient batch: those of a "
        "step of the optimizer; alike: a norm batch holds one class, or neighbors. "
        f"{study.measured_on(results)}"
    )
