# SPDX-License-Identifier: Apache-2.0
"""Everything around training: population statistics, diagnostics, conversion, folding."""
