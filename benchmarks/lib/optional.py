# SPDX-License-Identifier: Apache-2.0
"""One sentence instead of a traceback if an optional dependency is missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed_for(extra: str) -> Iterator[None]:
    """Turns a failed import into the command that installs the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a dependency").partition(".")[0]
        raise SystemExit(
            f"{package} is not installed; install it with: pip install -e '.[{extra}]'"
        ) from error
