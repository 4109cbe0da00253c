# SPDX-License-Identifier: Apache-2.0
"""Functions that take an estimator, or the factory of one, and return another."""
