# SPDX-License-Identifier: Apache-2.0
"""Tables, sentences and figures of the study of batch sizes, from its results."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import matplotlib.figure

from benchmarks.lib import report, study

VERDICT = ("small_batch_norm", "batch_norm", "nn.GroupNorm")
# Methods in the figures; the table has all.
DRAWN = (
    "small_batch_norm",
    "batch_norm",
    "nn.GroupNorm",
    "cross_iteration_batch_norm",
    "cross_iteration_batch_norm-burn_in",
    "group_batch_norm",
    "none",
)


def markdown(results: dict) -> str:
    """Accuracy, the gain of corrected inference, and accuracy at every rate."""
    config = results["config"]
    seen = config["epochs"]
    return (
        f"{study.setting(results)}; each method at its own best rate:\n\n"
        f"{_accuracies(results)}\n"
        "Test accuracy, %, mean ± standard error over seeds, the best of a network and "
        "batch size and all within two standard errors of it bold. The rate is the best "
        f"of {', '.join(f'{rate:g}' for rate in config['learning_rates'])} per 32 "
        "examples on a validation part of the training images, "
        f"with a seed of its own. {_edges(results)} All saw every training image {seen} "
        "times.\n\n"
        f"Points gained by corrected inference:\n\n{_corrections(results)}\n"
        "Mean ± standard error over pairs.\n\n"
        f"Batch size {config['every_rate_at']}, test accuracy, % at rate:\n\n"
        f"{_rates(results)}\n"
        "lost: runs whose loss is not finite. least: the worst of the rates, mean.\n\n"
        f"{study.measured_on(results)}\n"
    )


def of(results: dict, *labels: str) -> str:
    """The accuracies of some methods; of all without labels."""
    table = _accuracies(results, labels or None)
    return (
        f"{study.setting(results)}:\n\n{table}\nTest accuracy, %, "
        "mean ± standard error over seeds, each at its own best rate; bold: within two "
        f"standard errors of the best. {study.measured_on(results)}\n"
    )


def verdict(results: dict) -> str:
    """Each method's accuracies at its greatest and its smallest batch size."""
    sentences = []
    for chosen in results["config"]["networks"]:
        ways = [
            f"{label} {_mean(by_size, max)} and {_mean(by_size, min)}"
            for network, label, by_size in _grid(results)
            if network == chosen and label in VERDICT
        ]
        sentences.append(
            f"{chosen}, {results['config']['dataset']}, test accuracy: {', '.join(ways)}."
        )
    return "\n".join(sentences)


def _mean(by_size: dict[int, dict], choose) -> str:
    size = choose(by_size)
    return f"{_percent(by_size[size]['test']).mean():.1f} % at {size}"


def _accuracies(results: dict, methods: Sequence[str] | None = None) -> str:
    sizes = results["config"]["batch_sizes"]
    rows = [
        (network, label, *(_accuracy(results, by_size.get(size)) for size in sizes))
        for network, label, by_size in _grid(results)
        if methods is None or label in methods
    ]
    headings = ("net", "method at batch size", *map(str, sizes))
    return report.markdown_table(headings, rows)


def _accuracy(results: dict, cell: dict | None) -> str:
    if cell is None:
        return "refused"
    text = report.mean_error(_percent(cell["test"]))
    if cell["lost"]:
        text = f"{text} ({cell['lost']} lost)"
    return f"**{text}**" if _among_the_best(results, cell) else text


def _among_the_best(results: dict, cell: dict) -> bool:
    rivals = [
        _percent(other["test"])
        for other in _trained(results)
        if (other["network"], other["batch_size"]) == (cell["network"], cell["batch_size"])
    ]
    best, mine = max(rivals, key=np.mean), _percent(cell["test"])
    error = np.hypot(report.standard_error(best), report.standard_error(mine))
    return bool(best.mean() - mine.mean() <= 2 * error)


def _edges(results: dict) -> str:
    """The number of choices at an edge of the grid."""
    rates = results["config"]["learning_rates"]
    chosen = [cell["rate"] for cell in _trained(results)]
    low, high = chosen.count(rates[0]), chosen.count(rates[-1])
    return f"Of {len(chosen)} choices {low} are the lowest rate, {high} the highest."


