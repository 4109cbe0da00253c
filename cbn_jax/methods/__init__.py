# SPDX-License-Identifier: Apache-2.0
"""One file per method: its equations, its state, its factory."""
