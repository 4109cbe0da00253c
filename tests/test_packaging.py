"""The built wheel, installed in an empty environment."""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.studies

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run([*command, "--outdir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cbn_jax/py.typed", "cbn_jax/figures.mplstyle"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cbn_jax"}


def test_wheel_runs_the_readme(wheel, tmp_path):
    """Without the checkout: an environment that knows the wheel and its dependencies."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Dependencies come from the environment of the tests, the library from the wheel.
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks) + "\nimport cbn_jax; print(cbn_jax.__file__)\n")
    run = subprocess.run(
        [environment / "bin" / "python", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert str(site) in run.stdout
