"""What the documentation says is run."""

import doctest
import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import cbn_jax

ROOT = Path(__file__).parent.parent
MODULES = [f"cbn_jax.{info.name}" for info in pkgutil.iter_modules(cbn_jax.__path__)]
PUBLIC = sorted(name for name in vars(cbn_jax) if not name.startswith("_"))


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    results = doctest.testmod(import_module(module))
    assert results.failed == 0


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/design.md"])
def test_documents_run(document):
    """All Python blocks of a document, in order, as one script."""
    script = "\n".join(python_blocks(ROOT / document))
    exec(compile(script, document, "exec"), {"__name__": document})


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(cbn_jax, name)
    assert inspect.getdoc(value), name
    if inspect.isfunction(value):
        doc = inspect.getdoc(value)
        assert "Example:" in doc
        assert ">>> " in doc
        for parameter in inspect.signature(value).parameters:
            assert parameter in doc, f"{name} does not document {parameter}"


@pytest.mark.parametrize("factory", ["batch_norm", "cross_iteration_batch_norm"])
def test_methods_name_their_paper(factory):
    doc = inspect.getdoc(getattr(cbn_jax, factory))
    for section in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
        assert section in doc
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", doc)
    assert "Differs from" in doc


def test_the_readme_table_is_the_measured_one():
    """Figures in the README come from the committed results, digit for digit."""
    results = (ROOT / "benchmarks/results/small_batch/table.md").read_text()
    assert results in (ROOT / "README.md").read_text()


def test_the_committed_table_is_made_from_the_committed_results():
    import json

    from benchmarks import report

    folder = ROOT / "benchmarks/results/small_batch"
    results = json.loads((folder / "results.json").read_text())
    assert report.markdown(results) == (folder / "table.md").read_text()


def test_changelog_knows_the_version():
    assert f"## {cbn_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
