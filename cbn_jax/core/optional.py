# SPDX-License-Identifier: Apache-2.0
"""Packages that only some modules need."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def require(package: str, module: str) -> Iterator[None]:
    """Names the package to install if an optional one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} needs {package}; install it with: "
            f"pip install 'cbn_jax[{package.lower()}]'"
        ) from error
