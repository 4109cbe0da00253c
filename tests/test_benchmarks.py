"""The main job at its smallest size, and what it says when asked for the impossible."""

import dataclasses
import functools
import gzip
import json
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import (
    adaptive,
    corrected_inference,
    cost,
    data,
    diminishing,
    landscape,
    methods,
    networks,
    report,
    robustness,
    runs,
    samples,
    small_batch,
    theory,
)

pytestmark = [
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
        "import sys, pathlib; from benchmarks import data;"
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
        small, networks=("mlp",), methods=("batch_norm", "cross_iteration", "batch_norm@4")
    )
    console = Console(width=80)
    results = small_batch.main(small, console)
    labels = [cell["label"] for cell in results["cells"]]
    assert labels == list(small.methods)
    for cell in results["cells"]:
        assert np.isfinite(cell["curves"][0][-1]["loss"])
        assert cell["step_time"]["ratio"] > 0
    assert (small.output / "curves.png").stat().st_size > 10_000
    assert json.loads((small.output / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert (small.output / "table.md").read_text() == report.markdown(results)
    files = {path: path.stat().st_mtime_ns for path in (small.output / "runs").iterdir()}
    assert len(files) == len(labels)
    again = small_batch.main(small, console)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert [c["curves"] for c in again["cells"]] == [c["curves"] for c in results["cells"]]


def test_seeds_are_reproducible(tmp_path, data_dir):
    """Also where positions are sampled."""
    dataset = data.load("digits", data_dir, 32)
    method = methods.parse("small_batch", 2)
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
    state = run.trainer(dataset).init(jax.random.key(0))
    rows = np.arange(2, dtype=np.int32)
    _, loss = run.trainer(dataset).step(
        state, dataset.train_images, dataset.train_labels, rows
    )
    assert np.isfinite(loss)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize(
    "name", ["batch_norm", "group_norm", "cross_iteration", "small_batch"]
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
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
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
        measured, predicted = (cell[k]["streaming"] for k in ("measured", "predicted"))
        error = measured["deviation"] / np.sqrt(config.runs)
        assert abs(measured["bias"] - predicted["bias"]) < 3 * error
        assert measured["deviation"] == pytest.approx(predicted["deviation"], rel=0.1)
    taylor = [cell["measured"]["taylor"]["bias"] for cell in results["cells"]]
    assert taylor[1] < taylor[0] - 0.02 < 0
    assert (tmp_path / "theory.png").stat().st_size > 10_000


def test_the_study_of_samples(tmp_path, data_dir):
    config = samples.Config(
        methods=("streaming_4", "replay_4"),
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
    assert (tmp_path / "samples.png").stat().st_size > 10_000
    assert "| replay_4 |" in (tmp_path / "table.md").read_text()


PAPERS = {
    "diminishing": (diminishing, {"alphas": ("batch_norm", "1/m"), "dataset": "digits"}),
    "corrected_inference": (
        corrected_inference,
        {"networks": ("mlp",), "batch_sizes": (1, 4), "draws": ("random", "twice")},
    ),
    "adaptive": (adaptive, {"networks": ("mlp",), "batch_sizes": (4,)}),
    "landscape": (
        landscape,
        {"network": "mlp", "methods": ("group and batch",), "learning_rates": (0.01, 0.02)},
    ),
}
ROWS = {"diminishing": 4, "corrected_inference": 2, "adaptive": 3, "landscape": 1}


def test_the_papers_methods_cost_what_the_readme_says():
    flops = cost.flops("cnn", 4, ("diminishing_0.25", "group_batch"))
    assert flops["diminishing_0.25"] <= 1.02
    assert flops["group_batch"] <= 1.05


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
    figures = list(tmp_path.glob("*.png"))
    assert figures
    assert all(path.stat().st_size > 10_000 for path in figures)
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
    with pytest.raises(ValueError, match="method 'none' is unknown; known are batch norm"):
        landscape.main(landscape.Config(methods=("none",)), Console())
    with pytest.raises(ValueError, match=r"method .batch_norm\+lion. is unknown"):
        methods.parse("batch_norm+lion", 2)
    assert methods.parse("batch_norm+adam@32", 2).optimizer == "adam"


def test_costs_are_counted_and_timed(tmp_path):
    config = cost.Config(
        networks=("mlp",),
        batch_sizes=(1, 2),
        methods=("small_batch",),
        timing_rounds=1,
        output=tmp_path,
    )
    cells = cost.main(config, Console(width=100))["cells"]
    # Batch norm cannot train an MLP on one example.
    assert [(c["batch_size"], c["label"]) for c in cells] == [
        (2, "batch_norm"),
        (2, "small_batch"),
    ]
    baseline, small = cells
    assert baseline["flops"] == baseline["bytes accessed"] == 1.0
    assert 1.0 < small["flops"] < 3.0
    assert 1.9 < small["state"] < 2.2
    assert all(c["time"]["ratio"] > 0 for c in cells)


def refuse(*arguments, module=small_batch):
    with pytest.raises(SystemExit) as error:
        module.cli(list(arguments))
    return str(error.value)


def test_unknown_method():
    message = refuse("--methods", "batch_norm", "instance_norm")
    assert "method 'instance_norm' is unknown; known are batch_norm, group_norm" in message


def test_unknown_dataset(tmp_path):
    message = refuse("--dataset", "fashon", "--data-dir", str(tmp_path))
    assert "dataset 'fashon' is unknown; known are digits, fashion_mnist and" in message


def test_unknown_network(tmp_path):
    for module in (small_batch, robustness):
        message = refuse("--networks", "vgg", "--data-dir", str(tmp_path), module=module)
        assert "network 'vgg' is unknown; known are mlp, cnn" in message


def test_batch_larger_than_the_data(small):
    message = refuse("--batch-size", "5000", "--data-dir", str(small.data_dir))
    assert "batch size 5000" in message
    assert "smaller --batch-size" in message


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
