# SPDX-License-Identifier: Apache-2.0
"""Errors of a method's training statistics, measured in your model."""

from .tools.diagnostics import Errors, WatchState, errors, reference, watch

__all__ = ["Errors", "WatchState", "errors", "reference", "watch"]
