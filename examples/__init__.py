# SPDX-License-Identifier: Apache-2.0
"""Whole programs that use the library, small enough to read and to change."""
