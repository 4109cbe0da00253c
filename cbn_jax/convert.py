# SPDX-License-Identifier: Apache-2.0
"""Weights of a batch norm, from and to Flax, PyTorch, Keras and Haiku."""

from .tools.convert import (
    BatchNormWeights,
    decay_of_pytorch,
    from_flax,
    from_haiku,
    from_keras,
    from_pytorch,
    to_flax,
    to_haiku,
    to_keras,
    to_pytorch,
)

__all__ = [
    "BatchNormWeights",
    "decay_of_pytorch",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_pytorch",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_pytorch",
]
