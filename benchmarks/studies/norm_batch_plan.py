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
OURS = ("small_batch_norm-standardize", "small_batch_norm-standardize-group_norm")
RIVALS = ("batch_renorm", "EvoNormS0", "moving_average_batch_norm", "online_norm")
WINDOWS = ("streaming_batch_norm-8", "streaming_batch_norm-128")


class Part(NamedTuple):
    """All combinations of these options, which are those of ``norm_batch``."""

    tasks: Sequence[str]
    norm_batches: Sequence[int]
    methods: Sequence[str]
    pairings: Sequence[str] = ("independent", "alike")
    gradient_batches: Sequence[int] = (0,)
    optimizers: Sequence[str] = ("sgd",)


INDEPENDENT, ALIKE = ("independent",), ("alike",)

# Each part answers a question. All combinations would take far longer.
PLAN = (
    # Does the error depend on the norm batch?
    Part(("gray_mlp",), (1, 2, 4, 8), MAIN, INDEPENDENT),
    Part(("gray_resnet",), (2, 4, 8), MAIN, INDEPENDENT),
    # Does it depend on whether pairs are alike?
    Part(("gray_mlp", "gray_resnet"), (2,), (*MAIN, "carried_batch_norm", OURS[0])),
    Part(("gray_mlp",), (2,), (*RIVALS, "cross_iteration_batch_norm")),
    Part(("cells",), (2,), ("batch_norm", *MAIN[2:]), ALIKE),
    # Many norm batches in a step, as on many devices.
    Part(("gray_mlp",), (2,), (*MAIN, "carried_batch_norm", *OURS), gradient_batches=(32,)),
    Part(("gray_mlp",), (2,), RIVALS, gradient_batches=(32,)),
    Part(("gray_mlp",), (2,), ("batch_norm-precise",), ALIKE, (32,)),
    Part(("gray_resnet",), (2,), (*MAIN, *OURS), ALIKE, (32,)),
    Part(("cells",), (2,), (*MAIN, *OURS, *RIVALS[:3]), ALIKE, (32,)),
    Part(("cells",), (2,), ("batch_norm-precise", "filter_response_norm"), ALIKE, (32,)),
    # Adam.
    Part(("gray_mlp",), (2,), MAIN, ALIKE, (32,), ("adam",)),
    # Which part of small_batch_norm helps: compensation, gradient, length of the window?
    Part(("gray_mlp",), (2,), ("momentum_batch_norm",)),
    Part(
        ("gray_mlp",),
        (2,),
        ("momentum_batch_norm", "small_batch_norm-constant"),
        gradient_batches=(32,),
    ),
    Part(("gray_mlp",), (2,), (*WINDOWS, "small_batch_norm-group_norm"), ALIKE),
    # Maps and volumes, one a step.
    Part(("earth",), (1,), (*MAIN, "carried_batch_norm", *OURS), INDEPENDENT),
    Part(("earth",), (1,), ("small_batch_norm-group_norm",), INDEPENDENT),
    Part(("brain",), (1,), ("batch_norm", *MAIN[2:], OURS[1]), INDEPENDENT),
    # Fine-tuning: other pictures, the other half of the Earth, few examples, other classes.
    Part(("emoji_new_domain", "earth_new_domain"), (1,), TUNED, INDEPENDENT),
    Part(("emoji_new_domain", "emoji_new_domain_few", "gray_new_classes"), (2,), TUNED),
    Part(("emoji_new_domain",), (2,), ("carried_batch_norm",)),
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
