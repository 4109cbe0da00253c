# SPDX-License-Identifier: Apache-2.0
"""Tables of the cost of each method, relative to Flax's batch norm."""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.lib import report, study

BASELINE = "nn.BatchNorm"
SHAPES = {
    "mlp": (14, 14, 1),
    "cnn": (8, 8, 1),
    "stage": (32, 32, 3),
    "resnet18": (32, 32, 3),
    "resnet50": (224, 224, 3),
}
# Quantity -> its value from the cell of the baseline and the cell of a method.
QUANTITIES: dict[str, Callable[[dict, dict], float]] = {
    "FLOPs": lambda base, cell: cell["flops"] / base["flops"],
    "bytes": lambda base, cell: cell["bytes"] / base["bytes"],
    "time": lambda base, cell: cell["time"]["ratio"],
    "compile": lambda base, cell: cell["compile"] / base["compile"],
    "fusions": lambda base, cell: (cell["fusions"] - base["fusions"]) / base["layers"],
    "state / θ": lambda base, cell: cell["state"] / cell["params"],
}


def of(results: dict, *labels: str) -> str:
    """The cost of some methods relative to Flax's batch norm; of all without labels."""
    return _relative(results, _pairs(results, labels))


def brief(results: dict, *labels: str) -> str:
    """The cost of some methods on resnet18, and the slowest cell of each."""
    pairs = _pairs(results, labels)
    slowest = [_slowest([cell for _, cell in pairs if cell["label"] == n]) for n in labels]
    shown = [
        (base, cell)
        for base, cell in pairs
        if cell["network"] == "resnet18" or cell in slowest
    ]
    return _relative(results, shown)


def _pairs(results: dict, labels: Sequence[str]) -> list[tuple[dict, dict]]:
    """(the cell of the baseline, a method's cell), of all methods without labels."""
    return [
        (base, cell)
        for base, cells in groups(results)
        for cell in cells
        if cell is not base and cell["label"] in (labels or (cell["label"],))
    ]


def _slowest(cells: list[dict]) -> dict:
    return max(cells, key=lambda cell: cell["time"]["ratio"])


def _relative(results: dict, pairs: list[tuple[dict, dict]]) -> str:
    """A row for each cell, beginning with the quantities that matter most."""
    headings = ("method", "net", "batch", "time", "state / θ", "FLOPs", "bytes")
    rows = [
        (
            label(cell),
            cell["network"],
            str(cell["batch_size"]),
            _time(cell),
            f"{cell['state'] / cell['params']:.2f}",
            *(value_of(quantity, base, cell) for quantity in headings[5:]),
        )
        for base, cell in pairs
    ]
    return (
        f"{report.markdown_table(headings, rows)}\nA training step's time, FLOPs and bytes "
        "as ratios to Flax's batch norm (time: median and quartiles of side-by-side "
        "ratios); bytes of batch_stats over bytes of the parameters. "
        f"{study.measured_on(results)}\n"
    )


def groups(results: dict) -> list[tuple[dict, list[dict]]]:
    """(the cell of the baseline, its whole group) for each network and batch size."""
    cells = results["cells"]
    starts = [i for i, cell in enumerate(cells) if cell["label"] == BASELINE]
    ends = [*starts[1:], len(cells)]
    return [(cells[i], cells[i:j]) for i, j in zip(starts, ends, strict=True)]


def table(results: dict) -> str:
    """A row for each network, batch size and method."""
    headings = (*BESIDE, "compile", "fusions", "memory", "state / θ")
    rows = [
        (
            *_beside(base, cell),
            _beyond("compile", base, cell, f"{base['compile']:.1f} s"),
            _beyond("fusions", base, cell, f"{base['fusions']}"),
            report.size(cell["memory"]),
            value_of("state / θ", base, cell),
        )
        for base, cells in groups(results)
        for cell in cells
    ]
    return report.markdown_table(headings, rows)


def _beyond(quantity: str, base: dict, cell: dict, own: str) -> str:
    """A quantity relative to the baseline, which has the value ``own``."""
    return own if cell is base else value_of(quantity, base, cell)


def value_of(quantity: str, base: dict, cell: dict) -> str:
    """A quantity in the form of the table."""
    if quantity == "time":
        return _time(cell)
    return f"{QUANTITIES[quantity](base, cell):{_DIGITS.get(quantity, '.2f')}}"


_DIGITS = {"fusions": "+.1f", "state / θ": ".3f"}
BESIDE = ("net", "batch", "method", "FLOPs", "bytes", "time")


def _beside(base: dict, cell: dict) -> tuple[str, ...]:
    """The columns ``BESIDE``; three of them are ratios to the baseline."""
    return (
        cell["network"],
        str(cell["batch_size"]),
        label(cell),
        *(value_of(quantity, base, cell) for quantity in BESIDE[3:]),
    )


def label(cell: dict) -> str:
    """The method, and the mode of a GPU."""
    return cell["label"] + form(cell)


def form(cell: dict) -> str:
    """The mode of a GPU, as an addition to a name."""
    chosen = cell["command_buffers"]
    return "" if chosen == "default" else f", {chosen} command buffers"


def _time(cell: dict) -> str:
    time = cell["time"]
    if time is None:
        return "–"
    if cell["label"] == BASELINE:
        return f"{time['milliseconds']:.3g} ms"
    return f"{time['ratio']:.2f} ({time['ratio_low']:.2f}–{time['ratio_high']:.2f})"


def times(results: dict, name: str) -> str:
    """Step time and compile time of a method, in a sentence each."""
    return f"{step_time(results, name)}\n{_compile_time(results, name)}"


def step_time(results: dict, name: str) -> str:
    """The median and the worst step time of a method, in a sentence."""
    cells = [c for c in results["cells"] if c["label"] == name and c["time"]]
    return _sentence_on(f"Step time of {name}", [(c, c["time"]["ratio"]) for c in cells])


def _compile_time(results: dict, name: str) -> str:
    pairs = [
        (cell, cell["compile"] / base["compile"])
        for base, group in groups(results)
        for cell in group
        if cell["label"] == name
    ]
    return _sentence_on(f"Compile time of {name}", pairs)


def _sentence_on(what: str, ratios: list[tuple[dict, float]]) -> str:
    cell, worst = max(ratios, key=lambda pair: pair[1])
    median = float(np.median([ratio for _, ratio in ratios]))
    return (
        f"{what} relative to Flax's batch norm: median {median:.2f}, worst {worst:.2f} "
        f"({cell['network']}, batch size {cell['batch_size']})."
    )


def states(results: dict) -> str:
    """Megabytes of the state of each method."""
    baseline, *_ = states = results["states"]
    network = results["config"]["stored"]
    rows = [
        (
            each["label"],
            f"{each['state'] / 1e6:.3g}",
            f"{each['state'] / baseline['params']:.3f}",
        )
        for each in states
    ]
    side = "x".join(str(side) for side in SHAPES[network][:2])
    return (
        f"State of a {network} for {side} images and 1,000 classes, whose parameters take "
        f"{baseline['params'] / 1e6:.3g} MB, with windows for batch size 2:\n\n"
        + report.markdown_table(("method", "state, MB", "state / θ"), rows)
    )
