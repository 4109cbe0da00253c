"""The study of norm batches: its batches, its replicas, its choices, its files."""

import dataclasses
import functools
import itertools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import cbn_jax
from benchmarks import tables
from benchmarks.lib import bases, compared, dataset, networks, replicas, tasks
from benchmarks.studies import (
    masks,
    norm_batch,
    norm_batch_figures,
    norm_batch_plan,
    norm_batch_report,
    norm_batch_results,
)
from benchmarks.studies.norm_batch_results import Cell, Run

pytestmark = [
    pytest.mark.studies,
    pytest.mark.usefixtures("loose"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.mark.parametrize("alike", [False, True])
def test_batches(alike):
    """Nothing twice in a pass; norm batches of one group, whose rest is left out."""
    groups = np.array([0] * 7 + [1] * 9 + [2])
    made = list(tasks.batches(groups if alike else None, 17, (2, 3), 2, seed=0))
    assert {rows.shape for rows in made} == {(2, 3)}
    assert len(made) == 2 * 2
    for each in (made[:2], made[2:]):
        assert len(np.unique(each)) == 12
    if alike:
        assert all(len(set(groups[norm])) == 1 for rows in made for norm in rows)
    again = list(tasks.batches(groups if alike else None, 17, (2, 3), 2, seed=0))
    np.testing.assert_array_equal(again, made)


def test_scores():
    counts = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert tasks.score(counts, dense=False) == pytest.approx(5 / 6)
    # Of the classes that are there: 3 of 4, and 2 of 3.
    assert tasks.score(counts, dense=True) == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_the_grid_grows_until_the_best_rate_lies_inside():
    asked = []

    def validation(rate):
        asked.append(rate)
        return -abs(np.log(rate / 3.0))

    assert norm_batch.best_rate(validation, (0.025, 0.1, 0.4)) == pytest.approx(1.6)
    assert asked == pytest.approx([0.025, 0.1, 0.4, 1.6, 6.4])
    asked.clear()
    assert norm_batch.best_rate(validation, (3.0, 12.0)) == pytest.approx(3.0)
    assert min(asked) == pytest.approx(0.75)


def test_of_equally_good_rates_the_largest_is_tested():
    """By the training and by the tables."""
    scores = {0.025: 0.5, 0.1: 0.9, 0.4: 0.9, 1.6: 0.5}
    best = norm_batch.best_rate(scores.__getitem__, (0.025, 0.1, 0.4))
    assert best == 0.4
    cell, found = Cell("digits", 2, 2, "alike", "sgd"), {}
    for rate, score in scores.items():
        result = {"validation": score, "test": 0.7, "lost": 0.0}
        seeds = (100, 101) + ((0, 1, 2) if rate == best else ())
        found |= {Run(cell, "batch_norm", rate, seed): result for seed in seeds}
    results = results_of({})[0] | norm_batch_results.plain(found)
    assert norm_batch_results.tested(results)[cell]["batch_norm"].rate == best


def trainer(estimator, count):
    norm = compared.Made(estimator)
    model = networks.MLP(norm=norm, classes=3, width=4, depth=1)
    optimizer = replicas.make_optimizer("sgd", 10, 2 * count)
    return replicas.make_trainer(model, (2, 2, 1), 3, count, optimizer)


@functools.cache
def examples():
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 2, 2, 1)).astype(np.float32), rng.integers(0, 3, 8)


def test_replicas_normalize_by_themselves_and_step_together(key):
    """The step of two replicas is the mean of their own steps."""
    images, labels = examples()
    rows = np.array([[0, 1], [2, 3]])
    single, double = (trainer(cbn_jax.batch_norm(), count) for count in (1, 2))
    start = jax.device_get(single.init(key, jnp.float32(0.1)))
    own = [
        single.step(single.init(key, jnp.float32(0.1)), images, labels, rows[i : i + 1])
        for i in range(2)
    ]
    state, loss = double.step(double.init(key, jnp.float32(0.1)), images, labels, rows)
    np.testing.assert_allclose(loss, np.mean([each[1] for each in own]), rtol=1e-5)
    jax.tree.map(
        lambda together, *each: np.testing.assert_allclose(
            together, np.mean(each, axis=0), rtol=1e-4, atol=1e-6
        ),
        state.params,
        *(each[0].params for each in own),
    )
    jax.tree.map(
        lambda together, *each: np.testing.assert_allclose(
            together, np.concatenate(each), rtol=1e-5, atol=1e-6
        ),
        state.batch_stats,
        *(each[0].batch_stats for each in own),
    )
    moved = np.abs(state.params["Dense_0"]["kernel"] - start.params["Dense_0"]["kernel"])
    assert moved.max() > 0


