# SPDX-License-Identifier: Apache-2.0
"""Cells of the study of norm batches, and the methods to compare in each."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.lib import compared, tasks
from benchmarks.studies.norm_batch_results import Cell

Pair = tuple[Cell, str]

MAIN = ("batch_norm", "group_norm", "group_norm-standardize", "small_batch_norm")
TUNED = ("batch_norm", "frozen", "group_norm", "small_batch_norm")
RIVALS = (
    "batch_norm-precise",
    "batch_renorm",
    "cross_iteration_batch_norm",
    "EvoNormS0",
    "filter_response_norm",
    "moving_average_batch_norm",
    "online_norm",
)
ABLATIONS = (
    "carried_batch_norm",
    "momentum_batch_norm",
    "small_batch_norm-constant",
    "small_batch_norm-standardize",
    "small_batch_norm-standardize-group_norm",
)


class Part(NamedTuple):
    """All combinations of these options, which are those of ``norm_batch``."""

    tasks: Sequence[str]
    norm_batches: Sequence[int]
    methods: Sequence[str]
    pairings: Sequence[str] = ("independent", "alike")
    gradient_batches: Sequence[int] = (0,)
    optimizers: Sequence[str] = ("sgd",)


#: Each part answers a question. All combinations would take weeks on two cores.
PLAN = (
    # Does the error depend on the norm batch?
    Part(("gray_mlp", "gray_resnet"), (4, 8), MAIN, ("independent",)),
    Part(("gray_mlp",), (1, 2, 4, 8), MAIN, ("independent",), (32,)),
    # Does it depend on whether the examples of a norm batch are alike?
    Part(("gray_mlp", "gray_resnet"), (2,), (*MAIN, "carried_batch_norm")),
    # All methods, and parts of small_batch_norm.
    Part(("gray_mlp",), (2,), (*MAIN, *RIVALS, *ABLATIONS), gradient_batches=(32,)),
    Part(("cells",), (2,), (*MAIN, *RIVALS, *ABLATIONS), ("alike",), (32,)),
    # Maps and volumes, one a step.
    Part(("earth", "brain"), (1,), MAIN, ("independent",)),
    # Fine-tuning: another style, another half of the Earth, other classes, few examples.
    Part(("emoji_new_domain", "earth_new_domain"), (1,), TUNED, ("independent",)),
    Part(("emoji_new_domain", "emoji_new_domain_few", "gray_new_classes"), (2,), TUNED),
)


def combinations(part: Part) -> Iterator[Pair]:
    """The cells of a part, each with the methods that are possible there."""
    for task, norm, gradient, pairing, optimizer in itertools.product(
        part.tasks,
        part.norm_batches,
        part.gradient_batches,
        part.pairings,
        part.optimizers,
    ):
        cell = Cell(task, norm, gradient or norm, pairing, optimizer)
        if not (norm == 1 and pairing == "alike"):  # one example is always alike
            yield from ((cell, name) for name in part.methods if possible(cell, name))


def planned() -> Iterator[Pair]:
    """The pairs of the plan, each once."""
    yield from dict.fromkeys(itertools.chain.from_iterable(map(combinations, PLAN)))


def possible(cell: Cell, method: str) -> bool:
    """Whether the method has statistics in the cell, and fits the earlier training.

    A dense layer has one value per feature and example. Batch norm needs two values. Filter
    response norm normalizes over an example's positions. Only a trained network can be
    frozen.
    """
    task = tasks.TASKS[cell.task]
    if task.before and (method in compared.OTHER_NETWORKS):
        return False
    if method == "frozen" and not task.before:
        return False
    if task.network != "mlp":
        return True
    base = method.removesuffix("-precise")
    needs_two = base in ("batch_norm", "batch_renorm", "cross_iteration_batch_norm")
    return method != "filter_response_norm" and not (needs_two and cell.norm_batch == 1)
