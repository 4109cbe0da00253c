# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations for optax."""

from .tools.backward import with_backward_statistics
from .tools.centralize import centralize

__all__ = ["centralize", "with_backward_statistics"]
