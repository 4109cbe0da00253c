"""The notebooks run, hold their figures, and know where they come from."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nbclient", reason="the notebooks need cbn_jax[notebooks]")

import jax
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
    assert sum((ROOT / f"colabs/{name}.ipynb").stat().st_size for name in NAMES) < 500_000


@pytest.mark.parametrize("name", NAMES)
def test_the_address_is_in_one_place(name):
    text = (ROOT / f"colabs/{name}.py").read_text()
    assert colabs.with_address(text, colabs.repository()) == text
    moved = colabs.with_address(text, "https://github.com/some-one/else")
    assert "colab.research.google.com/github/some-one/else/blob/main/colabs/" in moved
    assert '@ git+https://github.com/some-one/else"' in moved
    slug = colabs.repository().removeprefix("https://github.com/")
    assert slug not in moved
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/*.py")]
    assert not [path for path in documents if slug in path.read_text()]


def setup_cell(name):
    """The first cell of code, which installs and prints the devices."""
    cells = jupytext.read(ROOT / f"colabs/{name}.py").cells
    return next(cell for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_begins_with_the_same_cell(name):
    ours, usual = setup_cell(name), setup_cell("batch_size_two")
    assert ours.source == usual.source
    assert ours.metadata == usual.metadata


def test_the_first_cell_keeps_the_installed_jax(monkeypatch, capsys):
    """Where cbn_jax is missing, pip may not replace the JAX of an accelerator."""
    find, commands, pins = importlib.util.find_spec, [], []

    def install(command, check):
        commands.append(command)
        pins.extend(Path(command[command.index("-c") + 1]).read_text().splitlines())

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cbn_jax" else find(name)
    )
    monkeypatch.setattr(subprocess, "run", install)
    exec(setup_cell("batch_size_two").source, {})
    assert pins == [f"{name}=={version(name)}" for name in ("jax", "jaxlib")]
    (command,) = commands
    assert command[-1].startswith("cbn_jax[benchmarks] @ git+https://")
    assert f"JAX {jax.__version__}, Flax" in capsys.readouterr().out


def test_the_first_cell_installs_nothing_beside_the_library(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    exec(setup_cell("batch_size_two").source, {})
    cpu = jax.default_backend() == "cpu"
    assert ("Warning: JAX found only a CPU" in capsys.readouterr().out) == cpu


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
