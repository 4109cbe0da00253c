"""The training steps to copy: eight devices give what one gives for the whole batch."""

import functools
import inspect
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from cases import FACTORIES

import cbn_jax as cbn
from benchmarks.studies import data_parallel
from benchmarks.studies.data_parallel import ONE, WAYS, Network

pytestmark = [
    pytest.mark.studies,
    pytest.mark.usefixtures("eight_devices", "loose"),
    # Raised inside tensorflow-datasets and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).parent.parent
DEVICES = 8
NAMES = [
    "batch_norm",
    "cross_iteration_batch_norm",
    "streaming_batch_norm",
    "replay_batch_norm",
]


OPTIMIZER = optax.sgd(0.1, momentum=0.9)
IMAGES = np.random.default_rng(0).random((4, 2 * DEVICES, 6, 6, 1), np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, (4, 2 * DEVICES), np.int32)


@functools.cache
def start(name):
    model = Network(FACTORIES[name](), classes=3, features=(4,))
    return model, data_parallel.init(model, OPTIMIZER, IMAGES[0], seed=0)


@functools.cache
def trained(name, chosen):
    """State, losses and logits of a few steps in one of the ways."""
    model, state = start(name)
    way = data_parallel.make_ways(model, OPTIMIZER, DEVICES)[chosen]
    state, losses = way.to_devices(state), []
    for batch in zip(IMAGES[:3], LABELS[:3], strict=True):
        state, loss = way.step(state, *map(way.split, batch))
        losses.append(np.ravel(loss)[0])
    inputs = way.split(IMAGES[3])
    logits, _ = way.forward(state.params, state.batch_stats, inputs)
    return way.from_devices(state), losses, np.reshape(logits, (-1, 3))


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_one_device(way, name):
    expected, actual = trained(name, ONE), trained(name, way)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
        actual,
        expected,
    )
    moved = data_parallel.difference(expected[0].params, start(name)[1].params)
    assert moved > 0.01


@pytest.mark.program
def test_positions_of_a_few_examples_cost_no_collective_of_their_own():
    """Under ``jit`` the devices send patches with the sums of the batch."""
    images = np.zeros((DEVICES, 6, 6, 1), np.float32)

    def all_reduces(estimator):
        model = data_parallel.Network(estimator, classes=3, features=(4, 4))
        ways = data_parallel.make_ways(model, OPTIMIZER, DEVICES)
        way, state = ways["sharded jit"], data_parallel.init(model, OPTIMIZER, images, 0)
        state = way.to_devices(state)
        compiled = way.forward.lower(state.params, state.batch_stats, way.split(images))
        return data_parallel.all_reduces(compiled.compile())

    assert all_reduces(cbn.streaming_batch_norm(4)) == all_reduces(cbn.batch_norm()) == 6


def test_the_study(tmp_path, capsys):
    """Every way beside one device, as a table and as results."""
    arguments = ["--devices", "8", "--methods", "batch_norm", "--epochs", "1"]
    arguments += ["--examples", "64", "--timing-rounds", "1", "--output", str(tmp_path)]
    data_parallel.cli([*arguments, "--data-dir", str(tmp_path / "data")])
    results = json.loads((tmp_path / "results.json").read_text())
    table = (tmp_path / "table.md").read_text()
    assert table == data_parallel.markdown(results)
    assert "batch size 8 on 8 devices" in table
    assert "sharded jit" in capsys.readouterr().out
    cells = {cell["way"]: cell for cell in results["cells"]}
    assert tuple(cells) == WAYS
    for way, cell in cells.items():
        assert max(cell["parameters"], cell["statistics"]) < 1e-4
        assert cell["accuracy"] == pytest.approx(cells[ONE]["accuracy"], abs=0.05)
        assert cell["milliseconds"] > 0
        # Two normalized layers; more than one collective each only under jit.
        assert cell["all_reduces"]["forward"] >= (0 if way == ONE else 2)
    assert cells[ONE]["all_reduces"] == {"forward": 0, "step": 0}
    assert cells["shard_map"]["all_reduces"]["forward"] == 2


def test_the_document_quotes_the_step():
    quoted = inspect.getsource(data_parallel.sharded_jit_step)
    assert f"```py\n{quoted}```" in (ROOT / "docs/how_to/devices.md").read_text()


def test_the_committed_table_is_made_from_the_committed_results():
    folder = ROOT / "benchmarks/results/data_parallel"
    results = json.loads((folder / "results.json").read_text())
    assert data_parallel.markdown(results) == (folder / "table.md").read_text()


def refuse(*arguments):
    with pytest.raises(SystemExit) as error:
        data_parallel.cli(list(arguments))
    return str(error.value)


def test_a_batch_that_cannot_be_split():
    message = refuse("--batch-size", "12")
    assert "batch size of 12 on 8 devices, expected a multiple of 8" in message


def test_a_method_without_statistics_of_a_batch():
    message = refuse("--methods", "nn.GroupNorm")
    assert "method 'nn.GroupNorm' takes no statistics over devices" in message


def test_devices_cannot_be_simulated_after_the_first_use():
    message = refuse("--devices", "4")
    assert (
        "--devices 4 came when JAX was in use with 8, expected a fresh process" in message
    )


def test_differences_are_relative_to_each_array():
    expected = {"large": np.array([100.0, -200.0]), "small": np.array([0.0, 0.5])}
    actual = {"large": np.array([100.0, -198.0]), "small": np.array([0.0, 0.5])}
    assert data_parallel.difference(actual, expected) == pytest.approx(0.01)


def test_every_estimator_fits_the_network():
    """Also one with a weight to learn."""
    model = Network(cbn.learned(cbn.group_batch_norm), features=(32,))
    state = data_parallel.init(model, optax.sgd(0.1), np.zeros((2, 8, 8, 1)), seed=0)
    assert "mix" in state.params["Norm_0"]
