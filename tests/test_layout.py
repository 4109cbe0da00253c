"""The folders of the package: who imports whom, and what stays outside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cbn_jax
from cbn_jax.core.optional import require

PACKAGE = Path(cbn_jax.__file__).parent
ROOT = PACKAGE.parent
ADAPTERS = {"equinox", "linen", "nnx"}
DOORS = {*cbn_jax._MODULES} - ADAPTERS

SHARED = {"core", "methods", "wrappers", "tools", "_adapters", "_folding", "_replacing"}

# Imports run downwards only. A row may also import within itself, but for methods: only a
# preset, which fills in the arguments of others, imports them.
ROWS = {
    "core": {"core"},
    "methods": {"core"},
    "wrappers": {"core", "wrappers"},
    "tools": {"core", "methods", "wrappers", "tools"},
    "_adapters": {"core", "wrappers"},
    "_folding": {"core", "wrappers", "tools", "_adapters"},
    "_replacing": {"core", "methods", "_adapters"},
    "linen": {*SHARED, "linen"},
    "nnx": {*SHARED, "nnx"},
    "equinox": {"core", "wrappers", "_adapters", "equinox"},
    **{door: {"tools"} for door in DOORS},
}
PRESETS = {"methods/small_batch.py"}

STANDARD = {
    "collections",
    "contextlib",
    "contextvars",
    "dataclasses",
    "functools",
    "importlib",
    "inspect",
    "math",
    "pathlib",
    "re",
    "types",
    "typing",
    "warnings",
    "weakref",
}
# Beside JAX, which every file may import.
PACKAGES = {
    "core/values.py": {"numpy"},
    "core/windows.py": {"numpy"},
    "tools/assessment.py": {"numpy"},
    "tools/backward.py": {"optax"},
    "tools/centralize.py": {"optax"},
    "tools/convert.py": {"numpy"},
    "tools/figures.py": {"matplotlib", "numpy"},
    "linen": {"flax"},
    "nnx": {"flax"},
    "equinox": {"equinox"},
}

FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
files = pytest.mark.parametrize("name", sorted(set(FILES) - {"__init__.py"}))


def imports(path):
    """Dotted names of all imported modules; relative ones begin with the package."""
    parents = ["cbn_jax", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ".".join([*parents[: len(parents) - node.level + 1], node.module or ""])
        elif isinstance(node, ast.ImportFrom) and node.module == "cbn_jax":
            yield from (f"cbn_jax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def row(name):
    """The folder of a file, or the file itself where it has none."""
    return name.split("/")[0].removesuffix(".py")


def row_of_module(module):
    return module.split(".")[1]


@files
def test_imports_run_downwards(name):
    allowed = ROWS[row(name)] | ({"methods"} if name in PRESETS else set())
    ours = {m for m in imports(FILES[name]) if m.split(".")[0] == "cbn_jax"}
    assert {row_of_module(module) for module in ours} <= allowed


@files
def test_packages_stay_where_they_belong(name):
    allowed = PACKAGES.get(name, PACKAGES.get(row(name), set())) | STANDARD
    others = {module.split(".")[0] for module in imports(FILES[name])}
    assert others - {"cbn_jax", "jax"} <= allowed


def test_the_root_imports_no_adapter_and_no_optional_tool():
    """But for type checkers; ``fold`` needs JAX alone."""
    rows = {row_of_module(m) for m in imports(FILES["__init__.py"]) if "cbn_jax." in m}
    assert rows <= {"core", "methods", "wrappers", "tools", ""}
    code = (
        "import sys, cbn_jax; "
        "sys.exit(any(p in sys.modules for p in ('flax', 'optax', 'matplotlib')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_method_is_one_file():
    """Named as its factory, but for the endings that all share."""
    stems = {Path(name).stem for name in FILES if row(name) == "methods"} - {"__init__"}
    assert stems == {
        "batch_norm",
        "batch_renorm",
        "bidirectional",
        "carried",
        "cross_iteration",
        "diminishing",
        "evonorm",
        "filter_response",
        "ghost",
        "group_batch",
        "group_norm",
        "group_norm_plus",
        "momentum",
        "moving_average",
        "online",
        "replay",
        "small_batch",
        "streaming",
    }
    for stem in stems:
        names = (f"{stem}_batch_norm", f"{stem}_norm", stem, f"{stem}_s0")
        factory = next(name for name in names if hasattr(cbn_jax, name))
        assert getattr(cbn_jax, factory).__module__ == f"cbn_jax.methods.{stem}"


@pytest.mark.parametrize("door", sorted(DOORS))
def test_doors_hold_names_and_nothing_else(door):
    tree = ast.parse(FILES[f"{door}.py"].read_text())
    first, *imports, last = (type(node) for node in tree.body)
    assert (first, {*imports}, last) == (ast.Expr, {ast.ImportFrom}, ast.Assign)


def test_modules_are_there_when_they_are_used():
    code = "import cbn_jax; cbn_jax.nnx.Norm, cbn_jax.population.recompute; cbn_jax.linea"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'cbn_jax' has no attribute 'linea'" in run.stderr


def test_help_and_dir_list_the_public_names():
    assert set(dir(cbn_jax)) == {*cbn_jax.__all__, *cbn_jax._MODULES, "__version__"}
    code = "import cbn_jax; help(cbn_jax)"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for name in cbn_jax.__all__:
        assert name in shown


def test_the_oracles_import_numpy_alone():
    modules = {m.split(".")[0] for m in imports_of(ROOT / "tests" / "reference.py")}
    assert modules == {"itertools", "numpy"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("name", [n for n in FILES if row(n) in {"_adapters", *ADAPTERS}])
def test_no_arithmetic_in_an_adapter(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.BinOp):
            # Unions in annotations, and arithmetic on axes, paths and names.
            assert isinstance(node.op, ast.BitOr) or ast.unparse(node) in {
                "x.ndim - 1",
                "y.ndim - 1",
                "len(path) + 1",
                "(1,) * len(axes)",
                "(0,) * len(stack)",
                "found.keys() - hidden",
                "found.keys() - hidden - {'setup'}",
                "(mean == 0).all() & (var == 1).all()",
            }


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
