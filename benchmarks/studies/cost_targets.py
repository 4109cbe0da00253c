# SPDX-License-Identifier: Apache-2.0
"""Targets for the cost of methods, and what a missed target for the time is made of."""

from typing import NamedTuple

from benchmarks.lib import methods, profile, report
from benchmarks.studies import cost_tables as tables


class Target(NamedTuple):
    """A limit for a method; None means every network or size."""

    method: str
    network: str | None
    batch_size: int | None
    quantity: str
    most: float

    def concerns(self, cell: dict) -> bool:
        """Whether the target applies to the cell."""
        return (
            self.method == cell["label"]
            and self.network in (None, cell["network"])
            and self.batch_size in (None, cell["batch_size"])
            and (self.quantity != "time" or cell["time"] is not None)
        )

    def missed(self, base: dict, cell: dict) -> bool:
        """Whether the cell misses the target."""
        return (
            self.concerns(cell) and tables.QUANTITIES[self.quantity](base, cell) > self.most
        )


# Methods whose state is a few numbers per feature.
LIGHT = (
    "batch_renorm",
    "moving_average_batch_norm",
    "bidirectional_batch_norm",
    "momentum_batch_norm",
)
TARGETS: tuple[Target, ...] = (
    Target("batch_norm", None, None, "time", 1.02),
    Target("small_batch_norm", "resnet18", 1, "time", 1.3),
    Target("small_batch_norm", "resnet18", 2, "time", 1.2),
    Target("small_batch_norm", "resnet18", 8, "time", 1.08),
    Target("small_batch_norm", "mlp", 2, "time", 1.4),
    Target("small_batch_norm", "mlp", 8, "time", 1.4),
    Target("small_batch_norm", "resnet18", 2, "bytes", 1.55),
    Target("small_batch_norm", "resnet18", 2, "compile", 2.5),
    Target("small_batch_norm", "resnet18", 2, "fusions", 20),
    Target("small_batch_norm", "resnet18", 2, "state / θ", 1.05),
    Target("carried_batch_norm", "resnet18", 1, "time", 1.15),
    Target("carried_batch_norm", "resnet18", 2, "time", 1.08),
    Target("carried_batch_norm", "resnet18", 8, "time", 1.05),
    Target("carried_batch_norm", "resnet18", 2, "bytes", 1.3),
    Target("carried_batch_norm", "resnet18", 2, "compile", 1.8),
    Target("carried_batch_norm", "resnet18", 2, "state / θ", 0.01),
    Target("cross_iteration_batch_norm", "resnet18", 2, "time", 1.5),
    Target("cross_iteration_batch_norm", "resnet18", 2, "compile", 2.0),
    *(Target(name, "resnet18", 2, "time", 1.08) for name in LIGHT),
    *(Target(name, "resnet18", 2, "compile", 1.4) for name in LIGHT),
)
# Number of times that a minimal program reads or writes an array of the size of θ for the
# state.
PASSES = {
    # Reads θ for the product, and G and θ for ⟨G, θ⟩. Writes and reads the product that is
    # added to G. Reads and writes G. Reads G for the gradient.
    "small_batch_norm": 8,
    # Reads θ for ⟨p, θ⟩, for |θ|² and for the gradient.
    "carried_batch_norm": 3,
    # Reads every past slot, and θ for its product. Writes the new slot and reads θ.
    "cross_iteration_batch_norm": 2 * (methods.WINDOW - 1) + 2,
}


def slow(base: dict, cell: dict) -> bool:
    """Whether the cell misses a target for its time."""
    return any(t.quantity == "time" and t.missed(base, cell) for t in TARGETS)


class Worst(NamedTuple):
    """The cell that is nearest to missing a target, or misses it most."""

    target: Target
    base: dict
    cell: dict

    @property
    def missed(self) -> bool:
        """Whether the target is missed."""
        return self.target.missed(self.base, self.cell)


def worst_cells(results: dict) -> list[Worst]:
    """One for each target that applies to a measured cell."""
    found = []
    for target in TARGETS:
        fitting = [
            (tables.QUANTITIES[target.quantity](base, cell), Worst(target, base, cell))
            for base, cells in tables.groups(results)
            for cell in cells
            if target.concerns(cell)
        ]
        if fitting:
            found.append(max(fitting, key=lambda pair: pair[0])[1])
    return found


