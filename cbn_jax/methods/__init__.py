# SPDX-License-Identifier: Apache-2.0
"""Methods: each file holds the equations, the state and the factory of one method."""
