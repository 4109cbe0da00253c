# SPDX-License-Identifier: Apache-2.0
"""Figures as SVG: small files, the same bytes each time, colors for dark pages."""

import re

import matplotlib.figure
import numpy as np
import pytest

from benchmarks.lib import report, svg
from cbn_jax.tools.figures import styled

pytestmark = pytest.mark.studies


def figure(scale="linear", values=(3.0, 219.0, 270.0)):
    made = matplotlib.figure.Figure((4, 3))
    axis = made.subplots()
    axis.set_yscale(scale)
    ends = {}
    for index, value in enumerate(values):
        axis.plot([0, 1], [value, value / 3], color=report.COLORS[index], label=str(value))
        ends[f"line {index}"] = (1, value / 3, report.COLORS[index])
    report.name_ends(axis, ends)
    return made


def saved(made, path):
    with styled("a test"):
        svg.save(made, path)
    return path.read_text()


def test_a_figure_is_the_same_each_time(tmp_path):
    with styled("a test"):
        first = saved(figure(), tmp_path / "a.svg")
        second = saved(figure(), tmp_path / "deep/b.svg")
    assert first == second
    assert first.count("prefers-color-scheme: dark") == 1
    for path in re.findall(r' d="([^"]*)"', first):
        assert not re.search(r"\.\d{3}", path)


def test_colors_for_dark_pages_are_those_of_the_style(tmp_path):
    """Every color with another one on dark pages is in use, so no rule is idle."""
    with styled("a test"):
        made = figure()
        made.axes[0].axhline(1.0, color="black")
        text = saved(made, tmp_path / "a.svg").split("</style>", 1)[1]
    for color in svg.ON_DARK:
        assert f": {color}" in text


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_are_apart_on_every_scale(scale):
    with styled("a test"):
        made = figure(scale)
        made.draw_without_rendering()
    boxes = [text.get_window_extent() for text in made.axes[0].texts]
    middles = np.sort([(box.y0 + box.y1) / 2 for box in boxes])
    assert np.diff(middles).min() > 9.0 * made.dpi / 72


def test_the_legend_names_each_line_once():
    made = matplotlib.figure.Figure()
    for axis in made.subplots(1, 2):
        axis.plot([0, 1], label="both")
    made.axes[1].plot([1, 0], label="right only")
    report.legend_below(made)
    (legend,) = made.legends
    assert [text.get_text() for text in legend.get_texts()] == ["both", "right only"]


def test_paths_keep_their_shape():
    number = re.compile(r"-?\d+\.\d{3,}")
    text = "M 12.000000 -3.456789 L 0.000400 1.5"
    assert number.sub(svg._short, text) == "M 12 -3.46 L 0 1.5"