def test_backward_statistics_are_those_of_a_replica(key):
    """Of two that see the same; the loss is their mean, so each gradient is half."""
    images, labels = examples()
    estimator = cbn_jax.bidirectional_batch_norm(4)
    found = []
    for count in (1, 2):
        made = trainer(estimator, count)
        rows = np.tile([[0, 1]], (count, 1))
        state, _ = made.step(made.init(key, jnp.float32(0.1)), images, labels, rows)
        found.append(state.params["Norm_0"]["backward"].values)
    np.testing.assert_allclose(found[0] / 2, found[1], rtol=1e-4)
    assert np.abs(found[0]).max() > 0


def test_recomputed_statistics_are_those_of_all_norm_batches(key):
    """Under the last weights, in the first layer; for every replica."""
    images, labels = examples()
    made = trainer(cbn_jax.batch_norm(), 2)
    state = made.init(key, jnp.float32(0.1))
    state, _ = made.step(state, images, labels, np.array([[0, 1], [2, 3]]))
    rows = np.array([[0, 4], [5, 2], [7, 6]])
    found = replicas.recomputed(made, state, jnp.asarray(images), rows)
    layer = state.params["Dense_0"]
    x = images[rows.reshape(-1)].reshape(6, -1) @ layer["kernel"] + layer.get("bias", 0)
    stats = found.batch_stats["Norm_0"]
    np.testing.assert_allclose(stats["mean"][0], x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"][0], x.var(0), rtol=1e-4)
    assert replicas.counted(made, found, images, labels).sum() == 8


def test_precise_statistics_change_only_the_inference(quick):
    cell = Cell("digits", 2, 2, "alike", "sgd")
    names = ("batch_norm", "batch_norm-precise")
    made = [norm_batch.fitted(quick, Run(cell, name, 0.1, 0))[1] for name in names]
    chex.assert_trees_all_equal(made[0].params, made[1].params)
    means = [jax.tree.leaves(each.batch_stats)[0] for each in made]
    assert np.abs(means[0] - means[1]).max() > 0


@pytest.mark.parametrize("rank", [2, 3])
def test_a_unet_has_a_class_for_every_position(rank, key):
    norm = compared.METHODS["carried_batch_norm"](compared.Setting(1, 10))
    model = networks.UNet(norm=norm, classes=3, width=4, levels=2)
    images = jnp.ones((1, *(4,) * rank, 2))
    logits = jax.eval_shape(lambda key: model.init_with_output(key, images, True)[0], key)
    assert logits.shape == (1, *(4,) * rank, 3)


@pytest.mark.parametrize("method", list(compared.METHODS))
def test_every_method_trains(method, key):
    images, labels = examples()
    norm = compared.METHODS[method](compared.Setting(2, 10))
    model = networks.ResidualCNN(norm=norm, classes=3, width=8, stages=2)
    optimizer = replicas.make_optimizer("adam", 10, 4)
    made = replicas.make_trainer(model, (2, 2, 1), 3, 2, optimizer)
    state = made.init(key, jnp.float32(0.01))
    state, loss = made.step(state, images, labels, np.array([[0, 1], [2, 3]]))
    assert np.isfinite(loss)
    assert replicas.counted(made, state, images, labels, part=3).sum() == 8


def test_a_constant_window_has_no_gradient():
    """The statistics are the same; only the batch's share of their gradient is left."""
    whole = cbn_jax.small_batch_norm(2)
    fixed = compared.constant(whole)
    rng = np.random.default_rng(0)
    state = whole.init(3, cbn_jax.dense, jnp.zeros((4, 3)))

    @functools.partial(jax.jit, static_argnums=0)
    def step(estimator, kernel, state, z):
        x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, z)
        return estimator.train(state, x, source)

    for _ in range(3):
        kernel, z = rng.normal(size=(4, 3)), rng.normal(size=(2, 4))
        last, (_, state) = state, step(whole, kernel, state, z)
    chex.assert_trees_all_equal(step(fixed, kernel, last, z), step(whole, kernel, last, z))
    slopes = [
        jax.jacobian(lambda kernel, one=each: step(one, kernel, last, z)[0].mean.sum())(
            jnp.asarray(kernel)
        )
        for each in (fixed, whole)
    ]
    share = 2 / state.window[2]
    np.testing.assert_allclose(slopes[0], np.outer(z.mean(0), share), rtol=1e-5)
    assert np.abs(slopes[1] - slopes[0]).max() > 0.1
    assert "small_batch_norm(" in repr(fixed)


