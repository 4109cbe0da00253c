"""The documentation site is built, whole, and needs no network."""

import re
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path

import pytest

import cbn_jax

pytest.importorskip("sphinx", reason="the site needs cbn_jax[docs]")
pytestmark = pytest.mark.studies

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as the README says, where any warning is an error: also a dead link."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", "docs", ".", folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


def public_names():
    doors = [import_module(f"cbn_jax.{door}") for door in cbn_jax._MODULES]
    for module in (cbn_jax, *doors):
        yield from (f"{module.__name__}.{name}" for name in module.__all__)


def test_the_site(site):
    """In one test, because every process that has one builds the site."""
    described = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4])
    entries = {line.split()[0] for line in described.decode().splitlines()}
    assert not set(public_names()) - entries

    reference = {page.stem: page.read_text() for page in (site / "docs/api").glob("*.html")}
    for page in reference.values():
        assert "Return type" not in page  # of a sentence with a colon, taken apart
        assert page.index('class="autosummary') < page.index('class="sig')
        assert page.count('class="sig sig-object') <= 1 + page.count(
            'href="../../_modules/'
        )
    # Types in signatures, and the module in front of a name.
    everything = re.sub(r"<[^>]*>", "", "".join(reference.values()))
    assert "cbn_jax.batch_norm(momentum: float" in everything
    for norm in ("linen", "nnx"):
        assert f"cbn_jax.{norm}.Norm(estimator: Estimator | Learned," in everything
    assert not re.search("~cbn_jax|parent: |&lt;(function|class|flax)", everything)

    pages = list(site.rglob("*.html"))
    text = "\n".join(page.read_text() for page in pages)
    fetched = re.findall(r'<(?:script|img)[^>]*? src="(https?:[^"]*)', text)
    fetched += re.findall(r'<link rel="stylesheet"[^>]*? href="(https?:[^"]*)', text)
    assert {url.rsplit("/", 1)[1] for url in fetched} <= {"colab-badge.svg"}
    assert text.count("<math") > 20
    assert 'url=docs/index.html"' in (site / "index.html").read_text()
