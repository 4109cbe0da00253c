# SPDX-License-Identifier: Apache-2.0
"""One study per file, each with its own command."""
