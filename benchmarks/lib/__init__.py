# SPDX-License-Identifier: Apache-2.0
"""Shared by the studies: data, networks, methods, training, timing, reports."""