@pytest.fixture
def quick(tmp_path, data_dir, monkeypatch):
    load = functools.partial(norm_batch.tasks.data.load, data_dir=data_dir)
    monkeypatch.setattr(norm_batch.tasks.data, "load", load)
    norm_batch._data.cache_clear()
    options = {"resume": tmp_path / "absent.json", "output": tmp_path}
    return dataclasses.replace(norm_batch.QUICK, **options)


def test_results_are_written_and_taken_up_again(quick, monkeypatch):
    quick = dataclasses.replace(quick, gradient_batches=(0,))
    results = norm_batch.main(quick, Console(quiet=True))
    assert {row["norm_batch"] for row in results["runs"]} == {2, 32}
    assert (quick.output / "table.md").read_text() == norm_batch_report.markdown(results)
    monkeypatch.setattr(norm_batch, "trained", None)
    assert norm_batch.main(quick, Console(quiet=True)) == results
    other_grid = dataclasses.replace(quick, learning_rates=(0.0125, 3.2))
    assert norm_batch.main(other_grid, Console(quiet=True))["runs"] == results["runs"]
    (quick.output / "results.json").unlink()  # as if killed before the first method ended
    assert norm_batch.main(quick, Console(quiet=True))["runs"] == results["runs"]
    elsewhere = dataclasses.replace(
        quick, output=quick.output / "again", resume=quick.output / "results.json"
    )
    again = norm_batch.main(elsewhere, Console(quiet=True))
    assert again["runs"] == results["runs"]


def test_processes_give_what_one_gives(quick):
    """The arithmetic may be in another order on a core of its own."""
    quick = dataclasses.replace(quick, gradient_batches=(0,), methods=("batch_norm",))
    here = norm_batch.main(quick, Console(quiet=True))
    there = dataclasses.replace(quick, workers=1, output=quick.output / "there")
    found = norm_batch.main(there, Console(quiet=True))
    one, other = (norm_batch_results.runs_of(each) for each in (here, found))
    both = set(one) & set(other)  # choices of rates may differ
    assert len(both) >= 4
    for run in both:
        assert one[run]["test"] == pytest.approx(other[run]["test"], abs=0.1)


def test_a_task_may_hold_some_classes_and_few_examples(data_dir, monkeypatch):
    load = functools.partial(tasks.data.load, data_dir=data_dir)
    monkeypatch.setattr(tasks.data, "load", load)
    task = tasks.TASKS["digits_new_classes"]._replace(examples=50)
    parts, whole = tasks.load(task), tasks.load(tasks.TASKS["digits"])
    assert parts.train.classes == 5
    assert parts.train.train_images.shape == (50, 8, 8, 1)
    assert len(parts.train.train_labels) == len(parts.train.train_groups) == 50
    images, labels = whole.test
    np.testing.assert_array_equal(parts.test[0], images[labels >= 5])
    np.testing.assert_array_equal(parts.test[1], labels[labels >= 5] - 5)