def _corrections(results: dict) -> str:
    sizes = results["config"]["batch_sizes"]
    rows = [
        (network, label, *(_gain(by_size.get(size)) for size in sizes))
        for network, label, by_size in _grid(results)
        if by_size[max(by_size)]["corrected"][0] is not None
    ]
    return report.markdown_table(("net", "method at batch size", *map(str, sizes)), rows)


def _gain(cell: dict | None) -> str:
    if cell is None:
        return "refused"
    gain = _percent(cell["corrected"]) - _percent(cell["test"])
    return f"{gain.mean():+.1f} ± {report.standard_error(gain):.1f}"


def _rates(results: dict) -> str:
    size, rows = results["config"]["every_rate_at"], []
    for network, label, by_size in _grid(results):
        if size not in by_size:
            continue
        cells = by_size[size]["at_rates"]
        least = min(_percent(cell["test"]).mean() for cell in cells)
        lost = sum(cell["lost"] for cell in cells)
        shown = [report.mean_error(_percent(cell["test"])) for cell in cells]
        rows.append((network, label, *shown, f"{least:.1f}", str(lost)))
    rates = [f"{rate:g}" for rate in results["config"]["learning_rates"]]
    return report.markdown_table(("net", "method", *rates, "least", "lost"), rows)


def _grid(results: dict) -> Iterator[tuple[str, str, dict[int, dict]]]:
    """(network, method, {batch size: cell}), without the cells that the method refused."""
    config = results["config"]
    for network, label in itertools.product(config["networks"], config["methods"]):
        yield (
            network,
            label,
            {
                cell["batch_size"]: cell
                for cell in _trained(results)
                if (cell["network"], cell["label"]) == (network, label)
            },
        )


def _trained(results: dict) -> list[dict]:
    return [cell for cell in results["cells"] if "refused" not in cell]


def _percent(values: list[float]) -> np.ndarray:
    """Accuracies in percent."""
    return 100 * np.array(values, float)


@report.drawn
def figure(results: dict) -> Any:
    """Test error over the batch size, one panel per network."""

    def points(by_size):
        return {size: cell["test"] for size, cell in by_size.items()}

    sizes = results["config"]["batch_sizes"]
    return _panels(results, points, "examples per step", sizes)


@report.drawn
def rates_figure(results: dict) -> Any:
    """Test error over the learning rate at one batch size, one panel per network."""
    config = results["config"]

    def points(by_size):
        cell = by_size.get(config["every_rate_at"], {"at_rates": []})
        return {each["rate"]: each["test"] for each in cell["at_rates"]}

    label = f"peak rate per 32 examples, batch size {config['every_rate_at']}"
    return _panels(results, points, label, config["learning_rates"])


def _panels(results: dict, points, label: str, ticks) -> Any:
    networks = results["config"]["networks"]
    made = matplotlib.figure.Figure((4.6 * len(networks), 4.2))
    axes = made.subplots(1, len(networks), squeeze=False)[0]
    for axis, chosen in zip(axes, networks, strict=True):
        for network, name, by_size in _grid(results):
            if network == chosen and name in DRAWN:
                _line(axis, points(by_size), name)
        network = chosen.upper().replace("_HALVED", " (images halved)")
        axis.set(title=f"{network}, {results['config']['dataset']}", xlabel=label)
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axis.minorticks_off()
    axes[0].set_ylabel("test error, %")
    report.legend_below(made)
    return made


def _line(axis, points: dict, name: str) -> None:
    index = DRAWN.index(name)
    values = [100 - _percent(accuracies) for accuracies in points.values()]
    axis.errorbar(
        list(points),
        [value.mean() for value in values],
        [report.standard_error(value) for value in values],
        **report.look_of(name, index),
        label=name,
        lw=1.4 if index else 2.4,  # the first is thicker
        zorder=2 if index else 3,
    )


# Name of the file -> the function that draws it from the results.
FIGURES = {"batch_size": figure, "learning_rate": rates_figure}
