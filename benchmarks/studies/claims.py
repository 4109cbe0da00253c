# SPDX-License-Identifier: Apache-2.0
"""What the papers claim, and what the studies here found.

Reads the results of the other studies and tests each claim on every cell that speaks of it:
a difference counts where it is larger than two standard errors. The verdict follows from
the counts alone: a claim holds where every cell agrees, holds partly where some do, and
does not hold here where none does.

Run it with ``python -m benchmarks.studies.claims``.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console

from benchmarks.lib import report, study

COMMITTED = Path(__file__).parent.parent / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the table."""

    studies: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = COMMITTED
    """Folder with the results of batch_size, batch_size_fashion_mnist, diminishing,
    corrected_inference, centralize and adaptive."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/claims")
    """Folder for results.json and table.md."""


class Comparison(NamedTuple):
    """Two methods in one cell of a study, in points of accuracy, the greater the better."""

    cell: str
    difference: float
    error: float  # standard error of the difference
    strictly: bool = False  # to be ahead, or not to be behind

    @property
    def agrees(self) -> bool:
        """Whether the cell is as the claim says."""
        side = 2 if self.strictly else -2
        return self.difference >= side * self.error

    def __str__(self) -> str:
        return f"{self.difference:+.1f} ± {self.error:.1f} ({self.cell})"


class Claim(NamedTuple):
    """A sentence of a paper, and the cells that speak of it."""

    paper: str
    text: str
    study: str
    comparisons: list[Comparison]

    @property
    def verdict(self) -> str:
        """From the counts alone."""
        agreeing = sum(comparison.agrees for comparison in self.comparisons)
        if agreeing == len(self.comparisons):
            return "holds"
        return "holds partly" if agreeing else "does not hold here"


def compare(
    cell: str, one: Iterable[float], other: Iterable[float], strictly: bool = False
) -> Comparison:
    """Of two methods' accuracies in percent, a number a seed."""
    one, other = np.array(list(one)), np.array(list(other))
    error = np.hypot(report.standard_error(one), report.standard_error(other))
    return Comparison(cell, float(one.mean() - other.mean()), float(error), strictly)


def main(config: Config, console: Console) -> dict:
    """Writes and shows the table."""
    found = [
        {
            **claim._asdict(),
            "comparisons": [c._asdict() for c in claim.comparisons],
            "verdict": claim.verdict,
        }
        for claim in claims(config.studies)
    ]
    return study.publish(config, {"claims": found}, console, markdown)


def claims(folder: Path) -> list[Claim]:
    """All of them, on the results in a folder."""
    sizes = [_read(folder, f"batch_size{part}") for part in ("", "_fashion_mnist")]
    crossing, group = "Yao et al., 2021", "Gunawan et al., 2022"
    small = "`batch_size`"
    published = "cross_iteration_burn_in"
    return [
        Claim(
            crossing,
            "CBN, with its burn-in, is at least as good as group norm at batch size 4",
            small,
            list(_pairs(sizes, published, "group_norm", (4,))),
        ),
        Claim(
            crossing,
            "group norm is ahead of batch norm at batch size 4",
            small,
            list(_pairs(sizes, "group_norm", "batch_norm", (4,), strictly=True)),
        ),
        Claim(
            crossing,
            "CBN loses nothing from batch size 4 down to 1",
            small,
            list(_flat(sizes, published, 4, 1)),
        ),
        Claim(
            crossing,
            "compensated statistics are ahead of those taken over as they are",
            small,
            list(_pairs(sizes, "cross_iteration", "naive", (1, 2, 4, 8), strictly=True)),
        ),
        Claim(
            "Ma & Klabjan, 2024",
            "after the activation, any α from 1 to 0.01 is at least as good as batch norm",
            "`diminishing`",
            list(_alphas(_read(folder, "diminishing"), "after")),
        ),
        Claim(
            "Ma & Klabjan, 2024",
            "the same, normalized before the activation as is common",
            "`diminishing`",
            list(_alphas(_read(folder, "diminishing"), "before")),
        ),
        Claim(
            "Zhang, 2020",
            "corrected inference is ahead of the ordinary one",
            "`corrected_inference`",
            list(_corrections(_read(folder, "corrected_inference"))),
        ),
        Claim(
            "Yong et al., 2020",
            "gradient centralization is ahead of the plain gradient",
            "`robustness`",
            list(_centralized(_read(folder, "centralize"))),
        ),
        Claim(
            group,
            "groups and batches mixed are at least as good as group norm at every size",
            small,
            list(_pairs(sizes, "group_batch", "group_norm")),
        ),
        Claim(
            group,
            "the same for the published layer, which predicts a batch as a whole",
            small,
            list(_pairs(sizes, "group_plus", "group_norm")),
        ),
        Claim(
            "Alsobhi et al., 2022",
            "adaptive batch norm is ahead of batch norm at batch sizes 2 to 8",
            "`adaptive`",
            list(_adaptive(_read(folder, "adaptive"))),
        ),
        Claim(
            "this library",
            "`small_batch_norm` is at least as good as group norm at batch sizes 1 to 8",
            small,
            list(_pairs(sizes, "small_batch", "group_norm", (1, 2, 4, 8))),
        ),
        Claim(
            "this library",
            "`small_batch_norm` at 1 and 2 is at least as good as batch norm at 32",
            small,
            list(_flat(sizes, "batch_norm", 32, 1, "small_batch"))
            + list(_flat(sizes, "batch_norm", 32, 2, "small_batch")),
        ),
    ]


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


