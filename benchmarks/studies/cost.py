# SPDX-License-Identifier: Apache-2.0
"""Cost of each method: time, FLOPs, bytes, memory, compile time and state of a step.

A training step (forward, backward, SGD with momentum) is compiled with every method. The
networks are an MLP, a basic stage of ResNet-18, and the whole ResNet-18 with the stem for
32x32 images. FLOPs and bytes are XLA's counts. Times are measured side by side in one
process, each as a ratio to the same network with Flax's BatchNorm. A table compares the
results with targets. If a method misses a target for its time, the study reports two more
results. The floor is the time for the memory traffic of the method's state alone, and a
profile lists the time of each part. A last table has the state of a ResNet-50.

Run it with ``python -m benchmarks.studies.cost``; on an accelerator with ``python -m
benchmarks.studies.cost --device gpu --networks resnet50 --batch-sizes 1 2 4 8
--command-buffers both --output results/cost_gpu``, and the same with ``--precision
bfloat16``. Outside a GPU leave out ``--command-buffers``.
"""

import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tyro
    from rich.console import Console
    from rich.progress import track

from benchmarks.lib import methods, networks, profile, report, runs, study, timing, training

BASELINE = "nn.BatchNorm"
SHAPES = {
    "mlp": (14, 14, 1),
    "cnn": (8, 8, 1),
    "stage": (32, 32, 3),
    "resnet18": (32, 32, 3),
    "resnet50": (224, 224, 3),
}
CommandBuffers = Literal["default", "with", "without"]
# Options of the compiler. A GPU launches the operations of a command buffer together.
COMMAND_BUFFERS: dict[CommandBuffers, dict[str, Any]] = {
    "default": {},
    "with": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUDNN,CUSTOM_CALL,CUBLASLT",
        "xla_gpu_graph_min_graph_size": 1,
    },
    "without": {"xla_gpu_enable_command_buffer": ""},
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
        return self.concerns(cell) and QUANTITIES[self.quantity](base, cell) > self.most


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
# Methods in the short verdict.
VERDICTS = (
    "batch_norm",
    "carried_batch_norm",
    "small_batch_norm",
    "cross_iteration_batch_norm",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    networks: tuple[str, ...] = ("mlp", "stage", "resnet18")
    """Networks to measure; also resnet50, at 224x224."""
    batch_sizes: tuple[int, ...] = (1, 2, 8)
    """Examples per step. One example is left out if batch norm cannot train on it."""
    methods: tuple[str, ...] = (
        "batch_norm",
        "nn.GroupNorm",
        "group_norm",
        "diminishing_batch_norm-0.5",
        "group_batch_norm",
        "carried_batch_norm",
        "small_batch_norm",
        "cross_iteration_batch_norm",
        "cross_iteration_batch_norm-gradient",
        "replay_batch_norm-16",
        "batch_renorm",
        "bidirectional_batch_norm",
        "moving_average_batch_norm",
        "momentum_batch_norm",
        "online_norm",
    )
    """Normalizers to compare with Flax's batch norm."""
    precision: runs.Precision = "float32"
    """Precision of activations and products."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Device to run on; JAX's own choice if not given."""
    command_buffers: Literal["default", "with", "without", "both"] = "default"
    """With or without CUDA graphs, on a GPU only; JAX's own choice if not given."""
    stored: str = "resnet50"
    """Network of the table of states. Its shapes are computed and nothing is run."""
    timing_rounds: int = 7
    """Rounds of steps for the times. 0 runs nothing and only counts."""
    timing_seconds: float = 0.2
    """Approximate time for a method in each round, of at least one step."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/cost")
    """Folder for results.json and table.md."""


QUICK = Config(
    networks=("mlp",),
    batch_sizes=(1, 2),
    methods=("batch_norm", "small_batch_norm"),
    stored="mlp",
    timing_rounds=2,
    timing_seconds=0.01,
)


def main(config: Config, console: Console) -> dict:
    """Counts and times every cell, writes and shows the results."""
    runs.check_networks((*config.networks, config.stored))
    device = _device(config.device)
    forms = _forms(config.command_buffers, device)
    groups = [
        group
        for group in itertools.product(config.networks, config.batch_sizes, forms)
        if group[:2] != ("mlp", 1)
    ]
    with jax.default_device(device):
        rates = _rates() if config.timing_rounds else None
        cells = [
            cell
            for group in track(groups, "counting and timing", console=console)
            for cell in _cells(config, *group)
        ]
        states = _states(config.stored, (BASELINE, *config.methods))
    return study.publish(
        config,
        {"rates": rates, "cells": cells, "states": states},
        console,
        markdown,
        device=device,
    )


def _device(platform: str | None) -> Any:
    try:
        return jax.devices(platform)[0]
    except RuntimeError as error:
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(
            f"--device {platform} is not to be found, JAX sees {there}; install JAX for "
            "it, as in pip install 'jax[cuda13]', or leave the option out."
        ) from error


def _forms(asked: str, device: Any) -> tuple[CommandBuffers, ...]:
    if asked == "default":
        return ("default",)
    if device.platform != "gpu":
        raise ValueError(
            f"--command-buffers {asked} is for a GPU, and the device is a "
            f"{device.platform}; leave the option out."
        )
    forms: tuple[CommandBuffers, ...] = ("with", "without")
    return tuple(form for form in forms if asked in (form, "both"))


def _rates() -> dict[str, float]:
    """FLOPs and bytes per second of the device, the best of several calls."""
    square, long = jnp.ones((2048, 2048)), jnp.ones(2**26)
    # The array is overwritten in place, because new memory would cost additional time.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    return {
        "flops": 2 * 2048**3 / _seconds(jax.jit(lambda x: x @ square), square),
        "bytes": 2 * long.nbytes / _seconds(negate, long),
    }


def _seconds(function: Callable, x: jax.Array, calls: int = 8) -> float:
    """The least time of several calls, each on the result of the one before."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        x = jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class Compiled(NamedTuple):
    """A compiled step."""

    step: Any
    seconds: float  # process time to trace, lower and compile
    params: int  # bytes
    state: int  # bytes of batch_stats
    layers: int  # number of normalized layers


def flops(network: str, size: int, names: Sequence[str]) -> dict[str, float]:
    """FLOPs of a training step with each method, as ratios to batch norm's."""
    trainers = make_trainers(network, size, (BASELINE, *names))
    counts = {
        name: _counts(_compile(trainer, SHAPES[network], size), name)["flops"]
        for name, trainer in trainers.items()
    }
    return {name: counts[name] / counts[BASELINE] for name in names}


def make_trainers(
    network: str,
    size: int,
    names: Sequence[str],
    precision: str = "float32",
    classes: int = 10,
) -> dict[str, training.Trainer]:
    """Trainers of a network with every method, for images of ``SHAPES``."""
    trainers = {}
    for name in names:
        norm = methods.parse(name, size).norm(steps=1000)
        model = networks.NETWORKS[network](
            norm=norm, classes=classes, dtype=jnp.dtype(precision)
        )
        trainers[name] = training.make_trainer(
            model, SHAPES[network], training.OPTIMIZERS["sgd"](0.01, 1000)
        )
    return trainers


def _compile(
    trainer: training.Trainer,
    shape: tuple[int, ...],
    size: int,
    form: CommandBuffers = "default",
) -> Compiled:
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    labels, rows = (jax.ShapeDtypeStruct((size,), jnp.int32) for _ in range(2))
    step: Any = trainer.step
    with _no_garbage():
        begin = time.process_time()
        lowered = step.lower(state, images, labels, rows)
        compiled = lowered.compile(compiler_options=COMMAND_BUFFERS[form])
        seconds = time.process_time() - begin
    return Compiled(
        step=compiled,
        seconds=seconds,
        params=_bytes(state.params),
        state=_bytes(state.batch_stats),
        layers=_layers(state.params),
    )


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Disables garbage collection, which takes longer the more programs exist."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _layers(params: Any) -> int:
    """The number of normalized layers; each has a scale."""
    paths = (path for path, _ in jax.tree.leaves_with_path(params))
    return sum(path[-1] == jax.tree_util.DictKey("scale") for path in paths)


def _counts(compiled: Compiled, name: str) -> dict[str, float]:
    """FLOPs, bytes accessed, fusions and greatest memory of a step.

    XLA counts the body of a loop once. The loop over the history runs once per slot: it
    reads the slot and the parameters, and for the gradient the slot and two sums again.
    """
    counted, memory = compiled.step.cost_analysis(), compiled.step.memory_analysis()
    turns = methods.WINDOW - 1 if name.startswith("cross_iteration_batch_norm") else 0
    reads = 5 if name == "cross_iteration_batch_norm-gradient" else 2
    return {
        "flops": counted["flops"] + turns * (reads // 2) * 2 * compiled.params / 4,
        "bytes": counted["bytes accessed"] + turns * reads * compiled.params,
        "fusions": fusions(compiled.step.as_text()),
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }


def fusions(program: str) -> int:
    """The number of fusions in the main computation of a compiled program."""
    return sum(" fusion(" in line for line in profile.computations(program)[profile.ENTRY])


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cells(config: Config, network: str, size: int, form: CommandBuffers) -> list[dict]:
    names = (BASELINE, *config.methods)
    trainers = make_trainers(network, size, names, config.precision)
    shape = SHAPES[network]
    made = {
        name: _compile(trainer, shape, size, form) for name, trainer in trainers.items()
    }
    # The compiled steps are run directly, so that nothing is compiled twice.
    trainers = {name: t._replace(step=made[name].step) for name, t in trainers.items()}
    batch = _batch(shape, size)
    times = _times(config, trainers, batch)
    place = {"network": network, "batch_size": size, "command_buffers": form}
    cells = [place | _cell(name, made[name], times.get(name)) for name in names]
    slow = [cell for cell in cells if _slow(cells[0], cell)]
    for cell in [cells[0], *slow] if slow else []:
        cell["profile"] = _profile(trainers[cell["label"]], batch)
    return cells


def _cell(name: str, compiled: Compiled, time: dict | None) -> dict:
    return {
        "label": name,
        **_counts(compiled, name),
        "compile": compiled.seconds,
        "state": compiled.state,
        "params": compiled.params,
        "layers": compiled.layers,
        "time": time,
        "profile": None,
    }


def _slow(base: dict, cell: dict) -> bool:
    """Whether the cell misses a target for its time."""
    return any(t.quantity == "time" and t.missed(base, cell) for t in TARGETS)


def _batch(shape: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).random((size, *shape), np.float32)
    return images, np.zeros(size, np.int32)


def _times(config: Config, trainers: dict, batch: tuple) -> dict[str, dict]:
    if config.timing_rounds == 0:
        return {}
    pairs = {name: (trainer, len(batch[1])) for name, trainer in trainers.items()}
    runners = timing.make_runners(pairs, *batch)
    steps = timing.steps_in(config.timing_seconds, runners[BASELINE])
    times = timing.side_by_side(runners, BASELINE, config.timing_rounds, steps)
    return {name: value._asdict() for name, value in times.items()}


def _profile(trainer: training.Trainer, batch: tuple) -> dict[str, float]:
    rows = np.arange(len(batch[1]), dtype=np.int32)
    state = trainer.init(jax.random.key(0))
    return profile.parts(trainer.step, state, (*jax.device_put(batch), rows))


def _states(network: str, names: Sequence[str]) -> list[dict]:
    """The state of each method for a network, with windows for batch size 2."""
    states = []
    for name, trainer in make_trainers(network, 2, names, classes=1000).items():
        state = jax.eval_shape(trainer.init, jax.random.key(0))
        sizes = {"state": _bytes(state.batch_stats), "params": _bytes(state.params)}
        states.append({"label": name, **sizes})
    return states


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
        f"{_table(results)}\n{legend}",
        verdict(results),
        targets(results),
        floors(results),
        _profiles(results),
        states(results),
    )
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


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
        for base, cells in _groups(results)
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
            _label(cell),
            cell["network"],
            str(cell["batch_size"]),
            _time(cell),
            f"{cell['state'] / cell['params']:.2f}",
            *(_value(quantity, base, cell) for quantity in headings[5:]),
        )
        for base, cell in pairs
    ]
    return (
        f"{report.markdown_table(headings, rows)}\nA training step's time, FLOPs and bytes "
        "as ratios to Flax's batch norm (time: median and quartiles of side-by-side "
        "ratios); bytes of batch_stats over bytes of the parameters. "
        f"{study.measured_on(results)}\n"
    )


