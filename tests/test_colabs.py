"""The notebooks run, hold their figures, and know where they come from."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nbclient", reason="the notebooks need cbn_jax[notebooks]")

import jupytext
import nbformat
import tensorflow_datasets
from sklearn.datasets import load_digits

from benchmarks.lib import data
from colabs import __main__ as colabs

pytestmark = pytest.mark.studies

ROOT = Path(__file__).parent.parent
NAMES = [path.stem for path in colabs.notebooks()]


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def figures(notebook):
    return [o for o in outputs(notebook) if "image/png" in o.get("data", {})]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, request):
    """From top to bottom, in a kernel of its own, with small parameters."""
    run = subprocess.run(
        [sys.executable, "-m", "colabs", name, "--small", "--output", tmp_path],
        cwd=ROOT,
        env=os.environ
        | {"JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert figures(nbformat.read(tmp_path / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_notebook_is_its_text_with_figures(name):
    committed = nbformat.read(ROOT / f"colabs/{name}.ipynb", as_version=4)
    text = jupytext.read(ROOT / f"colabs/{name}.py")
    assert [cell.source for cell in committed.cells] == [c.source for c in text.cells]
    assert figures(committed)
    assert not any(output.output_type == "error" for output in outputs(committed))
    assert not any("widgets" in str(output) for output in outputs(committed))


def test_the_notebooks_are_small():
    """Together, in bytes: they are in the history at every change of their outputs."""
    assert sum((ROOT / f"colabs/{name}.ipynb").stat().st_size for name in NAMES) < 550_000


@pytest.mark.parametrize("name", NAMES)
def test_the_address_stands_in_one_place(name):
    text = (ROOT / f"colabs/{name}.py").read_text()
    assert colabs.with_address(text, colabs.repository()) == text
    moved = colabs.with_address(text, "https://github.com/some-one/else")
    assert "colab.research.google.com/github/some-one/else/blob/main/colabs/" in moved
    assert '@ git+https://github.com/some-one/else"' in moved
    slug = colabs.repository().removeprefix("https://github.com/")
    assert slug not in moved
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/*.py")]
    assert not [path for path in documents if slug in path.read_text()]


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_begins_alike(name):
    """The first cell of code installs and reports the devices; nothing else differs."""
    first, usual = (
        next(
            c.source
            for c in jupytext.read(ROOT / f"colabs/{n}.py").cells
            if c.cell_type == "code"
        )
        for n in (name, "batch_size_two")
    )
    install, report = usual.split("\n\nprint")
    assert first.startswith(install)
    assert first.endswith(report)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_points_to_is_there(name):
    text = (ROOT / f"colabs/{name}.py").read_text()
    for path in re.findall(r"/blob/main/([\w/.]+)", text):
        assert (ROOT / path).exists(), path


def test_the_readers_own_data(tmp_path):
    """Prepared by tensorflow-datasets under another name, read by the notebook's code."""

    class Prepared(data.Digits, skip_registration=True):
        name = "prepared_digits"

    Prepared(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    body = ast.parse((ROOT / "colabs/choosing_a_method.py").read_text()).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    names = {
        "np": np,
        "tfds": tensorflow_datasets,
        "load_digits": load_digits,
        "DATA_DIR": tmp_path,
        "EXAMPLES": 1437,
    }
    for name in ("read", "columns"):
        exec(ast.unparse(functions[name]), names)
    came, usual = names["read"]("prepared_digits"), names["read"]("digits")
    for (images, labels), (usual_images, usual_labels) in zip(came, usual, strict=True):
        assert images.dtype == np.float32
        assert images.shape == usual_images.shape
        # In an order of its own: tensorflow-datasets shuffles what it writes.
        order, usual_order = (
            np.lexsort(x.reshape(len(x), -1).T) for x in (images, usual_images)
        )
        np.testing.assert_array_equal(images[order], usual_images[usual_order])
        np.testing.assert_array_equal(labels[order], usual_labels[usual_order])


def test_parameters_are_overridden_where_there_are_any():
    cell = nbformat.v4.new_code_cell("EPOCHS = 4", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[cell, nbformat.v4.new_code_cell("EPOCHS = 5")]
    )
    colabs._override(notebook, {"EPOCHS": 1, "SEEDS": 2})
    assert [c.source for c in notebook.cells] == ["EPOCHS = 4\nEPOCHS = 1", "EPOCHS = 5"]


def test_an_unknown_notebook_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"notebook 'more' is unknown; known are .*two"):
        colabs.main(colabs.Config(("more",), output=tmp_path), colabs.Console())
