import re
from pathlib import Path

import jax
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "how_to" / "haiku.md"


def test_the_recipe_runs():
    """It asserts that two steps are those of the pure functions."""
    pytest.importorskip("haiku")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(script, PAGE.name, "exec"), {"__name__": PAGE.name})