def met(results: dict) -> list[str]:
    """The number of met targets, if there are targets."""
    found = worst_cells(results)
    met = sum(not worst.missed for worst in found)
    return [f"{met} of {len(found)} targets are met."] if found else []


def targets(results: dict) -> str:
    """Each target, with its measurement."""
    rows = [
        (
            _sentence(worst.target),
            _measured(worst),
            "missed" if worst.missed else "met",
        )
        for worst in worst_cells(results)
    ]
    if not rows:
        return ""
    table = report.markdown_table(("target", "measured", "met or missed"), rows)
    return f"Targets, all relative to nn.BatchNorm as above:\n\n{table}"


def _sentence(target: Target) -> str:
    sign = "+" if target.quantity == "fusions" else ""
    where = (
        f"on {target.network or 'every network'}",
        f"at {f'batch size {target.batch_size}' if target.batch_size else 'every size'}",
    )
    return f"{target.method}: {target.quantity} ≤ {sign}{target.most:g} {' '.join(where)}"


def _measured(worst: Worst) -> str:
    """The measurement, with the worst cell if the target applies to several."""
    target, base, cell = worst
    place = f" on {cell['network']} at batch size {cell['batch_size']}"
    known = None not in (target.network, target.batch_size)
    return (
        tables.value_of(target.quantity, base, cell)
        + ("" if known else place)
        + tables.form(cell)
    )


class Floor(NamedTuple):
    """The least additional time of a step for the memory traffic of a state."""

    milliseconds: float
    ratio: float  # time of the step over the baseline's


def floor(base: dict, cell: dict, rates: dict) -> Floor:
    """The floor from passes over memory of the size of θ, at the rate of a large copy."""
    milliseconds = 1e3 * PASSES[cell["label"]] * cell["params"] / rates["bytes"]
    return Floor(milliseconds, 1 + milliseconds / base["time"]["milliseconds"])


def floors(results: dict) -> str:
    """The floor and the measurement of each missed time target."""
    rows = [
        _floor_row(base, cell, floor(base, cell, results["rates"]))
        for base, cells in tables.groups(results)
        for cell in cells
        if cell["label"] in PASSES and slow(base, cell)
    ]
    if not rows:
        return ""
    headings = ("net", "batch", "method", "passes", "floor", "measured")
    return (
        "Where a target for the time is missed, the floor: passes over memory of the size "
        "of θ that the state takes, at the rate of a large copy "
        f"({results['rates']['bytes'] / 1e9:.1f} GB/s), in milliseconds beyond "
        "nn.BatchNorm and as a ratio to it. Parameters that stay in a cache can take "
        f"less:\n\n{report.markdown_table(headings, rows)}"
    )


def _floor_row(base: dict, cell: dict, least: Floor) -> tuple[str, ...]:
    ratio = cell["time"]["ratio"]
    extra = (ratio - 1) * base["time"]["milliseconds"]
    return (
        cell["network"],
        str(cell["batch_size"]),
        tables.label(cell),
        str(PASSES[cell["label"]]),
        f"+{least.milliseconds:.3g} ms, {least.ratio:.2f}",
        f"{extra:+.3g} ms, {ratio:.2f}",
    )


def profiles(results: dict) -> str:
    """Parts of a step beside those of the baseline, for missed targets."""
    rows, names = [], (*profile.PARTS, profile.UNNAMED)
    for base, cells in tables.groups(results):
        for cell in (cell for cell in cells if cell["profile"] and cell is not base):
            here, usual = cell["profile"], base["profile"]
            more = {name: here.get(name, 0.0) - usual.get(name, 0.0) for name in names}
            rows.append(
                (
                    cell["network"],
                    str(cell["batch_size"]),
                    tables.label(cell),
                    f"{sum(usual.values()):.3g}",
                    *(f"{more[name]:+.2g}" for name in names),
                )
            )
    if not rows:
        return ""
    headings = ("net", "batch", "method", "nn.BatchNorm", *names)
    return (
        "Where a target for the time is missed, the milliseconds of a step that each part "
        "takes more than with nn.BatchNorm (in all), summed over threads, from one profile "
        "each:"
        f"\n\n{report.markdown_table(headings, rows)}\n"
        "derivatives: those of the statistics with respect to θ; transport: the past moved "
        "to today's θ; remember: what the state takes in; unnamed: what the compiler left "
        "without a name or added, weight gradients of convolutions (the derivatives' among "
        "them), copies and changes of layout.\n"
    )
