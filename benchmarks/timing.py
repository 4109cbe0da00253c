# SPDX-License-Identifier: Apache-2.0
"""Step times side by side: every round times each candidate once, ratios are per round."""

import time
from typing import NamedTuple

import jax
import numpy as np

from .training import Trainer


class StepTime(NamedTuple):
    """Time of a step, and its ratio to the baseline's in the same round."""

    milliseconds: float
    ratio: float
    ratio_low: float  # quartiles of the ratio
    ratio_high: float


def time_steps(
    trainers: dict[str, tuple[Trainer, int]],
    images: np.ndarray,
    labels: np.ndarray,
    baseline: str,
    rounds: int,
    steps: int = 10,
) -> dict[str, StepTime]:
    """Median step time of each (trainer, batch size), interleaved in one process."""
    images, labels = jax.device_put((images, labels))
    states = {name: t.init(jax.random.key(0)) for name, (t, _) in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):
        for name, (trainer, batch_size) in trainers.items():
            rows = np.arange(batch_size, dtype=np.int32)
            begin = time.perf_counter()
            for _ in range(steps):
                states[name], _ = trainer.step(states[name], images, labels, rows)
            jax.block_until_ready(states[name])
            seconds[name].append((time.perf_counter() - begin) / steps)
    # The first round compiles.
    times = {name: np.array(values[1:]) for name, values in seconds.items()}
    return {name: _summary(values, times[baseline]) for name, values in times.items()}


def _summary(seconds: np.ndarray, baseline: np.ndarray) -> StepTime:
    low, middle, high = np.percentile(seconds / baseline, [25, 50, 75])
    milliseconds = 1e3 * float(np.median(seconds))
    return StepTime(milliseconds, float(middle), float(low), float(high))
