# SPDX-License-Identifier: Apache-2.0
"""Shared by studies: options, progress bar's total, results as files, command line."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console
    from rich.markdown import Markdown

from benchmarks.lib import data, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that every study has."""

    dataset: str = "digits"
    """digits (embedded), fashion_mnist, or any image classification set of
    tensorflow-datasets by name."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run per seed. A seed fixes the initial weights and the order of the examples."""
    epochs: int = 4
    """Passes over the training images."""
    examples: int | None = None
    """Largest number of images for training, and for testing."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results")
    """Folder for the results and finished runs."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for prepared data; tensorflow-datasets' default if not given."""

    def load(self) -> data.Dataset:
        """The data set."""
        return data.classified(self.dataset, self.data_dir, self.examples)


def publish(
    config: Any,
    found: dict[str, Any],
    console: Console,
    markdown: Callable[[dict], str],
    device: Any = None,
    **figures: Callable[[dict, Path], None],
) -> dict:
    """Writes results.json, table.md and the figures, and shows the table.

    ``device`` is the device of the measurement; JAX's first device if not given.
    """
    results = {
        "config": report.plain(config),
        "environment": report.environment(device),
        **found,
    }
    results = report.write_results(config.output / "results.json", results)
    (config.output / "table.md").write_text(markdown(results))
    for name, draw in figures.items():
        draw(results, config.output / f"{name}.svg")
    console.print(Markdown(markdown(results)))
    names = ["results.json", "table.md", *(f"{name}.svg" for name in figures)]
    console.print(f"written to {config.output}/: {', '.join(names)}")
    return results


def setting(results: dict) -> str:
    """The setting of the runs."""
    config = results["config"]
    return f"{config['dataset']}, {config['epochs']} epochs, {len(config['seeds'])} seeds"


def measured_on(results: dict) -> str:
    """Versions and device, the last sentence of a legend."""
    versions = results["environment"]
    return (
        f"JAX {versions['jax']}, Flax {versions['flax']}, Python {versions['python']}, "
        f"{versions['device']}, {versions['processor']}."
    )


def cli(
    config: type[Any],
    main: Callable[[Any, Console], dict],
    arguments: list[str] | None = None,
    quick: Any = None,
) -> None:
    """The command line of the module that defines ``main``.

    ``--quick`` replaces the default options by ``quick``.
    """
    module = inspect.getmodule(main)
    name = Path(str(inspect.getsourcefile(main))).stem
    text = (module and module.__doc__) or ""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if quick is not None:
        text = (
            f"{text.strip()}\n\n--quick makes the smallest run, in seconds; other options "
            "change it."
        )
    asked = quick is not None and "--quick" in given
    chosen = tyro.cli(
        config,
        args=[argument for argument in given if not (asked and argument == "--quick")],
        default=quick if asked else None,
        description=text,
        prog=name,
    )
    try:
        main(chosen, Console())
    except ValueError as error:
        sys.exit(f"{name}: {error}")
