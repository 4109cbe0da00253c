# SPDX-License-Identifier: Apache-2.0
"""Which method trains with few examples per norm batch?

Trains networks on real data: gray and color images, solar cells, maps, a brain. Statistics
are taken over a norm batch. A step of the optimizer takes a gradient batch. The gradient
batch is one norm batch, or 32 examples in norm batches that are normalized separately, each
with its own state. Norm batches hold independent examples or examples that are alike: of
one class, or neighbors on a map. Every method gets its own rate in every cell. Validation
data and three seeds choose the rate from a grid that grows until the best rate lies inside.
Other seeds are tested.

Some tasks fine-tune. ``nn.BatchNorm`` has trained the network with 32 examples per step, on
other pictures or other classes. ``replace_batch_norm`` then replaces it by each method.

Finished runs come from the results, or from the files of an interrupted call. Run it with
``python -m benchmarks.studies.norm_batch``.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console

    from cbn_jax.linen import replace_batch_norm

from benchmarks.lib import bases, compared, networks, replicas, report, runs, study, tasks
from benchmarks.studies import norm_batch_figures
from benchmarks.studies import norm_batch_plan as plan
from benchmarks.studies.norm_batch_report import markdown
from benchmarks.studies.norm_batch_results import Cell, Found, Run, plain, runs_of, tested

Pairing = Literal["independent", "alike"]
Optimizer = Literal["sgd", "adam"]
COMMITTED = Path("benchmarks/results/norm_batch/results.json")  # in a checkout
REFERENCE = "batch_norm@32"  # batch norm over 32 examples, in steps of 32
FACTOR = 4.0  # between rates of the grid
PRECISE = 1024  # examples for recomputed statistics


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    tasks: tuple[str, ...] = tuple(
        name for name in tasks.TASKS if not name.endswith("_first")
    )
    """Tasks: digits (embedded), gray_mlp, gray_resnet, emoji, cells, earth, brain; and, to
    fine-tune, digits_new_classes (embedded), gray_new_classes, emoji_new_domain,
    emoji_new_domain_few, earth_new_domain."""
    norm_batches: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of examples that are normalized together."""
    gradient_batches: tuple[int, ...] = (0, 32)
    """Examples per step of the optimizer; 0 means as many as in the norm batch."""
    pairings: tuple[Pairing, ...] = ("independent", "alike")
    """Relation of the examples of a norm batch."""
    optimizers: tuple[Optimizer, ...] = ("sgd", "adam")
    """SGD with momentum 0.9, or Adam."""
    methods: tuple[str, ...] = tuple(compared.METHODS)
    """Methods to compare, besides batch norm at 32. Some are ablations: -group_norm has
    group norm after the method, -constant no gradient through the window, and
    streaming_batch_norm-8 and -128 have windows of 8 and 128 examples."""
    cells: Literal["planned", "all"] = "planned"
    """planned: those of the cells and methods of the options that decide a question, in
    norm_batch_plan.py. all: every method in every cell of the options."""
    learning_rates: tuple[float, ...] = (0.025, 0.1, 0.4)
    """The initial grid: rates for 32 examples per step, scaled in proportion to the step.
    Those of Adam are a hundredth of these, scaled by the root of the step. If the results
    have rates of a method in a cell, these are its initial grid."""
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    """Seeds of the runs that choose the rate, on validation data."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs that are tested, at the chosen rate."""
    epochs: float = 1.0
    """Multiple of the usual number of passes of each task."""
    examples: int | None = 20000
    """Largest number of examples for training, and for testing."""
    workers: int = 2
    """Number of processes, each on its own core. 0 uses this process only, which
    a GPU requires."""
    resume: Annotated[Path, tyro.conf.arg(metavar="FILE")] = COMMITTED
    """Earlier results. Runs with the same options are taken from them."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/norm_batch")
    """Folder for results.json, table.md and the figures."""


QUICK = Config(
    tasks=("digits",),
    norm_batches=(2,),
    gradient_batches=(0, 32),
    pairings=("alike",),
    methods=("batch_norm", "carried_batch_norm"),
    optimizers=("sgd",),
    cells="all",
    learning_rates=(0.05, 0.2),
    tuning_seeds=(100,),
    seeds=(0, 1),
    epochs=0.25,
    examples=300,
    workers=0,
)


# One training.


@functools.lru_cache(maxsize=2)
def _data(task: str, examples: int | None) -> tasks.Parts:
    return tasks.load(tasks.TASKS[task], examples)


@functools.lru_cache(maxsize=2)
def _trainer(cell: Cell, method: str, steps: int, examples: int | None) -> replicas.Trainer:
    task, train = tasks.TASKS[cell.task], _data(cell.task, examples).train
    norm = compared.METHODS[method](compared.Setting(cell.norm_batch, steps, task.groups))
    make = functools.partial(
        networks.NETWORKS[task.network], classes=train.classes, width=task.width
    )
    if task.before:
        model = replace_batch_norm(make(norm=compared.flax_batch_norm), norm.estimator)
    else:
        model = make(norm=norm)
    return replicas.make_trainer(
        model,
        train.train_images.shape[1:],
        train.classes,
        cell.shape[0],
        replicas.make_optimizer(cell.optimizer, steps, cell.gradient_batch),
    )


def peak(cell: Cell, rate: float) -> float:
    """The rate of a step, from that for 32 examples per step."""
    share = cell.gradient_batch / 32
    return rate * share if cell.optimizer == "sgd" else 0.01 * rate * share**0.5


def _rows(config: Config, cell: Cell, seed: int) -> list[np.ndarray]:
    """Rows of every step, for a part of a pass or for several passes."""
    train = _data(cell.task, config.examples).train
    groups = train.train_groups if cell.pairing == "alike" else None
    passes, count = tasks.TASKS[cell.task].epochs * config.epochs, len(train.train_labels)
    whole = math.ceil(passes)
    rows = list(tasks.batches(groups, count, cell.shape, whole, seed))
    return rows[: max(1, round(len(rows) * passes / whole))]


def fitted(config: Config, run: Run) -> tuple[replicas.Trainer, replicas.State, jax.Array]:
    """Trains one run: its trainer, its last state and its last loss."""
    cell, task = run.cell, tasks.TASKS[run.cell.task]
    rows, train = _rows(config, cell, run.seed), _data(cell.task, config.examples).train
    trainer = _trainer(cell, run.method, len(rows), config.examples)
    rate = jnp.float32(peak(cell, run.rate))
    state, loss = trainer.init(jax.random.key(run.seed), rate), jnp.zeros(())
    if task.before:
        given = run.seed, config.examples, config.output
        state = bases.started(state, run.method, task, *given)
    data = jax.device_put((train.train_images, train.train_labels))
    for chosen in rows:
        state, loss = trainer.step(state, *data, chosen)
    if run.method in compared.PRECISE:
        last = np.concatenate(rows)[: PRECISE // cell.norm_batch]
        state = replicas.recomputed(trainer, state, data[0], last)
    return trainer, state, loss


def trained(config: Config, run: Run) -> dict[str, float]:
    """Trains one run: its scores on validation and test data, and whether it was lost."""
    trainer, state, loss = fitted(config, run)
    parts = _data(run.cell.task, config.examples)
    dense = tasks.TASKS[run.cell.task].dense
    found = {
        name: tasks.score(replicas.counted(trainer, state, *pair), dense)
        for name, pair in (("validation", parts.validation), ("test", parts.test))
    }
    return {**found, "lost": float(not np.isfinite(float(loss)))}


def kept(config: Config, run: Run) -> dict[str, float]:
    """Scores of one run, from its file if an interrupted call finished the run."""
    identity = {
        **run.cell._asdict(),
        **run._replace(cell=None)._asdict(),
        "epochs": config.epochs,
        "examples": config.examples,
    }
    path = config.output / "runs" / "-".join(map(str, (*run.cell, *run[1:])))
    return runs.kept(path, identity, lambda: trained(config, run), lambda: None)


# All of them.


def main(config: Config, console: Console) -> dict:
    """Executes missing runs, writes results after each, and shows all results."""
    _check(config)
    found = _resumed(config)
    pairs = _missing(config, found)
    with runs.Bar(console, len(pairs)) as bar, _pool(config) as pool:
        bar.advance(0, "networks to fine-tune")
        list(pool.map(functools.partial(_trained_before, config), *_bases(config, pairs)))
        jobs = {pool.submit(_pair, config, pair, _of(found, pair)): pair for pair in pairs}
        for job in concurrent.futures.as_completed(jobs):
            found.update(job.result())
            cell, method = jobs[job]
            bar.advance(1, f"{cell.task} {cell.norm_batch} {method}")
            _write(config, found)
    return study.publish(
        config, plain(found), console, markdown, **norm_batch_figures.FIGURES
    )


def _check(config: Config) -> None:
    """Checks that tasks and methods are known."""
    for kind, names, known in (
        ("task", config.tasks, tasks.TASKS),
        ("method", config.methods, compared.METHODS),
    ):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{kind} {name!r} is unknown; known are {', '.join(known)}."
                )


def _pairs(config: Config) -> list[plan.Pair]:
    """Cells and methods of the options; of these, the planned ones if so asked."""
    options = (getattr(config, name) for name in plan.Part._fields)
    pairs = list(plan.combinations(plan.Part(*options)))
    if config.cells == "planned":
        known = set(plan.planned())
        pairs = [pair for pair in pairs if pair in known]
    if not pairs:
        raise ValueError(
            "none of the planned cells and methods has these options; give --cells all to "
            "run every method in every cell of the options."
        )
    cells = dict.fromkeys(cell for cell, _ in pairs)
    return pairs + [(cell, REFERENCE) for cell in _references(list(cells))]


def _missing(config: Config, found: Found) -> list[plan.Pair]:
    """The pairs without results."""
    done = tested({"config": report.plain(config), **plain(found)})
    return [pair for pair in _pairs(config) if _name(pair[1]) not in done.get(pair[0], {})]


def _bases(config: Config, pairs: list[plan.Pair]) -> tuple[list[str], list[int]]:
    """Tasks and seeds of the networks that are trained before fine-tuning."""
    before = sorted({tasks.TASKS[cell.task].before for cell, _ in pairs} - {""})
    made = list(itertools.product(before, (*config.tuning_seeds, *config.seeds)))
    return [name for name, _ in made], [seed for _, seed in made]


def _trained_before(config: Config, task: str, seed: int) -> None:
    bases.kept(task, seed, config.examples, config.output)


def _references(cells: Sequence[Cell]) -> list[Cell]:
    """Batch norm over 32 examples, for each task and optimizer."""
    every = {(cell.task, cell.optimizer) for cell in cells}
    return [Cell(task, 32, 32, "independent", kind) for task, kind in sorted(every)]


class _Here(concurrent.futures.Executor):
    """Runs jobs immediately, in this process."""

    def submit(self, fn, /, *args, **kwargs):
        """The result, as a completed future."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _pool(config: Config) -> concurrent.futures.Executor:
    if not config.workers:
        return _Here()
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    return concurrent.futures.ProcessPoolExecutor(
        config.workers, context, initializer=_on_own_core, initargs=(counter,)
    )