def test_methods_start_from_a_trained_network(quick, tmp_path, monkeypatch):
    """Its parameters and statistics, but a head of its own where the classes are new."""
    task, cell = (
        tasks.TASKS["digits_new_classes"],
        Cell("digits_new_classes", 2, 2, "independent", "sgd"),
    )
    base = bases.kept("digits_first", 0, 200, tmp_path)
    for method in ("small_batch_norm", "group_norm", "online_norm"):
        trainer = norm_batch._trainer(cell, method, 10, 200)
        fresh = trainer.init(jax.random.key(0), jnp.float32(0.1))
        state = bases.started(fresh, method, task, 0, 200, tmp_path)
        chex.assert_trees_all_equal(state.params["Dense_0"], base["params"]["Dense_0"])
        chex.assert_trees_all_equal(state.params["Dense_3"], fresh.params["Dense_3"])
        assert jax.tree.structure(state) == jax.tree.structure(fresh)
        if method == "small_batch_norm":
            own = state.batch_stats["Behind_1"]["BatchNorm_0"]
            trained = base["batch_stats"]["Behind_1"]["BatchNorm_0"]
            np.testing.assert_array_equal(own["mean"][0], trained["mean"])
    monkeypatch.setattr(bases, "_trained", lambda *given: {"params": given})
    again = bases.kept.__wrapped__("digits_first", 0, 200, tmp_path)
    chex.assert_trees_all_equal(again, base)  # from its file
    monkeypatch.setattr(bases.report, "source_digest", lambda: "other code")
    other = bases.kept.__wrapped__("digits_first", 0, 200, tmp_path)
    assert list(other) == ["params"]  # trained by that code


def test_fine_tuning(quick, monkeypatch):
    """From end to end; methods with kernels of their own are left out."""
    quick = dataclasses.replace(
        quick,
        tasks=("digits_new_classes",),
        gradient_batches=(0,),
        methods=("frozen", "small_batch_norm", "small_batch_norm-standardize"),
    )
    results = norm_batch.main(quick, Console(quiet=True))
    names = {row["method"] for row in results["runs"]}
    assert names == {"frozen", "small_batch_norm", "batch_norm"}
    assert "fine-tunes digits_first" in norm_batch_report.markdown(results)
    shutil.rmtree(quick.output / "bases")
    bases.kept.cache_clear()
    monkeypatch.setattr(bases, "_trained", None)  # nothing is missing, so not called
    assert norm_batch.main(quick, Console(quiet=True)) == results


@pytest.mark.parametrize(
    ("task", "size", "method", "possible"),
    [
        ("digits", 2, "frozen", False),
        ("digits_new_classes", 2, "frozen", True),
        ("digits_new_classes", 2, "EvoNormS0", False),
        ("digits", 1, "batch_norm", False),
        ("digits", 2, "batch_norm", True),
        ("digits", 1, "small_batch_norm", True),
        ("digits", 2, "filter_response_norm", False),
        ("earth", 1, "batch_norm", True),
        ("earth", 1, "filter_response_norm", True),
    ],
)
def test_cells_in_which_a_method_has_no_statistics_are_left_out(
    task, size, method, possible
):
    cell = Cell(task, size, size, "independent", "sgd")
    assert norm_batch_plan.possible(cell, method) == possible


def test_a_part_is_every_combination():
    part = norm_batch_plan.Part(("digits",), (1, 2), ("batch_norm", "online_norm"))
    pairs = [(cell[1:4], name) for cell, name in norm_batch_plan.combinations(part)]
    assert pairs == [
        ((1, 1, "independent"), "online_norm"),
        ((2, 2, "independent"), "batch_norm"),
        ((2, 2, "independent"), "online_norm"),
        ((2, 2, "alike"), "batch_norm"),
        ((2, 2, "alike"), "online_norm"),
    ]
    part = part._replace(norm_batches=(2,), gradient_batches=(0, 32), optimizers=("adam",))
    cells = dict.fromkeys(cell for cell, _ in norm_batch_plan.combinations(part))
    assert [cell.gradient_batch for cell in cells] == [2, 2, 32, 32]
    assert {cell.optimizer for cell in cells} == {"adam"}


def test_the_plan():
    """The options choose from it; --cells all takes every combination of the options."""
    planned = list(norm_batch_plan.planned())
    assert len(planned) == len(set(planned))
    default = norm_batch.Config()
    pairs = [pair for pair in norm_batch._pairs(default) if pair[1] != norm_batch.REFERENCE]
    assert set(pairs) == set(planned)
    one = dataclasses.replace(default, tasks=("gray_mlp",), methods=("small_batch_norm",))
    chosen = {
        (cell, name)
        for cell, name in planned
        if (cell.task, name) == ("gray_mlp", "small_batch_norm")
    }
    asked = norm_batch._pairs(one)
    assert {pair for pair in asked if pair[1] != norm_batch.REFERENCE} == chosen
    every = norm_batch._pairs(dataclasses.replace(one, cells="all"))
    assert set(every) > set(asked)
    with pytest.raises(ValueError, match="none of the planned cells"):
        norm_batch._pairs(dataclasses.replace(one, tasks=("digits",)))


