# SPDX-License-Identifier: Apache-2.0
"""Step times side by side: every round times each candidate once and gives ratios."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.lib.training import Trainer

Runner = Callable[[int], None]  # makes a number of steps, and waits for the last


class StepTime(NamedTuple):
    """Time of a step, and its ratio to that of the baseline in the same round."""

    milliseconds: float
    ratio: float
    ratio_low: float  # quartiles of the ratio
    ratio_high: float


def make_runners(
    trainers: dict[str, tuple[Trainer, int]], images: np.ndarray, labels: np.ndarray
) -> dict[str, Runner]:
    """Runners; each trains on the same first examples repeatedly."""
    images, labels = jax.device_put((images, labels))

    def runner(trainer: Trainer, batch_size: int) -> Runner:
        rows = np.arange(batch_size, dtype=np.int32)
        state = trainer.init(jax.random.key(0))

        def run(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state, _ = trainer.step(state, images, labels, rows)
            jax.block_until_ready(state)

        return run

    return {name: runner(*pair) for name, pair in trainers.items()}


def steps_in(seconds: float, run: Runner) -> int:
    """The number of steps that take about ``seconds``, at least one."""
    run(1)  # compiles
    begin = time.perf_counter()
    run(1)
    return max(1, round(seconds / (time.perf_counter() - begin)))


def side_by_side(
    runners: dict[str, Runner], baseline: str, rounds: int, steps: int
) -> dict[str, StepTime]:
    """Median time of a step, and of its ratio to the baseline's in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds + 1):
        for name, run in runners.items():
            begin = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - begin) / steps)
    # The first round compiles.
    times = {name: np.array(values[1:]) for name, values in seconds.items()}
    return {name: _summary(values, times[baseline]) for name, values in times.items()}


def _summary(seconds: np.ndarray, baseline: np.ndarray) -> StepTime:
    low, middle, high = np.percentile(seconds / baseline, [25, 50, 75])
    milliseconds = 1e3 * float(np.median(seconds))
    return StepTime(milliseconds, float(middle), float(low), float(high))
