# SPDX-License-Identifier: Apache-2.0
"""What the figures of the tools share."""

import contextlib
from collections.abc import Iterator
from typing import Any

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")
MARKERS = "osD^vPX"


@contextlib.contextmanager
def styled(name: str) -> Iterator[Any]:
    """Gives matplotlib, in the library's style, to the function ``name``.

    Without matplotlib it says what to install.
    """
    try:
        import matplotlib.figure
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs matplotlib; install it with: pip install matplotlib"
        ) from error
    with matplotlib.style.context("cbn_jax.figures"):
        yield matplotlib.figure.Figure


def look(index: int) -> dict[str, Any]:
    """Color and marker of the line ``index``, which differ in gray too."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
    }
