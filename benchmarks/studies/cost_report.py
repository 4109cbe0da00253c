# SPDX-License-Identifier: Apache-2.0
"""What the study of cost writes and shows."""

from benchmarks.lib import study
from benchmarks.studies.cost_tables import brief, of, states, step_time, table, times
from benchmarks.studies.cost_targets import floors, met, profiles, targets

# Blocks of the documentation call these.
__all__ = ["brief", "floors", "markdown", "of", "states", "targets", "times", "verdict"]

# Methods in the short verdict.
VERDICTS = (
    "batch_norm",
    "carried_batch_norm",
    "small_batch_norm",
    "cross_iteration_batch_norm",
)


def markdown(results: dict) -> str:
    """A row per network, batch size and method; then targets, floors, profiles, states."""
    legend = (
        "FLOPs, bytes, time and compile: a training step's, as ratios to nn.BatchNorm, "
        "whose time and compile are given themselves (time: median and quartiles of "
        "side-by-side ratios; compile: process time to trace, lower and compile, once); "
        "fusions: those of the compiled step beyond nn.BatchNorm's, for each normalized "
        "layer; memory: arguments, results and temporary arrays; state / θ: bytes of "
        "batch_stats over bytes of the parameters. Activations: "
        f"{results['config']['precision']}. {study.measured_on(results)}"
    )
    parts = (
        f"{table(results)}\n{legend}",
        verdict(results),
        targets(results),
        floors(results),
        profiles(results),
        states(results),
    )
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def verdict(results: dict) -> str:
    """The times of the main methods, and the number of met targets."""
    names = {cell["label"] for cell in results["cells"] if cell["time"]}
    sentences = [step_time(results, name) for name in VERDICTS if name in names]
    return "\n".join([*sentences, *met(results)])