def _on_own_core(counter: Any) -> None:
    """Uses one core per run, because small operations do not gain from threads."""
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def _of(found: Found, pair: tuple[Cell, str]) -> Found:
    """The runs of a method in a cell."""
    cell, method = pair[0], _name(pair[1])
    return {run: found[run] for run in found if (run.cell, run.method) == (cell, method)}


def _name(method: str) -> str:
    return method.partition("@")[0]


def _pair(config: Config, pair: tuple[Cell, str], found: Found) -> Found:
    """All runs of a method in a cell: rates until the best lies inside, then seeds."""
    cell, name = pair[0], _name(pair[1])
    new: Found = {}

    def scores(rate: float, seeds: Sequence[int]) -> list[dict[str, float]]:
        for seed in seeds:
            run = Run(cell, name, rate, seed)
            if run not in found and run not in new:
                new[run] = kept(config, run)
        asked = (Run(cell, name, rate, seed) for seed in seeds)
        return [new[run] if run in new else found[run] for run in asked]

    def validation(rate: float) -> float:
        found = scores(rate, config.tuning_seeds)
        return float(np.mean([each["validation"] for each in found]))

    tuned = {run.rate for run in found if run.seed in config.tuning_seeds}
    grid = sorted(tuned) if len(tuned) > 1 else config.learning_rates
    scores(best_rate(validation, grid), config.seeds)
    return new


def best_rate(validation: Any, grid: Sequence[float], most: int = 4) -> float:
    """The best rate of a grid, which grows while the best rate is at an edge.

    The largest of several best rates counts.
    """
    found = {rate: validation(rate) for rate in sorted(grid)}
    for _ in range(most):
        best = max(found, key=lambda rate: (found[rate], rate))
        if best not in (min(found), max(found)) or len(found) == 1:
            break
        new = best * FACTOR if best == max(found) else best / FACTOR
        new = float(f"{new:.5g}")  # as results are written
        found[new] = validation(new)
    return max(found, key=lambda rate: (found[rate], rate))


# Results as files.


def _write(config: Config, found: Found) -> None:
    """Writes the results so far, from which a later call resumes."""
    results = {"config": report.plain(config), "environment": report.environment()}
    report.write_results(config.output / "results.json", {**results, **plain(found)})


def _resumed(config: Config) -> Found:
    """Runs of earlier calls, from this output folder and from the committed results."""
    found: Found = {}
    for path in (config.resume, config.output / "results.json"):
        if path.exists():
            results = json.loads(path.read_text())
            same = all(
                results["config"][name] == getattr(config, name)
                for name in ("epochs", "examples")
            )
            found.update(runs_of(results) if same else {})
    return found


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
