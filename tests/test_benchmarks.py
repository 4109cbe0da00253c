"""The main job at its smallest size, and what it says when asked for the impossible."""

import dataclasses
import functools
import gzip
import itertools
import json
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import cbn_jax
from benchmarks import small_batch, tables
from benchmarks.lib import data, methods, networks, profile, report, runs, training
from benchmarks.studies import (
    adaptive,
    batch_size,
    batch_size_report,
    claims,
    collectives,
    corrected_inference,
    cost,
    cost_report,
    cost_tables,
    cost_targets,
    diminishing,
    fine_tuning,
    frameworks,
    landscape,
    robustness,
    samples,
    scaling,
    theory,
    without_layer,
)

pytestmark = [
    pytest.mark.studies,
    pytest.mark.usefixtures("loose"),
    # Raised inside tensorflow-datasets and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def small(tmp_path, data_dir):
    return small_batch.Config(
        seeds=(0,),
        epochs=1,
        examples=64,
        timing_rounds=1,
        output=tmp_path,
        data_dir=data_dir,
    )


def test_digits_are_real_images(data_dir):
    digits = data.load("digits", data_dir)
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.max() == 1.0
    assert digits.train_images.min() == 0.0
    assert set(digits.train_labels) == set(range(10)) == set(digits.test_labels)
    again = data.load("digits", data_dir, examples=10)
    np.testing.assert_array_equal(again.train_images, digits.train_images[:10])


def test_data_needs_no_tensorflow(data_dir):
    code = (
        "import sys, pathlib; from benchmarks.lib import data;"
        f"data.load('digits', pathlib.Path({str(data_dir)!r}));"
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def write_idx(path, array):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_from_idx_files(tmp_path, monkeypatch):
    """Files of the published form, made here; every image keeps its label."""
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    labels = np.arange(10, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setattr(data, "IDX_FOLDERS", (tmp_path / "absent", tmp_path))
    loaded = data.load("fashion_mnist", tmp_path / "prepared")
    assert sorted(loaded.test_labels) == list(labels)
    expected = images[loaded.test_labels][..., None] / np.float32(images.max())
    np.testing.assert_allclose(loaded.test_images, expected, rtol=1e-6)


def test_any_set_of_tensorflow_datasets_by_name(data_dir):
    """A versioned name goes the general way, through the registry."""
    digits = data.load("digits", data_dir)
    by_name = data.load("digits:1.0.0", data_dir)
    np.testing.assert_array_equal(by_name.test_images, digits.test_images)


def test_main_job_writes_results_and_takes_them_up_again(small):
    small = dataclasses.replace(
        small,
        networks=("mlp",),
        methods=("batch_norm", "cross_iteration_batch_norm", "batch_norm@4"),
    )
    console = Console(width=80)
    results = small_batch.main(small, console)
    cells = [(cell["pairing"], cell["label"]) for cell in results["cells"]]
    compared = small.methods[:2]
    assert cells == [
        *(("independent", label) for label in compared),
        *(("one class", label) for label in compared),
        ("independent", "batch_norm@4"),
    ]
    for cell in results["cells"]:
        assert np.isfinite(cell["curves"][0][-1]["loss"])
        assert cell["step_time"]["ratio"] > 0
    assert (small.output / "curves.svg").stat().st_size > 3_000
    assert json.loads((small.output / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert (small.output / "table.md").read_text() == report.markdown(results)
    files = {path: path.stat().st_mtime_ns for path in (small.output / "runs").iterdir()}
    assert len(files) == len(cells)
    again = small_batch.main(small, console)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert [c["curves"] for c in again["cells"]] == [c["curves"] for c in results["cells"]]


def test_the_figure_says_where_batch_norm_fails():
    def cell(pairing, label, accuracy, size=2):
        curve = [{"accuracy": accuracy}]
        where = {"network": "mlp", "pairing": pairing, "batch_size": size}
        return {**where, "label": label, "curves": [curve]}

    cells = [
        cell("independent", "batch_norm", 0.5),
        cell("independent", "small_batch_norm", 0.9),
        cell("one class", "batch_norm", 0.1),
        cell("one class", "small_batch_norm", 0.8),
        cell("independent", "batch_norm", 0.95, 32),
    ]
    assert report.message({"cells": cells}) == (
        "MLP, 2 images of one class a step: batch_norm ends at 10 %, "
        "small_batch_norm at 80 %"
    )


@given(values=st.lists(st.floats(-100, 100), max_size=6))
def test_names_at_the_ends_of_lines_do_not_overlap(values):
    values = sorted(values)
    places = report.spread_apart(values, gap=2.0)
    assert all(b - a > 2.0 - 1e-9 for a, b in itertools.pairwise(places))
    if all(b - a >= 2.0 for a, b in itertools.pairwise(values)):
        np.testing.assert_allclose(places, values, atol=1e-9)
    if values:  # moved to both sides alike
        assert np.mean(places) == pytest.approx(np.mean(values), abs=1e-9)


def test_seeds_are_reproducible(tmp_path, data_dir):
    """Also where positions are sampled."""
    dataset = data.load("digits", data_dir, 32)
    method = methods.parse("small_batch_norm", 2)
    run = runs.Run("cnn", method, 0.1, epochs=1, seed=3, reports=2)
    trainer = run.trainer(dataset)
    curves = [
        runs.curve(one, trainer, dataset, tmp_path / str(i), lambda *step: None)
        for i, one in enumerate([run, run, run._replace(seed=4)])
    ]
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_trains(name, data_dir):
    dataset = data.load("digits", data_dir, 16)
    run = runs.Run("mlp", methods.parse(name, 2), 0.1, epochs=1, seed=0)
    trainer, rows = run.trainer(dataset), np.arange(2, dtype=np.int32)
    state = trainer.init(jax.random.key(0))
    for _ in range(3):
        state, loss = trainer.step(state, dataset.train_images, dataset.train_labels, rows)
        assert np.isfinite(loss)
    assert trainer.step._cache_size() == 1  # traced once


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize(
    "name", ["batch_norm", "nn.GroupNorm", "cross_iteration_batch_norm", "small_batch_norm"]
)
def test_bfloat16_is_for_activations_and_products_alone(name, network, data_dir):
    dataset = data.load("digits", data_dir, 16)
    images, labels = dataset.train_images[:2], dataset.train_labels[:2]
    method = methods.parse(name, 2)
    run = runs.Run(network, method, 0.1, epochs=1, seed=0, precision="bfloat16")
    trainer = run.trainer(dataset)
    start = jax.eval_shape(trainer.init, jax.random.key(0))
    rows = np.arange(2, dtype=np.int32)
    state, loss = jax.eval_shape(trainer.step, start, images, labels, rows)
    assert state == start
    types = {leaf.dtype for leaf in jax.tree.leaves((state, loss))}
    assert types <= {jnp.dtype("float32"), jnp.dtype("int32")}

    program = str(jax.make_jaxpr(trainer.evaluate)(state, images, labels))
    product = r":(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)\["
    assert set(re.findall(product, program)) == {"bf16"}

    model = networks.NETWORKS[network](method.norm(8), 10, dtype=jnp.bfloat16)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    apply = functools.partial(
        model.apply, train=True, mutable=True, capture_intermediates=True
    )
    logits, kept = jax.eval_shape(apply, variables, images)
    assert logits.dtype == jnp.float32
    outputs = jax.tree.leaves(
        {k: v for k, v in kept["intermediates"].items() if k != "__call__"}
    )
    assert len(outputs) >= 4
    assert {leaf.dtype for leaf in outputs} == {jnp.dtype("bfloat16")}


def test_robustness_writes_results_and_takes_them_up_again(tmp_path, data_dir):
    config = robustness.Config(
        networks=("mlp",),
        batch_sizes=(2,),
        learning_rates=(0.1, 0.4),
        seeds=(0, 1),
        epochs=1,
        examples=64,
        output=tmp_path,
        data_dir=data_dir,
    )
    console = Console(width=100)
    results = robustness.main(config, console)
    # Two methods, and one that has a batch size of its own, at two rates.
    assert len(results["cells"]) == 3 * 2
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(files) == len(results["cells"]) * 2
    table = (tmp_path / "table.md").read_text()
    assert "| mlp | 2 | *minus batch_norm@32* |" in table
    assert "0 of 12 runs ended with a loss that is not finite" in table
    assert (tmp_path / "robustness.svg").stat().st_size > 3_000
    again = robustness.main(config, console)
    assert again["cells"] == results["cells"]
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_lost_run_is_counted():
    cell = {"accuracy": [0.5, 0.25], "lost": 1}
    assert robustness._accuracy(cell) == "37.5 ± 12.5 (1 lost)"
    better, worse = {"accuracy": [0.9, 0.9]}, {"accuracy": [0.8, 0.8]}
    assert robustness._distance(better, worse) == "+10.0 ± 0.0"
    assert robustness._distance(worse, better) == "**-10.0 ± 0.0**"


def test_predictions_of_the_theory_hold(tmp_path):
    """Bias within three standard errors, deviation within a tenth, for small angles."""
    config = theory.Config(windows=(8,), turns=(0.0, 0.5), runs=2000, output=tmp_path)
    results = theory.main(config, Console(width=100))
    for cell in results["cells"]:
        measured, predicted = (
            cell[k]["streaming_batch_norm"] for k in ("measured", "predicted")
        )
        error = measured["deviation"] / np.sqrt(config.runs)
        assert abs(measured["bias"] - predicted["bias"]) < 3 * error
        assert measured["deviation"] == pytest.approx(predicted["deviation"], rel=0.1)
    taylor = [
        cell["measured"]["cross_iteration_batch_norm"]["bias"] for cell in results["cells"]
    ]
    assert taylor[1] < taylor[0] - 0.02 < 0
    assert (tmp_path / "theory.svg").stat().st_size > 3_000


def test_the_study_of_samples(tmp_path, data_dir):
    config = samples.Config(
        methods=("streaming_batch_norm-4", "replay_batch_norm-4"),
        network="mlp",
        counted="mlp",
        seeds=(0,),
        epochs=2,
        examples=64,
        output=tmp_path,
        data_dir=data_dir,
    )
    results = samples.main(config, Console(width=100))
    for cell in results["cells"]:
        assert cell["flops"] > 1.0
        assert 0.0 < cell["scale"][0] < 1.0
        assert 0.0 <= cell["accuracy"][0] <= 1.0
    assert (tmp_path / "samples.svg").stat().st_size > 3_000
    assert "| replay_batch_norm-4 |" in (tmp_path / "table.md").read_text()


PAPERS = {
    "diminishing": (diminishing, {"alphas": ("batch_norm", "1/m"), "dataset": "digits"}),
    "corrected_inference": (
        corrected_inference,
        {"networks": ("mlp",), "batch_sizes": (1, 4), "draws": ("random", "twice")},
    ),
    "adaptive": (adaptive, {"networks": ("mlp",), "batch_sizes": (4,)}),
    "landscape": (
        landscape,
        {
            "network": "mlp",
            "methods": ("group_batch_norm",),
            "learning_rates": (0.01, 0.02),
        },
    ),
}
ROWS = {"diminishing": 4, "corrected_inference": 2, "adaptive": 3, "landscape": 1}


def test_the_papers_methods_cost_what_the_readme_says():
    names = ("batch_norm", "diminishing_batch_norm-0.25", "group_batch_norm")
    flops = cost.flops("cnn", 4, names)
    assert flops["batch_norm"] <= 1.025
    assert flops["diminishing_batch_norm-0.25"] <= 1.025
    assert flops["group_batch_norm"] <= 1.05


@pytest.mark.parametrize("name", PAPERS)
def test_the_study_of_a_paper(name, tmp_path, data_dir):
    """It writes a table, figures and results, and takes finished runs up again."""
    module, options = PAPERS[name]
    config = module.Config(
        seeds=(0,),
        epochs=1,
        examples=120,
        output=tmp_path,
        data_dir=data_dir,
        **options,
    )
    results = module.main(config, Console(width=100))
    assert len(results["cells"]) == ROWS[name]
    table = (tmp_path / "table.md").read_text()
    assert table == module.markdown(json.loads((tmp_path / "results.json").read_text()))
    figures = list(tmp_path.glob("*.svg"))
    assert figures
    assert all(path.stat().st_size > 3_000 for path in figures)
    if (tmp_path / "runs").exists():
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
        module.main(config, Console(width=100))
        assert {path: path.stat().st_mtime_ns for path in files} == files


def test_batches_are_composed_as_said():
    labels = np.arange(40) % 4
    brightness = np.random.default_rng(0).random(40)
    rows = adaptive.compose(labels, brightness, "classes", 2, seed=0)
    alike = (labels[rows] == labels[rows][:, :1]).all(axis=1)
    assert 0.4 < alike.mean() < 0.8
    rows = adaptive.compose(labels, brightness, "brightness", 4, seed=0)
    assert (np.diff(brightness[rows.ravel()]) >= 0).all()
    rows = adaptive.compose(labels, brightness, "random", 3, seed=0)
    assert sorted(rows.ravel().tolist()) == sorted(set(rows.ravel().tolist()))
    assert rows.shape == (13, 3)


def test_an_unknown_place_or_method():
    with pytest.raises(ValueError, match="place is 'beside', expected"):
        diminishing._run(diminishing.Config(), "beside", "1")
    with pytest.raises(ValueError, match="method 'none' is unknown; known are batch_norm"):
        landscape.main(landscape.Config(methods=("none",)), Console())
    with pytest.raises(ValueError, match=r"method .batch_norm\+lion. is unknown"):
        methods.parse("batch_norm+lion", 2)
    assert methods.parse("batch_norm+adam@32", 2).optimizer == "adam"


def test_costs_are_counted_and_timed(tmp_path, monkeypatch):
    missed = cost_targets.Target("small_batch_norm", "mlp", 2, "time", 0.0)
    met = cost_targets.Target("batch_norm", None, None, "FLOPs", 1.05)
    monkeypatch.setattr(cost_targets, "TARGETS", (missed, met))
    config = dataclasses.replace(cost.QUICK, output=tmp_path)
    results = cost.main(config, Console(width=100))
    # Batch norm cannot train an MLP on one example.
    assert [(c["batch_size"], c["label"]) for c in results["cells"]] == [
        (2, "nn.BatchNorm"),
        (2, "batch_norm"),
        (2, "small_batch_norm"),
    ]
    baseline, ours, small = results["cells"]
    assert ours["flops"] <= 1.02 * baseline["flops"]
    assert 1.0 < small["flops"] / baseline["flops"] < 5.5
    assert 0.9 < small["state"] / small["params"] < 1.2
    assert small["memory"] > 2 * small["state"]  # the gradients, for one
    assert small["compile"] > 0
    assert baseline["time"]["ratio"] == 1.0
    assert min(results["rates"].values()) > 1e6
    assert cost_report.verdict(results).endswith("\n1 of 2 targets are met.")
    assert re.search(r"median (\d\.\d\d), worst \1 ", cost_report.verdict(results))
    both = cost_report.times(results, "small_batch_norm").splitlines()
    assert both[0] in cost_report.verdict(results)
    ratio = small["compile"] / baseline["compile"]
    assert both[1].startswith(
        "Compile time of small_batch_norm relative to Flax's batch norm"
    )
    assert f"median {ratio:.2f}, worst {ratio:.2f} (mlp, batch size 2)." in both[1]
    assert set(small["profile"]) > {"layers", "moments", "transport", "derivatives"}
    assert "transport" not in baseline["profile"]
    assert [state["label"] for state in results["states"]] == [
        cell["label"] for cell in results["cells"]
    ]
    table = (tmp_path / "table.md").read_text()
    assert table == cost_report.markdown(
        json.loads((tmp_path / "results.json").read_text())
    )
    assert "| missed |\n| batch_norm: FLOPs ≤ 1.05 on every network" in table
    _, _, floors = table.partition("Where a target for the time is missed, the floor")
    assert "| mlp | 2 | small_batch_norm | 8 | +" in floors
    _, _, profiles = floors.partition("Where a target for the time is missed")
    assert "| mlp | 2 | small_batch_norm |" in profiles
    assert "State of a mlp for 14x14 images" in profiles


def test_costs_without_running(tmp_path):
    config = dataclasses.replace(cost.QUICK, timing_rounds=0, output=tmp_path)
    results = cost.main(config, Console(width=100))
    assert results["rates"] is None
    assert all(c["time"] is c["profile"] is None for c in results["cells"])
    assert cost_report.verdict(results) == ""


def cost_cell(label, network="resnet18", **changes):
    """A cell with round numbers: 100 ms, 10 layers, 50 MB of parameters."""
    ratio = changes.pop("ratio", 1.0)
    time = {"milliseconds": 100 * ratio, "ratio": ratio}
    time |= {"ratio_low": ratio, "ratio_high": ratio}
    return {
        "network": network,
        "batch_size": 2,
        "command_buffers": "default",
        "label": label,
        "flops": 1e9,
        "bytes": 1e9,
        "compile": 2.0,
        "fusions": 100,
        "layers": 10,
        "memory": 2**20,
        "state": 1e6,
        "params": 50_000_000,
        "time": time,
        "profile": None,
        **changes,
    }


def test_targets_of_cost():
    """The worst cell counts, also where a target is for every network."""
    base, twice = cost_cell(cost_tables.BASELINE), {"compile": 4.0, "ratio": 1.5}
    cells = [
        base,
        cost_cell("batch_norm", ratio=1.01),
        cost_cell("small_batch_norm", fusions=250, bytes=1.5e9, state=51e6, **twice),
        base | {"network": "mlp"},
        cost_cell("batch_norm", "mlp", ratio=1.3),
    ]
    results = {"cells": cells}
    found = {
        (w.target.method, w.target.quantity): (w.cell["network"], w.missed)
        for w in cost_targets.worst_cells(results)
    }
    assert found == {
        ("batch_norm", "time"): ("mlp", True),
        ("small_batch_norm", "time"): ("resnet18", True),
        ("small_batch_norm", "bytes"): ("resnet18", False),
        ("small_batch_norm", "compile"): ("resnet18", False),
        ("small_batch_norm", "fusions"): ("resnet18", False),
        ("small_batch_norm", "state / θ"): ("resnet18", False),
    }
    assert cost_report.verdict(results).endswith("\n4 of 6 targets are met.")
    text = cost_targets.targets(results)
    assert "every size | 1.30 (1.30–1.30) on mlp at batch size 2 | missed |" in text
    assert "fusions ≤ +20 on resnet18 at batch size 2 | +15.0 | met |" in text


def test_every_target_is_for_a_cell_that_is_measured():
    config = cost.Config()
    for target in cost_targets.TARGETS:
        assert target.method in config.methods
        assert target.network in (None, *config.networks)
        assert target.batch_size in (None, *config.batch_sizes)
        assert target.quantity in cost_tables.QUANTITIES
    assert len(set(cost_targets.TARGETS)) == len(cost_targets.TARGETS)


def test_the_floor_of_a_state():
    """8 passes over 50 MB at 20 GB/s take 20 ms."""
    base, slow = cost_cell(cost_tables.BASELINE), cost_cell("small_batch_norm", ratio=1.5)
    rates = {"bytes": 20e9, "flops": 1e12}
    least = cost_targets.floor(base, slow, rates)
    np.testing.assert_allclose(least, (20.0, 1.2), rtol=1e-6)
    carried = cost_targets.floor(base, slow | {"label": "carried_batch_norm"}, rates)
    np.testing.assert_allclose(carried.milliseconds, 7.5, rtol=1e-6)
    row = "| resnet18 | 2 | small_batch_norm | 8 | +20 ms, 1.20 | +50 ms, 1.50 |"
    results = {"cells": [base, slow], "rates": rates}
    assert row in cost_targets.floors(results)
    fast = cost_cell("small_batch_norm", ratio=1.1)
    assert cost_targets.floors(results | {"cells": [base, fast]}) == ""


PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/a fusion( all-reduce(.py"

%taken (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %all-reduce = f32[4]{0} all-reduce(%a), to_apply=%sum
}

%within (b: (f32[4], bf16[2,3])) -> f32[4] {
  %f = f32[4]{0} fusion(%b), kind=kLoop, calls=%other
  ROOT %c = f32[4]{0} call(%f), to_apply=%deeper, metadata={op_name=" fusion("}
}

%deeper (a: f32[4]) -> f32[4] {
  ROOT %r = f32[8]{0} all-reduce-start(%a), to_apply=%sum
}

ENTRY %main (p: f32[4], q: pred[]) -> f32[4] {
  %f.1 = f32[4]{0} fusion(%p), kind=kLoop, calls=%other, metadata={op_name=" fusion("}
  ROOT %f.2 = (f32[4]{0}, /*index=1*/s32[]) fusion(%f.1), kind=kLoop, calls=%other
  %r.1 = (f32[4]{0}, bf16[2,3]{1,0}, pred[5]{0}, f32[]) all-reduce(%f.1), to_apply=%s
  %g = f32[4]{0} get-tuple-element(%all-reduce.1), index=0
  %k = f32[4]{0} conditional(%q, %p, %p), branch_computations={%taken, %within}
}
"""


def test_what_a_compiled_program_holds():
    """Metadata and the names of files are not read as instructions."""
    lines = profile.computations(PROGRAM)
    assert list(lines) == ["taken", "within", "deeper", profile.ENTRY]
    assert cost.fusions(PROGRAM) == 2
    assert collectives.sent(PROGRAM) == {
        "all_reduces": 1,
        "bytes": 16 + 12 + 5 + 4,
        "branch_bytes": 16 + 32,
    }


@pytest.mark.parametrize("asked", ["with", "without", "both"])
def test_command_buffers_are_for_a_gpu(asked):
    with pytest.raises(
        ValueError, match=f"--command-buffers {asked} is for a GPU, and the"
    ):
        cost.main(dataclasses.replace(cost.QUICK, command_buffers=asked), Console())


def test_forms_of_a_program():
    """JAX knows the options on a CPU too, where they change nothing."""
    gpu = type("Device", (), {"platform": "gpu"})
    assert cost._forms("default", gpu) == ("default",)
    assert cost._forms("without", gpu) == ("without",)
    assert cost._forms("both", gpu) == ("with", "without")
    lowered = jax.jit(jnp.negative).lower(jnp.ones(2))
    for options in cost.COMMAND_BUFFERS.values():
        lowered.compile(compiler_options=options)
    cell = cost_cell("batch_norm", command_buffers="without")
    assert cost_tables.label(cell) == "batch_norm, without command buffers"


def test_bytes_that_devices_send(tmp_path):
    """Two sums and their two gradients, one of which the bias needs anyway."""
    config = dataclasses.replace(collectives.QUICK, output=tmp_path)
    results = collectives.main(config, Console(width=100))
    alone, ours = results["cells"]
    assert (alone["devices"], alone["label"]) == (2, "none")
    assert alone["branch_bytes"] == 0
    assert alone["bytes"] == 4 * (9 * 8 * 8 + 2 * 8)  # weights, scale and bias
    assert 4 * 2 * 8 < ours["bytes"] - alone["bytes"] <= 4 * 5 * 8
    assert 0 < ours["branch_bytes"] <= 4 * 3 * 8
    assert results["whole"]["features"] == 3 * 128
    table = (tmp_path / "table.md").read_text()
    found = json.loads((tmp_path / "results.json").read_text())
    assert table == collectives.markdown(found)
    assert "| for comparison: 4 numbers per feature for each of 256 devices |" in table


def test_xla_counts_the_body_of_a_loop_once():
    """Six slots more, each read with the parameters, are what ``cost`` has to add."""
    kernel = jnp.ones((512, 64))
    bytes_of = {}
    for window in (2, 8):
        estimator = cbn_jax.cross_iteration_batch_norm(window)

        def step(kernel, state, z, estimator=estimator):
            x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, z)
            return estimator.train(state, x, source)

        state = estimator.init(64, cbn_jax.convolution(), kernel)
        program = jax.jit(step, donate_argnums=1).lower(kernel, state, jnp.ones((4, 512)))
        bytes_of[window] = program.compile().cost_analysis()["bytes accessed"]
    assert bytes_of[8] - bytes_of[2] < 2 * kernel.nbytes


def test_operations_belong_to_parts():
    for name, part in (
        ("jit(step)/jvp(MLP)/Norm_0/Norm_0._run_layer/Dense/dot_general", "layers"),
        ("jit(step)/jvp(MLP)/Dense_0/dot_general", "layers"),
        ("jit(step)/jvp(MLP)/Norm_1/transport/dot_general", "transport"),
        ("jit(step)/transpose(jvp(MLP))/Norm_1/normalize/mul", "normalize"),
        ("jit(step)/jvp(MLP)/_Behind_0/BatchNorm_0/rsqrt", "other of the norm"),
        ("jit(step)/add", "optimizer"),
        ("jit(step)/jvp()/reduce_sum", "other"),
        ("", "unnamed"),
    ):
        assert profile._part(name) == part


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="--device tpu is not to be found, JAX sees cpu"):
        cost.main(dataclasses.replace(cost.QUICK, device="tpu"), Console())


@pytest.mark.parametrize(
    ("name", "side", "classes", "params"),
    [("resnet50", 64, 1000, 25_557_032), ("resnet18", 32, 10, 11_173_962)],
)
def test_networks_are_those_of_the_literature(name, side, classes, params):
    norm = methods.parse("nn.BatchNorm", 2).norm(1)
    model = networks.NETWORKS[name](norm=norm, classes=classes)
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    made = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == params


@pytest.fixture
def quick(tmp_path, data_dir):
    return dataclasses.replace(batch_size.QUICK, output=tmp_path, data_dir=data_dir)


def test_accuracy_against_batch_size(quick):
    console = Console(width=100)
    results = batch_size.main(quick, console)
    cells = {(c["label"], c["batch_size"]): c for c in results["cells"]}
    assert len(cells) == 6
    assert "one value per feature" in cells["batch_norm", 1]["refused"]
    folder = quick.output / "runs"
    for (label, size), cell in cells.items():
        if "refused" in cell:
            continue
        chosen = quick.learning_rates.index(cell["rate"])
        assert cell["tuning"][chosen] == max(cell["tuning"])
        assert len(cell["test"]) == len(quick.seeds)
        assert len(cell["at_rates"]) == (2 if size == 2 else 0)
        for rate in quick.learning_rates:
            reported = size == 2 or rate == cell["rate"]
            # The tuning seed, and two more for a rate that is reported.
            ended = list(folder.glob(f"*-{label}-{size}-{rate:g}-*"))
            assert len(ended) == (3 if reported else 1)
        assert (cell["corrected"][0] is None) == (label == "nn.GroupNorm")
    table = (quick.output / "table.md").read_text()
    written = json.loads((quick.output / "results.json").read_text())
    assert table == batch_size_report.markdown(written)
    assert "| mlp | batch_norm | refused |" in table
    assert "mlp, digits, test accuracy: " in batch_size_report.verdict(results)
    for name in ("batch_size.svg", "learning_rate.svg"):
        assert (quick.output / name).stat().st_size > 3_000
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = batch_size.main(quick, console)
    assert again["cells"] == results["cells"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files


def test_a_batch_size_that_is_not_studied(quick):
    config = dataclasses.replace(quick, every_rate_at=4)
    with pytest.raises(ValueError, match="--every-rate-at 4 is none of --batch-sizes 1 2"):
        batch_size.main(config, Console())


def test_one_program_serves_all_rates(quick):
    """And gives what a program of its own for that rate gives."""
    parts = batch_size.split(quick.load())
    run = runs.Run("mlp", methods.parse("small_batch_norm", 2), 0.0, epochs=1, seed=3)
    programs = batch_size.make_programs(run, parts.dataset)
    arrays = parts.dataset.train_images, parts.dataset.train_labels
    order = list(training.batches(len(arrays[1]), 2, 1, seed=3))
    for rate in (0.1, 0.4):
        usual = run._replace(learning_rate=rate)
        own = usual.trainer(parts.dataset)
        states = [
            programs.start(jax.random.key(3), usual.rate),
            own.init(jax.random.key(3)),
        ]
        for rows in order:
            states[0], _ = programs.trainer.step(states[0], *arrays, rows)
            states[1], _ = own.step(states[1], *arrays, rows)
        params = [state.params for state in states]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *params
        )
    assert programs.trainer.step._cache_size() == 1


def test_rates_are_chosen_on_images_of_their_own(quick):
    dataset = quick.load()
    parts = batch_size.split(dataset)
    assert (len(parts.dataset.train_labels), len(parts.labels)) == (48, 12)
    np.testing.assert_array_equal(parts.images, dataset.train_images[48:])
    np.testing.assert_array_equal(parts.dataset.test_images, dataset.test_images)
    lost = batch_size.Outcome(np.nan, validation=0.9, test=0.9, corrected=None)
    assert batch_size._found(lost) < 0


def test_the_best_and_what_is_as_good():
    """The others are 1.4 and 3 standard errors of the difference behind."""
    cells = [
        {"network": "mlp", "batch_size": 2, "label": str(i), "test": test, "lost": 0}
        for i, test in enumerate([[0.90, 0.92], [0.88, 0.90], [0.88, 0.88]])
    ]
    shown = [batch_size_report._accuracy({"cells": cells}, cell) for cell in cells]
    assert shown == ["**91.0 ± 1.0**", "**89.0 ± 1.0**", "88.0 ± 0.0"]


def test_slopes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.studies.scaling", "--quick"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True)
    written = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "table.md").read_text() == scaling.markdown(written)
    assert (tmp_path / "scaling.svg").stat().st_size > 3_000
    for cell in written["cells"]:
        if cell["what"] == "all-reduces":
            assert cell["values"] == [1, 1]
        if (cell["what"], cell["method"]) == ("state", "cross_iteration_batch_norm"):
            assert cell["has"] == pytest.approx(cell["should"], abs=0.2)
    assert scaling.slope((1, 2, 8), [1.0, 3.0, 48.0]) == pytest.approx(2.0)


def test_other_frameworks(tmp_path, monkeypatch):
    config = dataclasses.replace(frameworks.QUICK, output=tmp_path)
    results = frameworks.main(config, Console(width=100))
    labels = [cell["label"] for cell in results["cells"]]
    assert labels[:3] == [frameworks.BASELINE, "cbn_jax batch_norm", "flax group_norm"]
    assert "keras batch_norm" in labels
    monkeypatch.setattr(frameworks, "find_spec", lambda package: None)
    table = frameworks.markdown(frameworks.main(config, Console(width=100)))
    assert "keras" not in table
    assert "Keras is not installed: left out. PyTorch is not installed: left out." in table
    with pytest.raises(ValueError, match="shape '8' is not one, expected examples"):
        frameworks.main(dataclasses.replace(config, shapes=("8",)), Console())


def test_verdicts_follow_from_the_counts():
    ahead = claims.compare("here", [90.0, 92.0], [80.0, 82.0], strictly=True)
    assert (ahead.difference, ahead.error) == (10.0, pytest.approx(2**0.5))
    noisy = claims.compare("there", [90.0, 92.0], [89.0, 91.0], strictly=True)
    behind = claims.compare("elsewhere", [80.0, 82.0], [90.0, 92.0])
    assert (ahead.agrees, noisy.agrees, behind.agrees) == (True, False, False)
    assert claims.compare("there", [90.0, 92.0], [91.0, 93.0]).agrees
    assert claims.verdict([ahead]) == "1 of 1"
    assert claims.verdict([ahead, noisy, behind]) == "1 of 3"


def test_claims_are_tested_on_every_cell(tmp_path):
    config = claims.Config(output=tmp_path)
    results = claims.main(config, Console(width=100))
    assert all(claim["comparisons"] for claim in results["claims"])
    assert {claim["paper"][:4] for claim in results["claims"]} >= {
        "Yao ",
        "Ma &",
        "Zhan",
        "Yong",
        "Guna",
        "Also",
    }
    with pytest.raises(ValueError, match=r"results.json is missing, expected the results"):
        claims.main(claims.Config(studies=tmp_path), Console())


def test_tables_are_rewritten(tmp_path):
    for folder in ("docs", "benchmarks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "benchmarks/README.md").write_text("nothing")
    path = tmp_path / "README.md"
    path.write_text("a <!-- verdict adaptive -->old<!-- end --> b\n")
    sentence = adaptive.verdict(json.loads(tables.results("adaptive")))
    assert tables.main(tables.Config(tmp_path), Console()) == {"changed": ["README.md"]}
    assert path.read_text() == f"a <!-- verdict adaptive -->{sentence}<!-- end --> b\n"
    with pytest.raises(ValueError, match="<!-- verdict weather --> names no function"):
        tables.rendered("<!-- verdict weather --><!-- end -->")


def test_all_figures_are_redrawn(tmp_path):
    """From the committed results; and no other picture is committed."""
    config = tables.Config(tmp_path, figures=True)
    for name in ("benchmarks/README.md", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    made = tables.main(config, Console())["changed"]
    committed = tables.ROOT.glob("benchmarks/results/*/*.svg")
    assert set(made) == {str(path.relative_to(tables.ROOT)) for path in committed}
    for path in made:
        text = (tmp_path / path).read_text()
        assert text.startswith("<?xml")
        assert "prefers-color-scheme: dark" in text


def refuse(*arguments, module=small_batch):
    with pytest.raises(SystemExit) as error:
        module.cli(list(arguments))
    return str(error.value)


def test_unknown_method():
    message = refuse("--methods", "batch_norm", "instance_norm")
    assert "method 'instance_norm' is unknown; known are batch_norm, small_batch" in message


def test_unknown_dataset(tmp_path):
    message = refuse("--dataset", "fashon", "--data-dir", str(tmp_path))
    assert "dataset 'fashon' is unknown; known are digits, fashion_mnist, " in message


def test_unknown_network(tmp_path):
    for module in (small_batch, robustness):
        message = refuse("--networks", "vgg", "--data-dir", str(tmp_path), module=module)
        assert "network 'vgg' is unknown; known are mlp, cnn" in message


def test_batch_larger_than_the_data(small):
    message = refuse("--batch-size", "5000", "--data-dir", str(small.data_dir))
    assert "batch size 5000" in message
    assert "smaller --batch-size" in message


def test_numbers_that_leave_nothing_to_do(small):
    for option in ("--batch-size", "--timing-rounds"):
        message = refuse(option, "0", "--data-dir", str(small.data_dir))
        assert "is 0, expected at least 1" in message


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit, match="0"):
        small_batch.cli(["--help"])
    text = capsys.readouterr().out
    for option in (
        "dataset",
        "batch-size",
        "methods",
        "seeds",
        "epochs",
        "learning-rate",
        "precision",
        "output",
        "checkpoint-dir",
    ):
        assert f"--{option}" in text


@pytest.mark.parametrize(
    "package", ["tensorflow_datasets", "optax", "orbax", "tyro", "matplotlib"]
)
def test_a_missing_dependency_is_one_sentence(package):
    code = f"import sys; sys.modules[{package!r}] = None; import benchmarks.small_batch"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert f"{package} is not installed; install it with: pip install -e" in run.stderr
    assert "Traceback" not in run.stderr


def test_norms_without_a_layer(tmp_path, data_dir):
    """The table lists all runs, and stored runs do not run again."""
    config = dataclasses.replace(without_layer.QUICK, output=tmp_path, data_dir=data_dir)
    results = without_layer.main(config, Console())
    assert len(results["cells"]) == 4  # two pairings, two methods
    assert all(len(cell["accuracy"]) == 2 for cell in results["cells"])
    table = (tmp_path / "table.md").read_text()
    assert table.count("bidirectional_batch_norm |") == 2
    assert "of 2 settings" in table
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert without_layer.main(config, Console())["cells"] == results["cells"]
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}


def test_fine_tuning(tmp_path, data_dir):
    """Both ways to predict at each mark, and stored runs do not run again."""
    config = dataclasses.replace(fine_tuning.QUICK, output=tmp_path, data_dir=data_dir)
    results = fine_tuning.main(config, Console())
    assert len(results["cells"]) == 2 + 4  # references; two pairings, two methods
    assert all(np.shape(cell["running"]) == (2, 2) for cell in results["cells"])
    windows = [cell for cell in results["cells"] if "window" in cell]
    assert [cell["label"] for cell in windows] == ["small_batch_norm"] * 2
    assert all(cell["window"] != cell["running"] for cell in windows)
    table = (tmp_path / "table.md").read_text()
    assert table.count(" | small_batch_norm | 0.1 | ") == 2
    assert "of 4 cells" in table
    assert "of 2 settings" in table
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert fine_tuning.main(config, Console())["cells"] == results["cells"]
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}


def test_pairs_are_of_one_class():
    labels = np.array([0, 1, 0, 1, 1, 2, 2, 0])
    rows = np.stack([*training.batches_of_one_class(labels, 2, 3, seed=0)])
    assert rows.shape == (9, 2)  # an odd one of each class is left out
    assert (labels[rows[:, 0]] == labels[rows[:, 1]]).all()
    assert (rows[:, 0] != rows[:, 1]).all()
