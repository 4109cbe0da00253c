# SPDX-License-Identifier: Apache-2.0
"""Flax linen: one module for every method, a replacement for ``nn.BatchNorm``."""

from cbn_jax.core.optional import require as _require

with _require("Flax", "cbn_jax.linen"):
    import flax as _flax  # noqa: F401

from cbn_jax._adapters import fill_missing

from .activations import TLU, EvoNormB0, EvoNormS0
from .convert import from_batch_norm, optimizer_from_batch_norm, to_batch_norm
from .fold import fold
from .norm import Norm
from .replace import replace_batch_norm, report

__all__ = [
    "TLU",
    "EvoNormB0",
    "EvoNormS0",
    "Norm",
    "fill_missing",
    "fold",
    "from_batch_norm",
    "optimizer_from_batch_norm",
    "replace_batch_norm",
    "report",
    "to_batch_norm",
]
