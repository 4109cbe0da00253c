# SPDX-License-Identifier: Apache-2.0
"""What the figures of the tools share."""

from typing import Any

# Distinct in print, in the dark and for color-blind readers (Okabe & Ito).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")


def new_figure(name: str, width: float, height: float) -> Any:
    """A matplotlib figure for the function ``name``; says what to install without it."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs matplotlib; install it with: pip install matplotlib"
        ) from error
    return matplotlib.figure.Figure((width, height), layout="constrained", dpi=150)


def tidy(axis: Any) -> None:
    """A faint grid, and no frame above and to the right."""
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
