# SPDX-License-Identifier: Apache-2.0
"""Four facts of every estimator, from the library itself.

Each page of a method opens with a table of them. ``python -m benchmarks.tables`` writes it
in place of ``<!-- facts NAME NAME -->``, so that nobody types a fact.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib import report

WIDTH = 64  # inputs and features of the example layer
# The calls that make the estimators. Wrappers have batch norm inside.
CALLS = (
    "adaptive_batch_norm(batch_norm())",
    "batch_norm()",
    "batch_renorm()",
    "bidirectional_batch_norm(window=16)",
    "carried_batch_norm(window=16)",
    "corrected_inference(batch_norm(), examples=2)",
    "cross_iteration_batch_norm(window=8)",
    'cross_iteration_batch_norm(window=8, running="window")',
    "diminishing_batch_norm()",
    "filter_response_norm()",
    "fitted_inference(batch_norm())",
    "frozen(batch_norm(), after=0)",
    "ghost_batch_norm(examples=2)",
    "group_batch_norm(mix=0.5)",
    "group_norm()",
    "group_norm_plus(mix=0.5)",
    "mixed_inference(batch_norm(), examples=16)",
    "momentum_batch_norm(15 / 16)",
    "moving_average_batch_norm(window=16)",
    "online_norm()",
    "replay_batch_norm(window=16, samples=2)",
    "small_batch_norm(batch_size=2)",
    "streaming_batch_norm(window=16)",
)
HEADINGS = (
    "method",
    "state",
    "needs a layer",
    "works at one example per step",
    "[can be folded](../how_to/folding.md)",
)


class Facts(NamedTuple):
    """The four facts of an estimator, as text."""

    state: str
    layer: str
    one_example: str
    folds: str


def table(*names: str) -> str:
    """The facts of some methods, one row for each of their calls."""
    calls = [call for name in names for call in calls_of(name)]
    rows = [(f"`{call}`", *facts_of(made(call))) for call in calls]
    return f"{report.markdown_table(HEADINGS, rows)}\n{_legend(rows)}\n"


def calls_of(name: str) -> list[str]:
    """The calls of a method that its table describes."""
    calls = [call for call in CALLS if call.startswith(f"{name}(")]
    if not calls:
        raise ValueError(
            f"facts got the method {name}, expected one with a call in CALLS; add its call."
        )
    return calls


def made(call: str) -> cbn_jax.Estimator:
    """The estimator that a call of ``CALLS`` makes."""
    return eval(call, dict(vars(cbn_jax)))


def facts_of(estimator: cbn_jax.Estimator) -> Facts:
    """The facts, found by calls of the library."""
    one, eight = jnp.zeros((1, WIDTH)), jnp.zeros((8, WIDTH))
    image = jnp.zeros((1, 8, 8, WIDTH))
    behind_dense = works(_train, estimator, cbn_jax.dense, one)
    behind_convolution = works(_train, estimator, cbn_jax.convolution(), image)
    return Facts(
        state=state_of(estimator),
        layer=_yes(not works(_train, estimator, None, eight)),
        one_example="behind convolutions only"
        if behind_convolution and not behind_dense
        else _yes(behind_dense),
        folds=_yes(works(_fold, estimator)),
    )


def works(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a call raises no error. Nothing is computed, only traced."""
    try:
        jax.eval_shape(functools.partial(function, *args))
    except (TypeError, ValueError):
        return False
    return True


def _train(estimator: Any, layer: cbn_jax.Layer | None, inputs: jax.Array) -> Any:
    """One training step behind a layer, or on the inputs themselves."""
    if isinstance(estimator, cbn_jax.Bidirectional):
        estimator = estimator.at(estimator.init_backward(WIDTH))
    if layer is None:
        return estimator.train(estimator.init(WIDTH), inputs)
    kernel = jnp.zeros((*(3,) * (inputs.ndim - 2), WIDTH, WIDTH))
    x, source = cbn_jax.run_layer(layer, kernel, inputs)
    return estimator.train(estimator.init(WIDTH, layer, kernel), x, source)


def _fold(estimator: cbn_jax.Estimator) -> Any:
    kernel = jnp.zeros((WIDTH, WIDTH))
    state = estimator.init(WIDTH, cbn_jax.dense, kernel)
    return cbn_jax.fold(estimator, state, cbn_jax.dense, kernel)


def state_of(estimator: cbn_jax.Estimator) -> str:
    """The size of the state behind a dense layer, by what it grows with."""
    constant, per_feature, patches, copies = sizes(estimator)
    parts = [
        _counted(copies, "θ", "θ"),
        _counted(patches, "input patch", "input patches"),
        _counted(per_feature, "number per feature", "numbers per feature"),
        _counted(constant, "more", "more"),
    ]
    if isinstance(estimator, cbn_jax.Bidirectional):
        rows = len(jax.eval_shape(lambda: estimator.init_backward(WIDTH)).values)
        parts.append(f"{rows} per feature among the parameters")
    return ", ".join(filter(None, parts))


def sizes(estimator: cbn_jax.Estimator) -> tuple[int, int, int, int]:
    """The shares of 1, features, inputs, and inputs times features in the state's size.

    The size of a state is such a sum. The sizes behind four layers determine its terms.
    """
    layers = [(i, f) for i in (WIDTH, 2 * WIDTH) for f in (WIDTH, 2 * WIDTH)]
    terms = np.array([(1, f, i, i * f) for i, f in layers])
    counts = [_numbers(estimator, i, f) for i, f in layers]
    constant, features, inputs, both = np.linalg.solve(terms, counts).round().astype(int)
    return int(constant), int(features), int(inputs), int(both)


def _numbers(estimator: cbn_jax.Estimator, inputs: int, features: int) -> int:
    """The numbers in the state behind a dense layer."""
    kernel = jax.ShapeDtypeStruct((inputs, features), jnp.float32)
    init = functools.partial(estimator.init, features, cbn_jax.dense)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, kernel)))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}" if count else ""


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _legend(rows: list[tuple[str, ...]]) -> str:
    """Explanations of the words in the table."""
    states = " ".join(state for _, state, *_ in rows)
    return " ".join(
        sentence
        for word, sentence in {
            "θ": "θ: an array as large as the layer's parameters.",
            "patch": "Input patch: the inputs of one output value of the layer.",
            "among": "The optimizer writes the numbers among the parameters.",
        }.items()
        if word in states
    )
