# SPDX-License-Identifier: Apache-2.0
"""Tables and sentences in the documentation, from the committed results.

A document contains ``<!-- FUNCTION STUDY -->``, the output of that function for the study's
committed ``results.json``, and ``<!-- end -->``. Further words are arguments, as in
``<!-- of cost batch_norm small_batch -->``. A block ``<!-- facts NAME NAME -->`` contains
the four facts of these methods, which need no results. This command rewrites these outputs
in the README, in benchmarks/README.md and in docs/, so that nobody types a number.

Run it with ``python -m benchmarks.tables`` in a checkout.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console

from benchmarks.lib import facts, report, study
from benchmarks.studies import (
    adaptive,
    batch_size_report,
    claims,
    collectives,
    corrected_inference,
    cost_report,
    data_parallel,
    diminishing,
    fine_tuning,
    frameworks,
    ideas,
    landscape,
    masks,
    norm_batch_figures,
    norm_batch_report,
    robustness,
    samples,
    scaling,
    statistics_error,
    theory,
    without_layer,
)

ROOT = Path(__file__).parent.parent
# Folder of results -> the module that writes its tables.
STUDIES: dict[str, ModuleType] = {
    "small_batch": report,
    "small_batch_bfloat16": report,
    "norm_batch": norm_batch_report,
    "masks": masks,
    "batch_size": batch_size_report,
    "batch_size_fashion_mnist": batch_size_report,
    "claims": claims,
    "cost": cost_report,
    "cost_others": cost_report,
    "collectives": collectives,
    "carried": robustness,
    "scaling": scaling,
    "frameworks": frameworks,
    "data_parallel": data_parallel,
    "robustness": robustness,
    "ideas": ideas,
    "statistics_error": statistics_error,
    "theory": theory,
    "samples": samples,
    "diminishing": diminishing,
    "corrected_inference": corrected_inference,
    "adaptive": adaptive,
    "landscape": landscape,
    "without_layer": without_layer,
    "without_layer_mlp": without_layer,
    "fine_tuning": fine_tuning,
    "group_batch": robustness,
    "centralize": robustness,
}
# Figures with a module of their own.
FIGURES = {"norm_batch": norm_batch_figures.FIGURES}
_BLOCK = re.compile(
    r"(<!-- (\w+) (\w+)((?: \S+)*?) -->)(\s*)(.*?)(<!-- end -->)", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the command."""

    root: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = ROOT
    """Folder of the checkout."""
    figures: bool = False
    """Also redraw every figure, from the same results."""


def main(config: Config, console: Console) -> dict:
    """Rewrites the tables of all studies, and the documents that are not up to date."""
    changed = redrawn(config.root) if config.figures else []
    for name, module in STUDIES.items():
        path = ROOT / "benchmarks/results" / name / "table.md"
        path.write_text(module.markdown(json.loads(results(name))))
    for path in documents(config.root):
        before = path.read_text()
        after = rendered(before)
        if after != before:
            path.write_text(after)
            changed.append(str(path.relative_to(config.root)))
    console.print("rewritten: " + (", ".join(changed) or "nothing, all is up to date"))
    return {"changed": changed}


def redrawn(root: Path) -> list[str]:
    """Redraws all figures of all studies, after a change of style; returns their paths."""
    made = []
    for name, module in STUDIES.items():
        figures = FIGURES.get(name) or getattr(module, "FIGURES", {})
        for figure, draw in figures.items():
            path = root / "benchmarks/results" / name / f"{figure}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(json.loads(results(name)), path)
            made.append(str(path.relative_to(root)))
    return made


def documents(root: Path) -> Iterator[Path]:
    """All documents that may contain a table."""
    yield from (root / "README.md", root / "benchmarks/README.md")
    yield from sorted((root / "docs").rglob("*.md"))


def results(name: str, file: str = "results.json") -> str:
    """A committed file of a study."""
    return (ROOT / "benchmarks/results" / name / file).read_text()


def rendered(text: str) -> str:
    """A document with every block rewritten."""
    return _BLOCK.sub(_block, text)


def _block(found: re.Match[str]) -> str:
    start, function, name, words, space, _, end = found.groups()
    made = _made(start, function, name, words.split()).strip()
    if space.startswith("\n"):
        return f"{start}\n\n{made}\n\n{end}"
    return f"{start}{' '.join(made.split())}{end}"  # in one line, as in a table's cell


def _made(start: str, function: str, name: str, words: list[str]) -> str:
    """The contents of a block that begins with ``start``."""
    if function == "facts":
        return facts.table(name, *words)
    if name not in STUDIES or not hasattr(STUDIES[name], function):
        raise ValueError(
            f"{start} names no function of a study, expected one such as "
            f"<!-- markdown cost -->; studies are {', '.join(STUDIES)}."
        )
    return getattr(STUDIES[name], function)(json.loads(results(name)), *words)


if __name__ == "__main__":
    study.cli(Config, main)
