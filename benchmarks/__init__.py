# SPDX-License-Identifier: Apache-2.0
"""What small batches do, measured: data, networks, training loop and reports."""
