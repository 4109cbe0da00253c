# SPDX-License-Identifier: Apache-2.0
"""Studies of small batches: data, networks, training loop and reports."""
