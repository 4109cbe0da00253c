# SPDX-License-Identifier: Apache-2.0
"""Which training batches need normalization, assessed before training."""

from .tools.assessment import Assessment, assess

__all__ = ["Assessment", "assess"]
