# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks and writes them with their figures.

The source of a notebook is its ``.py`` file. Any editor opens it, and so does Jupyter with
jupytext. This command runs it and writes the ``.ipynb`` file beside it. The command also
copies the address of the repository from pyproject.toml into every notebook.

Run it with ``python -m colabs`` in a checkout.
"""

import base64
import dataclasses
import io
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import jupytext
import nbclient
import nbformat
import tyro
from PIL import Image
from rich.console import Console

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
# Parameters for a quick run, in place of the notebook's own.
SMALL = {"EPOCHS": 1, "SEEDS": 1, "EXAMPLES": 128}
COLORS = 64  # in a figure
_ADDRESS = re.compile(r"github(?:\.com)?/\w[\w-]*/[\w-]+(?=/blob/|\")")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the command."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Notebooks, such as batch_size_two; all if none is given."""
    small: bool = False
    """One epoch on a few images, to check that all cells run."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = FOLDER
    """Where to write the .ipynb files."""


def notebooks() -> list[Path]:
    """The source files of all notebooks."""
    return sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))


def main(config: Config, console: Console) -> list[Path]:
    """Runs the chosen notebooks and returns the paths of the written files."""
    known = {path.stem: path for path in notebooks()}
    for name in config.names:
        if name not in known:
            raise ValueError(f"notebook {name!r} is unknown; known are {', '.join(known)}.")
    written = []
    for name in config.names or known:
        with console.status(f"running {name}"):
            notebook = run(read(known[name]), SMALL if config.small else {})
        path = config.output / f"{name}.ipynb"
        config.output.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        console.print(f"written: {path}")
        written.append(path)
    return written


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook of a source file, after its repository address is updated."""
    text = path.read_text()
    addressed = with_address(text, repository())
    if addressed != text:
        path.write_text(addressed)
    notebook = jupytext.reads(addressed, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{path.stem}-{number}"  # the default is random
    return notebook


def repository() -> str:
    """The address of the repository, such as ``https://github.com/owner/name``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def with_address(text: str, url: str) -> str:
    """The text with this repository address in place of its old one."""
    slug = url.removeprefix("https://github.com/")
    return _ADDRESS.sub(lambda found: f"{found[0].split('/')[0]}/{slug}", text)


def run(
    notebook: nbformat.NotebookNode, parameters: dict[str, int]
) -> nbformat.NotebookNode:
    """Executes a notebook in a new kernel, and drops progress bars and warnings."""
    _override(notebook, parameters)
    nbclient.NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                _shrink(output.get("data", {}))
    return notebook


def _shrink(data: dict[str, str]) -> None:
    """Reduces a picture to 64 colors, which saves two thirds of its bytes."""
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
        few = picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
        few.save(written := io.BytesIO(), "PNG", optimize=True)
        data["image/png"] = base64.b64encode(written.getvalue()).decode()


def _override(notebook: nbformat.NotebookNode, parameters: dict[str, int]) -> None:
    """Appends new values of the parameters that the cell of parameters assigns."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            chosen = {k: v for k, v in parameters.items() if f"{k} =" in cell.source}
            cell.source += "".join(f"\n{name} = {value}" for name, value in chosen.items())


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="colabs"), Console())
    except ValueError as error:
        sys.exit(f"colabs: {error}")
