# SPDX-License-Identifier: Apache-2.0
"""Figures of the tools; needs matplotlib."""

from .tools.figures import draw_assessment, draw_errors

__all__ = ["draw_assessment", "draw_errors"]
