# SPDX-License-Identifier: Apache-2.0
"""Shared by all methods: moments, statistics, running averages, layers, checks."""
