"""Two processes of four devices each give what one process of eight gives."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from worker import STEPS, WAYS, train

pytestmark = [
    pytest.mark.studies,
    # Raised inside tensorflow-datasets and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).parent.parent


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def run_together(commands, folder, seconds=180):
    """Until all are done, one has failed or time is up; none is left behind."""
    logs = [folder / f"{index}.log" for index in range(len(commands))]
    running = []
    try:
        for command, path in zip(commands, logs, strict=True):
            with path.open("w") as log:
                running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
        end = time.monotonic() + seconds
        codes = [None]
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
            codes = [process.poll() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0] * len(commands), "\n".join(path.read_text() for path in logs)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each of two processes found, by name."""
    folder, address = tmp_path_factory.mktemp("processes"), free_address()
    paths = [folder / f"{index}.npz" for index in (0, 1)]
    commands = [
        [sys.executable, "-m", "tests.worker", str(path), "4", address, "2", str(index)]
        for index, path in enumerate(paths)
    ]
    run_together(commands, folder)
    return [dict(np.load(path)) for path in paths]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(outputs, way):
    """Parameters, statistics, momentum and losses, on both of them."""
    assert jax.device_count() == 8
    expected = train(way)
    losses = [value for name, value in expected.items() if name.startswith(f"{way}[1]")]
    assert len(set(map(float, losses))) == STEPS
    first, second = (
        {name: value for name, value in found.items() if name.startswith(way)}
        for found in outputs
    )
    assert set(first) == set(second) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], value, rtol=1e-4, atol=1e-5)


def test_a_failure_ends_both(tmp_path):
    """A process would wait for the other; what the other said is reported."""
    waits = [sys.executable, "-c", "import time; time.sleep(100)"]
    fails = [sys.executable, "-c", "raise SystemExit('this is why')"]
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="this is why"):
        run_together([waits, fails], tmp_path)
    with pytest.raises(AssertionError):
        run_together([waits], tmp_path, seconds=1)
    assert time.monotonic() - begin < 50
