# SPDX-License-Identifier: Apache-2.0
"""Equinox: one module for every method, used like ``eqx.nn.BatchNorm``."""

from cbn_jax.core.optional import require as _require

with _require("Equinox", "cbn_jax.equinox"):
    import equinox as _equinox  # noqa: F401

from .norm import Norm

__all__ = ["Norm"]
