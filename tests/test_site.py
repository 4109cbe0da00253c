"""The documentation site is built, whole, and needs no network."""

import re
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path

import pytest

import cbn_jax

ROOT = Path(__file__).parent.parent
MODULES = [
    "linen",
    "nnx",
    "optax",
    "diagnostics",
    "assessment",
    "landscape",
    "population",
    "convert",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as the README says, where any warning is an error: also a dead link."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", "docs", ".", folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


def public_names():
    for name, value in vars(cbn_jax).items():
        if not name.startswith("_") and name not in MODULES:
            yield f"cbn_jax.{name}", value
    for module in MODULES:
        module = import_module(f"cbn_jax.{module}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and not name.startswith("_"):
                yield f"{module.__name__}.{name}", value


def test_the_site(site):
    """In one test, because every process that has one builds the site."""
    described = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4])
    entries = {line.split()[0] for line in described.decode().splitlines()}
    assert not {name for name, _ in public_names()} - entries

    pages = list(site.rglob("*.html"))
    text = "\n".join(page.read_text() for page in pages)
    fetched = re.findall(r'<(?:script|img)[^>]*? src="(https?:[^"]*)', text)
    fetched += re.findall(r'<link rel="stylesheet"[^>]*? href="(https?:[^"]*)', text)
    assert {url.rsplit("/", 1)[1] for url in fetched} <= {"colab-badge.svg"}
    assert text.count("<math") > 20
    assert 'url=docs/index.html"' in (site / "index.html").read_text()
