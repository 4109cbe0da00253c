# SPDX-License-Identifier: Apache-2.0
"""Statistics of the whole population."""

from .tools.population import pool_replicas, recompute

__all__ = ["pool_replicas", "recompute"]