def _groups(results: dict) -> list[tuple[dict, list[dict]]]:
    """(the cell of the baseline, its whole group) for each network and batch size."""
    cells = results["cells"]
    starts = [i for i, cell in enumerate(cells) if cell["label"] == BASELINE]
    ends = [*starts[1:], len(cells)]
    return [(cells[i], cells[i:j]) for i, j in zip(starts, ends, strict=True)]


def _table(results: dict) -> str:
    headings = (*BESIDE, "compile", "fusions", "memory", "state / θ")
    rows = [
        (
            *_beside(base, cell),
            _beyond("compile", base, cell, f"{base['compile']:.1f} s"),
            _beyond("fusions", base, cell, f"{base['fusions']}"),
            report.size(cell["memory"]),
            _value("state / θ", base, cell),
        )
        for base, cells in _groups(results)
        for cell in cells
    ]
    return report.markdown_table(headings, rows)


def _beyond(quantity: str, base: dict, cell: dict, own: str) -> str:
    """A quantity relative to the baseline, which has the value ``own``."""
    return own if cell is base else _value(quantity, base, cell)


def _value(quantity: str, base: dict, cell: dict) -> str:
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
        _label(cell),
        *(_value(quantity, base, cell) for quantity in BESIDE[3:]),
    )


def _label(cell: dict) -> str:
    """The method, and the mode of a GPU."""
    return cell["label"] + _form(cell)


