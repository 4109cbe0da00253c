"""What the documentation says is run."""

import doctest
import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import cbn_jax
from cbn_jax.linen import Norm

ROOT = Path(__file__).parent.parent
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
MODULES = [
    "cbn_jax",
    *(info.name for info in pkgutil.walk_packages(cbn_jax.__path__, "cbn_jax.")),
]
DOORS = cbn_jax._MODULES
PUBLIC = [
    *((cbn_jax, name) for name in cbn_jax.__all__),
    *(
        (module, name)
        for module in (import_module(f"cbn_jax.{door}") for door in DOORS)
        for name in module.__all__
    ),
]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    results = doctest.testmod(import_module(module))
    assert results.failed == 0


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.studies
@pytest.mark.parametrize(
    "document",
    [name for name in ("README.md", *DOCS) if python_blocks(ROOT / name)],
)
def test_documents_run(document):
    """All Python blocks of a document, in order, as one script."""
    script = "\n".join(python_blocks(ROOT / document))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(script, document, "exec"), {"__name__": document})


@pytest.mark.parametrize(
    ("module", "name"), PUBLIC, ids=lambda part: getattr(part, "__name__", part)
)
def test_public_names_are_documented(module, name):
    value = getattr(module, name)
    assert inspect.getdoc(value), name
    if inspect.isfunction(value):
        doc = inspect.getdoc(value)
        assert "Example:" in doc
        assert ">>> " in doc
        for parameter in inspect.signature(value).parameters:
            assert parameter in doc, f"{name} does not document {parameter}"


def reference_entries():
    for page in (ROOT / "docs/api").glob("*.md"):
        for directive, name in re.findall(
            r"^\.\. (\w+):: ([\w.]+)$", page.read_text(), re.MULTILINE
        ):
            if directive in ("currentmodule", "automodule"):
                module = name
            else:
                yield f"{module}.{name}"


def test_the_reference_has_every_public_name_and_no_other():
    public = [f"{module.__name__}.{name}" for module, name in PUBLIC]
    assert sorted(reference_entries()) == sorted(public)


@pytest.mark.parametrize(
    "factory",
    [
        "batch_norm",
        "cross_iteration_batch_norm",
        "streaming_batch_norm",
        "replay_batch_norm",
        "diminishing_batch_norm",
        "adaptive_batch_norm",
        "group_norm",
        "group_batch_norm",
        "corrected_inference",
        "batch_renorm",
        "bidirectional_batch_norm",
        "moving_average_batch_norm",
        "online_norm",
        "momentum_batch_norm",
        "ghost_batch_norm",
        "filter_response_norm",
    ],
)
def test_methods_name_their_paper(factory):
    doc = inspect.getdoc(getattr(cbn_jax, factory))
    for section in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
        assert section in doc
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:10\.", doc)
    assert "Differs from" in doc


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *DOCS]
)
def test_links_and_pictures_exist(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_layers_that_the_documentation_names(key):
    """With every method that looks at a layer."""
    images, tokens = jnp.ones((2, 8, 8, 3)), jnp.arange(16).reshape(2, 8)
    layers = [
        (nn.ConvTranspose(4, (3, 3), (2, 2)), images),
        (nn.Embed(20, 4), tokens),
        (nn.DenseGeneral(4), images),
        *(
            (nn.Conv(4, (3,), padding=padding), images[:, 0])
            for padding in ("CIRCULAR", "REFLECT", "CAUSAL")
        ),
    ]
    for layer, z in layers:
        for estimator in (
            cbn_jax.small_batch_norm(batch_size=2),
            cbn_jax.cross_iteration_batch_norm(window=8),
        ):
            norm = Norm(estimator, layer.copy(), use_running_average=False)
            variables = norm.init(key, z)
            norm.apply(variables, z, mutable=["batch_stats"])


def test_changelog_knows_the_version():
    assert f"## {cbn_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
