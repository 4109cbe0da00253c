# SPDX-License-Identifier: Apache-2.0
"""The documentation site: ``sphinx-build -W -c docs . build/site`` in a checkout.

The source is the whole repository, so that a link from one document to another, to a
figure or a file is the same on the site and in the repository.
"""

import re
import tomllib
from pathlib import Path

import jax
from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util.typing import stringify_annotation

import cbn_jax

ROOT = Path(__file__).parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"][
    "Repository"
]

ARRAY_LIKE = stringify_annotation(jax.typing.ArrayLike, "smart")

project = "cbn_jax"
author = copyright = "The cbn_jax authors"
version = release = cbn_jax.__version__
language = "en"

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "colabs/*.ipynb",
    "benchmarks/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the committed notebooks hold what their command made
nb_render_markdown_format = "myst"  # tables in outputs

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_generate = False  # the tables at the top of the pages, no pages of their own
autodoc_member_order = "bysource"
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = True  # cbn_jax.linen.Norm and cbn_jax.nnx.Norm are two

html_title = "cbn_jax"
html_theme = "sphinx_book_theme"
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "use_repository_button": True,
    "use_download_button": False,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has the search
}


def setup(app):
    """Equations as MathML, which browsers draw by themselves, without a network."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-signature", _readable)
    app.connect("autodoc-process-docstring", _whole, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _readable(app, what, name, obj, options, signature, returned):
    """A signature without what Flax adds to it, and with names for objects and unions."""
    signature = re.sub(r", parent: .*, name: str \| None = None", "", signature or "")
    signature = re.sub(r"<class '[\w.]*?(\w+)'>|<function (\w+).*?>", r"\1\2", signature)
    return signature.replace(ARRAY_LIKE, "ArrayLike") or None, returned


def _whole(app, what, name, obj, options, lines):
    """Keeps "Returns" in one piece: napoleon takes a first line "type: text" apart."""
    for number, line in enumerate(lines):
        if line.strip() == "Returns:":
            first = lines[number + 1]
            margin = first[: len(first) - len(first.lstrip())]
            word, _, rest = first.strip().partition(" ")
            lines[number + 1 : number + 2] = [
                margin + word,
                *([margin + rest] if rest else ()),
            ]


def _inline(writer, node):
    writer.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer, node):
    formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div class="equation">{formula}</div>')
    raise nodes.SkipNode
