# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations for optax."""

from .tools.centralize import centralize

__all__ = ["centralize"]
