# SPDX-License-Identifier: Apache-2.0
"""A report of what replaced each batch norm of a model."""

import dataclasses
from typing import NamedTuple

from .estimator import Estimator


class Replaced(NamedTuple):
    """One batch norm of a model.

    Attributes:
      path: its place in the model, ``block_0/bn1``.
      layer: the path of the layer whose output it receives; None if there is none.
      reason: the reason why it has no layer. Empty if it has one, or if its method needs
        none.
      estimator: the method that replaces it.
      state_size: the number of values in its state.
    """

    path: str
    layer: str | None
    reason: str
    estimator: Estimator
    state_size: int


@dataclasses.dataclass(frozen=True)
class Report:
    """The replacements of the batch norms of a model, in the order of their calls.

    ``print(report)`` shows a table, ``report.rows`` holds the data.
    """

    rows: tuple[Replaced, ...]

    def __str__(self) -> str:
        cells = [("batch norm", "layer", "method", "state")]
        for row in self.rows:
            layer = f"none: {row.reason}" if row.reason else row.layer or "none"
            cells.append((row.path, layer, _short(row.estimator), f"{row.state_size:,}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        methods = dict.fromkeys(row.estimator for row in self.rows)
        return "\n".join([*lines, "", *map(repr, methods)])


def _short(estimator: Estimator) -> str:
    return repr(estimator).partition("(")[0]
