# SPDX-License-Identifier: Apache-2.0
"""Results of the study of norm batches: runs, tested methods and their standing."""

from typing import NamedTuple

import numpy as np

from benchmarks.lib import report, tasks


class Cell(NamedTuple):
    """One setting of the comparison: the task, its batches and the optimizer."""

    task: str
    norm_batch: int
    gradient_batch: int
    pairing: str
    optimizer: str

    @property
    def shape(self) -> tuple[int, int]:
        """Replicas and norm batch."""
        return self.gradient_batch // self.norm_batch, self.norm_batch

    @property
    def batches(self) -> str:
        """The relation of examples, and the optimizer if it is not SGD."""
        return self.pairing + ("" if self.optimizer == "sgd" else ", Adam")


class Run(NamedTuple):
    """One training."""

    cell: Cell
    method: str
    rate: float
    seed: int


Found = dict[Run, dict[str, float]]


def plain(found: Found) -> dict:
    """Runs as JSON represents them, in a fixed order."""
    rows = [
        {**run.cell._asdict(), **run._replace(cell=None)._asdict(), **result}
        for run, result in found.items()
    ]
    for row in rows:
        del row["cell"]
    names = (*Cell._fields, *Run._fields[1:])
    rows.sort(key=lambda row: [str(row[name]) for name in names])
    return {"runs": rows}


def runs_of(results: dict) -> Found:
    """The runs of results."""
    scores = ("validation", "test", "lost")
    return {
        Run(
            Cell(*(row[name] for name in Cell._fields)),
            *(row[name] for name in Run._fields[1:]),
        ): {name: row[name] for name in scores}
        for row in results["runs"]
    }


class Tested(NamedTuple):
    """A method in a cell, at the chosen rate."""

    rate: float
    scores: list[float]  # in %, on test data, one per seed

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.scores))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return report.standard_error(self.scores)


def tested(results: dict) -> dict[Cell, dict[str, Tested]]:
    """The tested methods of every cell, without those that are unfinished."""
    config, found = results["config"], runs_of(results)
    tuned: dict[tuple[Cell, str], dict[float, list[float]]] = {}
    for run, result in found.items():
        if run.seed in config["tuning_seeds"]:
            rates = tuned.setdefault((run.cell, run.method), {})
            rates.setdefault(run.rate, []).append(result["validation"])
    cells: dict[Cell, dict[str, Tested]] = {}
    for (cell, method), rates in tuned.items():
        rate = max(rates, key=lambda rate: (np.mean(rates[rate]), rate))  # as best_rate
        chosen = [Run(cell, method, rate, seed) for seed in config["seeds"]]
        if all(run in found for run in chosen):
            scores = [100 * found[run]["test"] for run in chosen]
            cells.setdefault(cell, {})[method] = Tested(rate, scores)
    return dict(sorted(cells.items()))


def behind(found: dict[str, Tested], name: str) -> tuple[float, float]:
    """Points of a method behind the best of a cell, and their standard error."""
    best = max(found.values(), key=lambda each: each.mean)
    own = found[name]
    return best.mean - own.mean, float(np.hypot(best.error, own.error))


def good(found: dict[str, Tested], name: str) -> bool:
    """Whether a method is within two standard errors of the best of a cell."""
    gap, error = behind(found, name)
    return gap <= 2 * error


class Standing(NamedTuple):
    """Results of a method over cells."""

    good: int  # cells within two standard errors of the best
    cells: int
    gap: float  # points behind the best method in the worst cell
    worst: Cell


def contested(results: dict, tuned: bool) -> dict[Cell, dict[str, Tested]]:
    """Cells with several methods; of fine-tuning or of training from scratch."""
    return {
        cell: found
        for cell, found in tested(results).items()
        if cell.norm_batch < 32
        and len(found) > 1
        and bool(tasks.TASKS[cell.task].before) == tuned
    }


def standings(results: dict, tuned: bool) -> dict[str, Standing]:
    """Results by method, the best first; of fine-tuning or of training from scratch."""
    cells, made = contested(results, tuned), {}
    for name in dict.fromkeys(name for found in cells.values() for name in found):
        gaps = {cell: behind(found, name) for cell, found in cells.items() if name in found}
        count = sum(good(cells[cell], name) for cell in gaps)
        worst = max(gaps, key=lambda cell: gaps[cell][0])
        made[name] = Standing(count, len(gaps), gaps[worst][0], worst)
    order = sorted(made, key=lambda name: (-made[name].good / made[name].cells, name))
    return {name: made[name] for name in order}


def where(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.task}, {cell.norm_batch} of {cell.gradient_batch}, {cell.batches}"
