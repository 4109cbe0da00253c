"""The house: what imports what, and what stays out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cbn_jax
from cbn_jax._adapter import require

PACKAGE = Path(cbn_jax.__file__).parent
ROOT = PACKAGE.parent
FOUNDATION = {
    "_checks",
    "_fold",
    "_history",
    "_moments",
    "_running",
    "_source",
    "_statistics",
    "_estimator",
    "_layer",
    "_patches",
}
PRESETS = {"_small_batch"}  # a method with arguments filled in
WRAPPERS = {"_adaptive", "_corrected"}  # around any method
TOOLS = {
    "_figure",
    "assessment",
    "convert",
    "diagnostics",
    "landscape",
    "optax",
    "population",
}
ADAPTERS = {"_adapter", "linen", "nnx"}
METHODS = (
    {path.stem for path in PACKAGE.glob("*.py")}
    - FOUNDATION
    - ADAPTERS
    - PRESETS
    - TOOLS
    - WRAPPERS
    - {"__init__"}
)


def imports(path):
    """(level, module) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def siblings(path):
    return {module for level, module in imports(path) if level == 1}


def packages(path):
    return {module.split(".")[0] for level, module in imports(path) if level == 0}


def test_methods_rest_on_the_foundation_alone():
    assert {
        "_batch_norm",
        "_cross_iteration",
        "_diminishing",
        "_group_batch",
        "_replay",
        "_streaming",
    } == METHODS
    for name in METHODS | WRAPPERS | FOUNDATION:
        assert siblings(PACKAGE / f"{name}.py") <= FOUNDATION, name
    for name in PRESETS:
        assert siblings(PACKAGE / f"{name}.py") <= FOUNDATION | METHODS, name


def test_adapters_know_no_method():
    for name in ADAPTERS:
        assert siblings(PACKAGE / f"{name}.py") <= FOUNDATION | {"_adapter"}, name


def test_flax_enters_in_the_adapters_only():
    for path in PACKAGE.glob("*.py"):
        allowed = {"jax", "math", "typing", "collections", "contextlib", "functools"}
        if path.stem in TOOLS:
            allowed |= {"dataclasses", "matplotlib", "numpy", "optax", "pathlib", "rich"}
        if path.stem in {"linen", "nnx"}:
            allowed |= {"flax", "re"}
        if path.stem == "__init__":
            allowed |= {"importlib"}
        assert packages(path) <= allowed, path.name


def test_conversion_needs_no_other_framework():
    assert siblings(PACKAGE / "convert.py") <= FOUNDATION
    assert packages(PACKAGE / "convert.py") <= {"collections", "jax", "numpy", "typing"}


def test_importing_the_library_imports_no_flax():
    code = "import sys, cbn_jax; sys.exit('flax' in sys.modules or 'optax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_are_there_when_they_are_asked_for():
    code = "import cbn_jax; cbn_jax.nnx.Norm, cbn_jax.population.recompute; cbn_jax.linea"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'cbn_jax' has no attribute 'linea'" in run.stderr
    assert {path.stem for path in PACKAGE.glob("[!_]*.py")} == cbn_jax._MODULES


def test_the_oracles_import_numpy_alone():
    assert packages(ROOT / "tests" / "reference.py") == {"itertools", "numpy"}


def test_nothing_imports_the_benchmarks():
    for path in PACKAGE.glob("*.py"):
        assert not {"benchmarks", "colabs"} & packages(path)


def test_no_arithmetic_in_an_adapter():
    for name in ADAPTERS:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.BinOp):
                # Unions in annotations, and an index from the end.
                assert isinstance(node.op, ast.BitOr | ast.Sub), ast.unparse(node)
                assert isinstance(node.op, ast.BitOr) or ast.unparse(node) == "x.ndim - 1"


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_a_missing_flax_is_one_sentence(module):
    code = f"import sys; sys.modules['flax'] = None; import cbn_jax.{module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert f"cbn_jax.{module} needs Flax; install it with: pip install" in run.stderr


def test_a_missing_package_is_named():
    with (
        pytest.raises(ModuleNotFoundError, match=r"cbn_jax.linen needs Flax; .*\[flax\]"),
        require("Flax", "cbn_jax.linen"),
    ):
        raise ModuleNotFoundError("flax")