def results_of(scores):
    """Results of two methods in one cell, tuned at two rates."""
    cell = Cell("digits", 2, 2, "alike", "sgd")
    found = {}
    for method, tests in scores.items():
        for rate in (0.1, 0.4):
            for seed in (100, 101):
                found[Run(cell, method, rate, seed)] = {
                    "validation": 0.5 + rate,
                    "test": 0.0,
                    "lost": 0.0,
                }
        for seed, test in enumerate(tests):
            found[Run(cell, method, 0.4, seed)] = {
                "validation": 0.0,
                "test": test,
                "lost": 0.0,
            }
    config = {"tuning_seeds": [100, 101], "seeds": [0, 1, 2]}
    environment = dict.fromkeys(("jax", "flax", "python", "device", "processor"), "x")
    results = norm_batch_results.plain(found)
    return {"config": config, "environment": environment, **results}, cell


def test_tables():
    results, cell = results_of(
        {"batch_norm": (0.5, 0.6, 0.7), "online_norm": (0.90, 0.91, 0.92), "frn": (0.8,)}
    )
    assert (
        norm_batch_results.plain(norm_batch_results.runs_of(results))["runs"]
        == (results["runs"])
    )
    cells = norm_batch_results.tested(results)
    assert set(cells[cell]) == {"batch_norm", "online_norm"}  # one has no seeds yet
    gap, error = norm_batch_results.behind(cells[cell], "batch_norm")
    assert gap == pytest.approx(31.0)
    assert error == pytest.approx(np.hypot(10, 1) / 3**0.5)
    text = norm_batch_report.markdown(results)
    assert "| online_norm | 1 of 1 |" in text
    assert "| batch_norm | 0 of 1 | digits, 2 of 2, alike | 31.0 |" in text
    short = norm_batch_report.summary(results).splitlines()
    assert short[2] == "| batch_norm | 0 of 1 | −31.0 |  |  |"
    assert "**91.0 ± 0.8 (0.4)**" in text
    assert "| 60.0 ± 8.2 (0.4) |" in text
    short = norm_batch_report.at(results, "2", "digits")
    assert short.splitlines()[2:5] == [
        "| online_norm | **91.0 ± 0.6** |",
        "| batch_norm | 60.0 ± 5.8 |",
        "",
    ]
    added = norm_batch_results.runs_of(results)
    for size in (2, 32):
        other = Cell("digits", size, size, "independent", "sgd")
        score = {"validation": 0.9, "test": 0.9, "lost": 0.0}
        added |= {Run(other, "batch_norm", 0.1, s): score for s in (100, 101, 0, 1, 2)}
    short = norm_batch_report.at(results | norm_batch_results.plain(added), "2", "digits")
    assert short.splitlines()[2:5] == [
        "| online_norm |  | **91.0 ± 0.6** |",
        "| batch_norm | **90.0 ± 0.0** | 60.0 ± 5.8 |",
        "| batch_norm@32 | 90.0 ± 0.0 |  |",
    ]
    score = {"validation": 0.9, "test": 0.8, "lost": 0.0}
    for cell in (Cell("digits", 2, 32, "alike", kind) for kind in ("sgd", "adam")):
        added |= {Run(cell, "batch_norm", 0.1, s): score for s in (100, 101, 0, 1, 2)}
    many = results | norm_batch_results.plain(added)
    assert "| alike, Adam, steps of 32 | batch_norm |" in norm_batch_report.markdown(many)
    adam = Cell("digits", 2, 32, "alike", "adam")
    assert norm_batch_results.where(adam) == "digits, 2 of 32, alike, Adam"
    short = norm_batch_report.at(many, "2", "digits/32")
    assert short.splitlines()[:3] == [
        "| method | digits, alike, steps of 32 |",
        "| --- | --- |",
        "| batch_norm | **80.0 ± 0.0** |",
    ]


