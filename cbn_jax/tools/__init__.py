# SPDX-License-Identifier: Apache-2.0
"""Tools around training: population statistics, diagnostics, conversion, folding."""
