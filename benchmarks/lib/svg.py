# SPDX-License-Identifier: Apache-2.0
"""Figures as SVG, which remain sharp in print and readable on a dark page."""

import re
from pathlib import Path
from typing import Any

# Colors of the style cbn_jax.figures that are hard to see on a dark page, and others.
ON_DARK = {"#000000": "#ffffff", "#262626": "#d4d4d4", "#0072b2": "#3d94d1"}
# Inside a rule for dark pages; the style attributes of matplotlib would win without
# "important".
_RULES = "\n".join(
    f'[style*="{kind}: {color}"] {{{kind}: {other} !important}}'
    for color, other in ON_DARK.items()
    for kind in ("fill", "stroke")
)
_DARK = f"@media (prefers-color-scheme: dark) {{\n{_RULES}\n}}"
_PATH = re.compile(r'(?<= d=")[^"]*')
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def save(figure: Any, path: Path) -> None:
    """Writes a figure of matplotlib as SVG, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    text = path.read_text().replace("</style>", _DARK + "</style>", 1)
    path.write_text(_PATH.sub(lambda found: _NUMBER.sub(_short, found[0]), text))


def _short(number: re.Match[str]) -> str:
    """A coordinate to a hundredth of a point, which nobody sees."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