def test_the_methods_that_are_as_good_as_the_best():
    """In every cell, without methods that nobody would choose for it."""
    results, _ = results_of(
        {
            "batch_norm": (0.5, 0.6, 0.7),
            "online_norm": (0.90, 0.91, 0.92),
            "small_batch_norm": (0.90, 0.91, 0.91),
            "group_norm": (0.70, 0.71, 0.72),
        }
    )
    lines = norm_batch_report.choices(results, "scratch").splitlines()
    assert lines[2] == "| digits, 2 of 2, alike | small_batch_norm | −31.0 |"
    assert "digits" not in norm_batch_report.choices(results, "tuned")
    alone, _ = results_of({"small_batch_norm": (0.90, 0.91, 0.91)})
    assert "digits" not in norm_batch_report.choices(alone, "scratch")  # nothing to compare


def test_windows_of_several_lengths():
    alike, added = Cell("digits", 2, 2, "alike", "sgd"), {}
    for name, score in (("streaming_batch_norm-8", 0.8), ("small_batch_norm", 0.9)):
        result = {"validation": 0.5, "test": score, "lost": 0.0}
        added |= {Run(alike, name, 0.1, seed): result for seed in (100, 101, 0, 1, 2)}
    results = results_of({})[0] | norm_batch_results.plain(added)
    assert (
        "window: 80.0 ± 0.0 % with 8 examples, 90.0 ± 0.0 % with 32 examples."
        in norm_batch_report.windows(results, "digits")
    )


def test_figures(tmp_path):
    """Of several norm batches, and of pairs that are independent or alike."""
    found, scores = {}, {"batch_norm": 0.5, "small_batch_norm": 0.9}
    for size, pairing, name in itertools.product(
        (2, 4, 32), norm_batch_figures.PAIRINGS, scores
    ):
        cell = Cell("digits", size, size, pairing, "sgd")
        result = {"validation": 0.5, "test": scores[name], "lost": 0.0}
        found |= {Run(cell, name, 0.1, seed): result for seed in (100, 101, 0, 1, 2)}
    results = results_of({})[0] | norm_batch_results.plain(found)
    cells = norm_batch_results.tested(results)
    pairs = norm_batch_figures._pairs(cells, "digits")
    assert norm_batch_figures._ordered([pairs]) == ["batch_norm", "small_batch_norm"]
    for name, draw in norm_batch_figures.FIGURES.items():
        draw(results, tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 3_000


def test_masks(tmp_path, monkeypatch):
    """From training to the figure, on maps of two halves."""
    rng = np.random.default_rng(0)
    images = rng.random((24, 16, 16, 3), np.float32)
    labels = (images[..., 0] > 0.5).astype(np.int32)
    maps = dataset.Dataset("maps", images, labels, images, labels, 3, np.arange(24))
    monkeypatch.setattr(tasks.data, "load", lambda name, examples: maps)
    norm_batch._data.cache_clear()
    config = dataclasses.replace(masks.QUICK, epochs=0.1, output=tmp_path)
    results = masks.main(config, Console(quiet=True))
    norm_batch._data.cache_clear()
    assert [cell["method"] for cell in results["cells"]] == list(config.methods)
    for cell in results["cells"]:
        assert {len(mask) for mask in cell["masks"]} == {16 * 16}
        assert 0 <= cell["score"] <= 1
    rare = int(labels.mean() < 0.5)  # those with most of the rarer class are drawn
    counts = np.sort((labels == rare).sum((1, 2)))[-config.tiles :]
    drawn = [truth.count(str(rare)) for truth in results["truth"]]
    np.testing.assert_array_equal(np.sort(drawn), counts)
    assert (tmp_path / "masks.svg").stat().st_size > 3_000
    assert masks.markdown(results) == (tmp_path / "table.md").read_text()
    without = dataclasses.replace(config, learning_rate=None, rates=tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no rate for batch_norm on earth at norm"):
        masks.main(without, Console(quiet=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("cats",)}, "task 'cats' is unknown; known are digits, digits_first"),
        ({"methods": ("none",)}, "method 'none' is unknown; known are batch_norm"),
    ],
)
def test_unknown_names(quick, options, message):
    with pytest.raises(ValueError, match=message):
        norm_batch.main(dataclasses.replace(quick, **options), Console(quiet=True))


def test_the_committed_results_are_those_of_the_plan():
    """Running the plan again trains nothing."""
    found = norm_batch_results.tested(json.loads(tables.results("norm_batch")))
    missing = [
        (*cell, name)
        for cell, name in norm_batch._pairs(norm_batch.Config())
        if name.partition("@")[0] not in found.get(cell, {})
    ]
    assert missing == []
