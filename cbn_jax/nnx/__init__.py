# SPDX-License-Identifier: Apache-2.0
"""Flax nnx: one module for every method, a replacement for ``nnx.BatchNorm``."""

from cbn_jax.core.optional import require as _require

with _require("Flax", "cbn_jax.nnx"):
    import flax as _flax  # noqa: F401

from .activations import TLU, EvoNormB0, EvoNormS0
from .convert import from_batch_norm, to_batch_norm
from .fold import fold
from .norm import Norm
from .replace import replace_batch_norm, report

__all__ = [
    "TLU",
    "EvoNormB0",
    "EvoNormS0",
    "Norm",
    "fold",
    "from_batch_norm",
    "replace_batch_norm",
    "report",
    "to_batch_norm",
]