def _form(cell: dict) -> str:
    form = cell["command_buffers"]
    return "" if form == "default" else f", {form} command buffers"


def _time(cell: dict) -> str:
    time = cell["time"]
    if time is None:
        return "–"
    if cell["label"] == BASELINE:
        return f"{time['milliseconds']:.3g} ms"
    return f"{time['ratio']:.2f} ({time['ratio_low']:.2f}–{time['ratio_high']:.2f})"


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
            (QUANTITIES[target.quantity](base, cell), Worst(target, base, cell))
            for base, cells in _groups(results)
            for cell in cells
            if target.concerns(cell)
        ]
        if fitting:
            found.append(max(fitting, key=lambda pair: pair[0])[1])
    return found


def verdict(results: dict) -> str:
    """The times of the main methods, and the number of met targets."""
    names = {cell["label"] for cell in results["cells"] if cell["time"]}
    sentences = [step_time(results, name) for name in VERDICTS if name in names]
    return "\n".join([*sentences, *_met(results)])


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
        for base, group in _groups(results)
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


def _met(results: dict) -> list[str]:
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
    return _value(target.quantity, base, cell) + ("" if known else place) + _form(cell)


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
        for base, cells in _groups(results)
        for cell in cells
        if cell["label"] in PASSES and _slow(base, cell)
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
        _label(cell),
        str(PASSES[cell["label"]]),
        f"+{least.milliseconds:.3g} ms, {least.ratio:.2f}",
        f"{extra:+.3g} ms, {ratio:.2f}",
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


def _profiles(results: dict) -> str:
    """Parts of a step beside those of the baseline, for missed targets."""
    rows, names = [], (*profile.PARTS, profile.UNNAMED)
    for base, cells in _groups(results):
        for cell in (cell for cell in cells if cell["profile"] and cell is not base):
            here, usual = cell["profile"], base["profile"]
            more = {name: here.get(name, 0.0) - usual.get(name, 0.0) for name in names}
            rows.append(
                (
                    cell["network"],
                    str(cell["batch_size"]),
                    _label(cell),
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


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    study.cli(Config, main, arguments, QUICK)


if __name__ == "__main__":
    cli()
