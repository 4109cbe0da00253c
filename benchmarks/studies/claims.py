# SPDX-License-Identifier: Apache-2.0
"""Claims of the papers, compared with the results of the studies here.

Reads the results of the other studies and counts the cells that agree with each claim. A
difference counts if it is larger than two standard errors. The table has the counts and the
worst cells, and no judgment.

Run it with ``python -m benchmarks.studies.claims``.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console

from benchmarks.lib import report, study
from benchmarks.studies import norm_batch_results

COMMITTED = Path("benchmarks/results")  # in a checkout


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the table."""

    studies: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = COMMITTED
    """Folder with the results of batch_size, batch_size_fashion_mnist, norm_batch,
    diminishing, corrected_inference, centralize and adaptive."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/claims")
    """Folder for results.json and table.md."""


class Comparison(NamedTuple):
    """Two methods in one cell of a study, in points of accuracy; more is better."""

    cell: str
    difference: float
    error: float  # standard error of the difference
    strictly: bool = False  # True: must be ahead; False: must not be behind

    @property
    def agrees(self) -> bool:
        """Whether the cell agrees with the claim."""
        side = 2 if self.strictly else -2
        return self.difference >= side * self.error

    def __str__(self) -> str:
        text = f"{self.difference:+.1f} ± {self.error:.1f} ({self.cell})"
        return text.replace("-", "−", 1) if self.difference < 0 else text


#: The folder of all results -> comparisons.
Evidence = Callable[[Path], Iterator[Comparison]]


def compare(
    cell: str, one: Iterable[float], other: Iterable[float], strictly: bool = False
) -> Comparison:
    """Compares the accuracies of two methods in percent, one number per seed."""
    one, other = np.array(list(one)), np.array(list(other))
    error = np.hypot(report.standard_error(one), report.standard_error(other))
    return Comparison(cell, float(one.mean() - other.mean()), float(error), strictly)


def main(config: Config, console: Console) -> dict:
    """Writes and shows the table."""
    found = [
        {
            "paper": claim.paper,
            "text": claim.text,
            "study": claim.study,
            "comparisons": [c._asdict() for c in claim.evidence(config.studies)],
        }
        for claim in CLAIMS
    ]
    return study.publish(config, {"claims": found}, console, markdown)


def _read(folder: Path, name: str) -> dict:
    path = folder / name / "results.json"
    if not path.exists():
        raise ValueError(
            f"{path} is missing, expected the results of a study; run it first, or name "
            "another folder with --studies."
        )
    return json.loads(path.read_text())


def _cells(results: list[dict]) -> dict[tuple, np.ndarray]:
    """(data set, network, batch size, method) -> accuracies in percent."""
    return {
        (
            each["config"]["dataset"],
            cell["network"],
            cell["batch_size"],
            cell["label"],
        ): 100 * np.array(cell["test"])
        for each in results
        for cell in each["cells"]
        if "refused" not in cell
    }


def _batch_sizes(folder: Path) -> dict[tuple, np.ndarray]:
    names = ("batch_size", "batch_size_fashion_mnist")
    return _cells([_read(folder, name) for name in names])


def pairs(one: str, other: str, sizes: Iterable[int], strictly: bool = False) -> Evidence:
    """Two methods at the same batch size, wherever both can train."""

    def compared(folder):
        cells = _batch_sizes(folder)
        for (dataset, network, size, label), accuracy in cells.items():
            rival = cells.get((dataset, network, size, other))
            if label == one and size in sizes and rival is not None:
                name = f"{dataset}, {network}, batch size {size}"
                yield compare(name, accuracy, rival, strictly)

    return compared


def across(one: str, small: Iterable[int], other: str, large: int) -> Evidence:
    """One method at small batch sizes, and another at a large one."""

    def compared(folder):
        cells = _batch_sizes(folder)
        for (dataset, network, size, label), accuracy in cells.items():
            rival = cells.get((dataset, network, large, other))
            if label == one and size in small and rival is not None:
                yield compare(f"{dataset}, {network}, {size} and {large}", accuracy, rival)

    return compared


def norm_batches(one: str, other: str, strictly: bool = False) -> Evidence:
    """Two methods in every cell of norm_batch that has both, each at its own rate."""

    def compared(folder):
        cells = norm_batch_results.tested(_read(folder, "norm_batch"))
        for cell, found in cells.items():
            if {one, other} <= set(found):
                yield _tested(cell, found[one], found[other], strictly)

    return compared


def as_at_32(one: str, other: str) -> Evidence:
    """A method in the cells of norm_batch, and another at norm batch 32."""

    def compared(folder):
        cells = norm_batch_results.tested(_read(folder, "norm_batch"))
        for cell, found in cells.items():
            large = cell._replace(norm_batch=32, gradient_batch=32, pairing="independent")
            rival = cells.get(large, {}).get(other)
            if one in found and rival is not None and cell != large:
                yield _tested(cell, found[one], rival)

    return compared


def _tested(cell, one, other, strictly=False) -> Comparison:
    return compare(norm_batch_results.where(cell), one.scores, other.scores, strictly)


def _alphas(folder: Path, place: str) -> Iterator[Comparison]:
    results = _read(folder, "diminishing")
    accuracy = {
        cell["alpha"]: [100 - seed[-1] for seed in cell["error"]]
        for cell in results["cells"]
        if cell["place"] == place
    }
    for alpha in ("1", "0.75", "0.5", "0.25", "0.1", "0.01", "1/m", "1/m²"):
        yield compare(f"α = {alpha}", accuracy[alpha], accuracy["batch_norm"])


def _corrections(folder: Path) -> Iterator[Comparison]:
    for cell in _read(folder, "corrected_inference")["cells"]:
        gains = [100 * (a["corrected"] - a["ordinary"]) for a in cell["accuracy"]]
        name = f"{cell['network']}, {cell['draw']}, batch size {cell['batch_size']}"
        yield compare(name, gains, [0.0], strictly=True)


def _centralized(folder: Path) -> Iterator[Comparison]:
    results = _read(folder, "centralize")
    judged, usual = results["config"]["methods"]
    cells = {
        (cell["network"], cell["learning_rate"], cell["label"]): cell["accuracy"]
        for cell in results["cells"]
    }
    for (network, rate, label), accuracy in cells.items():
        if label == judged:
            pair = (100 * np.array(a) for a in (accuracy, cells[network, rate, usual]))
            yield compare(f"{network}, rate {rate:g}", *pair, strictly=True)


def _adaptive(folder: Path) -> Iterator[Comparison]:
    for cell in _read(folder, "adaptive")["cells"]:
        ways = {way: 100 * np.array(a) for way, a in cell["accuracy"].items()}
        best = max(("adaptive", "adaptive, gated inference"), key=lambda w: ways[w].mean())
        name = f"{cell['network']}, {cell['composition']}, batch size {cell['batch_size']}"
        yield compare(name, ways[best], ways["always"], strictly=True)


class Claim(NamedTuple):
    """A sentence of a paper, and the cells of a study that test it."""

    paper: str
    text: str
    study: str
    evidence: Evidence


CBN, BURNT_IN = "cross_iteration_batch_norm", "cross_iteration_batch_norm-burn_in"
SMALL, GROUP = "small_batch_norm", "nn.GroupNorm"
ALL = (1, 2, 4, 8, 16, 32)
YAO, MA, GUNAWAN = "Yao et al., 2021", "Ma & Klabjan, 2024", "Gunawan et al., 2022"

CLAIMS = (
    Claim(
        YAO,
        "CBN, with its burn-in, is at least as good as group norm at batch size 4",
        "batch_size",
        pairs(BURNT_IN, GROUP, (4,)),
    ),
    Claim(
        YAO,
        "group norm is ahead of batch norm at batch size 4",
        "batch_size",
        pairs(GROUP, "batch_norm", (4,), strictly=True),
    ),
    Claim(
        YAO,
        "CBN loses nothing from batch size 4 down to 1",
        "batch_size",
        across(BURNT_IN, (1,), BURNT_IN, 4),
    ),
    Claim(
        YAO,
        "compensated statistics are ahead of statistics without compensation",
        "batch_size",
        pairs(CBN, f"{CBN}-uncompensated", (1, 2, 4, 8), strictly=True),
    ),
    Claim(
        MA,
        "after the activation, any α from 1 to 0.01 is at least as good as batch norm",
        "diminishing",
        functools.partial(_alphas, place="after"),
    ),
    Claim(
        MA,
        "the same, normalized before the activation as is common",
        "diminishing",
        functools.partial(_alphas, place="before"),
    ),
    Claim(
        "Zhang, 2020",
        "corrected inference is ahead of the ordinary one",
        "corrected_inference",
        _corrections,
    ),
    Claim(
        "Yong et al., 2020",
        "gradient centralization is ahead of the plain gradient",
        "robustness",
        _centralized,
    ),
    Claim(
        GUNAWAN,
        "groups and batches mixed are at least as good as group norm at every size",
        "batch_size",
        pairs("group_batch_norm", GROUP, ALL),
    ),
    Claim(
        GUNAWAN,
        "the same for the published layer, which predicts a batch as a whole",
        "batch_size",
        pairs("group_norm_plus", GROUP, ALL),
    ),
    Claim(
        "Alsobhi et al., 2022",
        "adaptive batch norm is ahead of batch norm at batch sizes 2 to 8",
        "adaptive",
        _adaptive,
    ),
    Claim(
        "this library",
        "`small_batch_norm` is at least as good as group norm at batch sizes 1 to 8",
        "batch_size",
        pairs(SMALL, GROUP, (1, 2, 4, 8)),
    ),
    Claim(
        "this library",
        "`small_batch_norm` at 1 and 2 is at least as good as batch norm at 32",
        "batch_size",
        across(SMALL, (1, 2), "batch_norm", 32),
    ),
    Claim(
        "this library",
        "`small_batch_norm` is ahead of batch norm, each at its own rate",
        "norm_batch",
        norm_batches(SMALL, "batch_norm", strictly=True),
    ),
    Claim(
        "this library",
        "the gradient through the window: `small_batch_norm` is ahead of the same window "
        "as a constant",
        "norm_batch",
        norm_batches(SMALL, f"{SMALL}-constant", strictly=True),
    ),
    Claim(
        "this library",
        "the compensation: the constant window is ahead of the same window without "
        "compensation (`momentum_batch_norm`)",
        "norm_batch",
        norm_batches(f"{SMALL}-constant", "momentum_batch_norm", strictly=True),
    ),
    Claim(
        "this library",
        "`small_batch_norm` is at least as good as group norm",
        "norm_batch",
        norm_batches(SMALL, "group_norm"),
    ),
    Claim(
        "this library",
        "`small_batch_norm` is at least as good as group norm on standardized kernels",
        "norm_batch",
        norm_batches(SMALL, "group_norm-standardize"),
    ),
    Claim(
        "this library",
        "on standardized kernels, `small_batch_norm` is at least as good as group norm",
        "norm_batch",
        norm_batches(f"{SMALL}-standardize", "group_norm-standardize"),
    ),
    Claim(
        "this library",
        "on standardized kernels, `small_batch_norm` with group norm after it is at least "
        "as good as group norm",
        "norm_batch",
        norm_batches(f"{SMALL}-standardize-group_norm", "group_norm-standardize"),
    ),
    Claim(
        "this library",
        "`small_batch_norm` is at least as good as batch norm at 32",
        "norm_batch",
        as_at_32(SMALL, "batch_norm"),
    ),
)


def verdict(comparisons: list[Comparison]) -> str:
    """The cells that agree, without a judgment."""
    return f"{sum(each.agrees for each in comparisons)} of {len(comparisons)}"


def of(results: dict, author: str, study: str = "") -> str:
    """The claims of one author alone; of all studies, or of one."""
    rows = [
        row[1:] for row in _rows(results) if row[0].startswith(author) and study in row[-1]
    ]
    return f"{report.markdown_table(HEADINGS[1:], rows)}\n{LEGEND}\n"


def markdown(results: dict) -> str:
    """One row per claim, with its paper."""
    rows = [(f"{paper}: {claim}", *row) for paper, claim, *row in _rows(results)]
    return f"{report.markdown_table(HEADINGS[1:], rows)}\n{LEGEND}\n"


HEADINGS = ("paper", "claim", "cells that agree", "worst cell", "best cell", "study")
LEGEND = (
    "Differences in points of test accuracy ± their standard error. A cell agrees with "
    "*is ahead* if the difference is more than two standard errors above zero, with "
    "*at least as good* and *loses nothing* unless it is more than two below."
)


def _rows(results: dict) -> list[tuple[str, ...]]:
    """A row per claim, under ``HEADINGS``."""
    rows = []
    for claim in results["claims"]:
        comparisons = [Comparison(**c) for c in claim["comparisons"]]
        ordered = sorted(comparisons, key=lambda comparison: comparison.difference)
        counted, worst, best = verdict(comparisons), str(ordered[0]), str(ordered[-1])
        where = f"`{claim['study']}`"
        rows.append((claim["paper"], claim["text"], counted, worst, best, where))
    return rows


if __name__ == "__main__":
    study.cli(Config, main)
