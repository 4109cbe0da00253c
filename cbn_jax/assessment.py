# SPDX-License-Identifier: Apache-2.0
"""Finds out before training which training batches need normalization."""

from .tools.assessment import Assessment, assess

__all__ = ["Assessment", "assess"]