def _pairs(
    results: list[dict],
    one: str,
    other: str,
    sizes: tuple[int, ...] | None = None,
    strictly: bool = False,
) -> Iterator[Comparison]:
    """Wherever both methods could train."""
    cells = _cells(results)
    for (dataset, network, size, label), accuracy in cells.items():
        rival = cells.get((dataset, network, size, other))
        wanted = sizes is None or size in sizes
        if label == one and wanted and rival is not None:
            name = f"{dataset}, {network}, batch size {size}"
            yield compare(name, accuracy, rival, strictly)


def _flat(
    results: list[dict], usual: str, large: int, small: int, method: str | None = None
) -> Iterator[Comparison]:
    """A method at a small batch size against the usual one at a large."""
    cells = _cells(results)
    for (dataset, network, size, label), accuracy in cells.items():
        rival = cells.get((dataset, network, large, usual))
        if (label, size) == (method or usual, small) and rival is not None:
            yield compare(f"{dataset}, {network}, {small} and {large}", accuracy, rival)


def _alphas(results: dict, place: str) -> Iterator[Comparison]:
    accuracy = {
        cell["alpha"]: [100 - seed[-1] for seed in cell["error"]]
        for cell in results["cells"]
        if cell["place"] == place
    }
    for alpha in ("1", "0.75", "0.5", "0.25", "0.1", "0.01", "1/m", "1/m²"):
        yield compare(f"α = {alpha}", accuracy[alpha], accuracy["batch_norm"])


def _corrections(results: dict) -> Iterator[Comparison]:
    for cell in results["cells"]:
        gains = [100 * (a["corrected"] - a["ordinary"]) for a in cell["accuracy"]]
        name = f"{cell['network']}, {cell['draw']}, batch size {cell['batch_size']}"
        yield compare(name, gains, [0.0], strictly=True)


def _centralized(results: dict) -> Iterator[Comparison]:
    judged, usual = results["config"]["methods"]
    cells = {
        (cell["network"], cell["learning_rate"], cell["label"]): cell["accuracy"]
        for cell in results["cells"]
    }
    for (network, rate, label), accuracy in cells.items():
        if label == judged:
            pair = (100 * np.array(a) for a in (accuracy, cells[network, rate, usual]))
            yield compare(f"{network}, rate {rate:g}", *pair, strictly=True)


def _adaptive(results: dict) -> Iterator[Comparison]:
    for cell in results["cells"]:
        ways = {way: 100 * np.array(a) for way, a in cell["accuracy"].items()}
        best = max(("adaptive", "adaptive, gated inference"), key=lambda w: ways[w].mean())
        name = f"{cell['network']}, {cell['composition']}, batch size {cell['batch_size']}"
        yield compare(name, ways[best], ways["always"], strictly=True)


def markdown(results: dict) -> str:
    """One row a claim."""
    rows = []
    for claim in results["claims"]:
        comparisons = [Comparison(**c) for c in claim["comparisons"]]
        agreeing = sum(comparison.agrees for comparison in comparisons)
        ordered = sorted(comparisons, key=lambda comparison: comparison.difference)
        rows.append(
            (
                claim["paper"],
                claim["text"],
                f"**{claim['verdict']}**",
                f"{agreeing} of {len(comparisons)}",
                str(ordered[0]),
                str(ordered[-1]),
                claim["study"],
            )
        )
    headings = ("paper", "claim", "verdict", "cells that agree", "least", "most", "study")
    return (
        f"{report.markdown_table(headings, rows)}\n"
        "Differences in points of test accuracy ± their standard error. A cell agrees with "
        "*is ahead* if the difference is more than two standard errors above zero, with "
        "*at least as good* and *loses nothing* unless it is more than two below.\n"
    )


if __name__ == "__main__":
    study.cli(Config, main)
